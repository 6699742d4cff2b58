"""Does a smaller footprint learn the same? Each memory setting on the small model, three seeds.

    pip install -r requirements-test.txt && python benchmarks/tiers.py

The shipped small model as a BLOOM of transformers, which computes the same and knows gradient checkpointing, on the
default task with a KL penalty of 0.001 toward the start, so that there is a reference model to put away. `reward` is
the mean over the last ten steps. `apart` is the mean over the steps of the difference from the float32 run of the same
seed; `noise` what two float32 runs of other seeds are apart. GB are those of training Qwen2.5-3B at the sizes of
countdown-3b.yaml on a card, by memory.py's arithmetic.
"""

import os
import tempfile
from itertools import combinations
from statistics import fmean

from common import ROOT, arguments, arms_times_seeds, finished, flags, of_seeds, origin, table, write
from compare_variants import FOUR_UPDATES
from mathformer_vs_bloom import bloom_of
from shapes import model_config

from harness import loading, memory
from harness.command_line import parse_config

TIERS = {
    "float32": [],
    "gradient checkpointing": ["--gradient_checkpointing", "true"],
    "reference offloaded": ["--offload_reference", "true"],
    "adamw_8bit": ["--optimizer", "adamw_8bit"],
    "adamw_offload": ["--optimizer", "adamw_offload"],
    "all that saves": ["--optimizer", "adamw_offload", "--gradient_checkpointing", "true"]
    + ["--offload_reference", "true"],
    "LoRA, rank 1": ["--lora_rank", "1", "--lr", "1e-3"],
    "LoRA, rank 8": ["--lora_rank", "8", "--lr", "1e-3"],
    "LoRA, rank 32": ["--lora_rank", "32", "--lr", "1e-3"],
    "fp16, emulated": ["benchmarks/fp16_on_cpu.py"],
}
COLUMNS = {  # heading: key, scale, digits
    "reward": ("last_reward", 1, 3), "apart": ("apart", 1, 3), "sampled accuracy": ("accuracy_sampled", 100, 1),
    "greedy": ("accuracy", 100, 1), "seconds": ("seconds", 1, 0),
}  # fmt: skip


def run(arm: list[str], steps: int, seed: int) -> dict:
    """The last evaluation, the rewards of the steps, and `seconds` of the whole process."""
    program, *arm = arm if "benchmarks/fp16_on_cpu.py" in arm else ["grpo.py", *arm]
    command = [program, "--config", "configs/arithmetic.yaml", *FOUR_UPDATES, *arm]
    with finished(*command, *flags(steps=steps, seed=seed, eval_steps=0), OMP_NUM_THREADS="1") as done:
        row, metrics = done.read("eval.jsonl")[-1], done.read("metrics.jsonl")
    return row | {"seconds": done.seconds, "rewards": [m["reward"] for m in metrics]}


def gigabytes(arm: list[str]) -> float:
    """Training Qwen2.5-3B on a card, torch's part."""
    recipe = ["--config", str(ROOT / "configs" / "countdown-3b.yaml")]
    recipe += ["--gradient_checkpointing", "false", "--offload_reference", "false"]
    config = parse_config(recipe + (arm[1:] if arm and arm[0].endswith(".py") else arm))
    shape = memory.Shape.of(model_config("Qwen2.5-3B"))
    parts = memory.needs(shape, config, True, False, True, 80e9, memory.Spread())
    return sum(column[2] for column in parts.values()) / 1e9


def apart(a: list[float], b: list[float]) -> float:
    return fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = arguments(__doc__, "tiers.md", seeds=[0, 1, 2], steps=40, jobs=2, tiers=TIERS)
    options = parser.parse_args()
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines announce AMX and forbid it
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = loading.load_model("mathformer/pretrained")
        bloom_of(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        arms = {name: [*TIERS[name], "--model", folder, "--kl_coef", "0.001"] for name in options.tiers}
        results = arms_times_seeds(run, arms, options, options.seeds)
    large = results[options.tiers[0]]
    noise = [apart(a["rewards"], b["rewards"]) for a, b in combinations(large, 2)]
    begin = (
        f"`python benchmarks/tiers.py`, {options.steps} steps of 256 completions, four updates each, seeds "
        f"{options.seeds}, {options.jobs} at a time,"
    )
    about = f"{origin(begin)} Each cell has the seeds; accuracy in percent. "
    about += f"`noise` is {fmean(noise):.3f} ({min(noise):.3f} to {max(noise):.3f})." if noise else ""
    lines = []
    for name, rows in results.items():
        for row, of_large in zip(rows, large, strict=True):
            row |= dict(apart=apart(row["rewards"], of_large["rewards"]), last_reward=fmean(row["rewards"][-10:]))
        lines.append([name, " ".join(TIERS[name]), *of_seeds(rows, COLUMNS), f"{gigabytes(TIERS[name]):.0f}"])
    write(options.out, about, table(f"setting | flags | {' | '.join(COLUMNS)} | GB for 3B", lines))


if __name__ == "__main__":
    main()
