"""The settings of a run: what there is, and what is allowed. `command_line` says where the values come from; no torch.

`Config` has one field for each, with a sentence that `python grpo.py --help` shows under the comment above it.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin
from urllib.parse import urlsplit

from tasks import UsageError

HERE = Path(__file__).resolve().parents[1]  # the folder of grpo.py
MAX_LOGP_GAP = 0.05  # mean difference in log-prob of sampler and trainer: rounding is below 0.02, also in bf16
REFLECTION_WORDS = ["wait", "hmm", "let me (?:re)?check", "double[- ]check", "verify", "recheck", "try again"]
REFLECTION_WORDS += ["re-?evaluate"]
PRESET = HERE / "configs" / "arithmetic.yaml"  # what the plain command runs


class Sampling(NamedTuple):
    """How to sample: what vLLM calls SamplingParams. Temperature 0 takes the most likely token."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()  # strings that end a completion


class Sample(NamedTuple):
    """What a sampler returns for each completion. The ids end with the end-of-sequence token, if the model wrote it."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logps: list[float]  # of each completion token, under the distribution that was sampled from
    truncated: bool  # cut off at max_tokens
    age: int = 0  # steps since the weights that wrote it

    @property
    def length(self) -> int:
        return len(self.completion_ids)


@dataclass
class Config:
    """All settings. The defaults are safe for language models of 0.5B parameters and more."""

    # Model and task
    model: str = ""
    """Hugging Face model: a folder, or a name on the Hub"""
    task: str = ""
    """a built-in task (arithmetic, countdown, gsm8k, math, reasoning_gym), module:Class, or path/to/file.py:Class"""
    task_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the task, for example --task_args.max_depth 2"""
    system_prompt: str = ""
    """system message of each prompt, in the place of the task's own; for tasks that give chat messages"""
    chat_template: str = ""
    """file with a chat template (Jinja), in the place of the model's own"""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the chat template, for example --chat_template_args.enable_thinking false (Qwen3)"""
    few_shot: int = 0
    """worked examples of the task in front of each problem, for a model that does not know the form yet"""
    reward_seconds: float = 0.0
    """time limit of one call of the task's reward(), after which it is 0, for tasks that run code; 0 is no limit"""
    trust_remote_code: bool = False
    """run the Python code that a model of the Hub brings along: only if you have read it"""
    seed: int = 0
    """seed of everything random; on a CPU the same seed gives the same run"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to run; auto takes a GPU if there is one"""
    cudnn_attention: bool = False
    """let torch take cuDNN's attention on CUDA: it plans anew for each new length of rows (docs/gpu.md)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """arithmetic of the forward and backward pass (of the weights: `optimizer`); auto is bf16 or fp16 on CUDA"""
    about: str = ""
    """a sentence about this recipe, printed at the start"""

    # Sampling
    sampler: Literal["auto", "vllm", "torch", "server"] = "auto"
    """what writes the completions: vllm, fast, torch, anywhere, or a server; auto is vllm on a CUDA GPU if installed"""
    server: str = ""
    """sample with the vLLM servers at these addresses, with commas between several (docs/server.md)"""
    serve_on: str = ""
    """start vLLM servers for this run, on these GPUs of this machine, for example 2,3, or on the cpu"""
    server_minutes: float = 5.0
    """how long to keep trying a server that is gone, before the run ends"""
    weights_folder: str = ""
    """folder that trainer and servers see: weights then go in files, and not by NCCL, and a server may restart"""
    staleness: int = 0
    """train on answers up to this many steps old, which were written while earlier steps trained (docs/server.md)"""
    kv_cache_gb: float = 0.0
    """memory for vLLM's key-value cache; 0 is what a step's completions need, at most half of what is free"""
    vllm_sleep: bool = False
    """give vLLM's memory back while the policy is trained: for small cards"""
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
    stop: list[str] = field(default_factory=list)
    """strings that end a completion, besides its end-of-sequence token, for example '["</answer>"]' (docs/models.md)"""
    sample_rows: int = 256
    """completions that are sampled at the same time, but at least one whole group"""

    # The loss
    advantage: Literal["grpo", "dr_grpo", "rloo", "batch", "maxrl"] = "grpo"
    """how the rewards of a group become advantages (group_advantages)"""
    loss_weight: Literal["token", "sequence", "constant"] = "token"
    """how tokens are averaged: token (DAPO), sequence (GRPO), constant (Dr. GRPO) (token_weights)"""
    ratio: Literal["token", "sequence"] = "token"
    """new over old probability of each token (GRPO), or the geometric mean of a completion's (GSPO) (policy_loss)"""
    surrogate: Literal["clip", "cispo"] = "clip"
    """what is done to large ratios: clip removes their tokens' gradient (PPO), cispo bounds it (policy_loss)"""
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 + clip_high (DAPO: 0.28)"""
    kl_coef: float = 0.0
    """weight of the KL penalty toward the model as it was at the start; 0 needs no second model"""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """estimator of that KL in the loss, and of the metric (kl_estimate)"""
    kl_in: Literal["loss", "reward"] = "loss"
    """where the penalty goes: into the loss of each token, or, as k1 summed over the tokens, off the reward"""
    kl_target: float = 0.0
    """let kl_coef, then only its first value, rise and fall so that kl_ref comes to this (adapted_kl_coef); 0 is off"""
    entropy_coef: float = 0.0
    """weight of an entropy bonus, which keeps the policy from becoming certain too early"""
    old_logps: Literal["sampler", "trainer"] = "sampler"
    """whose log-probs the ratio is taken against; with top_k or top_p on it is always the trainer"""
    epochs: int = 1
    """passes over the completions of a step"""
    minibatches: int = 1
    """optimizer steps a pass; must divide prompts_per_step * group_size"""
    importance_cap: float = 0.0
    """weight tokens by trainer over sampler probability, at most this, with old_logps trainer (batch_loss); 0 is off"""
    dead_groups: Literal["auto", "keep", "drop", "resample"] = "auto"
    """groups of equal rewards: keep, drop (no backward pass), or replace by fresh ones; auto drops where it is exact"""
    resample_rounds: int = 0
    """with dead_groups resample: how often at most a step draws fresh prompts in the place of dead groups"""
    mask_truncated: bool = False
    """leave completions that were cut off out of the loss"""
    overlong_share: float = 0.0
    """take up to 1 off the reward along this last share of max_completion_tokens (overlong_penalty); 0 is off"""
    offload_reference: bool = False
    """keep the reference model on the CPU while it is not needed"""

    # Optimizer
    lora_rank: int = 0
    """train adapters of this rank beside the model's frozen weights (LoRA, by PEFT); 0 trains the weights themselves"""
    lora_alpha: float = 32.0
    """what an adapter computes is multiplied by this, over lora_rank: one learning rate then does for all ranks"""
    lora_targets: str = "all-linear"
    """layers that get an adapter: all-linear, names with commas between them (q_proj,v_proj), or a pattern of names"""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_offload"] = "adamw"
    """adamw, 16 bytes a parameter; adamw_8bit, 6, in bf16 (torchao); adamw_offload, 4 on the card (make_optimizer)"""
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
    grad_clip: float = 1.0
    """largest norm of the gradient; a longer one is scaled down to it"""
    tokens_per_microbatch: int | Literal["auto"] = 8192
    """tokens, padding included, that go through the model at once; auto is as many as memory allows, by arithmetic"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: slower, with less memory"""

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
    keep_best: bool = True
    """keep the checkpoint of the best evaluation too: the one with most sampled answers right"""
    print_groups: int = 50
    """show two whole groups of completions every so many steps; 0 shows none"""
    reflection_words: list[str] = field(default_factory=lambda: list(REFLECTION_WORDS))
    """regular expressions of whole words: completions with one of them count as `reflections`"""
    report_to: str = ""
    """trackers besides the run's folder: tensorboard, wandb, trackio, with commas between several"""
    project: str = ""
    """project in the trackers; else WANDB_PROJECT or TRACKIO_PROJECT from the environment, else grpo"""
    run_name: str = ""
    """name of the run in the trackers; else WANDB_NAME from the environment, else that of the run's folder"""
    max_minutes: float = 0.0
    """end in this time: with a checkpoint, an evaluation and final/; 0 is no limit"""
    resume: str = ""
    """folder of a run to go on with, its settings are used; or one of its checkpoints, for a new run from there"""
    allow_changed: str = ""
    """with resume: settings that may be other ones than those it was trained with so far, with commas"""

    def __post_init__(self):
        if not self.model or not self.task:
            raise UsageError("both --model and --task are needed (or neither: then the arithmetic preset runs)")
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            if get_origin(f.type) is Literal and value not in choices:
                raise UsageError(f"{f.name} is {value!r}, it must be one of {', '.join(choices)}")
            if f.name in LOWEST and value != "auto" and not LOWEST[f.name] <= value < math.inf:
                why = " (with one completion there is nothing to compare it with)" if f.name == "group_size" else ""
                raise UsageError(f"{f.name} is {value}, it must be {LOWEST[f.name]} or more{why}")
            if f.name in ABOVE_0 and not 0 < value < math.inf:
                raise UsageError(f"{f.name} is {value}, it must be greater than 0")
        if unknown := sorted(self.may_have_changed - {f.name for f in dataclasses.fields(self)}):
            raise UsageError(f"allow_changed has {', '.join(unknown)}, and there is no such setting")
        for word in self.reflection_words:
            try:
                re.compile(word)
            except re.error as error:
                raise UsageError(f"reflection_words has {word!r}, which is no regular expression: {error}") from error
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop is {self.stop!r}: each of its strings must have a character or more")
        for address in self.servers or [self.server] * bool(self.server):
            if not is_address(address):
                raise UsageError(f"server has {address!r}, which is no address like http://127.0.0.1:8000")
        contradictions = [
            (self.kl_target and not self.kl_coef,
             "kl_target changes kl_coef by factors, so kl_coef must start above 0: try 0.05"),
            (self.kl_in == "reward" and not self.kl_coef,
             "kl_in is reward, but kl_coef is 0, so there is no penalty: try --kl_coef 0.05"),
            (self.kl_in == "reward" and self.advantage in ("grpo", "batch"),
             f"advantage {self.advantage} divides by a std, which would blow the smallest KL penalty up to advantages "
             "of size 1 where a group's rewards are equal: with kl_in reward take rloo or dr_grpo"),
            (self.importance_cap and not self.uses_trainer_logps,
             "importance_cap weights by the trainer's old log-probs over the sampler's, and needs --old_logps trainer: "
             "with sampler, the ratio has that factor in it already"),
            (self.dead_groups == "resample" and not self.resample_rounds,
             "dead_groups is resample, without a bound: set --resample_rounds, for example 3"),
            (self.resample_rounds and self.dead_groups != "resample",
             "resample_rounds is for --dead_groups resample"),
            (self.top_p > 1, f"top_p is {self.top_p}, it must be at most 1"),
            (len(self.servers) > self.prompts_per_step,
             f"{len(self.servers)} servers are to share {self.prompts_per_step} prompts_per_step"),
            (len(set(self.servers)) < len(self.servers), f"server has an address twice: {self.server}"),
            (self.server and self.serve_on, "server names servers that there are, serve_on starts new ones: take one"),
            (self.samples_with_servers and self.sampler not in ("auto", "server"),
             f"sampler is {self.sampler}, which is no server: leave server and serve_on out, or the sampler"),
            (self.sampler == "server" and not self.samples_with_servers,
             "sampler is server: which one? --server http://127.0.0.1:8000, or --serve_on with a free GPU (or cpu)"),
            (self.staleness and self.vllm_sleep,
             "with staleness, vLLM must keep the older weights while the policy is trained: without vllm_sleep"),
            (self.staleness and not self.samples_all_tokens,
             "with staleness, the ratio is taken against the sampler's log-probs, which top_k and top_p change: leave "
             "them off"),
            (self.optimizer != "adamw" and (self.lora_rank or self.precision == "fp16"),
             f"optimizer {self.optimizer} keeps all weights in bf16: lora_rank and precision fp16 go with adamw"),
            (not self.lora_rank and (self.lora_alpha, self.lora_targets) != (32.0, "all-linear"),
             "lora_alpha and lora_targets are settings of LoRA, which is off: set --lora_rank, for example 16"),
            (self.overlong_share >= 1, f"overlong_share is {self.overlong_share}, it must be below 1; DAPO has 0.2"),
            (self.advantage == "maxrl" and (self.overlong_share or self.kl_in == "reward"),
             "advantage maxrl is for rewards of 0 and more, which overlong_share and kl_in reward can make negative"),
        ]  # fmt: skip
        for is_so, message in contradictions:
            if is_so:
                raise UsageError(message)
        if (rows := self.prompts_per_step * self.group_size) % self.minibatches:
            raise UsageError(f"minibatches is {self.minibatches}, it must divide the {rows} completions of a step")

    @property
    def may_have_changed(self) -> set[str]:
        return {name.strip() for name in self.allow_changed.split(",") if name.strip()}

    @property
    def samples_with_servers(self) -> bool:
        return bool(self.server or self.serve_on)

    @property
    def servers(self) -> list[str]:
        """The addresses in `server`."""
        return [address.strip().rstrip("/") for address in self.server.split(",") if address.strip()]

    @property
    def samples_all_tokens(self) -> bool:
        """Whether the sampler draws from the policy itself, and not from its most likely tokens only."""
        return self.top_k == 0 and self.top_p == 1

    @property
    def uses_trainer_logps(self) -> bool:
        return self.old_logps == "trainer" or not self.samples_all_tokens

    @property
    def drops_dead_groups(self) -> bool:
        return not self.loss_is_regularised if self.dead_groups == "auto" else self.dead_groups != "keep"

    @property
    def loss_is_regularised(self) -> bool:
        """Whether the loss has a KL penalty or an entropy bonus, which have a gradient where the advantage is 0 too."""
        return self.entropy_coef != 0 or (self.kl_coef != 0 and self.kl_in == "loss")

    @property
    def sampling(self) -> "Sampling":
        stop = tuple(self.stop)
        return Sampling(self.max_completion_tokens, self.temperature, self.top_p, self.top_k, stop)

    def step_seed(self, step: int, attempt: int = 0) -> int:
        """What the completions of a step are drawn with; `attempt` counts the rounds in which groups were replaced."""
        return self.seed * 1_000_003 + step + 500_009 * attempt

    @property
    def most_likely(self) -> "Sampling":
        """Greedily, as an evaluation does besides."""
        return Sampling(self.max_completion_tokens, temperature=0.0, stop=tuple(self.stop))


def is_address(text: str) -> bool:
    try:
        return bool(re.fullmatch(r"https?://[^/\s]+", text)) and urlsplit(text).port is not None
    except ValueError:  # a port that is none, brackets that do not close
        return False


LOWEST = dict(group_size=2, prompts_per_step=1, max_prompt_tokens=1, max_completion_tokens=1, sample_rows=1, epochs=1)
LOWEST |= dict(minibatches=1, tokens_per_microbatch=1, eval_samples=1, save_steps=1, keep_last=1, steps=0, top_k=0)
LOWEST |= dict(kl_coef=0, kl_target=0, clip_low=0, clip_high=0, warmup_steps=0, weight_decay=0, eval_steps=0)
LOWEST |= dict(print_groups=0, kv_cache_gb=0, importance_cap=0, resample_rounds=0, overlong_share=0, reward_seconds=0)
LOWEST |= dict(max_minutes=0, few_shot=0, staleness=0, entropy_coef=0, seed=0, lora_rank=0)
ABOVE_0 = {"temperature", "top_p", "lr", "grad_clip", "server_minutes", "lora_alpha"}
CHANGEABLE_ON_RESUME = {"steps", "eval_steps", "save_steps", "keep_last", "print_groups", "about", "runs", "resume"}
CHANGEABLE_ON_RESUME |= {"keep_best", "max_minutes", "allow_changed", "trust_remote_code"}
CHANGEABLE_ON_RESUME |= {"reflection_words", "report_to", "project", "run_name"}
# what memory needs
CHANGEABLE_ON_RESUME |= {"tokens_per_microbatch", "gradient_checkpointing", "offload_reference", "vllm_sleep"}
CHANGEABLE_ON_RESUME |= {"reward_seconds", "kv_cache_gb", "cudnn_attention"}
CHANGEABLE_ON_RESUME |= {"server", "serve_on", "server_minutes", "weights_folder"}  # where the servers are
