"""Carries out what a person says of sorted photos: records it, and moves a photo into the folder where it belongs.

In: `Verdict`s on photos of one output. Out: an `Outcome` for each. A correction promises what sorting does: the intent
is durable before the photo is touched, nothing is ever replaced, and after a crash and the next start each photo has
exactly one name. It works beside a running sorter.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sorter.classifier.manifest import Class
from sorter.errors import StorageError
from sorter.files import FAILED, UNSURE, lock
from sorter.files.lock import Lock
from sorter.files.photo import Identity, Photo, open_file
from sorter.history.places_reader import PlacesReader
from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import History, Judgement, Run
from sorter.inbox.sidecars import SidecarNames
from sorter.moving.corrector import Corrected, Correction, Corrector
from sorter.moving.hand_moves import HandMoves
from sorter.moving.recovery import recover


@dataclass(frozen=True, slots=True)
class Version:
    """Which version of a file the person has seen."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a person says of a photo.

    Attributes:
        photo: the id of its sorting move in the history, as in `Entry.id`.
        version: of the file that was shown.
        label: the class that the person sees; None for none of them: the photo goes to `unsure/`.
        how: `corrected` moves the photo to the folder of its label, and so does `checked`, for a photo that was chosen
            at random. `confirmed` moves nothing: the photo has to be in that folder.
    """

    photo: int
    version: Version
    label: str | None
    how: Literal["corrected", "confirmed", "checked"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a photo.

    Attributes:
        photo: as in the verdict.
        path: where it is now, absolute; empty if the history does not have it.
        error: what is wrong, as a sentence; empty if the verdict is recorded and the photo where it belongs.
        warning: which of its sidecars stayed behind, and why, though there is no error.
        is_changed: the photo is not the one any more, or not where, the person has seen it: it was not moved.
    """

    photo: int
    path: str
    error: str = ""
    is_changed: bool = False
    warning: str = ""


class Corrections:
    """The verdicts on one output; used by one thread at a time.

    A reader of the history in the same process is opened with `beside_writer=True`.

    Args:
        output: the folder that has `cats/` and the others.
        classes: of the model, `manifest.classes`: which label has which folder.
        state_dir: where the history is, if not in the output.
        sidecars: says which files belong to a photo, and go with it.

    Raises:
        ConfigurationError: the output has no history, or it cannot be used.
        StorageError: the disk is full or fails.
    """

    def __init__(
        self,
        output: Path,
        classes: Sequence[Class],
        state_dir: Path | None = None,
        sidecars: SidecarNames | None = None,
    ) -> None:
        self._output, self._state_dir = Path(os.path.realpath(output)), state_dir
        self._folders: dict[str | None, str] = {None: UNSURE, **{known.label: known.folder for known in classes}}
        self._run = Run.new(kind="review")
        self._has_begun = False
        with ExitStack() as stack:
            # Refuses an output without a history before anything is created in it.
            HistoryReader(self._output, state_dir).close()
            self._history = History(self._output, state_dir)
            stack.callback(self._history.close)
            self._reader = PlacesReader(self._output, state_dir, beside_writer=True)
            stack.callback(self._reader.close)
            sidecars = sidecars or SidecarNames()
            self._corrector = Corrector(self._output, self._history, self._reader, self._run, sidecars)
            labels = {known.folder: known.label for known in classes}
            self._hand_moves = HandMoves(self._output, self._reader, labels, sidecars)
            stack.pop_all()

    def close(self) -> None:
        """Record that the review has ended, and close the history; idempotent.

        Raises:
            StorageError: the history cannot be written.
        """
        has_begun, self._has_begun = self._has_begun, False
        try:
            if has_begun:
                self._history.finish()
        finally:
            self._reader.close()
            self._history.close()

    def decide(self, verdicts: Sequence[Verdict]) -> list[Outcome]:
        """Record verdicts and move the photos that are in another folder; durable when it returns.

        If one photo is in it twice, the later verdict counts.

        Returns:
            What became of each, in the order of the verdicts.

        Raises:
            NotNowError: an undo, or another review, is moving photos of this output.
            StorageError: the history cannot be written, or a folder cannot be synced.
            ConfigurationError: the history cannot be read.
        """
        outcomes: dict[int, Outcome] = {}
        newest = {verdict.photo: verdict for verdict in verdicts}
        corrections: list[Correction] = []
        confirmed: list[Judgement] = []
        with self._locked() as unfinished:
            for verdict in newest.values():
                try:
                    entry = self._entry(verdict.photo, unfinished)
                    identity, digest = _read(self._output, entry, verdict.version)
                    judgement = _judged(entry, verdict, digest)
                    folder = self._folder(entry, verdict)
                    if folder == _top(entry):
                        confirmed.append(judgement)
                        outcomes[entry.id] = Outcome(entry.id, entry.destination)
                    else:
                        corrections.append(Correction(entry, identity, folder, verdict.label, judgement))
                except _RefusedError as refusal:
                    outcomes[verdict.photo] = refusal.outcome
            if corrections or confirmed:
                self._begin()
                results = self._corrector.correct(corrections, confirmed)
                for correction, result in zip(corrections, results, strict=True):
                    outcomes[correction.entry.id] = _outcome(correction.entry.id, result)
        return [outcomes[verdict.photo] for verdict in verdicts]

    def take_back(self, photo: int) -> Outcome:
        """Delete the newest verdict on a photo, and move the photo back to the place from which that moved it.

        Raises:
            NotNowError, StorageError, ConfigurationError: as `decide`.
        """
        with self._locked() as unfinished:
            try:
                entry = self._entry(photo, unfinished)
                verdict = self._reader.newest_verdict(entry)
                if verdict is None:
                    raise _RefusedError(entry.id, entry.destination, "has no verdict to take back: reload the page")
                self._begin()
                if verdict.came_from is None:
                    self._history.delete_verdict(verdict.id)
                    return Outcome(entry.id, entry.destination)
                identity, _ = _read(self._output, entry, None)
            except _RefusedError as refusal:
                return refusal.outcome
            folder, _, name = verdict.came_from.partition("/")
            correction = Correction(entry, identity, folder, takes_back=verdict.id, former_name=name)
            (result,) = self._corrector.correct([correction])
            return _outcome(entry.id, result)

    def follow_hand_moves(self) -> int:
        """Find the photos that a person has moved to another folder by hand, and record that as a verdict on each.

        Returns:
            How many there are.

        Raises:
            NotNowError, StorageError, ConfigurationError: as `decide`.
        """
        found = self._hand_moves.find()  # without the lock, because it may take seconds
        if not found:
            return 0
        with self._locked():
            return self._hand_moves.record(found, self._history)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[set[int | None]]:
        """The right to move sorted photos, for one batch; first what a crash has left is cleared up.

        Yields:
            The ids of the photos whose move cannot be examined at present.
        """
        held = Lock(self._output, lock.UNDOING, self._state_dir)
        held.take(patience_seconds=lock.UNDOING_PATIENCE_SECONDS)
        if not held.is_held:
            raise StorageError(f"{self._output} is not there: mount or recreate it")
        try:
            recover(self._history, self._output, sorting=False)
            moves = self._history.unfinished()
            yield {move.corrects for move in moves} | {move.undoes for move in moves}
        finally:
            held.release()

    def _begin(self) -> None:
        if not self._has_begun:
            self._history.begin(self._run)
            self._has_begun = True

    def _entry(self, photo: int, unfinished: set[int | None]) -> Entry:
        entry = self._reader.photo(photo)
        if entry is None:
            raise _RefusedError(
                photo,
                "",
                "this photo is not in the output any more: it was restored or sorted again, reload the page",
                is_changed=True,
            )
        if photo in unfinished:
            raise _RefusedError(photo, entry.destination, "was being moved, and cannot be read now: check its disk")
        if entry.kind == FAILED:
            raise _RefusedError(photo, entry.destination, "could not be read and has no class: use sorter retry failed")
        return entry

    def _folder(self, entry: Entry, verdict: Verdict) -> str:
        """The folder where a photo belongs."""
        if entry.kind == "sorted" and not entry.corrected and verdict.label == entry.label:
            return _top(entry)  # of another model, perhaps, which had another folder for this class
        folder = self._folders.get(verdict.label)
        if folder is None:
            raise _RefusedError(
                entry.id,
                entry.destination,
                f"cannot be a {verdict.label}, which is no class of the model: choose one of "
                f"{', '.join(label for label in self._folders if label is not None)}",
            )
        if verdict.how == "confirmed" and folder != _top(entry):
            raise _RefusedError(
                entry.id,
                entry.destination,
                f"is not in {folder}/: correct it instead of confirming it",
                is_changed=True,
            )
        return folder


class _RefusedError(Exception):
    """A verdict that changes nothing."""

    def __init__(self, photo: int, path: str, problem: str, *, is_changed: bool = False) -> None:
        super().__init__(problem)
        self.outcome = Outcome(photo, path, f"{path} {problem}".lstrip(), is_changed)


def _top(entry: Entry) -> str:
    """The folder of the output that a photo is in."""
    return entry.place.partition("/")[0]


def _judged(entry: Entry, verdict: Verdict, digest: bytes) -> Judgement:
    return Judgement(entry.id, verdict.label, verdict.how, digest, entry.label, entry.confidence, entry.model)


def _outcome(photo: int, result: Corrected) -> Outcome:
    if result.has_moved:
        return Outcome(photo, result.path, warning=result.problem)
    return Outcome(photo, result.path, result.problem, result.is_changed)


def _read(output: Path, entry: Entry, version: Version | None) -> tuple[Identity, bytes]:
    """The identity of a photo and the SHA-256 of its bytes.

    Args:
        output: the photo's.
        entry: of the photo.
        version: that the person has seen; None if that does not matter.

    Raises:
        _RefusedError: it is another version, or not the one that was sorted.
    """

    def refused(problem: str) -> _RefusedError:
        return _RefusedError(entry.id, entry.destination, problem, is_changed=True)

    try:
        descriptor = open_file(Photo(output, entry.place, Identity(0, 0, 0, 0, 0), 0.0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            # First, because a page that is loaded again does not show it.
            if not stat.S_ISREG(status.st_mode) or not entry.has_version(status):
                raise refused("was changed or replaced since it was sorted: move it yourself")
            if version not in (None, Version(status.st_size, status.st_mtime_ns)):
                raise refused("changed since it was shown: reload the page")
            digest = hashlib.file_digest(file, "sha256").digest()
            identity = Identity.of(status)
            if Identity.of(os.fstat(descriptor)) != identity:
                raise refused("is being changed by another program: try again when that is done")
    except FileNotFoundError:
        raise refused("is gone: if you moved it, start sorter review again") from None
    except OSError as error:
        raise refused(f"cannot be read ({error.strerror}): check what it is, and its permissions") from None
    return identity, digest
