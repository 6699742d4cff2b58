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
    tests: tuple[str, ...]  # arguments of pytest; one of these tests fails


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


def setting(names: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    """One that the real run of two steps with another value of one of these settings notices."""
    return Mutant(mistake, where, old, new, ("tests/test_settings.py", "-k", " or ".join(names.split())))


def mutant(tests: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return Mutant(mistake, where, old, new, tuple(f"tests/{test}" for test in tests.split()))


# Each part was proven and its wiring was not: these went through the whole suite once.
WIRING = [
    setting("lr_schedule warmup", "the learning rate's schedule logged only", "update",
            'group["lr"] = learning_rate(config, step)', 'group["lr"] = config.lr'),
    setting("entropy_coef", "the entropy bonus without a gradient", "setup",
            "Policy(model, config.temperature, entropy_gradient=config.entropy_coef > 0)",
            "Policy(model, config.temperature)"),
    mutant("test_run.py::test_the_newest_checkpoints_stay_when_their_numbers_get_longer", "checkpoints sorted as text",
           "RunFolder.checkpoints", 'int(path.name.split("-")[1])', 'path.name'),
    mutant("test_run.py::test_one_gradient_that_is_not_finite_does_no_lasting_harm", "zero_grad after a good step only",
           "update", "optimizer.zero_grad()", "if grad_norms and math.isfinite(grad_norms[-1]):\n    optimizer.zero_grad()"),
    mutant("test_arguments.py::test_an_argument_of_pretraining", "the second phase has the first one's share of steps",
           "pretrain", "config.prob_scratchpad if step < first_phase else config.final_prob_scratchpad",
           "config.prob_scratchpad"),
    mutant("test_arguments.py::test_pretraining_teaches_answers_and_their_end_on_problems_that_are_not_held_out",
           "the labels include the prompt", "batches", "[-100] * len(prompt) + answer", "prompt + answer"),
    mutant("test_arguments.py::test_pretraining_teaches_answers_and_their_end_on_problems_that_are_not_held_out",
           "the end of an answer is no label", "batches", "[-100] * len(prompt) + answer + eos + [-100] * gap",
           "[-100] * len(prompt) + answer + [-100] + [-100] * gap"),
    mutant("test_arguments.py::test_pretraining_teaches_answers_and_their_end_on_problems_that_are_not_held_out",
           "evaluation problems in pretraining", "batches", "task.draw(rng, for_eval=False)", "task.draw(rng, for_eval=None)"),
    mutant("test_run.py::test_every_end_token_of_a_model_ends_its_answers", "the generation config's end tokens ignored",
           "find_eos", "(model.generation_config.eos_token_id, model.config.eos_token_id)", "(model.config.eos_token_id,)"),
    mutant("test_run.py::test_prompt_and_completion_must_fit_the_window_together", "the window is for the completion alone",
           "check_window", "config.max_prompt_tokens + config.max_completion_tokens > window",
           "config.max_completion_tokens > window"),
    setting("gradient_checkpointing", "the policy not in training mode: checkpointing is inert", "update",
            "policy.train()", "policy.eval()"),
    mutant("test_run.py::test_the_csv_has_the_parts_that_come_later", "the header of the CSV from its first row",
           "RunFolder.write_csv",
           "csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))",
           'csv.DictWriter(file, list(rows[0]), extrasaction="ignore")'),
    mutant("test_run.py::test_steps_end_a_run_only_if_none_of_their_updates_was_good", "alarms count minibatches, not epochs",
           "train", "run_folder.Alarms(config.epochs * config.minibatches)", "run_folder.Alarms(config.minibatches)"),
    setting("kl_target", "the adapted KL coefficient does not reach the reward", "train",
            "assign_advantages(rollouts, now)", "assign_advantages(rollouts, config)"),
    setting("kl_target", "the adapted KL coefficient does not reach the loss", "train",
            "update(policy, optimizer, accelerator, rollouts, now, step)",
            "update(policy, optimizer, accelerator, rollouts, config, step)"),
    mutant("test_sampler.py::test_temperature_comes_first_then_top_k_then_top_p", "temperature after top-k and top-p",
           "TorchSampler._generate", "keep_top(logits / temperature, top_k, top_p)",
           "keep_top(logits, top_k, top_p) / temperature"),
    mutant("test_sampler.py::test_temperature_comes_first_then_top_k_then_top_p", "top-p before top-k",
           "TorchSampler._generate", "keep_top(logits / temperature, top_k, top_p)",
           "keep_top(keep_top(logits / temperature, 0, top_p), top_k, 1.0)"),
    setting("sample_rows", "rows at a time counted in prompts", "TorchSampler.generate",
            "self.sample_rows // group_size", "self.sample_rows"),
    setting("precision", "the sampler not in bf16", "setup",
            "TorchSampler(of_sampler, eos, config.sample_rows, accelerator.autocast, source=model)",
            "TorchSampler(of_sampler, eos, config.sample_rows, source=model)"),
    setting("precision", "the reference not in bf16", "add_logps", "accelerator.autocast()",
            'accelerator.autocast() if name == "old_logps" else nullcontext()'),
    mutant("test_run.py::test_a_prompt_that_is_drawn_again_is_sampled_anew", "a prompt drawn again gets the same seed",
           "collect", "config.seed * 1_000_003 + step + 500_009 * attempt", "config.seed * 1_000_003 + step"),
    setting("reflection_words", "words of reflection with their case", "rollout_metrics", "re.IGNORECASE", "0"),
    mutant("test_arguments.py::test_an_argument_of_a_task", "eval_size ignored by MATH", "Math.__init__",
           "[example for example in examples if example][: eval_size or None]",
           "[example for example in examples if example]"),
    setting("overlong_share", "the logged reward net of penalties", "rollout_metrics",
            "average(r.reward for r in rollouts)", "average(r.reward - r.penalty for r in rollouts)"),
    mutant("test_arguments.py::test_an_argument_of_a_task", "format_weight ignored by Countdown", "Countdown.reward",
           'self.format_weight * parts["format"]', 'parts["format"]'),
    mutant("test_arguments.py::test_an_argument_of_a_task", "format_weight ignored by MATH", "Math.reward",
           'self.format_weight * parts["format"]', '0.1 * parts["format"]'),
    mutant("test_see_the_run.py::test_the_model_card_says_what_was_done_and_its_lines_load_the_model",
           "the model card's tokens of the first row", "model_card", 'metrics[-1]["tokens"]', 'metrics[0]["tokens"]'),
    mutant("test_arguments.py::test_train_rl_says_whether_the_intervals_are_apart", "worse is never apart", "train_rl",
           'last["accuracy_low"] > first["accuracy_high"] or first["accuracy_low"] > last["accuracy_high"]',
           'last["accuracy_low"] > first["accuracy_high"]'),
    mutant("test_expressions.py::test_what_is_held_out_stays_held_out", "another rule for what is held out", "held_out",
           "zlib.crc32(render(tree).encode()) % 20 == 0", "zlib.crc32(render(tree).encode()) % 10 == 0"),
    mutant("test_tasks.py::test_synthetic_problems_are_of_the_kind_and_held_out", "another rule for held-out Countdown",
           "countdown_problem", 'zlib.crc32(f"{sorted(nums)} {target}".encode()) % 20 == 0',
           'zlib.crc32(f"{nums} {target}".encode()) % 20 == 0'),
]  # fmt: skip

MUTANTS = PITFALLS + WIRING
