"""GRPO on a pretrained small model: `grpo.train` behind flags in the names of mathFormer.

    python -m mathformer.train_rl --checkpoint mathformer/pretrained

Nothing of the algorithm is here: the flags become a `grpo.Config`. What a run leaves behind, and what its figures mean,
is that of grpo.py; a run that was stopped goes on with `python grpo.py --resume runs/<run>`.
"""

import dataclasses
import shutil
import sys
from typing import Any

import grpo
from harness.command_line import check_folder_of, errors_as_lines, parse_settings
from mathformer.evaluate import load_checkpoint, problem_settings


@dataclasses.dataclass
class RLConfig:
    checkpoint: str
    """folder of the pretrained model"""
    steps: int = 1000
    """GRPO steps"""
    batch_size: int = 32
    """problems a step"""
    group_size: int = 4
    """completions of each problem"""
    lr: float = 5e-4
    """learning rate; mathFormer's default of 1e-5 is too small for this model to learn anything in 1000 steps"""
    max_digits: int | None = None
    """digits of the numbers in a problem (mathFormer: 2); by default, like the next three, as it was pretrained"""
    max_depth: int | None = None
    """operators on the longest path of a problem (mathFormer: 3)"""
    operators: str | None = None
    """operators that problems use: `+-*`, `+ - max next`, or `all`"""
    max_value: int | None = None
    """largest number in a problem and its steps"""
    max_gen_len: int = 256
    """tokens after which a completion is cut off"""
    kl_coef: float = 0.1
    """weight of the KL penalty toward the checkpoint"""
    kl_target: float = 0.0
    """let kl_coef rise and fall so that the KL comes to this; 0 keeps it as it is"""
    clip_ratio: float = 0.2
    """the ratio is clipped to 1 - clip_ratio and 1 + clip_ratio"""
    epochs: int = 1
    """passes over the completions of a step"""
    temperature: float = 1.0
    """sampling temperature"""
    top_k: int = 0
    """sample from the k most likely tokens only; 0 is off"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    partial_credit: float = 0.0
    """what a wrong answer is paid if all its steps are right, and in proportion if some are; a right one is paid 1"""
    curriculum_steps: int = 0
    """problems grow from one operator and one digit to their full size over so many steps; 0 is off"""
    modelsize: str | None = None
    """refuse a checkpoint that has another size"""
    num_experts: int | None = None
    """refuse a checkpoint that has another number of experts"""
    active_experts: int | None = None
    """refuse a checkpoint that has another number of active experts"""
    save_interval: int = 100
    """write a checkpoint every so many steps"""
    eval_interval: int = 50
    """evaluate every so many steps, besides before the first and after the last"""
    log_csv: str | None = None
    """file for a copy of the run's metrics.csv, a row a step"""
    runs: str = "runs"
    """folder in which the run's own folder is made"""
    seed: int = 0
    """seed of everything random"""

    def grpo_config(self) -> grpo.Config:
        task_args = problem_settings(self)
        task_args |= dict(partial_credit=self.partial_credit, curriculum_steps=self.curriculum_steps)
        return grpo.Config(
            model=self.checkpoint,
            task="arithmetic",
            task_args=task_args,
            prompts_per_step=self.batch_size,
            max_completion_tokens=self.max_gen_len,
            clip_low=self.clip_ratio,
            clip_high=self.clip_ratio,
            save_steps=self.save_interval,
            eval_steps=self.eval_interval,
            tokens_per_microbatch=2048,  # rows are short and of very different lengths: this saves padding
            **{name: getattr(self, name) for name in SAME_NAMES},
        )


SAME_NAMES = ("steps", "group_size", "lr", "kl_coef", "kl_target", "epochs", "temperature", "top_k", "grad_clip")
SAME_NAMES += ("runs", "seed")


def train_rl(config: RLConfig) -> dict[str, Any]:
    """The whole run; returns what `grpo.train` returns."""
    check_folder_of(config.log_csv)
    load_checkpoint(config.checkpoint, config.modelsize, config.num_experts, config.active_experts)
    result = grpo.train(config.grpo_config())
    if config.log_csv and (result["run"] / "metrics.csv").exists():
        shutil.copy(result["run"] / "metrics.csv", config.log_csv)
    if not result.get("interrupted") and config.steps:
        first, last = result["first"], result["last"]
        gain = 100 * (last["accuracy"] - first["accuracy"])
        apart = last["accuracy_low"] > first["accuracy_high"] or first["accuracy_low"] > last["accuracy_high"]
        print(f"Improvement: {gain:+.1f} points, the 95 % intervals {'are apart' if apart else 'overlap'}")
    return result


def main(args: list[str] | None = None) -> None:
    with errors_as_lines(ValueError):
        sys.exit(130 if train_rl(parse_settings(RLConfig, __doc__, args)).get("interrupted") else 0)


if __name__ == "__main__":
    main()
