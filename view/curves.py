"""How to read each curve of the report, and in which panel it is."""

# Metrics of one key, separated by spaces, share a panel.
METRICS = {
    "Learning": {
        "accuracy accuracy_sampled": "On the evaluation problems, with 95 % intervals: this is what counts.",
        "reward": "Should rise, unevenly since each step has other prompts; the band is ± reward_std.",
        "reward_std": "Spread of the rewards within a group: where it is 0 there is nothing to learn.",
        "correct": "Share of right completions; if it lags behind the reward, other parts of the reward are farmed.",
        "format": "Share of completions of the right form: it usually saturates first, and then teaches no more.",
        "worked": "Share of completions that show at least one true step.",
        "pass_at_group": "Share of groups with a right completion: its lead over correct is what is left to learn.",
        "penalty": "What came off the reward before it became an advantage, for length or for KL.",
    },
    "Lengths": {
        "length": "Mean tokens of a completion: they grow where thinking pays, and shrink where guessing does.",
        "length_correct length_wrong": "If only the wrong completions grow, the policy rambles, or long errors pay.",
        "truncated": "Share of completions that were cut off; if it rises, raise max_completion_tokens.",
        "reflections": "Share of completions with words like “wait”; words are no checks yet, so read some below.",
    },
    "Health": {
        "zero_advantage_groups": "Share of dead groups, which teach nothing; near 1, problems are too easy or hard.",
        "entropy": "Uncertainty, nats a token: a slow fall is learning, a fast one to 0 collapse, a rise gibberish.",
        "kl_ref": "Distance from the model at the start: it grows with learning, and a jump is a bad update.",
        "kl_coef": "Weight of the KL penalty, which moves only with a kl_target.",
        "sampler_kl": "The sampler's log-prob minus the trainer's: should be 0 up to noise.",
        "sampler_logp_gap": "Its absolute size: above 0.02, sampler and trainer are hardly the same model.",
        "nonfinite_updates": "Updates that were skipped since their gradient was not finite: should be 0.",
    },
    "Optimization": {
        "loss": "What was minimised: no measure of progress, and near or below 0 is normal.",
        "grad_norm": "Norm of the gradient before clipping: a spike is a strange batch, 0 a step without news.",
        "lr": "The learning rate: warm-up and schedule show here.",
        "clipped_low clipped_high": "Shares of tokens whose gradient the clip removed; 0 with one update a batch.",
        "ratio_max": "Largest ratio of new to old probability of a token; 1 with one update a batch.",
        "skipped_updates": "Updates that were skipped since all their groups were dead.",
    },
    "Speed": {
        "tokens_per_second": "Completion tokens over the seconds of the whole step.",
        "seconds_sample seconds_train seconds_sync": "Where the seconds of a step go.",
        "tokens": "Completion tokens sampled since the start: what a fair comparison of runs counts.",
        "peak_memory": "Most memory so far, in GB: it should become flat within a few steps.",
        "prompts_too_long": "Prompts over max_prompt_tokens, which were drawn again.",
        "resampled_groups": "Dead groups that were replaced by fresh ones: they cost sampling too.",
    },
}
