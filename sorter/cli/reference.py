"""Prints config/settings.md, the reference of every setting, from the fields of `sorter.settings.Settings`.

`make reference` writes the file, and a test compares it.
"""

import operator
from itertools import groupby
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from sorter.settings import Settings, extra

_HEAD = """\
# All settings

Generated from [sorter/settings.py](../sorter/settings.py) by `make reference`: edit the descriptions there.

A flag overrides an environment variable, which overrides the TOML file named by `--config` or `SORTER_CONFIG`, which
overrides the default. A variable is the key in capitals with the prefix `SORTER_`: `SORTER_BATCH_SIZE=64`. A switch is
`true` or `false` in a variable or the TOML file, and `--recursive` or `--no-recursive` as a flag. A list is
`["*.png", "scans/"]` in the TOML file, `*.png,scans/` in a variable, and a flag that is given several times; it
replaces the default. Unknown keys and variables are errors. Paths are relative to the folder that sorter is started
in; `~` is your home folder. `none` takes back an `output`, a `max_error_rate` or an `on_sorted` that a weaker source
sets.
[sorter.toml](sorter.toml) is a file to start from.
"""
_KINDS = {"DIR": "path", "DEVICE": "name", "COMMAND": "command"}


def reference() -> str:
    """The page, in Markdown."""
    rows = [(extra(field, "group"), _row(name, field)) for name, field in Settings.model_fields.items()]
    parts = [_HEAD]
    for group, members in groupby(rows, key=operator.itemgetter(0)):
        lines = "\n".join(row for _, row in members)
        parts.append(f"## {group}\n\n| key | flag | default | values | description |\n|---|---|---|---|---|\n{lines}\n")
    return "\n".join(parts)


def _row(name: str, field: FieldInfo) -> str:
    flag = "--" + name.replace("_", "-")
    text, _, default = str(field.description).partition(" (default: ")
    return f"| `{name}` | `{flag}` | {default.rstrip(')') or _default(field)} | {_values(field)} | {text} |"


def _default(field: FieldInfo) -> str:
    if isinstance(field.default, bool):
        return "off"
    if isinstance(field.default, tuple):
        return ", ".join(f"`{value}`" for value in field.default)
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _values(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    if field.annotation is bool:
        return "switch"
    if isinstance(field.default, tuple):
        return "list"
    if (kind := _KINDS.get(extra(field, "metavar"))) is not None:
        return kind
    words = []
    for limit in field.metadata:
        match limit:
            case Ge(ge=least):
                words.append(f"at least {least:,}")
            case Gt(gt=least):
                words.append(f"more than {least:,}")
            case Le(le=most):
                words.append(f"at most {most:,.0f}")
            case Lt(lt=most):
                words.append(f"less than {most:,}")
    kind = "integer, " if field.annotation is int else ""
    return kind + ", ".join(words)


if __name__ == "__main__":
    print(reference(), end="")
