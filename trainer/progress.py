"""What `trainer` says while it works: bars and lines on a terminal, one JSON object a line otherwise, TensorBoard."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, track

from trainer.fitting import loop

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Tracker = Callable[[Iterable[Any], int], Iterable[Any]]


class Reporter:
    """Is told what happens, and says nothing.

    Args:
        events: folder for TensorBoard's event files; None writes none.
    """

    def __init__(self, events: Path | None = None) -> None:
        self._epochs = 0
        self._events: SummaryWriter | None = None
        if events is not None:
            from torch.utils import tensorboard

            self._events = tensorboard.SummaryWriter(str(events))

    def say(self, text: str) -> None:
        """Say one sentence."""

    def progress(self, progress: loop.Progress) -> None:
        """Show where a stage is."""

    def epoch(self, epoch: loop.Epoch) -> None:
        """Say what an epoch measured."""
        self._epochs += 1
        if self._events is not None:
            for name, value in asdict(epoch).items():
                if name not in ("stage", "epoch"):
                    self._events.add_scalar(name.replace("_", "/", 1), value, self._epochs)
            self._events.flush()

    def track(self, items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        """Show progress over items."""
        return items

    def tracker(self, what: str) -> Tracker:
        """`track` with its title."""
        return lambda items, total: self.track(items, total, what)

    def close(self) -> None:
        """Take bars away."""


class TerminalReporter(Reporter):
    """For a person."""

    def __init__(self, console: Console, events: Path | None) -> None:
        super().__init__(events)
        self._console = console
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """See `Reporter.say`."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def progress(self, progress: loop.Progress) -> None:
        """See `Reporter.progress`."""
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(12), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("", figures="")
            self._bar.start()
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        figures = (
            f"loss {progress.loss:.4f}  accuracy {progress.accuracy:.4f}  {progress.images_per_second:.0f} images/s  "
            f"{minutes}:{seconds:02} left"
        )
        self._bar.update(
            self._bar.task_ids[0],
            description=f"{progress.stage}, epoch {progress.epoch}",
            total=progress.steps,
            completed=progress.step,
            figures=figures,
        )

    def epoch(self, epoch: loop.Epoch) -> None:
        """See `Reporter.epoch`."""
        super().epoch(epoch)
        self.close()
        self._console.print(
            f"{epoch.stage}, epoch {epoch.epoch:<2}  "
            f"loss {epoch.training_loss:.4f}  accuracy {epoch.training_accuracy:.4f}  "
            f"validation {epoch.validation_loss:.4f}  {epoch.validation_accuracy:.4f}  "
            f"{epoch.images_per_second:.0f} images/s",
            highlight=False,
        )

    def track(self, items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        """See `Reporter.track`."""
        return track(items, what, total=total, console=self._console, transient=True)

    def close(self) -> None:
        """See `Reporter.close`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LineReporter(Reporter):
    """For a program."""

    def say(self, text: str) -> None:
        """See `Reporter.say`."""
        print(json.dumps({"event": "note", "text": text}), file=sys.stderr, flush=True)

    def epoch(self, epoch: loop.Epoch) -> None:
        """See `Reporter.epoch`."""
        super().epoch(epoch)
        print(json.dumps({"event": "epoch", **asdict(epoch)}), file=sys.stderr, flush=True)


def open_reporter(events: Path | None) -> Reporter:
    """The one that fits standard error."""
    console = Console(stderr=True)
    return TerminalReporter(console, events) if console.is_terminal else LineReporter(events)
