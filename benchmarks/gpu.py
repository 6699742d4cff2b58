"""On a CUDA GPU: seconds a step, tokens a second, FLOP/s and memory, for shapes of 0.5 to 3 billion parameters.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --shapes Qwen2.5-0.5B       one shape; rows of other shapes stay in the table
    python benchmarks/gpu.py --versus TRL --limit 240    TRL's trainer first, for at most so many seconds a shape
    python benchmarks/gpu.py --set cudnn_attention=true  other settings than those of WORK: a row of its own
    python benchmarks/gpu.py --card_gb 24                as on a card of 24 GB
    python benchmarks/gpu.py --tiny --out FOLDER         a toy on any device: does this script still run?

The shapes are those of Qwen models, the weights are random: there is no download. The next token of such a model is
close to uniform over V tokens, so K random tokens that end a completion (they are the model's eos_token_id, which both
programs read) give lengths of a geometric distribution with mean m = V / K, cut off at `longest`. K is chosen for the
mean that is wanted. With vLLM, K tokens are a cost that real models do not have: it compares each new token with them
one by one, some 5 us for 500 (1.3 ms a decoding step of 256 rows). A reward is a coin, by the CRC-32 of the text.

`ours` is grpo.train, `TRL` its GRPOTrainer, where that is asked for and installed: same prompts, numbers of
completions, limits, learning rate, bf16 autocast over float32 weights, gradient checkpointing, tokens in a microbatch.
Both sample with vLLM where it is installed, else with torch. TRL's forward pass for importance weights of vLLM's
log-probs is off, as ours does none; its vLLM takes 0.3 of the card, its default. Each runs in a process of its own, and
writes no checkpoint. Sampling includes the rewards, but not in TRL; TRL's includes the sync. Of a run that is stopped
at its limit, the steps until then count. `start` is from the start of the process to the first step.

Training FLOP/s count, for each completion that is trained (ours leaves groups of equal rewards out) of c tokens behind
a prompt of p, with L = p + c, and are divided by the seconds of training and by the rate of a product of two bf16
matrices of 8192 x 8192 on the same card before the shape's first row:

    6 * (parameters without embeddings) * L + 6 * vocabulary * hidden * c + 6 * layers * (width of all heads) * L^2

which is forward and backward pass, the causal half of attention, no padding, and nothing that is computed twice. With
LoRA (`--set lora_rank=16`) the first two are 4 times instead of 6, since frozen weights have no gradient. Peak
memory is what torch has allocated at most (on a CPU, the process); by arithmetic is memory.py's table without what CUDA
itself takes. Figures are medians over the steps without the first two, in brackets the smallest and the largest.
Writes results/gpu.json, each row with all of this, and results/gpu.md from it.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import gpu_profile
import psutil
import torch
import yaml
from against_trl import OF_TRL, Parity
from common import RESULTS, arguments, commit, table, train, within, write
from shapes import MAX_PROMPT, SIZES, WORK, model_config, prepare

COLUMNS = {  # figure: digits
    "tokens a completion": 0, "seconds a step": 2, "sampling": 2, "training": 2, "sync": 2, "tokens/s": 0,
    "training TFLOP/s": 1, "% of matmul": 1,
}  # fmt: skip


class Digits(Parity):
    """Prompts of 80 to 120 digits, each a token. A completion is right by chance."""

    def problem(self, rng):
        return "".join(rng.choices("0123456789", k=rng.randrange(80, 121)))

    def eval(self):
        return [{"prompt": "0123456789" * 10}]

    def is_right(self, text):
        return zlib.crc32(text.encode()) % 2


def until_now() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def only(gigabytes: float) -> None:
    """Makes the card, for torch and for memory.py, one of so many GB. vLLM's own allocations are torch's, too."""
    from harness import memory

    free_memory = memory.free_memory

    def free(device) -> int:
        used = torch.cuda.memory_reserved() if device.type == "cuda" else 0
        return int(min(free_memory(device), gigabytes * 1e9 - used))

    memory.free_memory = free
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / whole))


def figures(shape: str, sampling, training, sync, lengths: list[int], trained: list[list[int]], lora=False) -> dict:
    """Of one step; `trained` are tokens of prompt and completion."""
    from harness import memory

    s = memory.Shape.of(model_config(shape))
    body, head, attention = s.parameters - s.embeddings, s.vocabulary * s.hidden, s.layers * s.queries
    of_weights = 4 if lora else 6
    flops = sum(of_weights * (body * (p + c) + head * c) + 6 * attention * (p + c) ** 2 for p, c in trained)
    seconds, tokens = sampling + training + (sync or 0), sum(lengths)
    values = (tokens / len(lengths), seconds, sampling, training, sync, tokens / seconds, flops / training / 1e12)
    return dict(zip(COLUMNS, values, strict=False))  # the last column needs the rate of matmul


def ours(shape: str, folder: str, how: dict, partial: Path) -> dict:
    import grpo
    from harness import memory
    from harness.run_folder import RunFolder

    steps, sampler = how["steps"], how["sampler"]
    tables, starts, needs, collect, w = [], [], memory.needs, grpo.collect, WORK[shape]
    memory.needs = lambda *args: tables.append(needs(*args)) or tables[-1]
    grpo.collect = lambda *args: starts.append(until_now()) or collect(*args)
    if how["card_gb"]:
        only(how["card_gb"])
    RunFolder.save_checkpoint = RunFolder.save_final = lambda *args, **kwargs: None  # 16 bytes a parameter
    settings = dict(model=folder, task=f"{__file__}:Digits", sampler=sampler, steps=steps, lr=1e-6)
    settings |= dict(prompts_per_step=w["P"], group_size=w["G"], tokens_per_microbatch=w["microbatch"])
    settings |= dict(max_prompt_tokens=MAX_PROMPT, max_completion_tokens=w["longest"])
    settings |= dict(gradient_checkpointing=w["checkpointing"], eval_steps=0, eval_samples=1)
    fitted = memory.fitted
    memory.fitted = lambda *args: (fitted(*args), tables.append(None))[0]  # later tables are not of the run as it is
    metrics, rollouts = train(**settings | how["set"])
    found = []
    for row in metrics:
        rows = [r for r in rollouts if r["step"] == row["step"]]
        groups = [rows[i : i + w["G"]] for i in range(0, len(rows), w["G"])]
        live = [r for group in groups if len({r["reward"] for r in group}) > 1 for r in group]
        seconds = [row[f"seconds_{part}"] for part in ("sample", "train", "sync")]
        trained = [[len(r["prompt"]), r["length"]] for r in live]
        lengths, lora = [r["length"] for r in rows], bool(how["set"].get("lora_rank"))
        found.append(figures(shape, *seconds, lengths, trained, lora))
    table_of_run = tables[tables.index(None) - 1]
    parts = {key: value for key, value in table_of_run.items() if key != "CUDA"}
    by_arithmetic = memory.peak(parts) / 1e9
    found = dict(steps=found, peak=metrics[-1]["peak_memory"], by_arithmetic=by_arithmetic, memory_table=parts)
    return found | dict(start=starts[0])


def theirs(shape: str, folder: str, how: dict, partial: Path) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from harness.metrics import peak_memory

    on_gpu, w, rng, task, times = torch.cuda.is_available(), WORK[shape], random.Random(0), Digits(), []
    steps, sampler, starts = how["steps"], how["sampler"], []
    rows, longest = w["P"] * w["G"], MAX_PROMPT + w["longest"]
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and n * longest <= w["microbatch"])

    class Timed(GRPOTrainer):  # a step lasts from one sampling to the next
        def _generate(self, prompts):
            started = time.time()
            starts.append(until_now())
            if times:
                partial.write_text(json.dumps(result(started)))
            prompt_ids, completion_ids, *more = super()._generate(prompts)
            tokens = [[len(p), len(c)] for p, c in zip(prompt_ids, completion_ids, strict=True)]
            times.append((started, time.time(), tokens))
            return prompt_ids, completion_ids, *more

    def result(now: float) -> dict:
        """Of the steps that ended until now."""
        ends = [started for started, _, _ in times[1:]] + [now]
        found = [
            figures(shape, sampled - started, end - sampled, None, [c for _, c in tokens], tokens)
            for (started, sampled, tokens), end in zip(times, ends, strict=True)
        ]
        peak = peak_memory(torch.device("cuda" if on_gpu else "cpu"))
        return dict(steps=found, peak=peak, by_arithmetic=None, start=starts[0])

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            **OF_TRL, output_dir=out, per_device_train_batch_size=at_once, num_generations=w["G"], max_steps=steps,
            gradient_accumulation_steps=rows // at_once, max_completion_length=w["longest"], use_cpu=not on_gpu,
            bf16=on_gpu, gradient_checkpointing=w["checkpointing"],
            use_vllm=sampler == "vllm", vllm_max_model_length=longest, vllm_importance_sampling_correction=False,
        )  # fmt: skip
        Timed(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=config,
            train_dataset=Dataset.from_list([task.train(rng, 0) for _ in range(w["P"] * (steps + 1))]),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            reward_funcs=lambda completions, **kwargs: [task.reward(text, {})["reward"] for text in completions],
        ).train()  # fmt: skip
    return result(time.time())


def child(function: str, *arguments, limit: float | None = None) -> dict:
    """What the function returns, in a process of its own; or {"failed": why}. At the limit, what it has left so far."""
    with tempfile.TemporaryDirectory() as folder:
        answer, partial = Path(folder) / "answer.json", Path(folder) / "partial.json"
        command = [sys.executable, __file__, "--one", json.dumps([function, *arguments]), str(answer)]
        code = within(limit, command, HF_HUB_OFFLINE="1")
        why = f"no step ended within {limit:.0f} s" if code is None else f"ended with {code}"
        found = answer if answer.exists() else partial
        return json.loads(found.read_text()) if found.exists() else {"failed": why}


def answer(call: str, path: str) -> None:
    function, *arguments = json.loads(call)
    try:
        functions = {"prepare": prepare, "ours": ours, "TRL": theirs, "profile": gpu_profile.profile}
        result = functions[function](*arguments, Path(path).with_name("partial.json"))
    except Exception as error:  # of many kinds; memory that runs out is one
        traceback.print_exc()
        result = {"failed": ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])}
    Path(path).write_text(json.dumps(result))


def summary(steps: list[dict]) -> dict:
    """Of each figure the median, the smallest and the largest; None where it is not known."""
    found = {}
    for key in COLUMNS:
        values = [step[key] for step in steps if step[key] is not None]
        found[key] = dict(median=median(values), min=min(values), max=max(values)) if values else None
    return found


def cells(row: dict) -> list[str]:
    if "failed" in row:
        return [row["failed"], *[""] * (len(COLUMNS) + 4)]
    found = [row["sampler"], f"{row['start']:.0f}" if "start" in row else ""]
    for key, digits in COLUMNS.items():
        spread = [f"{value:,.{digits}f}" for value in (row["figures"][key] or {}).values()]
        found.append("{} ({} to {})".format(*spread) if spread else "in sampling")
    return found + [f"{row[key]:.1f}" if row[key] else "-" for key in ("peak", "by_arithmetic", "matmul_tflops")]


def report(rows: dict[tuple[str, str], dict], out: Path) -> None:
    """What was measured to JSON; all rows to a table, which is printed too."""
    measured, runs = [row for row in rows.values() if "command" in row], {}
    for row in measured:
        of = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        of += f", commit {row['commit'] or 'unknown'}, seed {row['seed']}, {row['number_of_steps']} steps"
        runs[f"`{row['command']}`: {row.get('device', 'unknown device')}, {of}."] = None
    heads = ["shape", "program", "sampler", "start", *COLUMNS, "peak GB", "by arithmetic", "matmul TFLOP/s"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n")
    write(out.with_suffix(".md"), *runs, table(" | ".join(heads), [[*key, *cells(row)] for key, row in rows.items()]))


def options() -> argparse.Namespace:
    shapes = [shape for shape in SIZES if shape != "tiny"]
    parser = arguments(
        __doc__, tiny="a toy, on any device, to gpu_tiny.md", one=2, shapes=dict.fromkeys(shapes), steps=6
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--versus", choices=["TRL"], help="measured first, in the same call")
    parser.add_argument("--limit", type=float, help="seconds for --versus, a shape")
    parser.add_argument("--profile", action="store_true", help="where an update's time goes, instead of whole steps")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of ours")
    parser.add_argument("--card_gb", type=float, default=0, help="as on a card of so many GB")
    parser.add_argument("--commit", default=commit(), help="where the repository is not at hand")
    found = parser.parse_args()
    found.shapes = ["tiny"] if found.tiny else found.shapes
    return found


def main() -> None:
    given = options()
    if given.one:
        return answer(*given.one)
    out, on_gpu = given.out / ("gpu_tiny" if given.tiny else "gpu"), torch.cuda.is_available()
    rows = {(shape, "ours"): {"failed": "not measured"} for shape in SIZES if (shape == "tiny") == given.tiny}
    if (before := out.with_suffix(".json")).exists():
        rows |= {(row["shape"], row["program"]): row for row in json.loads(before.read_text())}
    if not on_gpu and not given.tiny:
        report(rows, out)
        print("there is no CUDA GPU here: nothing was measured")
        return
    owners = packages_distributions()  # vLLM's builds go by several names
    packages = [package for package in ("torch", "transformers", "vllm", "trl") if package in owners]
    head = dict(command=" ".join(["python benchmarks/gpu.py", *sys.argv[1:]]), commit=given.commit, seed=0)
    head |= dict(versions={package: version(owners[package][0]) for package in packages})
    head |= dict(number_of_steps=given.steps, sampler="vllm" if on_gpu and find_spec("vllm") else "torch")
    how = dict(steps=given.steps, sampler=head["sampler"], card_gb=given.card_gb)
    how["set"] = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in given.set)}
    name = ", ".join(["ours", *given.set, *([f"{given.card_gb:g} GB"] if given.card_gb else [])])
    for shape in given.shapes:
        folder = Path(tempfile.gettempdir()) / f"grpo-{shape}"  # the same each time, for what vLLM has compiled
        prepared = child("prepare", shape, str(folder), 8192 if on_gpu else 256)
        row = head | dict(shape=shape, program=name, sizes=SIZES[shape], work=WORK[shape]) | prepared
        if given.profile:
            row |= {} if "failed" in row else child("profile", shape, how)
            print(gpu_profile.text(row), flush=True)
            kept = given.out / f"{out.name}_profile.jsonl"
            with open(kept, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        for program in [] if given.profile else [*([given.versus] if given.versus else []), name]:
            row, kind = row | dict(program=program), "ours" if program == name else program
            limit = given.limit if program == given.versus else None
            done = row if "failed" in row else row | child(kind, shape, str(folder), how, limit=limit)
            for step in done.get("steps", []):
                step["% of matmul"] = 100 * step["training TFLOP/s"] / done["matmul_tflops"]
            done |= {} if "failed" in done else dict(figures=summary(done["steps"][2:] or done["steps"]))
            rows[shape, program] = done
            report(rows, out)  # after each: a later one may be killed
            if given.tiny and "failed" in done:
                sys.exit(done["failed"])
        if given.tiny and "failed" in row:
            sys.exit(row["failed"])
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
