"""Answers that are written ahead, while earlier steps train: by weights that are up to `staleness` steps old.

With staleness k, the sampler gets new weights after every k-th step. The trainer first waits for the answers of the
next step, which the old weights still write; then the answers of the k steps after that are begun, all at once. For
k = 2:

    step                            1  2  3  4  5  6  7
    written by the weights after    0  0  0  2  2  4  4   steps
    age                             0  1  2  1  2  1  2

A server writes while the trainer trains. Other samplers cannot run alongside training. They write the answers when
these are needed, but with the same weights: that shows what staleness does to learning, and saves no time.

Before a checkpoint is saved, the answers that the old weights still owe are finished and stored in it. So a stopped
run goes on with the very answers that it would have had, and needs no old weights for that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import PartialState

from harness import parallel
from harness.files import as_line, read_rows
from harness.prompts import draw_prompts
from harness.settings import Config, Sample, Sampling, UsageError

FILE = "ahead.jsonl"  # in a checkpoint


@dataclass
class Batch:
    """This process's answers of a later step."""

    after: int  # the step after which the weights were sent that write them
    prompts: list[list[int]]
    seed: int
    fetch: Callable[[], list[Sample]]
    samples: list[Sample] | None = None

    def get(self) -> list[Sample]:
        if self.samples is None:
            self.samples = self.fetch()
        return self.samples


class Ahead:
    """Around a sampler, with the same verbs. Whatever else is asked, as in evaluations, the newest weights answer."""

    def __init__(self, run, config: Config):
        """For the parts of a `loading.Run`, whose state says from which step it goes on."""
        self.sampler, self.task, self.tokenizer, self.config = run.sampler, run.task, run.tokenizer, config
        self.step = run.state["step"]  # the last one that was trained
        self.sent = self.step  # the one after which the sampler got its weights
        self.batches: dict[int, Batch] = {}
        if run.checkpoint and not run.folder.changed:  # other settings would write other answers
            self.batches = read_batches(run.checkpoint)
        next_sync = config.staleness * (self.step // config.staleness + 1)
        self.begin(range(self.step + 1, next_sync + 2))

    def begin(self, steps: range) -> None:
        for step in steps:
            if step > self.config.steps:
                break
            if step in self.batches:  # from the checkpoint
                continue
            problems, _ = draw_prompts(self.task, self.tokenizer, self.config, step)
            prompts = [problem.ids for problem in parallel.share(problems)]
            seed = parallel.own_seed(self.config.step_seed(step))
            asked = prompts, self.config.group_size, self.config.sampling, seed
            if hasattr(self.sampler, "begin"):
                fetch = self.sampler.begin(*asked).result
            else:
                fetch = partial(self.sampler.generate, *asked)
            self.batches[step] = Batch(self.sent, prompts, seed, fetch)

    def generate(self, prompts: list[list[int]], group_size: int, sampling: Sampling, seed: int) -> list[Sample]:
        """As the sampler's own: what was written ahead for the next step, or else answers of the newest weights."""
        batch = self.batches.get(self.step + 1)
        if batch is None or batch.seed != seed:
            self.give_newest()
            return self.sampler.generate(prompts, group_size, sampling, seed)
        if batch.prompts != prompts:
            raise UsageError(
                f"train() of the task gave other problems for step {self.step + 1} when it was asked again: with "
                "staleness, they must follow from `rng` and `step` alone"
            )
        return [sample._replace(age=self.step - batch.after) for sample in self.batches.pop(self.step + 1).get()]

    def finish(self) -> None:
        """Waits for all that was begun."""
        for step in sorted(self.batches):
            self.batches[step].get()

    def give_newest(self) -> None:
        if self.sent != self.step:
            self.finish()
            self.sampler.sync()
            self.sent = self.step

    def sleep(self) -> None:
        self.sampler.sleep()

    def sync(self) -> None:
        """After each update."""
        self.step += 1
        if self.step % self.config.staleness == 0:
            self.give_newest()
            self.begin(range(self.step + 2, self.step + self.config.staleness + 2))

    def files(self) -> dict[str, str]:
        """What is to be kept in a checkpoint, of all processes: names and texts."""
        self.finish()
        process = PartialState().process_index
        own = [
            {"process": process, "step": step, "after": b.after, "prompts": b.prompts, "seed": b.seed}
            | {"samples": [list(sample) for sample in b.get()]}
            for step, b in sorted(self.batches.items())
        ]
        return {FILE: "".join(map(as_line, parallel.join(own)))}


def read_batches(checkpoint: Path) -> dict[int, Batch]:
    """What a run had written ahead when this checkpoint was written; nothing if it did not write ahead."""
    rows, state = read_rows(checkpoint / FILE), PartialState()
    if rows and {row["process"] for row in rows} != set(range(state.num_processes)):
        raise UsageError(
            f"{checkpoint} has answers for {len({row['process'] for row in rows})} processes, and these are "
            f"{state.num_processes}: go on with as many"
        )
    batches = {}
    for row in rows:
        if row["process"] == state.process_index:
            samples = [Sample(*sample) for sample in row["samples"]]
            batches[row["step"]] = Batch(row["after"], row["prompts"], row["seed"], lambda: [], samples)
    return batches


def written_ahead(run, config: Config):
    """The run's sampler, or `Ahead` around it, whose answers are kept in checkpoints."""
    if hasattr(run.sampler, "close"):
        run.folder.at_the_end.callback(run.sampler.close, run.folder.path)
    if not config.staleness:
        return run.sampler
    sampler = Ahead(run, config)
    run.folder.more_files = sampler.files
    return sampler
