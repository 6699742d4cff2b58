"""Reward functions in the style of TRL, unchanged, as a task: lists of completions in, lists of numbers out.

    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --task examples/trl_rewards.py:Couplets --max_completion_tokens 48
"""

WORDS = "light rain stone moon hill sea tree song road snow day night star wind fire king gold book hand sky".split()


def two_lines(prompts, completions, **columns):
    """0.5 for exactly two lines."""
    return [0.5 * (len(c[0]["content"].strip().splitlines()) == 2) for c in completions]


def ends_with_the_word(prompts, completions, word, **columns):
    """0.5 if the last word is the one that was asked for."""
    last = [(c[0]["content"].split() or [""])[-1].strip(".,!?").lower() for c in completions]
    return [0.5 * (mine == wanted) for mine, wanted in zip(last, word, strict=True)]


class TRLTask:
    """Calls each function with lists of one: columns of the example become keyword arguments, as in TRL."""

    reward_functions = []

    def reward(self, text, example):
        completion = [{"role": "assistant", "content": text}]
        columns = {name: [value] for name, value in example.items()}
        paid = {f.__name__: f([self.prompt(example)], [completion], **columns)[0] for f in self.reward_functions}
        total = float(sum(paid.values()))
        right = float(total >= self.full_marks)
        return dict(reward=total, correct=right, format=right, prediction=text[:100], ground_truth="") | paid


class Couplets(TRLTask):
    reward_functions, full_marks = [two_lines, ends_with_the_word], 1.0

    def train(self, rng, step):
        return {"word": rng.choice(WORDS[5:])}

    def eval(self):
        return [{"word": word} for word in WORDS[:5]]  # in no training

    def prompt(self, example):
        return [{"role": "user", "content": f"Write a poem of two lines. Its last word must be: {example['word']}"}]
