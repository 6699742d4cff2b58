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
from dataclasses import replace
from itertools import combinations
from statistics import fmean

from common import ROOT, arguments, arms_times_seeds, of_seeds, origin, table, write
from compare_variants import run
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
}
COLUMNS = {  # heading: key, scale, digits
    "reward": ("last_reward", 1, 3), "apart": ("apart", 1, 3), "sampled accuracy": ("accuracy_sampled", 100, 1),
    "greedy": ("accuracy", 100, 1), "seconds": ("seconds", 1, 0),
}  # fmt: skip


def gigabytes(flags: list[str]) -> float:
    """Training Qwen2.5-3B on a card, torch's part."""
    config = parse_config(["--config", str(ROOT / "configs" / "countdown-3b.yaml")])
    config = replace(config, gradient_checkpointing=False, offload_reference=False)
    values = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    config = replace(config, **{name: value == "true" if value == "true" else value for name, value in values.items()})
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
        arms = {name: ["--model", folder, "--kl_coef", "0.001", *TIERS[name]] for name in options.tiers}
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
