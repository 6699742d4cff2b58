"""What a person sees of a run in the terminal: first lines, progress, groups of completions; and Ctrl-C."""

import signal
import threading
import time
from contextlib import contextmanager

import torch
from accelerate import PartialState
from tqdm import tqdm

from harness import parallel, streams
from harness.metrics import Alarms, equal_rewards, groups_of
from harness.settings import Config


def printable(text: str, limit: int = 160) -> str:
    """One line; control characters, which a terminal would obey, as escapes. Of a longer text only `limit` characters
    are shown, those of its beginning and its end."""
    if (left_out := len(text) - limit) > 0:
        text = f"{text[: limit // 2]} ... {left_out:,} characters ... {text[limit // 2 + left_out :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show_groups(step: int, rollouts: list, group_size: int, limit: int = 200) -> None:
    """Two whole groups, of mixed rewards if there are such, question first; longer answers are folded to `limit`."""
    for group in sorted(groups_of(rollouts, group_size), key=equal_rewards)[:2]:
        right = sum(bool(r.parts["correct"]) for r in group)
        lines = [f"step {step}, {right} of {group_size} right: {printable(group[0].prompt, 2000)}"]
        for i, r in enumerate(group, 1):
            mark = "right" if r.parts["correct"] else "     "
            cut = " (cut off)" if r.truncated else ""
            paid = f"reward {r.reward:5.2f} advantage {r.advantage:+5.2f}"
            lines.append(f"  {i:2} {mark} {paid}  {printable(r.text, limit)}{cut}")
        tqdm.write("\n".join(lines))


def show_group(rollouts: list, token_weights, tokenizer, config: Config) -> None:
    """One whole group, of mixed rewards if there is one: reward, advantage, weight of each token, tokens."""
    group_size = config.group_size
    lengths = torch.tensor([0 if r.truncated and config.mask_truncated else r.length for r in rollouts])
    limit, total_rows = config.max_completion_tokens, int((lengths > 0).sum())
    weights = token_weights(lengths, config.loss_weight, limit, total_rows=total_rows).tolist()
    first = next((i for i, r in enumerate(rollouts) if not r.dead), 0) // group_size * group_size
    print(f"one group, the completions of {printable(rollouts[first].prompt, 2000)}")
    print("  (weight: of each of its tokens in the loss)")
    print("  reward advantage    weight length  tokens, with | between them")
    for r, weight in list(zip(rollouts, weights, strict=True))[first : first + group_size]:
        tokens = printable("|".join(tokenizer.decode([token]) for token in r.completion_ids), 2000)
        print(f"  {r.reward:6.2f} {r.advantage:+9.3f} {weight:9.2e} {r.length:6d}  {tokens}")


def announce(config: Config, run) -> None:
    """The first lines of a run, a `loading.Run`."""
    accelerator, parameters = run.accelerator, sum(p.numel() for p in run.model.parameters())
    n, kind = accelerator.num_processes, accelerator.distributed_type.value.removeprefix("MULTI_").lower()
    device = f"{n} processes ({kind}) on {accelerator.device.type}" if n > 1 else accelerator.device
    print(
        f"GRPO: {config.model} ({parameters / 1e6:.2f} M parameters) on {config.task}, "
        f"{config.steps} steps of {config.prompts_per_step} prompts x {config.group_size} completions, "
        f"lr {config.lr:g}, on {device}. {config.about if config.steps else ''}\nrun folder: {run.folder.path}"
    )
    if run.checkpoint:
        print(f"going on from {run.checkpoint}")
    if run.sampler_name == "vllm":
        run.sampler.log.move_to(run.folder.path)
        print("what vLLM says is in vllm.log there")
    if config.uses_trainer_logps:
        print("the ratio is taken against log-probs of the trainer: one more forward pass a step")
    if config.drops_dead_groups and config.loss_is_regularised:
        print("dead groups are dropped although the loss has a KL penalty or an entropy bonus: they will not have it")


@contextmanager
def finish_step_on_signal():
    """Signals set the event, so that the step is finished and saved; a second one stops at once.

    Ctrl-C is a person's. The others come from a scheduler whose time is over, or a terminal that was closed: then the
    run is ended as well, with an evaluation and final/.
    """
    stop = WATCH.stop
    stop.clear()
    WATCH.out_of_time = False

    def on_signal(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        WATCH.out_of_time = number != signal.SIGINT
        stop.set()
        tqdm.write("stopping: a step is finished and saved first, an evaluation is left (once more to stop at once)")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.clear()  # or the next evaluation of this process would end at once


class EvaluationStopped(Exception):
    """A signal came while an evaluation was sampling."""


class Watch:
    """The bar of an evaluation. The sampler calls `tick` for each token, also where no evaluation is going on."""

    LONG = 600  # seconds: of a longer evaluation one is told

    def __init__(self):
        self.bar, self.stop, self.out_of_time, self.seconds = None, threading.Event(), False, 0.0

    def tick(self, ended: torch.Tensor) -> None:
        """`ended` marks the completions that ended with this token. Raises EvaluationStopped on a signal."""
        if self.bar is None:
            return
        self.bar.update(int(ended.sum()))
        self.tokens += 1
        seconds = time.monotonic() - self.started
        if self.longest and seconds > 5:
            hours, self.longest = seconds / self.tokens * self.longest / 3600, 0
            if hours * 3600 > self.LONG:
                tqdm.write(f"this evaluation takes up to {hours:.1f} hours here ({self.what}): {self.advice}")
        if self.stop.is_set() and PartialState().num_processes == 1:  # several would have to stop at the same token
            raise EvaluationStopped

    @contextmanager
    def evaluating(self, config: Config, problems: int, answers: int):
        """A bar over `problems` x `answers` completions; the body calls what it yields when some are done."""
        total, limit = problems * answers, config.max_completion_tokens
        self.what = f"{problems:,} problems x {answers} completions of at most {limit:,} tokens"
        self.advice = "lower task_args.eval_size, eval_samples or max_completion_tokens"
        self.longest = limit * -(-total // config.sample_rows)  # passes through the model, if no answer ends by itself
        self.started, self.tokens = time.monotonic(), 0
        shown = PartialState().is_main_process
        self.bar = tqdm(total=total, desc=f"evaluating {problems} x {answers}", leave=False, disable=not shown)

        def done(n: int) -> None:
            self.bar.update(n - self.bar.n)

        try:
            yield done
        finally:
            self.bar.close()
            self.bar, self.seconds = None, time.monotonic() - self.started
            for other in list(getattr(tqdm, "_instances", ())):  # the run's bar: its ETA is of steps alone
                other.unpause()


WATCH = Watch()


class Progress:
    """The bar of a run, its alarms, and now and then two groups; `progress` makes it."""

    def __init__(self, config: Config, step: int, accelerator, stop: threading.Event, started: float):
        self.config, self.stop = config, stop
        self.alarms = Alarms(config.epochs * config.minibatches, scaled=bool(accelerator.scaler))
        self.ends, self.longest, self.last = started + 60 * config.max_minutes, 0.0, None
        self.step, self.out_of_time = step, False
        shown = config.steps and accelerator.is_main_process
        self.bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True, disable=not shown)

    def stopping(self) -> bool:
        """Whether somebody wants the run to stop, or its time is over: asked by all processes together."""
        now = time.monotonic()
        # the evaluation at the end takes about as long as the last one; and there are checkpoint and final/ to write
        reserve = self.longest + 1.5 * WATCH.seconds + 3 * self.config.max_minutes
        if self.config.max_minutes and not self.stop.is_set() and now + reserve > self.ends:
            tqdm.write(f"max_minutes {self.config.max_minutes:g} is nearly over: the run saves, evaluates and ends")
            WATCH.out_of_time = True
            self.stop.set()
        if streams.LOST.is_set():
            self.stop.set()
        stopping = parallel.any_process(self.stop.is_set())
        self.out_of_time = parallel.any_process(WATCH.out_of_time) and self.step > 0
        return stopping

    def show(self, row: dict, rollouts: list) -> None:
        """A step that is over. Raises UsageError where going on makes no sense."""
        self.step = step = row["step"]
        every, now = self.config.print_groups, time.monotonic()
        self.longest, self.last = max(self.longest, now - (self.last or now)), now
        self.bar.update()
        self.bar.set_postfix_str(
            f"reward {row['reward']:.2f}, length {row['length']:.0f}, dead groups {row['zero_advantage_groups']:.0%}"
        )
        for warning in self.alarms(row):
            tqdm.write(f"step {step}: {warning}")
        if every and (step == 1 or step % every == 0):
            show_groups(step, rollouts, self.config.group_size)


@contextmanager
def progress(config: Config, step: int, accelerator, started: float):
    """The `Progress` of a run that goes on from `step`; a signal lets the step be finished."""
    with finish_step_on_signal() as stop:
        shown = Progress(config, step, accelerator, stop, started)
        try:
            yield shown
        finally:
            shown.bar.close()  # what is said of an error begins a line of its own
