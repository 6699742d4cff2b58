"""Where the time of a step goes: of the default run, and of a model of the shape of Qwen2.5-0.5B.

    python benchmarks/step_time.py

`default run` is `python grpo.py`, with two evaluation problems, stopped after 50 steps. `0.5B` has random weights and
writes 2 x 4 completions of 32 tokens to prompts of 64, in float32, sampled with torch; stopped after 5 steps.

The functions of a step are wrapped from outside. The seconds of a part are those inside its functions, less those of
other parts that they call. A step lasts from the end of one `RunFolder.log_step` to the end of the next; no evaluation
and no checkpoint falls between. A figure is the median over the steps without the first two, so that the parts do not
add up exactly.
"""

import tempfile
from collections import Counter
from dataclasses import replace
from pkgutil import resolve_name
from statistics import median
from time import perf_counter

import torch
import transformers
from against_trl import Parity
from common import arguments, origin, table, write
from shapes import model_config, save_tokenizer

PARTS = {
    "drawing prompts": ["grpo.draw_prompts"],
    "sampling": ["grpo.TorchSampler.generate"],
    "decoding": ["grpo.complete"],
    "scoring (the task's reward)": ["grpo.judge_all"],
    "log-probs": ["grpo.Policy.forward"],
    "loss and its metrics": ["grpo.batch_loss"],
    "backward": ["accelerate.Accelerator.backward"],
    "optimizer": ["accelerate.Accelerator.clip_grad_norm_", "accelerate.optimizer.AcceleratedOptimizer.step"]
    + ["accelerate.optimizer.AcceleratedOptimizer.zero_grad"],
    "sync": ["grpo.TorchSampler.sync"],
    "logging": ["grpo.RunFolder.log_step"],
}


class Digits(Parity):
    def problem(self, rng):
        return "".join(rng.choices("0123456789", k=64))

    def eval(self):
        return [{"prompt": "7" * 64}]


def make_qwen(folder: str, tiny: bool) -> None:
    config = model_config("tiny" if tiny else "Qwen2.5-0.5B")
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size, 0)


class Enough(Exception):
    """All steps are done: no evaluation and no checkpoint at the end."""


class Stopwatch:
    def __init__(self):
        self.spent, self.inside, self.rows, self.steps, self.step_ended = Counter(), [], [], 0, 0.0

    def wrap(self, path: str, part: str) -> None:
        holder, name = resolve_name(path.rpartition(".")[0]), path.rpartition(".")[2]
        function = getattr(holder, name)

        def timed(*args, **kwargs):
            self.inside.append(0.0)  # seconds of other wrapped functions that this one calls
            started = perf_counter()
            result = function(*args, **kwargs)
            seconds = perf_counter() - started
            self.spent[part] += seconds - self.inside.pop()
            if self.inside:
                self.inside[-1] += seconds
            if part == "logging":
                self.end_step()
            return result

        setattr(holder, name, timed)

    def end_step(self) -> None:
        now = perf_counter()
        whole, self.step_ended = now - self.step_ended, now
        self.rows.append({**self.spent, "the rest": whole - self.spent.total(), "the whole step": whole})
        self.spent.clear()
        if len(self.rows) == self.steps:
            raise Enough


def measure(watch: Stopwatch, config, steps: int) -> dict:
    """Medians of the parts and of the step, the shortest and longest step, and how many threads."""
    import grpo

    watch.spent.clear()
    watch.rows, watch.steps, watch.step_ended = [], steps, perf_counter()
    try:
        grpo.train(config)
    except Enough:
        rows = watch.rows[2:] or watch.rows
    found = {part: median(row.get(part, 0.0) for row in rows) for part in [*PARTS, *rows[0]]}
    whole = [row["the whole step"] for row in rows]
    return found | dict(least=min(whole), most=max(whole), threads=torch.get_num_threads())


def main() -> None:
    tiny = "one step of each, a toy in the place of the 0.5B model"
    options = arguments(__doc__, "step_time.md", tiny).parse_args()
    import grpo
    from harness import loading

    threads, watch, found = torch.get_num_threads(), Stopwatch(), {}
    for part, functions in PARTS.items():
        for function in functions:
            watch.wrap(function, part)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(grpo.parse_config([]), runs=folder, task_args={"eval_size": 2})
        found["default run"] = measure(watch, config, 1 if options.tiny else 50)
        torch.set_num_threads(threads)  # which that run has limited
        make_qwen(folder, options.tiny)
        loading.find_eos = lambda model, tokenizer: []
        size = dict(prompts_per_step=2, group_size=4, max_prompt_tokens=64, max_completion_tokens=32, eval_samples=1)
        settings = dict(model=folder, task=f"{__file__}:Digits", dead_groups="keep", device="cpu", runs=folder)
        found["0.5B"] = measure(watch, grpo.Config(**settings, **size), 1 if options.tiny else 5)
    used = "; ".join(f"{name}: threads {row['threads']}" for name, row in found.items())
    heads = " | ".join(["part", *(f"{name}, seconds a step | % of the step" for name in found)])
    rows = []
    for part in [*PARTS, "the rest", "the whole step"]:
        cells = [f"{row[part]:.4f} | {100 * row[part] / row['the whole step']:.1f}" for row in found.values()]
        rows.append([part, *cells])
    rows.append(["shortest and longest step"])
    rows[-1] += [f"{row['least']:.4f} to {row['most']:.4f} | " for row in found.values()]
    write(options.out, f"{origin('`python benchmarks/step_time.py`, seed 0,')} {used}.", table(heads, rows))


if __name__ == "__main__":
    main()
