"""From the command line, the environment and YAML files to settings, and what is said of a mistake there; no torch.

A mistake is answered at once, in one line that starts with `error: `, with exit status 1, in all commands.
"""

import argparse
import dataclasses
import glob
import inspect
import logging
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import get_origin

import yaml

from harness.setting_help import Setting, help_text, settings_of
from harness.settings import CHANGEABLE_ON_RESUME, HERE, PRESET, Config
from harness.streams import steady
from tasks import TASKS, UsageError
from tasks.names import ask_the_hub_only_if_it_is_there, check_local, near

# what other projects call a setting: docs/names_elsewhere.md
ELSEWHERE = dict(
    learning_rate="lr", num_generations="group_size", generations_per_sample="group_size", beta="kl_coef",
    kl_coefficient="kl_coef", epsilon="clip_low and --clip_high", clip_ratio="clip_low and --clip_high",
    epsilon_low="clip_low", epsilon_high="clip_high", max_completion_length="max_completion_tokens",
    max_new_tokens="max_completion_tokens", max_gen_len="max_completion_tokens",
    max_response_tokens="max_completion_tokens", max_prompt_length="max_prompt_tokens", max_grad_norm="grad_clip",
    num_iterations="epochs", num_train_epochs="steps", max_steps="steps", num_steps="steps",
    batch_size="prompts_per_step", per_device_train_batch_size="tokens_per_microbatch",
    per_device_batch_size="tokens_per_microbatch", loss_type="loss_weight", scale_rewards="advantage",
    importance_sampling_level="ratio", output_dir="runs", mask_truncated_completions="mask_truncated",
    vllm_importance_sampling_clip_max="importance_cap", model_name="model", model_name_or_path="model",
    use_vllm="sampler vllm", trackers="report_to", tracker="report_to", wandb="report_to wandb", bf16="precision bf16",
    eval_interval="eval_steps", save_interval="save_steps", lr_scheduler_type="lr_schedule",
    dataset="task_args.dataset", eval_size="task_args.eval_size",
)  # fmt: skip

GPUS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")  # of NVIDIA, under WSL, of AMD
# What torchao and deepspeed say at each start, where they are installed: of kernels that nobody has asked for.
NOISE = (
    ("torchao", "Failed to load"),
    ("torchao.kernel.intmm", "Warning: Detected no triton"),
    ("torch.utils._pytree", "<enum"),
    ("DeepSpeed", "Setting accelerator to CPU"),
)


# ==== Mistakes ========================================================================================================


def no_such_setting(name: str, settings: dict[str, Setting], dashes: str = "--") -> UsageError:
    said = f"there is no setting {dashes}{name}"
    if settings.keys() >= {"kl_coef", "task_args"} and name.lower() in ELSEWHERE:
        return UsageError(f"{said}; here it is {dashes}{ELSEWHERE[name.lower()]}")
    hint = near(name.lower().replace("-", "_"), settings, dashes)
    if not hint and "task_args" in settings:
        hint = f"; if it is an argument of the task: {dashes}task_args.{name}"
    return UsageError(f"{said}{hint or '; --help lists them'}")


def flags_of(argv: list[str], settings: dict[str, Setting]) -> list[tuple[str, str]]:
    """(name, value) of each flag, `--name value` or `--name=value`; a flag that is true or false may stand alone.

    Raises:
        UsageError: a name that does not exist, a word that belongs to no flag, or a flag without a value.
    """
    found, words = [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(stray(word, settings))
        name, equals, value = word[2:].partition("=")
        setting = settings.get(name.partition(".")[0])
        if setting is None or ("." in name and get_origin(setting.type) is not dict):
            raise no_such_setting(name, settings)
        if not equals:
            alone = not words or words[0].startswith("--")
            if alone and setting.type is not bool:
                raise UsageError(f"--{name} needs a value, {setting.kind}")
            value = "true" if alone else words.pop(0)
        found.append((name, value))
    return found


def stray(word: str, settings: dict[str, Setting]) -> str:
    """What is said of a word that belongs to no flag."""
    if "config" in settings and word.endswith((".yaml", ".yml")):
        return f"{word} stands alone; did you mean --config {word}?"
    if word in ("train", "run", "eval"):
        return f"there is no command {word!r}: the flags alone say what to do"
    if word.lstrip("-") in settings:
        return f"{word} stands alone; did you mean --{word.lstrip('-')}?"
    return f"{word!r} stands alone: a setting is written --name value (--help lists them)"


@contextmanager
def errors_as_lines(*more: type[Exception]):
    """Ends the program with one line on what a person has to change (UsageError, and `more`); with none on Ctrl-C."""
    try:
        with steady():
            yield
    except (UsageError, *more) as error:
        process = f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        sys.exit(f"error: {process}{error}")
    except KeyboardInterrupt:  # before the first step, or pressed twice
        sys.exit(130)


def check_folder_of(file: str | None) -> None:
    """Raises UsageError if a file that is written at the end could then not be written."""
    if file and not Path(file).absolute().parent.is_dir():
        raise UsageError(f"{file} cannot be written: there is no folder {Path(file).parent}")


class ArgumentParser(argparse.ArgumentParser):
    """For commands with few arguments: its errors are like all others."""

    def error(self, message: str):
        raise UsageError(message)


# ==== Parsing =========================================================================================================


def parse(settings_class: type, argv: list[str], usage: str, about: str, files: list[Path] = (), env: str = ""):
    """An instance of the dataclass: flags beat the environment (`env`_<NAME>), which beats the files.

    Raises:
        UsageError: a setting that does not exist, or a value of the wrong kind.
    """
    import jsonargparse

    settings = settings_of(settings_class)
    if {"-h", "--help"} & set(argv):
        print(help_text(settings, usage, about))
        sys.exit(0)
    flags = flags_of(argv, settings)
    for setting in settings.values():
        if setting.default is dataclasses.MISSING and setting.name not in dict(flags):
            raise UsageError(f"--{setting.name} is needed: {setting.about}")
    parser = jsonargparse.ArgumentParser(
        default_config_files=[glob.escape(str(file)) for file in files],
        default_env=bool(env), env_prefix=env or True, exit_on_error=False,
    )  # fmt: skip
    parser.add_class_arguments(settings_class, as_group=False)
    try:
        parsed = parser.parse_args([f"--{name}={value}" for name, value in flags]).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UsageError(wrong_value(str(error), settings)) from error
    return settings_class(**{name: parsed[name] for name in settings})


def parse_settings(settings_class: type, doc: str, argv: list[str] | None = None):
    """An instance of the dataclass from the command line of a `python -m mathformer....`."""
    usage = f"python -m mathformer.{Path(inspect.getfile(settings_class)).stem} [--SETTING VALUE ...]"
    return parse(settings_class, sys.argv[1:] if argv is None else argv, usage, doc.splitlines()[0])


def wrong_value(said: str, settings: dict[str, Setting]) -> str:
    """The parser's complaint about a value's type in our words."""
    found = re.search(r'key "(\w+)[\w.]*".*?Got value: (.*?)\s*$', said, re.DOTALL)
    if not found or found[1] not in settings:
        return " ".join(said.split())
    setting, value = settings[found[1]], found[2]
    hint = near({"gpu": "cuda"}.get(value, value), setting.choices)
    return f"{setting.name} is {value!r}, it must be {setting.kind}{hint}"


def read_yaml(file: Path, settings: dict[str, Setting]) -> dict:
    """The settings of a file; a UsageError with file and line if it is no file of settings."""
    if file.is_dir() or not file.exists():
        beside = (path.stem for path in file.parent.glob(f"*{file.suffix}"))
        raise UsageError(f"there is no file {file}{near(file.stem, beside)}")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UsageError(f"{file}{where}: {why}; settings are lines `name: value`") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} is no file of settings, which are lines `name: value`")
    for name in found:
        if str(name).partition(".")[0] not in settings:
            raise UsageError(f"{file}: {no_such_setting(str(name), settings, '')}")
    return found


def parse_config(argv: list[str]) -> Config:
    """Command line over environment (GRPO_<SETTING>) over --config files (the later wins) over the defaults.

    Raises:
        UsageError: a file or a setting that does not exist, or a value that is not allowed.
    """
    settings = settings_of(Config)
    usage = "python grpo.py [--config FILE ...] [--SETTING VALUE ...]"
    about = (
        "Trains a language model with Group Relative Policy Optimization. With no --model, --task or --config, the "
        f"preset {PRESET.relative_to(HERE)} applies. Settings come from the command line, else from GRPO_<SETTING> in "
        "the environment, else from the --config files (YAML; several stack), else from the defaults."
    )
    if {"-h", "--help"} & set(argv):
        parse(Config, ["--help"], usage, about)
    if "--version" in argv:
        print(re.search(r'^version = "(.*)"', (HERE / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1])
        sys.exit(0)
    config_flag = Setting("config", str, [], "a YAML file of settings", "")
    flags = flags_of(argv, settings | {"config": config_flag})
    for name in os.environ:
        if name.startswith("GRPO_") and name.removeprefix("GRPO_").lower() not in settings:
            error = no_such_setting(name.removeprefix("GRPO_").lower(), settings, "")
            raise UsageError(f"the environment sets {name}, but {error}")
    given = {name: os.environ.get(f"GRPO_{name.upper()}", "") for name in ("resume", "model", "task")} | dict(flags)
    files = [Path(value) for name, value in flags if name == "config"]
    if given["resume"]:
        if files:
            raise UsageError("--resume uses the run's own settings: leave --config out")
        files = [run_of(Path(given["resume"])) / "config.yaml"]
        if not files[0].is_file():
            raise UsageError(f"{given['resume']} is no run's folder: there is no config.yaml in it")
    elif not (files or given["model"] or given["task"]):
        files = [PRESET]
    named = {}
    for file in files:
        named |= read_yaml(file, settings)
    if not given["resume"]:  # which needs the checkpoint, and no longer what it began with
        check_model_and_task(given["model"] or named.get("model"), given["task"] or named.get("task"), files)
    words = [f"--{name}={value}" for name, value in flags if name != "config"]
    said = dict(flags).get("trust_remote_code") or os.environ.get("GRPO_TRUST_REMOTE_CODE")
    if named.get("trust_remote_code") and not said:
        words.append("--trust_remote_code=false")
        print(f"{files[-1]} trusts a model's own code: that has to be said again, with --trust_remote_code")
    config = parse(Config, words, usage, about, files, "GRPO")
    check_can_be_written(Path(config.runs))
    same_run = CHANGEABLE_ON_RESUME - {"steps", "eval_steps"} | {"seed", "config"}
    if "about" not in given and {name for name, _ in flags} - same_run:
        config = dataclasses.replace(config, about="")  # what is said of a recipe need not be so of another
    if given["resume"]:
        check_resumed(Config(**named), config)
    return config


def check_arguments(argv: list[str]) -> None:
    """Ends the program if `parse_config` refuses the arguments; else says what takes the next seconds."""
    with errors_as_lines():
        config = parse_config(argv)
        if config.device == "cuda" and not any(Path(device).exists() for device in GPUS):
            raise UsageError("device is cuda, and this machine has no GPU for it: --device cpu tries it all the same")
        if not (config.resume or Path(config.model).exists() or (HERE / config.model).exists()):
            check_hub_has(config.model)
    for logger, begin in NOISE:
        logging.getLogger(logger).addFilter(lambda record, begin=begin: not record.getMessage().startswith(begin))
    if os.environ.get("RANK", "0") == "0":
        with steady():
            print(f"loading torch, and then {config.model} ...", flush=True)


def check_model_and_task(model: str, task: str, files: list[Path]) -> None:
    """Raises UsageError if one of them is missing, or looks like something local that is not there."""
    known = [name for name in TASKS if ":" not in name]
    if task and ":" not in task and task not in known:
        example = f"; the class is missing: {task}:Task" if task.endswith(".py") else near(task, known)
        raise UsageError(f"unknown task {task!r}{example or '; built in: ' + ', '.join(known)}")
    if task and (file := task.rpartition(":")[0]).endswith(".py") and not Path(file).is_file():
        raise UsageError(f"task {task!r}: there is no file {file}{near(file, map(str, Path().glob('*.py')))}")
    if model and not (HERE / model).is_dir():
        check_local(model, "model")
        if Path(model).exists() and not (Path(model) / "config.json").is_file():
            raise UsageError(f"model {model!r} is no model's folder: there is no config.json in it")
    if model and task:
        return
    if files and not (model or task):
        raise UsageError(
            f"{files[-1]} names no model and no task: it goes on top of a recipe, as in --config "
            f"{PRESET.relative_to(HERE)} --config {files[-1]}"
        )
    if model and model.rstrip("/").endswith("mathformer/pretrained"):
        raise UsageError("--task is needed beside --model: this model goes with --task arithmetic")
    if model:
        raise UsageError(
            f"--task is needed beside --model, as in --model {model} --task countdown; built in: {', '.join(known)}; "
            "your own: path/to/file.py:Class"
        )
    raise UsageError(f"--model is needed beside --task, as in --model Qwen/Qwen2.5-0.5B-Instruct --task {task}")


def check_hub_has(model: str) -> None:
    """Raises UsageError if a model of the Hub is not in the cache and the Hub cannot be reached."""
    from huggingface_hub import constants, try_to_load_from_cache

    ask_the_hub_only_if_it_is_there()
    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(model, "config.json"), str):
        raise UsageError(
            f"model {model!r} is no folder here and not in the cache, and the Hub cannot be reached (or HF_HUB_OFFLINE "
            f"is set): where there is a network, `hf download {model} --local-dir FOLDER`, then --model FOLDER"
        )


def check_can_be_written(folder: Path) -> None:
    """Raises UsageError if `folder` cannot be made or written into."""
    while not folder.exists() and folder != folder.parent:
        if folder.is_symlink():
            raise UsageError(f"the run's folder cannot be made: {folder} is a link to nothing")
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"the run's folder cannot be made: {folder} is a file")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"the run's folder cannot be made in {folder}: {error.strerror}") from error


def run_of(resumed: Path) -> Path:
    """The run's folder, of which one may also give a checkpoint."""
    is_checkpoint = re.fullmatch("checkpoint-[0-9]+", resumed.name) and not (resumed / "config.yaml").exists()
    return resumed.parent if is_checkpoint else resumed


def check_resumed(before: Config, config: Config) -> None:
    """Raises UsageError if a setting has changed that may not change on the way."""
    for f in dataclasses.fields(Config):
        was, now = getattr(before, f.name), getattr(config, f.name)
        is_fixed = f.name not in CHANGEABLE_ON_RESUME or (f.name == "steps" and config.lr_schedule != "constant")
        if was != now and is_fixed and f.name not in config.may_have_changed:
            why = f"what can change: {', '.join(sorted(CHANGEABLE_ON_RESUME - {'resume'}))}"
            if f.name == "steps":
                why = (
                    f"its learning rate falls ({config.lr_schedule}) over these steps: for more of them, start a run "
                    f"with --config {config.resume}/config.yaml --model {config.resume}/final"
                )
            raise UsageError(f"{f.name} was {was!r} in {config.resume} and cannot become {now!r} on the way; {why}")
