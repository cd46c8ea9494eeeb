"""The command line: flags, commands, exit codes. The flags are made from the fields of `settings.Settings`."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import structlog
from pydantic.fields import FieldInfo

import sorter
from sorter import logs, settings
from sorter.cli import console, look_back, shell_help
from sorter.cli import run as commands
from sorter.errors import ExitCode, SorterError
from sorter.settings import Settings

_EXIT_CODES = """\
exit codes:
  0  done, also when files that are no photos were skipped
  1  could not go on: disk full, inbox vanished
  2  configuration, model or usage is wrong, or another sorter has the inbox; no photo was touched
  3  done, but some photos went to failed/ or were left in the inbox, or it was interrupted
"""
_DESCRIPTION = "Sorts photos into cats/ and dogs/ with a ResNet50, and never overwrites or deletes one."
_SOURCES = "Settings come from flags, then SORTER_... variables, then the TOML file."
_CONFIG_HELP = "TOML file with any of these settings, its keys named like the flags with _ for - (also SORTER_CONFIG)"


class _Parser(argparse.ArgumentParser):
    """An argparse whose errors are one line and exit with the code for wrong usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(98, shutil.get_terminal_size((98, 24)).columns - 2))
        self._action_max_length = 14  # argparse forgets the indent of commands, and would break after the longest


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="sorter", description=f"{_DESCRIPTION}\n{_SOURCES}", epilog=_EXIT_CODES, formatter_class=_Formatter
    )
    parser.add_argument("--version", action="version", version=f"sorter {sorter.__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    folders, settings_ = "[--inbox DIR] [--output DIR] [--config FILE]", None
    described = {
        "run": ("sort the inbox: once, or whatever is dropped into it until stopped", commands.run, folders, settings_),
        "check": (
            "check configuration, model, device and permissions; touch no photo",
            commands.check,
            folders,
            settings_,
        ),
        "history": ("show what went where, when and why", look_back.show_history, folders, ("Folders",)),
        "status": ("show how things stand", look_back.show_status, folders, ("Folders", "Model")),
        "undo": ("bring photos back under their old names", look_back.undo, "--last|--run ID|PATH...", ("Folders",)),
        "bench": (
            "measure how fast this machine sorts, on copies of photos",
            commands.bench,
            "[--photos DIR]",
            ("Model",),
        ),
        "completion": ("print what completes these commands in a shell", _completion, "|".join(shell_help.SHELLS), ()),
        "manpage": ("print the manual page", _manpage, "", ()),
    }
    add_options = {
        "run": _add_run_options,
        "history": look_back.add_history_options,
        "status": look_back.add_status_options,
        "undo": look_back.add_undo_options,
        "bench": _add_bench_options,
        "completion": _add_completion_options,
    }
    for name, (what, action, usage, groups) in described.items():
        sentence = what[0].upper() + what[1:] + "."
        if groups != ():
            sentence += f" {_SOURCES}"
        command = added.add_parser(
            name,
            usage=" ".join(filter(None, ("sorter", name, usage, "[option ...]" * (groups != ())))),
            help=what,
            description=textwrap.fill(sentence),
            epilog=_EXIT_CODES,
            formatter_class=_Formatter,
        )
        command.set_defaults(action=action, has_settings=groups != ())
        if name in add_options:
            add_options[name](command)
        _add_settings(command, groups)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("what to say").add_argument(
        "--json", action="store_true", help="with --dry-run, print each decision as a line of JSON"
    )


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to measure")
    group.add_argument("--photos", metavar="DIR", type=Path, help="sort copies of these (default: generated ones)")
    group.add_argument(
        "--count",
        metavar="N",
        type=look_back.positive,
        default=500,
        help="copies, photos repeated as needed (default: 500)",
    )
    group.add_argument(
        "--runs", metavar="N", type=look_back.positive, default=3, help="how often, medians count (default: 3)"
    )
    group.add_argument("--json", action="store_true", help="print one line of JSON")


def _add_completion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=shell_help.SHELLS, help=", ".join(shell_help.SHELLS))


def _add_settings(parser: argparse.ArgumentParser, only: Sequence[str] | None) -> None:
    groups: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        title = str(extra["group"])
        if only is not None and title not in only:
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title.lower())
            if title == "Folders":
                groups[title].add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=_CONFIG_HELP)
        flag = "--" + name.replace("_", "-")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = extra["metavar"]
        groups[title].add_argument(flag, **options)


def _help(field: FieldInfo) -> str:
    text = str(field.description).replace("%", "%%")
    if field.default is None or field.default is False or "(default" in text:
        return text
    default = f"{field.default:g}" if isinstance(field.default, float) else field.default
    return f"{text} (default: {default})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; errors are sentences on standard error."""
    flags = vars(build_parser().parse_args(arguments))
    command, action, has_settings = flags.pop("command"), flags.pop("action"), flags.pop("has_settings")
    log_format, log_level = flags.get("log_format", "auto"), flags.get("log_level", "info")
    code = int(ExitCode.DONE)
    try:
        # What is no setting is the command's own; a flag that both have is the command's.
        own = {name for name in flags if name not in Settings.model_fields and name != "config"}
        if command == "undo":
            own.add("dry_run")
        options = {name: flags.pop(name) for name in own}
        if has_settings:
            chosen = settings.load(flags)
            log_format, log_level = chosen.log_format, chosen.log_level
            code = int(action(chosen, **options))
        else:
            code = int(action(**options))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads, as `| head` does, has seen enough
        if sys.stdout is not None:
            console.discard(sys.stdout)
        return code
    except Exception as error:
        # Standard error is a log from the first line on where a program reads it.
        if command == "run" and logs.is_json(log_format) and not structlog.is_configured():
            logs.configure("json", "info")
        _say(error, with_traceback=log_level == "debug")
        return int(error.exit_code if isinstance(error, SorterError) else ExitCode.STOPPED)


def _say(error: Exception, *, with_traceback: bool) -> None:
    detail = str(error) if isinstance(error, SorterError) else f"{type(error).__name__}: {error}"
    if structlog.is_configured():
        structlog.get_logger().error("run.failed", detail=detail, exc_info=error if with_traceback else None)
    else:
        sys.stderr.write("".join(f"sorter: {line}\n" for line in detail.splitlines()))


def _completion(*, shell: str) -> ExitCode:
    print(shell_help.completion(build_parser(), shell))
    return ExitCode.DONE


def _manpage() -> ExitCode:
    print(shell_help.manual_page(build_parser()), end="")
    return ExitCode.DONE
