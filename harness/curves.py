"""The picture of a run, curves.png."""

from pathlib import Path
from statistics import fmean

from harness.files import read_rows


def plot(folder: Path) -> Path:
    """Draws curves.png: thin lines are steps, thick ones running means, points evaluations with 95 % intervals."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    metrics, evaluations = read_rows(folder / "metrics.jsonl"), read_rows(folder / "eval.jsonl")
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
    figure.suptitle(folder.name, parse_math=False)  # a model may be called m$_$
    figure.savefig(folder / "curves.png", dpi=110)
    return folder / "curves.png"
