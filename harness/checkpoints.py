"""A checkpoint's state.json: what is written with the weights, and what is checked before a run goes on from them."""

import itertools
import json
import shutil
import zlib
from contextlib import suppress
from pathlib import Path, PurePath

from harness.files import FORMAT, check_format, checksum
from harness.metrics import is_finite
from harness.settings import CHANGEABLE_ON_RESUME, Config, UsageError

LOGS = ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl")  # these only ever grow


def fixed_settings(config: Config) -> dict:
    """Those that a run keeps throughout, as JSON has them."""
    settings = {name: value for name, value in vars(config).items() if name not in CHANGEABLE_ON_RESUME}
    if config.lr_schedule != "constant":
        settings["steps"] = config.steps
    return json.loads(json.dumps(settings, default=str))


def write_state(folder: Path, run: Path, state: dict) -> None:
    """With the sizes of the run's logs, and checksums of those that are small."""
    logs = logs_of(run)
    state |= {"log_sizes": {log.name: log.stat().st_size for log in logs}}
    state |= {"log_checksums": {log.name: checksum(log) for log in logs if log.name != "rollouts.jsonl"}}
    state = {"format": FORMAT, **json.loads(json.dumps(state))}
    state["state_checksum"] = own_checksum(state)
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def logs_of(run: Path) -> list[Path]:
    return [run / name for name in LOGS if (run / name).exists()]


def own_checksum(state: dict) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def read_state(checkpoint: Path) -> dict:
    """The contents of state.json, each of the kind that it must be.

    Raises:
        ValueError: something is not; says what. OSError: there is no such file.
    """
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError("state.json holds no names")
    check_format(state.get("format", 0), checkpoint)
    own = state.pop("state_checksum", None)
    if (own is not None or "format" in state) and own != own_checksum(state):
        raise ValueError("state.json has changed")
    sizes, sums, kl_coef = state.get("log_sizes"), state.get("checksums"), state.get("kl_coef", 0.0)
    wanted = [
        (state.get("step") == number_of(checkpoint), f"step is {state.get('step')!r}"),
        (is_counts(sizes) and set(sizes) <= set(LOGS), f"log_sizes is {sizes!r}"),
        (is_counts(state.get("log_checksums", {})), "log_checksums are no numbers"),
        (is_counts(sums) and all(map(is_inside, sums)), "checksums are not of files in it"),
        (is_counts({"tokens": state.get("tokens", 0)}), f"tokens is {state.get('tokens')!r}"),
        (type(kl_coef) in (int, float) and is_finite(kl_coef), f"kl_coef is {kl_coef!r}"),
    ]
    for holds, what in wanted:
        if not holds:
            raise ValueError(f"in state.json, {what}")
    return state


def is_counts(found) -> bool:
    return isinstance(found, dict) and all(type(n) is int and n >= 0 for n in found.values())


def is_inside(name: str) -> bool:
    return not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


def damage(checkpoint: Path, run: Path) -> str:
    """What is wrong with it, if anything is. Rollouts that are lost are none: weights do not need them."""
    try:
        state = read_state(checkpoint)
        for name, value in state["checksums"].items():
            if checksum(checkpoint / name) != value:
                return f"{name} has changed"
        for name, size in state["log_sizes"].items():
            if name != "rollouts.jsonl" and (run / name).stat().st_size < size:
                return f"{name} is shorter than it was then"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def changed_settings(checkpoint: Path, config: Config) -> dict[str, list]:
    """Settings that are not what the checkpoint was trained with, as [then, now].

    Raises:
        UsageError: one of them is not in `allow_changed`.
    """
    then, now = read_state(checkpoint).get("settings"), fixed_settings(config)
    if then is None:  # as in folders of earlier versions
        return {}
    changed = {name: [then[name], now[name]] for name in then if name in now and then[name] != now[name]}
    for name, (was, is_now) in changed.items():
        if name not in config.may_have_changed:
            raise UsageError(
                f"{name} is {is_now!r}, and {checkpoint} was trained with {was!r}: put it back in config.yaml, or go "
                f"on with the change: --allow_changed {name}"
            )
    return changed


def branch(checkpoint: Path) -> Path:
    """The folder of a new run that begins with the steps of another one up to this checkpoint.

    Raises:
        UsageError: the checkpoint is damaged.
    """
    run = checkpoint.parent
    if found := damage(checkpoint, run):
        raise UsageError(f"{checkpoint} is damaged: {found}")
    step = number_of(checkpoint)
    path = make_folder(run.parent, f"{run.name}-from{step}")
    shutil.copytree(checkpoint, path / checkpoint.name)
    evaluations = [file for file in run.glob("eval-*.jsonl") if int(file.stem.removeprefix("eval-")) <= step]
    for file in [run / "config.yaml", run / "run.json", *evaluations, *logs_of(run)]:  # resuming cuts the logs
        if file.exists():
            shutil.copy(file, path)
    print(f"a new run begins with the first {step} steps of {run}, which stays as it is")
    return path


def number_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def make_folder(where: Path, name: str) -> Path:
    """`name`, or `name-2`, ...: one that was not there."""
    where.mkdir(parents=True, exist_ok=True)
    for i in itertools.count(1):
        path = where / (name if i == 1 else f"{name}-{i}")
        with suppress(FileExistsError):
            path.mkdir()
            return path
