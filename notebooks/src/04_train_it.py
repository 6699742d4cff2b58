# %% [markdown]
# # 4. Train it
# You write the loss of a step out of the parts of notebook 3, and train a small model with it. About 30 minutes. Two
# training runs, about a minute in all on two slow cores.
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

import random

import torch
import viz
from IPython.display import clear_output, display
from workshop import check, compare, predict

# %%
import experiments
import grpo
from harness import loading
from harness.batching import microbatches, pad, policy_inputs
from harness.metrics import rollout_metrics
from tasks import load_task

STEPS, SEED = 60, 0  # take another seed than your neighbour
# %% [markdown]
# ## The loss of a step
# Rewards have become advantages already. Of each microbatch, return its part of the loss of the whole step, out of
# `grpo.policy_loss`, `grpo.completion_mask` and `grpo.token_weights`.
#
# Hint 1, a question: What would a mean over the microbatch's own tokens do, if the rows were split in another way?
#
# Hint 2, the formula: `grpo.policy_loss` gives (loss [B, T], clipped [B, T]); `grpo.token_weights` gives w [B]; the
# result is the sum over rows of w_i times the sum over tokens of loss_it.
#
# Hint 3, a line with a hole: `return (loss.sum(1) * grpo.token_weights(lengths, "token", total_tokens=____)).sum()`
# %%
def step_loss(logps, old_logps, advantages, lengths, total_tokens):
    """The GRPO loss of a microbatch, a scalar: clipped at 0.2, all tokens of the step alike, no KL penalty.

    logps, old_logps: [B, T]; advantages: [B, 1]; lengths: [B]; total_tokens: of the whole step, all microbatches.
    """
    raise NotImplementedError
# %%
step_loss = check(step_loss)
# %% [markdown]
# ## The whole of GRPO
# Sample, judge, compare within the group, one gradient step. Read it once, line by line: each line is one of notebooks
# 1 to 3. Dead groups have advantage 0, so nothing is computed for them; their tokens still count in the total.
# %%
config = experiments.config_of(seed=SEED)  # 16 prompts a step, one update at a constant rate
task = load_task(config.task, config.task_args)


def train(steps):
    """Metrics of each step, and the rollouts of the first and of the last."""
    model, tokenizer = loading.load_model(config.model)
    loading.limit_threads(model)  # a model this small is as fast with one
    policy, sampler = grpo.Policy(model), grpo.TorchSampler(model, loading.find_eos(model, tokenizer))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    metrics, kept = [], {}
    for step in range(1, steps + 1):
        rollouts, _ = grpo.collect(sampler, tokenizer, task, config, step)  # 16 prompts, 8 completions each
        grpo.assign_advantages(rollouts, config)
        total_tokens = sum(r.length for r in rollouts)
        # grpo.py shuffles: the same order gives the same rounding
        shuffled = random.Random(f"{SEED}/{step}/minibatches").sample(rollouts, len(rollouts))
        loss, entropies = 0.0, []
        for batch in microbatches([r for r in shuffled if not r.dead], config.tokens_per_microbatch):
            inputs = policy_inputs(batch, "cpu")
            logps, entropy = policy(**inputs)
            old_logps = pad([r.logps for r in batch], "cpu")
            advantages = torch.tensor([[r.advantage] for r in batch])
            part = step_loss(logps, old_logps, advantages, inputs["lengths"], total_tokens)
            part.backward()
            loss += part.item()
            entropies += entropy[grpo.completion_mask(inputs["lengths"])].tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad()
        metrics.append({"step": step, **rollout_metrics(rollouts, config), "loss": loss, "grad_norm": grad_norm})
        metrics[-1]["entropy"] = sum(entropies) / max(1, len(entropies))
        kept[step] = rollouts
        if step % 10 == 0:
            print(f"step {step}: reward {metrics[-1]['reward']:.2f}")
    return metrics, kept[1], kept[steps], tokenizer
# %% [markdown]
# Predict, after 60 steps: the mean reward, and the share of answers that show their steps. At the start, the reward is
# about 0.5 (easy problems are drawn often), and one answer in fifteen shows its steps.
# %%
predict(reward=None, worked=None)  # a number for each None
# %%
mine, before, after, tokenizer = train(STEPS)
# %%
last = {key: sum(row[key] for row in mine[-5:]) / 5 for key in ("reward", "worked")}
compare(**last)
# %% [markdown]
# ## Rollouts first
# One group at the start, one at the end. What has changed in how the model answers?
# %%
for rollouts in (before, after):
    first = next((i for i, r in enumerate(rollouts) if not r.dead), 0) // 8 * 8
    display(viz.group_table(rollouts[first : first + 8], tokenizer))
# %% [markdown]
# ## The same run with `grpo.py`
# `grpo.train` with the same settings and seed. It also evaluates (here on the first 200 of the 500 problems that
# `grpo.py` takes as a rule; they are a little easier), logs and saves; the training is the same.
# %%
library, evaluations, _ = experiments.run(SEED, eval_size=200, steps=STEPS)
clear_output()
for key in ("reward", "length", "loss", "grad_norm"):
    print(f"{key}: largest difference {max(abs(a[key] - b[key]) for a, b in zip(mine, library, strict=True)):.1e}")
print("right, of all sampled answers to 200 problems that are in no training:", end=" ")
print(" → ".join(f"{row['accuracy_sampled']:.2f}" for row in evaluations))
# %%
keys = ["reward", "length", "worked", "zero_advantage_groups", "entropy", "loss"]
figure = viz.curves({"grpo.py": [library], "mine": [mine]}, keys)
# %% [markdown]
# Explain: the loss wanders around a value below 0 while the reward rises. Is it broken?
#
# Answer: No. The ratio is 1 on the first pass, so the loss is minus the mean of A over tokens, which follows how length
# and advantage go together, and not how good the answers are. Its gradient is what counts.
#
# Explain: nobody asked for longer answers. Why do they get longer?
#
# Answer: Within a group, the answers that show their steps are right more often, so they have A > 0. The model was
# built to have this to discover: it could work problems out, and was in the habit of not doing so.
