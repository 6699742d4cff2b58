"""The command line of this room: `python -m view report ...` and `python -m view play ...`, each with `--help`."""

import sys
from importlib import import_module

VIEWS = ("report", "play")


def main(argv: list[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in VIEWS:
        is_help = name in ("-h", "--help")
        print(f"usage: python -m view {{{','.join(VIEWS)}}} RUN ...", file=sys.stdout if is_help else sys.stderr)
        sys.exit(0 if is_help else 2)
    import_module(f"view.{name}").main(rest)


if __name__ == "__main__":
    main()
