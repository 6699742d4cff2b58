"""A task that pays for length besides the answer: what benchmarks/failures.py lets run away."""

from mathformer import ArithmeticTask


class PaysLength(ArithmeticTask):
    def reward(self, text: str, example: dict) -> dict:
        parts = super().reward(text, example)
        return parts | {"reward": parts["reward"] + 0.02 * len(text)}
