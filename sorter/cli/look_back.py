"""`sorter history`, `sorter status`, `sorter undo`: what was done, how things stand, and the way back.

In: the settings and a command's own options. Out: tables on a terminal, one line of JSON for each thing on request.
"""

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import sorter
from sorter.classifier import manifest
from sorter.cli import console, preflight
from sorter.errors import ConfigurationError, ExitCode
from sorter.files import lock
from sorter.files.lock import Lock
from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import FAILED, SIDECAR, UNSURE, History, Run
from sorter.moving.recovery import recover
from sorter.moving.undo import Undo, Undone, planned_undo
from sorter.settings import Settings

_MOST = 1_000_000_000
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_WHEN = "a time (2026-11-24, 2026-11-24T18:00) or an age (30m, 2h, 7d)"


def parse_when(text: str) -> float:
    """A point in time in seconds since the epoch, from a date, a time, or an age."""
    if age := re.fullmatch(r"(\d{1,6})([smhdw])", text):
        return time.time() - int(age[1]) * _UNITS[age[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {_WHEN}") from None


def add_history_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter history`."""
    group = parser.add_argument_group("what to show")
    group.add_argument("--limit", metavar="N", type=positive, default=50, help="the last so many (default: 50)")
    group.add_argument("--since", metavar="WHEN", type=parse_when, help=f"from then on: {_WHEN}")
    group.add_argument("--run", metavar="ID", help="of one run")
    group.add_argument("--json", action="store_true", help="print one line of JSON for each photo")


def add_status_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter status`."""
    parser.add_argument_group("what to show").add_argument("--json", action="store_true", help="print a line of JSON")


def add_undo_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter undo`."""
    group = parser.add_argument_group("what to bring back")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", action="store_true", help="what the last run sorted")
    which.add_argument("--run", metavar="ID", help="what one run sorted; sorter history names them")
    which.add_argument("--since", metavar="WHEN", type=parse_when, help=f"what was sorted from then on: {_WHEN}")
    which.add_argument(
        "paths", metavar="PATH", nargs="*", default=[], type=_path, help="a photo, where it is or was, or a folder"
    )
    group.add_argument("--dry-run", action="store_true", help="say what would happen and change nothing")
    group.add_argument("--json", action="store_true", help="print one line of JSON for each photo")


def _path(text: str) -> str:
    if not text:  # the current folder, for os.path: an unset shell variable must not bring back whatever is in it
        raise argparse.ArgumentTypeError("a PATH must not be empty")
    return text


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or not 1 <= int(text[:20]) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 1 to {_MOST:,}")
    return int(text)


# --- history -----------------------------------------------------------------------------------------------------


def show_history(chosen: Settings, *, limit: int, since: float | None, run: str | None, json: bool) -> ExitCode:
    """Show what went where."""
    entries = HistoryReader(chosen.output_folder).entries(run=run, since=since, limit=limit)
    if json:
        for entry in entries:
            _print_json(_described(entry))
        return ExitCode.DONE
    if not entries:
        print("nothing was sorted there in that time")
        return ExitCode.DONE
    rows = [
        (
            _local(e.done),
            e.run,
            _shown(_source(chosen, e)),
            "→",
            _shown(_target(chosen, e)),
            _sureness(e) + (", undone" if e.undone else ""),
        )
        for e in entries
    ]
    _print_table(("when", "run", "photo", "", "went to", "why"), rows)
    return ExitCode.DONE


def _source(chosen: Settings, entry: Entry) -> str:
    return _inside(chosen.output_folder if entry.kind == "undone" else chosen.inbox, entry.source)


def _target(chosen: Settings, entry: Entry) -> str:
    """The folder, and the name where it is another one now."""
    root = chosen.inbox if entry.kind == "undone" else chosen.output_folder
    folder, base = os.path.split(_inside(root, entry.destination))
    return os.path.join(folder or ".", "" if base == os.path.basename(entry.source) else base)


def _inside(folder: Path, path: str) -> str:
    """A path as it is below a folder, or the whole of it where it is not."""
    whole, real = Path(path), Path(os.path.realpath(folder))
    return str(whole.relative_to(real)) if whole.is_relative_to(real) else path


def _sureness(entry: Entry) -> str:
    if entry.reason is not None:
        return f"{entry.reason}: {entry.detail}" if entry.detail else entry.reason
    if entry.kind == "undone":
        return "put back"
    if entry.kind == SIDECAR:
        return "followed its photo"
    if entry.detail is not None:
        return entry.detail
    return f"{entry.label} {entry.confidence:.1%}" if entry.confidence is not None else ""


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "time": datetime.fromtimestamp(entry.done).astimezone().isoformat(timespec="seconds"),
        "run": entry.run,
        "kind": entry.kind,
        "path": entry.source,
        "destination": entry.destination,
        "label": entry.label,
        "confidence": entry.confidence,
        "reason": entry.reason,
        "detail": entry.detail,
        "model": entry.model or None,
        "undone": entry.undone,
    }


# --- status ------------------------------------------------------------------------------------------------------


def show_status(chosen: Settings, *, json: bool) -> ExitCode:
    """Show how things stand."""
    model = manifest.read(chosen.model)
    waiting: int | None = None  # where there is no inbox
    if chosen.inbox.is_dir():
        inbox = preflight.watched(chosen, model)
        waiting = sum(1 for _ in inbox.scan(time.time())) + len(inbox.changing)
    past = HistoryReader(chosen.output_folder)
    midnight = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    today, ever = past.counts(midnight), past.counts()
    holder = lock.holder(chosen.output_folder) or lock.holder(chosen.inbox)
    failed = past.last_failure()
    found: dict[str, Any] = {
        "inbox": str(chosen.inbox.absolute()),
        "state": "running" if holder else "not running",
        "process": holder,
        "waiting": waiting,
        "today": today.folders,
        "in_all": ever.folders,
        "undone": ever.undone,
        "share_sorted": ever.share_sorted,
        "last_error": None if failed is None else _described(failed),
    }
    if json:
        _print_json(found)
        return ExitCode.DONE
    rows = [
        ("state", f"running, {holder}" if holder else "not running"),
        ("in the inbox", f"there is no folder {chosen.inbox}" if waiting is None else _counted(waiting, "file")),
        *(
            (f"{folder}/", f"{count} ({today.folders.get(folder, 0)} today)")
            for folder, count in _ordered(ever.folders, model)
        ),
        ("put back", str(ever.undone)),
    ]
    if ever.share_sorted is not None:
        rows.append(("sorted", f"{ever.share_sorted:.1%} of what was classified"))
    if failed is not None:
        rows.append(("last failure", f"{_local(failed.done)}, {_shown(failed.source)}: {_sureness(failed)}"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return ExitCode.DONE


def _ordered(folders: dict[str, int], model: manifest.Manifest) -> list[tuple[str, int]]:
    known = [c.folder for c in model.classes] + [UNSURE, FAILED]
    names = [*known, *sorted(set(folders) - set(known))]
    return [(name, folders.get(name, 0)) for name in names]


# --- undo --------------------------------------------------------------------------------------------------------


def undo(
    chosen: Settings,
    *,
    last: bool,
    run: str | None,
    since: float | None,
    paths: Sequence[str],
    dry_run: bool,
    json: bool,
) -> ExitCode:
    """Bring photos back."""
    output, stopping = chosen.output_folder, threading.Event()
    with ExitStack() as stack:
        bring_back = planned_undo
        if not dry_run:
            HistoryReader(output).close()  # without a history there is nothing to bring back, and none is begun
            bring_back = _open_undo(output, stopping, stack).bring_back
        past = HistoryReader(output)  # by now it has what a crash had left unfinished
        stack.callback(past.close)
        if last and (run := past.last_run()) is None:
            raise ConfigurationError(f"nothing of what was sorted into {output} is left to bring back")
        if run is not None and next(past.undoable(run=run), None) is None:
            raise ConfigurationError(f"run {run} has nothing to bring back: sorter history names the runs")
        unknown: list[str] = []
        tell = _tell_json if json else partial(_tell_person, dry_run=dry_run)
        back = stayed = along = 0
        for undone in bring_back(_once(past, paths, unknown) if paths else past.undoable(run=run, since=since)):
            tell(undone)
            is_sidecar = undone.entry.kind == SIDECAR
            stayed += bool(undone.problem)
            back += not undone.problem and not is_sidecar
            along += not undone.problem and is_sidecar
    for path in unknown:
        console.say(f"sorter: {_shown(path)} was not sorted, or is back already", sys.stderr)
    if last and stayed and not back:
        console.say("sorter: for an earlier run name it: sorter undo --run ID, sorter history has the IDs", sys.stderr)
    if not json:
        what = _counted(back, "photo") + (f" and {_counted(along, 'sidecar')}" if along else "")
        are = "would go" if dry_run else "is" if back + along == 1 else "are"
        console.say(f"{what} {are} back, {stayed} stay{'s' if stayed == 1 else ''}", sys.stdout, flush=True)
    return ExitCode.INCOMPLETE if stayed or unknown or stopping.is_set() else ExitCode.DONE


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _once(past: HistoryReader, paths: Sequence[str], unknown: list[str]) -> Iterator[Entry]:
    """The photos that paths name, each once; paths that name none are noted."""
    met: set[int] = set()
    for path in paths:
        named = False
        for entry in past.undoable(path=path):
            named = True
            if entry.id not in met:
                met.add(entry.id)
                yield entry
        if not named:
            unknown.append(path)


def _open_undo(output: Path, stopping: threading.Event, stack: ExitStack) -> Undo:
    """Lock the output's way back, and clear up after a crash, so that what it left can be brought back too."""
    held = Lock(output, lock.UNDOING)
    stack.callback(held.release)
    held.take()
    history = History(output)
    stack.callback(history.close)
    sorting = Lock(output)
    left = any(move.target is None for move in history.unfinished())
    try:
        if left:
            sorting.take()
    except ConfigurationError:  # a sorter is at work, and these are its moves
        left = False
    found = recover(history, output, sorting=left)
    sorting.release()
    for path, reason in found.waiting:
        console.say(f"sorter: {_shown(path)} cannot be looked at now ({reason})", sys.stderr)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return Undo(output, history, Run(uuid4().hex[:12], sorter.__version__, "", kind="undo"), stopping)


def _tell_person(undone: Undone, *, dry_run: bool) -> None:
    entry = undone.entry
    if undone.problem:
        console.say(f"sorter: {_shown(entry.destination)} stays: {undone.problem}", sys.stderr)
    elif dry_run:
        console.say(f"{_shown(entry.destination)} → {_shown(entry.source)}", sys.stdout)


def _tell_json(undone: Undone) -> None:
    entry = undone.entry
    content = {"path": entry.destination, "destination": entry.source, "problem": undone.problem or None}
    console.say(json.dumps(content), sys.stdout)


# --- output ------------------------------------------------------------------------------------------------------


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold", no_wrap=name in ("when", "run", ""))
    for row in rows:
        table.add_row(*map(Text, row))
    terminal = Console()
    if not terminal.is_terminal:
        terminal = Console(width=10_000)
    with terminal.capture() as table_as_text:  # rich ends the process by itself where nobody reads
        terminal.print(table)
    print(table_as_text.get(), end="")


def _local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _shown(path: str) -> str:
    """A path as it can be printed, whatever its bytes."""
    text = path.encode(errors="backslashreplace").decode()
    return text if text.isprintable() else ascii(text)[1:-1]
