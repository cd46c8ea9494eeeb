"""Files that need another look, and when: the more often in vain, the later."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sorter.decisions import Outcome
from sorter.files.photo import Identity, Photo

FIRST_SECONDS, LONGEST_SECONDS = 0.5, 60.0
"""How soon a photo is looked at again, at first and at last; the time doubles with each look in vain."""
_NEW_VERSIONS = 2  # so many do not wait


@dataclass(frozen=True, slots=True)
class _Retry:
    """One version of a file that needs another look.

    Attributes:
        seen: when this version was first seen, in seconds since the epoch.
        due: when this version is looked at again, and `changed_due` another one.
        reason: why, for a person.
        is_left: whether the file counts as left meanwhile.
    """

    identity: Identity
    seen: float
    due: float
    changed_due: float
    reason: str
    is_left: bool


class Retries:
    """Remembers which version of a file waits for which moment. All times are in seconds since the epoch."""

    def __init__(self) -> None:
        self._retries: dict[str, _Retry] = {}  # what waits
        self._looks: dict[str, int] = {}  # in vain so far; kept while a file is let through

    @property
    def waiting(self) -> dict[str, str]:
        """The files that wait, except for those that count as left, and why."""
        return {name: retry.reason for name, retry in self._retries.items() if not retry.is_left}

    @property
    def next_due(self) -> float:
        """When the first of them is due; infinite if none waits."""
        return min((retry.due for retry in self._retries.values()), default=float("inf"))

    def add(self, outcome: Outcome, now: float) -> None:
        """Have the photo of an `again` or a `left` wait."""
        photo = outcome.photo
        looks = self._looks[photo.name] = self._looks.get(photo.name, 0) + 1
        backed_off = now + min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** min(looks - 1, 10))
        due, is_left = max(outcome.look_again, backed_off), outcome.kind == "left"
        # What is left is repaired by its owner, once. What keeps changing is touched by a program.
        changed_due = now if is_left or looks <= _NEW_VERSIONS else backed_off
        self._retries[photo.name] = _Retry(photo.identity, photo.seen, due, changed_due, outcome.detail, is_left)

    def settle(self, name: str) -> None:
        """Stop waiting for a file that is changing: it is looked at when it has settled."""
        self._retries.pop(name, None)

    def forget(self, name: str) -> None:
        """Stop waiting for a file, and forget how often it was looked at."""
        self._retries.pop(name, None)
        self._looks.pop(name, None)

    def due(self, now: float) -> Iterator[str]:
        """The names that are due by now; they may be forgotten meanwhile."""
        yield from [name for name, retry in self._retries.items() if retry.due <= now]

    def admit(self, photo: Photo, now: float) -> Photo | None:
        """Let a settled photo through, unless it has to wait longer.

        Returns:
            The photo, with the time at which this version was first seen; None while it has to wait.
        """
        retry = self._retries.get(photo.name)
        if retry is None:
            return photo
        is_new = retry.identity != photo.identity
        if now < (retry.changed_due if is_new else retry.due):
            return None
        del self._retries[photo.name]
        return photo if is_new else replace(photo, seen=retry.seen)
