"""Files that need another look, and when."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sorter.decisions import Outcome
from sorter.files.photo import Identity, Photo

AGAIN_SECONDS = 0.5
"""How soon a photo that changed while it was sorted is looked at again."""


@dataclass(frozen=True, slots=True)
class _Retry:
    """One version of a file that needs another look, no earlier than `due` (seconds since the epoch)."""

    identity: Identity
    seen: float
    due: float


class Retries:
    """Remembers which version of a file waits for which moment. All times are in seconds since the epoch."""

    def __init__(self) -> None:
        self._retries: dict[str, _Retry] = {}

    @property
    def names(self) -> set[str]:
        """The files that wait."""
        return set(self._retries)

    @property
    def next_due(self) -> float:
        """When the first of them is due; infinite if none waits."""
        return min((retry.due for retry in self._retries.values()), default=float("inf"))

    def add(self, outcome: Outcome, now: float) -> None:
        """Have the photo of an `again` wait."""
        photo = outcome.photo
        self._retries[photo.name] = _Retry(photo.identity, photo.seen, max(outcome.look_again, now + AGAIN_SECONDS))

    def forget(self, name: str) -> None:
        """Stop waiting for a file."""
        self._retries.pop(name, None)

    def due(self, now: float) -> Iterator[str]:
        """The names that are due by now; they may be forgotten meanwhile."""
        yield from [name for name, retry in self._retries.items() if retry.due <= now]

    def admit(self, photo: Photo, now: float) -> Photo | None:
        """Let a settled photo through, unless this version of it has to wait longer.

        Returns:
            The photo, with the time at which this version was first seen; None while it has to wait.
        """
        retry = self._retries.get(photo.name)
        if retry is None:
            return photo
        if retry.identity != photo.identity:
            self.forget(photo.name)
            return photo
        if now < retry.due:
            return None
        self.forget(photo.name)
        return replace(photo, seen=retry.seen)
