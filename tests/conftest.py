"""Small models, hand-made rollouts and an in-memory run that the tests share."""

import copy
import fcntl
import math
import os
import random
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a server
os.environ.setdefault("MKL_CBWR", "AUTO")  # as grpo.py does, which comes behind torch here
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines announce AMX and forbid it
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads of two would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import quick
import torch
from accelerate import Accelerator
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import grpo
from harness import curves, lora, smollm2
from harness.batching import policy_inputs
from harness.model_checks import switch_off_noise
from mathformer.tokenizer import build_tokenizer
from mathformer.train import build_model
from tasks import UsageError


def pytest_collection_modifyitems(items):
    quick.mark(items)


PRETRAINED = "mathformer/pretrained"
SHAPE = dict(vocab_size=33, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4)


def other_model(name: str):
    """A random model of the Hugging Face library. GPT-2 has learned absolute positions, which padding can shift."""
    torch.manual_seed(0)
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)).eval()
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    config = GPT2Config(vocab_size=33, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    """A random tiny model whose logits are far from uniform, so that mistakes show."""
    torch.manual_seed(0)
    model = build_model("tiny", tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def no_compile():
    """torchao compiles the steps of its optimizers, which takes longer than the tests.

    Not for all tests: before its first compilation torch asks the system for AMX, which vLLM's bf16 kernels need.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def plain_curves(request, monkeypatch):
    """Leaves a run's curves empty, since drawing them takes longer than a short run. Not where `curves` is marked."""
    if "curves" not in request.keywords:
        monkeypatch.setattr(curves, "plot", plot_nothing)


def plot_nothing(folder):
    (folder / "curves.png").touch()
    return folder / "curves.png"


@pytest.fixture
def make_config(tmp_path):
    """A Config of the small model; keyword arguments override."""

    def make(**settings) -> grpo.Config:
        defaults = dict(model=PRETRAINED, task="arithmetic", runs=str(tmp_path), max_prompt_tokens=48)
        return grpo.Config(**defaults | dict(max_completion_tokens=16, grad_clip=1e9) | settings)

    return make


def random_rollouts(vocabulary: int, groups: int = 4, group_size: int = 4, seed: int = 0) -> list[grpo.Rollout]:
    """Ragged rollouts with random ids, the last group dead, old log-probs near -2.5."""
    rng = random.Random(seed)
    rollouts = []
    for p in range(groups):
        prompt = [rng.randrange(3, vocabulary) for _ in range(rng.randrange(2, 9))]
        rewards = torch.tensor([[float((i + p) % 3 == 0) for i in range(group_size)]])
        if p == groups - 1:
            rewards[:] = 0
        advantages = grpo.group_advantages(rewards)[0].tolist()
        for g in range(group_size):
            ids = [rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 9))] + [2]
            logps = [-2.5 + rng.gauss(0, 0.5) for _ in ids]
            parts = dict(reward=rewards[0, g].item(), correct=rewards[0, g].item(), format=1.0)
            rollout = grpo.Rollout(prompt, ids, logps, truncated=False, parts=parts, reward=parts["reward"])
            rollout.advantage, rollout.dead = advantages[g], p == groups - 1
            rollout.ref_logps = [logp + rng.gauss(0, 0.3) for logp in logps]
            rollouts.append(rollout)
    return rollouts


@pytest.fixture
def make_rollouts(tokenizer):
    return partial(random_rollouts, len(tokenizer))


def byte_tokenizer():
    """One token a byte, with a chat template: enough of a tokenizer for any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", "<pad>", *alphabet])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct, shared by all processes of the tests, and by later runs of them on this machine."""
    made = Path(tempfile.gettempdir()) / f"grpo-smollm2-{smollm2.SHA256[:8]}-{os.getuid()}"
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            try:
                smollm2.make(made)
            except UsageError as error:
                if os.environ.get("REQUIRE_SMOLLM2"):
                    raise
                pytest.skip(f"SmolLM2 cannot be had: {error}")
    return made


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
    """A Qwen3 of random weights, as a folder that looks like one from the Hub."""
    folder, tokenizer = tmp_path_factory.mktemp("qwen3"), byte_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, eos_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def row_logps(model, rollout: grpo.Rollout, temperature: float = 1.0) -> torch.Tensor:
    """The oracle: log-probs [T] of one completion, from the model's own logits, without batch, padding or chunks."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    logits = model(ids).logits[0].double() / temperature
    start = len(rollout.prompt_ids)
    rows = [logits[start + t - 1].log_softmax(-1)[token] for t, token in enumerate(rollout.completion_ids)]
    return torch.stack(rows)


def row_entropies(model, rollout: grpo.Rollout, temperature: float = 1.0) -> torch.Tensor:
    """The oracle: entropies [T] at the completion's positions, from the model's own logits."""
    logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0].double() / temperature
    start = len(rollout.prompt_ids) - 1
    logps = logits[start : start + rollout.length].log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def expected_loss(model, rollouts: list[grpo.Rollout], config: grpo.Config) -> torch.Tensor:
    """The oracle: the whole loss of one optimizer step as a double loop, as the papers write it."""
    rollouts = [r for r in rollouts if not (config.mask_truncated and r.truncated)]
    total_tokens = sum(len(r.completion_ids) for r in rollouts)
    total = 0.0
    for r in rollouts:
        weight = {
            "token": 1 / total_tokens,
            "sequence": 1 / (len(rollouts) * len(r.completion_ids)),
            "constant": 1 / (len(rollouts) * config.max_completion_tokens),
        }[config.loss_weight]
        logps, entropies = row_logps(model, r, config.temperature), row_entropies(model, r, config.temperature)
        olds = r.old_logps if config.old_logps == "trainer" else r.logps
        of_row = (sum(logp - old for logp, old in zip(logps, olds, strict=True)) / len(logps)).exp()
        for logp, old, sampled, ref, entropy in zip(logps, olds, r.logps, r.ref_logps, entropies, strict=True):
            own = (logp - old).exp()
            ratio = of_row if config.ratio == "sequence" else own
            if config.ratio == "sequence" and config.importance_cap:  # weights of tokens: GSPO-token, section 4.3
                ratio = of_row.detach() * (logp - logp.detach()).exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            surrogate = torch.minimum(ratio * r.advantage, clipped * r.advantage)
            if config.surrogate == "cispo":
                surrogate = min(ratio.item(), 1 + config.clip_high) * r.advantage * logp
            if config.importance_cap:
                surrogate = surrogate * min(math.exp(old - sampled), config.importance_cap)
            difference = logp - ref
            kl = {
                "k1": lambda r, d: r * d,
                "k2": lambda r, d: r.detach() * d * d / 2,
                "k3": lambda r, d: r * ((-d).exp() - 1 + d),
            }[config.kl_kind](own, difference)
            kl = kl if config.kl_in == "loss" else 0.0
            total = total + weight * (-surrogate + config.kl_coef * kl - config.entropy_coef * entropy)
    return total


def with_adapters(model, config: grpo.Config, precision: str = "no", filled: bool = True):
    """The model, in which a run with this LoRA has put adapters; `filled`: with a B that changes what it computes."""
    switch_off_noise(model)
    lora.add_adapters(model, config, SimpleNamespace(mixed_precision=precision))
    if filled:
        fill_adapters(model, 1)
    return model


def fill_adapters(model, seed: int) -> None:
    """New random matrices B, which change each weight by a third of its size."""
    torch.manual_seed(seed)
    sizes = lora.noise_sizes(model)
    for name, weight in lora.trained(model).items():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3 * sizes[weight])


def largest_gap(model, samples) -> float:
    """Of the samplers' log-probs and those of the model, over all tokens."""
    with torch.no_grad():
        logps, _ = grpo.Policy(model)(**policy_inputs(samples, "cpu"))
    return max((logps[i, : s.length] - torch.tensor(s.logps)).abs().max().item() for i, s in enumerate(samples))


def check_that_new_adapters_sample(sampler, model, base, generate, tolerance: float) -> None:
    """`generate` gives what the sampler writes: that of the model with its adapters, also after they have changed."""
    for seed in (2, 3):
        found = generate()
        assert largest_gap(model, found) < tolerance and largest_gap(base, found) > 0.1
        fill_adapters(model, seed)
        assert largest_gap(model, found) > 0.1
        sampler.sync()


def updated(model, rollouts, config, accelerator) -> tuple[dict, dict]:
    """Metrics of one `update` by plain SGD of rate 1, and minus the gradients that it applied, by parameter name."""
    policy = grpo.Policy(copy.deepcopy(model), config.temperature, entropy_gradient=config.entropy_coef > 0)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    config.lr = 1.0
    metrics = grpo.update(policy, optimizer, accelerator, rollouts, config, step=1)
    return metrics, {name: p.detach() - before[name] for name, p in policy.model.named_parameters()}


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def is_close(a: float, b: float, tolerance: float = 1e-6) -> bool:
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def pass_flags(settings: dict, stands: dict | None = None) -> list[str]:
    """Settings as flags of a command line; values that are keys of `stands` are replaced by what they stand for."""
    return [f"--{name}={(stands or {}).get(value, value)}" for name, value in settings.items()]
