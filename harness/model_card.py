"""The model card of a run, final/README.md: what it was made from, how, what came of it, and how to load it."""

import dataclasses
from pathlib import Path

import yaml

from harness.settings import CHANGEABLE_ON_RESUME, Config


def table(rows: list[tuple]) -> str:
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def model_card(config: Config, model_type: str, evaluations: list[dict], metrics: list[dict]) -> str:
    """Markdown with front matter for the Hub, from the rows of eval.jsonl and of metrics.jsonl."""
    is_ours = model_type == "mathformer"
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["grpo"]}
    if not is_ours and not Path(config.model).exists():  # a name on the Hub
        front["base_model"] = config.model
    first, last = evaluations[0], evaluations[-1]
    results = []
    for name, key in (("greedy accuracy", "accuracy"), ("sampled accuracy", "accuracy_sampled")):
        shares = [(row[key], row[f"{key}_low"], row[f"{key}_high"]) for row in (first, last)]
        results.append((name, *(f"{share:.1%} ({low:.1%} to {high:.1%})" for share, low, high in shares)))
    k = max(last["pass_at_k"], key=int)
    results.append((f"pass@{k}", *(f"{row['pass_at_k'][k]:.1%}" for row in (first, last))))
    results.append(("tokens of a sampled answer", *(f"{row['length']:.1f}" for row in (first, last))))
    fields = {f.name: f for f in dataclasses.fields(Config)}
    shown = [name for name in fields if name == "steps" or name not in CHANGEABLE_ON_RESUME]
    none = dataclasses.MISSING
    defaults = {k: f.default if f.default_factory is none else f.default_factory() for k, f in fields.items()}
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(
        front=yaml.safe_dump(front, sort_keys=False), model=config.model, task=config.task, steps=config.steps,
        prompts=config.prompts_per_step, group=config.group_size, seed=config.seed, tokens=metrics[-1]["tokens"],
        minutes=sum(row["seconds_sample"] + row["seconds_train"] + row["seconds_sync"] for row in metrics) / 60,
        n=last["n"], results=table(results),
        settings=table([(f"`{k}`", f"`{getattr(config, k)}`") for k in shown if getattr(config, k) != defaults[k]]),
        first="import mathformer  # of this project\n" if is_ours else "",
        register="mathformer.register_with_vllm()\n" if is_ours else "",
    )  # fmt: skip
