"""How long a step of 512 hostile MATH answers takes to judge, beside 512 plain ones.

    python benchmarks/hostile_answers.py
    python benchmarks/hostile_answers.py --checkout FOLDER --turns 1    another version, in its folder

Hostile are towers of powers, deep brackets, long numerals and the like: the texts of tests/tasks/test_math.py, over and
over.
"""

import ast
import itertools
import sys
import time
from statistics import median

from common import ROOT, arguments, origin, table, write

PLAIN = ["3", "\\frac{3}{4}", "x^2+1", "2\\sqrt{3}", "(1,2)", "\\pi", "1, 2, 3", "15 \\text{ cm}^2"]


def hostile_texts() -> list[str]:
    tree = ast.parse((ROOT / "tests" / "tasks" / "test_math.py").read_text())
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    found = next(node for node in assigned if getattr(node.targets[0], "id", "") == "HOSTILE")
    return eval(compile(ast.Expression(found.value), "test_math.py", "eval"))  # a list of ours: "(" * 900 and so on


def main() -> None:
    options = arguments(__doc__, "hostile_answers.md", answers=512, turns=5, checkout=str(ROOT)).parse_args()
    sys.path.insert(0, options.checkout)
    from tasks import competition_math

    example = {"problem": "P", "answer": "3"}
    if hasattr(competition_math, "parse_math"):  # an older version, with math-verify
        example["gold"] = competition_math.parse_math("$3$")
    seconds = {"plain": [], "hostile": []}
    for _ in range(options.turns):
        for kind, texts in (("plain", PLAIN), ("hostile", hostile_texts())):
            started = time.perf_counter()
            for text in itertools.islice(itertools.cycle(texts), options.answers):
                competition_math.math_reward(f"<think>so</think><answer>{text}</answer>", example)
            seconds[kind].append(time.perf_counter() - started)
    rows = [
        [f"{options.answers} {kind}", f"{median(s):.3f}", f"{min(s):.3f} to {max(s):.3f}"]
        for kind, s in seconds.items()
    ]
    ran = f"`python benchmarks/hostile_answers.py --turns {options.turns}`,"
    about = f"{origin(ran, 'Python')} Median and range of {options.turns} turns, one after the other on one core."
    write(options.out, about, table("answers | seconds | range", rows))


if __name__ == "__main__":
    main()
