"""`sorter status`: whether a sorter is running, what is waiting in the inbox, and how many photos went where."""

import argparse
import json
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sorter.classifier import manifest
from sorter.classifier.manifest import Manifest
from sorter.cli import entries, preflight
from sorter.errors import ExitCode
from sorter.files import lock
from sorter.history.reader import Counts, Entry, HistoryReader
from sorter.settings import Settings


@dataclass(frozen=True, slots=True)
class _Status:
    """What the command reports.

    Attributes:
        process: who holds the lock, None if nobody does.
        waiting: files in the inbox, None if there is no inbox.
        failure: the last photo that failed and was not restored.
    """

    process: str | None
    waiting: int | None
    today: Counts
    total: Counts
    failure: Entry | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter status`."""
    parser.add_argument_group("what to show").add_argument(
        "--json", dest="as_json", action="store_true", help="print a line of JSON"
    )


def show(settings: Settings, *, as_json: bool) -> ExitCode:
    """Print the status.

    Raises:
        ConfigurationError, ModelError: the history or the model is missing or cannot be read.
    """
    model = manifest.read(settings.model)
    status = _read(settings, model)
    if as_json:
        print(json.dumps(_to_json(settings, status)))
        return ExitCode.DONE
    rows = _rows(settings, status, model)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return ExitCode.DONE


def _read(settings: Settings, model: Manifest) -> _Status:
    waiting = None
    if settings.inbox.is_dir():
        inbox = preflight.watched(settings, model)
        waiting = sum(1 for _ in inbox.scan(time.time())) + len(inbox.changing)
    reader = HistoryReader(settings.output_folder, settings.state_dir)
    midnight = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    return _Status(
        process=_holder(settings),
        waiting=waiting,
        today=reader.counts(midnight),
        total=reader.counts(),
        failure=reader.last_failure(),
    )


def _holder(settings: Settings) -> str | None:
    folders = (settings.output_folder, settings.inbox)
    return next(filter(None, (lock.holder(folder, state_dir=settings.state_dir) for folder in folders)), None)


def _to_json(settings: Settings, status: _Status) -> dict[str, Any]:
    return {
        "inbox": str(settings.inbox.absolute()),
        "state": "running" if status.process else "not running",
        "process": status.process,
        "waiting": status.waiting,
        "today": status.today.folders,
        "in_all": status.total.folders,
        "undone": status.total.undone,
        "share_sorted": status.total.share_sorted,
        "last_error": None if status.failure is None else entries.to_json(status.failure),
    }


def _rows(settings: Settings, status: _Status, model: Manifest) -> list[tuple[str, str]]:
    rows = [("state", f"running, {status.process}" if status.process else "not running")]
    if status.waiting is None:
        rows.append(("in the inbox", f"there is no folder {settings.inbox}"))
    else:
        rows.append(("in the inbox", entries.counted(status.waiting, "file")))
    known = preflight.destinations(model)
    for folder in [*known, *sorted(set(status.total.folders) - set(known))]:
        total, today = (counts.folders.get(folder, 0) for counts in (status.total, status.today))
        rows.append((f"{folder}/", f"{total} ({today} today)"))
    rows.append(("restored", str(status.total.undone)))
    if (share := status.total.share_sorted) is not None:
        rows.append(("sorted", f"{share:.1%} of the classified photos"))
    if (failure := status.failure) is not None:
        when, path = entries.local_time(failure.done), entries.printable(failure.source)
        rows.append(("last failure", f"{when}, {path}: {entries.why(failure)}"))
    return rows
