# %% [markdown]
# # 5. What can go wrong
# Nothing to write here: guess, look, turn a knob. Thin lines were recorded (`python benchmarks/workshop.py`: 60 steps
# of 128 completions, three seeds each); what runs in front of you is thick. About 45 minutes.
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

import math

import torch
import torch.nn.functional as F
import viz
from IPython.display import clear_output
from matplotlib import pyplot as plt
from workshop import compare, predict

import experiments
import grpo
from experiments import recorded
from harness import loading
from harness.evaluation import pass_at_k
from harness.prompts import draw_prompts
from harness.command_line import PRESET, parse_config
from harness.settings import Sampling
from tasks import load_task

SEED = 0  # take another seed than your neighbour


def after(arm, when="last"):
    """Share of right sampled answers on the evaluation problems, mean of the recorded seeds."""
    found = [one[when]["accuracy_sampled"] for one in recorded(arm)]
    return sum(found) / len(found)


def show(arms, keys, yours=None):
    """Recorded arms as thin lines, one a seed; and the share of right sampled answers before and after, each seed."""
    for arm in arms:
        seeds = " ".join(f"{one['last']['accuracy_sampled']:.2f}" for one in recorded(arm))
        print(f"{arm:18} right, of sampled answers: {after(arm, 'first'):.2f} → {seeds}")
    return viz.curves({arm: [one["rows"] for one in recorded(arm)] for arm in arms}, keys, yours)
# %% [markdown]
# ## How often do all answers of a group score the same?
# Then all advantages are 0, and the group teaches nothing. Predict for the base, before any training: the share of such
# dead groups among groups of 2 and of 16, and the share of groups of 16 with at least one right answer.
# %%
predict(dead_at_2=None, dead_at_16=None, pass_at_16=None)  # a number for each None
# %%
config = parse_config(["--config", str(PRESET), f"--seed={SEED}", "--prompts_per_step=100", "--device=cpu"])
task = load_task(config.task, config.task_args)
model, tokenizer = loading.load_model(config.model)
sampler = grpo.TorchSampler(model, loading.find_eos(model, tokenizer))
problems, _ = draw_prompts(task, tokenizer, config, step=1)
n, sizes = 32, (2, 4, 8, 16, 32)
sampled = grpo.complete(sampler, tokenizer, task, problems, n, Sampling(config.max_completion_tokens), SEED)
right = [int(sum(r.parts["correct"] for r in sampled[i : i + n])) for i in range(0, len(sampled), n)]
# of all ways to choose G of the 32 answers: those that are all right, or all wrong
dead = {G: sum(math.comb(c, G) + math.comb(n - c, G) for c in right) / math.comb(n, G) / 100 for G in sizes}
solved = {G: sum(pass_at_k(n, c, G) for c in right) / 100 for G in sizes}
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
axes[0].bar(range(n + 1), [right.count(c) for c in range(n + 1)], color="0.5")
axes[0].set(xlabel="right answers of 32", ylabel="problems")
axes[1].plot(sizes, dead.values(), "s--", label="dead groups")
axes[1].plot(sizes, solved.values(), "o-", label="pass_at_group")
axes[1].set_xscale("log", base=2)
axes[1].set(xlabel="group size G", xticks=sizes, xticklabels=sizes, ylim=(0, 1.02))
axes[1].legend()
plt.show()
compare(dead_at_2=dead[2], dead_at_16=dead[16], pass_at_16=solved[16])
# %% [markdown]
# So larger groups? With the *same number of completions* a step, a larger group means fewer problems:
# %%
figure = show(["G = 2", "G = 4", "base", "G = 16"], ["reward", "zero_advantage_groups"])
# %% [markdown]
# ## Does the prompt's template make the model worse?
# The same problems with parentheses around them, which the base has never seen there. How much does it lose *before*
# any training, and does training repair it?
# %%
predict(wrapped_before=None, wrapped_after=None)  # a number for each None
# %%
figure = show(["base", "wrapped"], ["correct", "worked", "zero_advantage_groups"])
compare(wrapped_before=after("wrapped", "first"), wrapped_after=after("wrapped"))
# %% [markdown]
# ## Does dividing by the length make wrong answers longer?
# A policy of two numbers: an answer is right by the flip of a coin, and after each token it stops or goes on, with one
# stopping probability for right and one for wrong answers. Only when to stop can be learned, and nothing pays for it.
# Predict how long wrong answers are after 250 steps; they start at 8 tokens.
# %%
predict(wrong_sequence=None, wrong_token=None, wrong_constant=None)  # a number for each None
# %%
def toy(kind, steps=250, cap=150):
    """Mean length of wrong answers at each step under these token weights."""
    torch.manual_seed(SEED)
    stop = torch.full((2,), -2.0, requires_grad=True)  # logit of stopping after a token: [wrong, right]
    optimizer, lengths_of_wrong = torch.optim.Adam([stop], lr=0.01), []
    for _ in range(steps):
        right = torch.randint(2, (16, 8))  # 16 prompts, 8 answers each
        drawn = torch.distributions.Geometric(stop.detach().sigmoid()[right]).sample().long().flatten() + 1
        lengths = drawn.clamp(max=cap)
        mask = grpo.completion_mask(lengths)
        stops_here = torch.arange(mask.shape[1]) == drawn[:, None] - 1
        logit = stop[right.flatten()][:, None]
        logps = F.logsigmoid(torch.where(stops_here, logit, -logit))
        advantages = grpo.group_advantages(right.float()).flatten()[:, None]
        loss, _ = grpo.policy_loss(logps, logps.detach(), advantages, mask=mask)
        (loss.sum(1) * grpo.token_weights(lengths, kind, cap)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths_of_wrong.append(lengths[right.flatten() == 0].float().mean().item())
    return lengths_of_wrong


figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
for kind, line in zip(("sequence", "token", "constant"), ("-", "--", ":"), strict=True):
    lengths = toy(kind)
    axis.plot(lengths, line, label=kind)
    compare(**{f"wrong_{kind}": sum(lengths[-20:]) / 20})
axis.set(xlabel="step", ylabel="tokens of a wrong answer")
axis.legend()
plt.show()
# %% [markdown]
# Why? `(A / length)` times the gradient of log-probs *is* REINFORCE with the reward `A / length`: a wrong answer loses
# less if it is longer. In the small model, length decides mostly whether an answer is right, and little of this is
# left:
# %%
figure = show(["base", "sequence weights", "constant weights"], ["correct", "length_wrong", "length_correct"])
# %% [markdown]
# ## What does dividing by the std do?
# Exactly, by adding up all outcomes of a group: the pull on a problem that is solved with probability p, as a multiple
# of the true gradient.
# %%
def pull(p, G, kind):
    total = 0.0
    for k in range(G + 1):  # k of the G answers are right
        A = grpo.group_advantages(torch.tensor([[1.0] * k + [0.0] * (G - k)], dtype=torch.float64), kind)[0]
        total += math.comb(G, k) * p**k * (1 - p) ** (G - k) * (A[:k].sum() * (1 - p) - A[k:].sum() * p).item() / G
    return total / (p * (1 - p))


ps = [i / 40 for i in range(1, 40)]
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
for G, line in ((2, ":"), (8, "-"), (64, "--")):
    axis.plot(ps, [pull(p, G, "grpo") / pull(0.5, G, "grpo") for p in ps], line, label=f"with std, G = {G}")
axis.axhline(1, color="0.6", label="without std, any G")
axis.set(xlabel="p, how often the problem is solved", ylabel="pull, 1 at p = 1/2", ylim=(0.8, 2.6))
axis.legend(fontsize=8)
plt.show()
print(f"G = 8: one factor of {pull(0.5, 8, 'grpo') / pull(0.5, 8, 'dr_grpo'):.2f} for all problems,", end=" ")
print(f"and a tilt of {pull(0.1, 8, 'grpo') / pull(0.5, 8, 'grpo'):.2f} toward p = 0.1 and p = 0.9")
figure = show(["base", "no std"], ["reward", "zero_advantage_groups"])
# %% [markdown]
# AdamW takes the common factor back, and the tilt is lost between the seeds: here, no difference.
#
# ## A higher learning rate, a lower KL
# Predict the share of right answers after 60 steps at 7e-4 (the base run), 3e-3 and 1e-2, and with a KL penalty of 0.1
# at the last two. Then run one yourself.
# %%
predict(lr_3e3=None, lr_3e3_with_kl=None, lr_1e2=None, lr_1e2_with_kl=None)  # a number for each None
# %%
# your turn: change a setting (python grpo.py --help has all), and run the cell again
mine, _, _ = experiments.run(SEED, lr=1e-2, steps=20)
clear_output()
arms = ["base", "lr 3e-3", "lr 3e-3, KL 0.1", "lr 1e-2", "lr 1e-2, KL 0.1", "KL 1"]
yours = {"yours": experiments.means_of_five(mine)}
figure = show(arms, ["correct", "length", "zero_advantage_groups"], yours)
for name, arm in (("lr_3e3", "lr 3e-3"), ("lr_1e2", "lr 1e-2")):
    compare(**{name: after(arm), f"{name}_with_kl": after(f"{arm}, KL 0.1")})
norms = ["none" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}" for row in mine[-6:]]
print("gradient norm of your last steps:", " ".join(norms))
# %% [markdown]
# Explain: why does a collapsed policy not come back, and what does the KL penalty change?
#
# Answer: It gives all problems the same few answers, so nearly all groups are dead and have no gradient; where all are,
# no update is made (`none` above). At 3e-3 a penalty of 0.1 holds the policy where it still learns; at 1e-2 the first
# steps are over before it can. A penalty of 1 at the usual rate stops the learning too. The learning rate comes first.
#
# ## A shorter cap, a weaker base
# Answers that show their steps need 20 tokens and more. With a cap of 8 they are cut off, and paid 0. Direct answers
# are right in 4 of 10. And a base that was pretrained for 1,500 steps instead of 26,000, then 120 steps of GRPO:
# predict the share of right answers after each. What `grpo.py` says before such a run: `python -m mathformer.train
# --output weak --steps 1500`, then `python grpo.py --config configs/arithmetic.yaml --model weak --steps 0`.
# %%
predict(cap_8=None, weak_base=None)  # a number for each None
# %%
figure = show(["base", "cap 8", "weak base"], ["correct", "worked", "zero_advantage_groups"])
compare(cap_8=after("cap 8"), weak_base=after("weak base"))
# %% [markdown]
# Under the cap it got *worse* than it was: showing steps, the way to learn, is closed, and direct answers that pay on
# the short problems of training do not on others. The weak base has too few groups that disagree, and those teach it to
# give one answer to all.
#
# ## What RL moves: pass@1 toward the base's pass@8
# %%
figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
for when, line, name in (("first", "s--", "before"), ("last", "o-", "after")):
    for one in recorded("base"):
        pass_at = one[when]["pass_at_k"]
        ks, label = [int(k) for k in pass_at], name if one["seed"] == 0 else None
        axis.plot(ks, pass_at.values(), line, color="C0" if name == "before" else "C1", linewidth=1, label=label)
axis.set(xlabel="k", ylabel="pass@k", ylim=(0, 1.02))
axis.legend()
plt.show()
