"""On a CUDA GPU: seconds a step, tokens a second, FLOP/s and memory, for shapes of 0.5 to 3 billion parameters.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --shapes Qwen2.5-0.5B       one shape; rows of other shapes stay in the table
    python benchmarks/gpu.py --tiny --out FOLDER         a toy on any device: does this script still run?

The shapes are those of Qwen models, the weights are random: there is no download. The next token of such a model is
close to uniform over V tokens, so K random tokens that end a completion (they are the model's eos_token_id, which both
programs read) give lengths of a geometric distribution with mean m = V / K, cut off at `longest`. K is chosen for the
mean that is wanted. With vLLM, K tokens are a cost that real models do not have: it compares each new token with them
one by one, some 5 us for 500 (1.3 ms a decoding step of 256 rows). A reward is a coin, by the CRC-32 of the text.

`ours` is grpo.train, `TRL` its GRPOTrainer, for the smaller shapes and where it is installed: same prompts, numbers of
completions, limits, learning rate, bf16 autocast over float32 weights, gradient checkpointing, tokens in a microbatch.
Both sample with vLLM where it is installed, else with torch. TRL's forward pass for importance weights of vLLM's
log-probs is off, as ours does none; its vLLM takes 0.3 of the card, its default. Each runs in a process of its own, and
writes no checkpoint. Sampling includes the rewards, but not in TRL; TRL's includes the sync.

Training FLOP/s count, for each completion that is trained (ours leaves groups of equal rewards out) of c tokens behind
a prompt of p, with L = p + c, and are divided by the seconds of training and by the rate of a product of two bf16
matrices of 8192 x 8192 on the same card before the shape's first row:

    6 * (parameters without embeddings) * L + 6 * vocabulary * hidden * c + 6 * layers * (width of all heads) * L^2

which is forward and backward pass, the causal half of attention, no padding, and nothing that is computed twice. Peak
memory is what torch has allocated at most (on a CPU, the process); by arithmetic is memory.py's table without what CUDA
itself takes. Figures are medians over the steps without the first two, in brackets the smallest and the largest.
Writes results/gpu.json, each row with all of this, and results/gpu.md from it.
"""

import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from against_trl import OF_TRL, Parity
from common import RESULTS, ROOT, arguments, commit, table, train, write

QWEN = dict(vocab_size=151936, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)
SIZES = {
    "Qwen2.5-0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "Qwen2.5-1.5B": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "Qwen3-1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16)
    | dict(num_key_value_heads=8, head_dim=128),
    "Qwen2.5-3B": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000),
}
# prompts, completions of each, their mean and largest number of tokens; microbatches as in configs/
WORK = {
    "Qwen2.5-0.5B": dict(P=32, G=8, mean=250, longest=512, microbatch=8192, checkpointing=False),
    "Qwen2.5-1.5B": dict(P=16, G=8, mean=500, longest=1024, microbatch=4096, checkpointing=False),
    "Qwen3-1.7B": dict(P=16, G=8, mean=500, longest=1024, microbatch=8192, checkpointing=True),
    "Qwen2.5-3B": dict(P=16, G=8, mean=400, longest=1024, microbatch=8192, checkpointing=True),
    "tiny": dict(P=2, G=2, mean=8, longest=16, microbatch=512, checkpointing=True),
}
MAX_PROMPT = 128
BESIDE_TRL = ["Qwen2.5-0.5B", "Qwen2.5-1.5B", "tiny"]
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


def model_config(shape: str):
    import transformers

    return getattr(transformers, f"Qwen{3 if 'Qwen3' in shape else 2}Config")(**QWEN | SIZES[shape])


def save_tokenizer(folder: str, vocabulary: int, eos: int) -> None:
    """One that writes token i as the number i and reads digits."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>" if i == eos else str(i): i for i in range(vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder)


def matmul(size: int) -> dict:
    """The rate of a matrix product on this card, and its name."""
    on_gpu, seconds = torch.cuda.is_available(), []
    where = dict(dtype=torch.bfloat16, device="cuda") if on_gpu else {}
    a, b = (torch.randn(size, size, **where) for _ in range(2))
    for _ in range(30):
        started = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or "a CPU"
    return {"device": name, "matmul_tflops": 2 * size**3 / median(seconds[10:]) / 1e12}


def prepare(shape: str, folder: str, matmul_size: int) -> dict:
    """A model of random weights, and its tokenizer."""
    import transformers

    config, work, low, high = model_config(shape), WORK[shape], 1.0, 1e6
    for _ in range(60):  # the mean of a geometric distribution cut off at n is m * (1 - exp(-n / m))
        m = (low + high) / 2
        low, high = (m, high) if m * (1 - math.exp(-work["longest"] / m)) < work["mean"] else (low, m)
    ends = random.Random(0).sample(range(10, config.vocab_size), round(config.vocab_size / m))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size, ends[0])
    return matmul(matmul_size) | {"parameters": model.num_parameters(), "end_tokens": len(ends)}


def figures(shape: str, sampling, training, sync, lengths: list[int], trained: list[list[int]]) -> dict:
    """Of one step; `trained` are tokens of prompt and completion."""
    from harness import memory

    s = memory.Shape.of(model_config(shape))
    body, head, attention = s.parameters - s.embeddings, s.vocabulary * s.hidden, s.layers * s.queries
    flops = sum(6 * (body * (p + c) + head * c + attention * (p + c) ** 2) for p, c in trained)
    seconds, tokens = sampling + training + (sync or 0), sum(lengths)
    values = (tokens / len(lengths), seconds, sampling, training, sync, tokens / seconds, flops / training / 1e12)
    return dict(zip(COLUMNS, values, strict=False))  # the last column needs the rate of matmul


def ours(shape: str, folder: str, steps: int, sampler: str) -> dict:
    from harness import memory
    from harness.run_folder import RunFolder

    tables, needs, w = [], memory.needs, WORK[shape]
    memory.needs = lambda *args: tables.append(needs(*args)) or tables[-1]  # the first is that of the run
    RunFolder.save_checkpoint = RunFolder.save_final = lambda *args, **kwargs: None  # 16 bytes a parameter
    settings = dict(model=folder, task=f"{__file__}:Digits", sampler=sampler, steps=steps, lr=1e-6)
    settings |= dict(prompts_per_step=w["P"], group_size=w["G"], tokens_per_microbatch=w["microbatch"])
    settings |= dict(max_prompt_tokens=MAX_PROMPT, max_completion_tokens=w["longest"])
    settings |= dict(gradient_checkpointing=w["checkpointing"], eval_steps=0, eval_samples=1)
    metrics, rollouts = train(**settings)
    found = []
    for row in metrics:
        rows = [r for r in rollouts if r["step"] == row["step"]]
        groups = [rows[i : i + w["G"]] for i in range(0, len(rows), w["G"])]
        live = [r for group in groups if len({r["reward"] for r in group}) > 1 for r in group]
        seconds = [row[f"seconds_{part}"] for part in ("sample", "train", "sync")]
        trained = [[len(r["prompt"]), r["length"]] for r in live]
        found.append(figures(shape, *seconds, [r["length"] for r in rows], trained))
    parts = {key: value for key, value in tables[0].items() if key != "CUDA"}
    by_arithmetic = memory.peak(parts) / 1e9
    return dict(steps=found, peak=metrics[-1]["peak_memory"], by_arithmetic=by_arithmetic, memory_table=parts)


def theirs(shape: str, folder: str, steps: int, sampler: str) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from harness.metrics import peak_memory

    on_gpu, w, rng, task, times = torch.cuda.is_available(), WORK[shape], random.Random(0), Digits(), []
    rows, longest = w["P"] * w["G"], MAX_PROMPT + w["longest"]
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and n * longest <= w["microbatch"])

    class Timed(GRPOTrainer):  # a step lasts from one sampling to the next
        def _generate(self, prompts):
            started = time.time()
            prompt_ids, completion_ids, *more = super()._generate(prompts)
            tokens = [[len(p), len(c)] for p, c in zip(prompt_ids, completion_ids, strict=True)]
            times.append((started, time.time(), tokens))
            return prompt_ids, completion_ids, *more

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
    ends = [started for started, _, _ in times[1:]] + [time.time()]
    found = [
        figures(shape, sampled - started, end - sampled, None, [c for _, c in tokens], tokens)
        for (started, sampled, tokens), end in zip(times, ends, strict=True)
    ]
    return dict(steps=found, peak=peak_memory(torch.device("cuda" if on_gpu else "cpu")), by_arithmetic=None)


def child(function: str, *arguments) -> dict:
    """What the function returns, in a process of its own; or {"failed": why}."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--one", json.dumps([function, *arguments]), str(answer)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        return json.loads(answer.read_text()) if answer.exists() else {"failed": f"ended with {done.returncode}"}


def answer(call: str, path: str) -> None:
    function, *arguments = json.loads(call)
    try:
        result = {"prepare": prepare, "ours": ours, "TRL": theirs}[function](*arguments)
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
        return [row["failed"], *[""] * (len(COLUMNS) + 3)]
    found = [row["sampler"]]
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
    heads = ["shape", "program", "sampler", *COLUMNS, "peak GB", "by arithmetic", "matmul TFLOP/s"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n")
    write(out.with_suffix(".md"), *runs, table(" | ".join(heads), [[*key, *cells(row)] for key, row in rows.items()]))


def main() -> None:
    shapes = [shape for shape in SIZES if shape != "tiny"]
    parser = arguments(
        __doc__, tiny="a toy, on any device, to gpu_tiny.md", one=2, shapes=dict.fromkeys(shapes), steps=6
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    if options.one:
        return answer(*options.one)
    if options.tiny:
        shapes = options.shapes = ["tiny"]
    out, on_gpu = options.out / ("gpu_tiny" if options.tiny else "gpu"), torch.cuda.is_available()
    keys = [(shape, program) for shape in shapes for program in ("ours", "TRL")[: 1 + (shape in BESIDE_TRL)]]
    rows = {key: {"failed": "not measured"} for key in keys}
    if (before := out.with_suffix(".json")).exists():
        rows |= {(row["shape"], row["program"]): row for row in json.loads(before.read_text())}
    if not on_gpu and not options.tiny:
        report(rows, out)
        print("there is no CUDA GPU here: nothing was measured")
        return
    owners = packages_distributions()  # vLLM's builds go by several names
    packages = [package for package in ("torch", "transformers", "vllm", "trl") if package in owners]
    head = dict(command=" ".join(["python benchmarks/gpu.py", *sys.argv[1:]]), commit=commit(), seed=0)
    head |= dict(versions={package: version(owners[package][0]) for package in packages})
    head |= dict(number_of_steps=options.steps, sampler="vllm" if on_gpu and find_spec("vllm") else "torch")
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            prepared = child("prepare", shape, folder, 8192 if on_gpu else 256)
            for program in (program for of, program in keys if of == shape):
                row = head | dict(shape=shape, program=program, sizes=SIZES[shape], work=WORK[shape]) | prepared
                row |= {} if "failed" in row else child(program, shape, folder, options.steps, row["sampler"])
                for step in row.get("steps", []):
                    step["% of matmul"] = 100 * step["training TFLOP/s"] / row["matmul_tflops"]
                row |= {} if "failed" in row else dict(figures=summary(row["steps"][2:] or row["steps"]))
                rows[shape, program] = row
                report(rows, out)  # after each: a later one may be killed
                if options.tiny and "failed" in row:
                    sys.exit(row["failed"])


if __name__ == "__main__":
    main()
