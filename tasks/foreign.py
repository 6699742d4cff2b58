"""Values and errors of anyone's code, such as a task's: as plain numbers, and in one line."""


def plain(value):
    """A number of numpy or torch as one of Python; anything else as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError, RuntimeError):  # an array of several
        return value


def shortened(value) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # anyone's object, or an integer that Python does not print
        return f"of type {type(value).__name__} ({type(error).__name__})"
    return text if len(text) <= 100 else f"{text[:100]}..."


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
