"""Hidden states to log-probs, as the plain head of grpo.Policy computes them, in three matrix products instead of four.

The logits of a microbatch, N tokens of a vocabulary of V, are often too large to keep. The plain head keeps none and
computes each chunk of them twice: that is the fourth product. Here a chunk's gradient is made while its logits are
there, with p = softmax(logits), y the chosen tokens as rows of zeros and one 1, and g = dL/dlogp of each token:

    dL/dlogits = g * (y - p)      dL/dhidden = dL/dlogits @ W      dL/dW = dL/dlogits^T @ hidden

For that, g must be known already in the forward pass, so that the loss is handed over as a function. Its gradient is
compared with the one that arrives in the backward pass, and if they differ (as with a ratio of whole sequences, where
tokens of other chunks matter) the chunks are computed again. The last chunk, often the only one, just waits with its
logits. See Liger Kernel, arXiv 2410.10989, section 3.2, for the same idea with a fixed loss.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from harness.model_checks import scale_and_cap


def applies(model: nn.Module) -> bool:
    """Whether the output head is a product and nothing else; models that cap their logits need the plain head."""
    return type(model.get_output_embeddings()) is nn.Linear and scale_and_cap(model.config)[1] is None


def best_head(policy, mask: Tensor, **hints) -> Callable:
    """`token_logps` with these hints, where it can be, else the policy's plain head: it has the entropy's gradient."""
    if policy.entropy_gradient or not applies(policy.model):
        return policy.plain_head
    return partial(token_logps, policy, mask=mask, **hints)


def token_logps(
    policy, hidden: Tensor, targets: Tensor, mask: Tensor, loss_of: Callable | None = None, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of `targets` [N], in float32; the entropies have no gradient.

    Args:
        policy: a grpo.Policy: its model, its temperature, and the tokens whose logits may exist at the same time.
        hidden: [N, D], what the head gets.
        mask: [B, T], True at the N tokens.
        loss_of: the loss of log-probs and entropies [B, T]: a tuple whose first entry is a scalar. Without it, the
            logits of all chunks but the last are computed again in the backward pass.
        entropy: False leaves them out, they are 0 then.
    """
    head, chunk = policy.model.get_output_embeddings(), policy.chunk
    scale = scale_and_cap(policy.model.config)[0] / policy.temperature
    slope = partial(slope_of, loss_of, mask, len(targets)) if loss_of else None
    with torch.autocast(hidden.device.type, enabled=False):
        if not (torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)):
            chunks = logits_of(hidden, head.weight, head.bias, scale, chunk)
            found = [logp_and_entropy(z, targets[at], entropy)[:2] for at, _, z in chunks]
            return tuple(map(torch.cat, zip(*found, strict=True)))
        return FastHead.apply(hidden, head.weight, head.bias, targets, scale, chunk, slope, entropy)


def slope_of(loss_of: Callable, mask: Tensor, n: int, at: slice, logps: Tensor) -> Tensor:
    """dL/dlogp of the tokens `at`, which have these log-probs: exact where a token's loss is its own affair."""
    with torch.enable_grad():
        flat = logps.new_zeros(n)
        flat[at] = logps
        flat.requires_grad_()
        padded = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
        loss = loss_of(padded, torch.zeros_like(padded))[0]
        return torch.autograd.grad(loss, flat)[0][at]


def logits_of(hidden, weight, bias, scale: float, chunk: int):
    """For each chunk of tokens: where it is, its hidden states, its logits [n, V], in float32 at least."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    for start in range(0, len(hidden), chunk):
        at = slice(start, start + chunk)
        h = hidden[at].to(wide)
        logits = nn.functional.linear(h, weight, bias)
        yield at, h, logits if scale == 1 else logits.mul_(scale)
        del logits  # before there are new ones


def logp_and_entropy(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token [n]; and all log-probs or, with `entropy`, which destroys the logits, all probabilities [n, V]."""
    all_logps = logits.log_softmax(-1)
    logp = all_logps.gather(1, targets[:, None])[:, 0]
    if not entropy:
        return logp, torch.zeros_like(logp), all_logps
    probs = all_logps.exp_()
    log_sum = logits.gather(1, targets[:, None])[:, 0] - logp
    return logp, log_sum - logits.mul_(probs).sum(-1), probs  # -sum p * (logit - log_sum)


class FastHead(torch.autograd.Function):
    """[N, D], [V, D], [V] or None, [N] to log-probs [N] and entropies [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, chunk, slope, entropy):
        ctx.scale, ctx.chunk = scale, chunk
        ctx.last, ctx.slopes, ctx.gradients = None, [], Gradients(hidden, weight, bias, ctx.needs_input_grad)
        logps, entropies = [], []
        wide = weight.to(torch.promote_types(hidden.dtype, torch.float32))  # once, and not for each chunk
        for at, h, logits in logits_of(hidden, wide, bias, scale, chunk):
            logp, H, probs = logp_and_entropy(logits, targets[at], entropy)
            logps.append(logp)
            entropies.append(H)
            if at.stop >= len(hidden):
                ctx.last = at, h, probs if entropy else probs.exp_()
            elif slope:
                ctx.slopes.append(slope(at, logp))
                probs = probs if entropy else probs.exp_()
                ctx.gradients.add(at, h, probs, targets, scale * ctx.slopes[-1], wide)
            del logits, probs
        ctx.save_for_backward(hidden, weight, bias, targets)
        logps, entropies = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, slopes, _):
        hidden, weight, bias, targets = ctx.saved_tensors
        gradients, (at, h, probs), ctx.last = ctx.gradients, ctx.last, None
        wide = weight.to(probs.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if at.start > 0:
                factor = same_up_to_a_factor(torch.cat(ctx.slopes), slopes[: at.start]) if ctx.slopes else None
                if factor is None:  # the loss was another one than was foreseen
                    gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad)
                    for place, states, logits in logits_of(hidden[: at.start], wide, bias, ctx.scale, ctx.chunk):
                        p = logits.softmax(-1)
                        gradients.add(place, states, p, targets, ctx.scale * slopes[place], wide)
                        del logits, p
                elif factor != 1:
                    gradients.multiply(factor)
            gradients.add(at, h, probs, targets, ctx.scale * slopes[at], wide)
        return *gradients.result(hidden, weight, bias), None, None, None, None, None


class Gradients:
    """Of hidden states, weight and bias of the head, added up chunk by chunk; None for what needs none."""

    def __init__(self, hidden, weight, bias, needed):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # the loss may be scaled later: until then fp16 could not hold it
        self.hidden = torch.empty_like(hidden, dtype=wide) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, at: slice, h: Tensor, probs: Tensor, targets: Tensor, slopes: Tensor, weight: Tensor) -> None:
        """`probs` [n, V] become the gradient of the logits, in place."""
        probs.mul_(-slopes[:, None]).scatter_add_(1, targets[at, None], slopes[:, None])
        if self.hidden is not None:
            self.hidden[at] = probs @ weight
        if self.weight is not None:
            self.weight.addmm_(probs.T, h)
        if self.bias is not None:
            self.bias += probs.sum(0)

    def multiply(self, factor: float) -> None:
        for gradient in (self.hidden, self.weight, self.bias):
            if gradient is not None:
                gradient.mul_(factor)

    def result(self, *of):
        found = (self.hidden, self.weight, self.bias)
        return [None if g is None else g.to(like.dtype) for g, like in zip(found, of, strict=True)]


def same_up_to_a_factor(foreseen: Tensor, slopes: Tensor) -> float | None:
    """The c with slopes = c * foreseen, None if there is none: data parallelism and loss scaling multiply a loss."""
    if torch.equal(foreseen, slopes):
        return 1.0
    factor = (slopes @ foreseen) / (foreseen @ foreseen)
    same = (slopes - factor * foreseen).abs().max() <= 1e-6 * slopes.abs().max()
    return float(factor) if same else None
