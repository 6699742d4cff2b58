# %% [markdown]
# # 2. From REINFORCE to a group baseline
# Log-probs of tokens, a loss whose gradient is the policy gradient, and the group's mean as a baseline. About 45
# minutes.
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

import torch
from matplotlib import pyplot as plt
from workshop import check, compare, predict

# %%
import grpo


# %% [markdown]
# ## Log-probs of the tokens that were sampled
# A policy's action is a token. Its log-prob is all that the policy gradient needs of the model.
#
# Hint 1, a question: Over which dimension do the probabilities add up to 1?
#
# Hint 2, the formula: log_softmax of [B, T, V] over V, then from each position the one entry that `ids` [B, T] names.
#
# Hint 3, a line with a hole: `logits.log_softmax(-1).gather(-1, ____)[..., 0]`
# %%
def token_logps(logits, ids):
    """Log-probs [B, T] of the tokens `ids` [B, T] under next-token logits [B, T, V]."""
    raise NotImplementedError
# %%
token_logps = check(token_logps)
# %% [markdown]
# ## The policy gradient as a loss
# REINFORCE: the gradient of the expected reward is the mean of advantage times the gradient of the log-prob. Write a
# loss that has it as its gradient.
#
# Hint 1, a question: An optimizer goes downhill. Which sign makes good tokens likelier?
#
# Hint 2, the formula: logps [B, T], advantages [B, 1], mask [B, T]: minus the sum of A logp over the real tokens, over
# their number.
#
# Hint 3, a line with a hole: `-(advantages * logps)[mask].sum() / ____`
# %%
def policy_gradient_loss(logps, advantages, mask):
    """REINFORCE as a loss to minimise, a scalar: minus the mean over real tokens of advantage times log-prob."""
    raise NotImplementedError
# %%
policy_gradient_loss = check(policy_gradient_loss)
# %% [markdown]
# ## The group is its own baseline
# G answers to the same prompt: each is compared with the mean of its group, in units of the group's spread. So no value
# network is needed.
#
# Hint 1, a question: What should a group teach in which every answer got the same reward?
#
# Hint 2, the formula: rewards [P, G]; (r - mean) / (std + eps), mean and std [P, 1], the std with G - 1; exactly 0
# where all rewards of a group are equal.
#
# Hint 3, a line with a hole: `rewards.mean(____, keepdim=True)`
# %%
def group_advantages(rewards, kind="grpo", eps=1e-4):
    """Advantages [P, G] from rewards [P, G]; only kind "grpo" is asked for here. A dead group gets 0."""
    raise NotImplementedError
# %%
group_advantages = check(group_advantages)
# %% [markdown]
# ## Exact and sampled gradients
# Ten possible one-token answers, three of them right: few enough to compute the exact gradient. Predict: with a
# baseline, by what factor does the noise of a gradient from 8 samples shrink? (1: not at all)
# %%
predict(noise_ratio=None)  # a number for each None
# %%
generator = torch.Generator().manual_seed(0)
logits = torch.randn(10, generator=generator, dtype=torch.float64, requires_grad=True)
rewards = torch.zeros(10, dtype=torch.float64)
rewards[logits.detach().topk(3).indices] = 1.0
exact = torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)[0]


def sampled_gradient(with_baseline):
    ids = torch.multinomial(logits.detach().softmax(-1), 8, replacement=True, generator=generator)[:, None]
    r = rewards[ids[:, 0]]
    # the mean of the others: no bias, unlike the group's own mean, which shrinks the gradient by 1 - 1/G
    A = grpo.group_advantages(r[None], "rloo")[0] if with_baseline else r
    loss = policy_gradient_loss(token_logps(logits.expand(8, 1, 10), ids), A[:, None], torch.ones_like(ids).bool())
    return -torch.autograd.grad(loss, logits)[0]


clouds = {flag: torch.stack([sampled_gradient(flag) for _ in range(200)]) for flag in (False, True)}
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for flag, cloud in clouds.items():
    where = torch.arange(10) + (0.15 if flag else -0.15)
    label = "baseline" if flag else "no baseline"
    axis.errorbar(where, cloud.mean(0), cloud.std(0), fmt="s" if flag else "o", label=label)
axis.plot(range(10), exact, "k_", markersize=22, label="exact")
axis.set(title="mean and spread of 200 gradients from 8 samples each", xticks=range(10))
axis.set(xlabel=f"answer (paid: {rewards.nonzero()[:, 0].tolist()})", ylabel="gradient of its logit")
axis.legend()
plt.show()
noise = {flag: (cloud - exact).square().sum(1).mean().sqrt().item() for flag, cloud in clouds.items()}
compare(noise_ratio=noise[False] / noise[True])
# %% [markdown]
# Both have the exact gradient as their mean. Without a baseline, a wrong answer is paid 0 and moves the gradient only
# through the softmax, so its bar is short; with one, it is pushed down itself. The right answers become so much quieter
# that the noise as a whole falls.
#
# ## The loss is 0. Is it broken?
# %%
rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
logps = torch.full((4, 1), -1.0, dtype=torch.float64, requires_grad=True)
A = group_advantages(rewards)
loss, _ = grpo.policy_loss(logps, logps.detach(), A.T)
print(f"loss {loss.mean().item():+.4f}, gradient {torch.autograd.grad(loss.mean(), logps)[0][:, 0].tolist()}")
print("largest change for rewards 10 r + 3:", f"{(group_advantages(10 * rewards + 3) - A).abs().max().item():.1e}")
# %% [markdown]
# Explain: why is the loss 0 and the gradient not?
#
# Answer: The ratio is 1, so the loss is minus the mean advantage, and advantages of a group add up to 0. The gradient
# weighs each answer's own log-prob by its advantage, and these do not cancel.
