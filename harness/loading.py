"""From names to things: the task, the model with its tokenizer, the device; each checked before any long work."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from torch import nn
from transformers.utils.chat_template_utils import _compile_jinja_template

from harness import lora, memory, parallel
from harness.checkpoints import changed_settings
from harness.devices import make_accelerator
from harness.files import local_name
from harness.messages import stage
from harness.model_checks import check_positions, switch_off_noise
from harness.prompts import BLANK_LINE, Problem, evaluation_problems, prompt_of
from harness.run_folder import RunFolder
from harness.settings import Config, UsageError
from tasks import load_task
from tasks.names import ask_the_hub_only_if_it_is_there

GIVEN_TO_TEMPLATES = {"messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"}
GIVEN_TO_TEMPLATES |= {"raise_exception", "strftime_now", "continue_final_message"}
SINGLE_THREADED = 250_000  # models with fewer parameters run on one thread


@dataclass
class Run:
    """The parts of a run: first those that `load` gives, then those that `grpo.setup` makes from them."""

    config: Config  # with `auto` replaced by what was found
    accelerator: Accelerator
    task: Any
    source: str  # the folder or name that the model comes from
    model: nn.Module
    tokenizer: Any
    problems: list[Problem]  # of the evaluation
    eos_ids: list[int]
    sampler_name: str  # vllm or torch
    folder: RunFolder | None  # at first only in a run that goes on
    checkpoint: Path | None  # from which it goes on

    policy: nn.Module | None = None  # grpo.Policy around the model, in whatever accelerate wraps it in
    optimizer: torch.optim.Optimizer | None = None
    sampler: Any = None
    reference: nn.Module | None = None  # grpo.Policy around the model of the start, where the KL needs it
    state: dict = field(default_factory=dict)  # step, tokens, kl_coef: from where a resumed run goes on


def load(config: Config) -> Run:
    """All that the settings name, checked before any long work and before a folder is made.

    Raises:
        UsageError: something is not there, or does not go with the rest.
    """
    torch.manual_seed(config.seed)  # for whatever draws without a generator of its own, such as someone's task
    task = load_task(config.task, config.task_args, config.reward_seconds)
    accelerator = make_accelerator(config)
    folder = RunFolder.resumed(config.resume, accelerator.is_main_process) if config.resume else None
    checkpoint = folder.newest_whole(config.steps) if folder else None
    if checkpoint:
        folder.changed = changed_settings(checkpoint, config)
        lora.check_checkpoint(checkpoint, config)
    # the reference is the model of the beginning, and so is what adapters stand beside
    if folder and (config.kl_coef > 0 or config.lora_rank or not checkpoint):
        with readable_errors(config.model):
            folder.check_base(config.model)
    name = str(checkpoint) if checkpoint and not config.lora_rank else config.model
    model_config = load_model_config(name, config.trust_remote_code)
    check_window(model_config, config)
    check_positions(model_config, config)
    sampler = choose_sampler(config, model_config, accelerator.device)
    if stop := getattr(task, "stop", None):  # the task's own, where the settings name none
        config = replace(config, stop=config.stop or list(stop))
    config = memory.fitted(model_config, config, accelerator, sampler == "vllm")
    with stage("loading the model"):
        model, tokenizer = load_model(name, config.gradient_checkpointing, config.trust_remote_code, checkpoint)
    limit_threads(model.eval())
    use_template(tokenizer, config, of_checkpoint=bool(checkpoint))
    problems, eos_ids = evaluation_problems(task, tokenizer, config), find_eos(model, tokenizer)
    if config.few_shot and not config.stop and isinstance(prompt_of(task, problems[0].example), str):
        config = replace(config, stop=[BLANK_LINE])
    source = local_name(name)
    return Run(config, accelerator, task, source, model, tokenizer, problems, eos_ids, sampler, folder, checkpoint)


@contextmanager
def readable_errors(name: str):
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # of any kind: files, networks, and code that reads what anyone wrote
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".:")
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"model {name!r} brings Python code of its own: read it, and if you trust it --trust_remote_code true"
            ) from error
        raise UsageError(
            f"model {name!r} cannot be loaded: {reason}. Give a name on the Hub, or a folder: `hf download NAME "
            "--local-dir FOLDER` makes one where there is a network."
        ) from error


def load_model_config(name: str, trust_remote_code: bool = False):
    """The architecture and its sizes, without weights; from a folder or the Hub."""
    name = local_name(name)
    if not Path(name).exists():
        print(f"there is no folder {name} here: looking for it on the Hugging Face Hub")
        ask_the_hub_only_if_it_is_there()
    config_file = Path(name) / "config.json"
    with readable_errors(name):
        said = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        if said.get("model_type") == "mathformer":
            import_module("mathformer")  # registers the architecture
        if name.endswith(".gguf") or (not config_file.exists() and any(Path(name).glob("*.gguf"))):
            raise UsageError(f"model {name!r} is in GGUF, for inference alone: give the model that it was made from")
        lora.refuse_adapter(name)
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_kind(name, config)
    return config


def check_kind(name: str, config) -> None:
    """Raises UsageError for a model whose weights cannot be trained, or that is no causal language model."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise UsageError(
            f"model {name!r} is quantised ({method}), and its weights cannot be trained: "
            "give the model that it was made from"
        )
    ours = type(config).__module__.startswith("transformers.")  # and not code that came with the model
    unknown = ours and type(config) not in transformers.AutoModelForCausalLM._model_mapping
    if unknown or config.is_encoder_decoder:
        raise UsageError(f"model {name!r} is a {config.model_type}: here, causal language models are trained")


def load_model(
    name: str, gradient_checkpointing: bool = False, trust_remote_code: bool = False, checkpoint: Path | None = None
):
    """The causal language model in float32, without dropout, and its tokenizer; from a folder or the Hub.

    A checkpoint has a tokenizer of its own, also where it has not the whole model but an adapter.
    """
    transformers.utils.logging.disable_progress_bar()  # of loading and saving: they would break up our own
    config, name = load_model_config(name, trust_remote_code), local_name(name)
    with readable_errors(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint or name, trust_remote_code=trust_remote_code)
        # Float32 weights: at a learning rate of 1e-6 most updates are smaller than bf16 can represent.
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        misfits = [f"{key} is missing" for key in sorted(report["missing_keys"])]
        misfits += [f"{key} is {list(a)}, not {list(b)}" for key, a, b in sorted(report["mismatched_keys"])]
        if misfits:  # these would be random numbers
            raise ValueError(f"its weights do not fit its config.json: {misfits[0]}, and {len(misfits) - 1} more")
    switch_off_noise(model)
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UsageError(f"gradient_checkpointing is not there for {type(model).__name__}: leave it off")
        model.gradient_checkpointing_enable()
    return model, tokenizer


def reference_policy(run: Run, make_policy) -> nn.Module:
    """The policy as it was at the start, for a KL penalty: a second model, but with LoRA the policy without adapters.

    Args:
        make_policy: `grpo.Policy`.
    """
    config = run.config
    if config.lora_rank:
        return lora.WithoutAdapters(run.policy)
    start, _ = load_model(config.model, trust_remote_code=config.trust_remote_code)
    reference = make_policy(start, config.temperature).requires_grad_(False)
    parallel.cast(reference.parameters(), next(run.policy.parameters()).dtype)
    return reference.to("cpu" if config.offload_reference else run.accelerator.device)


def limit_threads(model: nn.Module) -> None:
    """One thread for a tiny model on a CPU, unless OMP_NUM_THREADS says otherwise.

    It gains little from a second one, and threads of two such programs on one machine wait for each other: two default
    runs at a time took twenty times as long.
    """
    if sum(p.numel() for p in model.parameters()) < SINGLE_THREADED and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_window(model_config, config: Config) -> None:
    """Raises UsageError if prompt and completion together can be longer than the model can read."""
    window = getattr(model_config, "max_position_embeddings", None)
    if window and config.max_prompt_tokens + config.max_completion_tokens > window:
        raise UsageError(
            f"max_prompt_tokens {config.max_prompt_tokens} + max_completion_tokens {config.max_completion_tokens} "
            f"is more than the model's {window} positions: lower one of them"
        )


def use_template(tokenizer, config: Config, of_checkpoint: bool) -> None:
    """Gives the tokenizer the chat template of the settings; a checkpoint's tokenizer has it already.

    Raises:
        UsageError: there is no such file, or the template does not know an argument of `chat_template_args`.
    """
    if config.chat_template and not of_checkpoint:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"chat_template {config.chat_template} cannot be read: {error}") from error
    if not config.chat_template_args:
        return
    if not tokenizer.chat_template:
        raise UsageError("chat_template_args is given, but this model's tokenizer has no chat template")
    try:
        environment = _compile_jinja_template(tokenizer.chat_template).environment
        known = find_undeclared_variables(environment.parse(tokenizer.chat_template)) - GIVEN_TO_TEMPLATES
    except TemplateError as error:
        raise UsageError(f"the model's chat template cannot be used: {error}") from error
    if unknown := sorted(config.chat_template_args.keys() - known):
        raise UsageError(
            f"chat_template_args has {', '.join(unknown)}, which the model's chat template does not know; "
            f"it knows {', '.join(sorted(known)) or 'none'}"
        )


def find_eos(model, tokenizer) -> list[int]:
    """Every token that ends an answer: chat models often have more than one."""
    named = {tokenizer.eos_token_id}
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id):  # vLLM stops at the latter's too
        named |= set(ids if isinstance(ids, list) else [ids])
    named -= {None}
    # the table of embeddings is often larger than the vocabulary: what is padding there is never written
    known = min(model.get_input_embeddings().num_embeddings, len(tokenizer))
    eos = {token for token in named if token < known}
    turn_end = end_of_turn(tokenizer)
    if turn_end is not None and turn_end < known and turn_end not in eos:
        text = tokenizer.convert_ids_to_tokens(turn_end)
        print(f"{text} ends a turn in this model's chat template, so it ends an answer too")
        eos.add(turn_end)
    if not eos:
        raise UsageError(
            "neither the tokenizer nor the generation config of this model names an end-of-sequence token that the "
            "model has: no answer would ever end. Set eos_token_id in its generation_config.json"
        )
    return sorted(eos)


def end_of_turn(tokenizer) -> int | None:
    """The special token with which the chat template ends an answer, if there is one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
    except Exception:  # a template that takes no such turns names no end of them; a task that needs it is refused
        return None
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None


def check_served(model_config) -> None:
    """Raises UsageError for a model that is not one of vLLM's."""
    if model_config.model_type == "mathformer":
        raise UsageError("the small model (mathformer) is not served: take the torch sampler, or another model")


def choose_sampler(config: Config, model_config, device: torch.device) -> str:
    """`vllm`, `torch` or `server`, as the settings say; a UsageError if it is asked for and cannot run here."""
    if config.samples_with_servers:
        check_served(model_config)
        return "server"
    if config.sampler == "auto":
        # On a CPU torch is as fast or faster up to 121 M parameters (benchmarks/results/samplers.md), without a sync.
        # The small model may have experts, which vLLM's BLOOM has not.
        can = device.type == "cuda" and find_spec("vllm") and model_config.model_type != "mathformer"
        return "vllm" if can else "torch"
    if config.sampler == "vllm":
        if not find_spec("vllm"):
            raise UsageError(
                "sampler is vllm, which is not installed: pip install -r requirements-gpu.txt, or take --sampler torch"
            )
        if device.type == "mps" or (device.type == "cpu" and torch.cuda.is_available()):
            raise UsageError(f"sampler is vllm, which does not run on {device.type} here: --sampler torch does")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if config.vllm_sleep and device.type != "cuda":
            raise UsageError("vllm_sleep is there on a GPU only")
        platform = import_module("vllm.platforms").current_platform
        if not platform.is_cpu() and device.type == "cpu":
            raise UsageError("sampler is vllm, and this build of vLLM needs a GPU, but there is none: --sampler torch")
    return config.sampler
