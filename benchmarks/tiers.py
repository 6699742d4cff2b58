"""Does a smaller footprint learn the same? Each memory setting on the small model, three seeds.

    pip install -r requirements-test.txt && python benchmarks/tiers.py

The shipped small model as a BLOOM of transformers, which computes the same and knows gradient checkpointing, on the
default task with a KL penalty of 0.001 toward the start, so that there is a reference model to put away. `reward` is
the mean over the last ten steps. `apart` is the mean over the steps of the difference from the float32 run of the same
seed; `noise` what two float32 runs of other seeds are apart. GB are those of training Qwen2.5-3B at the sizes of
countdown-3b.yaml on a card, by memory.py's arithmetic. Writes results/tiers.md.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import transformers
from arithmetic_seeds import ROOT
from compare_variants import run
from mathformer_vs_bloom import bloom_of
from step_time import origin

sys.path.insert(0, str(ROOT))
from harness import loading, memory
from harness.settings import parse_config

TIERS = {
    "float32": [],
    "gradient checkpointing": ["--gradient_checkpointing", "true"],
    "reference offloaded": ["--offload_reference", "true"],
    "adamw_8bit": ["--optimizer", "adamw_8bit"],
    "adamw_offload": ["--optimizer", "adamw_offload"],
    "all that saves": ["--optimizer", "adamw_offload", "--gradient_checkpointing", "true"]
    + ["--offload_reference", "true"],
}


def gigabytes(flags: list[str]) -> float:
    """Training Qwen2.5-3B on a card, torch's part."""
    shape = dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36)
    shape |= dict(num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True)
    config = parse_config(["--config", str(ROOT / "configs" / "countdown-3b.yaml")])
    config = replace(config, gradient_checkpointing=False, offload_reference=False)
    values = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    config = replace(config, **{name: value == "true" if value == "true" else value for name, value in values.items()})
    shape = memory.Shape.of(transformers.Qwen2Config(**shape))
    parts = memory.needs(shape, config, True, False, True, 80e9, memory.Spread())
    return sum(column[2] for column in parts.values()) / 1e9


def apart(a: list[float], b: list[float]) -> float:
    return fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=list(TIERS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tiers.md")
    options = parser.parse_args()
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines announce AMX and forbid it
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        model, tokenizer = loading.load_model("mathformer/pretrained")
        bloom_of(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        common = ["--model", folder, "--kl_coef", "0.001"]
        futures = {
            name: [pool.submit(run, [*common, *TIERS[name]], options.steps, seed) for seed in options.seeds]
            for name in options.tiers
        }
        results = {name: [future.result() for future in found] for name, found in futures.items()}
    large = results[options.tiers[0]]
    noise = [apart(a["rewards"], b["rewards"]) for a, b in combinations(large, 2)]
    what = (
        f"{options.steps} steps of 256 completions, four updates each, seeds {options.seeds}, {options.jobs} at a time"
    )
    lines = [
        f"{origin('python benchmarks/tiers.py', what)} Each cell has the seeds; accuracy in percent. "
        + (f"`noise` is {fmean(noise):.3f} ({min(noise):.3f} to {max(noise):.3f}).\n" if noise else "\n"),
        "| setting | flags | reward | apart | sampled accuracy | greedy | seconds | GB for 3B |",
        "| --- " * 8 + "|",
    ]
    for name, rows in results.items():
        cells = [
            " ".join(f"{fmean(row['rewards'][-10:]):.3f}" for row in rows),
            " ".join(f"{apart(a['rewards'], b['rewards']):.3f}" for a, b in zip(rows, large, strict=True)),
            " ".join(f"{100 * row['accuracy_sampled']:.1f}" for row in rows),
            " ".join(f"{100 * row['accuracy']:.1f}" for row in rows),
            " ".join(f"{row['seconds']:.0f}" for row in rows),
            f"{gigabytes(TIERS[name]):.0f}",
        ]
        lines.append(f"| {name} | {' '.join(TIERS[name])} | {' | '.join(cells)} |")
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
