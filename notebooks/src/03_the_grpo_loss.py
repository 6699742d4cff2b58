# %% [markdown]
# # 3. The GRPO loss, term by term
# Three functions of `grpo.py`: the clipped surrogate, the KL estimates, the weights of tokens. About 45 minutes. An
# exercise that you leave open is done by the library, so that every cell below it runs.
# %%
import math
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
# ## The clipped loss
# With r = exp(logp - old_logp), the loss of a token is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). Think before
# you write: a token has A < 0 and has become *likelier* since it was sampled. Should the clip stop us from pushing it
# down?
#
# Hint 1, a question: For A > 0, which of the two terms is smaller when r is 1.5? And for A < 0?
#
# Hint 2, the formula: r is [B, T], A is [B, 1]; both terms are [B, T]; masked tokens get 0. `clipped` is 1 where r is
# above the range and A > 0, -1 where r is below it and A < 0, else 0.
#
# Hint 3, a line with a hole: `loss = -torch.____(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)`
# %%
def policy_loss(logps, old_logps, advantages, clip_low=0.2, clip_high=0.2, mask=None, ratio="token", kind="clip"):
    """Loss [B, T] of each token, 0 outside the mask, and what was clipped [B, T]: 1 above, -1 below, 0 elsewhere.

    logps, old_logps: [B, T]; advantages: [B, 1]; mask: [B, T], True on real tokens, None means all. More exactly,
    clipped is 1 where r > 1 + clip_high and A > 0, -1 where r < 1 - clip_low and A < 0: where the min has no gradient.
    Only ratio "token" and kind "clip" are asked for here.
    """
    raise NotImplementedError
# %%
policy_loss = check(policy_loss)
# %% [markdown]
# Predict: the gradient of the loss with respect to logp at r = 1.5, for A = 1 and for A = -1.
# %%
predict(gradient_good=None, gradient_bad=None)  # a number for each None
# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
for axis, A, shade in zip(axes, (1.0, -1.0), ("tab:green", "tab:red"), strict=True):
    logps = torch.linspace(0.3, 2.0, 200).log().requires_grad_()
    loss, _ = policy_loss(logps[:, None], torch.zeros(200, 1), torch.full((200, 1), A))
    slope = torch.autograd.grad(loss.sum(), logps)[0]
    axis.plot(logps.detach().exp(), loss.detach(), color=shade, label="loss")
    axis.plot(logps.detach().exp(), slope, color=shade, linestyle="--", label="gradient")
    axis.axvspan(0.8, 1.2, color="gray", alpha=0.15)
    axis.set(title=f"A = {A:+g}", xlabel="ratio new / old probability")
    axis.legend()
plt.show()


def slope_at(r, A):
    logp = torch.tensor([[math.log(r)]], requires_grad=True)
    loss, _ = policy_loss(logp, torch.zeros(1, 1), torch.tensor([[A]]))
    return torch.autograd.grad(loss.sum(), logp)[0].item()


compare(gradient_good=slope_at(1.5, 1.0), gradient_bad=slope_at(1.5, -1.0))
# %% [markdown]
# Explain: why is the clip only on one side for each sign of A?
#
# Answer: A good token that is already 1.2 times as likely has had its push from this batch. A bad one that has become
# likelier is a step in the wrong direction, and its gradient must stay to undo it.
# %% [markdown]
# ## The KL estimates
# From one sampled token, with d = logp - ref_logp: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d.
#
# Hint 1, a question: Which of the three can be negative?
#
# Hint 2, the formula: All tensors are [B, T]. `torch.expm1(x)` is exp(x) - 1 without rounding.
#
# Hint 3, a line with a hole: `return torch.expm1(____) + d`
# %%
def kl_estimate(logps, ref_logps, kind="k3"):
    """Estimates KL(policy || reference) at each token: k1, k2 or k3, of the shape of `logps`."""
    raise NotImplementedError
# %%
kl_estimate = check(kl_estimate)
# %% [markdown]
# Now sample 20,000 tokens from a policy that is close to its reference. Predict the share of samples with k1 < 0.
# %%
predict(share_of_negative_k1=None)  # a number for each None
# %%
generator = torch.Generator().manual_seed(0)
logits = torch.randn(50, generator=generator, dtype=torch.float64)
policy, reference = logits.log_softmax(-1), (logits + 0.3 * torch.randn(50, generator=generator)).log_softmax(-1)
exact = (policy.exp() * (policy - reference)).sum().item()
drawn = torch.multinomial(policy.exp(), 20_000, replacement=True, generator=generator)
print(f"exact KL {exact:.4f}")
for kind in ("k1", "k2", "k3"):
    k = kl_estimate(policy[drawn], reference[drawn], kind)
    print(f"{kind}: mean {k.mean():.4f}, standard deviation {k.std():.4f}, smallest {k.min():+.4f}")
compare(share_of_negative_k1=(kl_estimate(policy[drawn], reference[drawn], "k1") < 0).double().mean().item())
# %% [markdown]
# ## The weights of tokens
# The loss is the sum over rows of w_i times the sum of the row's token losses. Three papers, three weights: `token` 1 /
# all tokens, `sequence` 1 / (rows × length of the row), `constant` 1 / (rows × max_tokens).
#
# Hint 1, a question: Under which of them does a token of a long answer count less?
#
# Hint 2, the formula: `lengths` is [B], the result [B]. The totals are those given, else those of `lengths`:
# their sum, and their number, empty rows among them. A row of length 0 gets 0, not infinity.
#
# Hint 3, a line with a hole: `"sequence": 1 / (rows * ____)`
# %%
def token_weights(lengths, kind="token", max_tokens=0, total_tokens=None, total_rows=None):
    """The weight [B] of each token of a row: kind token, sequence or constant. A row of length 0 gets weight 0."""
    raise NotImplementedError
# %%
token_weights = check(token_weights)
# %%
lengths = torch.tensor([29, 5, 12, 5])
figure, axes = plt.subplots(1, 3, figsize=(11, 2.4), layout="constrained", sharey=True)
heat = {kind: token_weights(lengths, kind, 40)[:, None] * grpo.completion_mask(lengths) for kind in grpo.TOKEN_WEIGHTS}
top = max(h.max().item() for h in heat.values())
for axis, (kind, h) in zip(axes, heat.items(), strict=True):
    image = axis.imshow(h, aspect="auto", cmap="Greys", vmin=0, vmax=top)
    axis.set(title=kind, xlabel="token", yticks=range(4), ylabel="completion")
figure.colorbar(image, ax=axes, label="weight")
plt.show()
# %% [markdown]
# Explain: with `sequence` weights, which wrong answer is punished less for each token?
#
# Answer: The long one: its advantage is spread over more tokens. `token` and `constant` do not have this.
