# ruff: noqa: E402, E501
# %% [markdown]
# # 4. Train it
# You write the loss of a step out of the parts of notebook 3, and train a small model with it. About 30 minutes.
# The model was built to be trainable: it can write out its steps, but is in the habit of not doing so.
# %%
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress")  # a progress bar of tqdm that we do not use

REPOSITORY = ""  # in Colab: the address of the repository
if REPOSITORY and not Path("grpo").exists() and not any((p / "grpo.py").exists() for p in Path.cwd().parents):
    os.system(f"git clone -q {REPOSITORY} grpo && pip install -q -r grpo/requirements.txt")
ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents, Path("grpo").resolve()) if (p / "grpo.py").exists())
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "notebooks")) if p not in sys.path]

import torch
import viz
from IPython.display import display
from workshop import check, compare, predict

# %%
import grpo
import loading
from settings import PRESET, parse_config

STEPS, SEED = 60, 0  # take another seed than your neighbour
# %% [markdown]
# ## One step
# Rewards have become advantages already. Of each microbatch, return its part of the loss of the whole step.
#
# <details><summary>Hint 1, a question</summary>What would a mean over the microbatch's own tokens do, if the rows were
# split in another way?
# <details><summary>Hint 2, the formula</summary>`policy_loss` gives (loss [B, T], clipped [B, T]); `token_weights` gives
# w [B]; the result is the sum over rows of w_i times the sum over tokens of loss_it.
# <details><summary>Hint 3, a line with a hole</summary><code>return (loss.sum(1) * token_weights(lengths, "token",
# total_tokens=____)).sum()</code></details></details></details>
# %%
def step_loss(logps, old_logps, advantages, lengths, total_tokens):
    """The GRPO loss of a microbatch, a scalar: clipped at 0.2, all tokens of the step alike, no KL penalty.

    logps, old_logps: [B, T]; advantages: [B, 1]; lengths: [B]; total_tokens: of the whole step, all microbatches.
    """
    raise NotImplementedError
# %%
step_loss = check(step_loss)
# %% [markdown]
# ## The loop
# The same loop runs twice: with `grpo.batch_loss`, and with yours in its place.
# %%
def train(batch_loss, steps=STEPS):
    """The rows of metrics of each step, and the first and the last step's rollouts."""
    names = dict(seed=SEED, prompts_per_step=16, device="cpu")
    config = parse_config(["--config", str(PRESET), *(f"--{name}={value}" for name, value in names.items())])
    task = loading.load_task(config.task, config.task_args)
    model, tokenizer = loading.load_model(config.model)
    accelerator, policy = loading.make_accelerator(config), grpo.Policy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    sampler = grpo.TorchSampler(model, loading.find_eos(model, tokenizer))
    library, grpo.batch_loss, rows, kept = grpo.batch_loss, batch_loss, [], []
    try:
        for step in range(1, steps + 1):
            rollouts, _ = grpo.collect(sampler, tokenizer, task, config, step)
            grpo.assign_advantages(rollouts, config)
            learned = grpo.update(policy, optimizer, accelerator, rollouts, config, step)
            rows.append({"step": step, **grpo.rollout_metrics(rollouts, config.group_size), **learned})
            if step in (1, steps):
                kept.append(rollouts)
    finally:
        grpo.batch_loss = library
    return rows, kept, tokenizer


library_loss = grpo.batch_loss


def my_batch_loss(policy, batch, config, device, total_tokens, total_rows):
    _, numbers = library_loss(policy, batch, config, device, total_tokens, total_rows)  # for the metrics only
    inputs = grpo.policy_inputs(batch, device)
    logps, _ = policy(**inputs)
    advantages = torch.tensor([[r.advantage] for r in batch])
    old_logps = grpo.pad([r.logps for r in batch], device)
    return step_loss(logps, old_logps, advantages, inputs["lengths"], total_tokens), numbers
# %% [markdown]
# Predict, after 60 steps of 16 prompts x 8 completions: the mean reward, and the share of answers that show their steps.
# %%
predict(reward=0.5, worked=0.5)  # put your guesses here
# %%
mine, (before, after), tokenizer = train(my_batch_loss)
library, _, _ = train(library_loss)
print("same rewards, same gradients:", [(r["reward"], r["grad_norm"]) for r in mine] == [
    (r["reward"], r["grad_norm"]) for r in library])
print(f"first step: reward {mine[0]['reward']:.2f}, worked {mine[0]['worked']:.2f}")
compare(reward=mine[-1]["reward"], worked=mine[-1]["worked"])
# %% [markdown]
# ## Rollouts before and after
# %%
for rollouts in (before, after):
    first = next((i for i, r in enumerate(rollouts) if not r.dead), 0) // 8 * 8
    display(viz.group_table(rollouts[first : first + 8], tokenizer))
# %%
keys = ["reward", "length", "worked", "zero_advantage_groups", "entropy", "loss"]
figure = viz.curves({"grpo.py": [library], "mine": [mine]}, keys)
# %% [markdown]
# Explain: the loss wanders around a value below 0 while the reward rises. Is it broken?
# <details><summary>Answer</summary>No. The ratio is 1 on the first pass, so the loss is minus the mean of A over tokens,
# which follows how length and advantage go together, and not how good the answers are. Its gradient is what counts.</details>
