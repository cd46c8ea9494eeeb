"""The commands of `sorter`, and how one of them is run: arguments in, an exit code out."""

import io
import os
import sys
from collections.abc import Sequence

import structlog

from sorter import logs, settings
from sorter.cli import bench, check, cluster, console, history, retry, review, run, shell_help, status, undo
from sorter.cli.parser import EVERY_GROUP, FOLDERS, Command, Parser, build
from sorter.errors import ExitCode, SorterError
from sorter.settings import Settings

_FOLDER_FLAGS = "[--inbox DIR] [--output DIR] [--config FILE]"


def _print_completion(*, shell: str) -> ExitCode:
    print(shell_help.completion(build_parser(), shell))
    return ExitCode.DONE


def _print_manual_page() -> ExitCode:
    print(shell_help.manual_page(build_parser()), end="")
    return ExitCode.DONE


COMMANDS = {
    "run": Command(
        "sort the inbox: once, or as photos arrive until stopped",
        run.run,
        groups=EVERY_GROUP,
        usage=_FOLDER_FLAGS,
        add_options=run.add_options,
    ),
    "retry": Command(
        "sort the photos in unsure/ or failed/ again; those that belong there stay",
        retry.retry,
        groups=tuple(group for group in EVERY_GROUP if group != "Watching"),
        usage=f"unsure|failed {_FOLDER_FLAGS}",
        add_options=retry.add_options,
    ),
    "check": Command(
        "check configuration, model, device and permissions without touching a photo",
        check.check,
        groups=EVERY_GROUP,
        usage=_FOLDER_FLAGS,
    ),
    "history": Command(
        "show what went where, when and why",
        history.show,
        groups=FOLDERS,
        usage=_FOLDER_FLAGS,
        add_options=history.add_options,
    ),
    "status": Command(
        "show what is running, waiting and sorted",
        status.show,
        groups=(*FOLDERS, "Files", "Model"),
        usage=_FOLDER_FLAGS,
        add_options=status.add_options,
    ),
    "undo": Command(
        "move sorted photos back to where they came from",
        undo.undo,
        groups=FOLDERS,
        usage="--last|--run ID|--since WHEN|PATH...",
        add_options=undo.add_options,
    ),
    "review": Command(
        "look at sorted photos in the browser, and correct them",
        review.review,
        groups=(*FOLDERS, "Model"),
        usage=_FOLDER_FLAGS,
        add_options=review.add_options,
    ),
    "cluster": Command(
        "sort with many machines, in an object store or on a disk that they share",
        cluster.cluster,
        groups=EVERY_GROUP,
        usage="run|status|undo|check [--inbox URL] [--output URL]",
        add_options=cluster.add_options,
    ),
    "bench": Command(
        "measure how fast this machine sorts, on copies of photos",
        bench.bench,
        groups=("Model",),
        usage="[--photos DIR]",
        add_options=bench.add_options,
    ),
    "completion": Command(
        "print a completion script for a shell",
        _print_completion,
        usage="|".join(shell_help.SHELLS),
        add_options=shell_help.add_completion_options,
    ),
    "manpage": Command("print the manual page", _print_manual_page),
}


def build_parser() -> Parser:
    """The parser of the entire command line."""
    return build(COMMANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are sentences on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name, or an arrow, on a terminal that is not UTF-8
    flags = vars(build_parser().parse_args(arguments))
    name = flags.pop("command")
    command = COMMANDS[name]
    # A flag that is not a setting is an option of the command.
    options = {flag: flags.pop(flag) for flag in [*flags] if flag not in Settings.model_fields and flag != "config"}
    log_format = flags.get("log_format", os.environ.get("SORTER_LOG_FORMAT"))
    log_level = flags.get("log_level", "info")
    code = ExitCode.DONE
    try:
        if command.groups:
            chosen = settings.load(flags)
            log_format, log_level = chosen.log_format, chosen.log_level
            code = command.action(chosen, **options)
        else:
            code = command.action(**options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `| head`, has seen enough
        if sys.stdout is not None:
            console.discard(sys.stdout)
    except Exception as error:
        as_json = log_format == "json"
        if name in ("run", "retry", "cluster") and as_json and not structlog.is_configured():
            logs.configure("json", "info")
        _report(error, as_json=as_json, with_traceback=log_level == "debug")
        return int(error.exit_code if isinstance(error, SorterError) else ExitCode.STOPPED)
    return int(code)


def _report(error: Exception, *, as_json: bool, with_traceback: bool) -> None:
    detail = str(error) if isinstance(error, SorterError) else f"{type(error).__name__}: {error}"
    # What a person corrects or did is said plainly, wherever standard error goes; it is an event for those who asked.
    is_plain = isinstance(error, SorterError) and error.exit_code != ExitCode.STOPPED
    if structlog.is_configured() and (as_json or not is_plain):
        structlog.get_logger().error("run.failed", detail=detail, exc_info=error if with_traceback else None)
    else:
        for line in detail.splitlines():
            logs.say(f"sorter: {line}")
