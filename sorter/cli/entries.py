"""What `history`, `status` and `undo` share: how an entry is shown, and the check of `--run`."""

import codecs
import sys
from datetime import datetime
from typing import Any

from sorter.errors import ConfigurationError
from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import SIDECAR
from sorter.history.verdicts_reader import PhotoVerdict


def check_run(reader: HistoryReader, run: str) -> None:
    """Make sure that the history has a run.

    Raises:
        ConfigurationError: it has not.
    """
    if not reader.has_run(run):
        raise ConfigurationError(f"there is no run {printable(run)}: sorter history lists the runs")


def to_json(entry: Entry) -> dict[str, Any]:
    """An entry for a line of JSON."""
    return {
        "id": entry.id,
        "time": _iso_time(entry.done),
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
        "linked": entry.linked,
        "corrected": entry.corrected,
    }


def verdict_to_json(verdict: PhotoVerdict) -> dict[str, Any]:
    """A verdict for a line of JSON or a row of a CSV."""
    return {
        "time": _iso_time(verdict.at),
        "path": verdict.path,
        "label": verdict.label,
        "how": verdict.how,
        "label_was": verdict.label_was,
        "confidence": verdict.confidence,
        "model": verdict.model or None,
        "digest": verdict.digest.hex(),
    }


def _iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def why(entry: Entry) -> str:
    """Why a photo went where it went: its label and confidence, or what was wrong with it."""
    if entry.reason is not None:
        return f"{entry.reason}: {entry.detail}" if entry.detail else entry.reason
    if entry.kind == "undone":
        return "link removed" if entry.linked else "restored"
    if entry.kind == "corrected":
        return f"a person sees {entry.label or 'none of the classes'}"
    if entry.kind == "moved":
        return "moved by hand"
    if entry.kind == "reverted":
        return "correction taken back"
    if entry.kind == SIDECAR:
        return f"{'linked' if entry.linked else 'moved'} with its photo"
    if entry.detail is not None:
        return entry.detail
    return f"{entry.label} {entry.confidence:.1%}" if entry.confidence is not None else ""


def arrow() -> str:
    """The arrow between two places, as far as standard output can show it."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return "→" if codecs.lookup(encoding).name.startswith("utf") else "->"


def local_time(seconds: float) -> str:
    """A time in seconds since the epoch, in this machine's time zone."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def printable(path: str) -> str:
    """A path that is safe to print, whatever bytes it contains."""
    text = path.encode(errors="backslashreplace").decode()
    return text if text.isprintable() else ascii(text)[1:-1]


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 photo, 2 photos."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
