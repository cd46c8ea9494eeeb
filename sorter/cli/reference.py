"""Prints config/README.md, the reference of every setting, from the fields of `sorter.settings.Settings`.

`make reference` writes it; a test compares.
"""

import operator
from itertools import groupby
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from sorter.settings import Settings

_HEAD = """\
# Every setting

Made from [sorter/settings.py](../sorter/settings.py) by `make reference`. A flag wins over an environment variable,
that over the TOML file named by `--config` or `SORTER_CONFIG`, and that over the default. A variable is called like the
key, in capitals and with `SORTER_` before it: `SORTER_BATCH_SIZE=64`. A switch is `true` or `false` there, and as a
flag `--recursive` or `--no-recursive`. Unknown keys and variables are errors. Paths are relative to the folder that
sorter is started in; `~` is your home folder. [sorter.toml](sorter.toml) is a file to start from.
"""
_KINDS = {"DIR": "path", "DEVICE": "name", "COMMAND": "command"}


def reference() -> str:
    """The whole page, in Markdown."""
    rows = [(_extra(field, "group"), _row(name, field)) for name, field in Settings.model_fields.items()]
    parts = [_HEAD]
    for group, members in groupby(rows, key=operator.itemgetter(0)):
        lines = "\n".join(row for _, row in members)
        parts.append(f"## {group}\n\n| key | flag | default | values | what it is |\n|---|---|---|---|---|\n{lines}\n")
    return "\n".join(parts)


def _extra(field: FieldInfo, name: str) -> str:
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra[name])


def _row(name: str, field: FieldInfo) -> str:
    flag = "--" + name.replace("_", "-")
    what, _, default = str(field.description).partition(" (default: ")
    return f"| `{name}` | `{flag}` | {default.rstrip(')') or _default(field)} | {_values(field)} | {what} |"


def _default(field: FieldInfo) -> str:
    if isinstance(field.default, bool):
        return "off"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _values(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    if field.annotation is bool:
        return "switch"
    if (kind := _KINDS.get(_extra(field, "metavar"))) is not None:
        return kind
    words = []
    for limit in field.metadata:
        match limit:
            case Ge(ge=least):
                words.append(f"from {least:,}")
            case Gt(gt=below):
                words.append(f"above {below:,}")
            case Le(le=most):
                words.append(f"to {most:,.0f}")
            case Lt(lt=above):
                words.append(f"below {above:,}")
    whole = "whole, " if field.annotation is int else ""
    return whole + " ".join(words)


if __name__ == "__main__":
    print(reference(), end="")
