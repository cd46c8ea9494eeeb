"""What a person at a terminal sees: the progress bar while photos are sorted, and the summary after."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from sorter.decisions import Outcome
from sorter.logs import LogStream
from sorter.service.counters import Counters

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """A progress bar on the log's terminal; log lines pass above it."""

    def __init__(self, progress: "Progress", task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, counters: Counters) -> None:
        """Show the photos that are done."""
        done = counters.folders.total() + counters.skipped + counters.put_back + counters.left
        speed = done / max(time.monotonic() - counters.started, 0.001)
        self._progress.update(self._task, completed=done, speed=f"{speed:.1f} photos/s")

    def waiting(self, files: int) -> None:
        """Show that nothing but files that are still changing is left."""
        self._progress.update(self._task, description=f"waiting for {files} still changing")


@contextmanager
def bar(stream: LogStream, total: int | None) -> Iterator[Bar]:
    """Show a bar for about `total` files, None where nobody counted them."""
    # A third of a second to import, which nothing but a terminal needs.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    console = Console(file=stream, force_terminal=True)  # type: ignore[arg-type]
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("sorting", total=total, speed="")
        # Rich writes to the stream too: only what comes from the log has to go around the bar.
        stream.above = lambda text: progress.console.print(Text.from_ansi(text.rstrip("\n")), soft_wrap=True)
        try:
            yield Bar(progress, task)
        finally:
            stream.above = None


def say(text: str, stream: TextIO | None, *, flush: bool = False) -> None:
    """Print a line; where nobody can read it any more, the work goes on all the same."""
    if stream is None:
        return
    try:
        stream.write(f"{text}\n")
        if flush:
            stream.flush()
    except OSError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Have what is still to be written go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_decision(outcome: Outcome) -> None:
    """What a dry run would do with one photo, as a line of JSON on standard output."""
    decision = outcome.decision
    assert decision is not None, "only photos that were decided on"
    content = {
        "path": outcome.photo.path,
        "destination": outcome.destination,
        "kind": decision.kind,
        "label": decision.label,
        "confidence": None if decision.confidence is None else round(decision.confidence, 4),
        "reason": decision.decoded.reason,
        "detail": decision.detail or decision.decoded.detail or None,
    }
    print(json.dumps(content))


def summary(counters: Counters, folders: list[str], *, dry_run: bool) -> str:
    """The lines that `sorter run --once` ends with, on standard output."""
    rows = [
        (f"{folder}/", counters.folders[folder]) for folder in folders if counters.folders[folder] or folder != "unsure"
    ]
    rows += [("with their photos", counters.sidecars)] if counters.sidecars else []
    rows += [("skipped, not photos", counters.skipped), ("left in the inbox", counters.left)]
    rows += [("put back by undo, not sorted again", counters.put_back)] if counters.put_back else []
    would = "would be " if dry_run else ""
    photos = "1 photo" if counters.photos == 1 else f"{counters.photos} photos"
    head = f"{photos} {would}sorted in {counters.seconds:.1f} s ({counters.photos_per_second:.1f} photos/s)"
    if counters.interrupted:
        head += ", interrupted: the rest is still in the inbox"
    width = max(len(name) for name, _ in rows)
    return "\n".join([head, *(f"  {name:<{width}}  {count:>7}" for name, count in rows)])
