"""Sidecars that follow a photo which has been sorted.

In: photos that were moved, and sidecars that arrive later. Out: a `Decision` for each sidecar, handed to the pipeline.
"""

import os
import time

from sorter.decisions import Decision
from sorter.decoding.decoded import Decoded
from sorter.files.photo import Photo
from sorter.history.reader import HistoryReader
from sorter.history.store import SIDECAR
from sorter.inbox.scan import Inbox
from sorter.inbox.sidecars import LATE_SECONDS, beside, has_photo, is_sidecar, photos, renamed
from sorter.pipeline.pipeline import Pipeline
from sorter.service.accounting import Accounting

_MAX_BATCH = 100


class SidecarFollower:
    """Finds the sidecars of sorted photos and has them moved after these.

    Args:
        in_hand: names of the files that are being sorted; a sidecar that is going to be moved is added.
        history: finds the photo of a sidecar that arrives late; None if nothing was sorted yet.
    """

    def __init__(self, inbox: Inbox, in_hand: set[str], accounting: Accounting, history: HistoryReader | None) -> None:
        self._inbox, self._in_hand = inbox, in_hand
        self._accounting, self._history = accounting, history
        self._pending: list[Decision] = []

    @property
    def is_pending(self) -> bool:
        """Whether sidecars wait to be handed to the pipeline."""
        return bool(self._pending)

    def hand_over(self, pipeline: Pipeline) -> None:
        """Give the pipeline as many of them as it takes now."""
        batch = self._pending[:_MAX_BATCH]
        if batch and pipeline.follow(batch):
            del self._pending[: len(batch)]

    def must_wait(self, file: Photo) -> bool:
        """Whether a file is a sidecar whose photo is still there, or being sorted: it will follow that photo."""
        if not is_sidecar(file.name):
            return False
        return any(name in self._in_hand for name in _photo_names(file)) or has_photo(file)

    def follow_sorted(self, file: Photo) -> bool:
        """Have a sidecar follow its photo, if that was sorted lately; False if it is not one, or was not."""
        if self._history is None or not is_sidecar(file.name):
            return False
        entry = self._history.last_sorted(file.root, _photo_names(file), time.time() - LATE_SECONDS)
        if entry is None:
            return False
        self._follow(file, entry.name, entry.destination)
        return True

    def follow(self, photo: Photo, destination: str) -> None:
        """Have the sidecars beside a photo follow it; one that another photo shares waits for that one."""
        for name in beside(photo):
            sidecar = self._inbox.look(name, time.time())
            if sidecar is not None and name not in self._in_hand and not self.must_wait(sidecar):
                self._accounting.ignored.discard(sidecar)  # it may have arrived before its photo
                self._follow(sidecar, photo.name, destination)

    def _follow(self, sidecar: Photo, photo: str, destination: str) -> None:
        folder, new = os.path.split(destination)
        name = renamed(os.path.basename(sidecar.name), os.path.basename(photo), new)
        if os.path.lexists(os.path.join(folder, name)):
            self._accounting.leave(sidecar, f"cannot follow its photo: {os.path.join(folder, name)} exists")
            return
        decoded = Decoded(sidecar, "skipped")
        self._pending.append(Decision(decoded, SIDECAR, os.path.basename(folder), name=name, follows=new))
        self._in_hand.add(sidecar.name)


def _photo_names(sidecar: Photo) -> list[str]:
    folder, _, base = sidecar.name.rpartition("/")
    return [os.path.join(folder, name) for name in photos(base)]
