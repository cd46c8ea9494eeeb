"""The command line: commands, wiring, exit codes. The flags are made from the fields of `settings.Settings`."""

import argparse
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import structlog
from pydantic.fields import FieldInfo

import sorter
from sorter import console, hook, lock, logs, look_back, manifest, preflight, settings, shell_help
from sorter.atomic import make_folder
from sorter.errors import ConfigurationError, ExitCode, SorterError, StorageError
from sorter.history import FOLDER, NAME, History, Run
from sorter.inbox import Inbox, is_temporary
from sorter.lock import Lock
from sorter.mover import Mover
from sorter.past import Past
from sorter.recovery import recover
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
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    folders, settings_ = "[--inbox DIR] [--output DIR] [--config FILE]", None
    described = {
        "run": ("sort the inbox: once, or whatever is dropped into it until stopped", _run, folders, settings_),
        "check": ("check configuration, model, device and permissions; touch no photo", _check, folders, settings_),
        "history": ("show what went where, when and why", look_back.show_history, folders, ("Folders",)),
        "status": ("show how things stand", look_back.show_status, folders, ("Folders", "Model")),
        "undo": ("bring photos back under their old names", look_back.undo, "--last|--run ID|PATH...", ("Folders",)),
        "bench": ("measure how fast this machine sorts, on copies of photos", _bench, "[--photos DIR]", ("Model",)),
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
        command = commands.add_parser(
            name,
            usage=" ".join(filter(None, ("sorter", name, usage, "[option ...]" * (groups != ())))),
            help=what,
            description=textwrap.fill(sentence),
            epilog=_EXIT_CODES,
            formatter_class=_Formatter,
        )
        command.set_defaults(action=action)
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
    command, action = flags.pop("command"), flags.pop("action")
    log_format, log_level = flags.get("log_format", "auto"), flags.get("log_level", "info")
    try:
        # What is no setting is the command's own; a flag that both have is the command's.
        own = {name for name in flags if name not in Settings.model_fields and name != "config"}
        if command == "undo":
            own.add("dry_run")
        options = {name: flags.pop(name) for name in own}
        chosen = settings.load(flags)
        log_format, log_level = chosen.log_format, chosen.log_level
        code = int(action(chosen, **options))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads, as `| head` does, has seen enough
        console.discard(sys.stdout)
        return ExitCode.STOPPED
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


def _run(chosen: Settings, *, json: bool) -> ExitCode:
    if json and not chosen.dry_run:
        raise ConfigurationError("--json prints what would happen: give it with --dry-run")
    model = manifest.read(chosen.model)
    chosen = preflight.decided(chosen, model)
    preflight.check_folders(chosen, model)
    command = None if chosen.on_sorted is None else hook.split(chosen.on_sorted)
    preflight.check_metrics(chosen)
    stream = logs.configure(chosen.log_format, chosen.log_level)
    log = structlog.get_logger()

    # Heavy from here on: everything that can be wrong without them has been said.
    from sorter.decoders import default_workers
    from sorter.pipeline import Pipeline
    from sorter.service import Service, Stop
    from sorter.watcher import Watcher

    stop = Stop(idle_code=ExitCode.INCOMPLETE if chosen.once else ExitCode.DONE)
    stop.listen()
    from sorter.engines import open_engine

    inbox = Inbox(
        chosen.inbox,
        recursive=chosen.recursive,
        excluded=preflight.excluded(chosen, model),
        settle_seconds=chosen.settle_seconds,
    )
    # Last of what can be wrong at the start, so that nothing was touched when the process ends with 2.
    engine = open_engine(
        chosen.model,
        model,
        chosen.engine,
        chosen.device,
        chosen.batch_size,
        chosen.min_confidence,
        catch_neither=chosen.catch_neither,
    )
    run = Run(uuid4().hex[:12], sorter.__version__, model.name)
    measured = None
    if chosen.metrics_port and not chosen.once:
        from sorter.metrics import Metrics

        measured = Metrics(chosen.metrics_port, {"version": run.version, "model": model.name, "engine": engine.name})
    output = chosen.output_folder.absolute()
    with ExitStack() as stack:
        held = history = None
        if not chosen.dry_run:
            held = Lock(inbox.root)
            stack.callback(held.release)
            held.take()
            history = _open_history(inbox.root, output, run, stack)
        fields = {"run": run.id, "model": model.name} | ({"dry_run": True} if chosen.dry_run else {})
        log.info(
            "service.started",
            **fields,
            version=run.version,
            engine=engine.name,
            device=engine.device,
            precision=engine.precision,
            batch_size=chosen.batch_size,
            accuracy=model.accuracy,
            inbox=str(inbox.root),
            output=str(output),
        )
        mover = Mover(output)
        stop.moving = mover.lock
        ways: dict[str, Any] = {"on_decision": console.print_decision} if json else {}
        if (output / FOLDER / NAME).is_file():
            past = Past(output)
            stack.callback(past.close)
            ways |= {"photo_of": past.photo_of} | ({} if chosen.include_undone else {"put_back": past.was_put_back})
        if chosen.once and chosen.log_format != "json" and stream.isatty():
            total = None if chosen.recursive else _count(chosen.inbox)
            shown = stack.enter_context(console.bar(stream, total))
            ways |= {"on_outcome": shown.advance, "on_waiting": shown.waiting}
        told: dict[str, Any] = {} if measured is None else {"measures": measured}
        if command is not None and not chosen.dry_run:
            telling = hook.Hook(command, fields)
            stack.callback(telling.close)  # after the pipeline, with the inbox still ours
            told["on_moved"], stop.abandon = telling.add, telling.kill
        pipeline = Pipeline(engine, model, mover, history, run.id, chosen, workers=default_workers(), **told)
        stack.callback(pipeline.close)
        service = Service(chosen, inbox, pipeline, stop, held, log_fields=fields, **ways)
        if chosen.once:
            tally = service.run_once()
        else:
            watcher = Watcher(inbox)
            if measured is not None:
                measured.watch(service.tally, pipeline, watcher)
            tally = service.run(watcher)
        if history is not None:
            with suppress(StorageError):  # every photo is accounted for; only the run's end is not
                history.finish(run)
    if not chosen.once or json:
        return tally.exit_code if chosen.once else ExitCode.DONE
    console.say(console.summary(tally, preflight.destinations(model), dry_run=chosen.dry_run), sys.stdout, flush=True)
    return tally.exit_code


def _open_history(inbox: Path, output: Path, run: Run, stack: ExitStack) -> History:
    """Lock the output, clear up after a crash, and begin a run."""
    try:
        make_folder(output)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be made ({error.strerror}): name another --output") from None
    if not os.path.samefile(inbox, output):
        held = Lock(output)
        stack.callback(held.release)
        held.take()
    history = History(output)
    stack.callback(history.close)
    undoing = Lock(output, lock.UNDOING)
    try:
        undoing.take()
    except ConfigurationError:  # it clears up after itself
        found = recover(history, output, undoing=False)
    else:
        found = recover(history, output)
        undoing.release()
    log = structlog.get_logger()
    for path, reason in found.waiting:
        log.warning("recovery.waiting", path=path, reason=reason)
    if found.moved or found.stayed or found.waiting:
        log.info("recovery.finished", moved=found.moved, stayed=found.stayed, waiting=len(found.waiting))
    history.begin(run)
    return history


def _completion(_: Settings, *, shell: str) -> ExitCode:
    print(shell_help.completion(build_parser(), shell))
    return ExitCode.DONE


def _manpage(_: Settings) -> ExitCode:
    print(shell_help.manual_page(build_parser()), end="")
    return ExitCode.DONE


def _bench(chosen: Settings, *, photos: Path | None, count: int, runs: int, json: bool) -> ExitCode:
    from sorter.bench import report

    for number in (signal.SIGINT, signal.SIGTERM):  # the copies are taken away also then
        signal.signal(number, signal.default_int_handler)
    try:
        measured = report.measure(chosen, photos, count, runs, lambda what: print(what, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        sys.stderr.write("sorter: interrupted: nothing was measured, and the copies are gone\n")
        return ExitCode.INCOMPLETE
    print(report.as_json(measured) if json else report.as_text(measured))
    return ExitCode.DONE


def _count(inbox: Path) -> int:
    with os.scandir(inbox) as entries:
        return sum(1 for entry in entries if not is_temporary(entry.name) and entry.is_file(follow_symlinks=False))


def _check(chosen: Settings) -> ExitCode:
    model = manifest.read(chosen.model)
    chosen = preflight.decided(chosen, model)
    preflight.check_folders(chosen, model)
    if chosen.on_sorted is not None:
        hook.split(chosen.on_sorted)
    preflight.check_metrics(chosen)
    from sorter.engines import open_engine

    engine = open_engine(
        chosen.model,
        model,
        chosen.engine,
        chosen.device,
        chosen.batch_size,
        chosen.min_confidence,
        catch_neither=chosen.catch_neither,
    )
    unsure = [f"photos less sure than {chosen.min_confidence:g}"] if chosen.min_confidence else []
    unsure += ["photos of neither"] if chosen.catch_neither else []
    accuracy = "not measured" if model.accuracy is None else f"{model.accuracy:.2%} on photos it never saw"
    rows = {
        "inbox": f"{chosen.inbox.absolute()}" + (" and its subfolders" if chosen.recursive else ""),
        "output": f"{chosen.output_folder.absolute()}",
        "folders": ", ".join(f"{folder}/" for folder in preflight.destinations(model)),
        "model": f"{model.name}, {model.architecture} at {model.input.size} px",
        "accuracy": accuracy,
        "unsure": ", ".join(unsure) or "none: all are sorted",
        "engine": f"{engine.name} on {engine.device}, {engine.precision}, batches of {chosen.batch_size}",
    }
    for name, value in rows.items():
        print(f"{name:<9} {value.encode(errors='backslashreplace').decode()}")
    print("All is well.")
    return ExitCode.DONE
