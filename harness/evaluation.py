"""Evaluation: how often the model is right, with intervals; what that says about learning; and the table of it."""

import math
from statistics import fmean

import torch
from tqdm import tqdm

from harness.files import quoted
from harness.metrics import average, equal_rewards, groups_of, is_graded, part_means
from harness.prompts import Problem
from harness.run_folder import RunFolder
from harness.settings import Config
from harness.terminal import WATCH, EvaluationStopped


def is_due(step: int, evaluations: list[dict], config: Config) -> bool:
    """Before the first step, after the last and every `eval_steps`; but not again in a run that was resumed there."""
    in_turn = step in (0, config.steps) or (config.eval_steps and step % config.eval_steps == 0)
    return bool(in_turn) and (not evaluations or evaluations[-1]["step"] < step)


def is_done(evaluations: list[dict], config: Config) -> bool:
    """Whether the last evaluation of the run has been made."""
    return bool(evaluations) and evaluations[-1]["step"] >= config.steps


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, of which c are right, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, section 2.1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(complete, task, problems: list[Problem], config: Config, step: int) -> tuple[dict, list[dict]]:
    """Accuracy on `problems`, greedy and sampled `eval_samples` times each, with the same seed at every step.

    `complete(problems, group_size, sampling, seed, prefix="")` gives judged rollouts. Returns the row of eval.jsonl and
    the rows of eval-<step>.jsonl.
    """
    n, k = len(problems), config.eval_samples
    most_likely = config.most_likely
    is_forced = step == 0 and hasattr(task, "worked_prefix")  # what the model could do, if only it showed its steps
    with WATCH.evaluating(config, n, 1 + k + is_forced) as done:
        greedy = complete(problems, 1, most_likely, config.seed)
        done(n)
        sampled = complete(problems, k, config.sampling, config.seed)
        done(n + n * k)
        shown = complete(problems, 1, most_likely, config.seed, task.worked_prefix) if is_forced else []
        done(n + n * k + len(shown))
    groups = groups_of(sampled, k)
    right = [sum(r.parts["correct"] == 1 for r in group) for group in groups]
    accuracy = average(r.parts["correct"] == 1 for r in greedy)
    row = {"step": step, "n": n, "accuracy": accuracy}
    row["accuracy_low"], row["accuracy_high"] = wilson_interval(accuracy, n)
    row["accuracy_sampled"] = average(c / k for c in right)
    row["accuracy_sampled_low"], row["accuracy_sampled_high"] = clustered_interval([c / k for c in right])
    ks = sorted({2**i for i in range(k.bit_length())} | {k})
    row["pass_at_k"] = {str(j): average(pass_at_k(k, c, j) for c in right) for j in ks}
    row |= {"zero_advantage_groups": average(map(equal_rewards, groups)), "reward": average(r.reward for r in sampled)}
    row["graded_groups"] = average(map(is_graded, groups))
    row |= part_means(sampled)
    row |= {"length": average(r.length for r in sampled), "truncated": average(r.truncated for r in sampled)}
    if is_forced:
        row["accuracy_worked"] = average(r.parts["correct"] == 1 for r in shown)
    details = [
        {"prompt": r.prompt, "completion": r.text, **r.parts, "length": r.length, "sampled_correct": c / k}
        for r, c in zip(greedy, right, strict=True)
    ]
    return row, details


def evaluate_and_log(complete, run, config: Config, save_checkpoint, step: int) -> None:
    """An evaluation on the way, from `evaluate` to the folder and the terminal; the best so far is saved."""
    try:
        row, details = evaluate(complete, run.task, run.problems, config, step)
    except EvaluationStopped:
        return  # a resumed run evaluates here again
    run.folder.log_evaluation(row, details)
    if run.folder.has_new_best(step):
        save_checkpoint()
    if step == 0 or step < config.steps:  # the last one is shown beside the first
        tqdm.write(evaluation_table([row]) + ("" if step else f"\n  {verdict(row)}"))


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share seen in n trials (Wilson's, sound near 0 and 1 too)."""
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # rounding would leave a share of 0 or 1 outside
    return max(0.0, min(center - half, share)), min(1.0, max(center + half, share))


def clustered_interval(shares: list[float], z: float = 1.96) -> tuple[float, float]:
    """95 % interval of the mean of per-prompt shares: the prompts are the sample, not their completions.

    Where all prompts have the same share, it is Wilson's: 0 of 20 prompts does not mean that the share is exactly 0.
    """
    half = z * torch.tensor(shares).std().item() / math.sqrt(len(shares)) if len(shares) > 1 else 1.0
    if half == 0:
        return wilson_interval(shares[0], len(shares), z)
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
        "show their steps": [f"{row['worked']:.1%}" for row in rows if "worked" in row],
        "made to show steps": [f"{row['accuracy_worked']:.1%} right" for row in rows if "accuracy_worked" in row],
    }
    return "\n".join(f"  {name:18}" + "".join(f"{v:>22}" for v in values) for name, values in lines.items() if values)


def show_result(folder: RunFolder, seconds: float) -> None:
    """The last lines of a run: before and after, and the commands that show more of it."""
    last, best = folder.evaluations[-1], folder.best_step()
    print(evaluation_table([folder.evaluations[0], last]))
    run = folder.path
    print(f"{seconds:.0f} s. The model is in {run / 'final'}, its curves are in {run / 'curves.png'}.")
    row = next(row for row in folder.evaluations if row["step"] == best)
    if row["accuracy_sampled_low"] > last["accuracy_sampled_high"] and best:
        print(f"The model after step {best} was better than the last one: {folder.path / f'checkpoint-{best}'}.")
    print(f"  see the whole run     python -m view report {quoted(run)}")
    print(f"  try the model         python -m view play {quoted(run)}")
    again = f"--config {quoted(run / 'config.yaml')} --model {quoted(run / 'final')}"
    print(f"  train it further      python grpo.py {again}")


def show_stopped(folder: RunFolder, step: int) -> None:
    print(f"stopped after step {step}; go on with: python grpo.py --resume {quoted(folder.path)}")


def verdict(row: dict) -> str:
    """Will it learn? A forecast from the first evaluation, before hours are spent.

    GRPO learns from groups that disagree. The thresholds are a judgement from small models: the shipped base, with 37 %
    dead groups, learns in a minute; a base in which three groups of four were dead learned nothing in 120 steps.
    Cut-offs and wrong form only remark on it, unless nearly all completions have them: SmolLM2-135M, with half of its
    answers cut off, went from 12.5 to 67.5 %. Where hardly an answer is right, partial credit may lead there: with it,
    SmolLM2 went from 3 % right to 65 % in 20 steps, on sentences by a strict rule (docs/smollm2.md). What else it was
    tried on is in the tests.
    """
    k, dead, pass_1 = max(map(int, row["pass_at_k"])), row["zero_advantage_groups"], row["pass_at_k"]["1"]
    if k < 4:
        return "will it learn? eval_samples of 4 or more are needed to tell"
    gain = row["pass_at_k"][str(k)] - pass_1
    cut_off, in_form = row["truncated"], row["format"]
    is_led = gain < 0.1 and pass_1 < 0.5 and dead <= 0.5 and row["graded_groups"] >= 0.5
    few_disagree = dead > 0.75 or (gain < 0.1 and not is_led)
    hindered = pass_1 > 0.9 or few_disagree or cut_off > 0.9 or in_form < 0.03
    if hindered:
        answer = "unlikely"
    elif is_led:
        answer = "perhaps, if partial credit leads there: few answers are right yet"
    elif dead <= 0.5 and gain >= 0.2:
        answer = "yes"
    elif dead > 0.5:
        answer = "perhaps, slowly; a larger group_size leaves fewer dead groups"
    elif pass_1 < 0.5:
        answer = "perhaps, slowly; few_shot or harness.sft can show it how to answer"
    else:
        answer = "perhaps, slowly; harder problems leave more to learn"
    remarks = [
        (pass_1 > 0.9, "the problems are too easy, little is left to learn"),
        (pass_1 <= 0.9 and few_disagree, "too few groups disagree: take easier (or harder) problems, a "
         "larger group_size, a reward with partial credit, a warm start (harness.sft), or a better model"),
        (cut_off > 0.3, f"{cut_off:.0%} of the completions are cut off: raise max_completion_tokens"),
        (in_form < 0.2, f"{in_form:.0%} have the right form: change the prompt, or pay for the form"),
    ]  # fmt: skip
    facts = f"groups of {k}: {dead:.0%} dead, pass@1 {pass_1:.0%}, pass@{k} {pass_1 + gain:.0%}"
    return "; ".join([f"will it learn? {answer} ({facts})", *(text for holds, text in remarks if holds)])
