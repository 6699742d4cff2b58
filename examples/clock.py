"""A reasoning task with a verifier of its own: times of day, with <think> and <answer>. Problems are made, not loaded.

    python grpo.py --model Qwen/Qwen2.5-1.5B-Instruct --task examples/clock.py:Clock --max_completion_tokens 256
"""

import random
import re
import zlib

from tasks.tags import answer_block, is_think_then_answer  # the one answer behind the thinking, in linear time

TIME = re.compile(r"\s*([01]?[0-9]|2[0-3]):([0-5][0-9])\s*")
PROMPT = """It is {now}. What time will it be in {hours} hours and {minutes} minutes, on a clock of 24 hours?
Think first, inside <think> and </think>. Then give the time in <answer> and </answer>, like <answer>07:05</answer>."""


def shown(minutes: int) -> str:
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


class Clock:
    def __init__(self, eval_size: int = 100, format_weight: float = 0.1):
        self.eval_size, self.format_weight = eval_size, format_weight

    def draw(self, rng: random.Random, for_eval: bool) -> dict:
        """A problem; one in ten, chosen by a checksum, is for the evaluation only."""
        while True:
            example = {"start": rng.randrange(24 * 60), "hours": rng.randint(1, 12), "minutes": rng.randint(1, 59)}
            if (zlib.crc32(str(example).encode()) % 10 == 0) == for_eval:
                return example

    def train(self, rng, step):
        return self.draw(rng, for_eval=False)

    def eval(self):
        rng = random.Random(0)
        return [self.draw(rng, for_eval=True) for _ in range(self.eval_size)]

    def prompt(self, example):
        text = PROMPT.format(now=shown(example["start"]), hours=example["hours"], minutes=example["minutes"])
        return [{"role": "user", "content": text}]

    def reward(self, text, example):
        """1 for the right time, and `format_weight` for the form: it bounds its work, never raises and runs nothing."""
        block = answer_block(text)
        match = TIME.fullmatch(block) if block is not None and len(block) < 100 else None
        value = int(match[1]) * 60 + int(match[2]) if match else None
        truth = (example["start"] + 60 * example["hours"] + example["minutes"]) % (24 * 60)
        right, form = float(value == truth), float(is_think_then_answer(text))
        paid = right + self.format_weight * form
        prediction = None if value is None else shown(value)
        return dict(reward=paid, correct=right, format=form, prediction=prediction, ground_truth=shown(truth))
