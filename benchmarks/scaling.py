"""What a larger step costs in time and memory, and how much of a batch is padding.

    python benchmarks/scaling.py

Work: the Qwen2 of against_trl.py with 1, 2, 4 and 8 times 8 prompts, 8 completions each, all of exactly 48 tokens.
What is worked on at the same time stays the same: 64 rows are sampled together (`sample_rows`), 32 go through an
update together (`tokens_per_microbatch`), and even the smallest step fills both. So time should grow with the tokens,
and memory not at all. Each run is a process of its own and the sizes take turns; a figure is the median over the turns
of the mean over a run's steps, without the first. `peak RSS`: how much the process's largest resident memory grew in
the steps. `live tensors`: the peak of the bytes that one update's tensors take, by torch's profiler, without those that
were there before it.

Padding: percent of the positions of all batches that hold no token; in brackets the number of batches. `default run`:
the rows of the first of the updates that `python grpo.py` makes in a step. `geometric`: 32 x 8 completions that end
after each token with a probability of 1/250, and at 512; prompts of 50 to 150 tokens. `together`: all rows in one
batch. `in order`: in the order in which they were sampled, as many to a batch as the budget allows if all were as long
as the longest. `sorted`: `microbatches`.
"""

import json
import math
import random
import tempfile
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import mean

import torch
from against_trl import make_model
from common import arguments, in_a_process, in_turns, origin, spread, table, train, write

from harness.batching import microbatches, row_tokens
from harness.metrics import peak_memory

P, G, TOKENS, BUDGETS = 8, 8, 48, (2048, 8192, 16384)


def peak_of_live_tensors(profiler) -> int:
    """Bytes above those at the start; an event has less than 0 where memory is given back."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def run(model: str, times: int, tiny: bool) -> dict:
    """One run; its last step is profiled, and not timed."""
    import grpo
    from harness import loading

    steps, tokens = (2, 2) if tiny else (2 + 8 // times, TOKENS)
    update, found = grpo.update, {}

    def no_eos(model, tokenizer):  # when everything is loaded
        found["before"] = peak_memory(torch.device("cpu"))
        return []

    def profiled_update(*args):
        if args[-1] < steps:
            return update(*args)
        found["peak RSS, MB"] = 1000 * (peak_memory(torch.device("cpu")) - found.pop("before"))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            learned = update(*args)
        found["live tensors, MB"] = peak_of_live_tensors(profiler) / 1e6
        return learned

    loading.find_eos, grpo.update = no_eos, profiled_update
    settings = dict(model=model, task=f"{Path(__file__).with_name('against_trl.py')}:Parity", device="cpu", lr=1e-6)
    settings |= dict(prompts_per_step=times * P, group_size=G, max_completion_tokens=tokens, max_prompt_tokens=16)
    settings |= dict(task_args={"digits": 1}, sample_rows=P * G, eval_samples=1, dead_groups="keep")
    settings |= dict(tokens_per_microbatch=P * G // 2 * (5 + tokens))  # prompts have 5
    metrics, _ = train(**settings, steps=steps, save_steps=steps)
    rows = metrics[1:-1] or metrics[:1]
    found |= {part: mean(row[part] for row in rows) for part in ("seconds_sample", "seconds_train")}
    return found | {"tokens": times * P * G * tokens, "threads": torch.get_num_threads()}


def trained_rows(steps: int) -> list[list]:
    """The rows of the first update of each step of the default run: dead groups have no forward pass."""
    import grpo

    cut, seen = grpo.own_microbatches, []

    def recorded(rows, *args):
        seen.append(rows)
        return cut(rows, *args)

    grpo.own_microbatches = recorded
    with tempfile.TemporaryDirectory() as runs:
        config = replace(grpo.parse_config([]), steps=steps, task_args={"eval_size": 2}, runs=runs)
        grpo.train(config)
    return seen[:: config.minibatches]


def geometric_rows() -> list:
    import grpo

    rng, rows = random.Random(0), []
    for prompt in (rng.randrange(50, 151) for _ in range(32)):
        lengths = [1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / 250)) for _ in range(8)]
        rows += [grpo.Rollout([0] * prompt, [0] * min(length, 512), [], False) for length in lengths]
    return rows


def padding(batches: list[list]) -> str:
    positions = sum(len(batch) * max(row_tokens(row) for row in batch) for batch in batches)
    tokens = sum(row_tokens(row) for batch in batches for row in batch)
    return f"{100 * (1 - tokens / positions):.1f} ({len(batches)})"


def padding_table(tiny: bool) -> str:
    heads = [f"{order}, {budget}" for budget in BUDGETS for order in ("in order", "sorted")]
    steps, lines = trained_rows(1 if tiny else 50), []
    named = {f"default run, step {i}": steps[i - 1] for i in (1, 25, 50) if i <= len(steps)}
    for name, rows in (named | {"geometric": geometric_rows()}).items():
        longest = max(row_tokens(row) for row in rows)
        cells = [len(rows), f"{mean(row_tokens(row) for row in rows):.1f}", longest, padding([rows])]
        for budget in BUDGETS:
            n = max(1, budget // longest)
            cells.append(padding([rows[i : i + n] for i in range(0, len(rows), n)]))
            cells.append(padding(microbatches(rows, budget)))
        lines.append([name, *cells])
    return table(f"rows of | rows | tokens a row | longest | together | {' | '.join(heads)}", lines)


def main() -> None:
    parser = arguments(__doc__, "scaling.md", "one turn, two short steps of the smallest size", one=2, turns=3)
    options = parser.parse_args()
    if options.one:
        model, times = options.one
        print(json.dumps(run(model, int(times), options.tiny)))
        return
    turns, sizes, tiny = (1, [1], ["--tiny"]) if options.tiny else (options.turns, [1, 2, 4, 8], [])
    found = {times: [] for times in sizes}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for times in in_turns(sizes, turns):
            found[times].append(in_a_process(__file__, "--one", folder, str(times), *tiny))
            print(times, found[times][-1], flush=True)
    threads = f"threads: {found[1][0]['threads']} (of the default run: 1)"
    heads = "prompts a step | tokens | sampling, seconds a step | a 1,000 tokens | to the first row"
    heads += " | training, seconds a step | a 1,000 tokens | to the first row | peak RSS, MB | live tensors, MB"
    about = (
        f"{origin(f'`python benchmarks/scaling.py`, {turns} turns, seed 0, {threads},')} In brackets the smallest and "
        "the largest of the turns."
    )
    lines = []
    for times, rows in found.items():
        cells = [times * P, rows[0]["tokens"]]
        for part in ("seconds_sample", "seconds_train"):
            by_token = [1000 * row[part] / row["tokens"] for row in rows]
            first = [1000 * row[part] / row["tokens"] for row in found[1]]
            ratios = [a / b for a, b in zip(by_token, first, strict=True)]
            cells += [spread([row[part] for row in rows], 2), spread(by_token, 3), spread(ratios, 2)]
        cells += [spread([row[key] for row in rows], 0) for key in ("peak RSS, MB", "live tensors, MB")]
        lines.append(cells)
    write(options.out, about, table(heads, lines), padding_table(options.tiny))


if __name__ == "__main__":
    main()
