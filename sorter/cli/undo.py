"""`sorter undo`: move sorted photos back to where they came from."""

import argparse
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from sorter.classifier import manifest
from sorter.cli import console, entries, options
from sorter.errors import ConfigurationError, ExitCode, ModelError, NotNowError
from sorter.files import lock
from sorter.files.lock import Lock
from sorter.history.places_reader import PlacesReader
from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import SIDECAR, History, Run
from sorter.inbox.sidecars import SidecarNames
from sorter.moving.hand_moves import HandMoves
from sorter.moving.recovery import recover
from sorter.moving.undo import Undo, Undone, planned_undo
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter undo`."""
    group = parser.add_argument_group("what to restore")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--last", action="store_true", help="photos that the last run sorted; after a change of its model, since that"
    )
    which.add_argument("--run", metavar="ID", help="photos that this run sorted; sorter history lists the IDs")
    which.add_argument(
        "--since", metavar="WHEN", type=options.point_in_time, help=f"photos sorted from then on: {options.WHEN}"
    )
    which.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        default=[],
        type=options.path,
        help="a photo, by where it is now or where it was before it was sorted, or a folder",
    )
    group.add_argument(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="report what would happen and change nothing",
    )
    group.add_argument("--json", dest="as_json", action="store_true", help="print one line of JSON per photo")


def undo(
    settings: Settings, *, last: bool, run: str | None, since: float | None, paths: Sequence[str], as_json: bool
) -> ExitCode:
    """Restore the photos of a run, since a time, or at some paths.

    Raises:
        ConfigurationError: there is no history, or nothing in it matches.
        NotNowError: another undo is running, or a long batch of corrections.
        StorageError: the history or a folder cannot be written.
    """
    output, stopping = settings.output_folder, threading.Event()
    shutdown = Shutdown(idle_code=ExitCode.INCOMPLETE)
    unknown: list[str] = []
    counts: Counter[str] = Counter()
    waiting = 0  # photos that cannot be recovered from a crash yet
    with ExitStack() as stack:
        history = None
        if not settings.dry_run:
            # Refuses an output without a history before anything is created in it.
            HistoryReader(output, settings.state_dir).close()
            shutdown.listen()
            history, waiting = _open(output, settings.state_dir, stack)
            shutdown.move_lock = threading.Lock()  # a second signal ends it at once; the next start finds what it left
        # Opened after the recovery, to include what that finished.
        reader = PlacesReader(output, settings.state_dir, beside_writer=not settings.dry_run)
        stack.callback(reader.close)
        hand_moves = HandMoves(output, reader, _labels(settings), SidecarNames(settings.sidecar_suffixes))
        found = hand_moves.find()
        if history is None:
            moved = {move.entry.id: move.followed(output) for move in found}
            restore = planned_undo
        else:
            hand_moves.record(found, history)
            moved = {}
            this_run = Run.new(kind="undo")
            restore = Undo(output, history, this_run, stopping).restore
        run = _check_run(reader, output, last=last, run=run)
        chosen = _at_paths(reader, paths, moved, unknown) if paths else reader.undoable(run=run, since=since)
        for undone in restore(moved.get(entry.id, entry) for entry in chosen):
            if shutdown.requested:
                stopping.set()
            counts["stayed" if undone.problem else "sidecar" if undone.entry.kind == SIDECAR else "photo"] += 1
            if as_json:
                _print_json(undone)
            else:
                _print_line(undone, dry_run=settings.dry_run)
    for path in unknown:
        place = entries.printable(os.path.abspath(path))
        console.say(f"sorter: {place} was not sorted, has been moved, or has been restored already", sys.stderr)
    if last and counts["stayed"] and not counts["photo"]:
        console.say(
            "sorter: to undo an earlier run, use sorter undo --run ID; sorter history lists the IDs", sys.stderr
        )
    if not as_json:
        console.say(_summary(counts, dry_run=settings.dry_run), sys.stdout, flush=True)
    return ExitCode.INCOMPLETE if counts["stayed"] or unknown or waiting or stopping.is_set() else ExitCode.DONE


def _labels(settings: Settings) -> dict[str, str]:
    """The labels of the model by folder; none if it cannot be read, which an undo can do without."""
    try:
        return {known.folder: known.label for known in manifest.read(settings.model).classes}
    except ModelError:
        return {}


def _open(output: Path, state_dir: Path | None, stack: ExitStack) -> tuple[History, int]:
    """Lock the output against other undos and recover from a crash, so that what it left can be restored too.

    Returns:
        The history, and how many photos cannot be examined at present.
    """
    undoing, sorting = Lock(output, lock.UNDOING, state_dir), Lock(output, state_dir=state_dir)
    stack.callback(undoing.release)
    undoing.take(patience_seconds=lock.UNDOING_PATIENCE_SECONDS)
    history = History(output, state_dir)
    stack.callback(history.close)
    with_sorting = any(move.target is None for move in history.unfinished())
    try:
        if with_sorting:
            sorting.take()
    except NotNowError:  # a sorter is running, and these are its moves
        with_sorting = False
    found = recover(history, output, sorting=with_sorting)
    sorting.release()
    for path, reason in found.waiting:
        console.say(f"sorter: {entries.printable(path)} cannot be checked now ({reason})", sys.stderr)
    return history, len(found.waiting)


def _check_run(reader: HistoryReader, output: Path, *, last: bool, run: str | None) -> str | None:
    """The ID of the run to undo, None if photos are chosen another way."""
    if last and (run := reader.last_run()) is None:
        raise ConfigurationError(f"{output} has no sorted photos to restore: sorter history shows what was done")
    if run is not None:
        entries.check_run(reader, run)
        if next(reader.undoable(run=run), None) is None:
            raise ConfigurationError(f"run {run} has no photos to restore: sorter history lists the runs")
    return run


def _at_paths(
    reader: HistoryReader, paths: Sequence[str], moved: Mapping[int, Entry], unknown: list[str]
) -> Iterator[Entry]:
    """The photos at some paths, each once; paths without any are added to `unknown`.

    `moved` has those whose new place the history does not know, by their ids.
    """
    seen: set[int] = set()
    for path in paths:
        found = False
        real = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
        there = [entry for entry in moved.values() if Path(entry.destination).is_relative_to(real)]
        for entry in (*reader.undoable(path=path), *there):
            found = True
            if entry.id not in seen:
                seen.add(entry.id)
                yield entry
        if not found:
            unknown.append(path)


def _print_line(undone: Undone, *, dry_run: bool) -> None:
    source, destination = (entries.printable(path) for path in (undone.entry.source, undone.entry.destination))
    if undone.problem:
        console.say(f"sorter: cannot restore {destination}: {undone.problem}", sys.stderr)
    elif dry_run and undone.entry.linked:
        console.say(f"{destination} would be removed; {source} stays", sys.stdout)
    elif dry_run:
        console.say(f"{destination} {entries.arrow()} {source}", sys.stdout)


def _print_json(undone: Undone) -> None:
    entry = undone.entry
    content = {"path": entry.destination, "destination": entry.source, "problem": undone.problem or None}
    console.say(json.dumps(content), sys.stdout)


def _summary(counts: Counter[str], *, dry_run: bool) -> str:
    what = entries.counted(counts["photo"], "photo")
    if counts["sidecar"]:
        what += f" and {entries.counted(counts['sidecar'], 'sidecar')}"
    if dry_run:
        return f"Would restore {what}; {counts['stayed']} would stay."
    return f"Restored {what}; {counts['stayed']} could not be restored."
