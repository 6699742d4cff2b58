"""Group Relative Policy Optimization (GRPO), the whole of it, in one file that you can read in one sitting.

GRPO (DeepSeekMath, arXiv 2402.03300) improves a language model by trial and error, on problems whose answers a
program can check. It is REINFORCE with two changes. The baseline is the mean reward of the other answers to the same
prompt, so there is no value network. And the ratio of new to old probability is clipped, as in PPO, so that a batch
can be used for more than one update. One step:

    1. draw P prompts and let the policy write G completions of each         draw_prompts, TorchSampler.generate
    2. let the task's verifier pay each completion                           score
    3. advantage = reward minus the group's mean, over the group's std       group_advantages
    4. log-probs of the same tokens under the policy as it now is            Policy.forward
    5. ratio = exp(logp - old logp); loss = -min(ratio*A, clip(ratio)*A)     policy_loss
    6. optionally + kl_coef * KL(policy || reference)                        kl_estimate, KL_IN_LOSS
    7. sum over tokens with one weight a row, backward, clip, AdamW          token_weights, update

There is no learned reward model, no critic and no replay. Lines that a student will want to change are marked
`# GRPO:`.

    python grpo.py                              arithmetic on a CPU, about a minute, nothing to download
    python grpo.py --steps 0                    evaluate, show one group of completions, stop
    python grpo.py --model M --task T           any causal language model, any task
    python grpo.py --resume runs/<run>          go on with a run that was stopped
    python grpo.py --help                       every setting
"""

import csv
import dataclasses
import glob
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if sys.platform == "darwin":  # before torch is imported: operations that Apple's GPU lacks then run on the CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PRESET = HERE / "configs" / "arithmetic.yaml"  # what the plain command runs


class UsageError(Exception):
    """Something a person has to change: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """All settings. The defaults are safe for language models of 0.5B parameters and more."""

    # What is trained, and on what
    model: str = ""
    """Hugging Face model: a folder, or a name on the Hub"""
    task: str = ""
    """a built-in task (arithmetic), module:Class, or path/to/file.py:Class"""
    task_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the task, for example --task_args.max_depth 2"""
    seed: int = 0
    """seed of everything random; on a CPU the same seed gives the same run"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to run; auto takes a GPU if there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic of the forward and backward pass (weights are always fp32); auto is bf16 on CUDA, else fp32"""
    about: str = ""
    """a sentence about this recipe, printed at the start"""

    # Sampling
    prompts_per_step: int = 32
    """P, the prompts of a step"""
    group_size: int = 8
    """G, the completions of each prompt that are compared with each other"""
    max_prompt_tokens: int = 512
    """longer prompts are left out and counted"""
    max_completion_tokens: int = 1024
    """a completion is cut off here, and then counts as truncated"""
    temperature: float = 1.0
    """sampling temperature; training divides the logits by it too"""
    top_p: float = 1.0
    """nucleus sampling; 1 is off"""
    top_k: int = 0
    """sample from the k most likely tokens only; 0 is off"""
    sample_rows: int = 256
    """completions that are sampled at the same time"""

    # The algorithm
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """how rewards of a group become advantages (group_advantages)"""
    loss_weight: Literal["token", "sequence", "constant"] = "token"
    """how tokens are averaged: token (DAPO), sequence (GRPO), constant (Dr. GRPO) (token_weights)"""
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 + clip_high (DAPO: 0.28)"""
    kl_coef: float = 0.0
    """weight of the KL penalty toward the model as it was at the start; 0 needs no second model"""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """estimator of that KL (kl_estimate)"""
    old_logps: Literal["sampler", "trainer"] = "sampler"
    """whose log-probs the ratio is taken against; top_k or top_p need trainer, which is then chosen"""
    epochs: int = 1
    """passes over the completions of a step"""
    minibatches: int = 1
    """optimizer steps a pass; must divide prompts_per_step * group_size"""
    drop_dead_groups: bool | None = None
    """leave groups of equal rewards out of the backward pass; by default exactly when kl_coef is 0"""
    offload_reference: bool = False
    """keep the reference model on the CPU while it is not needed"""

    # Optimization
    steps: int = 500
    """GRPO steps; 0 only evaluates and shows one group"""
    lr: float = 1e-6
    """peak learning rate of AdamW"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """after the warm-up: constant, or down to 0 along a line or a cosine"""
    warmup_steps: int = 0
    """steps in which the learning rate rises to its peak"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    adam_beta2: float = 0.999
    """AdamW's second beta"""
    grad_clip: float = 1.0
    """largest norm of the gradient; a longer one is scaled down to it"""
    tokens_per_microbatch: int = 16384
    """tokens, padding included, that go through the model at once: lower it when memory runs out"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: a third slower, far less memory"""

    # Evaluation
    eval_steps: int = 50
    """evaluate every so many steps, besides before the first and after the last; 0 only then"""
    eval_samples: int = 8
    """sampled completions of each evaluation prompt, besides a greedy one"""

    # What is kept and shown
    runs: str = "runs"
    """folder in which the run's own folder is made"""
    save_steps: int = 50
    """write a checkpoint every so many steps"""
    keep_last: int = 2
    """checkpoints to keep"""
    print_steps: int = 50
    """show three completions every so many steps; 0 shows none"""
    resume: str = ""
    """folder of a run to go on with; its settings are used"""

    def __post_init__(self):
        if not self.model or not self.task:
            raise UsageError("both --model and --task are needed (or neither: then the arithmetic preset runs)")
        at_least = dict(group_size=2, prompts_per_step=1, max_prompt_tokens=1, max_completion_tokens=1, steps=0)
        at_least |= dict(epochs=1, minibatches=1, sample_rows=1, tokens_per_microbatch=1, top_k=0, eval_steps=0)
        at_least |= dict(eval_samples=1, save_steps=1, keep_last=1, print_steps=0, warmup_steps=0, kl_coef=0)
        at_least |= dict(clip_low=0, clip_high=0, weight_decay=0)
        why = {"group_size": ": with one completion there is nothing to compare it with"}
        for name, lowest in at_least.items():
            if not getattr(self, name) >= lowest:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be {lowest} or more{why.get(name, '')}")
        for name in ("temperature", "top_p", "lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be greater than 0")
        if self.top_p > 1:
            raise UsageError(f"top_p is {self.top_p}, it must be at most 1")
        if self.prompts_per_step * self.group_size % self.minibatches:
            rows = f"prompts_per_step * group_size = {self.prompts_per_step * self.group_size}"
            raise UsageError(f"minibatches is {self.minibatches}, it must divide {rows}")
        if self.top_k or self.top_p < 1:
            self.old_logps = "trainer"  # the sampler's log-probs are then of another distribution than the trainer's
        if self.drop_dead_groups is None:
            self.drop_dead_groups = self.kl_coef == 0  # with a KL penalty a dead group still has a gradient


CHANGEABLE_ON_RESUME = {"steps", "eval_steps", "save_steps", "keep_last", "print_steps", "about", "runs", "resume"}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Tasks and rewards
# ---------------------------------------------------------------------------------------------------------------------
# A task is a class with four methods:
#
#     train(rng, step) -> example       one training problem, a dict; all randomness from `rng`, a random.Random
#     eval() -> [example, ...]          the evaluation problems, always the same
#     prompt(example) -> str or list    text, or chat messages [{"role": ..., "content": ...}, ...]
#     reward(text, example) -> dict     "reward" and "correct", "format", "prediction", "ground_truth"; any further
#                                       number is a part of the task's own and is averaged and logged under its name
#
# and, if it likes, two attributes: `prefill`, text put behind each prompt as the beginning of the answer (`text` above
# is the prefill plus the completion), and `worked_prefix`, which makes the model show its steps in the evaluation.

TASKS = {"arithmetic": "mathformer:ArithmeticTask"}
REWARD_KEYS = ("reward", "correct", "format", "prediction", "ground_truth")
REFLECTION = re.compile(r"\b(wait|hmm|let me (re)?check|double[- ]check|verify|recheck|try again|re-?evaluate)\b", re.I)


def load_task(name: str, task_args: dict[str, Any]):
    """The task called `name`: built-in, `module:Class`, or `path/to/file.py:Class`.

    Raises:
        UsageError: there is no such task, or it does not take these arguments.
    """
    where, _, class_name = TASKS.get(name, name).rpartition(":")
    if not where:
        raise UsageError(
            f"unknown task {name!r}: built in are {', '.join(TASKS)}; "
            "your own is module:Class or path/to/file.py:Class"
        )
    try:
        if where.endswith(".py"):
            if not Path(where).is_file():
                raise UsageError(f"task {name!r}: there is no file {where}")
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise UsageError(f"task {name!r} cannot be imported: {error}") from error
    if not hasattr(module, class_name):
        raise UsageError(f"task {name!r}: {where} has no class {class_name}")
    task_class = getattr(module, class_name)
    parameters = inspect.signature(task_class).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [] if takes_any else [key for key in task_args if key not in parameters]
    if unknown:
        raise UsageError(f"task {name!r} has no argument {unknown[0]!r}; it has: {', '.join(parameters) or 'none'}")
    try:
        return task_class(**task_args)
    except (ValueError, TypeError) as error:
        raise UsageError(f"task {name!r}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# 3. Sampling
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One completion, from the sampler to the log. Token ids are kept as they were sampled, never encoded again."""

    prompt_ids: list[int]
    completion_ids: list[int]  # with the end-of-sequence token, if the model wrote it
    logps: list[float]  # the sampler's log-prob of each completion token
    truncated: bool  # ran into max_completion_tokens
    example: dict = field(default_factory=dict)
    prompt: str = ""
    text: str = ""  # prefill and completion, special tokens left out: what the verifier judges
    parts: dict = field(default_factory=dict)  # what the task's reward() returned
    reward: float = 0.0
    advantage: float = 0.0
    dead: bool = False  # all rewards of its group are equal
    old_logps: list[float] | None = None  # the trainer's, where those are used
    ref_logps: list[float] | None = None  # the reference's, where there is one

    @property
    def length(self) -> int:
        return len(self.completion_ids)


def output_logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [..., D] to logits [..., V] in float32, whatever the precision of the model.

    The sampler and the trainer both go through here, so that their log-probs are of the same arithmetic. Autocast is
    off: inside it a float32 product would come back as bf16, which has 3 significant digits.
    """
    head = model.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(hidden.float(), head.weight.float(), bias)


def keep_top(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits [B, V] with -inf outside the `top_k` largest and outside the smallest set of probability >= `top_p`.

    top_k 0 and top_p 1 are off. The most likely token always stays.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the mass before this token is enough already
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logits


class TorchSampler:
    """Samples with the trainer's own model, on any device, by hand.

    Each prompt goes through the model once; its G completions share that key-value cache. Rows that are finished
    leave the batch, so that a step costs the tokens that are still being written and no more.
    """

    def __init__(self, model: nn.Module, eos_ids: set[int], pad_id: int, sample_rows: int = 256, autocast=nullcontext):
        self.model, self.pad_id, self.sample_rows, self.autocast = model, pad_id, sample_rows, autocast
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(sorted(eos_ids), device=self.device)
        self.generator = torch.Generator(self.device)  # its own, so that sampling does not depend on anything else

    def sync(self) -> None:
        """Called after each update. Nothing to do: these are the trainer's own weights."""

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        group_size: int,
        max_tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[Rollout]:
        """`group_size` completions of each prompt, those of one prompt next to each other.

        Temperature 0 takes the most likely token. The log-probs are those of the distribution that was sampled from
        (of the model itself, at temperature 0).
        """
        self.model.eval()
        self.generator.manual_seed(seed)
        at_once = max(1, self.sample_rows // group_size)
        rollouts = []
        for i in range(0, len(prompts), at_once):
            chunk = prompts[i : i + at_once]
            rollouts += self._generate(chunk, group_size, max_tokens, temperature, top_p, top_k)
        return rollouts

    def _generate(self, prompts, group_size, max_tokens, temperature, top_p, top_k) -> list[Rollout]:
        # Left padding puts the last prompt token of every row in the last column, where the next token comes from.
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        logits, cache = self._forward(ids, mask, None)
        cache.batch_repeat_interleave(group_size)
        logits, mask = logits.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)

        B = len(prompts) * group_size
        tokens = torch.zeros(B, max_tokens, dtype=torch.long, device=self.device)
        logps = torch.zeros(B, max_tokens, device=self.device)
        lengths = torch.full((B,), max_tokens, device=self.device)
        ended = torch.zeros(B, dtype=torch.bool, device=self.device)
        rows = torch.arange(B, device=self.device)  # the rows that are still being written
        for t in range(max_tokens):
            if temperature > 0:
                logits = keep_top(logits / temperature, top_k, top_p)
            distribution = logits.log_softmax(-1)
            if temperature > 0:
                token = torch.multinomial(distribution.exp(), 1, generator=self.generator)
            else:
                token = distribution.argmax(-1, keepdim=True)
            tokens[rows, t] = token[:, 0]
            logps[rows, t] = distribution.gather(1, token)[:, 0]
            stopped = torch.isin(token[:, 0], self.eos)
            if stopped.any():
                ended[rows[stopped]] = True
                lengths[rows[stopped]] = t + 1
                going = (~stopped).nonzero()[:, 0]
                rows, token, mask = rows[going], token[going], mask[going]
                cache.batch_select_indices(going)
            if t + 1 == max_tokens or not len(rows):
                break
            mask = F.pad(mask, (0, 1), value=1)
            logits, cache = self._forward(token, mask, cache)
        tokens, logps, lengths, ended = tokens.tolist(), logps.tolist(), lengths.tolist(), ended.tolist()
        return [
            Rollout(prompts[i // group_size], tokens[i][: lengths[i]], logps[i][: lengths[i]], not ended[i])
            for i in range(B)
        ]

    def _forward(self, ids, mask, cache):
        """Next-token logits [B, V] after the last column of `ids` [B, T]; `mask` [B, past + T] is 0 on padding."""
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self.autocast():
            out = self.model.base_model(
                ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
        return output_logits(self.model, out.last_hidden_state[:, -1]), out.past_key_values


# ---------------------------------------------------------------------------------------------------------------------
# 4. Rollouts and advantages
# ---------------------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, task, example: dict) -> tuple[str, list[int]]:
    """The prompt as text and as token ids; chat messages go through the model's chat template, text through nothing."""
    prompt = task.prompt(example)
    is_chat = not isinstance(prompt, str)
    if is_chat:
        if not tokenizer.chat_template:
            raise UsageError("the task gives chat messages, but this model's tokenizer has no chat template")
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    prompt += getattr(task, "prefill", "")
    # a chat template writes the special tokens itself; plain text gets those that the tokenizer always adds
    return prompt, tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]


def draw_prompts(task, tokenizer, config: Config, step: int) -> tuple[list[tuple[dict, str, list[int]]], int]:
    """The step's P prompts as (example, text, ids), and how many were too long and drawn again.

    The step's number seeds the draw, so a resumed run needs no memory of what was drawn before.
    """
    rng = random.Random(f"{config.seed}/{step}")
    drawn, too_long = [], 0
    while len(drawn) < config.prompts_per_step:
        example = task.train(rng, step)
        text, ids = encode_prompt(tokenizer, task, example)
        if len(ids) <= config.max_prompt_tokens:
            drawn.append((example, text, ids))
        else:
            too_long += 1
            if too_long >= 1000 and not drawn:
                raise UsageError(
                    f"1000 prompts in a row were longer than max_prompt_tokens = {config.max_prompt_tokens} "
                    f"(the last one has {len(ids)} tokens): raise --max_prompt_tokens"
                )
    return drawn, too_long


def score(task, tokenizer, rollout: Rollout, example: dict, prompt: str, prefill: str = "") -> None:
    """Fills in the rollout's text, and its reward and parts as the task's verifier gives them."""
    rollout.example, rollout.prompt = example, prompt
    rollout.text = prefill + tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
    rollout.parts = check_reward(task, task.reward(rollout.text, example), rollout.prompt, rollout.text)
    rollout.reward = float(rollout.parts["reward"])


def check_reward(task, parts: Any, prompt: str, text: str) -> dict:
    """`parts` itself, if it is what a task must return; a UsageError that names the completion if not."""
    where = f"{type(task).__name__}.reward() for the prompt {prompt!r} and the completion {text!r}"
    if not isinstance(parts, dict) or any(key not in parts for key in REWARD_KEYS):
        raise UsageError(f"{where} must be a dict with the keys {', '.join(REWARD_KEYS)}, but is {parts!r}")
    if not isinstance(parts["reward"], int | float) or not math.isfinite(parts["reward"]):
        raise UsageError(f"{where} gives the reward {parts['reward']!r}, which is no finite number")
    return parts


def group_advantages(rewards: torch.Tensor, kind: str = "grpo", eps: float = 1e-4) -> torch.Tensor:
    """Advantages [P, G] from rewards [P, G]: how much better a completion is than the others of its prompt.

        grpo     (r - mean) / (std + eps)     DeepSeekMath, arXiv 2402.03300, section 4.1.2
        dr_grpo  r - mean                     Dr. GRPO, arXiv 2503.20783

    The std has G - 1 in its denominator; some papers and repositories have G, a factor sqrt(G / (G - 1)).
    A group of equal rewards (a dead group) gets exactly 0: rounding must not become an advantage.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must have the shape [P, G] with G of 2 or more, not {list(rewards.shape)}")
    if kind not in ("grpo", "dr_grpo"):
        raise ValueError(f"kind {kind!r}: choose grpo or dr_grpo")
    mean = rewards.mean(1, keepdim=True)
    advantages = rewards - mean  # GRPO: the group is its own baseline, no value network is needed
    if kind == "grpo":
        # GRPO: eps is 1e-4 and not 1e-8, which would blow rounding noise up to advantages of size 1
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    dead = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(dead, 0.0)


def rollout_metrics(rollouts: list[Rollout], group_size: int) -> dict[str, float | None]:
    """What a step's completions look like, before any update. None where a mean is over nothing."""
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64).view(-1, group_size)
    right = torch.tensor([float(r.parts["correct"]) for r in rollouts]).view(-1, group_size)
    return {
        "reward": mean(r.reward for r in rollouts),
        "reward_std": rewards.std(1).mean().item(),
        **part_means(rollouts),
        "pass_at_group": (right > 0).any(1).double().mean().item(),
        "zero_advantage_groups": mean(r.dead for r in rollouts),
        "length": mean(r.length for r in rollouts),
        "length_correct": mean(r.length for r in rollouts if r.parts["correct"]),
        "length_wrong": mean(r.length for r in rollouts if not r.parts["correct"]),
        "truncated": mean(r.truncated for r in rollouts),
        "reflections": mean(bool(REFLECTION.search(r.text)) for r in rollouts),
    }


def part_means(rollouts: list[Rollout]) -> dict[str, float | None]:
    """Means of `correct`, `format` and of every number of the task's own."""
    own = [key for key, value in rollouts[0].parts.items() if key not in REWARD_KEYS and isinstance(value, int | float)]
    return {key: mean(float(r.parts[key]) for r in rollouts) for key in ["correct", "format", *own]}


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------------------------------------------------------------
# 5. The loss
# ---------------------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Token ids to log-probs of the completion tokens: the whole computation in one forward.

    One module call, so that whatever wraps the module (mixed precision, data parallelism) wraps all of it.
    """

    CHUNK = 2048  # tokens whose logits exist at the same time: 16k tokens of a 152k vocabulary would be 9.3 GiB

    def __init__(self, model: nn.Module, temperature: float = 1.0):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self, ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies, both [B, T] in float32, 0 behind the end of a row.

        Args:
            ids: [B, L], each row a prompt, its completion, and padding of any value on the right.
            prompt_lengths, lengths: [B], tokens of the prompt and of the completion; T is the largest of `lengths`.

        No attention mask is needed: attention is causal, so no real token ever sees the padding behind it.
        """
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state  # [B, L, D]
        # Position j - 1 predicts token j. The masks come from lengths and never from token values: the padding token
        # is often the end-of-sequence token, which must be trained.
        at = torch.arange(ids.shape[1] - 1, device=ids.device)
        predicts = (at >= prompt_lengths[:, None] - 1) & (at < (prompt_lengths + lengths)[:, None] - 1)  # [B, L-1]
        hidden, targets = hidden[:, :-1][predicts], ids[:, 1:][predicts]  # [N, D], [N]: all completion tokens, flat

        logps, entropies = [], []
        for h, target in zip(hidden.split(self.CHUNK), targets.split(self.CHUNK), strict=True):
            # the backward pass recomputes the logits of a chunk instead of keeping those of all
            logp, entropy = checkpoint(self._token_logps, h, target, use_reentrant=False)
            logps.append(logp)
            entropies.append(entropy)
        mask = completion_mask(lengths)  # [B, T]
        padded = torch.zeros(mask.shape, device=ids.device)
        return padded.masked_scatter(mask, torch.cat(logps)), padded.masked_scatter(mask, torch.cat(entropies))

    def _token_logps(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # GRPO: the distribution that was sampled from is the one with the temperature in it
        distribution = (output_logits(self.model, hidden) / self.temperature).log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        return distribution.gather(1, targets[:, None])[:, 0], entropy


def completion_mask(lengths: torch.Tensor) -> torch.Tensor:
    """[B] completion lengths to a mask [B, T] that is True on real tokens, the end-of-sequence token among them."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def completion_logps(
    model: nn.Module, ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs [B, T] of the completion tokens; the plain face of `Policy`, whose arguments these are."""
    return Policy(model, temperature)(ids, prompt_lengths, lengths)[0]


def policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) for each token, to be minimised.

        loss = -min(r * A, clamp(r, 1 - clip_low, 1 + clip_high) * A)      r = exp(logp - old_logp)

    Args:
        logps, old_logps: [B, T], of the sampled tokens now, and when they were sampled.
        advantages: [B, 1] or [B, T].
        mask: [B, T], True on real tokens; None means that all are.

    Returns:
        the loss of each token [B, T], 0 outside the mask; and what was clipped [B, T]: -1 where the ratio was below
        the range, 1 where it was above, and the token for that reason has no gradient; 0 elsewhere.
    """
    ratio = (logps - old_logps).exp()
    # GRPO: min, not max. For A < 0 it keeps the gradient of a token that has become likelier, and stops pushing one
    # down that is already 1 - clip_low times as likely as it was.
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)).int() - ((ratio < 1 - clip_low) & (advantages < 0)).int()
    if mask is not None:
        loss, clipped = loss.masked_fill(~mask, 0.0), clipped.masked_fill(~mask, 0)
    return loss, clipped


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, kind: str = "k3") -> torch.Tensor:
    """Estimates KL(policy || reference) at each token from the token that the policy sampled.

    With d = logp - ref_logp (http://joschu.net/blog/kl-approx.html):

        k1 = d                       unbiased, of either sign
        k2 = d^2 / 2                 biased, small variance
        k3 = exp(-d) - 1 + d         unbiased, never negative; expm1, as exp(-d) - 1 would round below 0
    """
    d = logps - ref_logps
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kind {kind!r}: choose k1, k2 or k3")


# GRPO: as a loss, each estimator needs its own factor r = exp(logp - old_logp) for its gradient to be that of
# KL(policy || reference). Without it, k1 has the expected gradient 0 and k3 that of the KL the other way round.
KL_IN_LOSS = {
    "k1": lambda ratio, k: ratio * k,
    "k2": lambda ratio, k: ratio.detach() * k,
    "k3": lambda ratio, k: ratio * k,
}


def token_weights(
    lengths: torch.Tensor,
    kind: str = "token",
    max_tokens: int = 0,
    total_tokens: int | None = None,
    total_rows: int | None = None,
) -> torch.Tensor:
    """The weight [B] of each token of a row, so that loss = sum over rows i of w_i * sum over t of token_loss[i, t].

        token     1 / total_tokens               all tokens alike (DAPO, arXiv 2503.14476)
        sequence  1 / (total_rows * length_i)    all completions alike (GRPO, arXiv 2402.03300)
        constant  1 / (total_rows * max_tokens)  no dependence on any length (Dr. GRPO, arXiv 2503.20783)

    The totals are those of the whole optimizer step: all its rows, those of dead groups too. Weights that are computed
    before the rows are split into microbatches make the loss independent of the split.

    Args:
        lengths: [B] completion lengths; a row of length 0 gets weight 0.
        max_tokens: max_completion_tokens, for `constant`.
        total_tokens, total_rows: None means the totals of `lengths`.
    """
    tokens = int(lengths.sum()) if total_tokens is None else total_tokens
    rows = len(lengths) if total_rows is None else total_rows
    if kind == "token":
        weights = torch.full_like(lengths, 1 / max(tokens, 1), dtype=torch.float32)
    elif kind == "sequence":
        weights = 1 / (rows * lengths.clamp(min=1).float())
    elif kind == "constant":
        weights = torch.full_like(lengths, 1 / (rows * max_tokens), dtype=torch.float32)
    else:
        raise ValueError(f"kind {kind!r}: choose token, sequence or constant")
    return weights.masked_fill(lengths == 0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# 6. The update
# ---------------------------------------------------------------------------------------------------------------------


def microbatches(rollouts: list[Rollout], token_budget: int) -> list[list[Rollout]]:
    """Splits rows into batches of at most `token_budget` tokens, padding included; a longer row is a batch by itself.

    Sorted by length first: neighbours are then of similar length and little is spent on padding.
    """
    batches: list[list[Rollout]] = []
    for rollout in sorted(rollouts, key=lambda r: -len(r.prompt_ids) - r.length):
        # the first row of a batch is its longest
        if batches and (len(batches[-1]) + 1) * row_tokens(batches[-1][0]) <= token_budget:
            batches[-1].append(rollout)
        else:
            batches.append([rollout])
    return batches


def row_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + rollout.length


def pad(rows: list[list], device, value=0) -> torch.Tensor:
    """Lists of unequal length to a tensor [B, longest], padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)


def policy_inputs(batch: list[Rollout], device) -> dict[str, torch.Tensor]:
    """The arguments of `Policy.forward` for these rows."""
    return {
        "ids": pad([r.prompt_ids + r.completion_ids for r in batch], device),
        "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in batch], device=device),
        "lengths": torch.tensor([r.length for r in batch], device=device),
    }


@torch.no_grad()
def score_logps(policy: nn.Module, rollouts: list[Rollout], token_budget: int, device) -> list[list[float]]:
    """The log-probs of every completion's tokens under `policy`, in the order of `rollouts`."""
    policy.eval()
    logps: dict[int, list[float]] = {}
    for batch in microbatches(rollouts, token_budget):
        rows = policy(**policy_inputs(batch, device))[0].tolist()
        logps |= {id(r): row[: r.length] for r, row in zip(batch, rows, strict=True)}
    return [logps[id(r)] for r in rollouts]


def update(
    policy: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, rollouts: list[Rollout],
    config: Config, step: int,
) -> dict[str, float]:  # fmt: skip
    """Trains on the rollouts of a step: `epochs` passes of `minibatches` optimizer steps each.

    Returns metrics over the trained tokens. An optimizer step with nothing to learn from, or with a gradient that is
    not finite, is skipped and counted in `skipped_updates`.
    """
    policy.train()  # gradient checkpointing acts only in training mode; dropout was set to 0 when the model was loaded
    order = random.Random(f"{config.seed}/{step}/minibatches")
    sums = dict.fromkeys(["entropy", "clipped_low", "clipped_high", "kl_ref", "gap", "signed_gap"], 0.0)
    trained = first_tokens = skipped = 0
    ratio_max, losses, grad_norms = 1.0, [], []
    for epoch in range(config.epochs):
        rows = list(rollouts)
        if config.minibatches > 1:
            order.shuffle(rows)
        size = len(rows) // config.minibatches
        for m in range(config.minibatches):
            minibatch = rows[m * size : (m + 1) * size]
            totals = dict(
                max_tokens=config.max_completion_tokens,
                total_tokens=sum(r.length for r in minibatch),
                total_rows=len(minibatch),
            )
            # Dead groups have advantage 0. Without a KL term they add nothing to the gradient, so their forward and
            # backward passes are saved; but they stay in the totals above.
            kept = [r for r in minibatch if not (r.dead and config.drop_dead_groups)]
            loss_sum = torch.zeros((), device=accelerator.device)
            for batch in microbatches(kept, config.tokens_per_microbatch):
                inputs = policy_inputs(batch, accelerator.device)
                lengths, mask = inputs["lengths"], completion_mask(inputs["lengths"])
                sampled = pad([r.logps for r in batch], accelerator.device, 0.0)
                old = sampled if config.old_logps == "sampler" else pad([r.old_logps for r in batch], mask.device, 0.0)
                advantages = torch.tensor([[r.advantage] for r in batch], device=accelerator.device)

                logps, entropy = policy(**inputs)  # [B, T]
                loss, clipped = policy_loss(logps, old, advantages, config.clip_low, config.clip_high, mask)
                if config.kl_coef > 0:
                    ref = pad([r.ref_logps for r in batch], accelerator.device, 0.0)
                    kl = kl_estimate(logps, ref, config.kl_kind)
                    loss = loss + config.kl_coef * KL_IN_LOSS[config.kl_kind]((logps - old).exp(), kl) * mask
                    sums["kl_ref"] += kl.detach()[mask].sum()
                loss = (loss.sum(1) * token_weights(lengths, config.loss_weight, **totals)).sum()
                accelerator.backward(loss)

                with torch.no_grad():
                    loss_sum += loss
                    trained += int(mask.sum())
                    ratio_max = max(ratio_max, (logps - old)[mask].max().exp().item())
                    sums["entropy"] += entropy[mask].sum()
                    sums["clipped_low"] += (clipped < 0).sum()
                    sums["clipped_high"] += (clipped > 0).sum()
                    if epoch == m == 0:  # before the first update sampler and trainer should be the same model
                        sums["gap"] += (sampled - logps)[mask].abs().sum()
                        sums["signed_gap"] += (sampled - logps)[mask].sum()
                        first_tokens += int(mask.sum())
            losses.append(loss_sum.item())
            if kept:
                grad_norm = accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip).item()
                grad_norms.append(grad_norm)
            if kept and math.isfinite(grad_norm):
                optimizer.step()
            else:
                skipped += 1
            optimizer.zero_grad()
    share = {key: float(value) / max(trained, 1) for key, value in sums.items()}
    return {
        "loss": mean(losses),
        "kl_ref": share["kl_ref"] if config.kl_coef > 0 else None,
        "entropy": share["entropy"] if trained else None,
        "grad_norm": mean(grad_norms),
        "lr": optimizer.param_groups[0]["lr"],
        "clipped_low": share["clipped_low"],
        "clipped_high": share["clipped_high"],
        "ratio_max": ratio_max,
        "sampler_kl": float(sums["signed_gap"]) / first_tokens if first_tokens else None,
        "sampler_logp_gap": float(sums["gap"]) / first_tokens if first_tokens else None,
        "skipped_updates": skipped,
    }


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step 1, 2, ..., steps. A function of the step alone, so a resumed run needs no memory."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps - 1) / max(1, config.steps - config.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.lr * shape[config.lr_schedule]


# ---------------------------------------------------------------------------------------------------------------------
# 7. Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, of which c are right, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, section 2.1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `n`, Wilson's: also sound near 0 and 1."""
    p = right / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return center - half, center + half


def clustered_interval(shares: list[float], z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of the mean of per-prompt shares: the prompts are the sample, not their completions."""
    center = mean(shares)
    spread = math.sqrt(sum((s - center) ** 2 for s in shares) / max(1, len(shares) - 1))
    half = z * spread / math.sqrt(len(shares))
    return max(0.0, center - half), min(1.0, center + half)


def evaluate(sampler, tokenizer, task, problems: list, config: Config, step: int) -> tuple[dict, list[dict]]:
    """Accuracy on `problems`, a list of (example, prompt, ids): greedy, and sampled `eval_samples` times each.

    The seed is the same at every step. Returns the row of eval.jsonl and the rows of eval-<step>.jsonl.
    """
    prefill = getattr(task, "prefill", "")
    ids = [problem[2] for problem in problems]

    def complete(prompts: list[list[int]], n: int, temperature: float, prefill: str) -> list[list[Rollout]]:
        groups = sampler.generate(
            prompts, n, config.max_completion_tokens, config.seed, temperature, config.top_p, config.top_k
        )
        for i, rollout in enumerate(groups):
            score(task, tokenizer, rollout, *problems[i // n][:2], prefill)
        return [groups[i : i + n] for i in range(0, len(groups), n)]

    greedy = [group[0] for group in complete(ids, 1, 0.0, prefill)]
    groups = complete(ids, config.eval_samples, config.temperature, prefill)
    every = [rollout for group in groups for rollout in group]
    right = [sum(r.parts["correct"] == 1 for r in group) for group in groups]
    n, k = len(problems), config.eval_samples
    accuracy = mean(r.parts["correct"] == 1 for r in greedy)
    low, high = wilson_interval(accuracy * n, n)
    sampled_low, sampled_high = clustered_interval([c / k for c in right])
    row = {
        "step": step,
        "n": n,
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_sampled": mean(c / k for c in right),
        "accuracy_sampled_low": sampled_low,
        "accuracy_sampled_high": sampled_high,
        "pass_at_k": {2**i: mean(pass_at_k(k, c, 2**i) for c in right) for i in range(k.bit_length())},
        "zero_advantage_groups": mean(len({r.reward for r in group}) == 1 for group in groups),
        "reward": mean(r.reward for r in every),
        "length": mean(r.length for r in every),
        "truncated": mean(r.truncated for r in every),
        **part_means(every),
    }
    worked_prefix = getattr(task, "worked_prefix", None)
    if worked_prefix and step == 0:  # what the model can do, if only it showed its steps
        forced = [prompt + tokenizer(worked_prefix, add_special_tokens=False)["input_ids"] for prompt in ids]
        shown = complete(forced, 1, 0.0, prefill + worked_prefix)
        row["accuracy_worked"] = mean(group[0].parts["correct"] == 1 for group in shown)
    details = [
        {"prompt": r.prompt, "completion": r.text, "correct": r.parts["correct"], "sampled_correct": c / k}
        | {key: r.parts[key] for key in ("prediction", "ground_truth")}
        for r, c in zip(greedy, right, strict=True)
    ]
    return row, details


def verdict(row: dict) -> str:
    """Will it learn? Said from the first evaluation, before hours are spent."""
    k = max(row["pass_at_k"])
    gain = row["pass_at_k"][k] - row["pass_at_k"][1]
    facts = (
        f"groups of {k} with equal rewards {row['zero_advantage_groups']:.0%}, pass@1 {row['pass_at_k'][1]:.0%}, "
        f"pass@{k} {row['pass_at_k'][k]:.0%}, truncated {row['truncated']:.0%}, format {row['format']:.0%}"
    )
    advice = []
    if row["truncated"] > 0.3:
        advice.append("many completions are cut off: raise max_completion_tokens or ask for shorter answers")
    if row["format"] < 0.2:
        advice.append("few completions have the right form: change the prompt, or pay for the form too")
    if row["pass_at_k"][1] > 0.9:
        advice.append("the problems are too easy: there is little left to learn")
    elif row["zero_advantage_groups"] > 0.5 or gain < 0.1:
        advice.append(
            "most groups have nothing to compare: take easier or harder problems, a larger group_size, a reward with "
            "partial credit, or a better model"
        )
    if advice:
        answer = "unlikely. " + "; ".join(advice)
    elif row["zero_advantage_groups"] < 0.3 and gain > 0.3:
        answer = "yes, the model often disagrees with itself and is often right"
    else:
        answer = "perhaps, slowly: a larger group_size would leave fewer groups without a signal"
    return f"will it learn? {answer} ({facts})"


# ---------------------------------------------------------------------------------------------------------------------
# 8. The run folder
# ---------------------------------------------------------------------------------------------------------------------


class RunFolder:
    """What a run leaves behind: config.yaml, metrics, rollouts, evaluations, checkpoints, curves.png."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """A folder of its own under `config.runs`; an existing one is never written into."""
        settings = dataclasses.asdict(config)
        text = yaml.safe_dump({k: v for k, v in settings.items() if k not in CHANGEABLE_ON_RESUME}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        task, model = (re.split(r"[/:]", name.rstrip("/"))[-1] for name in (config.task, config.model))
        name = f"{task}-{model}-s{config.seed}-{digest}"
        path, count = Path(config.runs) / name, 1
        while True:
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                count += 1
                path = Path(config.runs) / f"{name}-{count}"
        (path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return cls(path)

    def append(self, name: str, rows: list[dict]) -> None:
        with open(self.path / name, "a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def read(self, name: str) -> list[dict]:
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log_metrics(self, row: dict) -> None:
        self.append("metrics.jsonl", [row])
        path = self.path / "metrics.csv"
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def log_rollouts(self, step: int, rollouts: list[Rollout]) -> None:
        rows = [
            {
                "step": step,
                "prompt_id": hashlib.sha256(r.prompt.encode()).hexdigest()[:8],
                "prompt": r.prompt,
                "completion": r.text,
                **r.parts,
                "advantage": round(r.advantage, 6),
                "length": r.length,
                "truncated": r.truncated,
            }
            for r in rollouts
        ]
        self.append("rollouts.jsonl", rows)

    def log_eval(self, row: dict, details: list[dict]) -> None:
        self.append("eval.jsonl", [row])
        text = "".join(json.dumps(detail, ensure_ascii=False) + "\n" for detail in details)
        (self.path / f"eval-{row['step']}.jsonl").write_text(text)

    def save_checkpoint(self, step: int, model, tokenizer, optimizer, state: dict, keep_last: int) -> Path:
        """checkpoint-<step>/: the model, the optimizer's moments (safetensors) and `state` (JSON).

        Written under another name and renamed: a checkpoint is whole or absent.
        """
        final, partial = self.path / f"checkpoint-{step}", self.path / f".checkpoint-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        moments = {
            f"{i}.{key}": value.contiguous()
            for i, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self.checkpoints()[:-keep_last]:
            shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        found = [path for path in self.path.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def rewind(self, step: int) -> None:
        """Takes what was logged after `step` out of the logs, so that a resumed run has no row twice."""
        for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
            kept = [row for row in self.read(name) if row["step"] <= step]
            (self.path / name).unlink(missing_ok=True)
            self.append(name, kept)
        rows = self.read("metrics.jsonl")
        (self.path / "metrics.csv").unlink(missing_ok=True)
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        for row in rows:
            self.log_metrics(row)

    def plot(self) -> Path:
        """curves.png: what to look at, in the order in which to look at it."""
        from matplotlib.figure import Figure  # not pyplot: no window, no global state

        metrics, evals = self.read("metrics.jsonl"), self.read("eval.jsonl")
        steps = [row["step"] for row in metrics]
        figure = Figure(figsize=(13, 6.5), layout="constrained")
        axes = figure.subplots(2, 3).flat

        def curve(axis, key: str, label: str, color: str) -> None:
            values = [math.nan if row.get(key) is None else row[key] for row in metrics]
            width = max(1, len(values) // 40)  # thin: each step; thick: running mean
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            smooth = [mean(v for v in values[max(0, i - width) : i + 1] if v == v) for i in range(len(values))]
            axis.plot(steps, [math.nan if v is None else v for v in smooth], color=color, label=label, linewidth=1.8)

        def points(axis, key: str, label: str, color: str, low: str = "", high: str = "") -> None:
            at, values = [row["step"] for row in evals], [row[key] for row in evals]
            errors = [[row[key] - row[low] for row in evals], [row[high] - row[key] for row in evals]]
            axis.errorbar(at, values, errors, color=color, label=label, marker="o", markersize=4, capsize=3)

        curve(axes[0], "reward", "reward (training prompts)", "tab:blue")
        axes[0].set_title("reward")
        points(axes[1], "accuracy", "greedy", "black", "accuracy_low", "accuracy_high")
        points(
            axes[1], "accuracy_sampled", "sampled", "tab:orange", "accuracy_sampled_low", "accuracy_sampled_high"
        )
        axes[1].set_title("accuracy on the evaluation set, 95 % intervals")
        curve(axes[2], "length", "all", "tab:blue")
        curve(axes[2], "length_correct", "right", "tab:green")
        curve(axes[2], "length_wrong", "wrong", "tab:red")
        axes[2].set_title("completion length, tokens")
        if metrics and "worked" in metrics[0]:
            curve(axes[3], "worked", "worked", "tab:purple")
            axes[3].set_title("share of completions that show their steps")
        else:
            curve(axes[3], "format", "format", "tab:purple")
            axes[3].set_title("share of completions of the right form")
        curve(axes[4], "zero_advantage_groups", "groups of equal rewards", "tab:gray")
        curve(axes[4], "truncated", "truncated completions", "tab:brown")
        axes[4].set_title("dead groups, truncated completions")
        curve(axes[5], "entropy", "entropy, nats a token", "tab:olive")
        curve(axes[5], "grad_norm", "gradient norm", "tab:cyan")
        axes[5].set_title("entropy, gradient norm")
        for axis in (axes[0], axes[1], axes[3], axes[4]):
            axis.set_ylim(-0.03, 1.03)
        for axis in axes:
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8)
        figure.suptitle(self.path.name)
        figure.savefig(self.path / "curves.png", dpi=110)
        return self.path / "curves.png"


# ---------------------------------------------------------------------------------------------------------------------
# 9. train() and main()
# ---------------------------------------------------------------------------------------------------------------------


def load_model(name: str):
    """The causal language model in float32, and its tokenizer, from a folder or the Hub."""
    config_file = Path(name) / "config.json"
    if config_file.is_file() and json.loads(config_file.read_text()).get("model_type") == "mathformer":
        importlib.import_module("mathformer")  # registers the architecture
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        # Float32 weights: at a learning rate of 1e-6 most updates are smaller than bf16 can represent.
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"model {name!r} cannot be loaded; give a folder, or a name on the Hub: {reason}") from error
    for module in model.modules():  # dropout would make the trained policy another one than the sampled
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model, tokenizer


def find_eos(model, tokenizer) -> set[int]:
    """Every token that ends an answer: chat models often have more than one."""
    ids = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not eos:
        raise UsageError("neither the tokenizer nor the generation config of this model names an end-of-sequence token")
    return eos


def make_accelerator(config: Config) -> Accelerator:
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(config.device, True):
        raise UsageError(f"device {config.device!r} is not there; here are: {', '.join(d for d in present if present[d])}")
    on_cuda = present["cuda"] and config.device in ("auto", "cuda")
    precision = {"auto": "bf16" if on_cuda else "no", "fp32": "no", "bf16": "bf16"}[config.precision]
    return Accelerator(cpu=config.device == "cpu", mixed_precision=precision)


def evaluation_problems(task, tokenizer, model, config: Config) -> list[tuple[dict, str, list[int]]]:
    """The evaluation problems as (example, prompt, ids), without those that are too long; checks the task on the way."""
    window = getattr(model.config, "max_position_embeddings", None)
    if window and config.max_prompt_tokens + config.max_completion_tokens > window:
        raise UsageError(
            f"max_prompt_tokens {config.max_prompt_tokens} + max_completion_tokens {config.max_completion_tokens} "
            f"is more than the model's {window} positions: lower one of them"
        )
    problems = [(example, *encode_prompt(tokenizer, task, example)) for example in task.eval()]
    fitting = [problem for problem in problems if len(problem[2]) <= config.max_prompt_tokens]
    if not fitting:
        shortest = min((len(problem[2]) for problem in problems), default=0)
        raise UsageError(
            f"no prompt fits: the shortest of {len(problems)} evaluation prompts has {shortest} tokens, "
            f"max_prompt_tokens is {config.max_prompt_tokens}"
        )
    if len(fitting) < len(problems):
        print(f"{len(problems) - len(fitting)} evaluation prompts over {config.max_prompt_tokens} tokens are left out")
    check_reward(task, task.reward("", fitting[0][0]), fitting[0][1], "")
    return fitting


def collect(sampler, tokenizer, task, config: Config, step: int) -> tuple[list[Rollout], int]:
    """The rollouts of a step, scored and with advantages, those of a group next to each other."""
    drawn, too_long = draw_prompts(task, tokenizer, config, step)
    rollouts = sampler.generate(
        [ids for _, _, ids in drawn], config.group_size, config.max_completion_tokens,
        config.seed * 1_000_003 + step, config.temperature, config.top_p, config.top_k,
    )  # fmt: skip
    for i, rollout in enumerate(rollouts):
        example, prompt, _ = drawn[i // config.group_size]
        score(task, tokenizer, rollout, example, prompt, getattr(task, "prefill", ""))
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, config.group_size)  # [P, G]
    advantages = group_advantages(rewards, config.advantage)
    dead = (rewards.amax(1) == rewards.amin(1)).repeat_interleave(config.group_size)
    for rollout, advantage, is_dead in zip(rollouts, advantages.flatten().tolist(), dead.tolist(), strict=True):
        rollout.advantage, rollout.dead = advantage, is_dead
    return rollouts, too_long


def train(config: Config) -> dict[str, Any]:
    """The whole run. Returns the first and the last evaluation, seconds, tokens and the run's folder."""
    started = time.time()
    task = load_task(config.task, config.task_args)
    accelerator = make_accelerator(config)
    folder = RunFolder(Path(config.resume)) if config.resume else None
    checkpoint = latest_checkpoint(folder) if folder else None
    model, tokenizer = load_model(str(checkpoint or config.model))
    problems = evaluation_problems(task, tokenizer, model, config)
    eos = find_eos(model, tokenizer)
    folder = folder or RunFolder.create(config)

    torch.manual_seed(config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = Policy(model, config.temperature)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    reference = None
    if config.kl_coef > 0:
        reference = Policy(load_model(config.model)[0], config.temperature).requires_grad_(False)
        reference.to("cpu" if config.offload_reference else accelerator.device)
    sampler = TorchSampler(model, eos, min(eos), config.sample_rows, accelerator.autocast)

    first_step, tokens = 1, 0
    if checkpoint:
        state = json.loads((checkpoint / "state.json").read_text())
        first_step, tokens = state["step"] + 1, state["tokens"]
        restore_optimizer(optimizer, checkpoint)
        folder.rewind(state["step"])
        print(f"going on after {checkpoint}")
    print_plan(config, model, folder, accelerator.device, first_step)
    evaluations = folder.read("eval.jsonl")

    def evaluate_now(step: int) -> None:
        row, details = evaluate(sampler, tokenizer, task, problems, config, step)
        folder.log_eval(row, details)
        evaluations.append(json.loads(json.dumps(row)))
        tqdm.write(describe_evaluation(row, config.steps))

    if not evaluations:
        evaluate_now(0)
    if config.steps == 0:
        rollouts, _ = collect(sampler, tokenizer, task, config, 1)
        print_group(rollouts, tokenizer, config)
        return summary(evaluations, started, tokens, folder)

    bar = tqdm(total=config.steps, initial=first_step - 1, unit="step", smoothing=0.1, dynamic_ncols=True)
    with finish_step_on_signal() as stop:
        for step in range(first_step, config.steps + 1):
            clock = [time.time()]
            rollouts, too_long = collect(sampler, tokenizer, task, config, step)
            clock.append(time.time())
            if config.old_logps == "trainer":
                with accelerator.autocast():
                    old = score_logps(policy, rollouts, config.tokens_per_microbatch, accelerator.device)
                for rollout, logps in zip(rollouts, old, strict=True):
                    rollout.old_logps = logps
            if reference is not None:
                reference.to(accelerator.device)
                with accelerator.autocast():
                    ref = score_logps(reference, rollouts, config.tokens_per_microbatch, accelerator.device)
                for rollout, logps in zip(rollouts, ref, strict=True):
                    rollout.ref_logps = logps
                reference.to("cpu" if config.offload_reference else accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            learned = update(policy, optimizer, accelerator, rollouts, config, step)
            clock.append(time.time())
            sampler.sync()
            clock.append(time.time())

            step_tokens = sum(r.length for r in rollouts)
            tokens += step_tokens
            seconds = dict(zip(["sample", "train", "sync"], (b - a for a, b in zip(clock, clock[1:])), strict=True))
            row = {"step": step, **rollout_metrics(rollouts, config.group_size), **learned}
            row |= {"prompts_too_long": too_long, "tokens": tokens}
            row |= {f"seconds_{name}": round(value, 4) for name, value in seconds.items()}
            row |= {"tokens_per_second": round(step_tokens / sum(seconds.values()), 1)}
            row |= {"peak_memory": round(peak_memory(accelerator.device), 3)}
            folder.log_metrics(row)
            folder.log_rollouts(step, rollouts)
            bar.update()
            bar.set_postfix_str(
                f"reward {row['reward']:.2f} length {row['length']:.1f} zero_advantage_groups "
                f"{row['zero_advantage_groups']:.2f}"
            )
            if config.print_steps and (step % config.print_steps == 0 or step == 1):
                tqdm.write(describe_rollouts(step, rollouts))
            if config.eval_steps and step % config.eval_steps == 0 and step < config.steps:
                evaluate_now(step)
            if step % config.save_steps == 0 or step == config.steps or stop.is_set():
                state = {"tokens": tokens}
                folder.save_checkpoint(step, model, tokenizer, optimizer, state, config.keep_last)
            if stop.is_set() and step < config.steps:
                bar.close()
                print(f"stopped after step {step}; go on with: python grpo.py --resume {folder.path}")
                return summary(evaluations, started, tokens, folder) | {"interrupted": True}
    bar.close()
    if evaluations[-1]["step"] != config.steps:
        evaluate_now(config.steps)
    model.save_pretrained(folder.path / "final")
    tokenizer.save_pretrained(folder.path / "final")
    print(before_after(evaluations[0], evaluations[-1]))
    print(f"model {folder.path / 'final'}, curves {folder.plot()}, {time.time() - started:.0f} s")
    return summary(evaluations, started, tokens, folder)


def summary(evaluations: list[dict], started: float, tokens: int, folder: RunFolder) -> dict[str, Any]:
    seconds = round(time.time() - started, 1)
    return dict(first=evaluations[0], last=evaluations[-1], seconds=seconds, tokens=tokens, run=str(folder.path))


def latest_checkpoint(folder: RunFolder) -> Path:
    if not (found := folder.checkpoints()):
        raise UsageError(f"{folder.path} holds no checkpoint to go on from")
    return found[-1]


def restore_optimizer(optimizer, checkpoint: Path) -> None:
    state = optimizer.state_dict()
    for name, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, key = name.split(".")
        state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)


@contextmanager
def finish_step_on_signal():
    """Ctrl-C and SIGTERM set the event, so that the step is finished and saved; a second Ctrl-C stops at once."""
    stop = threading.Event()

    def on_signal(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        tqdm.write("stopping: this step is finished and saved first (again to stop at once)")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# What a person sees


def printable(text: str, limit: int = 160) -> str:
    """One line of at most `limit` characters; control characters, which a terminal would obey, as escapes."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def print_plan(config: Config, model, folder: RunFolder, device, first_step: int) -> None:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"GRPO: {config.model} ({size:.2f} M parameters) on {config.task}, {config.prompts_per_step} prompts x "
        f"{config.group_size} completions a step, steps {first_step} to {config.steps}, on {device}. "
        f"{config.about or 'The bar shows the time left.'}\nrun folder: {folder.path}"
    )
    if config.old_logps == "trainer":
        print("old log-probs come from the trainer: one more forward pass a step")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def describe_evaluation(row: dict, steps: int) -> str:
    k = max(row["pass_at_k"], key=int)
    text = (
        f"evaluation after step {row['step']}: {row['n']} problems, greedy {percent(row['accuracy'])} "
        f"[{percent(row['accuracy_low'])}, {percent(row['accuracy_high'])}], sampled "
        f"{percent(row['accuracy_sampled'])}, pass@{k} {percent(row['pass_at_k'][k])}, length {row['length']:.1f}"
    )
    if "worked" in row:
        text += f", worked {percent(row['worked'])}"
    if "accuracy_worked" in row:
        text += f"\n  when made to show its steps: {percent(row['accuracy_worked'])} right"
    return text if row["step"] else f"{text}\n  {verdict(row)}"


def describe_rollouts(step: int, rollouts: list[Rollout]) -> str:
    """Three completions, right and wrong where there are both."""
    right = [r for r in rollouts if r.parts["correct"]]
    wrong = [r for r in rollouts if not r.parts["correct"]]
    chosen = (right[:2] + wrong[:1] + wrong[1:3] + right[2:3])[:3]
    lines = [f"step {step}"]
    for r in chosen:
        mark = "right" if r.parts["correct"] else "wrong"
        lines.append(f"  {mark} {r.advantage:+.2f}  {printable(r.prompt)}  ->  {printable(r.text)}")
    return "\n".join(lines)


def print_group(rollouts: list[Rollout], tokenizer, config: Config) -> None:
    """One whole group, of mixed rewards if there is one: tokens, reward, advantage, and the weight of each token."""
    first = next((i for i, r in enumerate(rollouts) if not r.dead), 0) // config.group_size * config.group_size
    lengths = torch.tensor([r.length for r in rollouts])
    weights = token_weights(lengths, config.loss_weight, config.max_completion_tokens)
    print(f"one group: {printable(rollouts[first].prompt, 2000)}")
    print(f"{'reward':>7} {'advantage':>9} {'weight':>9} {'tokens':>6}")
    for i, r in list(enumerate(rollouts))[first : first + config.group_size]:
        shown = printable(" ".join(tokenizer.convert_ids_to_tokens(r.completion_ids)), 2000)
        print(f"{r.reward:7.2f} {r.advantage:+9.3f} {weights[i].item():9.2e} {r.length:6d}  {shown}")


def before_after(first: dict, last: dict) -> str:
    k = max(first["pass_at_k"], key=int)

    def interval(row: dict, key: str) -> str:
        return f"{percent(row[key])} [{100 * row[key + '_low']:.1f}, {100 * row[key + '_high']:.1f}]"

    lines = [
        ("greedy accuracy", interval(first, "accuracy"), interval(last, "accuracy")),
        ("sampled accuracy", interval(first, "accuracy_sampled"), interval(last, "accuracy_sampled")),
        (f"pass@{k}", percent(first["pass_at_k"][k]), percent(last["pass_at_k"][k])),
        ("length, tokens", f"{first['length']:.1f}", f"{last['length']:.1f}"),
        ("truncated", percent(first["truncated"]), percent(last["truncated"])),
    ]
    if "worked" in first:
        lines.append(("worked answers", percent(first["worked"]), percent(last["worked"])))
    lines.insert(0, ("", "before", f"after {last['step']} steps"))
    return "\n".join([f"{name:18} {a:>22} {b:>22}" for name, a, b in lines])


# The command line


def parse_config(argv: list[str]) -> Config:
    """Command line over environment (GRPO_<SETTING>) over --config files (the later wins) over the defaults.

    Raises:
        UsageError: a file or a setting that does not exist, or a value that is not allowed.
    """
    import argparse

    import jsonargparse

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--resume", default="")
    first.add_argument("--model", default=os.environ.get("GRPO_MODEL"))
    first.add_argument("--task", default=os.environ.get("GRPO_TASK"))
    known, _ = first.parse_known_args(argv)
    files = [Path(name) for name in known.config]
    if known.resume:
        files = [Path(known.resume) / "config.yaml"]
    elif not files and not known.model and not known.task:
        files = [PRESET]
    for file in files:
        if not file.is_file():
            raise UsageError(f"there is no file {file}" + ("; give --model and --task" if file == PRESET else ""))

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)  # these become the help
    parser = jsonargparse.ArgumentParser(
        prog="grpo.py",
        usage="python grpo.py [--config FILE] [--SETTING VALUE ...]",
        description=f"{__doc__.splitlines()[0]} With no --model, --task or --config, the arithmetic preset "
        f"({PRESET.relative_to(HERE)}) applies. Settings come from the command line, else from GRPO_<SETTING> in the "
        "environment, else from the --config files, else from the defaults below.",
        default_config_files=[glob.escape(str(file)) for file in files if not {"-h", "--help"} & set(argv)],
        default_env=not {"-h", "--help"} & set(argv),  # in the help, the variable's name on each setting is clutter
        env_prefix="GRPO",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="append", type=str, help="YAML file of settings; several stack")
    parser.add_class_arguments(Config, as_group=False)
    try:
        settings = parser.parse_args(argv).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UsageError(" ".join(str(error).split()).removeprefix("error: ")) from error
    config = Config(**{f.name: settings[f.name] for f in dataclasses.fields(Config)})
    if known.resume:
        before = Config(**yaml.safe_load(files[0].read_text()))
        for f in dataclasses.fields(Config):
            if f.name not in CHANGEABLE_ON_RESUME and getattr(before, f.name) != getattr(config, f.name):
                raise UsageError(
                    f"{f.name} was {getattr(before, f.name)!r} in {known.resume} and cannot become "
                    f"{getattr(config, f.name)!r} on the way; what can: {', '.join(sorted(CHANGEABLE_ON_RESUME))}"
                )
    return config


def main(argv: list[str] | None = None) -> None:
    try:
        result = train(parse_config(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        sys.exit(f"error: {error}")
    sys.exit(130 if result.get("interrupted") else 0)


if __name__ == "__main__":
    main()
