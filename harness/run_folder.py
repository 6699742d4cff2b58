"""What a run leaves behind: the files of its folder, each written whole or not at all, and how to go on from them."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness import checkpoints, curves, lora, parallel
from harness.checkpoints import LOGS, fixed_settings, logs_of, number_of, read_state, write_state
from harness.files import (
    FORMAT,
    Lock,
    as_line,
    blank_damaged_lines,
    check_format_of,
    checksum,
    checksums,
    checksums_of_model,
    may_fail,
    quoted,
    read_json,
    read_rows,
    sync_to_disk,
    write_whole,
)  # fmt: skip
from harness.model_card import model_card
from harness.optimizers import load_moments, packed_moments
from harness.settings import Config, UsageError
from harness.trackers import Trackers
from harness.weights import final_weights, kept_weights, write_model


class RunFolder:
    """What a run leaves behind: config.yaml, metrics, rollouts, evaluations, checkpoints, curves.png.

    Of several processes only the main one writes; what needs all of them, such as gathering weights, all of them call.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes, self.engine = path, writes, None  # DeepSpeed's, which keeps the moments to itself
        self.at_the_end = ExitStack()
        self.more_files: Callable[[], dict[str, str]] = dict  # what else is kept in checkpoints: names and texts
        self.evaluations: list[dict] = []  # the rows of eval.jsonl, once the run has started
        self.config: Config | None = None  # likewise; there is none in pretraining
        self.changed: dict[str, list] = {}  # settings that are not what it was trained with so far
        self.lock_held: Lock | None = None
        self.record: Future | None = None  # of run.json, which is being written

    @classmethod
    def create(cls, config: Config, writes: bool = True) -> "RunFolder":
        """A new folder under `config.runs`; an existing one is never written into."""
        made = parallel.of_main_process(cls._make(config) if writes else None)
        return cls(made, writes).lock()

    @classmethod
    def _make(cls, config: Config) -> Path:
        digest = hashlib.sha256(json.dumps(fixed_settings(config), sort_keys=True).encode()).hexdigest()
        task, model = (re.split("[/:]", name.rstrip("/"))[-1] for name in (config.task, config.model))
        name = f"{task}-{model}-s{config.seed}-{digest[:6]}"
        if config.steps == 0:  # a look at the base: the next look takes its place
            name += "-steps0"
            look = Path(config.runs) / name
            if look.exists() and not any(look.glob("checkpoint-*")):
                with suppress(UsageError):  # somebody is looking
                    Lock(look).release()
                    shutil.rmtree(look, ignore_errors=True)
        path = checkpoints.make_folder(Path(config.runs), name)
        for log in LOGS:
            (path / log).touch()
        return path

    @classmethod
    def resumed(cls, resume: str, writes: bool = True) -> "RunFolder":
        """That of `--resume`: a run's folder; of one of its checkpoints, a new run that begins with its first steps."""
        path = Path(resume)
        check_format_of(path)
        if re.fullmatch("checkpoint-[0-9]+", path.name):
            path = parallel.of_main_process(checkpoints.branch(path) if writes else None)
        return cls(path, writes).lock()

    def lock(self) -> "RunFolder":
        """One process writes into a folder: raises UsageError if another one does."""
        if self.writes and self.path.is_dir():
            self.lock_held = Lock(self.path)
        return self

    @contextmanager
    def writing(self, what: str):
        """Turns a write that fails, as on a full disk, into one line that says what stands and what to do."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.path / ".partial", ignore_errors=True)
            stands = f"{self.checkpoints()[-1].name} stands" if self.checkpoints() else "there is no checkpoint yet"
            full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
            raise UsageError(
                f"{what} in {self.path} could not be written: {str(error).splitlines()[0]}; {stands}. "
                f"{'Free some space, and go' if full else 'Go'} on with --resume {quoted(self.path)}"
            ) from error

    def write_whole(self, name: str, text: str) -> None:
        """Writes a file that is either the old one or the new one, whenever the program is killed."""
        if not self.writes:
            return
        with self.writing(name):
            write_whole(self.path / name, text)

    def write_config(self, config: Config) -> None:
        settings = asdict(config) | {"resume": "", "allow_changed": ""}
        self.write_whole("config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    def start(self, config: Config, step: int) -> None:
        """Called once everything is checked and loaded; `step` is the one that the run goes on from."""
        self.write_config(config)
        if step == 0 and self.writes and not (self.path / "run.json").exists():
            self.record = ThreadPoolExecutor(1).submit(self.write_record, config.model)
        for name, (was, now) in self.changed.items():
            print(f"{name} was {was!r} up to step {step}, and is {now!r} from now on")
        if self.changed:
            self.append("changes.jsonl", [{"step": step, "changed": self.changed}])
        self.config, self.evaluations = config, parallel.of_main_process(self.read("eval.jsonl"))  # which has cut it
        self.trackers = Trackers(config if self.writes else replace(config, report_to=""), self.path, step)

    def wait_for_record(self) -> None:
        if self.record:
            self.record.result()  # raises what went wrong there

    def write_record(self, model: str) -> None:
        """run.json. To read the files of a large model takes seconds, in which the first steps go on."""
        self.write_whole("run.json", json.dumps({"format": FORMAT, "model": checksums_of_model(model)}))

    def append(self, name: str, rows: list[dict]) -> None:
        if not self.writes:
            return
        with self.writing(name), open(self.path / name, "a", encoding="utf-8") as file:
            file.writelines(as_line(row) for row in rows)

    def read(self, name: str) -> list[dict]:
        return read_rows(self.path / name)

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
        self.wait_for_record()
        if self.writes:
            shutil.rmtree(partial, ignore_errors=True)
        weights, moments = kept_weights(model, optimizer), {} if self.engine else packed_moments(optimizer)
        more_files = self.more_files()
        if self.engine:  # each process its part, and all wait for the last
            self.engine.save_checkpoint(partial / "deepspeed", tag="all")
        if not self.writes:
            return
        with self.writing(whole.name):
            if lora.adapted(model):
                lora.save(model, weights, partial)
            else:
                model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            # a safetensors file, but not by its name: vLLM would take it for weights of the model
            save_file(moments, partial / "optimizer.state")
            for name, text in more_files.items():
                (partial / name).write_text(text, encoding="utf-8")
            state |= {"step": step, "checksums": checksums(partial), "moments": len(moments)}
            state |= {"settings": fixed_settings(self.config)} if self.config else {}
            write_state(partial, self.path, state)
            for path in (*logs_of(self.path), *partial.rglob("*"), partial):
                sync_to_disk(path)
            shutil.rmtree(whole, ignore_errors=True)  # one that was damaged
            partial.rename(whole)
            sync_to_disk(self.path)
        with may_fail("metrics.csv"):
            self.write_csv()
        kept = {whole, self.best_checkpoint()}
        earlier = [old for old in self.checkpoints() if number_of(old) < step and old not in kept]
        for old in earlier[: len(earlier) - (keep_last - 1)]:
            shutil.rmtree(old)

    def close(self, started: float, tokens: int, interrupted: bool = False) -> dict[str, Any]:
        """Ends the trackers; returns what `train` does: first and last evaluation, seconds, tokens, the path."""
        self.wait_for_record()
        with may_fail("the end of the trackers"):
            self.trackers.finish()
        self.at_the_end.close()
        if self.lock_held:
            self.lock_held.release()
        first, last = (self.evaluations[0], self.evaluations[-1]) if self.evaluations else (None, None)
        seconds = round(time.monotonic() - started, 1)
        result = dict(first=first, last=last, seconds=seconds, tokens=tokens, run=self.path)
        return result | ({"interrupted": True} if interrupted else {})

    def save_final(self, model, tokenizer, optimizer) -> Path:
        """final/: the model as a Hugging Face folder, for from_pretrained and vLLM, with its model card.

        Adapters are merged into it, and they are in final/adapter as well.
        """
        partial, final = self.path / ".partial", self.path / "final"
        weights = final_weights(model, optimizer)
        adapters = kept_weights(model, optimizer) if lora.adapted(model) else {}
        if not self.writes:
            return final
        with self.writing("final"):
            shutil.rmtree(partial, ignore_errors=True)
            write_model(model, weights, partial)
            if adapters:
                lora.save(model, adapters, partial / "adapter")
            tokenizer.save_pretrained(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        with may_fail("curves.png"):
            shutil.copy(curves.plot(self.path), final / "curves.png")
        with may_fail("the model card"):
            rows = self.evaluations, self.read("metrics.jsonl")
            card = model_card(self.config, model.config.model_type, *rows)
            (final / "README.md").write_text(card, encoding="utf-8")
        return final

    def write_csv(self) -> None:
        rows, file = self.read("metrics.jsonl"), io.StringIO()
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        self.write_whole("metrics.csv", file.getvalue())

    def checkpoints(self) -> list[Path]:
        """Those of this run, the oldest first. Whatever else a person calls `checkpoint-...` is not one of them."""
        exact = re.compile("checkpoint-(0|[1-9][0-9]*)")
        found = [path for path in self.path.glob("checkpoint-*") if exact.fullmatch(path.name)]
        return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=number_of)

    def best_step(self) -> int:
        """The step after which most sampled answers of the evaluation were right: the first such; 0 is the base."""
        if not self.evaluations:
            return 0
        return max(self.evaluations, key=lambda row: row["accuracy_sampled"])["step"]

    def best_checkpoint(self) -> Path | None:
        """The one that `keep_best` keeps."""
        keeps = self.evaluations and self.config.keep_best and self.best_step()
        return self.path / f"checkpoint-{self.best_step()}" if keeps else None

    def has_new_best(self, step: int) -> bool:
        """Whether what was just evaluated is to be kept, and is not yet."""
        is_best = self.best_checkpoint() == self.path / f"checkpoint-{step}"
        return parallel.of_main_process(is_best) and not self.has_checkpoint(step)

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
            if not (damage := checkpoints.damage(checkpoint, self.path)):
                if steps < number_of(checkpoint):
                    raise UsageError(f"{checkpoint} is past step {steps} already: ask for more --steps")
                return checkpoint
            print(f"{checkpoint} is damaged ({damage}): taking the one before it")
        if found:
            raise UsageError(f"{self.path} has no checkpoint that is whole: start a new run")
        return None

    def check_base(self, name: str) -> None:
        """Raises UsageError if the model under this name is not the one that the run began with."""
        record = self.path / "run.json"
        if not record.exists():  # as in runs of older versions
            return
        began, now = read_json(record).get("model", {}), checksums_of_model(name)
        if now != began:
            changed = sorted(file for file in began.keys() | now.keys() if began.get(file) != now.get(file))
            raise UsageError(
                f"{name} is not the model that {self.path} began with: {', '.join(changed)} changed, and the run needs "
                "it as it was. Put it back, or start a new run"
            )

    def resume(self, checkpoint: Path | None, optimizer, engine=None) -> dict[str, Any]:
        """Loads the optimizer from the checkpoint, cuts later rows off the logs; returns `step` and `state`.

        Without a checkpoint, as in a run that is new or was killed before its first one, the run begins at step 0.
        """
        self.engine, saved = engine, {"step": 0, "log_sizes": dict.fromkeys(LOGS, 0)}
        if checkpoint:
            saved = read_state(checkpoint)
            if engine:
                engine.load_checkpoint(checkpoint / "deepspeed", tag="all")
            else:
                moments = load_file(checkpoint / "optimizer.state")
                if len(moments) != saved.get("moments", len(moments)):
                    raise UsageError(f"{checkpoint}/optimizer.state has {len(moments)} tensors, not {saved['moments']}")
                load_moments(optimizer, moments)
        if self.writes:
            for name, size in saved["log_sizes"].items():
                self.cut(name, size)
                if saved.get("log_checksums", {}).get(name) not in (None, checksum(self.path / name)):
                    print(f"{self.path / name} is not what it was at {checkpoint.name}: the run goes on with it")
        return saved

    def cut(self, name: str, size: int) -> None:
        """Takes off what was written after the checkpoint: a step that is done again would be there twice."""
        log = self.path / name
        if not log.exists() or log.stat().st_size < size:
            print(f"{log} has lost rows: what is left of it is kept")
            log.touch()
        else:
            os.truncate(log, size)
        for number in blank_damaged_lines(log):
            print(f"{log}, line {number} is damaged: it is left out, and {name}.damaged is the file as it was")
