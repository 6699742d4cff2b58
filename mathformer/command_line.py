"""What the commands of this package share: settings from a dataclass, errors as one line."""

import sys
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from tasks import UsageError


def parse_settings(settings_class: type, doc: str, args: list[str] | None = None):
    """An instance of the dataclass from the command line; the docstrings under its fields are the help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=doc.splitlines()[0])
    parser.add_class_arguments(settings_class, as_group=False)
    return settings_class(**vars(parser.parse_args(args)))


def check_folder_of(file: str | None) -> None:
    """Raises ValueError if a file that is written at the end could then not be written."""
    if file and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written: there is no folder {Path(file).parent}")


@contextmanager
def errors_as_lines():
    """Ends the program with one line on what a person has to change, and without one on Ctrl-C."""
    try:
        yield
    except (ValueError, UsageError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
