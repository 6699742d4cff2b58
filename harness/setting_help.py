"""What a class of settings has, read from its source: names, types, defaults, sentences, groups; and the help of it."""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from typing import Any, Literal, NamedTuple, get_args, get_origin

KINDS = {int: "a whole number", float: "a number", bool: "true or false", dict: "names and values", list: "a list"}


class Setting(NamedTuple):
    name: str
    type: Any
    default: Any  # dataclasses.MISSING if it must be given
    about: str  # the docstring under the field
    group: str  # the comment above the fields

    @property
    def choices(self) -> tuple:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def kind(self) -> str:
        """What its values are, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        types = [get_origin(t) or t for t in get_args(self.type) or [self.type] if t is not type(None)]
        types = types if get_origin(self.type) not in (list, dict) else [get_origin(self.type)]
        return KINDS.get(types[0], "text")


def settings_of(settings_class: type) -> dict[str, Setting]:
    """The fields of a dataclass, with what its source says of them."""
    source = textwrap.dedent(inspect.getsource(settings_class))
    body, lines, group, found = ast.parse(source).body[0].body, source.splitlines(), "", {}
    fields = {f.name: f for f in dataclasses.fields(settings_class)}
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and node.target.id in fields:
            above = lines[node.lineno - 2].strip()
            group = above.removeprefix("# ") if above.startswith("# ") else group
            about = below.value.value if isinstance(below, ast.Expr) else ""
            field = fields[node.target.id]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            found[field.name] = Setting(field.name, field.type, default, " ".join(about.split()), group)
    return found


def help_text(settings: dict[str, Setting], usage: str, about: str) -> str:
    """Each setting with its default in a line or two, in the groups of the source."""
    width, group = min(110, shutil.get_terminal_size((100, 24)).columns), None
    lines = [f"usage: {usage}", "", *textwrap.wrap(about, width), "", "Each setting is shown with its default."]
    for s in settings.values():
        if s.group != group:
            group = s.group
            lines += ["", group] if group else [""]
        default = s.default if not isinstance(s.default, bool) else str(s.default).lower()
        default = "(needed)" if s.default is dataclasses.MISSING else "" if default in ("", None, {}) else default
        shown = f"  --{s.name} {default if not isinstance(default, list) else '[...]'}".rstrip()
        listed = all(re.search(rf"\b{choice}\b", s.about) for choice in s.choices)
        text = s.about if listed else f"{s.about}: {', '.join(s.choices)}"
        first, *rest = textwrap.wrap(text, width - 34) or [""]
        lines += [f"{shown:33} {first}" if len(shown) < 33 else f"{shown}\n{'':33} {first}"]
        lines += [f"{'':33} {line}" for line in rest]
    return "\n".join(lines)
