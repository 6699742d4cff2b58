# %% [markdown]
# # 7. The same code on a GPU
# Nothing is trained here. You read the log of a long run as you would read that of a run on a GPU: the same files, the
# same names. **It is a run of the small model on a CPU**, the longest that we have; little is measured on a GPU yet
# (docs/gpu.md). Then: what a card needs, what a step costs, how to launch. About 40 minutes.
# %%
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress")  # a progress bar of tqdm that we do not use

REPOSITORY = ""  # in Colab: the address of the repository
here = [Path.cwd(), *Path.cwd().parents, Path("grpo").resolve()]
if REPOSITORY and not any((p / "grpo.py").exists() for p in here):
    os.system(f"git clone -q {REPOSITORY} grpo && pip install -q -r grpo/requirements.txt")
ROOT = next(p for p in here if (p / "grpo.py").exists())
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "notebooks")) if p not in sys.path]

import json

import transformers
import viz
from IPython.display import display
from matplotlib import pyplot as plt
from workshop import compare, predict

from harness import loading, memory
from harness.command_line import parse_config

RUN = ROOT / "benchmarks" / "results" / "long_run"  # or the folder of a run of yours: ROOT / "runs" / ...


def read(name):
    return [json.loads(line) for line in (RUN / name).read_text().splitlines()]


metrics, evaluations, rollouts = read("metrics.jsonl"), read("eval.jsonl"), read("rollouts.jsonl")
# %% [markdown]
# ## The run
# `python benchmarks/long_run.py`: 1,000 steps of 256 completions, problems with up to 6 operators. The base was trained
# on at most 3 nested ones, and made to show its steps it solves half of these. 14 minutes on one busy core. Before you
# look: where will pass@1 end, which starts at 0.30? At which step does it stop rising?
# %%
predict(pass_at_1=None, last_step_that_gained=None)  # a number for each None
# %%
first, last = evaluations[0], evaluations[-1]
steps = [row["step"] for row in evaluations]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for key, line in (("accuracy", "s--"), ("accuracy_sampled", "o-")):
    below = [row[key] - row[f"{key}_low"] for row in evaluations]
    errors = [below, [row[f"{key}_high"] - row[key] for row in evaluations]]
    values = [row[key] for row in evaluations]
    axis.errorbar(steps, values, errors, fmt=line, capsize=3, markersize=4, label=key)
pass_at_8 = [row["pass_at_k"]["8"] for row in evaluations]
axis.plot(steps, pass_at_8, "^:", color="0.4", markersize=4, label="pass@8")
axis.set(xlabel="step", ylabel="share of 498 problems", ylim=(0.2, 0.7))
axis.legend(fontsize=8)
plt.show()
nearly = 0.95 * last["accuracy_sampled"]
within = next(row["step"] for row in evaluations if row["accuracy_sampled"] > nearly)
compare(pass_at_1=last["pass_at_k"]["1"], last_step_that_gained=within)
print(f"the base: pass@8 {first['pass_at_k']['8']:.2f}, made to show its steps {first['accuracy_worked']:.2f} right")
# %% [markdown]
# The policy learns to do always what it could do, in 200 steps, and then stays there for 800: pass@1 comes to the
# base's pass@8, and pass@8 does not move. A longer run is not a better one.
#
# ## The metrics, as `curves.png` and `metrics.csv` of any run have them
# Why did it stop? One of these panels says it.
# %%
keys = ["reward", "length", "zero_advantage_groups", "entropy", "grad_norm", "worked"]
figure = viz.curves({"the long run": [metrics]}, keys)
# %% [markdown]
# Explain: which one, and what would you change?
#
# Answer: `zero_advantage_groups` over 0.9: problems are always solved or never, and a group without disagreement
# teaches nothing. Easier steps in between (a curriculum), more completions of hard problems (`dead_groups resample`),
# partial credit for right steps, or a better base.
#
# ## What it wrote
# A group of the first step, and one of the last, at which answers still disagreed.
# %%
_, tokenizer = loading.load_model("mathformer/pretrained")
for step in (1, 1000):
    rows = [row for row in rollouts if row["step"] == step]
    groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    display(viz.group_table(next(g for g in groups if len({row["reward"] for row in g}) > 1)[:5], tokenizer))
# %% [markdown]
# ## Does it run on a small GPU?
# By arithmetic (`harness/memory.py`, which also refuses a run that cannot fit before anything is loaded). In float32,
# the trainer has 16 bytes a parameter: weights, gradients and AdamW's two moments. Predict for the 3B model: how many
# GB is that?
# %%
predict(trainer_gb=None)  # a number for each None
# %%
SHAPES = {  # from the models' config.json
    "Qwen2.5-0.5B": ("Qwen2", 896, 24, 14, 2, 64, 4864, True),
    "Qwen2.5-1.5B": ("Qwen2", 1536, 28, 12, 2, 128, 8960, True),
    "Qwen3-1.7B": ("Qwen3", 2048, 28, 16, 8, 128, 6144, True),
    "Qwen2.5-3B": ("Qwen2", 2048, 36, 16, 2, 128, 11008, True),
}


def shape(name):
    family, hidden, layers, heads, kv_heads, width, mlp, tied = SHAPES[name]
    return memory.Shape.of(getattr(transformers, f"{family}Config")(
        vocab_size=151936, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=width, intermediate_size=mlp, tie_word_embeddings=tied))


# your turn: other settings of grpo.py, such as --vllm_sleep true, --gradient_checkpointing false, --kl_coef 0
config = parse_config(["--config", str(ROOT / "configs" / "countdown-workshop.yaml")])
figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
colors = {}
for i, name in enumerate(SHAPES):
    needs = memory.needs(shape(name), config, half=True, vllm=True, on_gpu=True, free=80e9)
    phase = max(range(3), key=lambda j: sum(parts[j] for parts in needs.values()))  # of sampling, reference, update
    left = 0.0
    for part, sizes in needs.items():
        color = colors.setdefault(part, f"C{len(colors)}")
        label = part if i == len(SHAPES) - 1 else None
        axis.barh(name, sizes[phase] / 1e9, left=left, color=color, edgecolor="white", label=label)
        left += sizes[phase] / 1e9
    axis.text(left + 0.5, name, f"{left:.0f} GB", va="center")
axis.set(xlabel="GB at the largest moment of a step, settings of configs/countdown-workshop.yaml", xlim=(0, 125))
axis.legend(fontsize=7)
plt.show()
compare(trainer_gb=16 * shape("Qwen2.5-3B").parameters / 1e9)
# %% [markdown]
# ## One number in fifty
# LoRA leaves the weights as they are and trains two small matrices beside each: `W x + s B A x`, with `B` and `A` of
# rank 1, 8 or 32. The 3B model then trains a hundredth of its numbers; and the small one, at rank 1, 4,096 of its
# 202,304. At the rate of the default run, full tuning ends at 92 to 93 % right sampled answers. Where does rank 1 end,
# at its best?
# %%
predict(rank_1=None)  # percent, a number for each None
# %%
recorded = (ROOT / "benchmarks" / "results" / "lora.md").read_text()
rows = [line.strip("|").split(" | ") for line in recorded.splitlines() if line.startswith(("| all", "| rank"))]
sampled = {(what.strip(), float(rate)): list(map(float, cell.split())) for what, _, rate, cell, *_ in rows}
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for i, what in enumerate(dict.fromkeys(what for what, _ in sampled)):
    rates = [rate for name, rate in sampled if name == what]
    axis.plot(rates, [sum(sampled[what, rate]) / 3 for rate in rates], "o-", color=f"C{i}", label=what)
axis.set(xscale="log", xlabel="learning rate", ylabel="sampled accuracy, percent")
axis.legend(fontsize=8)
plt.show()
compare(rank_1=max(sum(found) / 3 for (what, _), found in sampled.items() if what == "rank 1"))
for name in SHAPES:
    adapters = 16 * shape(name).adaptable
    print(f"{name:14} rank 16 trains {adapters / 1e6:5.1f} M numbers, {adapters / shape(name).parameters:.1%}")
# %% [markdown]
# Do it yourself, in a minute: `python grpo.py --lora_rank 1 --lr 2e-3`. LoRA needs a higher learning rate, which
# is why the plot has several: at a rate that suits one of the two, the other loses.
#
# Explain: why can so few numbers be enough?
#
# Answer: Count what comes in. A reward of 0 or 1 says at most one bit about an answer, and this run has 15,360 answers,
# most of them in groups that say less. 4,096 numbers of 32 bits can hold all of that. In pretraining every token says
# something, and there LoRA falls behind (docs/small_cards.md has the literature).
# %% [markdown]
# ## What a step costs
# By arithmetic, **not measured**: training is 6 operations a parameter and token, 2 more for each forward pass besides
# (gradient checkpointing, the reference), at the 40 % of a card's bf16 peak that training usually gets.
# %%
PEAK = {"RTX 4090": 165e12, "A100": 312e12, "H100": 990e12}  # bf16 operations a second, from the data sheets
tokens = config.prompts_per_step * config.group_size * (200 + 500)  # a prompt of 200 and an answer of 500 tokens
print(f"seconds of training a step of {tokens:,} tokens (sampling comes on top, about as long)")
for name in SHAPES:
    work = (6 + 2 + 2) * shape(name).parameters * tokens
    print(f"{name:14}" + "".join(f"{card}: {work / (0.4 * peak):6.1f}   " for card, peak in PEAK.items()))
# %% [markdown]
# ## How to launch
# `pip install -r requirements-gpu.txt`, then `python grpo.py --config configs/countdown-workshop.yaml --steps 0`: it
# evaluates, prints one whole group and says whether the model is likely to learn. Read the group. Then without `--steps
# 0`. Ctrl-C saves; `--resume runs/...` goes on.
#
# A ladder. Each rung answers one question before the next one costs more; the minutes of the first three were measured
# on 2 CPU cores, those of the others are the arithmetic above.
#
# | rung | command | minutes | go on if |
# | --- | --- | --- | --- |
# | 1 | `python grpo.py --steps 0` | 0.3 | pass@8 is well above pass@1 |
# | 2 | `python grpo.py` | 1.1 | the reward rises, and you know what each curve means |
# | 3 | `python benchmarks/long_run.py` | 14 | you can say why it stops |
# | 4 | `--config configs/gsm8k-0.5b.yaml --steps 0` | some | format over 0.2, dead groups under 0.75 |
# | 5 | the same with `--steps 20` | 5 to 10 | no alarm, `sampler_logp_gap` under 0.05, the reward moves |
# | 6 | `--config configs/countdown-workshop.yaml` | 10 to 20 | accuracy over its interval before |
# | 7 | the same, one setting changed, three seeds each | 90 | the seeds do not overlap |
# | 8 | `--config configs/countdown-3b.yaml` | hours | |
#
# Explain: 16 prompts of 8, 8 prompts of 16, or twice the steps of 8 prompts of 8?
#
# Answer: The same number of completions three times. More prompts: a less noisy gradient; larger groups: fewer dead
# ones and a better baseline; more steps: fresher samples for each update. Notebook 5 could not tell group sizes apart
# at one budget. Start with 8 and change it if most groups are dead.
