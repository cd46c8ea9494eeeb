"""Moves sorted photos inside the output, from one class's folder to another's, with the sidecars beside them.

In: `Correction`s, and the verdicts of a person that ask for them. Out: for each, where the photo is now, or why it
stayed. The order is that of sorting: intents and verdicts are durable before the first photo is touched, and nothing is
recorded as done before the folders are synced. A verdict whose photo stays is withdrawn with its move.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sorter.errors import StorageError
from sorter.files import inodes
from sorter.files.atomic import ChangedError, StayedError, TakenError
from sorter.files.photo import Identity, Photo
from sorter.history.corrections_reader import CorrectionsReader
from sorter.history.reader import Entry
from sorter.history.store import SIDECAR, History, Judgement, Move, Run
from sorter.inbox.sidecars import SidecarNames
from sorter.moving.mover import Mover
from sorter.moving.recovery import Plan

_TRIES = 3  # a sorter beside it may take one name after the other


@dataclass(frozen=True, slots=True)
class Correction:
    """A photo that belongs into another folder.

    Attributes:
        entry: of the photo; it is at `entry.destination`.
        identity: of the file that was looked at.
        folder: where it belongs, such as `dogs`.
        label: the class that a person sees; None for none of them, and where a correction is taken back.
        judgement: the verdict that asks for it; its token is filled in here.
        takes_back: the id of the verdict that this takes back.
        former_name: the path in `folder` that the photo gets again; if its name there is taken, its own name, or the
            next free one. If this is empty, the photo keeps the subfolder that it is in.
    """

    entry: Entry
    identity: Identity
    folder: str
    label: str | None = None
    judgement: Judgement | None = None
    takes_back: int | None = None
    former_name: str = ""


@dataclass(frozen=True, slots=True)
class Corrected:
    """The result for one photo.

    Attributes:
        path: where it is now.
        problem: why it stayed there, or why one of its sidecars did not follow; empty if neither.
        has_moved: whether it is where it belongs.
        is_changed: whether it stayed because it is not the file any more that was looked at.
        name_was_taken: whether it stayed because another file took its planned name.
    """

    path: str
    problem: str = ""
    has_moved: bool = True
    is_changed: bool = False
    name_was_taken: bool = False


@dataclass(frozen=True, slots=True)
class _Step:
    """The move of one file: of a photo, or of a sidecar after it.

    Attributes:
        photo: the index of the correction.
    """

    photo: int
    plan: Plan
    move: Move


class Corrector:
    """Moves photos inside one output; used by one thread only, which holds the lock of undo.

    Args:
        output: the folder that has `cats/` and the others.
        history: of the output.
        reader: of the same history.
        run: of this process.
        sidecars: says which files belong to a photo.
    """

    def __init__(
        self, output: Path, history: History, reader: CorrectionsReader, run: Run, sidecars: SidecarNames
    ) -> None:
        self._output = Path(os.path.realpath(output))
        self._history, self._reader, self._run, self._sidecars = history, reader, run, sidecars
        inodes.look((self._output,))
        self._mover = Mover(self._output, sidecars)

    def correct(self, corrections: Sequence[Correction], others: Sequence[Judgement] = ()) -> list[Corrected]:
        """Move photos, each at most once, and record verdicts: theirs, and others that move nothing.

        Raises:
            StorageError: the history cannot be written, or a folder cannot be synced; the next start finds what was
                moved and records it.
        """
        results = self._batch(corrections, others)
        for _ in range(_TRIES - 1):
            again = [number for number, result in enumerate(results) if result.name_was_taken]
            if not again:
                break
            for number, result in zip(again, self._batch([corrections[n] for n in again]), strict=True):
                results[number] = result
        return results

    def _batch(self, corrections: Sequence[Correction], others: Sequence[Judgement] = ()) -> list[Corrected]:
        leaving: set[str] = set()  # the places of the photos before
        steps: list[_Step] = []
        for number, correction in sorted(enumerate(corrections), key=lambda item: item[1].folder):
            steps += self._steps(number, correction, leaving)
            leaving.add(correction.entry.place)
        tokens = {step.photo: step.plan.token for step in reversed(steps)}  # of the photos, which are first
        judgements = [
            replace(correction.judgement, token=tokens[number])
            for number, correction in enumerate(corrections)
            if correction.judgement is not None
        ]
        results: dict[int, Corrected] = {}
        done: list[Move] = []
        try:
            self._history.intend([step.move for step in steps], [*others, *judgements])
            arrived: set[str] = set()  # the folders that photos came into since the last sync
            try:
                for step in steps:
                    if os.path.dirname(step.plan.photo.name) in arrived:
                        # One sync cannot do for both: a photo must be durable in its new folder before its old one is.
                        self._mover.settle()
                        arrived.clear()
                    arrived.add(step.plan.folder)
                    correction, before = corrections[step.photo], results.get(step.photo)
                    if before is None:
                        results[step.photo] = self._move_photo(correction, step, done)
                    elif before.has_moved:
                        results[step.photo] = self._move_sidecar(before, step, done)
            finally:
                # As in sorting: what was moved is recorded, what was not is withdrawn, and what is unresolved stays an
                # intent for recovery at the next start.
                kept = {move.token for move in done}
                kept |= {step.plan.token for step in steps if self._mover.is_unresolved(step.plan)}
                self._mover.settle()
                self._history.settle(done, [step.move for step in steps if step.move.token not in kept])
        finally:
            for step in steps:
                self._mover.forget(step.plan)
        return [results[number] for number in range(len(corrections))]

    def _move_photo(self, correction: Correction, step: _Step, done: list[Move]) -> Corrected:
        try:
            self._mover.move(step.plan)
        # One folder may be full or away while the others are fine, so even then the next photo is tried.
        except (StayedError, StorageError) as error:
            return _stayed(correction.entry.destination, error)
        done.append(step.move)
        return Corrected(self._mover.path(step.plan))

    def _move_sidecar(self, photo: Corrected, step: _Step, done: list[Move]) -> Corrected:
        try:
            if os.path.lexists(self._mover.path(step.plan)):
                raise StayedError(f"cannot follow its photo: {self._mover.path(step.plan)} exists")
            self._mover.move(step.plan)
        except (StayedError, StorageError) as error:
            return replace(photo, problem=_stayed(step.plan.photo.path, error).problem)
        done.append(step.move)
        return photo

    def _steps(self, number: int, correction: Correction, leaving: set[str]) -> Iterator[_Step]:
        """The moves of a photo and of its sidecars."""
        entry = correction.entry
        inner, base = os.path.split(entry.place.partition("/")[2])
        former_name = ""
        if correction.former_name:
            inner, former_name = os.path.split(correction.former_name)
        folder = f"{correction.folder}/{inner}".rstrip("/")
        photo = Photo(self._output, entry.place, correction.identity, 0.0)
        sidecars = list(self._beside(entry, leaving))
        # A crash may have left one behind, in the folder to which the photo now returns.
        coming = [(sidecar, recorded) for sidecar, recorded in sidecars if os.path.dirname(sidecar.name) != folder]
        # Beside a sidecar a name counts as taken, but this photo had it there before.
        wanted = former_name or (base if coming != sidecars else "")
        plan = self._mover.plan(photo, folder, "" if os.path.lexists(self._output / folder / wanted) else wanted)
        kind = "corrected" if correction.takes_back is None else "reverted"
        yield _Step(number, plan, self._intent(correction, plan, kind, entry.id))
        for sidecar, recorded in coming:
            name = self._sidecars.renamed(os.path.basename(sidecar.name), base, plan.name)
            its_plan = self._mover.plan(sidecar, folder, name)
            corrects = None if recorded is None else recorded.id
            yield _Step(number, its_plan, self._intent(correction, its_plan, SIDECAR, corrects))

    def _beside(self, photo: Entry, leaving: set[str]) -> Iterator[tuple[Photo, Entry | None]]:
        """The sidecars of a photo, and their entries; what its owner's programs have put there since has none.

        One that several photos share goes with the one that it followed, or else with the last of them.
        """
        recorded = {sidecar.place: sidecar for sidecar in self._reader.sidecars(photo)}
        folder, base = os.path.split(photo.place)
        listing = self._mover.listing(folder)
        places = dict.fromkeys(recorded)
        for name in listing.sidecars(base):
            place = os.path.join(folder, name)
            others = [o for o in listing.photos(name) if o != base and os.path.join(folder, o) not in leaving]
            if place in recorded or not any(self._sidecars.fits_as_well(name, other, base) for other in others):
                places[place] = None
        for place in places:
            try:
                status = os.lstat(self._output / place)
            except OSError:  # its owner has removed it
                continue
            if stat.S_ISREG(status.st_mode):
                yield (
                    Photo(self._output, place, Identity.of(status), 0.0),
                    recorded.get(place) or self._reader.sidecar_at(place),
                )

    def _intent(self, correction: Correction, plan: Plan, kind: str, corrects: int | None) -> Move:
        return Move(
            token=plan.token,
            run=self._run.id,
            root=self._output,
            source=plan.photo.name,
            folder=correction.folder,
            name=f"{plan.folder}/{plan.name}".removeprefix(f"{correction.folder}/"),
            identity=plan.photo.identity,
            kind=kind,
            label=None if kind == SIDECAR else correction.label,
            target=self._output,  # never None, which would make it a sorter's move
            corrects=corrects,
            takes_back=None if kind == SIDECAR else correction.takes_back,
        )


def _stayed(path: str, error: StayedError | StorageError) -> Corrected:
    """The result for a file that was not moved."""
    if isinstance(error, StorageError):
        return Corrected(path, str(error), has_moved=False)
    if isinstance(error, TakenError):
        problem = f"{path} stays, because other files have taken its new name meanwhile: try again"
        return Corrected(path, problem, has_moved=False, name_was_taken=True)
    if isinstance(error, ChangedError):
        problem = f"{path} {error}: look at it again"
        return Corrected(path, problem, has_moved=False, is_changed=True)
    return Corrected(path, f"{path} {error}", has_moved=False)
