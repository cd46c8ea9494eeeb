"""`sorter run`: the parts wired together, and the run's beginning and end.

In: the settings. Out: an exit code, a log on standard error, and the summary or the planned moves on standard output.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog

import sorter
from sorter import logs
from sorter.classifier.manifest import Manifest
from sorter.cli import console, preflight
from sorter.decisions import Outcome
from sorter.errors import ConfigurationError, ExitCode, ModelError, NotNowError, StorageError
from sorter.files import HISTORY, file_systems, inodes, lock
from sorter.files.atomic import make_folder
from sorter.files.lock import Lock
from sorter.files.state import state_folder
from sorter.history.reader import HistoryReader
from sorter.history.store import History, Run
from sorter.inbox.scan import Inbox
from sorter.moving.mover import Mover
from sorter.moving.recovery import recover
from sorter.service.counters import Counters
from sorter.service.hook import Hook
from sorter.service.notify import Notifier
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

if TYPE_CHECKING:
    from sorter.pipeline.stages import Stages
    from sorter.service.loop import Service
    from sorter.service.metrics import Metrics

_INBOX_SECONDS = 1.0  # how often to look for an inbox that is not there yet
# An undo that recovers from a crash holds the lock for a moment.
_PATIENCE_SECONDS = 2.0
# How often a daemon that starts on a full disk tries again.
_FULL_SECONDS = 2.0


class Described(Protocol):
    """What a log says of an engine, here or on other machines; as in `Engine`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def precision(self) -> str: ...  # noqa: D102
    @property
    def unused_gpu(self) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is ready to decide on photos.

    Attributes:
        engine: what runs it.
        run: names the model in the history and the log, until another one replaces it.
        start: starts the pipeline, with the arguments of `Pipeline.start` but for the model and the decoders' number.
    """

    engine: Described
    run: Run
    start: "Callable[..., Stages]"


def open_here(settings: Settings, manifest: Manifest, _stack: ExitStack, _shutdown: Shutdown) -> Opened:
    """Load the model in this process.

    Raises:
        ConfigurationError, ModelError, NotNowError: as `preflight.open_engine`.
    """
    # Imported here because they take long, and most mistakes have been reported by now.
    from sorter.decoding.decoders import default_workers
    from sorter.pipeline.model_in_use import ModelInUse
    from sorter.pipeline.pipeline import Pipeline

    engine = preflight.open_engine(settings, manifest)
    model = ModelInUse.in_new_run(engine, manifest, settings.min_confidence)
    return Opened(engine, model.run, partial(Pipeline.start, model, workers=default_workers()))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter run`."""
    parser.add_argument_group("what to print").add_argument(
        "--json", dest="as_json", action="store_true", help="with --dry-run, print each decision as a line of JSON"
    )


def run(
    settings: Settings,
    *,
    as_json: bool,
    open_model: Callable[[Settings, Manifest, ExitStack, Shutdown], Opened] = open_here,
) -> ExitCode:
    """Sort the inbox: once, or until told to stop.

    Args:
        settings: all of them.
        as_json: print the decisions of a dry run as JSON.
        open_model: makes the model ready, has the stack end what it started, and says how a signal ends it meanwhile.

    Raises:
        SorterError: something is wrong, or sorting cannot continue.
    """
    if as_json and not settings.dry_run:
        raise ConfigurationError("--json prints planned moves: use it together with --dry-run")
    given = settings
    settings, manifest, command = preflight.check(given)
    late = not settings.once and not preflight.inbox_exists(settings)
    if not late:
        preflight.check_folders(settings, manifest)
    stream = logs.configure(settings.log_format, settings.log_level)
    shutdown = Shutdown(idle_code=ExitCode.INCOMPLETE if settings.once else ExitCode.DONE)
    shutdown.listen()

    # Imported here because they take long, and most mistakes have been reported by now.
    from sorter.pipeline.pipeline import Pipeline
    from sorter.service.loop import Service
    from sorter.service.reload import Reloader

    with ExitStack() as stack:
        # Everything that ends with `ExitCode.USAGE` comes before the first change to a folder.
        opened = open_model(settings, manifest, stack, shutdown)
        if late:
            _wait_for_inbox(settings)
            preflight.check_folders(settings, manifest)
        inbox, output = preflight.watched(settings, manifest), settings.output_folder.absolute()
        log_fields = {name: True for name in ("dry_run", "link") if getattr(settings, name)}
        metrics = _serve_metrics(settings, _info(manifest, opened.engine))
        inbox_lock, history, waiting = None, None, 0
        if not settings.dry_run:
            inbox_lock, history, waiting = _open_folders(settings, inbox.root, output, opened.run, stack)
            inodes.look((inbox.root, output))
        _log_start(settings, manifest, opened, inbox.root, output, log_fields)
        mover = Mover(output, inbox.selection.sidecars, settle_seconds=settings.settle_seconds, link=settings.link)
        shutdown.move_lock = mover.lock
        reader = _open_reader(output, settings.state_dir, stack, beside_writer=history is not None)
        bar = _show_bar(settings, inbox, stream, stack)
        if bar is not None:
            shutdown.restore_terminal = stream.show_cursor
        hook = None if command is None or settings.dry_run else _start_hook(command, log_fields, shutdown, stack)
        pipeline = opened.start(
            mover,
            history,
            settings,
            on_moved=_ignore if hook is None else hook.notify_batch,
            measures=metrics,
            sorted_again=preflight.sorted_again(settings),
        )
        stack.callback(pipeline.close)
        service = Service(
            settings,
            inbox,
            pipeline,
            shutdown,
            inbox_lock,
            log_fields=log_fields,
            on_outcome=_ignore if bar is None else bar.advance,
            on_waiting=_ignore if bar is None else bar.waiting,
            on_decision=_printer(settings, as_json=as_json),
            history=reader,
        )
        service.counters.left += waiting
        if isinstance(pipeline, Pipeline):
            reloader = Reloader(
                pipeline,
                shutdown,
                read=partial(preflight.read_model, given),
                open_engine=preflight.open_engine,
                on_reloaded=_ignore if metrics is None else lambda m: metrics.describe(_info(m.manifest, m.engine)),
            )
            stack.callback(reloader.close)
        try:
            counters = service.run_once() if settings.once else _watch(service, inbox, pipeline, metrics)
        except (ConfigurationError, ModelError) as error:
            raise StorageError(str(error)) from error  # by now photos may have been touched: a restart may help
        if history is not None:
            with suppress(StorageError):  # every photo is recorded; only the end of the run is not
                history.finish()
    if settings.once and not as_json:
        text = console.summary(counters, preflight.destinations(manifest), dry_run=settings.dry_run)
        console.say(text, sys.stdout, flush=True)
    return counters.exit_code if settings.once else ExitCode.DONE


def _wait_for_inbox(settings: Settings) -> None:
    """Wait until there is an inbox. A signal ends the process meanwhile."""
    inbox, reason = settings.inbox.absolute(), "the folder does not exist yet"
    structlog.get_logger().warning("watcher.waiting", path=str(inbox), reason=reason)
    notifier = Notifier()
    notifier.ready()  # the manager would give up on a start that takes this long
    while not preflight.inbox_exists(settings):
        notifier.alive()
        notifier.status(lambda: f"Waiting: {inbox}: {reason}")
        time.sleep(_INBOX_SECONDS)


def _watch(service: "Service", inbox: Inbox, pipeline: "Stages", metrics: "Metrics | None") -> Counters:
    from sorter.inbox.watcher import Watcher

    watcher = Watcher(inbox)
    if metrics is not None:
        metrics.watch(service.counters, pipeline, watcher)
    return service.run(watcher)


def _serve_metrics(settings: Settings, info: dict[str, str]) -> "Metrics | None":
    if not settings.metrics_port or settings.once:
        return None
    from sorter.service.metrics import Metrics  # needs the extra `metrics`

    return Metrics(settings.metrics_port, info)


def _info(manifest: Manifest, engine: Described) -> dict[str, str]:
    return {"version": sorter.__version__, "model": manifest.name, "engine": engine.name}


def _open_folders(
    settings: Settings, inbox: Path, output: Path, run: Run, stack: ExitStack
) -> tuple[Lock, History, int]:
    """Lock the folders and begin a run; while their disk is full, a daemon waits.

    Returns:
        The lock of the inbox, the history, and how many photos cannot be recovered from a crash yet.
    """
    log, waited = structlog.get_logger(), False
    while True:
        try:
            with ExitStack() as opened:
                inbox_lock = _take_lock(inbox, settings.state_dir, opened)
                history, waiting = _open_history(inbox, output, settings.state_dir, run, opened)
                stack.callback(opened.pop_all().close)
        except StorageError as error:
            if settings.once:
                raise
            if not waited:
                log.error("storage.waiting", detail=str(error))
            waited = True
            time.sleep(_FULL_SECONDS)
        else:
            if waited:
                log.info("storage.ready")
            return inbox_lock, history, waiting


def _take_lock(folder: Path, state_dir: Path | None, stack: ExitStack) -> Lock:
    """Lock a folder until the stack unwinds."""
    held = Lock(folder, state_dir=state_dir)
    stack.callback(held.release)
    held.take(patience_seconds=_PATIENCE_SECONDS)
    if state_dir is not None:
        with suppress(ConfigurationError):  # also in the folder, for sorters that do not know of `state_dir`
            return _take_lock(folder, None, stack)
    return held


def _open_history(inbox: Path, output: Path, state_dir: Path | None, run: Run, stack: ExitStack) -> tuple[History, int]:
    """Lock the output, recover from a crash, and begin a run."""
    try:
        make_folder(output)
    except OSError as error:
        if error.errno in file_systems.NO_SPACE:
            raise StorageError(f"cannot create {output} ({error.strerror}): free some space") from None
        raise ConfigurationError(f"cannot create {output} ({error.strerror}): use another --output") from None
    if not os.path.samefile(inbox, output):
        _take_lock(output, state_dir, stack)
    history = History(output, state_dir)
    stack.callback(history.close)
    undoing = Lock(output, lock.UNDOING, state_dir)
    try:
        undoing.take()
    except NotNowError:  # a running undo recovers its own moves
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
    return history, len(found.waiting)


def _log_start(
    settings: Settings, manifest: Manifest, opened: Opened, inbox: Path, output: Path, log_fields: dict[str, bool]
) -> None:
    log, engine = structlog.get_logger(), opened.engine
    log.info(
        "service.started",
        run=opened.run.id,
        model=manifest.name,
        **log_fields,
        version=sorter.__version__,
        engine=engine.name,
        device=engine.device,
        precision=engine.precision,
        batch_size=settings.batch_size,
        accuracy=manifest.accuracy,
        inbox=str(inbox),
        output=str(output),
    )
    if engine.unused_gpu:
        log.warning("engine.unused_gpu", detail=engine.unused_gpu)


def _open_reader(
    output: Path, state_dir: Path | None, stack: ExitStack, *, beside_writer: bool
) -> HistoryReader | None:
    """The history for looking up earlier moves; a dry run may find none."""
    if not (state_folder(output, state_dir) / HISTORY).is_file():
        return None
    reader = HistoryReader(output, state_dir, beside_writer=beside_writer)
    stack.callback(reader.close)
    return reader


def _show_bar(settings: Settings, inbox: Inbox, stream: logs.LogStream, stack: ExitStack) -> console.Bar | None:
    """A progress bar for a person at a terminal who waits for the end."""
    if not settings.once or settings.log_format == "json" or not stream.isatty():
        return None
    if settings.dry_run:  # prints a line for each photo instead
        stream.only_problems = True
        return None
    total = None if settings.recursive else _count(inbox)
    return stack.enter_context(console.bar(stream, total))


def _printer(settings: Settings, *, as_json: bool) -> Callable[[Outcome], None]:
    """What prints each decision of a dry run to standard output; a daemon's are in its log."""
    if as_json:
        return console.print_decision
    if settings.dry_run and settings.once:
        return partial(console.print_plan, output=settings.output_folder.absolute())
    return _ignore


def _start_hook(command: Sequence[str], log_fields: dict[str, bool], shutdown: Shutdown, stack: ExitStack) -> Hook:
    """Start the thread that runs `--on-sorted`; the stack ends it after the pipeline, with the inbox still locked."""
    hook = Hook(command, log_fields)
    stack.callback(hook.close)
    shutdown.kill_children = hook.kill
    return hook


def _count(inbox: Inbox) -> int:
    with os.scandir(inbox.root) as files:
        return sum(1 for file in files if inbox.selection.takes(file.name) and file.is_file(follow_symlinks=False))


def _ignore(_: object) -> None:
    pass
