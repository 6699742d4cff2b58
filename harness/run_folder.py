"""What a run leaves behind: the files of its folder, each written whole or not at all, and how to go on from them."""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness import parallel
from harness.files import checksum, checksums, checksums_of_model, sync_to_disk
from harness.model_card import model_card
from harness.optimizers import load_moments, packed_moments
from harness.settings import CHANGEABLE_ON_RESUME, Config, UsageError
from harness.trackers import Trackers


class RunFolder:
    """What a run leaves behind: config.yaml, metrics, rollouts, evaluations, checkpoints, curves.png.

    Of several processes only the main one writes; what needs all of them, such as gathering weights, all of them call.
    """

    LOGS = ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl")  # these only ever grow

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes, self.engine = path, writes, None  # DeepSpeed's, which keeps the moments to itself
        self.evaluations: list[dict] = []  # the rows of eval.jsonl, once the run has started

    @classmethod
    def create(cls, config: Config, writes: bool = True) -> "RunFolder":
        """A new folder under `config.runs`; an existing one is never written into."""
        return cls(parallel.of_main_process(cls._make(config) if writes else None), writes)

    @classmethod
    def _make(cls, config: Config) -> Path:
        fixed = {k: v for k, v in dataclasses.asdict(config).items() if k not in CHANGEABLE_ON_RESUME}
        digest = hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()
        task, model = (re.split("[/:]", name.rstrip("/"))[-1] for name in (config.task, config.model))
        name = f"{task}-{model}-s{config.seed}-{digest[:6]}"
        if config.steps == 0:  # a look at the base: the next look takes its place
            name += "-steps0"
            if not any((Path(config.runs) / name).glob("checkpoint-*")):
                shutil.rmtree(Path(config.runs) / name, ignore_errors=True)
        for i in itertools.count(1):
            path = Path(config.runs) / (name if i == 1 else f"{name}-{i}")
            with suppress(FileExistsError):
                path.mkdir(parents=True)
                break
        for log in cls.LOGS:
            (path / log).touch()
        return path

    @contextmanager
    def writing(self, what: str):
        """Turns a write that fails, as on a full disk, into one line that says what stands and what to do."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.path / ".partial", ignore_errors=True)
            stands = f"{self.checkpoints()[-1].name} stands" if self.checkpoints() else "there is no checkpoint yet"
            raise UsageError(
                f"{what} in {self.path} could not be written: {str(error).splitlines()[0]}; {stands}. Free some space, "
                f"and go on with --resume {self.path}"
            ) from error

    def write_whole(self, name: str, text: str) -> None:
        """Writes a file that is either the old one or the new one, whenever the program is killed."""
        if not self.writes:
            return
        with self.writing(name):
            partial = self.path / f".{name}"
            partial.write_text(text)
            sync_to_disk(partial)
            partial.replace(self.path / name)

    def write_config(self, config: Config) -> None:
        self.write_whole("config.yaml", yaml.safe_dump(dataclasses.asdict(config) | {"resume": ""}, sort_keys=False))

    def start(self, config: Config, step: int) -> None:
        """Called once everything is checked and loaded; `step` is the one that the run goes on from."""
        self.write_config(config)
        if step == 0 and self.writes and not (self.path / "base.json").exists():
            self.write_whole("base.json", json.dumps(checksums_of_model(config.model)))
        self.config, self.evaluations = config, self.read("eval.jsonl")
        self.trackers = Trackers(config if self.writes else dataclasses.replace(config, report_to=""), self.path, step)

    def append(self, name: str, rows: list[dict]) -> None:
        if not self.writes:
            return
        with self.writing(name), open(self.path / name, "a") as file:
            file.writelines(as_line(row) for row in rows)

    def read(self, name: str) -> list[dict]:
        with open(self.path / name) as file:
            return [json.loads(line) for line in file]

    def log_step(self, row: dict, rollouts: list) -> None:
        """One row in metrics.jsonl, and one row for each completion in rollouts.jsonl."""
        self.append("metrics.jsonl", [row])
        rows = [
            {"step": row["step"], "prompt_id": hashlib.sha256(r.prompt.encode()).hexdigest()[:8], "prompt": r.prompt}
            | {"completion": r.text, **r.parts, "penalty": r.penalty, "advantage": r.advantage}
            | {"length": r.length, "truncated": r.truncated}
            for r in rollouts
        ]
        self.append("rollouts.jsonl", rows)
        self.trackers.log(row)
        self.trackers.log_episodes(rows)

    def log_evaluation(self, row: dict, details: list[dict]) -> None:
        self.append("eval.jsonl", [row])
        self.evaluations.append(row)
        self.write_whole(f"eval-{row['step']}.jsonl", "".join(map(as_line, details)))
        self.trackers.log(row, prefix="eval/")

    def save_checkpoint(self, step: int, model, tokenizer, optimizer, keep_last: int, **state) -> None:
        """checkpoint-<step>/: model, AdamW's moments and counters, `state`; whole, or not there at all.

        It is written under another name, synced to disk, and renamed. No random state is needed: all that is random in
        a step follows from the seed and the step's number.
        """
        partial, whole = self.path / ".partial", self.path / f"checkpoint-{step}"
        if self.writes:
            shutil.rmtree(partial, ignore_errors=True)
        weights, moments = whole_weights(model, optimizer), {} if self.engine else packed_moments(optimizer)
        if self.engine:
            self.engine.save_checkpoint(
                partial / "deepspeed", tag="all"
            )  # each process its part, and all wait for the last
        if not self.writes:
            return
        with self.writing(whole.name):
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            # a safetensors file, but not by its name: vLLM would take it for weights of the model
            save_file(moments, partial / "optimizer.state")
            state |= {"step": step, "checksums": checksums(partial)}
            logs = [log for name in self.LOGS if (log := self.path / name).exists()]
            state["log_sizes"] = {log.name: log.stat().st_size for log in logs}
            (partial / "state.json").write_text(json.dumps(state))
            for path in (*logs, *partial.rglob("*"), partial):
                sync_to_disk(path)
            shutil.rmtree(whole, ignore_errors=True)  # one that was damaged
            partial.rename(whole)
            sync_to_disk(self.path)
        self.write_csv()
        for old in self.checkpoints()[:-keep_last]:
            shutil.rmtree(old)

    def close(self, started: float, tokens: int) -> dict[str, Any]:
        """Ends the trackers; returns what `train` does: first and last evaluation, seconds, tokens, the path."""
        self.trackers.finish()
        first, last = (self.evaluations[0], self.evaluations[-1]) if self.evaluations else (None, None)
        return dict(first=first, last=last, seconds=round(time.time() - started, 1), tokens=tokens, run=self.path)

    def save_final(self, model, tokenizer, optimizer) -> Path:
        """final/: the model as a Hugging Face folder, for from_pretrained and vLLM, with its model card."""
        partial, final = self.path / ".partial", self.path / "final"
        weights = whole_weights(model, optimizer)
        if not self.writes:
            return final
        with self.writing("final"):
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            shutil.copy(self.plot(), partial / "curves.png")
            card = model_card(self.config, model.config.model_type, self.evaluations, self.read("metrics.jsonl"))
            (partial / "README.md").write_text(card)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        return final

    def write_csv(self) -> None:
        rows, file = self.read("metrics.jsonl"), io.StringIO()
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        self.write_whole("metrics.csv", file.getvalue())

    def checkpoints(self) -> list[Path]:
        """Those of this run, the oldest first. Whatever else a person calls `checkpoint-...` is not one of them."""
        found = [path for path in self.path.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def has_checkpoint(self, step: int) -> bool:
        """As the main process sees it, so that all processes agree."""
        return parallel.of_main_process(self.path / f"checkpoint-{step}" in self.checkpoints())

    def newest_whole(self, steps: int) -> Path | None:
        """The newest checkpoint that is as it was written; newer ones are named. None if there was none yet.

        Raises:
            UsageError: all are damaged, or it is past `steps` already.
        """
        found = self.checkpoints()
        for checkpoint in reversed(found):
            if not (damage := self.damage(checkpoint)):
                if steps < int(checkpoint.name.split("-")[1]):
                    raise UsageError(f"{checkpoint} is past step {steps} already: ask for more --steps")
                return checkpoint
            print(f"{checkpoint} is damaged ({damage}): taking the one before it")
        if found:
            raise UsageError(f"{self.path} has no checkpoint that is whole: start a new run")
        return None

    def check_base(self, name: str) -> None:
        """Raises UsageError if the model under this name is not the one that the run began with."""
        record = self.path / "base.json"
        began = json.loads(record.read_text()) if record.exists() else None  # as in runs of older versions
        if began is not None and (now := checksums_of_model(name)) != began:
            changed = sorted(file for file in began.keys() | now.keys() if began.get(file) != now.get(file))
            raise UsageError(
                f"{name} is not the model that {self.path} began with: {', '.join(changed)} changed, and the run needs "
                "it as it was. Put it back, or start a new run"
            )

    def damage(self, checkpoint: Path) -> str:
        """What is wrong with it, if anything is."""
        try:
            saved = json.loads((checkpoint / "state.json").read_text())
            for name, value in saved["checksums"].items():
                if checksum(checkpoint / name) != value:
                    return f"{name} has changed"
            for name, size in saved["log_sizes"].items():
                if (self.path / name).stat().st_size < size:
                    return f"{name} is shorter than it was then"
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def resume(self, checkpoint: Path | None, optimizer, engine=None) -> dict[str, Any]:
        """Loads the optimizer from the checkpoint, cuts later rows off the logs; returns `step` and `state`.

        Without a checkpoint, as in a run that is new or was killed before its first one, the run begins at step 0.
        """
        self.engine, saved = engine, {"step": 0, "log_sizes": dict.fromkeys(self.LOGS, 0)}
        if checkpoint:
            saved = json.loads((checkpoint / "state.json").read_text())
            if engine:
                engine.load_checkpoint(checkpoint / "deepspeed", tag="all")
            else:
                load_moments(optimizer, load_file(checkpoint / "optimizer.state"))
        for name, size in saved["log_sizes"].items() if self.writes else ():  # or a step that is done again would be
            os.truncate(self.path / name, size)  # there twice
        return saved

    def plot(self) -> Path:
        """curves.png: thin lines are steps, thick ones running means, points evaluations with 95 % intervals."""
        from matplotlib.figure import Figure  # without pyplot: no window, no global state

        metrics, evaluations = self.read("metrics.jsonl"), self.read("eval.jsonl")
        shown = "worked" if metrics and "worked" in metrics[0] else "format"  # `format`: of the right form
        panels = {
            "reward of the training prompts": {"reward": "tab:blue"},
            "accuracy on the evaluation problems": {"accuracy": "black", "accuracy_sampled": "tab:orange"},
            "length in tokens": {"length": "tab:blue", "length_correct": "tab:green", "length_wrong": "tab:red"},
            f"share of {shown} answers": {shown: "tab:purple"},
            "dead groups, truncated completions": {"zero_advantage_groups": "tab:gray", "truncated": "tab:brown"},
            "entropy (nats a token), gradient norm": {"entropy": "tab:olive", "grad_norm": "tab:cyan"},
        }
        figure = Figure(figsize=(13, 6.5), layout="constrained")
        for axis, (title, keys) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
            for key, color in keys.items():
                rows = evaluations if key.startswith("accuracy") else metrics
                points = [(row["step"], row[key], row) for row in rows if row.get(key) is not None]
                steps, values = [p[0] for p in points], [p[1] for p in points]
                if rows is evaluations:
                    errors = [[p[1] - p[2][f"{key}_low"] for p in points], [p[2][f"{key}_high"] - p[1] for p in points]]
                    axis.errorbar(steps, values, errors, color=color, marker="o", markersize=4, capsize=3, label=key)
                else:
                    width = max(1, len(values) // 40)
                    smooth = [fmean(values[max(0, i - width) : i + width + 1]) for i in range(len(values))]
                    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                    axis.plot(steps, smooth, color=color, linewidth=1.8, label=key)
            if not {"length", "entropy"} & keys.keys():
                axis.set_ylim(-0.03, 1.03)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8)
        figure.suptitle(self.path.name)
        figure.savefig(self.path / "curves.png", dpi=110)
        return self.path / "curves.png"


def whole_weights(model, optimizer) -> dict[str, torch.Tensor]:
    """On the CPU: tied ones once, and in float32 where the optimizer has them so, or a resumed run would round them."""
    repeated = dict(model.named_parameters(remove_duplicate=False))
    weights = {name: value for name, value in model.state_dict().items() if name not in repeated}  # buffers
    weights |= {name: weight.cpu() for name, weight in parallel.whole_weights(model)}
    float32 = getattr(getattr(optimizer, "optimizer", optimizer), "float32_weights", [])
    return weights | dict(zip(dict(model.named_parameters()), float32, strict=False))


def as_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"
