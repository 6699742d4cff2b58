"""A task of your own: questions and answers from a file. The whole contract is in tasks/__init__.py.

    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --task examples/capitals/capitals.py:Capitals \
        --max_completion_tokens 16
"""

from pathlib import Path

from tasks.data import load_rows  # from a JSON, JSON Lines, CSV or Parquet file, a folder of them, or the Hub

ROWS = Path(__file__).with_name("capitals.jsonl")  # {"country": "France", "capital": "Paris"}, one a line


class Capitals:
    def __init__(self, dataset: str = str(ROWS), eval_size: int = 50):
        rows = list(load_rows(dataset, "train", ["country", "capital"]))
        self.held_out, self.rows = rows[:eval_size], rows[eval_size:]

    def train(self, rng, step):
        """One problem to train on. All randomness comes from `rng`, so that a resumed run draws the same."""
        return rng.choice(self.rows)

    def eval(self):
        """The problems to evaluate on: always the same, and in no training."""
        return self.held_out

    def prompt(self, example):
        """Chat messages, for a chat model; a string would go to any model."""
        question = f"What is the capital of {example['country']}? Answer with its name only."
        return [{"role": "user", "content": question}]

    def reward(self, text, example):
        """What an answer is paid. Exact, or a model will find out what else is paid."""
        name = text.strip().removesuffix(".")
        right = float(name.lower() == example["capital"].lower())
        return {
            "reward": right,
            "correct": right,  # 0 or 1: this is what accuracy counts
            "format": float(0 < len(name) < 40 and "\n" not in name),
            "prediction": name[:100],
            "ground_truth": example["capital"],
        }
