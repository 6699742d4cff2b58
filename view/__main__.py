"""The command line of this room.

    python -m view report RUN ...     an HTML page of a run, or of several beside each other
    python -m view play RUN           the base's and the trained model's answers to a problem that you type

Each has `--help`.
"""

import dataclasses
import sys
from pathlib import Path

import yaml

from harness.command_line import ArgumentParser, errors_as_lines
from harness.files import check_format_of
from harness.settings import Config
from tasks import UsageError
from view import report


def read_config(run: Path) -> Config:
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is no run's folder: there is no config.yaml in it")
    check_format_of(run)
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    unknown = sorted(settings.keys() - {f.name for f in dataclasses.fields(Config)})
    if unknown:
        raise UsageError(f"{run / 'config.yaml'} was written by another version: {', '.join(unknown)} is unknown")
    return Config(**settings | {"report_to": "", "trust_remote_code": False})  # which the folder cannot say


def play(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m view play", description="answers to problems that you type")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--samples", type=int, default=3, help="sampled answers besides the most likely one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    options = parser.parse_args(argv)
    config = dataclasses.replace(read_config(options.run), trust_remote_code=options.trust_remote_code)
    from view.play import play  # torch takes seconds: a mistake is answered before

    play(options.run, config, max(0, options.samples), options.seed)


VIEWS = {"report": report.main, "play": play}


def main(argv: list[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    with errors_as_lines(OSError):
        if name not in VIEWS:
            raise UsageError(f"there is no view {name!r}: take report or play, as in python -m view report runs/<run>")
        VIEWS[name](rest)


if __name__ == "__main__":
    main()
