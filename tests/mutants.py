"""Puts each classic mistake into a copy of the source, and reports which tests notice. All must be caught.

    python tests/mutants.py                         every mistake, against tests/test_pitfalls.py (some minutes)
    python tests/mutants.py 6 15                    those of pitfalls 6 and 15
    python tests/mutants.py --tests tests           against the whole suite (hours)

The numbers are those of the tests in tests/test_pitfalls.py. Ends with 1 if a mistake survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    pitfall: int
    mistake: str
    file: str
    old: str  # occurs in the file exactly once
    new: str


MUTANTS = [
    Mutant(1, "the normaliser counts the prompt", "grpo.py",
           "total_tokens = sum(r.length for r in minibatch)", "total_tokens = sum(r.row_tokens for r in minibatch)"),
    Mutant(1, "the normaliser counts padding", "grpo.py",
           "count = TOKEN_WEIGHTS[kind](lengths.to(torch.get_default_dtype()), tokens, rows, max_tokens)",
           "count = TOKEN_WEIGHTS[kind](lengths.to(torch.get_default_dtype()), rows * int(lengths.max()), rows, max_tokens)"),
    Mutant(2, "a mean inside each microbatch", "grpo.py",
           "config.max_completion_tokens, total_tokens, total_rows)", "config.max_completion_tokens)"),
    Mutant(3, "a mean over each completion where the setting says tokens", "grpo.py",
           '"token": lambda lengths, tokens, rows, max_tokens: torch.full_like(lengths, tokens)',
           '"token": lambda lengths, tokens, rows, max_tokens: rows * lengths'),
    Mutant(3, "a plain sum where the setting says constant", "grpo.py",
           "torch.full_like(lengths, rows * max_tokens)", "torch.full_like(lengths, rows)"),
    Mutant(4, "the log-ratio of the KL the wrong way round", "grpo.py", "d = logps - ref_logps", "d = ref_logps - logps"),
    Mutant(4, "the KL penalty subtracted", "grpo.py",
           "loss + config.kl_coef * KL_IN_LOSS", "loss - config.kl_coef * KL_IN_LOSS"),
    Mutant(5, "k1 as a loss, without its factor", "grpo.py", '"k1": lambda ratio, k: ratio * k', '"k1": lambda ratio, k: k'),
    Mutant(5, "k3 as a loss, without its factor", "grpo.py", '"k3": lambda ratio, k: ratio * k', '"k3": lambda ratio, k: k'),
    Mutant(5, "k2 with a factor that has a gradient", "grpo.py",
           '"k2": lambda ratio, k: ratio.detach() * k', '"k2": lambda ratio, k: ratio * k'),
    Mutant(5, "exp(x) - 1 in place of expm1", "grpo.py", "return torch.expm1(-d) + d", "return torch.exp(-d) - 1 + d"),
    Mutant(6, "max in place of min", "grpo.py", "-torch.min(r * advantages", "-torch.max(r * advantages"),
    Mutant(6, "the clipped ratio alone", "grpo.py",
           "-torch.min(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)",
           "-r.clamp(1 - clip_low, 1 + clip_high) * advantages"),
    Mutant(7, "an epsilon of 1e-8", "grpo.py", "eps: float = 1e-4", "eps: float = 1e-8"),
    Mutant(7, "the std with G in its denominator", "grpo.py",
           "(r.std(1, keepdim=True) + eps)", "(r.std(1, keepdim=True, correction=0) + eps)"),
    Mutant(8, "dead groups left out of the totals", "grpo.py",
           "total_tokens = sum(r.length for r in minibatch)", "total_tokens = sum(r.length for r in minibatch if not r.dead)"),
    Mutant(8, "dead groups dropped under a KL penalty", "settings.py",
           'return self.dead_groups_teach_nothing if self.dead_groups == "auto"', 'return True if self.dead_groups == "auto"'),
    Mutant(8, "dead groups found by their advantages", "grpo.py",
           "    return rewards.amax(1) == rewards.amin(1)", "    return (rewards - rewards.mean(1, keepdim=True) == 0).all(1)"),
    Mutant(9, "the mask made from token values", "grpo.py",
           "hidden, targets = hidden[:, :-1][predicts], ids[:, 1:][predicts]",
           "predicts = predicts & (ids[:, 1:] != 2)\n        hidden, targets = hidden[:, :-1][predicts], ids[:, 1:][predicts]"),
    Mutant(9, "the end-of-sequence token cut off", "grpo.py", "lengths[rows[stopped]] = t + 1", "lengths[rows[stopped]] = t"),
    Mutant(10, "the prompt's last token is in the loss", "grpo.py",
           "(at >= prompt_lengths[:, None] - 1)", "(at >= prompt_lengths[:, None] - 2)"),
    Mutant(11, "dropout left on", "loading.py", "setattr(module, setting, 0.0)", "pass"),
    Mutant(12, "greedy where top_k is 0", "grpo.py", "            if temperature > 0:\n                token = torch.multinomial",
           "            if temperature > 0 and top_k:\n                token = torch.multinomial"),
    Mutant(13, "temperature in sampling only", "grpo.py",
           "(output_logits(self.model, hidden) / self.temperature).log_softmax(-1)",
           "output_logits(self.model, hidden).log_softmax(-1)"),
    Mutant(13, "the sampler's log-probs taken with top_k on", "settings.py",
           'return self.old_logps == "trainer" or not self.samples_all_tokens', 'return self.old_logps == "trainer"'),
    Mutant(14, "completions encoded again", "grpo.py", "        rollout.parts = judge(task, rollout.text, problem)",
           "        rollout.completion_ids = tokenizer(rollout.text, add_special_tokens=False)['input_ids']\n"
           "        rollout.parts = judge(task, rollout.text, problem)"),
    Mutant(15, "the self-test compares nothing after the change", "loading.py",
           '    require_equal("after the weights were changed")\n', ""),
    Mutant(15, "the self-test only warns", "loading.py",
           "if (found := gap(rollouts)) > MAX_LOGP_GAP:", "if (found := gap(rollouts)) > 1e9:"),
    Mutant(16, "weights in bf16", "loading.py", "dtype=torch.float32, output", "dtype=torch.bfloat16, output"),
    Mutant(17, "eval in the verifier", "tasks.py", "    right = found is not None and",
           "    try:\n        found = (eval(answer), [int(n) for n in re.findall(r'\\d+', answer)])\n"
           "    except Exception:\n        found = None\n    right = found is not None and"),
    Mutant(17, "the first answer, also inside the thinking", "tasks.py",
           "    part = final_part(text)\n    if part is None or part.count(\"<answer>\") != 1 or part.count(\"</answer>\") != 1:\n        return None\n"
           "    match = re.search(\"<answer>(.*)</answer>\", part, re.DOTALL)",
           "    match = re.search(\"<answer>(.*?)</answer>\", text, re.DOTALL)"),
    Mutant(18, "commas left in numbers", "tasks.py", '.replace(",", "")', ""),
    Mutant(18, "an answer that cannot be read is right", "tasks.py",
           "correct = bool(found) and verify", "correct = not found or verify"),
    Mutant(18, "a substring match pays", "tasks.py",
           'correct = prediction is not None and prediction == example["target"]',
           'correct = prediction is not None and str(prediction) in str(example["target"])'),
    Mutant(19, "no thought over several lines", "tasks.py",
           'is_whole = inside.startswith', 'is_whole = "\\n" not in before and inside.startswith'),
    Mutant(20, "the optimizer not restored", "run_folder.py",
           "                load_moments(optimizer, load_file(checkpoint / \"optimizer.state\"))\n", "                pass\n"),
    Mutant(20, "the batch of the last step drawn again", "grpo.py",
           'step, tokens, kl_coef = state["step"], ', 'step, tokens, kl_coef = max(0, state["step"] - 1), '),
    Mutant(20, "a changed learning rate goes on silently", "settings.py",
           "if was != now and is_fixed:", 'if was != now and is_fixed and f.name != "lr":'),
    Mutant(21, "the entropy divided twice", "grpo.py",
           '"entropy": per_token("entropy", sums)', '"entropy": per_token("entropy", sums) / sums["tokens"]'),
    Mutant(21, "the last microbatch's loss logged", "grpo.py",
           "                sums.update(numbers)\n", "                sums.update(numbers)\n                sums['loss'] = numbers['loss']\n"),
    Mutant(21, "the share of dead groups over completions", "grpo.py",
           '"zero_advantage_groups": dead_groups(rewards).double().mean()',
           '"zero_advantage_groups": dead_groups(rewards).double().mean() / group_size'),
    Mutant(21, "the norm of the gradient after the clip", "grpo.py",
           "                grad_norms.append(float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)))",
           "                accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)\n"
           "                grad_norms.append(float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)))"),
    Mutant(22, "no evaluation at step 0", "grpo.py", "is_due = step in (0, config.steps)", "is_due = step in (config.steps,)"),
    Mutant(22, "an evaluation with another seed each time", "grpo.py",
           "sampled = complete(sampler, tokenizer, task, problems, k, config.sampling, config.seed)",
           "sampled = complete(sampler, tokenizer, task, problems, k, config.sampling, config.seed + step)"),
    Mutant(23, "truncated answers not counted", "grpo.py",
           '"truncated": average(r.truncated for r in rollouts),\n        "reflections"', '"truncated": 0.0,\n        "reflections"'),
    Mutant(23, "the mask leaves truncated rows in the totals", "grpo.py",
           "total_tokens, len(minibatch))\n", "total_tokens, len(rollouts))\n"),
    Mutant(25, "advantages over the batch", "grpo.py",
           "advantages = ADVANTAGES[kind](rewards, rewards.mean(1, keepdim=True), eps)",
           "advantages = ADVANTAGES[kind](rewards, rewards.mean().expand(len(rewards), 1), eps)"),
    Mutant(25, "rows interleaved", "grpo.py", "problem = problems[i // group_size]", "problem = problems[i % len(problems)]"),
]  # fmt: skip


def run(mutant: Mutant, tests: list[str]) -> tuple[Mutant, list[str]]:
    """The names of the tests that fail with the mistake in place."""
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"pitfall {mutant.pitfall}, {mutant.mistake}: its line is not (once) in {mutant.file} any more")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "results"))
        (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, timeout=120)
        except subprocess.TimeoutExpired:  # `eval` of 99**98**97 does not come back
            return mutant, ["(the tests hang)"]
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.mistake}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return mutant, re.findall(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pitfalls", type=int, nargs="*", help="numbers of pitfalls; all if none is given")
    parser.add_argument("--tests", nargs="+", default=["tests/test_pitfalls.py"])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.pitfalls or m.pitfall in options.pitfalls]
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, caught_by in pool.map(lambda m: run(m, options.tests), chosen):
            survivors += not caught_by
            print(f"{mutant.pitfall:3} {mutant.mistake:58} {', '.join(caught_by) or 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} mistakes, {survivors} not caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
