"""Sidecars that follow a photo which has been sorted.

In: photos that were moved, and sidecars that arrive later. Out: a `Decision` for each sidecar, handed to the pipeline.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sorter.decisions import Decision
from sorter.decoding.decoded import Decoded
from sorter.files.photo import Photo
from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import SIDECAR, Run
from sorter.inbox.scan import Inbox
from sorter.inbox.sidecars import LATE_SECONDS, FolderListing
from sorter.pipeline.stages import Stages
from sorter.service.accounting import Accounting

_MAX_BATCH = 100
_MAX_LISTINGS = 16  # the scan goes from folder to folder, and what it found is decided on a little later


class SidecarFollower:
    """Finds the sidecars of sorted photos and has them moved after these.

    Args:
        output: the folder that photos are sorted into.
        in_hand: names of the files that are being sorted; a sidecar that is going to be moved is added.
        history: finds the photo of a sidecar that arrives late; None if nothing was sorted yet.
        link: photos and sidecars stay where they are, and are linked.
    """

    def __init__(
        self,
        inbox: Inbox,
        output: Path,
        in_hand: set[str],
        accounting: Accounting,
        history: HistoryReader | None,
        *,
        link: bool,
    ) -> None:
        self._inbox, self._output, self._in_hand = inbox, output.absolute(), in_hand
        self._accounting, self._history, self._link = accounting, history, link
        self._names = inbox.selection.sidecars
        self._listings: dict[str, FolderListing] = {}
        self._pending: list[Decision] = []

    @property
    def is_pending(self) -> bool:
        """Whether sidecars wait to be handed to the pipeline."""
        return bool(self._pending)

    def hand_over(self, pipeline: Stages) -> None:
        """Give the pipeline as many of them as it takes now."""
        batch = self._pending[:_MAX_BATCH]
        if batch and pipeline.follow(batch):
            del self._pending[: len(batch)]

    def must_wait(self, file: Photo) -> bool:
        """Whether a file is a sidecar whose photo is still there, or being sorted: it will follow that photo."""
        folder, base = os.path.split(file.name)
        if not self._names.is_sidecar(base):
            return False
        self._listing(folder).add(base)
        photos = self._photos(folder, base)
        if not self._link:
            return next(photos, None) is not None
        # Photos that were linked are still there. A sidecar that came later follows them; one that was linked stays.
        names = [os.path.join(folder, photo) for photo in photos]
        waits = any(name in self._in_hand or self._last_link(file, name) is None for name in names)
        return waits or (bool(names) and self._last_link(file, file.name) is not None)

    def follow_sorted(self, file: Photo, run: Run) -> bool:
        """Have a sidecar follow its photo, if that was sorted lately; False if it is not one, or was not.

        Args:
            file: that may be a sidecar.
            run: the present one.
        """
        folder, base = os.path.split(file.name)
        if self._history is None:
            return False
        for photos in self._names.photos(base):
            names = [os.path.join(folder, name) for name in photos]
            entry = self._history.last_sorted(file.root, names, time.time() - LATE_SECONDS)
            if entry is not None:
                self._follow(file, entry.name, entry.place, run)
                return True
        return False

    def follow(self, photo: Photo, destination: str, run: Run) -> None:
        """Have the sidecars beside a photo follow it; one that another photo shares waits for that one.

        Args:
            photo: that was sorted.
            destination: where it is now.
            run: that sorted it.
        """
        folder, base = os.path.split(photo.name)
        for name in self._listing(folder).sidecars(base):
            sidecar = self._inbox.look(os.path.join(folder, name), time.time())
            if sidecar is None or sidecar.name in self._in_hand:
                continue
            others = [other for other in self._photos(folder, name) if other != base]
            if self._link:
                others = [o for o in others if self._last_link(photo, os.path.join(folder, o)) is None]
            if not any(self._names.fits_as_well(name, other, base) for other in others):
                self._accounting.ignored.discard(sidecar)  # it may have arrived before its photo
                self._follow(sidecar, photo.name, os.path.relpath(destination, self._output), run)

    def _last_link(self, beside: Photo, name: str) -> Entry | None:
        """The link that was made to a file of the inbox."""
        return None if self._history is None else self._history.last_link(replace(beside, name=name))

    def _photos(self, folder: str, sidecar: str) -> Iterator[str]:
        """The photos that a sidecar may belong to: those being sorted, then those beside it."""
        for names in self._names.photos(sidecar):
            yield from (name for name in names if os.path.join(folder, name) in self._in_hand)
        yield from self._listing(folder).photos(sidecar)

    def _listing(self, folder: str) -> FolderListing:
        if folder not in self._listings and len(self._listings) >= _MAX_LISTINGS:
            del self._listings[next(iter(self._listings))]
        return self._listings.setdefault(folder, FolderListing(self._inbox.root, folder, self._names))

    def _follow(self, sidecar: Photo, photo: str, place: str, run: Run) -> None:
        """Have a sidecar follow its photo to a place in the output."""
        folder, _, new = place.partition("/")
        inner, base = os.path.split(new)
        name = os.path.join(inner, self._names.renamed(os.path.basename(sidecar.name), os.path.basename(photo), base))
        taken = os.path.join(self._output, folder, name)
        if os.path.lexists(taken):
            self._accounting.leave(sidecar, f"cannot follow its photo: {taken} exists")
            return
        decoded = Decoded(sidecar, "skipped")
        self._pending.append(Decision(decoded, SIDECAR, folder, name=name, follows=new, run=run))
        self._in_hand.add(sidecar.name)
