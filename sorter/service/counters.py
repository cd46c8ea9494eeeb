"""What a run has done so far, in numbers."""

import time
from collections import Counter
from dataclasses import dataclass, field

from sorter.errors import ExitCode
from sorter.files import FAILED


@dataclass
class Counters:
    """Photos and other files, by what became of them.

    Attributes:
        folders: photos by the folder they were moved to.
        kept: photos that were sorted again and belong where they are, by that folder.
        sidecars: moved with their photos.
        skipped: files that are not photos.
        put_back: photos that `sorter undo` restored, and that are left alone.
        linked_before: photos that an earlier run linked, and that have not changed since.
        left: photos that stay in the inbox because they cannot be read or moved.
        emptied: subfolders of the inbox that are empty now that their photos were sorted; known at the end of `--once`.
        interrupted: whether a signal ended the run before the inbox was empty.
        started: a monotonic time.
        seconds: how long the run took; 0 until it has ended.
        waited: how many of them it did nothing but wait for files to stop changing.
    """

    folders: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    sidecars: int = 0
    skipped: int = 0
    put_back: int = 0
    linked_before: int = 0
    left: int = 0
    emptied: list[str] = field(default_factory=list)
    interrupted: bool = False
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def photos(self) -> int:
        """Photos that were sorted: moved, and not to `failed/`."""
        return self.folders.total() - self.folders[FAILED]

    @property
    def photos_per_second(self) -> float:
        """Sorted photos per second of the run, not counting waits; 0 until it has ended."""
        return self.photos / (self.seconds - self.waited) if self.seconds else 0.0

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of `run --once`."""
        incomplete = self.left or self.interrupted or self.folders[FAILED] or self.kept[FAILED]
        return ExitCode.INCOMPLETE if incomplete else ExitCode.DONE
