"""The fast head computes what the plain one of grpo.Policy does: the same numbers, with less work and memory."""

import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop

import grpo
from harness import fast_head, memory
from harness.batching import policy_inputs

D, V, ROWS = 16, 50, [7, 3, 12, 1]  # tokens of each row
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}


def a_model(bias: bool, dtype, scale: float = 1.0):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias).to(dtype)
    config = SimpleNamespace(logit_scale=scale)
    config.get_text_config = lambda: config
    return SimpleNamespace(get_output_embeddings=lambda: head, config=config), head


def a_batch(dtype):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(ROWS)
    mask, n = grpo.completion_mask(lengths), sum(ROWS)
    hidden = (3 * torch.randn(n, D, generator=generator, dtype=dtype)).requires_grad_()
    targets = torch.randint(V, (n,), generator=generator)
    old = torch.zeros(mask.shape, dtype=dtype)
    old[mask] = -4 + torch.randn(n, generator=generator, dtype=dtype)
    return hidden, targets, mask, old


def a_loss(old, mask, ratio="token", kind="clip", kl=0.0):
    """One such as `batch_loss` hands over: it clips, weighs rows, and may have a KL penalty."""
    advantages = torch.tensor([[1.5], [-0.5], [0.7], [-2.0]], dtype=old.dtype)

    def loss_of(logps, entropy):
        loss, clipped = grpo.policy_loss(logps, old, advantages, 0.2, 0.2, mask, ratio, kind)
        loss = loss + kl * grpo.kl_estimate(logps, old - 0.3).masked_fill(~mask, 0.0)
        return (loss.sum(1) * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=old.dtype)).sum(), clipped

    return loss_of


def fast(model, hidden, targets, temperature, chunk, *args, **kwargs):
    policy = SimpleNamespace(model=model, temperature=temperature, chunk=chunk)
    return fast_head.token_logps(policy, hidden, targets, *args, **kwargs)


def plain(model, hidden, targets, temperature):
    head, scale = model.get_output_embeddings(), model.config.logit_scale
    all_logps = (head(hidden) * scale / temperature).log_softmax(-1)
    return all_logps.gather(1, targets[:, None])[:, 0], -(all_logps.exp() * all_logps).sum(-1)


def padded(flat, mask):
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def gradients(loss, hidden, head, times=1.0):
    hidden.grad = None
    head.zero_grad()
    (loss * times).backward()
    return [hidden.grad, *(p.grad for p in head.parameters())]


def far(a, b) -> float:
    """The largest difference, in units of the largest number."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize(
    "dtype, chunk, bias, temperature, scale",
    itertools.product(CLOSE, [1, 5, 23, 100], [True, False], [1.0, 0.7], [1.0, 0.25]),
)
def test_numbers_and_gradients_are_those_of_the_plain_head(dtype, chunk, bias, temperature, scale):
    (model, head), (hidden, targets, mask, old) = a_model(bias, dtype, scale), a_batch(dtype)
    loss_of = a_loss(old, mask, kl=0.1)
    logps, entropy = plain(model, hidden, targets, temperature)
    expected = gradients(loss_of(padded(logps, mask), None)[0], hidden, head)
    found, H = fast(model, hidden, targets, temperature, chunk, mask, loss_of)
    assert found.dtype == H.dtype == dtype and not H.requires_grad
    assert far(found, logps) < CLOSE[dtype] and far(H, entropy) < 2 * CLOSE[dtype]
    for a, b in zip(gradients(loss_of(padded(found, mask), None)[0], hidden, head), expected, strict=True):
        assert far(a, b) < 3 * CLOSE[dtype]
    with torch.no_grad():
        again, H = fast(model, hidden, targets, temperature, chunk, mask)
        without, zero = fast(model, hidden, targets, temperature, chunk, mask, entropy=False)
    assert far(again, logps) < CLOSE[dtype] and torch.equal(again, without)
    assert far(H, entropy) < 2 * CLOSE[dtype] and not zero.any()


@pytest.mark.parametrize("times", [1.0, 3.0, 0.0, 65536.0])
@pytest.mark.parametrize("ratio, kind", [("token", "clip"), ("token", "cispo"), ("sequence", "clip")])
@pytest.mark.parametrize("handed_over", [True, False])
def test_the_gradient_that_arrives_counts_whatever_was_foreseen(monkeypatch, times, ratio, kind, handed_over):
    """Also if the loss is multiplied, is not a token's own affair, or is not handed over at all."""
    (model, head), (hidden, targets, mask, old) = a_model(True, torch.float64), a_batch(torch.float64)
    loss_of = a_loss(old, mask, ratio, kind)
    expected = gradients(loss_of(padded(plain(model, hidden, targets, 1.0)[0], mask), None)[0], hidden, head, times)
    made = []
    monkeypatch.setattr(fast_head, "Gradients", lambda *args, make=fast_head.Gradients: made.append(1) or make(*args))
    logps, _ = fast(model, hidden, targets, 1.0, 5, mask, loss_of if handed_over else None)
    found = gradients(loss_of(padded(logps, mask), None)[0], hidden, head, times)
    for a, b in zip(found, expected, strict=True):
        assert far(a, b) < 1e-12
    foreseen = handed_over and (ratio == "token" or times == 0)
    assert len(made) == (1 if foreseen else 2), "the gradients were made again, or were not"


def test_a_frozen_head_gets_no_gradient():
    (model, head), (hidden, targets, mask, old) = a_model(True, torch.float64), a_batch(torch.float64)
    loss_of = a_loss(old, mask)
    head.requires_grad_(False)
    (expected,) = torch.autograd.grad(loss_of(padded(plain(model, hidden, targets, 1.0)[0], mask), None)[0], hidden)
    logps, _ = fast(model, hidden, targets, 1.0, 5, mask, loss_of)
    (found,) = torch.autograd.grad(loss_of(padded(logps, mask), None)[0], hidden)
    assert far(found, expected) < 1e-12 and head.weight.grad is None


def test_bf16_hidden_states_get_bf16_gradients_and_float32_log_probs():
    (model, head), (hidden, targets, mask, old) = a_model(False, torch.bfloat16), a_batch(torch.float32)
    hidden = hidden.detach().bfloat16().requires_grad_()
    loss_of = a_loss(old, mask)
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = fast(model, hidden, targets, 1.0, 5, mask, loss_of)
        found = gradients(loss_of(padded(logps, mask), None)[0], hidden, head)
    wide, (hidden32, head32) = a_model(False, torch.float32)[0], (hidden.detach().float().requires_grad_(), None)
    head32 = wide.get_output_embeddings()
    head32.weight.data = head.weight.detach().float()
    expected_logps, _ = plain(wide, hidden32, targets, 1.0)
    expected = gradients(loss_of(padded(expected_logps, mask), None)[0], hidden32, head32)
    assert logps.dtype == torch.float32 and far(logps, expected_logps) < 1e-6
    assert [g.dtype for g in found] == [torch.bfloat16] * 2
    for a, b in zip(found, expected, strict=True):
        assert far(a.float(), b) < 2**-8


def product_flop(added_to, a, b, **kwargs) -> int:
    """Of `addmm_`, which the counter does not know."""
    return mm_flop(a, b)


def head_flops_and_bytes(is_fast: bool, chunk: int, rows: int = 8, length: int = 64) -> tuple[int, int]:
    """Of the head alone: forward and backward pass, tokens in several chunks."""
    model, head = a_model(False, torch.float32)
    n, vocabulary = rows * length, 4000
    head.weight = nn.Parameter(torch.randn(vocabulary, D))
    mask, old = torch.ones(rows, length, dtype=torch.bool), torch.full((rows, length), -8.0)
    hidden, targets = torch.randn(n, D, requires_grad=True), torch.randint(vocabulary, (n,))

    def loss_of(logps, entropy):
        return (grpo.policy_loss(logps, old, torch.ones(rows, 1), mask=mask)[0].sum() / n,)

    policy = SimpleNamespace(chunk=chunk, model=model, temperature=1.0, entropy_gradient=False)
    policy._token_logps = lambda *args: grpo.Policy._token_logps(policy, *args)
    with (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flop}) as counter,
        Peak() as peak,
    ):
        if is_fast:
            logps, _ = fast(model, hidden, targets, 1.0, chunk, mask, loss_of)
        else:
            logps, _ = grpo.Policy.plain_head(policy, hidden, targets)
        loss_of(padded(logps, mask), None)[0].backward()
    return counter.get_total_flops(), peak.bytes


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the tensors that exist at the same time, those of the graph among them."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


def test_three_products_and_less_memory_instead_of_four():
    plain_flops, plain_bytes = head_flops_and_bytes(is_fast=False, chunk=128)
    flops, size = head_flops_and_bytes(is_fast=True, chunk=128)
    print(f"FLOPs {plain_flops:,} -> {flops:,}; bytes {plain_bytes:,} -> {size:,}")
    assert flops == plain_flops * 3 // 4
    assert size < plain_bytes


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_policy_uses_it_and_gives_the_same_as_with_the_plain_head(monkeypatch, model, chunk):
    """Through `batch_loss`, with all that it hands over."""
    monkeypatch.setattr(memory, "logits_chunk", lambda config: chunk)
    rows = [grpo.Rollout([5, 6, 7], list(range(5, 5 + n)), [-3.0] * n, False) for n in (4, 9, 2)]
    for row, advantage in zip(rows, (1.0, -1.0, 0.5), strict=True):
        row.advantage, row.ref_logps = advantage, [-2.5] * row.length
    config = grpo.Config(model="m", task="t", kl_coef=0.1, temperature=0.8)
    found, calls = {}, []
    token_logps = fast_head.token_logps
    monkeypatch.setattr(fast_head, "token_logps", lambda *a, **k: calls.append(k) or token_logps(*a, **k))
    for is_fast in (True, False):
        if not is_fast:
            monkeypatch.setattr(fast_head, "applies", lambda model: False)
        policy = grpo.Policy(model, 0.8)
        model.zero_grad()
        loss = grpo.batch_loss(policy, rows, config, torch.device("cpu"), 15, 3)
        loss.backward()
        found[is_fast] = (
            loss.detach(),
            policy(**policy_inputs(rows, "cpu"))[1].detach(),
            [p.grad for p in model.parameters()],
        )
    assert callable(calls[0]["loss_of"]) and len(calls) == 2
    (loss, H, grads), (plain_loss, plain_H, plain_grads) = found[True], found[False]
    assert far(loss, plain_loss) < 1e-6 and far(H, plain_H) < 1e-6
    for a, b in zip(grads, plain_grads, strict=True):
        assert far(a, b) < 2e-6


def test_a_head_that_is_more_than_a_product_is_left_to_the_plain_one():
    model, head = a_model(True, torch.float32)
    assert fast_head.applies(model)
    model.config.final_logit_softcapping = 30.0
    assert not fast_head.applies(model)
    del model.config.final_logit_softcapping
    model.get_output_embeddings = lambda: nn.Sequential(head)
    assert not fast_head.applies(model)
