"""Drawing a token: `variants.draw`, one random number a row, in turns with `torch.multinomial`, one for each word.

    python benchmarks/draws.py

Milliseconds from logits to tokens and their log-probs, on one thread and on two; the median of the turns.
"""

import time
from statistics import median

import torch
from common import arguments, in_turns, origin, spread, table, write

SIZES = {"256 x 33": (256, 33, 500), "128 x 49,152": (128, 49152, 4), "16 x 151,936": (16, 151936, 8)}


def main() -> None:
    options = arguments(__doc__, "draws.md", "few draws", turns=5).parse_args()
    from variants import draw

    how = {"multinomial": lambda p, g: torch.multinomial(p, 1, generator=g), "draw": draw}
    lines = []
    for name, (rows, words, times) in SIZES.items():
        logits, generator = torch.randn(rows, words), torch.Generator().manual_seed(0)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            spent = {function: [] for function in how}
            for function in in_turns(list(how), 1 if options.tiny else options.turns):
                started = time.perf_counter()
                for _ in range(1 if options.tiny else times):
                    all_logps = logits.log_softmax(-1)
                    all_logps.gather(1, how[function](all_logps.exp(), generator))
                spent[function].append((time.perf_counter() - started) / times * 1000)
            old, new = (median(values) for values in spent.values())
            ratios = [a / b for a, b in zip(*spent.values(), strict=True)]
            lines.append([name, threads, f"{old:.2f}", f"{new:.2f}", spread(ratios, 1)])
    about = origin(f"`python benchmarks/draws.py`, {options.turns} turns, seed 0,", "Python", "torch")
    heads = "rows x words | threads | multinomial, ms | draw, ms | multinomial / draw"
    write(options.out, f"{about} Median; in brackets the smallest and the largest.", table(heads, lines))


if __name__ == "__main__":
    main()
