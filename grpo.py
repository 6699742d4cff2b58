"""Group Relative Policy Optimization (GRPO), the whole algorithm, in one file that you can read in one sitting.

GRPO (DeepSeekMath, arXiv 2402.03300) improves a language model by trial and error, on problems whose answers a
program can check. It is REINFORCE with two changes. The baseline is the mean reward of the other answers to the same
prompt, so there is no value network. And the ratio of new to old probability is clipped, as in PPO, so that a batch
can be used for more than one update. One step:

    1. draw P prompts and let the policy write G completions of each     draw_prompts, TorchSampler.generate
    2. let the task's verifier pay each completion                       complete
    3. advantage = reward minus the group's mean, over the group's std   group_advantages
    4. log-probs of the same tokens under the policy as it now is        Policy.forward
    5. ratio = exp(logp - old logp); loss = -min(ratio*A, clip(ratio)*A) policy_loss
    6. optionally + kl_coef * KL(policy || reference)                    kl_estimate, KL_IN_LOSS
    7. sum over tokens with one weight a row, backward, clip, AdamW      token_weights, update

There is no learned reward model, no critic and no replay. Lines that a student will want to change are marked
`# GRPO:`. What is not the algorithm is next door: settings.py (every setting, from command line and YAML), loading.py
(task, model, device), optimizers.py (AdamW in three sizes), memory.py (what a run needs of a card), parallel.py
(several processes), run_folder.py (logs, checkpoints, curves), kv_cache.py (keys and values of past tokens).

    python grpo.py                              arithmetic on a CPU, about a minute, no download
    python grpo.py --steps 0                    evaluate, show one group of completions, stop
    python grpo.py --model M --task T           any causal language model, any task
    python grpo.py --resume runs/<run>          go on with a run that was stopped
    python grpo.py --help                       every setting
"""

import copy
import math
import os
import random
import re
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is imported: operations that Apple's GPU lacks run on the CPU; and products of matrices on a CPU do not
# depend on where in memory the matrices happen to lie, so that a run repeats to the last digit.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
os.environ.setdefault("MKL_CBWR", "AUTO")

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import kv_cache
import loading
import memory
import optimizers
import parallel
import run_folder
from run_folder import RunFolder
from settings import Config, Sampling, UsageError, parse_config

# ==== 1. Tasks and rewards ============================================================================================

# A task is a class with four methods:
#
#     train(rng, step) -> example       one training problem, a dict; all randomness from `rng`, a random.Random
#     eval() -> [example, ...]          the evaluation problems, always the same
#     prompt(example) -> str or list    text, or chat messages [{"role": ..., "content": ...}, ...]
#     reward(text, example) -> dict     "reward" and "correct", "format", "prediction", "ground_truth"; any further
#                                       number is a part of the task's own and is averaged and logged under its name,
#                                       which must not be one of the run's own figures
#
# and, if it likes, `prefill`, text behind each prompt that begins the answer (`text` above is prefill plus completion);
# `worked_prefix`, which makes the model show its steps in the evaluation; `typed(text) -> example`, for play.py.

REWARD_KEYS = ("reward", "correct", "format", "prediction", "ground_truth")
# Names of the run's own figures, which a task's parts would overwrite in the logs.
RESERVED = frozenset(
    """step n prompt prompt_id completion advantage penalty length length_correct length_wrong truncated tokens
    accuracy accuracy_low accuracy_high accuracy_sampled accuracy_sampled_low accuracy_sampled_high
    accuracy_worked sampled_correct pass_at_k pass_at_group reward_std zero_advantage_groups reflections loss
    kl_ref kl_coef entropy grad_norm lr clipped_low clipped_high ratio_max sampler_kl sampler_logp_gap
    skipped_updates nonfinite_updates prompts_too_long resampled_groups tokens_per_second seconds_sample
    seconds_train seconds_sync peak_memory""".split()
)


# ==== 2. Sampling =====================================================================================================


class Problem(NamedTuple):
    """A problem of the task, ready to be sampled from."""

    example: dict
    prompt: str
    ids: list[int]


@dataclass
class Rollout:
    """One completion, from the sampler to the log. Token ids are kept as they were sampled, never encoded again."""

    prompt_ids: list[int]
    completion_ids: list[int]  # with the end-of-sequence token, if the model wrote it
    logps: list[float]  # the sampler's log-prob of each completion token
    truncated: bool  # ran into max_completion_tokens
    prompt: str = ""
    text: str = ""  # prefill and completion, special tokens left out: what the verifier judges
    parts: dict = field(default_factory=dict)  # what the task's reward() returned
    reward: float = 0.0
    penalty: float = 0.0  # what comes off the reward, where settings say so, before it becomes an advantage
    advantage: float = 0.0
    dead: bool = False  # all rewards of its group are equal
    old_logps: list[float] | None = None  # the trainer's, where those are used
    ref_logps: list[float] | None = None  # the reference's, where there is one

    @property
    def length(self) -> int:
        return len(self.completion_ids)

    @property
    def row_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


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
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the mass before this token is enough already
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logits


class TorchSampler:
    """Samples with the trainer's own model, on any device, by hand.

    Each prompt goes through the model once; its G completions share that key-value cache. Rows that are finished
    leave the batch, so that a step costs the tokens that are still being written and no more. Where `source` is another
    model, `model` is a copy: of one that is spread over processes (FSDP), from which none can sample by itself.
    """

    def __init__(self, model: nn.Module, eos_ids: list[int], sample_rows=256, autocast=nullcontext, source=None):
        self.model, self.source = kv_cache.share_keys(model), source
        self.sample_rows, self.autocast = sample_rows, autocast
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(eos_ids, device=self.device)
        self.generator = torch.Generator(self.device)  # its own, so that sampling does not depend on anything else

    def sleep(self) -> None:
        """Called before each update."""

    @torch.no_grad()
    def sync(self) -> None:
        """Called after each update. These are the trainer's own weights already, but for a copy."""
        if self.source not in (None, self.model):
            for p, (_, weight) in zip(self.model.parameters(), parallel.whole_weights(self.source), strict=True):
                p.copy_(weight)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """`group_size` completions of each prompt, those of one prompt next to each other.

        Their log-probs are those of the distribution that was sampled from (of the model itself, at temperature 0).
        """
        self.model.eval()
        self.generator.manual_seed(seed)
        at_once = max(1, self.sample_rows // group_size)
        chunks = [prompts[i : i + at_once] for i in range(0, len(prompts), at_once)]
        with self.autocast():
            return [rollout for chunk in chunks for rollout in self._generate(chunk, group_size, *sampling)]

    def _generate(self, prompts, group_size, max_tokens, temperature, top_p, top_k) -> list[Rollout]:
        # Left padding puts the last prompt token of every row in the last column, where the next token comes from.
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        logits, cache = self._forward(ids, mask, None)
        if logits.isnan().any():
            raise UsageError("the model's logits are not numbers: it has diverged. Go back to a checkpoint, lower lr")
        cache.batch_repeat_interleave(group_size)
        kv_cache.make_room(cache)
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
                # rows from the end take the places of those that stopped, all others stay where they are
                left = len(rows) - int(stopped.sum())
                going = torch.arange(left, device=self.device)
                going[stopped[:left]] = left + (~stopped[left:]).nonzero()[:, 0]
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
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model.base_model(ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True)
        return output_logits(self.model, out.last_hidden_state[:, -1]), out.past_key_values


class VLLMSampler:
    """Samples with vLLM, in this process. It has weights of its own, which `sync` replaces after each update."""

    def __init__(self, folder: str, model: nn.Module, eos_ids: list[int], config: Config, bf16: bool):
        # In this process: weights are then handed over by reference. Before the import, which reads it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        if model.config.model_type == "mathformer":
            import_module("mathformer").register_with_vllm()
        self.model, self.eos, self.params = model, eos_ids, vllm.SamplingParams
        self.on_cpu, self.sleeps, self.asleep = not torch.cuda.is_available(), config.vllm_sleep, False
        longest = config.max_prompt_tokens + config.max_completion_tokens + 32  # the evaluation may add a prefix
        free, processes = memory.free_memory(next(model.parameters()).device), PartialState().num_processes
        settings = dict(
            dtype="bfloat16" if bf16 else "float32",
            hf_overrides={"head_dtype": "float32"},  # logits in float32, as the trainer's are
            max_model_len=min(longest, getattr(model.config, "max_position_embeddings", longest)),
            kv_cache_memory_bytes=memory.vllm_cache_bytes(memory.Shape.of(model.config), config, bf16, free, processes),
            gpu_memory_utilization=0.05,  # only checked against: the line above says what is taken
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
            generation_config="vllm",  # and not sampling settings that a model brings along
            skip_tokenizer_init=True,  # token ids in, token ids out
            trust_remote_code=config.trust_remote_code,
            enforce_eager=self.on_cpu,
            distributed_executor_backend="external_launcher" if processes > 1 else None,  # each on the GPU of its rank
            enable_sleep_mode=config.vllm_sleep,
            seed=config.seed,
        )
        try:
            self.llm = vllm.LLM(folder, **settings)
        except Exception as error:  # of many kinds: memory, architecture, a GPU that is not there
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"vLLM cannot run {folder}: {reason} (--sampler torch runs anywhere, slower)") from error

    def generate(self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """As `TorchSampler.generate`. Every request has a seed of its own, so that a resumed run samples the same."""
        params = [
            self.params(
                n=group_size, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                max_tokens=sampling.max_tokens, logprobs=0, flat_logprobs=True, detokenize=False,
                stop_token_ids=self.eos, seed=random.Random(f"{seed}/{i}").getrandbits(48),
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        return [
            Rollout(ids, list(c.token_ids), list(c.logprobs.logprobs), c.finish_reason == "length")
            for ids, output in zip(prompts, self.llm.generate(requests, params, use_tqdm=False), strict=True)
            for c in output.outputs
        ]

    def sleep(self) -> None:
        """Gives back the memory of weights and cache, if the settings say so, until the next `sync`."""
        if self.sleeps:
            self.llm.sleep(level=2)  # 2: the weights are dropped, not kept on the CPU, since new ones will come
            self.asleep = True

    def sync(self) -> None:
        """Gives vLLM the trainer's weights, and makes it forget what it has cached of prompts under the old ones."""
        if self.asleep:
            torch.cuda.empty_cache()  # what the update has used goes back to the card, which vLLM now takes from
            self.llm.wake_up(["weights"])
        weights = parallel.whole_weights(self.model)
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        if self.on_cpu and self.model.config.tie_word_embeddings:
            # vLLM's CPU build keeps the head in a packed copy, which the reload leaves as it was
            self.llm.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it would answer with keys of the old weights")


def logp_gap(policy: nn.Module, accelerator: Accelerator, config: Config, rollouts: list[Rollout]) -> float:
    """Mean absolute difference of the sampler's log-probs and the policy's, over all tokens."""
    rollouts = parallel.join(rollouts)
    add_logps("old_logps", policy, rollouts, accelerator, config)
    return average(abs(a - b) for r in rollouts for a, b in zip(r.logps, r.old_logps, strict=True))


# ==== 3. Rollouts and advantages ======================================================================================


def encode_prompt(tokenizer, task, example: dict) -> tuple[str, list[int]]:
    """The prompt as text and as token ids; chat messages go through the model's chat template, text through nothing."""
    prompt = task.prompt(example)
    is_chat = not isinstance(prompt, str)
    if is_chat:
        if not tokenizer.chat_template:
            raise UsageError(
                "the task gives chat messages, but this model's tokenizer has no chat template: "
                "take a chat (instruct) model, or let prompt() return a string"
            )
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    prompt += getattr(task, "prefill", "")
    # a chat template writes the special tokens itself; plain text gets those that the tokenizer always adds
    ids = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    if not ids:
        raise UsageError(f"the prompt of {example!r} is empty: there is no token to go on from")
    return prompt, ids


def draw_prompts(task, tokenizer, config: Config, step: int, attempt: int = 0) -> tuple[list[Problem], int]:
    """The step's P problems, and how many were too long and drawn again.

    The step's number seeds the draw, so a resumed run needs no memory of what was drawn before.
    """
    rng = random.Random(f"{config.seed}/{step}" + (f"/{attempt}" if attempt else ""))
    drawn, too_long = [], 0
    while len(drawn) < config.prompts_per_step:
        example = task.train(rng, step)
        problem = Problem(example, *encode_prompt(tokenizer, task, example))
        if len(problem.ids) <= config.max_prompt_tokens:
            drawn.append(problem)
        elif (too_long := too_long + 1) > 1000 * config.prompts_per_step:
            raise UsageError(f"nearly all prompts are over max_prompt_tokens = {config.max_prompt_tokens}: raise it")
    return drawn, too_long


def complete(
    sampler, tokenizer, task, problems: list[Problem], group_size: int, sampling: Sampling, seed: int, prefix: str = ""
) -> list[Rollout]:
    """`group_size` completions of each problem, as the task's verifier judges them; those of a problem are neighbours.

    `prefix` goes between the prompt and the completion, and is judged with it. Several processes share the problems.
    """
    problems, seed = parallel.share(problems), seed + 7_368_787 * PartialState().process_index
    behind = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    rollouts = sampler.generate([problem.ids + behind for problem in problems], group_size, sampling, seed)
    for i, rollout in enumerate(rollouts):
        problem = problems[i // group_size]
        # only the end-of-sequence token is no text: a special token in the middle must not vanish from an answer
        completion = tokenizer.decode(rollout.completion_ids[: None if rollout.truncated else -1])
        rollout.prompt, rollout.text = problem.prompt, getattr(task, "prefill", "") + prefix + completion
        rollout.parts = judge(task, rollout.text, problem)
        rollout.reward = float(rollout.parts["reward"])  # GRPO: whatever the task pays
    return parallel.join(rollouts)


def judge(task, text: str, problem: Problem) -> dict:
    """What the task's reward() returns for `text`; a UsageError that names the completion if that is unusable."""
    where = f"{type(task).__name__}.reward() for the prompt {problem.prompt!r} and the completion {text!r}"
    try:
        parts = task.reward(text, problem.example)
    except Exception as error:  # the task may be anyone's code: say which completion it failed on
        raise UsageError(f"{where} raised {type(error).__name__}: {error}") from error
    if not isinstance(parts, dict) or any(key not in parts for key in REWARD_KEYS):
        raise UsageError(f"{where} must be a dict with the keys {', '.join(REWARD_KEYS)}, but is {parts!r}")
    if taken := sorted(parts.keys() & RESERVED):
        raise UsageError(f"{where} gives {', '.join(taken)}: the run's own figures have that name, choose another")
    parts = {key: value.item() if hasattr(value, "item") else value for key, value in parts.items()}  # numpy, torch
    for key in ("reward", "correct", "format"):
        if not is_number(parts[key]) or not math.isfinite(parts[key]):
            raise UsageError(f"{where} gives the {key} {parts[key]!r}, which is no finite number")
    if parts["correct"] not in (0, 1):
        raise UsageError(f"{where} gives the correct {parts['correct']!r}, which must be 0 or 1; parts go into reward")
    return parts


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def dead_groups(rewards: torch.Tensor) -> torch.Tensor:
    """[P, G] rewards to [P], True where all rewards of the group are equal.

    Judged by the rewards: rounding can make the advantages of equal rewards differ from 0.
    """
    return rewards.amax(1) == rewards.amin(1)


# GRPO: from rewards r [P, G] and their group means [P, 1]. eps is 1e-4 and not 1e-8, which would blow rounding noise up
# to advantages of size 1.
ADVANTAGES = {
    "grpo": lambda r, mean, eps: (r - mean) / (r.std(1, keepdim=True) + eps),
    "dr_grpo": lambda r, mean, eps: r - mean,
    "rloo": lambda r, mean, eps: (r - mean) * r.shape[1] / (r.shape[1] - 1),
    "batch": lambda r, mean, eps: (r - mean) / (r.std() + eps),
    "maxrl": lambda r, mean, eps: (r - mean) / mean.clamp(min=torch.finfo(r.dtype).tiny),
}


def group_advantages(rewards: torch.Tensor, kind: str = "grpo", eps: float = 1e-4) -> torch.Tensor:
    """Advantages [P, G] from rewards [P, G]: how much better a completion is than the others of its prompt.

        grpo     (r - mean) / (std + eps)           DeepSeekMath, arXiv 2402.03300, section 4.1.2
        dr_grpo  r - mean                           Dr. GRPO, arXiv 2503.20783
        rloo     r - mean of the group's others     arXiv 2402.14740; dr_grpo * G / (G - 1), and unbiased
        batch    (r - mean) / (batch std + eps)     arXiv 2508.08221; the std of all rewards of the step
        maxrl    (r - mean) / mean                  arXiv 2602.02710; for rewards >= 0, 0 where the mean is 0

    Stds have G - 1 (P*G - 1) in the denominator; some papers and repositories have G, a factor sqrt(G / (G - 1)).
    A group of equal rewards (a dead group) gets exactly 0: rounding must not become an advantage.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must have the shape [P, G] with G of 2 or more, not {list(rewards.shape)}")
    if kind not in ADVANTAGES:
        raise ValueError(f"kind {kind!r}: choose {', '.join(ADVANTAGES)}")
    if kind == "maxrl" and rewards.min() < 0:
        raise UsageError(f"advantage maxrl is for rewards of 0 and more, but one is {rewards.min():g}")
    # GRPO: the group is its own baseline, no value network is needed
    advantages = ADVANTAGES[kind](rewards, rewards.mean(1, keepdim=True), eps)
    return advantages.masked_fill(dead_groups(rewards)[:, None], 0.0)


def overlong_penalty(length: int, max_tokens: int, share: float) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, section 3.4): 0 up to the last `share` of max_tokens, then up to 1."""
    return max(0.0, 1 - (max_tokens - length) / (share * max_tokens)) if share else 0.0


def collect(sampler, tokenizer, task, config: Config, step: int) -> tuple[list[Rollout], dict[str, int]]:
    """The rollouts of a step, judged, those of a group next to each other; and counts of what was drawn for them."""
    rollouts: list[Rollout] = []
    counts = {"prompts_too_long": 0, "resampled_groups": 0, "step_tokens": 0}
    # GRPO: with `resample`, fresh prompts take the places of dead groups (DAPO's dynamic sampling), so many times
    for attempt in range(1 + (config.resample_rounds if config.dead_groups == "resample" else 0)):
        groups = [rollouts[i : i + config.group_size] for i in range(0, len(rollouts), config.group_size)]
        dead = [i for i, group in enumerate(groups) if len({r.reward for r in group}) == 1]
        if groups and not dead:
            break
        problems, too_long = draw_prompts(task, tokenizer, config, step, attempt)
        problems = problems[: len(dead)] if groups else problems
        seed = config.seed * 1_000_003 + step + 500_009 * attempt
        fresh = complete(sampler, tokenizer, task, problems, config.group_size, config.sampling, seed)
        for i, slot in enumerate(dead):
            groups[slot] = fresh[i * config.group_size : (i + 1) * config.group_size]
        rollouts = sum(groups, []) or fresh
        counts["prompts_too_long"] += too_long
        counts["resampled_groups"] += len(dead)
        counts["step_tokens"] += sum(r.length for r in fresh)
    return rollouts, counts


def assign_advantages(rollouts: list[Rollout], config: Config) -> None:
    """Sets `penalty`, `advantage` and `dead` of each rollout, from its reward and those of its group."""
    for r in rollouts:
        r.penalty = overlong_penalty(r.length, config.max_completion_tokens, config.overlong_share)
        if config.kl_in == "reward":  # GRPO: k1 = log policy - log reference, summed: what the reward has to outweigh
            acted = r.logps if r.old_logps is None else r.old_logps
            r.penalty += config.kl_coef * (sum(acted) - sum(r.ref_logps))
    rewards = torch.tensor([r.reward - r.penalty for r in rollouts], dtype=torch.float64).view(-1, config.group_size)
    advantages = group_advantages(rewards, config.advantage).flatten().tolist()
    dead = dead_groups(rewards).repeat_interleave(config.group_size).tolist()
    for i, rollout in enumerate(rollouts):
        rollout.advantage, rollout.dead = advantages[i], dead[i]


def rollout_metrics(rollouts: list[Rollout], config: Config) -> dict[str, float | None]:
    """What a step's completions look like, before any update. None where a mean is over nothing."""
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64).view(-1, config.group_size)
    right = torch.tensor([float(r.parts["correct"]) for r in rollouts]).view(-1, config.group_size)
    words = "|".join(config.reflection_words) or "(?!)"  # which matches nothing
    reflection = re.compile(rf"\b({words})\b", re.IGNORECASE)
    return {
        "reward": average(r.reward for r in rollouts),
        "reward_std": rewards.std(1).mean().item(),
        "penalty": average(r.penalty for r in rollouts),
        **part_means(rollouts),
        "pass_at_group": (right > 0).any(1).double().mean().item(),
        "zero_advantage_groups": dead_groups(rewards).double().mean().item(),
        "length": average(r.length for r in rollouts),
        "length_correct": average(r.length for r in rollouts if r.parts["correct"]),
        "length_wrong": average(r.length for r in rollouts if not r.parts["correct"]),
        "truncated": average(r.truncated for r in rollouts),
        "reflections": average(bool(reflection.search(r.text)) for r in rollouts),
    }


def part_means(rollouts: list[Rollout]) -> dict[str, float | None]:
    """Means of `correct`, `format` and of every number of the task's own, over the completions that have one."""
    own = [key for r in rollouts for key, value in r.parts.items() if key not in REWARD_KEYS and is_number(value)]
    keys = dict.fromkeys(["correct", "format", *own])
    return {key: average(float(r.parts[key]) for r in rollouts if is_number(r.parts.get(key))) for key in keys}


def average(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


# ==== 4. The loss =====================================================================================================


class Policy(nn.Module):
    """Token ids to log-probs of the completion tokens: the whole computation in one forward.

    One module call, so that whatever wraps the module (mixed precision, data parallelism) wraps all of it.
    """

    CHUNK = memory.LOGITS_CHUNK

    def __init__(self, model: nn.Module, temperature: float = 1.0, entropy_gradient: bool = False):
        super().__init__()
        self.model, self.temperature, self.entropy_gradient = model, temperature, entropy_gradient
        self._no_split_modules = model._no_split_modules  # the layers, which FSDP takes as its units

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
        with torch.set_grad_enabled(self.entropy_gradient and torch.is_grad_enabled()):  # else it is a metric only
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
    ratio: str = "token",
    kind: str = "clip",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The surrogate for each token, to be minimised. With r = exp(logp - old_logp):

        clip    -min(r * A, clamp(r, 1 - clip_low, 1 + clip_high) * A)     PPO, arXiv 1707.06347, eq. 7
        cispo   -detach(min(r, 1 + clip_high)) * A * logp                  MiniMax-M1, arXiv 2506.13585, section 3.1

    With ratio `sequence` (GSPO, arXiv 2507.18071, section 4) r is the same for all tokens of a row, exp of the mean of
    their log-ratios, and each of them has its gradient. The paper has weights `sequence` and clip 3e-4/4e-4.

    Args:
        logps, old_logps: [B, T], of the sampled tokens now, and when they were sampled.
        advantages: [B, 1] or [B, T].
        mask: [B, T], True on real tokens; None means that all are.

    Returns:
        the loss of each token [B, T], 0 outside the mask; and what was clipped [B, T]: -1 where the ratio was below
        the range, 1 where it was above, and the token for that reason has no (cispo: less) gradient; 0 elsewhere.
    """
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    log_ratio = logps - old_logps  # GRPO: one ratio a token
    if ratio == "sequence":  # GRPO: one ratio a completion; `logps - logps.detach()` is 0 and has the gradient
        mean = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.detach() + logps - logps.detach()
    r = log_ratio.exp()
    above = r > 1 + clip_high
    if kind == "cispo":  # GRPO: a bounded weight for every token, also for those that clip would silence
        loss, clipped = -r.clamp(max=1 + clip_high).detach() * advantages * logps, above.int()
    else:
        # GRPO: min, not max. For A < 0 it keeps the gradient of a token that has become likelier, and stops pushing
        # one down that is already 1 - clip_low times as likely as it was.
        loss = -torch.min(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)
        clipped = (above & (advantages > 0)).int() - ((r < 1 - clip_low) & (advantages < 0)).int()
    return loss.masked_fill(~mask, 0.0), clipped.masked_fill(~mask, 0)


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


def adapted_kl_coef(kl_coef: float, kl_ref: float | None, target: float) -> float:
    """The coefficient of the next step: a little larger if the KL came out above the target, smaller if below.

        kl_coef * (1 + 0.1 * clip(kl_ref / target - 1, -0.2, 0.2))    arXiv 1909.08593, section 2.2

    At most 2 % a step: the KL answers late, and a faster controller would swing. A step that trained nothing
    (`kl_ref` None) changes nothing.
    """
    return kl_coef if kl_ref is None else kl_coef * (1 + 0.1 * max(-0.2, min(0.2, kl_ref / target - 1)))


# GRPO: one over the weight of each token of a row
TOKEN_WEIGHTS = {
    "token": lambda lengths, tokens, rows, max_tokens: torch.full_like(lengths, tokens),
    "sequence": lambda lengths, tokens, rows, max_tokens: rows * lengths,
    "constant": lambda lengths, tokens, rows, max_tokens: torch.full_like(lengths, rows * max_tokens),
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
    if kind not in TOKEN_WEIGHTS:
        raise ValueError(f"kind {kind!r}: choose {', '.join(TOKEN_WEIGHTS)}")
    if kind == "constant" and max_tokens < 1:
        raise ValueError("the constant weights need max_tokens")
    tokens = int(lengths.sum()) if total_tokens is None else total_tokens
    rows = len(lengths) if total_rows is None else total_rows
    count = TOKEN_WEIGHTS[kind](lengths.to(torch.get_default_dtype()), tokens, rows, max_tokens)
    return (1 / count).masked_fill(lengths == 0, 0.0)


# ==== 5. The update ===================================================================================================


def microbatches(rollouts: list[Rollout], token_budget: int) -> list[list[Rollout]]:
    """Splits rows into batches of at most `token_budget` tokens, padding included; a longer row is a batch by itself.

    The cheapest cuts through the rows in order of length. What a batch costs besides its tokens is worth some 256 more.
    """
    rows = sorted(rollouts, key=lambda r: -r.row_tokens)
    best = {len(rows): (0, 0)}  # of the rows from i on: the lowest cost, and where their first batch ends
    for i in reversed(range(len(rows))):
        longest = rows[i].row_tokens
        ends = range(i + 1, 1 + min(len(rows), i + max(1, token_budget // longest)))
        best[i] = min((256 + (end - i) * longest + best[end][0], end) for end in ends)
    cuts = [0]
    while cuts[-1] < len(rows):
        cuts.append(best[cuts[-1]][1])
    return [rows[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def own_microbatches(rollouts: list[Rollout], token_budget: int) -> list[tuple[list[Rollout], bool]]:
    """The microbatches of this process, and whether they count.

    The rows are dealt out by length. Every process gets equally many microbatches, since a pass through the model may
    be something they do together: where one has none left, it takes a short row along that does not count.
    """
    rows, state = sorted(rollouts, key=lambda r: -r.row_tokens), PartialState()
    of_all = [microbatches(rows[i :: state.num_processes], token_budget) for i in range(state.num_processes)]
    own = [(batch, True) for batch in of_all[state.process_index]]
    return own + [(rows[-1:], False)] * (max(map(len, of_all)) - len(own))


def pad(rows: list[list], device) -> torch.Tensor:
    """Lists of unequal length to a tensor [B, longest], with zeros on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


def policy_inputs(batch: list[Rollout], device) -> dict[str, torch.Tensor]:
    """The arguments of `Policy.forward` for these rows."""
    return {
        "ids": pad([r.prompt_ids + r.completion_ids for r in batch], device),
        "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in batch], device=device),
        "lengths": torch.tensor([r.length for r in batch], device=device),
    }


@torch.no_grad()
def add_logps(name: str, policy: nn.Module, rollouts: list[Rollout], accelerator: Accelerator, config: Config) -> None:
    """Sets the field `name` of each rollout to its tokens' log-probs under `policy`, which goes back where it was."""
    home = next(policy.parameters()).device
    policy.to(accelerator.device).eval()
    place, found = {id(rollout): i for i, rollout in enumerate(rollouts)}, []
    for batch, counts in own_microbatches(rollouts, config.tokens_per_microbatch):
        with accelerator.autocast():
            logps, _ = policy(**policy_inputs(batch, accelerator.device))
        if counts:
            found += [(place[id(r)], row[: r.length]) for r, row in zip(batch, logps.tolist(), strict=True)]
    for i, row in parallel.join(found):
        setattr(rollouts[i], name, row)
    policy.to(home)


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step 1, 2, ..., steps. A function of the step alone, so a resumed run needs no memory."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps - 1) / max(1, config.steps - config.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.lr * shape[config.lr_schedule]


def batch_loss(
    policy: nn.Module, batch: list[Rollout], config: Config, device: torch.device, total_tokens: int, total_rows: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """A microbatch's part of the loss, a scalar; and what the metrics need: sums over its tokens, and the top ratio."""
    inputs = policy_inputs(batch, device)
    lengths, mask = inputs["lengths"], completion_mask(inputs["lengths"])
    sampled = pad([r.logps for r in batch], device)  # log-probs under the policy that acted, as the sampler saw it
    old = pad([r.old_logps for r in batch], device) if config.uses_trainer_logps else sampled
    advantages = torch.tensor([[r.advantage] for r in batch], device=device)  # [B, 1]

    logps, entropy = policy(**inputs)  # [B, T]
    loss, clipped = policy_loss(
        logps, old, advantages, config.clip_low, config.clip_high, mask, config.ratio, config.surrogate
    )
    if config.importance_cap:  # GRPO: truncated importance weights, for a sampler that is not quite the policy
        loss = loss * (old - sampled).exp().clamp(max=config.importance_cap)
    kl = torch.zeros_like(logps)
    if config.kl_coef > 0:
        kl = kl_estimate(logps, pad([r.ref_logps for r in batch], device), config.kl_kind).masked_fill(~mask, 0.0)
        if config.kl_in == "loss":  # GRPO: the penalty on each token
            loss = loss + config.kl_coef * KL_IN_LOSS[config.kl_kind]((logps - old).exp(), kl)
    if config.entropy_coef:  # GRPO: a reward for being undecided
        loss = loss - config.entropy_coef * entropy
    # GRPO: one weight for each token of a row; a mean inside each microbatch would depend on how the rows were split
    weights = token_weights(lengths, config.loss_weight, config.max_completion_tokens, total_tokens, total_rows)
    loss = (loss.sum(1) * weights).sum()

    gap = (sampled - logps)[mask]
    numbers = {
        "loss": loss,
        "tokens": mask.sum(),
        "kl_ref": kl.sum(),
        "entropy": entropy.sum(),
        "clipped_low": (clipped < 0).sum(),
        "clipped_high": (clipped > 0).sum(),
        "sampler_kl": gap.sum(),
        "sampler_logp_gap": gap.abs().sum(),
        "ratio_max": (logps - old)[mask].max().exp(),
    }
    return loss, dict(zip(numbers, torch.stack([n.detach().float() for n in numbers.values()]).tolist(), strict=True))


def update(
    policy: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, rollouts: list[Rollout],
    config: Config, step: int,
) -> dict[str, float | None]:  # fmt: skip
    """Trains on the rollouts of a step: `epochs` passes of `minibatches` optimizer steps each.

    Returns metrics over the trained tokens. An optimizer step with nothing to learn from is skipped and counted in
    `skipped_updates`, one whose gradient is not finite in `nonfinite_updates`.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    policy.train()  # gradient checkpointing acts only in training mode; dropout was set to 0 when the model was loaded
    order = random.Random(f"{config.seed}/{step}/minibatches")
    sums: Counter[str] = Counter()
    before_any_update, grad_norms, ratio_max, skipped, not_finite = None, [], 1.0, 0, 0
    for _ in range(config.epochs):
        rows = order.sample(rollouts, len(rollouts))
        size = len(rows) // config.minibatches
        for minibatch in (rows[i : i + size] for i in range(0, len(rows), size)):
            # GRPO: what is masked is in no total, as if it had not been sampled (but for the mean of its group)
            minibatch = [r for r in minibatch if not (r.truncated and config.mask_truncated)]
            total_tokens = sum(r.length for r in minibatch)
            # GRPO: dead groups have advantage 0 and, without a KL term, no gradient, so they skip the forward and the
            # backward pass. They still count in the totals: leaving them out there would raise the learning rate.
            kept = [r for r in minibatch if not (r.dead and config.drops_dead_groups)]
            if config.dead_groups_teach_nothing and all(r.dead for r in kept):
                kept = []  # or AdamW's momentum would move the weights
            batches = own_microbatches(kept, config.tokens_per_microbatch)
            for i, (batch, counts) in enumerate(batches, start=1):
                with parallel.holds_gradients(accelerator, policy, last=i == len(batches)):
                    loss, numbers = batch_loss(policy, batch, config, accelerator.device, total_tokens, len(minibatch))
                    # the weights are those of the whole step, and the processes' gradients get averaged
                    accelerator.backward(loss * accelerator.num_processes * counts)
                if counts:
                    ratio_max = max(ratio_max, numbers.pop("ratio_max"))
                    sums.update(numbers)
            if kept and before_any_update is None:
                before_any_update = Counter(sums)
            if kept:
                grad_norms.append(float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)))
            if not kept:
                skipped += 1
            elif math.isfinite(grad_norms[-1]):
                optimizer.step()
            else:
                not_finite += 1
            optimizer.zero_grad()

    sums, before_any_update = parallel.total(sums), parallel.total(before_any_update or Counter())

    def per_token(key: str, over: Counter) -> float | None:
        return over[key] / over["tokens"] if over["tokens"] else None

    return {
        "loss": sums["loss"] / (config.epochs * config.minibatches),
        "kl_ref": per_token("kl_ref", sums) if config.kl_coef > 0 else None,
        "kl_coef": config.kl_coef,
        "entropy": per_token("entropy", sums),
        "grad_norm": average(grad_norms),
        "lr": learning_rate(config, step),
        "clipped_low": per_token("clipped_low", sums),
        "clipped_high": per_token("clipped_high", sums),
        "ratio_max": max(parallel.join([ratio_max])),
        # these two compare the sampler with the trainer, which are the same model only until the first update, and
        # the same distribution only where the sampler leaves no token out
        "sampler_kl": per_token("sampler_kl", before_any_update) if config.samples_all_tokens else None,
        "sampler_logp_gap": per_token("sampler_logp_gap", before_any_update) if config.samples_all_tokens else None,
        "skipped_updates": skipped,
        "nonfinite_updates": not_finite,
    }


# ==== 6. Evaluation ===================================================================================================


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, of which c are right, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, section 2.1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(sampler, tokenizer, task, problems: list[Problem], config: Config, step: int) -> tuple[dict, list[dict]]:
    """Accuracy on `problems`, greedy and sampled `eval_samples` times each, with the same seed at every step.

    Returns the row of eval.jsonl and the rows of eval-<step>.jsonl.
    """
    n, k = len(problems), config.eval_samples
    most_likely = Sampling(config.max_completion_tokens, temperature=0.0)
    greedy = complete(sampler, tokenizer, task, problems, 1, most_likely, config.seed)
    sampled = complete(sampler, tokenizer, task, problems, k, config.sampling, config.seed)
    right = [sum(r.parts["correct"] == 1 for r in sampled[i * k : (i + 1) * k]) for i in range(n)]
    dead = dead_groups(torch.tensor([r.reward for r in sampled], dtype=torch.float64).view(n, k)).tolist()
    accuracy = average(r.parts["correct"] == 1 for r in greedy)
    row = {"step": step, "n": n, "accuracy": accuracy}
    row["accuracy_low"], row["accuracy_high"] = run_folder.wilson_interval(accuracy, n)
    row["accuracy_sampled"] = average(c / k for c in right)
    row["accuracy_sampled_low"], row["accuracy_sampled_high"] = run_folder.clustered_interval([c / k for c in right])
    ks = sorted({2**i for i in range(k.bit_length())} | {k})
    row["pass_at_k"] = {str(j): average(pass_at_k(k, c, j) for c in right) for j in ks}
    row |= {"zero_advantage_groups": average(dead), "reward": average(r.reward for r in sampled), **part_means(sampled)}
    row |= {"length": average(r.length for r in sampled), "truncated": average(r.truncated for r in sampled)}
    if step == 0 and hasattr(task, "worked_prefix"):  # what the model could do, if only it showed its steps
        shown = complete(sampler, tokenizer, task, problems, 1, most_likely, config.seed, task.worked_prefix)
        row["accuracy_worked"] = average(r.parts["correct"] == 1 for r in shown)
    details = [
        {"prompt": r.prompt, "completion": r.text, **r.parts, "length": r.length, "sampled_correct": c / k}
        for r, c in zip(greedy, right, strict=True)
    ]
    return row, details


# ==== 7. train() and main() ===========================================================================================


def evaluation_problems(task, tokenizer, config: Config) -> list[Problem]:
    """The evaluation problems whose prompts fit; checks the task and the lengths on the way, before any long work."""
    problems = [Problem(example, *encode_prompt(tokenizer, task, example)) for example in task.eval()]
    fitting = [problem for problem in problems if len(problem.ids) <= config.max_prompt_tokens]
    if not fitting:
        shortest = min((len(problem.ids) for problem in problems), default=0)
        raise UsageError(
            f"no prompt fits: the shortest of {len(problems)} evaluation prompts has {shortest} tokens, "
            f"and max_prompt_tokens is {config.max_prompt_tokens}"
        )
    if len(fitting) < len(problems):
        print(f"{len(problems) - len(fitting)} evaluation prompts over {config.max_prompt_tokens} tokens are left out")
    judge(task, "", fitting[0])
    draw_prompts(task, tokenizer, config, step=1)
    return fitting


@torch.no_grad()
def check_logits(model, prompt: list[int]) -> None:
    """Refuses models that change their logits behind the output head: `output_logits` would train other ones."""
    ids = torch.tensor([prompt[:64]])
    own, ours = model(ids).logits.float(), output_logits(model, model.base_model(ids).last_hidden_state)
    if not torch.allclose(own, ours, atol=1e-2):
        raise UsageError(f"{type(model).__name__} scales or caps its logits behind the output head: not supported yet")


def setup(config: Config):
    """Everything that a run needs, checked before any long work and before a folder is made."""
    task = loading.load_task(config.task, config.task_args, config.reward_seconds)
    accelerator = loading.make_accelerator(config)
    folder = RunFolder(Path(config.resume), accelerator.is_main_process) if config.resume else None
    checkpoint = folder.newest_whole(config.steps) if folder else None
    name = str(checkpoint or config.model)
    model_config = loading.load_model_config(name, config.trust_remote_code)
    loading.check_window(model_config, config)
    device, bf16 = accelerator.device, accelerator.mixed_precision == "bf16"
    kind = loading.choose_sampler(config, model_config, device)
    memory.check_memory(model_config, config, accelerator, kind == "vllm")
    model, tokenizer = loading.load_model(name, config.gradient_checkpointing, config.trust_remote_code)
    loading.limit_threads(model.eval())
    problems, eos = evaluation_problems(task, tokenizer, config), loading.find_eos(model, tokenizer)
    check_logits(model, problems[0].ids)
    torch.manual_seed(config.seed)
    policy = Policy(model, config.temperature, entropy_gradient=config.entropy_coef > 0)
    optimizer = optimizers.make_optimizer(policy, config, accelerator)
    of_sampler = copy.deepcopy(model).to(device) if accelerator.is_fsdp2 and kind == "torch" else model
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if kind == "vllm":
        sampler = VLLMSampler(loading.local_name(name), model, eos, config, bf16)
        sampler.sync()
        prompts, gap = [problem.ids for problem in problems], partial(logp_gap, policy, accelerator, config)
        loading.check_sampler(sampler, policy, prompts, gap, config)
    else:
        sampler = TorchSampler(of_sampler, eos, config.sample_rows, accelerator.autocast, source=model)
    reference = None
    if config.kl_coef > 0:
        original, _ = loading.load_model(config.model, trust_remote_code=config.trust_remote_code)
        reference = Policy(original, config.temperature).requires_grad_(False).to(next(policy.parameters()).dtype)
        reference.to("cpu" if config.offload_reference else accelerator.device)
    folder = folder or RunFolder.create(config, accelerator.is_main_process)
    state = folder.resume(checkpoint, optimizer, parallel.engine(policy))
    folder.start(config, state["step"])
    run_folder.announce(config, folder.path, model, accelerator, checkpoint)
    return task, accelerator, model, tokenizer, problems, policy, optimizer, sampler, reference, folder, state


def train(config: Config) -> dict[str, Any]:
    """The whole run. Returns the first and the last evaluation, seconds, tokens and the run's folder."""
    started = time.time()
    task, accelerator, model, tokenizer, problems, policy, optimizer, sampler, reference, folder, state = setup(config)
    step, tokens, kl_coef = state["step"], state.get("tokens", 0), state.get("kl_coef", config.kl_coef)
    evaluations, alarms = folder.read("eval.jsonl"), run_folder.Alarms(config.epochs * config.minibatches)

    def save_checkpoint():
        folder.save_checkpoint(step, model, tokenizer, optimizer, config.keep_last, tokens=tokens, kl_coef=kl_coef)

    shown = config.steps and accelerator.is_main_process
    bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True, disable=not shown)
    with run_folder.finish_step_on_signal() as stop:
        while not parallel.any_process(stop.is_set()):
            is_due = step in (0, config.steps) or (config.eval_steps and step % config.eval_steps == 0)
            if is_due and (not evaluations or evaluations[-1]["step"] < step):
                row, details = evaluate(sampler, tokenizer, task, problems, config, step)
                folder.log_evaluation(row, details)
                evaluations.append(row)
                if step == 0 or step < config.steps:  # the last one is shown beside the first
                    tqdm.write(run_folder.evaluation_table([row]) + ("" if step else f"\n  {run_folder.verdict(row)}"))
            if step == config.steps or parallel.any_process(stop.is_set()):
                break

            step += 1
            start = time.time()
            now = replace(config, kl_coef=kl_coef)
            rollouts, counts = collect(sampler, tokenizer, task, now, step)
            sampler.sleep()
            sampled = time.time()
            if config.uses_trainer_logps:
                add_logps("old_logps", policy, rollouts, accelerator, config)
            if reference is not None:
                add_logps("ref_logps", reference, rollouts, accelerator, config)
            assign_advantages(rollouts, now)
            learned = update(policy, optimizer, accelerator, rollouts, now, step)
            if config.kl_target:
                kl_coef = adapted_kl_coef(kl_coef, learned["kl_ref"], config.kl_target)
            trained = time.time()
            sampler.sync()
            synced = time.time()

            step_tokens = counts.pop("step_tokens")
            tokens += step_tokens
            row = {
                "step": step,
                **rollout_metrics(rollouts, config),
                **learned,
                **counts,
                "tokens": tokens,
                "tokens_per_second": step_tokens / (synced - start),
                "seconds_sample": sampled - start,
                "seconds_train": trained - sampled,
                "seconds_sync": synced - trained,
                "peak_memory": run_folder.peak_memory(accelerator.device),
            }
            folder.log_step(row, rollouts)
            bar.update()
            bar.set_postfix({key: f"{row[key]:.2f}" for key in ("reward", "length", "zero_advantage_groups")})
            for warning in alarms(row):
                tqdm.write(f"step {step}: {warning}")
            if config.print_groups and (step == 1 or step % config.print_groups == 0):
                run_folder.show_groups(step, rollouts, config.group_size)
            if step % config.save_steps == 0 or step == config.steps:
                save_checkpoint()
    bar.close()
    folder.trackers.finish()
    result = dict(first=evaluations[0] if evaluations else None, last=evaluations[-1] if evaluations else None)
    result |= dict(seconds=round(time.time() - started, 1), tokens=tokens, run=folder.path)
    if not evaluations or evaluations[-1]["step"] < config.steps:
        if not parallel.of_main_process(folder.path / f"checkpoint-{step}" in folder.checkpoints()):
            save_checkpoint()
        print(f"stopped after step {step}; go on with: python grpo.py --resume {folder.path}")
        return result | {"interrupted": True}
    if config.steps == 0:
        rollouts, _ = collect(sampler, tokenizer, task, config, 1)
        if reference is not None:
            add_logps("ref_logps", reference, rollouts, accelerator, config)
        assign_advantages(rollouts, config)
        lengths = torch.tensor([0 if r.truncated and config.mask_truncated else r.length for r in rollouts])
        weights = token_weights(lengths, config.loss_weight, config.max_completion_tokens, None, int(sum(lengths > 0)))
        run_folder.show_group(rollouts, weights.tolist(), tokenizer, config.group_size)
        return result
    final = folder.save_final(model, tokenizer, optimizer, config, evaluations)
    print(run_folder.evaluation_table([evaluations[0], evaluations[-1]]))
    print(f"{time.time() - started:.0f} s; model and curves: {final}, all of it: python report.py {folder.path}")
    return result


def main(argv: list[str] | None = None) -> None:
    try:
        result = train(parse_config(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        sys.exit(f"error: {parallel.name_of_process()}{error}")
    except KeyboardInterrupt:  # outside the steps, or a second time inside one
        sys.exit(130)
    sys.exit(130 if result.get("interrupted") else 0)


if __name__ == "__main__":
    main()
