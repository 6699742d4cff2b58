"""What a run leaves behind, in its folder, and what a person sees of it in the terminal."""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import parallel
from model_card import model_card
from optimizers import load_moments, packed_moments
from settings import CHANGEABLE_ON_RESUME, MAX_LOGP_GAP, Config, UsageError
from trackers import Trackers


class RunFolder:
    """What a run leaves behind: config.yaml, metrics, rollouts, evaluations, checkpoints, curves.png.

    Of several processes only the main one writes; what needs all of them, such as gathering weights, all of them call.
    """

    LOGS = ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl")  # these only ever grow

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes, self.engine = path, writes, None  # DeepSpeed's, which keeps the moments to itself

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

    def save_final(self, model, tokenizer, optimizer, config: Config, evaluations: list[dict]) -> Path:
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
            card = model_card(config, model.config.model_type, evaluations, self.read("metrics.jsonl"))
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


def checksums(folder: Path) -> dict[str, int]:
    """Of all files in the folder and below, by their path from there."""
    return {str(file.relative_to(folder)): checksum(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def sync_to_disk(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    """CRC-32 of a file: against damage, not against malice."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


class Alarms:
    """Asked after each step, says once what a person should know about a run that goes wrong, and what to try."""

    # symptom, after how many steps in a row, what to say
    SYMPTOMS = (
        (lambda row: row["zero_advantage_groups"] == 1, 10,
         "all groups have been dead for 10 steps: nothing is learned. All wrong: the policy has collapsed (go back to "
         "a checkpoint, with a lower lr), or the problems are too hard. All right: too easy. Right or wrong by prompt: "
         "a group's answers are all alike (temperature too low, top_k, top_p)"),
        (lambda row: row["truncated"] == 1, 10,
         "all completions have been cut off for 10 steps: raise max_completion_tokens, pay less for long answers "
         "(overlong_share), or, if the text is gibberish, go back to a checkpoint with a lower lr"),
        (lambda row: (row["kl_ref"] or 0) > 1, 3,
         "the policy is far from the reference, kl_ref has been over 1 for 3 steps: lower lr, or raise kl_coef"),
        (lambda row: (row["sampler_logp_gap"] or 0) > MAX_LOGP_GAP, 1,
         "the sampler's log-probs differ from the trainer's by more than rounding (sampler_logp_gap): are its weights "
         "stale? Try --sampler torch, or correct for it with --old_logps trainer --importance_cap 2"),
    )  # fmt: skip
    NOT_FINITE = 3  # steps in a row

    def __init__(self, updates: int):
        self.updates, self.counts = updates, Counter()  # optimizer steps in a step

    def __call__(self, row: dict) -> list[str]:
        """The warnings of this step; a UsageError where going on makes no sense."""
        warnings = []
        for i, (shows, patience, text) in enumerate(self.SYMPTOMS):
            self.counts[i] = self.counts[i] + 1 if shows(row) or self.counts[i] >= patience else 0
            if self.counts[i] == patience:
                warnings.append(text)
        none_was_good = row["nonfinite_updates"] and row["nonfinite_updates"] + row["skipped_updates"] == self.updates
        self.counts["nonfinite"] = self.counts["nonfinite"] + 1 if none_was_good else 0
        if self.counts["nonfinite"] == self.NOT_FINITE:
            raise UsageError(
                f"the gradient was not finite in {self.NOT_FINITE} steps in a row, up to step {row['step']}: no weight "
                "was changed in them, every completion is in rollouts.jsonl. Go back to a checkpoint, and try a lower "
                "lr, or --precision fp32"
            )
        return warnings


@contextmanager
def time_limit(seconds: float):
    """Raises TimeoutError in the body after so many seconds; 0 is no limit. For Python code in the main thread."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def printable(text: str, limit: int = 160) -> str:
    """One line; control characters, which a terminal would obey, as escapes. Of a longer text only `limit` characters
    are shown, those of its beginning and its end."""
    if (left_out := len(text) - limit) > 0:
        text = f"{text[: limit // 2]} ... {left_out:,} characters ... {text[limit // 2 + left_out :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share seen in n trials (Wilson's, sound near 0 and 1 too)."""
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # rounding would leave a share of 0 or 1 outside
    return max(0.0, min(center - half, share)), min(1.0, max(center + half, share))


def clustered_interval(shares: list[float], z: float = 1.96) -> tuple[float, float]:
    """95 % interval of the mean of per-prompt shares: the prompts are the sample, not their completions."""
    half = z * torch.tensor(shares).std().item() / math.sqrt(len(shares)) if len(shares) > 1 else 1.0
    return max(0.0, fmean(shares) - half), min(1.0, fmean(shares) + half)


def evaluation_table(rows: list[dict]) -> str:
    """The evaluations side by side: one, or before and after."""

    def interval(row: dict, key: str) -> str:
        return f"{row[key]:.1%} [{100 * row[key + '_low']:.1f}, {100 * row[key + '_high']:.1f}]"

    k = max(rows[0]["pass_at_k"], key=int)
    lines = {
        "": [f"after {row['step']} steps" if row["step"] else "before" for row in rows],
        "greedy accuracy": [interval(row, "accuracy") for row in rows],
        "sampled accuracy": [interval(row, "accuracy_sampled") for row in rows],
        f"pass@{k}": [f"{row['pass_at_k'][k]:.1%}" for row in rows],
        "length, tokens": [f"{row['length']:.1f}" for row in rows],
        "truncated": [f"{row['truncated']:.1%}" for row in rows],
        "worked answers": [f"{row['worked']:.1%}" for row in rows if "worked" in row],
        "made to show steps": [f"{row['accuracy_worked']:.1%} right" for row in rows if "accuracy_worked" in row],
    }
    return "\n".join(f"  {name:18}" + "".join(f"{v:>22}" for v in values) for name, values in lines.items() if values)


def verdict(row: dict) -> str:
    """Will it learn? A forecast from the first evaluation, before hours are spent.

    GRPO learns from groups that disagree. The thresholds are a judgement from small models: the shipped base, with 37 %
    dead groups, learns in a minute; a base in which three groups of four were dead learned nothing in 120 steps.
    """
    k, dead, pass_1 = max(map(int, row["pass_at_k"])), row["zero_advantage_groups"], row["pass_at_k"]["1"]
    if k < 4:
        return "will it learn? eval_samples of 4 or more are needed to tell"
    gain = row["pass_at_k"][str(k)] - pass_1
    advice = [
        (row["truncated"] > 0.3, "many completions are cut off: raise max_completion_tokens"),
        (row["format"] < 0.2, "few completions have the right form: change the prompt, or pay for the form"),
        (pass_1 > 0.9, "the problems are too easy, little is left to learn"),
        (pass_1 <= 0.9 and (dead > 0.75 or gain < 0.1), "too few groups disagree: take easier (or harder) problems, a "
         "larger group_size, a reward with partial credit, or a better model"),
    ]  # fmt: skip
    found = [text for holds, text in advice if holds]
    answer = "yes" if dead <= 0.5 and gain >= 0.25 else "perhaps, slowly; a larger group_size leaves fewer dead groups"
    facts = f"groups of {k}: {dead:.0%} dead, pass@1 {pass_1:.0%}, pass@{k} {pass_1 + gain:.0%}"
    return f"will it learn? {'unlikely: ' + '; '.join(found) if found else answer} ({facts})"


def show_groups(step: int, rollouts: list, group_size: int, limit: int = 200) -> None:
    """Two whole groups, of mixed rewards if there are such, question first; longer answers are folded to `limit`."""
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    for group in sorted(groups, key=lambda group: len({r.reward for r in group}) == 1)[:2]:
        right = sum(bool(r.parts["correct"]) for r in group)
        lines = [f"step {step}, {right} of {group_size} right: {printable(group[0].prompt, 2000)}"]
        for i, r in enumerate(group, 1):
            mark = "right" if r.parts["correct"] else "     "
            cut = " (cut off)" if r.truncated else ""
            paid = f"reward {r.reward:5.2f} advantage {r.advantage:+5.2f}"
            lines.append(f"  {i:2} {mark} {paid}  {printable(r.text, limit)}{cut}")
        tqdm.write("\n".join(lines))


def show_group(rollouts: list, weights: list[float], tokenizer, group_size: int) -> None:
    """One whole group, of mixed rewards if there is one: reward, advantage, weight of each token, tokens."""
    first = next((i for i, r in enumerate(rollouts) if not r.dead), 0) // group_size * group_size
    print(f"one group, the completions of {printable(rollouts[first].prompt, 2000)}")
    print("  (weight: of each of its tokens in the loss)\n  reward advantage    weight length  tokens")
    for r, weight in list(zip(rollouts, weights, strict=True))[first : first + group_size]:
        tokens = printable(" ".join(tokenizer.convert_ids_to_tokens(r.completion_ids)), 2000)
        print(f"  {r.reward:6.2f} {r.advantage:+9.3f} {weight:9.2e} {r.length:6d}  {tokens}")


def announce(config: Config, path: Path, model, accelerator, checkpoint: Path | None) -> None:
    """The first lines of a run."""
    n, kind = accelerator.num_processes, accelerator.distributed_type.value.removeprefix("MULTI_").lower()
    device = f"{n} processes ({kind}) on {accelerator.device.type}" if n > 1 else accelerator.device
    print(
        f"GRPO: {config.model} ({sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters) on {config.task}, "
        f"{config.steps} steps of {config.prompts_per_step} prompts x {config.group_size} completions, "
        f"lr {config.lr:g}, on {device}. {config.about if config.steps else ''}\nrun folder: {path}"
    )
    if checkpoint:
        print(f"going on from {checkpoint}")
    if config.uses_trainer_logps:
        print("the ratio is taken against log-probs of the trainer: one more forward pass a step")
    if config.drops_dead_groups and (config.entropy_coef or (config.kl_coef > 0 and config.kl_in == "loss")):
        print("dead groups are dropped although the loss has a KL penalty or an entropy bonus: they will not have it")


@contextmanager
def finish_step_on_signal():
    """Ctrl-C and SIGTERM set the event, so that the step is finished and saved; a second Ctrl-C stops at once."""
    stop = threading.Event()

    def on_signal(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        tqdm.write("stopping: this step is finished and saved first (once more to stop at once)")

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
