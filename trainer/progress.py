"""What the trainer shows while it works: bars and lines on a terminal, else one JSON object a line; TensorBoard."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, track

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Tracker = Callable[[Iterable[Any], int], Iterable[Any]]
"""Given items and their number, passes the items on; for a progress bar."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch measured.

    Attributes:
        stage: what the stage trains, `head` or `everything`.
        epoch: counted from 1 in each stage.
        lr: the learning rate of the head after the epoch's last step.
        training_loss: mean, in natural units; accuracies are from 0 to 1.
    """

    stage: str
    epoch: int
    lr: float
    training_loss: float
    training_accuracy: float
    validation_loss: float
    validation_accuracy: float
    images_per_second: float


@dataclass(frozen=True, slots=True)
class StepProgress:
    """How far an epoch is; loss, accuracy and speed are of its steps so far."""

    stage: str
    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float
    seconds_left: float


class Reporter:
    """Receives everything there is to show, and shows nothing itself except to TensorBoard.

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
        """Show one sentence."""

    def step(self, progress: StepProgress) -> None:
        """Show how far the epoch is."""

    def epoch(self, epoch: Epoch) -> None:
        """Show what an epoch measured."""
        self._epochs += 1
        if self._events is not None:
            for name, value in asdict(epoch).items():
                if name not in ("stage", "epoch"):
                    self._events.add_scalar(name.replace("_", "/", 1), value, self._epochs)
            self._events.flush()

    def track(self, items: Iterable[Any], total: int, title: str) -> Iterable[Any]:
        """Pass the items on and show how many are done."""
        return items

    def tracker(self, title: str) -> Tracker:
        """`track` with a fixed title."""
        return lambda items, total: self.track(items, total, title)

    def close(self) -> None:
        """Remove what moves on the screen."""


class TerminalReporter(Reporter):
    """Bars and lines for a person."""

    def __init__(self, console: Console, events: Path | None) -> None:
        super().__init__(events)
        self._console = console
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """Print the sentence; brackets in a path are no markup."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, progress: StepProgress) -> None:
        """Move the bar."""
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

    def epoch(self, epoch: Epoch) -> None:
        """Replace the bar by a line that stays."""
        super().epoch(epoch)
        self.close()
        self._console.print(
            f"{epoch.stage}, epoch {epoch.epoch:<2}  "
            f"loss {epoch.training_loss:.4f}  accuracy {epoch.training_accuracy:.4f}  "
            f"validation loss {epoch.validation_loss:.4f}  accuracy {epoch.validation_accuracy:.4f}  "
            f"{epoch.images_per_second:.0f} images/s",
            highlight=False,
        )

    def track(self, items: Iterable[Any], total: int, title: str) -> Iterable[Any]:
        """Show a bar until the items are used up."""
        return track(items, title, total=total, console=self._console, transient=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LineReporter(Reporter):
    """JSON lines for a program."""

    def say(self, text: str) -> None:
        """Write a `note`."""
        print(json.dumps({"event": "note", "text": text}), file=sys.stderr, flush=True)

    def epoch(self, epoch: Epoch) -> None:
        """Write an `epoch`."""
        super().epoch(epoch)
        print(json.dumps({"event": "epoch", **asdict(epoch)}), file=sys.stderr, flush=True)


def open_reporter(events: Path | None) -> Reporter:
    """The reporter for standard error as it is.

    Args:
        events: folder for TensorBoard's event files; None writes none.
    """
    console = Console(stderr=True)
    return TerminalReporter(console, events) if console.is_terminal else LineReporter(events)
