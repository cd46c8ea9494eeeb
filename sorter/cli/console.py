"""What `sorter run` prints for a person: a progress bar while it sorts, and a summary at the end."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sorter.cli.entries import counted, printable
from sorter.decisions import Outcome, described
from sorter.files import UNSURE
from sorter.logs import LogStream
from sorter.service.accounting import NAMED_FOLDERS
from sorter.service.counters import Counters

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """A progress bar on the terminal of the log; log lines appear above it."""

    def __init__(self, progress: "Progress", task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, counters: Counters) -> None:
        """Show how many files have been dealt with."""
        done = counters.folders.total() + counters.kept.total() + counters.skipped + counters.left
        done += counters.put_back + counters.linked_before
        self.show(done, done / max(time.monotonic() - counters.started - counters.waited, 0.001))

    def show(self, done: int, per_second: float) -> None:
        """Show how many files have been dealt with, and how fast."""
        self._progress.update(self._task, completed=done, speed=f"{per_second:.1f} photos/s")

    def waiting(self, files: int) -> None:
        """Show that only files that are still changing are left."""
        self._progress.update(self._task, description=f"waiting for {files} to stop changing")


@contextmanager
def bar(stream: LogStream, total: int | None, doing: str = "sorting") -> Iterator[Bar]:
    """Show a bar for about `total` files; None if they were not counted."""
    # Rich takes a third of a second to import.
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
        task = progress.add_task(doing, total=total, speed="")
        # The bar itself is written to this stream as well; only log lines are routed around it.
        stream.only_problems = True
        stream.above = lambda text: progress.console.print(Text.from_ansi(text.rstrip("\n")), soft_wrap=True)
        try:
            yield Bar(progress, task)
        finally:
            stream.above, stream.only_problems = None, False


def say(text: str, stream: TextIO | None, *, flush: bool = False) -> None:
    """Print a line. If the reader of the pipe is gone, the work goes on without it."""
    if stream is None:
        return
    try:
        stream.write(f"{text}\n")
        if flush:
            stream.flush()
    except OSError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Discard what is written to a stream from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_plan(outcome: Outcome, output: Path) -> None:
    """Print what a dry run would do with a photo, for a person."""
    decision, destination = outcome.decision, outcome.destination
    assert decision is not None, "called only for photos with a decision"
    assert destination is not None, "a dry run has one for each decision"
    folder, base = os.path.split(os.path.relpath(destination, output))
    place = os.path.join(folder, "" if base == os.path.basename(outcome.photo.name) else base)
    reason, detail = decision.decoded.reason, decision.detail
    if reason is not None:
        why = f"{reason}: {decision.decoded.detail}"
    else:
        why = detail or f"{decision.label} {decision.confidence:.1%}"
    print(f"{printable(outcome.photo.name)} → {printable(place)} ({why})")


def print_decision(outcome: Outcome) -> None:
    """Print what a dry run would do with a photo, as a line of JSON on standard output."""
    decision = outcome.decision
    assert decision is not None, "called only for photos with a decision"
    print(json.dumps(described(outcome) | {"detail": decision.detail or decision.decoded.detail or None}))


def summary(counters: Counters, folders: list[str], *, dry_run: bool) -> str:
    """The lines that `sorter run --once` ends with."""
    rows = [
        (f"{folder}/", counters.folders[folder]) for folder in folders if counters.folders[folder] or folder != UNSURE
    ]
    rows += [(f"kept in {folder}/", count) for folder, count in counters.kept.items()]
    rows += [("sidecars moved along", counters.sidecars)] if counters.sidecars else []
    rows += [("skipped, not photos", counters.skipped), ("left in the inbox", counters.left)]
    rows += [("restored by undo, not sorted again", counters.put_back)] if counters.put_back else []
    rows += [("folders left empty", len(counters.emptied))] if counters.emptied else []
    rows += [("linked before, not sorted again", counters.linked_before)] if counters.linked_before else []
    would = "would be " if dry_run else ""
    head = f"{counted(counters.photos, 'photo')} {would}sorted in {counters.seconds - counters.waited:.1f} s"
    head += f" ({counters.photos_per_second:.1f} photos/s)"
    if counters.waited >= 1:
        head += f", plus {counters.waited:.1f} s waiting for files to stop changing"
    if counters.interrupted:
        head += ", interrupted: the rest is still in the inbox"
    width = max(len(name) for name, _ in rows)
    named = [f"    {printable(folder)}/" for folder in counters.emptied[:NAMED_FOLDERS]]
    unnamed = len(counters.emptied) - len(named)
    more = [f"    and {unnamed} more"] if unnamed else []
    return "\n".join([head, *(f"  {name:<{width}}  {count:>7}" for name, count in rows), *named, *more])
