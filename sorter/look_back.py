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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import sorter
from sorter import lock, manifest, preflight
from sorter.atomic import StayedError
from sorter.decisions import COMPANION, FAILED, UNSURE
from sorter.errors import ConfigurationError, ExitCode
from sorter.history import History, Run
from sorter.inbox import Inbox
from sorter.lock import Lock
from sorter.past import Entry, Past
from sorter.recovery import recover
from sorter.settings import Settings
from sorter.undo import Undo, Undone, check

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
    which.add_argument("paths", metavar="PATH", nargs="*", default=[], help="a photo, where it is or was, or a folder")
    group.add_argument("--dry-run", action="store_true", help="say what would happen and change nothing")
    group.add_argument("--json", action="store_true", help="print one line of JSON for each photo")


def positive(text: str) -> int:
    """A whole number above zero."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


# --- history -----------------------------------------------------------------------------------------------------


def show_history(chosen: Settings, *, limit: int, since: float | None, run: str | None, json: bool) -> ExitCode:
    """Show what went where."""
    entries = Past(chosen.output_folder).entries(run=run, since=since, limit=limit)
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
            _shown(e.source),
            "→",
            _shown(_below(chosen, e)),
            _sureness(e),
            "undone" if e.undone else "",
        )
        for e in entries
    ]
    _print_table(("when", "run", "photo", "", "went to", "why", ""), rows)
    return ExitCode.DONE


def _below(chosen: Settings, entry: Entry) -> str:
    if entry.kind == "undone":
        return entry.destination
    return os.path.relpath(entry.destination, chosen.output_folder.absolute())


def _sureness(entry: Entry) -> str:
    if entry.reason is not None:
        return f"{entry.reason}: {entry.detail}" if entry.detail else entry.reason
    if entry.kind == "undone":
        return "put back"
    if entry.kind == COMPANION:
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
    waiting = 0
    if chosen.inbox.is_dir():
        inbox = Inbox(
            chosen.inbox,
            recursive=chosen.recursive,
            excluded=preflight.excluded(chosen, model),
            settle_seconds=chosen.settle_seconds,
        )
        waiting = sum(1 for _ in inbox.scan(time.time())) + len(inbox.changing)
    past = Past(chosen.output_folder)
    midnight = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    today, ever = past.counts(midnight), past.counts()
    holder = lock.holder(chosen.inbox)
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
        ("in the inbox", f"{waiting} files"),
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
    output = chosen.output_folder
    past = Past(output)
    if last and (run := next((entry.run for entry in past.undoable()), None)) is None:
        raise ConfigurationError(f"nothing of what was sorted into {output} is left to bring back")
    if run is not None and next(past.undoable(run=run), None) is None:
        raise ConfigurationError(f"run {run} has nothing to bring back: sorter history names the runs")
    named = [os.path.abspath(path) for path in paths]
    unknown = [path for path in named if next(past.undoable(path=path), None) is None]
    for path in unknown:
        sys.stderr.write(f"sorter: {_shown(path)} was not sorted, or is back already\n")
    entries = _once(past, named) if paths else past.undoable(run=run, since=since)
    tell = _tell_json if json else partial(_tell_person, dry_run=dry_run)
    back = stayed = along = 0
    stopping = threading.Event()
    for undone in _would(entries) if dry_run else _undo(output, entries, stopping):
        tell(undone)
        is_companion = undone.entry.kind == COMPANION
        stayed += bool(undone.problem)
        back += not undone.problem and not is_companion
        along += not undone.problem and is_companion
    if not json:
        what = f"{back} photos" + (f" and {along} companions" if along else "")
        print(f"{what} {'would go' if dry_run else 'are'} back, {stayed} stay{'s' if stayed == 1 else ''}")
    return ExitCode.INCOMPLETE if stayed or unknown or stopping.is_set() else ExitCode.DONE


def _once(past: Past, paths: Sequence[str]) -> Iterator[Entry]:
    """The photos that paths name, each once."""
    met: set[int] = set()
    for path in paths:
        for entry in past.undoable(path=path):
            if entry.id not in met:
                met.add(entry.id)
                yield entry


def _would(entries: Iterable[Entry]) -> Iterator[Undone]:
    for entry in entries:
        try:
            check(entry)
        except StayedError as error:
            yield Undone(entry, str(error))
        else:
            yield Undone(entry)


def _undo(output: Path, entries: Iterable[Entry], stopping: threading.Event) -> Iterator[Undone]:
    with ExitStack() as stack:
        held = Lock(output, lock.UNDOING)
        stack.callback(held.release)
        held.take()
        history = History(output)
        stack.callback(history.close)
        recover(history, output, sorting=False)
        run = Run(uuid4().hex[:12], sorter.__version__, "", kind="undo")
        history.begin(run)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        yield from Undo(output, history, run.id, stopping).bring_back(entries)
        history.finish(run)


def _tell_person(undone: Undone, *, dry_run: bool) -> None:
    entry = undone.entry
    if undone.problem:
        sys.stderr.write(f"sorter: {_shown(entry.destination)} stays: {undone.problem}\n")
    elif dry_run:
        print(f"{_shown(entry.destination)} → {_shown(entry.source)}")


def _tell_json(undone: Undone) -> None:
    entry = undone.entry
    _print_json({"path": entry.destination, "destination": entry.source, "problem": undone.problem or None})


# --- output ------------------------------------------------------------------------------------------------------


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
    console.print(table)


def _local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _shown(path: str) -> str:
    """A path as it can be printed, whatever its bytes."""
    text = path.encode(errors="backslashreplace").decode()
    return text if text.isprintable() else ascii(text)[1:-1]
