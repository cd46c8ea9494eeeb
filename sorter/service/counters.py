"""What a run has done so far, in numbers."""

import time
from collections import Counter
from dataclasses import dataclass, field

from sorter.errors import ExitCode
from sorter.history.store import FAILED


@dataclass
class Counters:
    """What happened so far.

    Attributes:
        folders: photos by the folder they were moved to.
        skipped: files that are no photos.
        put_back: photos that undo brought back, and that are left alone.
    """

    folders: Counter[str] = field(default_factory=Counter)
    sidecars: int = 0
    skipped: int = 0
    put_back: int = 0
    left: int = 0
    interrupted: bool = False
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def photos(self) -> int:
        """Photos that were sorted: moved, and not to `failed/`."""
        return self.folders.total() - self.folders[FAILED]

    @property
    def photos_per_second(self) -> float:
        """Over the whole time."""
        return self.photos / self.seconds if self.seconds else 0.0

    @property
    def exit_code(self) -> ExitCode:
        """What the run ends with."""
        incomplete = self.left or self.interrupted or self.folders[FAILED]
        return ExitCode.INCOMPLETE if incomplete else ExitCode.DONE
