"""Plausible one-line mistakes, each with the test of behaviour that notices it. tests/mutation.py makes them.

The code that a mistake replaces is named by function and expression, so that it is found wherever it moves and however
it is laid out. The first part are the mistakes of readable GRPO code elsewhere, numbered as in tests/test_pitfalls.py.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    mistake: str
    where: str  # a function, `Class.method`, or a name that is assigned: in one place of the project
    old: str  # an expression, or statements, in there
    new: str
    tests: tuple[str, ...]  # of which one fails


def pitfall(number: int, mistake: str, where: str, old: str, new: str) -> Mutant:
    return Mutant(f"pitfall {number}: {mistake}", where, old, new, ("tests/test_pitfalls.py",))


PITFALLS = [
    pitfall(1, "the normaliser counts the prompt", "update",
            "sum(r.length for r in minibatch)", "sum(r.row_tokens for r in minibatch)"),
    pitfall(1, "the normaliser counts padding", "token_weights",
            "TOKEN_WEIGHTS[kind](lengths.to(torch.get_default_dtype()), tokens, rows, max_tokens)",
            "TOKEN_WEIGHTS[kind](lengths.to(torch.get_default_dtype()), rows * int(lengths.max()), rows, max_tokens)"),
    pitfall(2, "a mean inside each microbatch", "batch_loss",
            "token_weights(lengths, config.loss_weight, config.max_completion_tokens, total_tokens, total_rows)",
            "token_weights(lengths, config.loss_weight, config.max_completion_tokens)"),
    pitfall(3, "a mean over each completion where the setting says tokens", "TOKEN_WEIGHTS",
            "torch.full_like(lengths, tokens)", "rows * lengths"),
    pitfall(3, "a plain sum where the setting says constant", "TOKEN_WEIGHTS",
            "torch.full_like(lengths, rows * max_tokens)", "torch.full_like(lengths, rows)"),
    pitfall(4, "the log-ratio of the KL the wrong way round", "kl_estimate", "logps - ref_logps", "ref_logps - logps"),
    pitfall(4, "the KL penalty subtracted", "batch_loss",
            "loss + config.kl_coef * KL_IN_LOSS[config.kl_kind]((logps - old).exp(), kl)",
            "loss - config.kl_coef * KL_IN_LOSS[config.kl_kind]((logps - old).exp(), kl)"),
    pitfall(5, "k1 as a loss, without its factor", "KL_IN_LOSS",
            '{"k1": lambda ratio, k: ratio * k, "k2": lambda ratio, k: ratio.detach() * k, "k3": lambda ratio, k: ratio * k}',
            '{"k1": lambda ratio, k: k, "k2": lambda ratio, k: ratio.detach() * k, "k3": lambda ratio, k: ratio * k}'),
    pitfall(5, "k3 as a loss, without its factor", "KL_IN_LOSS",
            '{"k1": lambda ratio, k: ratio * k, "k2": lambda ratio, k: ratio.detach() * k, "k3": lambda ratio, k: ratio * k}',
            '{"k1": lambda ratio, k: ratio * k, "k2": lambda ratio, k: ratio.detach() * k, "k3": lambda ratio, k: k}'),
    pitfall(5, "k2 with a factor that has a gradient", "KL_IN_LOSS", "ratio.detach() * k", "ratio * k"),
    pitfall(5, "exp(x) - 1 in place of expm1", "kl_estimate", "torch.expm1(-d) + d", "torch.exp(-d) - 1 + d"),
    pitfall(6, "max in place of min", "policy_loss",
            "torch.min(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)",
            "torch.max(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)"),
    pitfall(6, "the clipped ratio alone", "policy_loss",
            "torch.min(r * advantages, r.clamp(1 - clip_low, 1 + clip_high) * advantages)",
            "r.clamp(1 - clip_low, 1 + clip_high) * advantages"),
    pitfall(7, "an epsilon of 1e-8", "group_advantages", "1e-4", "1e-8"),
    pitfall(7, "the std with G in its denominator", "ADVANTAGES",
            "r.std(1, keepdim=True)", "r.std(1, keepdim=True, correction=0)"),
    pitfall(8, "dead groups left out of the totals", "update",
            "sum(r.length for r in minibatch)", "sum(r.length for r in minibatch if not r.dead)"),
    pitfall(8, "dead groups dropped under a KL penalty", "Config.drops_dead_groups",
            'self.dead_groups_teach_nothing if self.dead_groups == "auto" else self.dead_groups != "keep"',
            'True if self.dead_groups == "auto" else self.dead_groups != "keep"'),
    pitfall(8, "dead groups found by their advantages", "dead_groups",
            "rewards.amax(1) == rewards.amin(1)", "(rewards - rewards.mean(1, keepdim=True) == 0).all(1)"),
    pitfall(9, "the mask made from token values", "Policy.forward",
            "hidden, targets = hidden[:, :-1][predicts], ids[:, 1:][predicts]",
            """
            predicts = predicts & (ids[:, 1:] != 2)
            hidden, targets = hidden[:, :-1][predicts], ids[:, 1:][predicts]
            """),
    pitfall(9, "the end-of-sequence token cut off", "TorchSampler._generate",
            "lengths[rows[stopped]] = t + 1", "lengths[rows[stopped]] = t"),
    pitfall(10, "the prompt's last token is in the loss", "Policy.forward",
            "at >= prompt_lengths[:, None] - 1", "at >= prompt_lengths[:, None] - 2"),
    pitfall(11, "dropout left on", "load_model", "setattr(module, setting, 0.0)", "None"),
    pitfall(12, "greedy where top_k is 0", "TorchSampler._generate",
            "if temperature > 0:\n    token = torch.multinomial(distribution.exp(), 1, generator=self.generator)\n"
            "else:\n    token = distribution.argmax(-1, keepdim=True)",
            "if temperature > 0 and top_k:\n    token = torch.multinomial(distribution.exp(), 1, generator=self.generator)\n"
            "else:\n    token = distribution.argmax(-1, keepdim=True)"),
    pitfall(13, "temperature in sampling only", "Policy._token_logps",
            "output_logits(self.model, hidden) / self.temperature", "output_logits(self.model, hidden)"),
    pitfall(13, "the sampler's log-probs taken with top_k on", "Config.uses_trainer_logps",
            'self.old_logps == "trainer" or not self.samples_all_tokens', 'self.old_logps == "trainer"'),
    pitfall(14, "completions encoded again", "complete", "rollout.parts = judge(task, rollout.text, problem)",
            """
            rollout.completion_ids = tokenizer(rollout.text, add_special_tokens=False)["input_ids"]
            rollout.parts = judge(task, rollout.text, problem)
            """),
    pitfall(15, "the self-test compares nothing after the change", "check_sampler",
            'require_equal("after the weights were changed")', "None"),
    pitfall(15, "the self-test only warns", "check_sampler.require_equal",
            "(found := gap(rollouts)) > MAX_LOGP_GAP", "(found := gap(rollouts)) > 1e9"),
    pitfall(16, "weights in bf16", "load_model", "torch.float32", "torch.bfloat16"),
    pitfall(17, "eval in the verifier", "countdown_reward",
            "equation_value(answer) if answer is not None else None",
            "(eval(answer), [int(n) for n in re.findall(r'\\d+', answer)]) if answer is not None else None"),
    pitfall(17, "the first answer, also inside the thinking", "answer_block",
            """
            part = final_part(text)
            if part is None or part.count("<answer>") != 1 or part.count("</answer>") != 1:
                return None
            match = re.search("<answer>(.*)</answer>", part, re.DOTALL)
            """,
            'match = re.search("<answer>(.*?)</answer>", text, re.DOTALL)'),
    pitfall(18, "commas left in numbers", "plain_number",
            'text.replace("$", "").replace(",", "").replace("+", "")', 'text.replace("$", "").replace("+", "")'),
    pitfall(18, "an answer that cannot be read is right", "math_reward",
            'bool(found) and verify(example["gold"], found, timeout_seconds=SECONDS)',
            'not found or verify(example["gold"], found, timeout_seconds=SECONDS)'),
    pitfall(18, "a substring match pays", "gsm8k_reward",
            'prediction is not None and prediction == example["target"]',
            'prediction is not None and str(prediction) in str(example["target"])'),
    pitfall(19, "no thought over several lines", "is_think_then_answer",
            'inside.startswith("<answer>") and inside.endswith("</answer>")',
            '"\\n" not in before and inside.startswith("<answer>") and inside.endswith("</answer>")'),
    pitfall(20, "the optimizer not restored", "RunFolder.resume",
            'load_moments(optimizer, load_file(checkpoint / "optimizer.state"))', "None"),
    pitfall(20, "the batch of the last step drawn again", "train", 'state["step"]', 'max(0, state["step"] - 1)'),
    pitfall(20, "a changed learning rate goes on silently", "parse_config",
            "was != now and is_fixed", 'was != now and is_fixed and f.name != "lr"'),
    pitfall(21, "the entropy divided twice", "update",
            'per_token("entropy", sums)', 'per_token("entropy", sums) / sums["tokens"]'),
    pitfall(21, "the last microbatch's loss logged", "update", "sums.update(numbers)",
            'sums.update(numbers | {"loss": numbers["loss"] - sums["loss"]})'),
    pitfall(21, "the share of dead groups over completions", "rollout_metrics",
            "dead_groups(rewards).double().mean()", "dead_groups(rewards).double().mean() / config.group_size"),
    pitfall(21, "the norm of the gradient after the clip", "update",
            "grad_norms.append(float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)))",
            """
            accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)
            grad_norms.append(float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)))
            """),
    pitfall(22, "no evaluation at step 0", "train", "step in (0, config.steps)", "step in (config.steps,)"),
    pitfall(22, "an evaluation with another seed each time", "evaluate",
            "complete(sampler, tokenizer, task, problems, k, config.sampling, config.seed)",
            "complete(sampler, tokenizer, task, problems, k, config.sampling, config.seed + step)"),
    pitfall(23, "truncated answers not counted", "rollout_metrics", "average(r.truncated for r in rollouts)", "0.0"),
    pitfall(23, "the mask leaves truncated rows in the totals", "update",
            "batch_loss(policy, batch, config, accelerator.device, total_tokens, len(minibatch))",
            "batch_loss(policy, batch, config, accelerator.device, total_tokens, len(rollouts))"),
    pitfall(25, "advantages over the batch", "group_advantages",
            "ADVANTAGES[kind](rewards, rewards.mean(1, keepdim=True), eps)",
            "ADVANTAGES[kind](rewards, rewards.mean().expand(len(rewards), 1), eps)"),
    pitfall(25, "rows interleaved", "complete", "problems[i // group_size]", "problems[i % len(problems)]"),
]  # fmt: skip
MUTANTS = PITFALLS
