"""One HTML page from a run's folder: curves, whole groups of completions, one prompt over time.

    python -m view report runs/<run>                            writes runs/<run>/report.html
    python -m view report runs/<run> runs/<other> ...           compares runs: writes runs/runs_report.html
    python -m view report runs/<run> --prompt_id 0a1b2c3d       the accuracy of that one prompt over time, as a PNG

The page is one file that opens from disk and asks nothing of the network. The report reads logs only, so it also works
on the folder of a run that is still going.
"""

import argparse
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from harness.command_line import ArgumentParser
from harness.files import check_format_of, quoted
from harness.settings import CHANGEABLE_ON_RESUME
from tasks import UsageError

TEMPLATE = Path(__file__).with_name("report_template.html")
METRICS = yaml.safe_load(TEMPLATE.with_name("curves.yaml").read_text(encoding="utf-8"))  # panels, with how to read them
MAX_BYTES = 24_000_000  # of rollouts in a page: what a browser opens within a second or two
MAX_EVAL_PROMPTS = 1000
LOGS = ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "eval.jsonl")

OF_SOME_TASKS = {"worked", "steps_right", "reflections"}  # no wonder if they are missing
# Settings that do not change what is learned. Runs that differ in these and in the seed only are one arm.
NOT_LEARNED = CHANGEABLE_ON_RESUME - {"steps"} | {"seed"}
NOT_SHOWN = {"runs", "resume", "about"}  # in the table of settings that differ


def six_digits(number: str) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value := float(number)) else None


# Browsers refuse NaN and Infinity, which Python writes: they become null. Six digits keep the page small.
DECODER = json.JSONDecoder(parse_constant=lambda name: None, parse_float=six_digits)


def parse(line: bytes) -> dict | None:
    """One line of a log, or None if it is no whole JSON object."""
    try:
        row = DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_rows(path: Path, notes: list[str]) -> Iterator[tuple[int, int, dict]]:
    """(begin, end, row) of each line, one at a time; what is missing or left out goes to `notes`."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return
    broken, end, line, row = 0, 0, b"\n", None
    with open(path, "rb") as file:
        for line in file:
            begin, end = end, end + len(line)
            if (row := parse(line)) is not None:
                yield begin, end, row
            else:
                broken += 1
    if end == 0:
        notes.append(f"{path.name} is empty")
    if row is None and not line.endswith(b"\n"):
        notes.append(f"the last line of {path.name} is cut off, as while a run is going on: it is left out")
        broken -= 1
    if broken:
        notes.append(f"{broken} lines of {path.name} are no JSON objects: they are left out")


def prompt_id(row: dict) -> str:
    return str(row.get("prompt_id") or hashlib.sha256(str(row.get("prompt", "")).encode()).hexdigest()[:8])


@dataclass
class Group:
    """Where the rows of one group are in rollouts.jsonl: neighbours, from byte `begin` to byte `end`."""

    step: int
    prompt_id: str
    begin: int
    end: int = 0
    rows: int = 0


def index_groups(path: Path, group_size: int | None, notes: list[str]) -> tuple[list[Group], dict]:
    """All whole groups, without their texts, and {prompt_id: {step: [right, all]}} of all rows.

    The same prompt may be drawn twice in a step, so a group ends after `group_size` rows. Without a `group_size`, all
    neighbours of the same step and prompt are one.
    """
    groups, history, left_out = [], {}, 0
    for begin, end, row in read_rows(path, notes):
        step, prompt = row.get("step", 0), prompt_id(row)
        last = groups[-1] if groups else None
        if last is None or (last.step, last.prompt_id) != (step, prompt) or last.rows == group_size:
            groups.append(last := Group(step, prompt, begin))
        last.end, last.rows = end, last.rows + 1
        count = history.setdefault(prompt, {}).setdefault(step, [0, 0])
        count[0], count[1] = count[0] + (row.get("correct") == 1), count[1] + 1
    whole = [group for group in groups if group.rows == (group_size or group.rows)]
    if left_out := sum(group.rows for group in groups) - sum(group.rows for group in whole):
        notes.append(f"{left_out} rollouts are in no whole group of {group_size}: they are left out")
    return whole, history


def spread(items: list, k: int) -> list:
    """k of the items, evenly spaced, the first and the last among them."""
    return items if k >= len(items) else [items[i * (len(items) - 1) // max(1, k - 1)] for i in range(k)]


def choose(groups: list[Group], count: int) -> list[Group]:
    """`count` of the groups, spread evenly over the steps; those of the first and the last step are among them."""
    steps = [list(group) for _, group in itertools.groupby(groups, key=lambda group: group.step)]
    chosen = []
    for rank in range(max(map(len, steps), default=0)):  # the first group of each step, then the second ones, ...
        layer = [step[rank] for step in steps if rank < len(step)]
        chosen += spread(layer, count - len(chosen))
    return sorted(chosen, key=lambda group: group.begin)


def load_rollouts(path: Path, group_size: int | None, most: int, most_bytes: int, notes: list[str]) -> dict:
    """Groups for the page, with at most so many rollouts and bytes, and how many rollouts there are in all."""
    groups, history = index_groups(path, group_size, notes)
    total = sum(group.rows for group in groups)
    chosen = choose(groups, max(1, most * len(groups) // max(1, total)))
    while (size := sum(group.end - group.begin for group in chosen)) > most_bytes and len(chosen) > 2:
        chosen = choose(groups, max(2, len(chosen) * most_bytes // size))
    shown, prompts = [], {}
    for group in chosen:
        with open(path, "rb") as file:
            file.seek(group.begin)
            rows = [row for line in file.read(group.end - group.begin).split(b"\n") if (row := parse(line))]
        if not rows:  # the file was cut since, as by a run that is resumed
            continue
        shown.append({"step": group.step, "prompt_id": group.prompt_id, "dead": is_dead(rows), "rows": rows})
        counts = [[step, *count] for step, count in history[group.prompt_id].items()]
        prompts[group.prompt_id] = {"text": str(rows[0].get("prompt", "")), "trained": counts, "evaluated": []}
        for row in rows:  # once for the group is enough
            for key in ("step", "prompt", "prompt_id"):
                row.pop(key, None)
    return {"groups": shown, "prompts": prompts, "total": total, "shown": sum(len(group["rows"]) for group in shown)}


def is_dead(rows: list[dict]) -> bool:
    """All rewards of the group are equal, so that nothing in it is better than anything else."""
    rewards = [row.get("reward") for row in rows]
    return rewards[0] is not None and len(set(rewards)) == 1


def evaluation_files(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"eval-(\d+)\.jsonl", path.name), path) for path in folder.glob("eval-*.jsonl")]
    return sorted((int(match[1]), path) for match, path in found if match)


def add_answers(folder: Path, prompts: dict, notes: list[str]) -> None:
    """Adds the evaluation problems to `prompts`: [step, correct, sampled_correct, row] of each evaluation.

    The row, with the answer, is kept of the first and of the last evaluation only.
    """
    files, kept = evaluation_files(folder), None
    for step, path in files:
        rows = {prompt_id(row): row for _, _, row in read_rows(path, notes)}
        if kept is None:
            kept = spread(list(rows), MAX_EVAL_PROMPTS)
            if len(kept) < len(rows):
                notes.append(f"{len(kept)} of {len(rows)} evaluation problems are on this page")
        for name in kept:
            if row := rows.get(name):
                prompt = {"text": str(row.pop("prompt", "")), "trained": [], "evaluated": []}
                point = [step, row.get("correct"), row.get("sampled_correct")]
                answer = [row] if step in (files[0][0], files[-1][0]) else []
                prompts.setdefault(name, prompt)["evaluated"].append(point + answer)


def load_config(folder: Path, notes: list[str]) -> dict:
    """The settings, or none, with a note, if the file is missing or damaged."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = None
    except (yaml.YAMLError, UnicodeDecodeError):
        config = {}
    if config and isinstance(config, dict):
        return parse(json.dumps(config, default=str).encode())
    problem = "is missing" if config is None else "is no YAML file of settings"
    notes.append(f"config.yaml {problem}: neighbouring rollouts of one step and prompt are taken for a group")
    return {}


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if not any((folder / name).is_file() for name in LOGS):
        raise UsageError(f"{folder} is no folder of a run: it has none of {', '.join(LOGS)}")
    check_format_of(folder)


def load_run(folder: Path, most: int, most_bytes: int) -> dict:
    """All that the page shows of one run."""
    notes = []
    config = load_config(folder, notes)
    metrics = [row for _, _, row in read_rows(folder / "metrics.jsonl", notes)]
    evaluations = [row for _, _, row in read_rows(folder / "eval.jsonl", notes)]
    group_size = config.get("group_size") if isinstance(config.get("group_size"), int) else None
    run = {"name": folder.resolve().name, "config": config, "metrics": metrics, "evaluations": evaluations}
    begun = folder / "config.yaml" if config else folder
    run["started"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(begun.stat().st_mtime))
    run["command"] = f"python grpo.py --config {quoted(folder / 'config.yaml')}"
    run |= load_rollouts(folder / "rollouts.jsonl", group_size, most, most_bytes, notes)
    add_answers(folder, run["prompts"], notes)
    best = max(evaluations, key=lambda row: row.get("accuracy_sampled", 0), default={}).get("step", 0)
    if best and best != evaluations[-1].get("step") and (folder / f"checkpoint-{best}").is_dir():
        notes.append(f"the best evaluation was after step {best}: its model is in checkpoint-{best}")
    known = {key for panels in METRICS.values() for keys in panels for key in keys.split() if "accuracy" not in key}
    if missing := sorted(known - OF_SOME_TASKS - {key for row in metrics for key in row}) if metrics else []:
        notes.append(f"metrics.jsonl has no {', '.join(missing)}: was it written by another version?")
    return run | {"notes": notes}


def find_arms(configs: list[dict]) -> list[int]:
    """Number of each run's arm: runs whose settings differ only in what changes nothing but chance are one arm."""
    keys = []
    for i, config in enumerate(configs):
        ignored = NOT_LEARNED | ({"steps"} if config.get("lr_schedule", "constant") == "constant" else set())
        learned = {key: value for key, value in config.items() if key not in ignored}
        keys.append(json.dumps(learned, sort_keys=True) if config else f"run {i}, of unknown settings")
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


def differing(configs: list[dict]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: {json.dumps(config.get(name), sort_keys=True) for config in configs} for name in names}
    return [name for name in names if name not in NOT_SHOWN and len(values[name]) > 1]


def build_page(folders: list[Path], max_rollouts: int) -> dict:
    """The page's data."""
    runs = [load_run(folder, max_rollouts // len(folders), MAX_BYTES // len(folders)) for folder in folders]
    configs = [run["config"] for run in runs]
    arms, differs = find_arms(configs), differing(configs)
    for run, arm in zip(runs, arms, strict=True):
        named = [f"{key} {run['config'].get(key, 'not set')}" for key in differs if key not in NOT_LEARNED | {"steps"}]
        run |= {"arm": arm, "arm_name": ", ".join(named) or ("settings as in config.yaml" if run["config"] else "?")}
    if len({run["name"] for run in runs}) < len(runs):
        for run, folder in zip(runs, folders, strict=True):
            run["name"] = str(folder)
    return {"runs": runs, "metrics": METRICS, "differs": differs}


def write_page(out: Path, data: dict) -> None:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":  # so that nothing that a model wrote can end the script element
        text = text.replace(character, f"\\u{ord(character):04x}")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{DATA}}")
    out.write_text(before + text + after, encoding="utf-8", errors="replace")


def plot_prompt(folder: Path, name: str, out: Path) -> None:
    """Accuracy over time of one prompt: from all rollouts, and from the evaluations if it is one of their problems."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    counts = index_groups(folder / "rollouts.jsonl", None, [])[1].get(name, {})
    answers = [(step, row) for step, path in evaluation_files(folder) for _, _, row in read_rows(path, [])]
    answers = [(step, row) for step, row in answers if prompt_id(row) == name]
    if not counts and not answers:
        raise UsageError(f"no rollout and no evaluation of {folder} has the prompt_id {name}")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    if counts:
        axis.plot(list(counts), [right / n for right, n in counts.values()], "o-", label="share of right rollouts")
    for key, style, label in (("correct", "ks", "greedy"), ("sampled_correct", "D--", "share of right samples")):
        points = [(step, row[key]) for step, row in answers if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, markersize=5, label=f"evaluation: {label}")
    axis.set(title=f"prompt {name}, {folder.resolve().name}", xlabel="step", ylabel="accuracy", ylim=(-0.05, 1.05))
    axis.grid(alpha=0.25)
    axis.legend()
    figure.savefig(out, dpi=110)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m view report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are compared")
    parser.add_argument("--out", type=Path, help="file to write, instead of the one named above")
    parser.add_argument("--max_rollouts", type=int, default=25_000, metavar="N",
                        help="rollouts in the page, whole groups spread over the steps (default: %(default)s, or fewer "
                        f"if they are long: {MAX_BYTES // 1_000_000} MB)")  # fmt: skip
    parser.add_argument("--prompt_id", help="only plot this prompt's accuracy; default file: RUN/prompt-<id>.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    first = args.runs[0]
    if args.max_rollouts < 1:
        raise UsageError(f"--max_rollouts is {args.max_rollouts}, it must be 1 or more")
    for folder in args.runs:
        check_folder(folder)
    if args.prompt_id:
        if len(args.runs) > 1:
            raise UsageError("--prompt_id takes one run")
        out = args.out or first / f"prompt-{args.prompt_id}.png"
        plot_prompt(first, args.prompt_id, out)
    else:
        beside = first / "report.html" if len(args.runs) == 1 else first.resolve().parent / "runs_report.html"
        out = args.out or beside
        data = build_page(args.runs, args.max_rollouts)
        write_page(out, data)
        for run in data["runs"]:
            print(f"{run['name']}: {run['shown']:,} of {run['total']:,} rollouts are on the page")
            print("".join(f"  {note}\n" for note in run["notes"]), end="")
    print(out)
