"""The argument parser: made from a list of commands and from the fields of `Settings`."""

import argparse
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

import sorter
from sorter.errors import ExitCode
from sorter.settings import Settings, extra

_EXIT_CODES = """\
exit codes:
  0  success, even if files that are not photos were skipped
  1  sorting had to stop: the disk is full or the inbox disappeared
  2  wrong usage, configuration or model; no photo was touched
  3  finished, but photos went to failed/ or stayed where they were, or the run was interrupted
  4  not now: another sorter or program has the folder or the GPU, or there is no inbox; try later
"""
_DESCRIPTION = "Sorts photos into cats/ and dogs/ with a ResNet50, and never overwrites or deletes one."
_SOURCES = "Settings come from flags, then SORTER_... variables, then the TOML file."
_CONFIG_HELP = "TOML file with any of these settings, using _ instead of - (also SORTER_CONFIG)"

FOLDERS = ("Folders",)
EVERY_GROUP = tuple(dict.fromkeys(extra(field, "group") for field in Settings.model_fields.values()))


@dataclass(frozen=True, slots=True)
class Command:
    """One command of `sorter`.

    Attributes:
        help: what the command does, in one line that starts in lower case and ends without a full stop.
        action: called with the settings, if the command takes any, and with its own options as keyword arguments.
        groups: the groups of settings that the command takes.
        usage: the arguments that its usage line names.
        add_options: adds the command's own options.
    """

    help: str
    action: Callable[..., ExitCode]
    groups: Sequence[str] = ()
    usage: str = ""
    add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line and exit with `ExitCode.USAGE`.

    Attributes:
        commands: the parser of each command, by name; empty for a command's own parser.
        summary: what a command does, in one line; empty for the parser of all commands.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_formatter, epilog=_EXIT_CODES, **options)
        self.commands: dict[str, Parser] = {}
        self.summary = ""

    def parse_known_args(self, *given: Any, **options: Any) -> Any:
        """As argparse's, but a command refuses what it does not know itself, and so names its own help."""
        known, unknown = super().parse_known_args(*given, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Print a usage error as one line, and exit."""
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def build(commands: dict[str, Command]) -> Parser:
    """The parser of the entire command line.

    What it parses has `command`, the name, besides the options of that command; options that were not given are absent
    if they are settings.
    """
    parser = Parser(prog="sorter", description=f"{_DESCRIPTION}\n{_SOURCES}")
    parser.add_argument("-V", "--version", action="version", version=f"sorter {sorter.__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in commands.items():
        usage = ["sorter", name, command.usage]
        sentence = f"{command.help[0].upper()}{command.help[1:]}."
        if command.groups:
            usage.append("[option ...]")
            sentence += f" {_SOURCES}"
        one = added.add_parser(
            name, usage=" ".join(filter(None, usage)), help=command.help, description=textwrap.fill(sentence)
        )
        command.add_options(one)
        _add_settings(one, command.groups)
        one.summary = command.help
        parser.commands[name] = one
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(98, shutil.get_terminal_size((98, 24)).columns - 2)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width)


def _add_settings(parser: argparse.ArgumentParser, groups: Sequence[str]) -> None:
    for title in groups:
        group = parser.add_argument_group(title.lower())
        if title == "Folders":
            group.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=_CONFIG_HELP)
        for name, field in Settings.model_fields.items():
            if extra(field, "group") != title:
                continue
            flag = "--" + name.replace("_", "-")
            if field.annotation is bool:
                group.add_argument(
                    flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=_help(field)
                )
            elif isinstance(field.default, tuple):
                group.add_argument(
                    flag,
                    metavar=extra(field, "metavar"),
                    action="append",
                    default=argparse.SUPPRESS,
                    help=f"{_help(field)}; may be repeated",
                )
            else:
                group.add_argument(flag, metavar=extra(field, "metavar"), default=argparse.SUPPRESS, help=_help(field))


def _help(field: FieldInfo) -> str:
    text = str(field.description).replace("%", "%%")
    if field.default is None or field.default is False or "(default" in text:
        return text
    if isinstance(field.default, tuple):
        return f"{text} (default: {len(field.default)}, in config/settings.md)"
    default = f"{field.default:g}" if isinstance(field.default, float) else field.default
    return f"{text} (default: {default})"
