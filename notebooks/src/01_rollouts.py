# %% [markdown]
# # 1. Rollouts, masks, verifiers
# What a model writes, which tokens count, and what an answer is paid. About 30 minutes. CPU only.
#
# You write the functions that say `raise NotImplementedError`; the cell below each compares yours with the library's
# and says what is wrong. What you leave open the library does, so that every cell runs. Hints open on a click.
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
import re

import torch
import viz
from IPython.display import HTML, display
from matplotlib import pyplot as plt
from workshop import check, compare, predict

# %%
import grpo
from harness import loading
from harness.batching import pad, row_tokens
from harness.command_line import PRESET, parse_config
from tasks import load_task


# %% [markdown]
# ## Which tokens are the completion's
# Completions of a batch differ in length. The end-of-sequence token is an action too: it is trained.
#
# Hint 1, a question: For a row of length 3, at which positions 0, 1, 2, 3, ... is the mask True?
#
# Hint 2, the formula: positions [T] against lengths [B, 1] gives [B, T].
#
# Hint 3, a line with a hole: `torch.arange(int(lengths.max())) < ____`
# %%
def completion_mask(lengths):
    """[B] completion lengths to a mask [B, T] that is True on real tokens, the end-of-sequence token among them."""
    raise NotImplementedError
# %%
completion_mask = check(completion_mask)
# %% [markdown]
# ## What an answer is paid
# The model answers at once, `<answer>12`, or shows its steps first, `<scratchpad>3*4=12<answer>12`. Pay 1 for the right
# integer in either form, and nothing for anything else: whatever is paid will be written more often.
#
# Hint 1, a question: Is `123` right where 12 is?
#
# Hint 2, the formula: The whole text has to match: perhaps a scratchpad, then the answer.
#
# Hint 3, a line with a hole: `re.____(r"(<scratchpad>[^<]*)?<answer>(-?[0-9]+)", text)`
# %%
def reward(text, value):
    """1.0 if `text` is, as a whole, `<answer>N` or `<scratchpad>...<answer>N`, and N is `value`, an int; else 0.0."""
    raise NotImplementedError
# %%
reward = check(reward)
# %% [markdown]
# ## pass@k from n samples
# Of n answers to one problem, c are right. How likely is it that k of them, chosen at random, hold a right one?
#
# Hint 1, a question: In how many ways can you choose k of the n samples, and all of them wrong?
#
# Hint 2, the formula: 1 - C(n - c, k) / C(n, k)
#
# Hint 3, a line with a hole: `1 - math.comb(____, k) / math.comb(n, k)`
# %%
def pass_at_k(n, c, k):
    """Probability that k of n samples, of which c are right, hold a right one."""
    raise NotImplementedError
# %%
pass_at_k = check(pass_at_k)
# %% [markdown]
# ## Eight rollouts of each of 100 problems
# A problem is `<sos><big>3*4` (`<big>`: the digits of numbers stand in the usual order). A is the advantage, how much
# better an answer was paid than the others of its group; a group is dead if all were paid the same.
# Predict: the share of right answers, and the share of problems of which at least one answer in eight is right.
# %%
predict(pass_at_1=None, pass_at_8=None)  # a number for each None
# %%
config = parse_config(["--config", str(PRESET), "--seed=0", "--prompts_per_step=100", "--device=cpu"])
task = load_task(config.task, config.task_args)
model, tokenizer = loading.load_model(config.model)
sampler = grpo.TorchSampler(model, loading.find_eos(model, tokenizer))
rollouts, _ = grpo.collect(sampler, tokenizer, task, config, 1)
grpo.assign_advantages(rollouts, config)
first = next(i for i, r in enumerate(rollouts) if not r.dead) // 8 * 8
group = rollouts[first : first + 8]
display(viz.group_table(group, tokenizer))
# %% [markdown]
# The same rows as tensors. Green: trained. White: the prompt, or padding (·).
# %%
ids = pad([r.prompt_ids + r.completion_ids for r in group], "cpu")
mask = completion_mask(torch.tensor([r.length for r in group]))
padding = torch.zeros(8, len(group[0].prompt_ids))
values = torch.cat([padding, mask.float()], 1).tolist()
rows = []
for r, row, weights in zip(group, ids.tolist(), values, strict=True):
    tokens = tokenizer.convert_ids_to_tokens(row)[: row_tokens(r)]
    rows.append(viz.strip(tokens + ["·"] * (len(row) - row_tokens(r)), weights))
display(HTML(f'<div style="white-space:nowrap;overflow-x:auto">{"".join(rows)}</div>'))
# %%
paid = [reward(r.text, int(r.parts["ground_truth"])) for r in rollouts]  # by your verifier
right = [int(sum(paid[i : i + 8])) for i in range(0, 800, 8)]
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.bar(range(9), [right.count(c) for c in range(9)], color="0.5")
axis.set(xlabel="right answers of 8", ylabel="problems", xticks=range(9))
plt.show()
compare(**{f"pass_at_{k}": sum(pass_at_k(8, c, k) for c in right) / 100 for k in (1, 8)})
# %% [markdown]
# Training draws problems with repetition, and short ones come up often. The evaluation takes each problem once, so the
# same model has a third right there, and `grpo.py --steps 0` says 33 %. A number is comparable only with its problems.
