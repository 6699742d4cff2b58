"""Which tests are quick: all but those of not_quick.txt, which took longer than others when they were last timed.

    python -m pytest --junitxml=.durations.xml
    python tests/quick.py                          writes not_quick.txt anew; --seconds is the time of all quick ones
"""

import argparse
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
LIST = HERE / "not_quick.txt"


def slow_functions() -> set[str]:
    return {line for line in LIST.read_text().splitlines() if line and not line.startswith("#")}


def function_of(path: str, name: str) -> str:
    """`view/test_report.py::test_x`, of all its parameters."""
    return f"{path}::{name.partition('[')[0]}"


def mark(items) -> None:
    """Called by pytest: marks what is quick, so that `-m quick` takes it."""
    slow = slow_functions()
    for item in items:
        path = Path(item.path).relative_to(HERE).as_posix()
        if function_of(path, item.name) not in slow and not item.get_closest_marker("slow"):
            item.add_marker("quick")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("durations", nargs="?", type=Path, default=HERE.parent / ".durations.xml")
    parser.add_argument("--seconds", type=float, default=40, help="of one process")
    options = parser.parse_args()
    seconds = Counter()
    for case in ElementTree.parse(options.durations).iter("testcase"):
        path = case.get("classname").replace(".", "/").removeprefix("tests/") + ".py"
        seconds[function_of(path, case.get("name"))] += float(case.get("time"))
    slow, left = [], options.seconds
    for function, taken in sorted(seconds.items(), key=lambda item: item[1]):
        left -= taken
        if left < 0:
            slow.append(function)
    LIST.write_text("# By tests/quick.py: these are not quick.\n" + "\n".join(sorted(slow)) + "\n")
    print(f"{len(seconds) - len(slow)} of {len(seconds)} functions are quick")


if __name__ == "__main__":
    main()
