"""What `sorter run`, `check` and `bench` do: the rooms, wired together.

In: the settings, and a command's own options. Out: an exit code.
"""

import os
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog

import sorter
from sorter import logs
from sorter.classifier.manifest import Manifest
from sorter.cli import console, preflight
from sorter.errors import ConfigurationError, ExitCode, StorageError
from sorter.files import FOLDER, lock
from sorter.files.atomic import make_folder
from sorter.files.lock import Lock
from sorter.history.reader import HistoryReader
from sorter.history.store import NAME, History, Run
from sorter.inbox.scan import is_temporary
from sorter.moving.mover import Mover
from sorter.moving.recovery import recover
from sorter.service import hook
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

if TYPE_CHECKING:
    from sorter.classifier.engine import Engine

# An undo that clears up after a crash holds the lock for a moment.
_PATIENCE_SECONDS = 2.0


def run(chosen: Settings, *, json: bool) -> ExitCode:
    """Sort the inbox: once, or until told to stop."""
    if json and not chosen.dry_run:
        raise ConfigurationError("--json prints what would happen: give it with --dry-run")
    chosen, model, command = preflight.check(chosen)
    stream = logs.configure(chosen.log_format, chosen.log_level)
    log = structlog.get_logger()

    # Heavy from here on: everything that can be wrong without them has been said.
    from sorter.classifier.engine import unused_gpu
    from sorter.decoding.decoders import default_workers
    from sorter.inbox.watcher import Watcher
    from sorter.pipeline.pipeline import Pipeline
    from sorter.service.loop import Service

    shutdown = Shutdown(idle_code=ExitCode.INCOMPLETE if chosen.once else ExitCode.DONE)
    shutdown.listen()
    inbox = preflight.watched(chosen, model)
    # Last of what can be wrong at the start, so that nothing was touched when the process ends with 2.
    engine = _open_engine(chosen, model)
    this_run = Run(uuid4().hex[:12], sorter.__version__, model.name)
    measured = None
    if chosen.metrics_port and not chosen.once:
        from sorter.service.metrics import Metrics

        measured = Metrics(
            chosen.metrics_port, {"version": this_run.version, "model": model.name, "engine": engine.name}
        )
    output = chosen.output_folder.absolute()
    with ExitStack() as stack:
        held = history = None
        if not chosen.dry_run:
            held = Lock(inbox.root)
            stack.callback(held.release)
            held.take(patience_seconds=_PATIENCE_SECONDS)
            history = _open_history(inbox.root, output, this_run, stack)
        fields = {"run": this_run.id, "model": model.name} | ({"dry_run": True} if chosen.dry_run else {})
        log.info(
            "service.started",
            **fields,
            version=this_run.version,
            engine=engine.name,
            device=engine.device,
            precision=engine.precision,
            batch_size=chosen.batch_size,
            accuracy=model.accuracy,
            inbox=str(inbox.root),
            output=str(output),
        )
        if chosen.engine == chosen.device == "auto" and (hint := unused_gpu()):
            log.warning("engine.unused_gpu", detail=hint)
        mover = Mover(output)
        shutdown.move_lock = mover.lock
        ways: dict[str, Any] = {"on_decision": console.print_decision} if json else {}
        if (output / FOLDER / NAME).is_file():
            past = HistoryReader(output)
            stack.callback(past.close)
            ways |= {"history": past}
        if chosen.once and chosen.log_format != "json" and stream.isatty():
            total = None if chosen.recursive else _count(chosen.inbox)
            shown = stack.enter_context(console.bar(stream, total))
            ways |= {"on_outcome": shown.advance, "on_waiting": shown.waiting}
        told: dict[str, Any] = {} if measured is None else {"measures": measured}
        if command is not None and not chosen.dry_run:
            telling = hook.Hook(command, fields)
            stack.callback(telling.close)  # after the pipeline, with the inbox still ours
            told["on_moved"], shutdown.kill_children = telling.notify_batch, telling.kill
        pipeline = Pipeline.start(engine, model, mover, history, this_run.id, chosen, workers=default_workers(), **told)
        stack.callback(pipeline.close)
        service = Service(chosen, inbox, pipeline, shutdown, held, log_fields=fields, **ways)
        if chosen.once:
            counters = service.run_once()
        else:
            watcher = Watcher(inbox)
            if measured is not None:
                measured.watch(service.counters, pipeline, watcher)
            counters = service.run(watcher)
        if history is not None:
            with suppress(StorageError):  # every photo is accounted for; only the run's end is not
                history.finish(this_run)
    if not chosen.once or json:
        return counters.exit_code if chosen.once else ExitCode.DONE
    console.say(
        console.summary(counters, preflight.destinations(model), dry_run=chosen.dry_run), sys.stdout, flush=True
    )
    return counters.exit_code


def _open_history(inbox: Path, output: Path, run: Run, stack: ExitStack) -> History:
    """Lock the output, clear up after a crash, and begin a run."""
    try:
        make_folder(output)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be made ({error.strerror}): name another --output") from None
    if not os.path.samefile(inbox, output):
        held = Lock(output)
        stack.callback(held.release)
        held.take(patience_seconds=_PATIENCE_SECONDS)
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


def _open_engine(chosen: Settings, model: Manifest) -> "Engine":
    from sorter.classifier.engine import open_engine  # what it needs takes a while to import

    return open_engine(
        chosen.model,
        model,
        chosen.engine,
        chosen.device,
        chosen.batch_size,
        chosen.min_confidence,
        catch_neither=chosen.catch_neither,
    )


def bench(chosen: Settings, *, photos: Path | None, count: int, runs: int, json: bool) -> ExitCode:
    """Measure how fast this machine sorts."""
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


def check(chosen: Settings) -> ExitCode:
    """Check everything that can be wrong, and say what a run would do."""
    chosen, model, _ = preflight.check(chosen)
    from sorter.classifier.engine import unused_gpu

    engine = _open_engine(chosen, model)
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
    if chosen.engine == chosen.device == "auto" and (hint := unused_gpu()):
        print(f"note      {hint}")
    print("All is well.")
    return ExitCode.DONE
