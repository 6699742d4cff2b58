"""Sends the metrics of a run to TensorBoard, Weights & Biases or trackio, through accelerate's trackers.

None by default: everything is in the run's folder anyway, and `python -m view report` shows it. `--report_to
tensorboard,wandb` names several. Their own environment variables hold (WANDB_PROJECT, WANDB_NAME, WANDB_MODE=offline,
TRACKIO_SPACE_ID, ...).
"""

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from harness.files import may_fail
from harness.messages import reason_of
from harness.settings import Config, UsageError

NAMES = ("tensorboard", "wandb", "trackio")
COLUMNS = ("step", "prompt", "completion", "reward", "advantage", "length", "truncated")


def chosen(report_to: str) -> list[str]:
    """The names in `report_to`; a UsageError if one is unknown or not installed. Checked before any long work."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise UsageError(f"report_to has {name!r}: choose of {', '.join(NAMES)}, with commas between several")
        if not find_spec(name):
            raise UsageError(f"report_to has {name}, which is not installed: pip install {name}")
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        if not wandb.api.api_key:
            raise UsageError("report_to has wandb, and nobody is logged in: wandb login, or set WANDB_MODE=offline")
    return names


class Trackers:
    """Those that `config.report_to` names. `step` is the one that the run goes on from, 0 in a new run."""

    def __init__(self, config: Config, folder: Path, step: int):
        project = config.project or os.environ.get("WANDB_PROJECT") or os.environ.get("TRACKIO_PROJECT") or "grpo"
        name = config.run_name or os.environ.get("WANDB_NAME") or folder.name
        kwargs: dict[str, dict[str, Any]] = {
            # what is done again after a resume takes the place of what was there
            "tensorboard": dict(logging_dir=str(folder), purge_step=step + 1 if step else None),
            # a resumed run goes on in the same run of theirs
            "wandb": dict(name=name, id=folder.name, resume="allow", dir=str(folder)),
            "trackio": dict(name=name, resume="allow", embed=False),
        }
        self.trackers = []
        for kind in chosen(config.report_to):
            tracker = LOGGER_TYPE_TO_CLASS[kind](kind if kind == "tensorboard" else project, **kwargs[kind])
            try:
                tracker.start()
            except Exception as error:  # of many kinds: no network, no rights, a full disk
                raise UsageError(
                    f"{kind} does not start: {reason_of(error)}; leave it out of report_to, or repair it"
                ) from error
            if kind != "tensorboard":  # which would make a second run of it
                tracker.store_init_configuration(dataclasses.asdict(config))
            self.trackers.append(tracker)

    def log(self, row: dict, prefix: str = "") -> None:
        """The numbers of a row of metrics.jsonl, or, with a prefix, of eval.jsonl, at its step."""
        flat = dict(row)
        flat |= {f"pass_at_{k}": value for k, value in flat.pop("pass_at_k", {}).items()}
        values = {prefix + key: value for key, value in flat.items() if value is not None and key != "step"}
        for tracker in self.trackers:
            with may_fail(f"a row in {tracker.name}"):
                tracker.log(values, step=row["step"])

    def log_episodes(self, rows: list[dict]) -> None:
        """Rows of rollouts.jsonl as a table, in those trackers that have tables."""
        data = [[row[column] for column in COLUMNS] for row in rows]
        for tracker in self.trackers:
            with may_fail(f"the table of {tracker.name}"):
                self.log_table(tracker, data, rows[0]["step"])

    def log_table(self, tracker, data: list[list], step: int) -> None:
        if tracker.name == "wandb":
            tracker.log_table("episodes", list(COLUMNS), data, step=step)
        elif tracker.name == "trackio":
            import pandas
            import trackio

            table = trackio.Table(dataframe=pandas.DataFrame(data, columns=COLUMNS))
            tracker.log({"episodes": table}, step=step)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []
