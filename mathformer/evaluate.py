"""Accuracy of a small model by depth, operator and digits; worked against direct; pass@k; will it learn?

    python -m mathformer.evaluate --checkpoint mathformer/pretrained
    python -m mathformer.evaluate --checkpoint runs/<run>/final --problems 2000 --out accuracy.json
    python -m mathformer.evaluate --checkpoint mathformer/pretrained --expression "(3+4)*5"

The problems are of the kind that the checkpoint was trained on, unless flags say otherwise, and in no training.
"""

import dataclasses
import json
import random
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import yaml

import grpo
from harness import devices, evaluation, loading, prompts
from harness.batching import policy_inputs
from harness.command_line import check_folder_of, errors_as_lines, parse_settings
from harness.metrics import average
from harness.terminal import printable
from mathformer.expressions import depth, leaves, parse, symbols
from mathformer.expressions import evaluate as evaluate_expression
from mathformer.model import SIZES
from mathformer.task import ArithmeticTask
from mathformer.tokenizer import ANSWER, build_tokenizer
from mathformer.train import SETTINGS_FILE, task_settings
from tasks import load_task


@dataclasses.dataclass
class EvaluationConfig:
    checkpoint: str
    """folder of a model that mathformer.train, mathformer.train_rl or grpo.py saved"""
    problems: int = 500
    """evaluation problems; the intervals shrink with the square root of it"""
    samples: int = 8
    """sampled completions of each problem, besides a greedy one: the largest k of pass@k"""
    temperature: float = 1.0
    """of those samples"""
    max_gen_len: int = 256
    """tokens after which a completion is cut off"""
    max_digits: int | None = None
    """digits of the numbers in a problem; like the next three, by default as the checkpoint was trained"""
    max_depth: int | None = None
    """operators on the longest path of a problem"""
    operators: str | None = None
    """operators that problems use: `+-*`, `+ - max next`, or `all`"""
    max_value: int | None = None
    """largest number in a problem and its steps"""
    expression: str = ""
    """show what the model does with this one expression, and nothing else"""
    out: str = ""
    """JSON file for the tables"""
    seed: int = 0
    """seed of the samples"""


def load_checkpoint(path: str, modelsize: str | None = None, num_experts: int | None = None, active_experts=None):
    """A small model and its tokenizer; the arguments that are not None must agree with it.

    Raises:
        grpo.UsageError: it is no small model, has another vocabulary, or another size than was asked for.
    """
    model, tokenizer = loading.load_model(path)
    kind, vocabulary = model.config.model_type, build_tokenizer().get_vocab()
    if kind != "mathformer":
        raise grpo.UsageError(f"{path} is a {kind} model: only one of mathformer.train fits here; for others, grpo.py")
    if tokenizer.get_vocab() != vocabulary or model.config.vocab_size != len(vocabulary):
        raise grpo.UsageError(
            f"{path} has another vocabulary, of {model.config.vocab_size} tokens in its model and "
            f"{len(tokenizer)} in its tokenizer: the arithmetic language has {len(vocabulary)} of its own"
        )
    c = model.config
    shape = (c.hidden_size, c.num_hidden_layers, c.num_attention_heads)
    size = next((name for name, other in SIZES.items() if other == shape), "x".join(map(str, shape)))
    found = {"modelsize": size, "num_experts": c.num_experts, "active_experts": c.active_experts}
    asked = {"modelsize": modelsize, "num_experts": num_experts, "active_experts": active_experts}
    for name, value in asked.items():
        if value is not None and value != found[name]:
            raise grpo.UsageError(f"{name} is {value!r}, but {path} has {found[name]!r}; leave the flag out")
    return model, tokenizer


def trained_on(checkpoint: str) -> dict:
    """What problems a model was trained on, as arguments of `ArithmeticTask`; {} if nothing says so."""
    folder = Path(checkpoint)
    if (folder / SETTINGS_FILE).is_file():
        return task_settings(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
    if (folder.parent / "config.yaml").is_file():  # a model in the folder of a GRPO run
        return task_settings(yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))["task_args"])
    return {}


def problem_settings(config) -> dict:
    """Arguments of `ArithmeticTask`: those of the checkpoint, overridden by what `config` sets."""
    names = ("max_digits", "max_depth", "operators", "max_value")
    return trained_on(config.checkpoint) | {k: v for k in names if (v := getattr(config, k)) is not None}


def accuracy_by(problems: list[dict], right: list[dict[str, float]]) -> list[dict]:
    """Rows of the table: for all problems, and for each depth, operator, number of digits and kind of result."""
    kinds: dict[str, list[int]] = {"all": list(range(len(problems)))}
    for i, problem in enumerate(problems):
        tree = parse(problem["expression"])
        names = [f"depth {depth(tree)}", *(f"operator {symbol}" for symbol in symbols(tree))]
        names.append(f"digits {max(len(str(abs(leaf))) for leaf in leaves(tree))}")
        names.append("result a fraction" if problem["value"].denominator > 1 else "result an integer")
        for name in names:
            kinds.setdefault(name, []).append(i)
    order = {"all": 0, "depth": 1, "operator": 2, "digits": 3, "result": 4}
    rows = []
    for name in sorted(kinds, key=lambda name: (order[name.split()[0]], name)):
        row = {"problems": name, "n": len(kinds[name])}
        for how in right[0]:
            row[how] = average(right[i][how] for i in kinds[name])
        row["greedy_low"], row["greedy_high"] = evaluation.wilson_interval(row["greedy"], row["n"])
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"  {'problems':20}{'n':>6}{'greedy':>24}{'sampled':>10}{'worked':>10}{'direct':>10}"]
    for row in rows:
        interval = f"{row['greedy']:.1%} [{100 * row['greedy_low']:.1f}, {100 * row['greedy_high']:.1f}]"
        numbers = "".join(f"{row[how]:>10.1%}" for how in ("sampled", "worked", "direct"))
        lines.append(f"  {row['problems']:20}{row['n']:>6}{interval:>24}{numbers}")
    return "\n".join(lines)


@torch.no_grad()
def expert_load(model, rollouts: list[grpo.Rollout]) -> list[list[float]]:
    """For each layer of a mixture of experts, the share of the token choices that falls on each expert; sums to 1."""
    inputs = policy_inputs(rollouts, model.device)
    ids = inputs["ids"]
    real = torch.arange(ids.shape[1], device=ids.device) < (inputs["prompt_lengths"] + inputs["lengths"])[:, None]
    routed = model(ids, output_router_logits=True).router_logits
    chosen = [logits[real.flatten()].topk(model.config.active_experts).indices.flatten() for logits in routed]
    return [(c.bincount(minlength=model.config.num_experts) / len(c)).tolist() for c in chosen]


def show_expression(text: str, sampler, tokenizer, task: ArithmeticTask, config: grpo.Config) -> None:
    """The greedy completion of one expression, the one that is made to show its steps, and what samples answer."""
    tree = parse(text)
    if isinstance(tree, int):
        raise ValueError(f"{text!r} is a number: there is nothing to work out")
    try:
        evaluate_expression(tree)
    except ZeroDivisionError as error:
        raise ValueError(f"{text!r} divides by zero") from error
    task.spaces = task.parentheses = 0.0
    example = task.example(tree, random.Random(0))
    problem = [prompts.Problem(example, *prompts.encode_prompt(tokenizer, task, example))]
    most_likely = config.sampling._replace(temperature=0.0)
    greedy, worked = (
        grpo.complete(sampler, tokenizer, task, problem, 1, most_likely, config.seed, prefix)[0]
        for prefix in ("", task.worked_prefix)
    )
    sampled = grpo.complete(sampler, tokenizer, task, problem, 100, config.sampling, config.seed)
    answers = Counter(r.parts["prediction"] for r in sampled).most_common(5)
    for name, rollout in (("most likely", greedy), ("made to show steps", worked)):
        print(f"  {name:20}{'right' if rollout.parts['correct'] else 'wrong'}  {printable(rollout.text, 1000)}")
    print(f"  {'of 100 samples':20}{', '.join(f'{n} answer {answer}' for answer, n in answers)}")
    print(f"  {'value':20}{example['value']}")


def evaluate(config: EvaluationConfig) -> dict | None:
    """Prints the tables and returns them as a dict; None if only an expression was shown."""
    check_folder_of(config.out)
    model, tokenizer = load_checkpoint(config.checkpoint)
    settings = grpo.Config(
        model=config.checkpoint,
        task="arithmetic",
        task_args=problem_settings(config) | {"eval_size": config.problems},
        eval_samples=config.samples,
        temperature=config.temperature,
        max_completion_tokens=config.max_gen_len,
        seed=config.seed,
    )
    task = load_task(settings.task, settings.task_args)
    loading.check_window(model.config, settings)
    device = devices.make_accelerator(settings).device
    sampler = grpo.TorchSampler(model.to(device), loading.find_eos(model, tokenizer), settings.sample_rows)
    with torch.no_grad():
        if config.expression:
            show_expression(config.expression, sampler, tokenizer, task, settings)
            return None
        problems = prompts.evaluation_problems(task, tokenizer, settings)
        print(f"{config.checkpoint} on {len(problems)} problems: {settings.task_args}")
        complete = partial(grpo.complete, sampler, tokenizer, task)
        row, details = evaluation.evaluate(complete, task, problems, settings, step=0)
        most_likely = settings.sampling._replace(temperature=0.0)
        forced = {
            how: complete(problems, 1, most_likely, config.seed, prefix)
            for how, prefix in (("worked", task.worked_prefix), ("direct", ANSWER))
        }
    right = [
        {"greedy": detail["correct"], "sampled": detail["sampled_correct"]}
        | {how: rollouts[i].parts["correct"] for how, rollouts in forced.items()}
        for i, detail in enumerate(details)
    ]
    rows = accuracy_by([problem.example for problem in problems], right)
    print(evaluation.evaluation_table([row]))
    print("  pass@k: " + ", ".join(f"{k}: {value:.1%}" for k, value in row["pass_at_k"].items()))
    print(f"  {evaluation.verdict(row)}\n\n{table(rows)}")
    print("  (worked: made to show its steps; direct: made to answer at once; both greedy; [..]: 95 % interval)")
    result = {"checkpoint": config.checkpoint, "settings": settings.task_args, "evaluation": row, "accuracy": rows}
    if model.config.num_experts > 1:
        result["expert_load"] = expert_load(model, forced["worked"])
        print("  share of the tokens of worked answers that each expert gets:")
        for layer, shares in enumerate(result["expert_load"]):
            print(f"  layer {layer + 1}: " + ", ".join(f"{share:.1%}" for share in shares))
    if config.out:
        Path(config.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main(args: list[str] | None = None) -> None:
    with errors_as_lines(ValueError):
        evaluate(parse_settings(EvaluationConfig, __doc__, args))


if __name__ == "__main__":
    main()
