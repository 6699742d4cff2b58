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
    pitfall(1, "the normaliser counts the prompt", "optimizer_step",
            "sum(r.length for r in rows)", "sum(len(r.prompt_ids) + r.length for r in rows)"),
    pitfall(1, "the normaliser counts padding", "token_weights",
            "weigh(as_floats, total_tokens, total_rows, max_tokens)",
            "weigh(as_floats, total_rows * int(lengths.max()), total_rows, max_tokens)"),
    pitfall(2, "a mean inside each microbatch", "batch_loss",
            "token_weights(lengths, config.loss_weight, limit, total_tokens, total_rows)",
            "token_weights(lengths, config.loss_weight, limit)"),
    pitfall(3, "a mean over each completion where the setting says tokens", "same_for_all_tokens",
            "torch.ones_like(lengths) / total_tokens", "1 / (total_rows * lengths)"),
    pitfall(3, "a plain sum where the setting says constant", "constant_weights",
            "torch.ones_like(lengths) / (total_rows * max_tokens)", "torch.ones_like(lengths) / total_rows"),
    pitfall(4, "the log-ratio of the KL the wrong way round", "kl_estimate", "logps - ref_logps", "ref_logps - logps"),
    pitfall(4, "the KL penalty subtracted", "batch_loss",
            "loss + config.kl_coef * (factor * kl)", "loss - config.kl_coef * (factor * kl)"),
    pitfall(5, "k1 as a loss, without its factor", "KL_FACTORS",
            '{"k1": lambda ratio: ratio, "k2": lambda ratio: ratio.detach()}',
            '{"k1": lambda ratio: 1.0, "k2": lambda ratio: ratio.detach()}'),
    pitfall(5, "k3 as a loss, without its factor", "KL_FACTORS",
            '{"k3": lambda ratio: ratio, **variants.KL_FACTORS}', '{"k3": lambda ratio: 1.0, **variants.KL_FACTORS}'),
    pitfall(5, "k2 with a factor that has a gradient", "KL_FACTORS", "ratio.detach()", "ratio"),
    pitfall(5, "exp(x) - 1 in place of expm1", "k3", "torch.expm1(-d) + d", "torch.exp(-d) - 1 + d"),
    pitfall(6, "max in place of min", "clipped_loss",
            "torch.min(gain, limited_gain)", "torch.max(gain, limited_gain)"),
    pitfall(6, "the clipped ratio alone", "clipped_loss", "torch.min(gain, limited_gain)", "limited_gain"),
    pitfall(7, "an epsilon of 1e-8", "group_advantages", "1e-4", "1e-8"),
    pitfall(7, "the std with G in its denominator", "grpo_advantages",
            "rewards.std(1, keepdim=True)", "rewards.std(1, keepdim=True, correction=0)"),
    pitfall(8, "dead groups left out of the totals", "optimizer_step",
            "sum(r.length for r in rows)", "sum(r.length for r in rows if not r.dead)"),
    pitfall(8, "dead groups dropped under a KL penalty", "Config.drops_dead_groups",
            'not self.loss_is_regularised if self.dead_groups == "auto" else self.dead_groups != "keep"',
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
            "lengths[unfinished[stopped]] = t + 1", "lengths[unfinished[stopped]] = t"),
    pitfall(10, "the prompt's last token is in the loss", "Policy.forward",
            "prompt_lengths[:, None] - 1", "prompt_lengths[:, None] - 2"),
    pitfall(11, "dropout left on", "load_model", "switch_off_noise(model)", "None"),
    pitfall(12, "greedy where top_k is 0", "TorchSampler._generate",
            "if temperature > 0:\n    token = variants.draw(all_logps.exp(), self.generator)\n"
            "else:\n    token = all_logps.argmax(-1, keepdim=True)",
            "if temperature > 0 and top_k:\n    token = variants.draw(all_logps.exp(), self.generator)\n"
            "else:\n    token = all_logps.argmax(-1, keepdim=True)"),
    pitfall(13, "temperature in sampling only", "Policy._token_logps",
            "output_logits(self.model, hidden) / self.temperature", "output_logits(self.model, hidden)"),
    pitfall(13, "the sampler's log-probs taken with top_k on", "Config.uses_trainer_logps",
            'self.old_logps == "trainer" or not self.samples_all_tokens', 'self.old_logps == "trainer"'),
    pitfall(14, "completions encoded again", "complete",
            "r.text += written_text(tokenizer, r, sampling.stop)",
            """
            r.text += written_text(tokenizer, r, sampling.stop)
            r.completion_ids = tokenizer(r.text, add_special_tokens=False)["input_ids"]
            """),
    pitfall(15, "the self-test compares nothing after the change", "check_sampler",
            'require_equal("after the weights were changed")', "None"),
    pitfall(15, "the self-test only warns", "check_sampler.require_equal",
            "(found := gap(samples)) > MAX_LOGP_GAP", "(found := gap(samples)) > 1e9"),
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
            'same(read_gold(example["answer"]), found)', 'not found or same(read_gold(example["answer"]), found)'),
    pitfall(18, "a substring match pays", "gsm8k_reward",
            'prediction is not None and prediction == example["target"]',
            'prediction is not None and str(prediction) in str(example["target"])'),
    pitfall(19, "no thought over several lines", "is_think_then_answer",
            'inside.startswith("<answer>") and inside.endswith("</answer>")',
            '"\\n" not in before and inside.startswith("<answer>") and inside.endswith("</answer>")'),
    pitfall(20, "the optimizer not restored", "RunFolder.resume",
            'load_moments(optimizer, moments)', "None"),
    pitfall(20, "the batch of the last step drawn again", "train", 'run.state["step"]', 'max(0, run.state["step"] - 1)'),
    pitfall(20, "a changed learning rate goes on silently", "check_resumed",
            "was != now and is_fixed and f.name not in config.may_have_changed", 'was != now and is_fixed and f.name != "lr"'),
    pitfall(21, "the entropy divided twice", "UpdateFigures.metrics",
            'per_token("entropy", sums)', 'per_token("entropy", sums) / sums["tokens"]'),
    pitfall(21, "the last microbatch's loss logged", "UpdateFigures.add_batch", "self.sums.update(sums)",
            'self.sums.update(sums | {"loss": sums["loss"] - self.sums["loss"]})'),
    pitfall(21, "the share of dead groups over completions", "rollout_metrics",
            "average(map(equal_rewards, groups))", "average(map(equal_rewards, groups)) / config.group_size"),
    pitfall(21, "the norm of the gradient after the clip", "optimizer_step",
            "norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip))",
            """
            accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip)
            norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.grad_clip))
            """),
    pitfall(22, "no evaluation at step 0", "is_due", "step in (0, config.steps)", "step in (config.steps,)"),
    pitfall(22, "an evaluation with another seed each time", "evaluate",
            "complete(problems, k, config.sampling, config.seed)",
            "complete(problems, k, config.sampling, config.seed + step)"),
    pitfall(23, "truncated answers not counted", "rollout_metrics", "average(r.truncated for r in rollouts)", "0.0"),
    pitfall(23, "the mask leaves truncated rows in the totals", "optimizer_step",
            """
            rows = [r for r in rows if not (r.truncated and config.mask_truncated)]
            totals = sum(r.length for r in rows), len(rows)
            """,
            """
            total_rows = len(rows)
            rows = [r for r in rows if not (r.truncated and config.mask_truncated)]
            totals = sum(r.length for r in rows), total_rows
            """),
    pitfall(25, "advantages over the batch", "group_advantages",
            "rewards.mean(1, keepdim=True)", "rewards.mean().expand(len(rewards), 1)"),
    pitfall(25, "rows interleaved", "complete", "problems[i // group_size]", "problems[i % len(problems)]"),
]  # fmt: skip


def setting(names: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    """One that the real run of two steps with another value of one of these settings notices."""
    return Mutant(mistake, where, old, new, ("tests/harness/test_settings.py", "-k", " or ".join(names.split())))


def mutant(tests: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return Mutant(mistake, where, old, new, tuple(f"tests/{test}" for test in tests.split()))


# Each part was proven and its wiring was not: these went through the whole suite once.
WIRING = [
    setting("lr_schedule warmup", "the learning rate's schedule logged only", "update",
            'group["lr"] = lr', 'group["lr"] = config.lr'),
    setting("entropy_coef", "the entropy bonus without a gradient", "setup",
            "Policy(model, config.temperature, entropy_gradient=config.entropy_coef > 0)",
            "Policy(model, config.temperature)"),
    mutant("test_run.py::test_the_newest_checkpoints_stay_when_their_numbers_get_longer", "checkpoints sorted as text",
           "RunFolder.checkpoints", 'number_of', 'str'),
    mutant("test_run.py::test_one_gradient_that_is_not_finite_does_no_lasting_harm", "zero_grad after a good step only",
           "optimizer_step", "optimizer.zero_grad()",
           "if norm is not None and math.isfinite(norm):\n    optimizer.zero_grad()"),
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
           "Progress.__init__", "Alarms(config.epochs * config.minibatches)", "Alarms(config.minibatches)"),
    setting("kl_target", "the adapted KL coefficient does not reach the reward", "train",
            "assign_advantages(rollouts, config)", "assign_advantages(rollouts, run.folder.config)"),
    setting("kl_target", "the adapted KL coefficient does not reach the loss", "train",
            "update(run.policy, run.optimizer, accelerator, rollouts, config, step)",
            "update(run.policy, run.optimizer, accelerator, rollouts, run.folder.config, step)"),
    mutant("test_sampler.py::test_temperature_comes_first_then_top_k_then_top_p", "temperature after top-k and top-p",
           "TorchSampler._generate", "variants.keep_top(logits / temperature, top_k, top_p)",
           "variants.keep_top(logits, top_k, top_p) / temperature"),
    mutant("test_sampler.py::test_temperature_comes_first_then_top_k_then_top_p", "top-p before top-k",
           "TorchSampler._generate", "variants.keep_top(logits / temperature, top_k, top_p)",
           "variants.keep_top(variants.keep_top(logits / temperature, 0, top_p), top_k, 1.0)"),
    setting("sample_rows", "rows at a time counted in prompts", "TorchSampler.generate",
            "self.sample_rows // group_size", "self.sample_rows"),
    setting("precision", "the sampler not in bf16", "setup",
            "TorchSampler(copied, run.eos_ids, rows, autocast, model, run.tokenizer)",
            "TorchSampler(copied, run.eos_ids, rows, source=model, tokenizer=run.tokenizer)"),
    setting("precision", "the reference not in bf16", "logps_under", "accelerator.autocast()",
            "torch.autocast(accelerator.device.type, enabled=False) if not next(policy.parameters()).requires_grad "
            "else accelerator.autocast()"),
    mutant("test_run.py::test_a_prompt_that_is_drawn_again_is_sampled_anew", "a prompt drawn again gets the same seed",
           "collect", "config.seed * 1_000_003 + step + 500_009 * attempt", "config.seed * 1_000_003 + step"),
    setting("reflection_words", "words of reflection with their case", "rollout_metrics", "re.IGNORECASE", "0"),
    mutant("test_arguments.py::test_an_argument_of_a_task", "eval_size ignored by MATH", "Math.__init__",
           '[math_example(row["problem"], row["answer"]) for row in tests][: eval_size or None]',
           '[math_example(row["problem"], row["answer"]) for row in tests]'),
    setting("overlong_share", "the logged reward net of penalties", "rollout_metrics",
            "average(r.reward for r in rollouts)", "average(r.reward - r.penalty for r in rollouts)"),
    mutant("test_arguments.py::test_an_argument_of_a_task", "format_weight ignored by Countdown", "Countdown.reward",
           'self.format_weight * parts["format"]', 'parts["format"]'),
    mutant("test_arguments.py::test_an_argument_of_a_task", "format_weight ignored by MATH", "Math.reward",
           'self.format_weight * parts["format"]', '0.1 * parts["format"]'),
    mutant("view/test_see_the_run.py::test_the_model_card_says_what_was_done_and_its_lines_load_the_model",
           "the model card's tokens of the first row", "model_card", 'metrics[-1]["tokens"]', 'metrics[0]["tokens"]'),
    mutant("test_arguments.py::test_train_rl_says_whether_the_intervals_are_apart", "worse is never apart", "train_rl",
           'last["accuracy_low"] > first["accuracy_high"] or first["accuracy_low"] > last["accuracy_high"]',
           'last["accuracy_low"] > first["accuracy_high"]'),
    mutant("mathformer/test_expressions.py::test_what_is_held_out_stays_held_out", "another rule for what is held out", "held_out",
           "zlib.crc32(render(tree).encode()) % 20 == 0", "zlib.crc32(render(tree).encode()) % 10 == 0"),
    mutant("tasks/test_tasks.py::test_synthetic_problems_are_of_the_kind_and_held_out", "another rule for held-out Countdown",
           "countdown_problem", 'zlib.crc32(f"{sorted(nums)} {target}".encode()) % 20 == 0',
           'zlib.crc32(f"{nums} {target}".encode()) % 20 == 0'),
]  # fmt: skip


# More of the kind, thought of by readers who looked for what no test sees.
FURTHER = [
    mutant("harness/test_evaluation.py::test_each_process_samples_its_own_problems_with_a_seed_of_its_own",
           "all processes sample with one seed", "complete", "parallel.own_seed(seed)", "seed"),
    mutant("harness/test_evaluation.py::test_prompts_that_were_too_long_are_counted_in_every_draw",
           "long prompts of the last draw alone", "collect", 'counts["prompts_too_long"] += too_long',
           'counts["prompts_too_long"] = too_long'),
    mutant("test_models.py::test_special_tokens_are_added_once", "special tokens in front of a prefix", "complete",
           'tokenizer(prefix, add_special_tokens=False)["input_ids"]', 'tokenizer(prefix)["input_ids"]'),
    mutant("test_models.py::test_special_tokens_are_added_once", "special tokens twice in a chat", "encode_prompt",
           "ids_of(tokenizer, prompt, add_special_tokens=not in_chat)", "ids_of(tokenizer, prompt)"),
    mutant("test_models.py::test_an_output_head_with_a_bias_is_used_whole", "the head's bias left out", "output_logits",
           "None if head.bias is None else head.bias.float()", "None"),
    mutant("test_run.py::test_a_model_that_is_not_causal_is_refused_before_any_work", "logits are not checked", "setup",
           "check_model(run, Policy, TorchSampler)", "None"),
    mutant("test_run.py::test_a_reference_has_the_precision_of_the_weights", "a reference in float32 always", "setup",
           "reference.to(next(run.policy.parameters()).dtype)", "None"),
    setting("temperature", "a reference without the temperature", "setup", "Policy(start, config.temperature)",
            "Policy(start)"),
    mutant("test_run.py::test_resumed_reference_is_the_first_model", "the reference from the checkpoint", "setup",
           "loading.load_model(config.model, trust_remote_code=config.trust_remote_code)",
           "loading.load_model(run.source, trust_remote_code=config.trust_remote_code)"),
    mutant("test_run.py::test_the_memory_of_vllm_is_counted_where_it_samples", "memory of the other sampler", "load",
           'memory.fitted(model_config, config, accelerator, sampler == "vllm")',
           'memory.fitted(model_config, config, accelerator, sampler == "torch")'),
    mutant("test_run.py::test_code_of_a_model_is_trusted_wherever_it_is_loaded", "code of the policy is not trusted",
           "load", "load_model(name, config.gradient_checkpointing, config.trust_remote_code)",
           "load_model(name, config.gradient_checkpointing)"),
    mutant("test_run.py::test_code_of_a_model_is_trusted_wherever_it_is_loaded", "code of the reference is not trusted",
           "setup", "loading.load_model(config.model, trust_remote_code=config.trust_remote_code)",
           "loading.load_model(config.model)"),
    mutant("test_run.py::test_a_run_limits_its_threads", "threads are not limited", "load",
           "limit_threads(model.eval())", "model.eval()"),
    setting("reward_seconds", "the time limit of rewards is not passed on", "load",
            "load_task(config.task, config.task_args, config.reward_seconds)",
            "load_task(config.task, config.task_args)"),
    mutant("test_run.py::test_training_prompts_that_are_all_too_long_are_told_before_the_evaluation",
           "no training prompt is drawn before the evaluation", "evaluation_problems",
           "draw_prompts(task, tokenizer, config, step=1)", "None"),
    mutant("test_run.py::test_the_group_that_is_shown_has_the_weights_of_the_settings", "weights shown are of tokens always",
           "show_group", "token_weights(lengths, config.loss_weight, limit, total_rows=total_rows)",
           'token_weights(lengths, "token", limit, total_rows=total_rows)'),
    mutant("test_run.py::test_the_group_that_is_shown_has_the_weights_of_the_settings", "truncated rows are shown as masked",
           "show_group", "r.truncated and config.mask_truncated", "r.truncated"),
    mutant("view/test_see_the_run.py::test_the_group_that_is_shown_first_is_one_to_learn_from", "a dead group is shown",
           "show_group", "not r.dead", "r.dead"),
    mutant("test_run.py::test_minibatches_are_drawn_anew_in_each_pass_and_step", "minibatches are not shuffled", "update",
           "order.sample(rollouts, len(rollouts))", "list(rollouts)"),
    mutant("test_run.py::test_minibatches_are_drawn_anew_in_each_pass_and_step", "the same minibatches in each step", "update",
           'f"{config.seed}/{step}/minibatches"', 'f"{config.seed}/minibatches"'),
    mutant("test_run.py::test_the_seconds_of_a_step_are_those_of_its_parts", "the sync in the seconds of training", "train",
           'clock.lap("train")\nrun.sampler.sync()\nclock.lap("sync")',
           'run.sampler.sync()\nclock.lap("train")\nclock.lap("sync")'),
    mutant("harness/test_settings.py::test_what_was_thrown_away_was_sampled_too", "tokens of the groups that stay alone", "collect",
           "return sum(groups, []), counts",
           'counts["step_tokens"] = sum(r.length for group in groups for r in group)\nreturn sum(groups, []), counts'),
    mutant("test_variants.py::test_kl_in_the_reward_is_that_of_the_log_probs_that_the_ratio_is_taken_against",
           "the KL of the sampler's log-probs", "assign_advantages", "r.logps if r.old_logps is None else r.old_logps",
           "r.logps"),
    mutant("harness/test_evaluation.py::test_evaluate_by_hand", "the reward of the greedy answers", "evaluate",
           "average(r.reward for r in sampled)", "average(r.reward for r in greedy)"),
    mutant("test_run.py::test_a_run_leaves_a_complete_folder", "made to show its steps each time", "evaluate",
           'step == 0 and hasattr(task, "worked_prefix")', 'hasattr(task, "worked_prefix")'),
    mutant("test_run.py::test_a_resumed_run_remembers_what_was_asked_for", "a saved config resumes its run",
           "RunFolder.write_config", 'asdict(config) | {"resume": "", "allow_changed": ""}', 'asdict(config) | {"allow_changed": ""}'),
    mutant("harness/test_reliability.py::test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name",
           "nothing is waited for on the disk", "sync_to_disk", "os.fsync(descriptor)", "None"),
    mutant("test_run.py::test_model_task_and_run_can_come_from_the_environment", "GRPO_MODEL is overlooked", "parse_config",
           'os.environ.get(f"GRPO_{name.upper()}", "")', '""'),
    mutant("test_pitfalls.py::test_15_a_weight_sync_cannot_fail_silently", "the self-test at temperature 1", "check_sampler",
           "Sampling(min(16, config.max_completion_tokens), config.temperature)",
           "Sampling(min(16, config.max_completion_tokens))"),
    mutant("test_models.py::test_end_tokens_that_the_model_does_not_have_are_left_out", "the tokenizer's end token ignored",
           "find_eos", "{tokenizer.eos_token_id}", "set()"),
    mutant("view/test_see_the_run.py::test_every_row_of_the_card_is_its_own", "the greedy accuracy twice in the card",
           "model_card", '("sampled accuracy", "accuracy_sampled")', '("sampled accuracy", "accuracy")'),
    mutant("view/test_see_the_run.py::test_a_run_is_played_as_it_was_trained", "played without the task's arguments", "play",
           "load_task(config.task, config.task_args, config.reward_seconds)",
           "load_task(config.task, {}, config.reward_seconds)"),
    mutant("view/test_see_the_run.py::test_a_run_is_played_as_it_was_trained", "samples at temperature 1", "play",
           "grpo.complete(sampler, tokenizer, task, [problem], samples, config.sampling, seed + turn)",
           "grpo.complete(sampler, tokenizer, task, [problem], samples, Sampling(config.max_completion_tokens), seed + turn)"),
    mutant("view/test_see_the_run.py::test_a_run_is_played_as_it_was_trained", "the most likely answer among the samples", "play",
           'sum(int(r.parts["correct"]) for r in found[1:])', 'sum(int(r.parts["correct"]) for r in found)'),
    mutant("view/test_see_the_run.py::test_an_unfinished_run_is_played_from_its_newest_checkpoint", "the oldest checkpoint is played",
           "trained_model", "RunFolder(run).newest_whole(config.steps)", "RunFolder(run).checkpoints()[0]"),
    mutant("tasks/test_tasks.py::test_splits_of_the_hub_that_are_asked_for", "MATH evaluated on training problems", "Math.__init__",
           'load_rows(eval_dataset, "test", ["problem", "answer"])', 'load_rows(eval_dataset, "train", ["problem", "answer"])'),
    mutant("tasks/test_tasks.py::test_splits_of_the_hub_that_are_asked_for", "GSM8K without its subset", "GSM8K.__init__",
           '"main" if dataset == "openai/gsm8k" and not Path(dataset).exists() else None', "None"),
    mutant("harness/test_memory.py::test_what_is_spread_over_processes", "FSDP keeps whole weights", "Spread.of",
           "cls(n, n, n, n)", "cls(n, 1, n, n)"),
    mutant("harness/test_memory.py::test_processes_share_the_memory_of_a_machine", "each process has the whole machine",
           "fitted", "free //= 1 if on_gpu else spread.processes", "free //= 1"),
    mutant("harness/test_memory.py::test_the_evaluation_counts_in_the_rows_that_are_sampled_at_once", "the evaluation's rows forgotten",
           "needs", "max(config.sample_rows, config.group_size, config.eval_samples)",
           "max(config.sample_rows, config.group_size)"),
    mutant("view/test_report.py::test_runs_of_one_name_are_told_apart_by_their_folders", "runs of one name look the same",
           "build_page", 'len({run["name"] for run in runs}) < len(runs)', 'len({run["name"] for run in runs}) > len(runs)'),
    mutant("harness/test_settings.py::test_a_tracker_is_told_the_project_and_the_name_of_the_run", "a resumed run is another one in W&B",
           "Trackers.__init__", 'dict(name=name, id=folder.name, resume="allow", dir=str(folder))',
           'dict(name=name, id=folder.name, resume="never", dir=str(folder))'),
    mutant("test_commands.py::test_the_loss_of_pretraining_is_the_token_mean_over_a_pool", "a mean inside each batch", "batches",
           "POOL / sum(len(answer) + 1 for answer in answers)", "1 / config.batch_size"),
    mutant("test_commands.py::test_the_experts_are_balanced_over_real_tokens", "experts balanced over padding", "pretrain",
           "torch.arange(ids.shape[1], device=device) < lengths[:, None]", "torch.ones(ids.shape, dtype=torch.bool)"),
    mutant("test_commands.py::test_the_load_of_experts_is_that_of_real_tokens", "the load without the prompt", "expert_load",
           'inputs["prompt_lengths"] + inputs["lengths"]', 'inputs["lengths"]'),
    mutant("test_commands.py::test_what_reaches_the_optimizer_of_pretraining", "gradients of pretraining not clipped", "pretrain",
           "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "None"),
    mutant("test_commands.py::test_the_first_row_of_pretraining_by_hand", "an answer is right if a token is", "pretrain",
           "((out.logits.argmax(-1) == labels) | (labels == -100)).all(1).sum()",
           "((out.logits.argmax(-1) == labels) | (labels == -100)).any(1).sum()"),
]  # fmt: skip

# What falls between functions: a value that is handed over, a state that one of them keeps for the others.
SEAMS = [
    mutant("test_loss.py::test_epochs_and_minibatches_take_that_many_steps", "gradients of all steps add up",
           "optimizer_step", "optimizer.zero_grad()", "None"),
    mutant("test_variants.py::test_an_all_dead_step_moves_nothing_kept_or_dropped", "momentum moves an all-dead step",
           "optimizer_step", "all(r.dead for r in trained) and not config.loss_is_regularised", "False"),
    mutant("test_sampler.py::test_sampler_and_trainer_agree_on_ragged_rows", "the first rows move up, not the last",
           "close_gaps", "left + (~stopped[left:]).nonzero()[:, 0]", "(~stopped[left:]).nonzero()[:, 0]"),
    mutant("test_pitfalls.py::test_23_truncated_answers_are_shown_and_can_be_masked", "what was cut off is lost on the way",
           "complete", "[Rollout(*sample) for sample in samples]", "[Rollout(*sample[:3], False) for sample in samples]"),
    mutant("test_loss.py::test_old_logps_of_the_trainer_are_used", "log-probs in the order of the microbatches",
           "logps_under", "sorted(parallel.join(found))", "parallel.join(found)"),
    mutant("test_variants.py::test_dead_groups_are_replaced_by_fresh_ones", "tokens of the last draw alone", "collect",
           'counts["step_tokens"] += sum(r.length for r in drawn)', 'counts["step_tokens"] = sum(r.length for r in drawn)'),
    mutant("test_run.py::test_resumed_reference_is_the_first_model", "a resumed run has the first KL coefficient", "train",
           'run.state.get("kl_coef", config.kl_coef)', "config.kl_coef"),
    mutant("test_run.py::test_the_kl_coefficient_follows_its_target", "the KL coefficient adapted from the first one", "train",
           "variants.adapted_kl_coef(config.kl_coef, learned['kl_ref'], config.kl_target)",
           "variants.adapted_kl_coef(run.folder.config.kl_coef, learned['kl_ref'], config.kl_target)"),
    mutant("test_run.py::test_interrupted_and_resumed_equals_uninterrupted", "a resumed run forgets its evaluations",
           "RunFolder.start", 'self.read("eval.jsonl")', "[]"),
    mutant("test_run.py::test_interrupted_in_an_evaluation_and_resumed", "a resumed run evaluates again", "is_due",
           'not evaluations or evaluations[-1]["step"] < step', "True"),
    mutant("test_loss.py::test_sampler_gap_is_measured_before_the_first_update", "the sampler's gap over all steps",
           "UpdateFigures.add_step", "self.before_any_step is None", "True"),
    mutant("test_run.py::test_every_metric_is_logged_under_its_name", "a count of the step's own in the logs", "step_row",
           'key != "step_tokens"', "True"),
    mutant("test_run.py::test_a_lap_takes_the_time_since_the_one_before", "each lap from the start", "Stopwatch.lap",
           "time.monotonic() - self.started - sum(self.seconds.values())", "time.monotonic() - self.started"),
    mutant("test_loss.py::test_kl_estimates_by_hand", "k1 and k2 under each other's name", "KL_ESTIMATES",
           '{"k1": k1, "k2": k2}', '{"k1": k2, "k2": k1}'),
]  # fmt: skip


def on_the_page(test: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return mutant(f"test_one_page.py::{test}", f"one page: {mistake}", where, old, new)


ONE_PAGE = [
    on_the_page("test_loss_and_gradient_are_those_of_grpo", "max in place of min", "loss",
                "torch.min(gain, limited_gain)", "torch.max(gain, limited_gain)"),
    on_the_page("test_loss_and_gradient_are_those_of_grpo", "logits one position late", "loss",
                "model(ids, attention_mask=ids != pad).logits[:, -T - 1 : -1]",
                "model(ids, attention_mask=ids != pad).logits[:, -T:]"),
    on_the_page("test_loss_and_gradient_are_those_of_grpo", "the padding is read", "loss",
                "model(ids, attention_mask=ids != pad)", "model(ids)"),
    on_the_page("test_loss_and_gradient_are_those_of_grpo", "padding is trained", "loss",
                "(torch.min(gain, limited_gain) * mask).sum()", "torch.min(gain, limited_gain).sum()"),
    on_the_page("test_loss_and_gradient_are_those_of_grpo", "the std with G in its denominator", "advantage",
                "rewards.std(1, keepdim=True)", "rewards.std(1, keepdim=True, correction=0)"),
    on_the_page("test_what_is_sampled_has_the_log_probs_of_the_model", "the padding is read while sampling", "sample",
                "ids != pad", "torch.ones_like(ids)"),
    on_the_page("test_what_is_sampled_has_the_log_probs_of_the_model", "an answer goes on behind its end", "sample",
                "~finished[:, None]", "torch.ones_like(new, dtype=torch.bool)"),
    on_the_page("test_greedy_answers_are_those_of_grpo", "the end is lost", "sample",
                "~finished[:, None]", "~finished[:, None] & (new != eos)"),
    on_the_page("test_each_answer_is_judged_by_its_own_problem", "groups are mixed up", "judge",
                "problems[i // G]", "problems[i % len(problems)]"),
]  # fmt: skip


def unheard(test: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return mutant(f"harness/test_no_silence.py::{test}", mistake, where, old, new)


def mistyped(test: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return mutant(f"test_mistakes.py::{test}", mistake, where, old, new)


AT_ONCE = "test_a_mistake_is_answered_in_one_line_before_torch_is_loaded"
# The first five minutes: what a person is told, and when.
FIRST_MINUTES = [
    unheard("test_an_evaluation_has_a_bar_that_ends_full", "the bar of an evaluation stands still", "Watch.tick",
            "self.bar.update(int(ended.sum()))", "None"),
    unheard("test_a_long_evaluation_is_announced_with_what_would_shorten_it", "a long evaluation is not announced",
            "Watch.tick", "hours * 3600 > self.LONG", "False"),
    unheard("test_a_signal_ends_an_evaluation_between_two_tokens", "a signal waits for the evaluation", "Watch.tick",
            "self.stop.is_set() and PartialState().num_processes == 1", "False"),
    unheard("test_a_signal_ends_an_evaluation_between_two_tokens", "a signal stays for the next run",
            "finish_step_on_signal", "for number, handler in before.items():\n    signal.signal(number, handler)\nstop.clear()",
            "for number, handler in before.items():\n    signal.signal(number, handler)"),
    unheard("test_the_time_of_a_step_on_the_bar_is_without_evaluations", "evaluations in the time of a step",
            "Watch.evaluating", "other.unpause()", "None"),
    unheard("test_shares_that_are_all_the_same_have_an_honest_interval", "0 of 20 is exactly 0", "clustered_interval",
            "half == 0", "False"),
    unheard("test_a_reward_that_does_not_return_is_named", "a reward that hangs is not named", "Patience.look",
            "since and time.monotonic() - since > self.SECONDS", "False"),
    unheard("test_rewards_that_all_time_out_are_an_alarm", "no alarm where all rewards time out", "Alarms",
            'row.get("timed_out") == 1', "False"),
    unheard("test_a_reward_with_a_time_limit_is_checked_like_any_other", "what a limited reward gives is not checked",
            "judge_all", 'checked_parts(where, result["parts"])', 'result["parts"] or {}'),
    unheard("test_about_a_minute_is_said_of_the_recipe_as_it_is", "about a minute, whatever is changed", "parse_config",
            'dataclasses.replace(config, about="")', "config"),
    unheard("test_looks_at_the_base_share_a_folder_and_nothing_that_was_trained_is_lost", "a look removes checkpoints",
            "RunFolder._make", 'any(look.glob("checkpoint-*"))', "False"),
    unheard("test_looks_at_the_base_share_a_folder_and_nothing_that_was_trained_is_lost", "a folder for each look",
            "RunFolder._make", "shutil.rmtree(look, ignore_errors=True)", "None"),
    unheard("test_what_libraries_say_at_each_start_is_silenced_and_nothing_else", "all of their warnings are silenced",
            "check_arguments", "not record.getMessage().startswith(begin)", "False"),
    mistyped(AT_ONCE, "torch is loaded before the arguments are read", "check_arguments",
             "config = parse_config(argv)", "import torch\nconfig = parse_config(argv)"),
    mistyped(AT_ONCE, "names of other projects are unknown", "no_such_setting", "name.lower() in ELSEWHERE", "False"),
    mistyped(AT_ONCE, "nothing is suggested", "near", 'f"; did you mean {before}{found[0]}?" if found else ""', '""'),
    mistyped(AT_ONCE, "a local name is left to the Hub", "check_local",
             'is_path or path.suffix in LOCAL or ("/" in name and hint)', "False"),
    mistyped(AT_ONCE, "a recipe for a GPU is begun without one", "check_arguments", 'config.device == "cuda"', "False"),
    mistyped("test_a_flag_that_is_true_or_false_may_stand_alone", "a flag alone is false", "flags_of", '"true"', '"false"'),
    mistyped("test_a_run_goes_on_without_the_model_that_it_began_with", "a resumed run asks for its first model",
             "parse_config", 'not given["resume"]', "True"),
    mistyped("test_a_run_goes_on_without_the_model_that_it_began_with", "a resumed run asks the Hub", "check_arguments",
             "config.resume or Path(config.model).exists() or (HERE / config.model).exists()",
             "Path(config.model).exists() or (HERE / config.model).exists()"),
    mistyped("test_a_model_of_the_hub_that_cannot_be_had_is_named_at_once", "the cache is not looked at", "check_hub_has",
             'isinstance(try_to_load_from_cache(model, "config.json"), str)', "False"),
    mistyped("test_without_a_network_the_hub_is_not_asked_for_half_a_minute", "a proxy is not thought of",
             "ask_the_hub_only_if_it_is_there", 'name.upper() in ("HTTPS_PROXY", "ALL_PROXY")', "False"),
    mutant("test_examples.py::test_capitals_has_two_hundred_different_rows_and_takes_a_csv", "a CSV read as JSON",
           "load_rows", '{".parquet": "parquet", ".csv": "csv"}', '{".parquet": "parquet"}'),
    mutant("test_examples.py::test_a_data_set_that_looks_local_and_is_not_there_is_refused_at_once",
           "a data set's name is left to the Hub", "load_rows", 'check_local(dataset, "data set")', "None"),
]  # fmt: skip



def unproven(test: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return Mutant(mistake, where, old, new, (f"tests/test_architectures.py::{test}",))


SPOILT = "test_a_model_that_is_not_as_it_must_be_is_refused"
SCALED = "test_noise_is_off_and_heads_are_scaled_as_the_config_says"
MODELS = [
    unproven(SCALED, "routers keep their noise", "switch_off_noise", '"jitter" in setting', "False"),
    unproven(SCALED, "logits are not scaled", "scaled_and_capped", "logits if scale == 1 else logits * scale", "logits"),
    unproven(SCALED, "logits are not capped", "scaled_and_capped", "(logits / cap).tanh() * cap if cap else logits",
             "logits"),
    unproven(SCALED, "Granite's scale the wrong way", "scale_and_cap",
             'scale / (getattr(text, "logits_scaling", None) or 1.0)',
             'scale * (getattr(text, "logits_scaling", None) or 1.0)'),
    unproven(SPOILT, "weights that are not finite pass", "check_model",
             "all(row.isfinite().all() for row in own)", "True"),
    unproven(SPOILT, "ids that the model does not have pass", "check_model", "max(rows[0]) >= vocabulary", "False"),
    unproven(SPOILT, "a head that is changed passes", "check_model", "far(own, alone)", "False"),
    unproven(SPOILT, "a model that is not causal passes", "check_model", "far(own, together)", "False"),
    unproven("test_noise_that_cannot_be_switched_off_is_refused", "noise in training passes", "check_model",
             "far(own, training)", "False"),
    unproven("test_a_run_from_a_folder_of_this_architecture", "a cache of another kind passes", "check_model",
             'run.sampler_name != "torch"', "True"),
    unproven("test_what_torch_cannot_sample_may_be_left_to_vllm", "torch is asked where vLLM samples", "check_model",
             'run.sampler_name != "torch"', "False"),
    unproven("test_a_run_from_a_folder_of_this_architecture", "states of recurrent layers stay with their rows", "take_rows",
             "layer.reorder_cache(rows)", "layer.reorder_cache(rows) if type(layer) is DynamicLayer else None"),
    unproven("test_positions_that_depend_on_the_batch_are_refused", "positions are not looked at", "check_positions",
             'rope.get("rope_type") in ("longrope", "dynamic") and longest > original', "False"),
    unproven("test_a_run_from_a_folder_of_this_architecture", "sizes that differ by layer", "size_of",
             "[getattr(layer, name, None) for layer in config.per_layer_config]", "config.per_layer_config[0].none"),
]


def hostile(test: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return Mutant(mistake, where, old, new, (f"tests/test_hostile.py::{test}",))


TASKS_NAMED, MODELS_NAMED = (
    "test_a_task_that_gives_what_it_must_not_is_named",
    "test_a_model_that_cannot_be_used_is_named",
)
BEGINS, ONCE = "test_what_is_judged_begins_where_the_answer_begins", "test_plain_text_has_each_special_token_once"
HOSTILE = [
    hostile(TASKS_NAMED, "an error of a task is a traceback", "of_the_task",
            'raise UsageError(f"{type(task).__name__}.{call} raised {in_a_line(error)}") from error', "raise"),
    hostile(TASKS_NAMED, "what is no problem passes", "checked_example", "not isinstance(example, dict)", "False"),
    hostile(TASKS_NAMED, "what is no message passes", "is_chat", "isinstance(m.get(key), str)", "key in m"),
    hostile(TASKS_NAMED, "too large a number passes", "is_finite", "return False", "return True"),
    hostile(TASKS_NAMED, "an array is a number", "checked_parts",
            "not is_number(parts[key]) or not is_finite(parts[key])", "not is_finite(parts[key])"),
    hostile(TASKS_NAMED, "an evaluation of nothing passes", "evaluation_problems", "not examples", "False"),
    hostile(MODELS_NAMED, "a quantised model passes", "check_kind", "quantised is not None", "False"),
    hostile(MODELS_NAMED, "an encoder and a decoder pass", "check_kind", "unknown or config.is_encoder_decoder", "False"),
    hostile(MODELS_NAMED, "GGUF passes", "load_model_config", 'any(Path(name).glob("*.gguf"))', "False"),
    hostile(MODELS_NAMED, "weights of another size pass", "load_model",
            'raise ValueError(f"its weights do not fit its config.json: {misfits[0]}, and {len(misfits) - 1} more")', "pass"),
    hostile("test_a_system_message_that_the_template_refuses_goes_into_the_users_turn", "no way around a template",
            "render", 'messages[0]["role"] == "system"', "False"),
    hostile(BEGINS, "a think that the template opens is lost", "encode_prompt", "return prompt, ids, opened + prefill",
            "return prompt, ids, prefill"),
    hostile(BEGINS, "think is opened twice", "encode_prompt", 'prefill.replace("<think>", "")', "prefill"),
    hostile(ONCE, "two beginnings", "encode_prompt", "ids[:2] == [bos, bos]", "False"),
    hostile(ONCE, "a prompt that has ended", "encode_prompt", "ids[-1] == eos", "False"),
    hostile("test_an_id_that_the_tokenizer_does_not_have_is_shown", "unknown ids vanish", "decoded",
            "max(ids, default=0) < len(tokenizer)", "True"),
    hostile("test_the_end_of_a_turn_in_the_template_ends_an_answer", "ends of turns are not looked for", "find_eos",
            "turn_end is not None", "False"),
    Mutant("padding of the table is an end", "find_eos", "{token for token in named if token < known}", "named",
           ("tests/test_models.py::test_end_tokens_that_the_model_does_not_have_are_left_out",)),
    Mutant("any model goes on a run", "RunFolder.check_base",
            "now != began", "False",
           ("tests/harness/test_reliability.py::test_a_run_goes_on_only_from_the_model_that_it_began_with",)),
    Mutant("the base is not recorded", "RunFolder.start", 'step == 0 and self.writes and not (self.path / "run.json").exists()', "False",
           ("tests/harness/test_reliability.py::test_a_run_goes_on_only_from_the_model_that_it_began_with",)),
    Mutant("cut-offs decide the forecast", "verdict", "cut_off > 0.9", "cut_off > 0.3",
           ("tests/harness/test_evaluation.py::test_verdict",)),
    Mutant("one bad row is used", "usable", "[i for i, row in enumerate(each) if can_be[i]]", "[*range(len(each))]",
           ("tests/tasks/test_tasks.py::test_countdown_leaves_out_what_nothing_can_solve",
            "tests/tasks/test_tasks.py::test_a_gold_answer_without_a_number_is_left_out_and_said")),
    Mutant("evaluation problems are trained on", "without", "{key(row) for row in taken}", "set()",
           ("tests/tasks/test_tasks.py::test_no_question_is_there_twice_in_gsm8k",)),
]  # fmt: skip


def paid(mistake: str, where: str, old: str, new: str, *tests: str) -> Mutant:
    found = tests or ("tests/tasks/test_math.py::test_the_table_of_math", "tests/tasks/test_math.py::test_honest_rewrites_are_paid")
    return Mutant(mistake, where, old, new, found)


def in_workers(test: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return Mutant(mistake, where, old, new, (f"tests/tasks/test_workers.py::{test}",))


VERIFIERS = [
    paid("units of two kinds are the same", "same", "units_agree(g.unit, a.unit, whole_number(g.form) > 0)", "True"),
    paid("names of two kinds are the same", "same", "g.name == a.name or not g.name or not a.name", "True"),
    paid("terms in one order only", "total", "tuple(sorted(flat, key=lambda pair: (repr(pair[1]), -pair[0])))", "tuple(flat)"),
    paid("two minus signs cancel", "product", "minus > 1", "False", "tests/tasks/test_math.py::"
         "test_wrong_answers_and_copied_problems_are_not_paid"),
    paid("a fraction of fractions is calculated", "product", "side and (node[3] or node[5])", "False",
         "tests/tasks/test_math.py::test_wrong_answers_and_copied_problems_are_not_paid"),
    paid("any noun is a unit", "units_agree", 'answer.startswith("?")', "False", "tests/tasks/test_math.py::"
         "test_wrong_answers_and_copied_problems_are_not_paid"),
    paid("mixed numbers in any terms", "Reader.mixed_number", "gcd(above, below) > 1", "False", "tests/tasks/test_math.py::"
         "test_wrong_answers_and_copied_problems_are_not_paid"),
    paid("factors in one order only", "product", "tuple(sorted(f, key=repr))", "tuple(f)"),
    paid("2 - x is never x - 2", "oriented", '(1, node) if node[0] != "+" or node[1][0][0] > 0 else (-1, negated(node))', "(1, node)"),
    paid("what stands behind the answer is not read", "Reader.items", "self.peek() != end", "False",
         "tests/tasks/test_math.py::test_what_is_not_understood_as_a_whole_is_not_read"),
    paid("a point is a number with thousands", "without_thousands", "depth == 0", "True",
         "tests/tasks/test_math.py::test_what_separates_thousands"),
    paid("0.333... is 0.3", "repeating", "10 ** len(before) * (10 ** len(period) - 1)", "10 ** len(before + period)"),
    paid("texts of any length are read", "read", "not isinstance(text, str) or len(text) > MAX_CHARACTERS", "False",
         "tests/tasks/test_math.py::test_what_is_not_understood_as_a_whole_is_not_read"),
    paid("numerals of any length", "NUMBER", r'r"(?:[-+]?\$?|\$[-+])(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,15})?"',
         r'r"(?:[-+]?\$?|\$[-+])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})(?:\.[0-9]{1,15})?"',
         "tests/tasks/test_math.py::test_no_answer_raises_is_paid_or_takes_long"),
    paid("gold answers that nobody understands are kept", "is_readable", "bool(read_gold(answer))", "True",
         "tests/tasks/test_math.py::test_what_is_left_out_is_counted_and_shown"),
    paid("near misses are not counted", "gsm8k_reward", "not found and is_near_miss(text, example['target'])", "False",
         "tests/tasks/test_math.py::test_the_table_of_gsm8k"),
    paid("what is not understood is not counted", "math_reward", "answer is not None and not found", "False",
         "tests/tasks/test_math.py::test_form_and_hedging"),
    in_workers("test_what_a_reward_started_is_killed_with_it", "programs of a reward live on", "Worker.kill",
               "os.killpg(self.pid, signal.SIGKILL)", "os.kill(self.pid, signal.SIGKILL)"),
    in_workers("test_results_are_those_of_one_by_one_in_their_order", "results in the order of arrival", "Workers.look",
               'found[worker.job] = self.wrong("timed_out", self.too_late) if late else result',
               "found[found.index(None)] = result"),
    in_workers("test_a_worker_that_dies_costs_one_answer", "a death is called a timeout", "Workers.look",
               'self.replace(at, found, "worker_died", "a worker for rewards died")',
               'self.replace(at, found, "timed_out", "a worker for rewards died")'),
    in_workers("test_a_reward_sees_how_its_own_programs_end", "the status of programs is lost", "work",
               "signal.signal(signal.SIGCHLD, signal.SIG_DFL)", "None"),
    in_workers("test_no_worker_outlives_its_run", "busy workers live on", "work",
               "threading.Thread(target=end_with_parent, args=[os.getppid()], daemon=True).start()", "None"),
    in_workers("test_a_worker_that_dies_costs_one_answer", "no memory left ends the run", "judged_here",
               "os._exit(1)", 'return json.dumps({"error": "MemoryError"}).encode()'),
    Mutant("what did not time out is not counted", "judge_all", '{"timed_out": 0.0, "worker_died": 0.0} | parts if workers else parts',
           "parts", ("tests/harness/test_no_silence.py::test_the_share_of_rewards_that_time_out_counts_those_that_do_not",)),
]  # fmt: skip


def survives(test: str, mistake: str, where: str, old: str, new: str) -> Mutant:
    return Mutant(mistake, where, old, new, (f"tests/harness/test_survival.py::{test}",))


EDITED, BEST = "test_settings_that_were_edited_are_noticed", "test_the_best_checkpoint_is_kept"
SCHEDULER = "test_a_scheduler_gets_an_evaluation_and_a_final_model"
STATE = "test_what_state_json_says_is_checked_before_it_is_obeyed"
SURVIVAL = [
    survives("test_one_process_writes_into_a_folder", "a resumed run does not lock", "RunFolder.resumed",
             "cls(path, writes).lock()", "cls(path, writes)"),
    survives("test_a_run_holds_its_folder_from_the_first_step_on_and_lets_go_of_it", "a new run does not lock",
             "RunFolder.create", "cls(made, writes).lock()", "cls(made, writes)"),
    survives("test_a_look_at_the_base_does_not_take_away_the_folder_of_another_look", "a look is taken away",
             "RunFolder._make", "Lock(look).release()", "None"),
    survives("test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line", "half a line is read", "read_rows",
             'path.read_bytes().split(b"\\n")[:-1]', 'path.read_bytes().split(b"\\n")'),
    survives("test_rotation_never_takes_the_checkpoint_that_was_just_written", "what was just written is rotated away",
             "RunFolder.save_checkpoint", "number_of(old) < step and old not in kept", "old not in (self.best_checkpoint(),)"),
    survives("test_links_and_foreign_names_are_left_alone", "links are rotated away", "RunFolder.checkpoints",
             "path.is_dir() and not path.is_symlink()", "path.is_dir()"),
    survives("test_a_new_run_goes_on_from_a_checkpoint_that_is_not_the_last", "a branch begins anew", "branch",
             "shutil.copytree(checkpoint, path / checkpoint.name)", "None"),
    survives(BEST, "the best is rotated away", "RunFolder.save_checkpoint", "{whole, self.best_checkpoint()}", "{whole}"),
    survives(BEST, "the best is the last", "RunFolder.best_step", 'max(self.evaluations, key=lambda row: row["accuracy_sampled"])',
             "self.evaluations[-1]"),
    survives(BEST, "the best is not saved", "evaluate_and_log", "run.folder.has_new_best(step)", "False"),
    survives("test_a_picture_never_costs_a_model", "what may fail raises", "may_fail",
             'tqdm.write(f"{what} could not be made: {type(error).__name__}: {reason}; all else goes on")', "raise"),
    survives("test_no_flipped_bit_of_state_json_is_obeyed", "the checksum of the state is not compared", "read_state",
             "own != own_checksum(state)", "False"),
    survives(STATE, "logs of any name are cut", "read_state", "is_counts(sizes) and set(sizes) <= set(LOGS)", "is_counts(sizes)"),
    survives(STATE, "files from anywhere are read", "is_inside", '".." not in PurePath(name).parts', "True"),
    survives("test_moments_that_do_not_fit_are_refused", "moments are not counted", "RunFolder.resume",
             'len(moments) != saved.get("moments", len(moments))', "False"),
    survives("test_lost_rollouts_do_not_cost_weights", "weights need their rollouts", "damage", 'name != "rollouts.jsonl"', "True"),
    survives("test_a_folder_does_not_say_that_code_is_trusted", "a folder says what is trusted", "parse_config",
             'words.append("--trust_remote_code=false")', "None"),
    survives(EDITED, "edited settings are not compared", "changed_settings", "name not in config.may_have_changed", "False"),
    survives(EDITED, "changes are not logged", "RunFolder.start",
             'self.append("changes.jsonl", [{"step": step, "changed": self.changed}])', "None"),
    survives("test_half_a_surrogate_pair_is_escaped", "half a surrogate pair is fatal", "as_line",
             'text.encode("utf-8", "backslashreplace").decode()', "text"),
    survives("test_a_lost_terminal_is_no_lost_run", "a lost terminal is not noticed", "Progress.stopping",
             "streams.LOST.is_set()", "False"),
    survives(SCHEDULER, "a scheduler is like a person", "finish_step_on_signal.on_signal", "number != signal.SIGINT", "False"),
    survives("test_a_person_gets_a_checkpoint_and_no_more", "a person is like a scheduler", "finish_step_on_signal.on_signal",
             "number != signal.SIGINT", "True"),
    survives("test_a_run_ends_in_time", "time is not looked at", "Progress.stopping", "now + reserve > self.ends", "False"),
    survives("test_a_run_ends_in_time", "no time is left for the end", "Progress.stopping",
             "self.longest + 1.5 * WATCH.seconds + 3 * self.config.max_minutes", "0"),
]  # fmt: skip

HEAD = "harness/test_fast_head.py::test_numbers_and_gradients_are_those_of_the_plain_head"
ARRIVES = "harness/test_fast_head.py::test_the_gradient_that_arrives_counts_whatever_was_foreseen"
AUTO = "harness/test_memory.py::test_auto_takes_the_largest_microbatch_that_fits"
DRAW = "test_sampler.py::test_a_draw_is_the_first_token_whose_sum_reaches_the_level"
LOG = "harness/test_messages.py::test_all_output_goes_to_the_log_and_comes_back"
MOVES = "harness/test_messages.py::test_a_log_moves_to_the_run_and_goes_on_behind_what_is_there"

SPEED = [
    mutant(HEAD, "the fast head forgets the temperature", "token_logps",
           "scale_and_cap(policy.model.config)[0] / policy.temperature", "scale_and_cap(policy.model.config)[0]"),
    mutant(HEAD, "the fast head forgets the scale of the logits", "token_logps",
           "scale_and_cap(policy.model.config)[0] / policy.temperature", "1 / policy.temperature"),
    mutant(HEAD, "the entropy of the fast head without the log-sum", "logp_and_entropy",
           "log_sum - logits.mul_(probs).sum(-1)", "-logits.mul_(probs).sum(-1)"),
    mutant(HEAD, "the scale is not in the gradient of the fast head", "FastHead.backward",
           "gradients.add(at, h, probs, targets, ctx.scale * slopes[at], wide)",
           "gradients.add(at, h, probs, targets, slopes[at], wide)"),
    mutant(ARRIVES, "the slopes of a chunk are those of the first one", "slope_of",
           "torch.autograd.grad(loss, flat)[0][at]", "torch.autograd.grad(loss, flat)[0][: len(logps)]"),
    mutant(HEAD, "the head's bias gets no gradient", "Gradients.add", "probs.sum(0)", "0"),
    mutant(ARRIVES, "what was foreseen counts", "FastHead.backward",
           "same_up_to_a_factor(torch.cat(ctx.slopes), slopes[:at.start]) if ctx.slopes else None", "1.0"),
    mutant(ARRIVES, "a loss that is multiplied is computed again", "same_up_to_a_factor",
           "float(factor) if same else None", "None"),
    mutant("harness/test_fast_head.py::test_a_head_that_is_more_than_a_product_is_left_to_the_plain_one",
           "capped logits in the fast head", "applies", "scale_and_cap(model.config)[1] is None", "True"),
    mutant("harness/test_fast_head.py::test_policy_uses_it_and_gives_the_same_as_with_the_plain_head",
           "the loss is not handed over", "batch_loss", "policy(**inputs, loss_of=loss_of)", "policy(**inputs)"),
    mutant(HEAD, "the entropy bonus without its gradient", "best_head",
           "policy.entropy_gradient or not applies(policy.model)", "not applies(policy.model)")
    ._replace(tests=("tests/test_loss.py",)),
    mutant(DRAW, "a token of probability 0 can be drawn", "draw", "(1 - below_1) * sums[:, -1:]", "below_1 * sums[:, -1:]"),
    mutant(DRAW, "the level is of probabilities that sum to 1", "draw", "(1 - below_1) * sums[:, -1:]", "1 - below_1"),
    mutant(AUTO, "auto fills the card", "fitted", "largest_microbatch(table_of, config, 0.9 * free, spread.processes)",
           "largest_microbatch(table_of, config, free, spread.processes)"),
    mutant("harness/test_memory.py::test_with_auto_all_processes_cut_alike", "each process cuts as its card allows",
           "largest_microbatch", "min(parallel.join([found]))", "found"),
    mutant("harness/test_settings.py::test_a_setting_changes_what_it_says_and_nothing_else", "a resumed run may cut otherwise",
           "setup", "config, accelerator, model = run.config, run.accelerator, run.model",
           "accelerator, model = run.accelerator, run.model"),
    mutant("harness/test_loading.py::test_which_attention_torch_may_take", "cuDNN's attention whatever was asked for",
           "make_accelerator", "torch.backends.cuda.enable_cudnn_sdp(config.cudnn_attention)", "None"),
    mutant(LOG, "output does not come back", "LibraryLog.everything", "self.point(*saved)", "None"),
    mutant(MOVES, "an earlier log is lost", "LibraryLog.move_to", 'open(target, "ab")', 'open(target, "wb")'),
    mutant(MOVES, "messages go on into a file that is gone", "LibraryLog.move_to", "if self.loggers:\n    self.open()", "pass"),
    mutant(MOVES, "what went wrong is in the log alone", "LibraryLog.open", "[self.handler, loud]", "[self.handler]"),
    mutant("harness/test_reliability.py::test_the_record_of_a_run_is_written_before_its_first_checkpoint",
           "the first step waits for the record", "RunFolder.start",
           "ThreadPoolExecutor(1).submit(self.write_record, config.model)", "self.write_record(config.model)"),
    mutant("harness/test_reliability.py::test_the_record_of_a_run_is_written_before_its_first_checkpoint",
           "the record may come after a checkpoint", "RunFolder.save_checkpoint", "self.wait_for_record()", "None"),
]  # fmt: skip

STOPPED = "harness/test_stopping.py::test_a_run_stops_at_strings_of_the_setting_or_of_the_task"
TEMPLATES = "harness/test_templates.py::test_"
PAYS = "tasks/test_sentences.py::test_what_each_rule_pays"
SFT, SHOWN = "harness/test_sft.py::test_", "tasks/test_demonstrations.py::test_"

SMALL_MODELS = [
    mutant("harness/test_stopping.py::test_only_ends_that_can_complete_a_string_are_decoded", "a last character is enough to stop",
           "completes", "any((stop in text for stop in stops))", "True"),
    mutant("harness/test_stopping.py::test_characters_of_several_tokens_are_seen", "parts of characters complete nothing",
           "closing_tokens", "{stop[-1] for stop in stops} | {NOT_WHOLE}", "{stop[-1] for stop in stops}"),
    mutant("harness/test_stopping.py::test_what_was_sampled_stays_and_what_is_behind_is_not_judged",
           "what is behind a stop string is judged", "written_text", "up_to_stop(whole, stop)", "whole"),
    mutant(STOPPED, "the task's stop strings are not read", "load", "config.stop or list(stop)", "config.stop"),
    mutant(STOPPED, "a stop string does not reach the sampler", "Config.sampling", "tuple(self.stop)", "()"),
    mutant("harness/test_stopping.py::test_the_most_likely_answer_stops_there_too", "the evaluation runs on behind a stop string", "Config.most_likely", "tuple(self.stop)", "()"),
    mutant(f"{TEMPLATES}arguments_of_the_template_reach_it", "arguments of the template are lost", "encode_prompt",
           "render(tokenizer, prompt, add_generation_prompt=True, **more)", "render(tokenizer, prompt, add_generation_prompt=True)"),
    mutant(f"{TEMPLATES}a_system_prompt_takes_the_place_of_the_tasks_own", "two system messages", "encode_prompt",
           "prompt[prompt[0]['role'] == 'system':]", "prompt"),
    mutant(f"{TEMPLATES}what_does_not_go_together_is_one_line", "unknown arguments of a template pass", "use_template",
           "config.chat_template_args.keys() - known", "()"),
    mutant(f"{TEMPLATES}a_template_of_a_file_takes_the_place_of_the_models_and_is_kept", "a checkpoint needs the template's file",
           "use_template", "config.chat_template and (not of_checkpoint)", "config.chat_template"),
    mutant(PAYS, "a word in another one counts", "words_of", 're.findall(r"[a-z\']+", text.lower())', "text.lower().replace('foot', ' foot ').split()"),
    mutant(PAYS, "given words may stand close", "sentence_reward", "b - a < 3", "b - a < 1"),
    mutant(PAYS, "two sentences are one", "SENTENCE", 're.compile(r"[A-Z][^.!?\\n]*[.!?]")', 're.compile(r"[A-Z].*[.!?]")'),
    mutant(PAYS, "a filled-in example is one's own", "sentence_reward", "float(not copied)", "1.0"),
    mutant("harness/test_smollm2.py::test_another_package_is_refused_and_leaves_nothing", "any file is SmolLM2", "make",
           "check_hash(gguf)", "None"),
    mutant(f"{TEMPLATES}worked_examples_are_earlier_turns_of_a_chat", "a problem is shown with its own answer", "with_worked_examples",
           "pair[0] != prompt", "True"),
    mutant(f"{TEMPLATES}worked_examples_are_earlier_turns_of_a_chat", "the answers that are shown lack the prefill", "worked_examples",
           "getattr(task, 'prefill', '') + text", "text"),
    mutant(f"{TEMPLATES}worked_examples_of_a_text_end_in_blank_lines_as_the_answer_does", "a worked example has the blank line that ends it",
           "with_worked_examples", "without_blank_lines(text)", "text"),
    mutant(f"{TEMPLATES}worked_examples_of_a_text_end_in_blank_lines_as_the_answer_does", "a text's answer has no end",
           "load", "config.few_shot and (not config.stop) and isinstance(prompt_of(task, problems[0].example), str)", "False"),
    mutant(f"{TEMPLATES}worked_examples_of_a_text_end_in_blank_lines_as_the_answer_does", "stop strings that were set are replaced",
           "load", "config.few_shot and (not config.stop) and isinstance(prompt_of(task, problems[0].example), str)", "config.few_shot"),
    mutant(f"{SFT}a_step_is_the_mean_over_completion_tokens", "the mean of a microbatch and not of the step", "sft_step",
           "sum(row.length for row in rows)", "sum(row.length for row in rows[:8])"),
    mutant(f"{SFT}rows_are_the_tasks_demonstrations_behind_its_prompts", "the end is not taught", "draw_rows",
           "prompts.ids_of(run.tokenizer, text, add_special_tokens=False) + [end]",
           "prompts.ids_of(run.tokenizer, text, add_special_tokens=False)"),
    mutant(f"{SFT}settings_mean_what_they_mean_in_a_run", "the rate of SFT does not follow its schedule", "sft",
           "optimizers.learning_rate(config, step)", "config.lr"),
    mutant(f"{SFT}settings_mean_what_they_mean_in_a_run", "gradients of SFT are not clipped", "sft_step",
           "run.accelerator.clip_grad_norm_(run.policy.parameters(), run.config.grad_clip)", "None"),
    mutant(f"{SHOWN}parentheses_stand_where_they_are_needed", "a difference in a difference without parentheses", "combined",
           "('+', '-') if operator == '-' else ()", "()"),
    mutant(f"{SHOWN}a_countdown_search_is_true_and_has_dead_ends", "no dead ends are shown", "worked_solution", "rng.randint(0, dead_ends)", "0"),
    mutant(f"{SHOWN}what_is_shown_is_paid_in_full_and_is_in_no_evaluation", "solutions of MATH without their answer", "Math.demonstration",
           "math_example(row['problem'], gold_of(row))", "math_example(row['problem'], '-7')"),
    mutant(f"{SHOWN}solutions_of_the_data_set_are_shown_as_they_are", "what is for a calculator is shown", "GSM8K.demonstration",
           "COMPUTED.sub('', example['solution'])", "example['solution']"),
    mutant(f"{SFT}what_is_learned_is_what_a_run_pays", "a chat learns the end of a text", "end_of_answer",
           "(turn_end, run.tokenizer.eos_token_id)", "(run.tokenizer.eos_token_id, turn_end)"),
    mutant(f"{SFT}what_is_learned_is_what_a_run_pays", "thinking is opened twice", "draw_rows", "'<think>' in begun", "False"),
    mutant(f"{SFT}what_is_learned_is_what_a_run_pays", "blank lines are learned where they end an answer", "draw_rows",
           "prompts.BLANK_LINE in config.stop", "False"),
    mutant("harness/test_stopping.py::test_text_behind_the_first_stop_is_cut_off", "the white space that ends an answer is judged",
           "up_to_stop", "end - len(stop) * stop.isspace()", "end"),
    mutant("harness/test_evaluation.py::test_a_graded_group_has_wrong_answers_of_different_worth", "a good form counts as partial credit",
           "is_graded", "wrong.setdefault(r.parts['format'], set())", "wrong.setdefault(0, set())"),
    mutant("harness/test_reliability.py::test_an_error_on_the_way_begins_a_line_of_its_own", "the bar stays open at an error", "progress",
           "shown.bar.close()", "None"),
    mutant("harness/test_evaluation.py::test_the_verdict_on_what_smollm2_was_tried_on", "a gain of a fifth is not enough", "verdict",
           "gain >= 0.2", "gain >= 0.25"),
]  # fmt: skip

MUTANTS = SMALL_MODELS + SPEED + PITFALLS + WIRING + FURTHER + SEAMS + ONE_PAGE + FIRST_MINUTES + MODELS + HOSTILE + VERIFIERS + SURVIVAL
