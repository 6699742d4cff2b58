"""The command line of this room.

    python -m view report RUN ...     an HTML page of a run, or of several beside each other
    python -m view play RUN           the base's and the trained model's answers to a problem that you type

Each has `--help`.
"""

import sys
from importlib import import_module

VIEWS = ("report", "play")


def main(argv: list[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in VIEWS:
        print(f"error: there is no view {name!r}: choose {' or '.join(VIEWS)}, as in python -m view report runs/<run>",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    import_module(f"view.{name}").main(rest)


if __name__ == "__main__":
    main()
