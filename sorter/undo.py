"""Bringing photos back: the mover and the history, the other way round.

In: `Entry`s of the history. Out: for each, where it is again, or why it stayed. The promises are those of sorting: the
intent is durable before a photo is touched, nothing is ever replaced, and after a crash a photo has exactly one name.
It works beside a sorter, which leaves alone what was put back.
"""

import itertools
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sorter.atomic import StayedError, make_folder, new_token
from sorter.companions import companions
from sorter.decisions import COMPANION
from sorter.history import History, Move
from sorter.inbox import Identity, Photo, opened_folder
from sorter.mover import Mover
from sorter.past import Entry
from sorter.recovery import COARSE_NS, Plan

_BATCH = 100
_TAKEN = "another file has its old name"


@dataclass(frozen=True, slots=True)
class Undone:
    """What became of one photo that was to go back.

    Attributes:
        problem: why it stayed where it is; empty if it is back.
    """

    entry: Entry
    problem: str = ""


def check(entry: Entry) -> Identity:
    """Make sure that a photo can go back; changes nothing.

    Returns:
        What it is now.

    Raises:
        StayedError: it cannot, and why.
    """
    folder, base = os.path.split(entry.destination)
    try:
        with opened_folder(Path(folder), "") as descriptor:
            status = os.stat(base, dir_fd=descriptor, follow_symlinks=False)
    except OSError:
        raise StayedError("it is not there any more") from None
    # What is written about a photo changes as its owner edits that, and goes back as it is.
    alike = entry.kind == COMPANION or (
        status.st_size == entry.size and abs(status.st_mtime_ns - entry.mtime_ns) <= COARSE_NS
    )
    if not stat.S_ISREG(status.st_mode) or not alike:
        raise StayedError("it was changed or replaced since it was sorted")
    if not os.path.isdir(entry.root):
        raise StayedError(f"the folder it came from, {entry.root}, is gone")
    if os.path.lexists(entry.source):
        raise StayedError(_TAKEN)
    return Identity.of(status)


class Undo:
    """Brings photos back; used by one thread.

    Args:
        output: the folder that they were sorted into.
        history: its history.
        run: the id that the history has this process under.
        stopping: ends it after the batch in hand.
    """

    def __init__(self, output: Path, history: History, run: str, stopping: threading.Event) -> None:
        self._output, self._history, self._run, self._stopping = output.absolute(), history, run, stopping
        self._movers: dict[str, Mover] = {}  # by the folder that photos go back to
        self._stayed: set[str] = set()  # the names of companions whose photos could not go back

    def bring_back(self, entries: Iterable[Entry]) -> Iterator[Undone]:
        """Bring photos back, a batch and its fsyncs at a time.

        Raises:
            StorageError: nothing more can be moved; what was moved is recorded.
        """
        left = iter(entries)
        while not self._stopping.is_set() and (batch := list(itertools.islice(left, _BATCH))):
            yield from self._batch(batch)

    def _batch(self, entries: Sequence[Entry]) -> list[Undone]:
        results: list[Undone] = []
        planned: list[tuple[Entry, Plan, Move]] = []
        for entry in entries:
            try:
                self._check_photo(entry)
                plan = self._plan(entry, check(entry))
            except StayedError as error:
                results.append(self._stays(entry, str(error)))
            else:
                planned.append((entry, plan, self._intent(entry, plan)))
        if not planned:
            return results
        self._history.intend([move for _, _, move in planned])
        done: list[Move] = []
        try:
            for entry, plan, move in planned:
                try:
                    self._check_photo(entry)
                    self._move(entry, plan)
                except StayedError as error:
                    results.append(self._stays(entry, _TAKEN if os.path.lexists(entry.source) else str(error)))
                else:
                    done.append(move)
                    results.append(Undone(entry))
        finally:
            unclear = [m for e, plan, m in planned if self._movers[e.root].is_unresolved(plan)]
            for root in {entry.root for entry, _, _ in planned}:
                self._movers[root].settle()
            self._history.settle(done, [m for _, _, m in planned if m not in done and m not in unclear])
        return results

    def _check_photo(self, entry: Entry) -> None:
        if entry.kind == COMPANION and entry.destination in self._stayed:
            raise StayedError("its photo stays too")

    def _stays(self, entry: Entry, problem: str) -> Undone:
        folder, base = os.path.split(entry.destination)
        if entry.kind != COMPANION:
            self._stayed.update(os.path.join(folder, name) for name in companions(base))
        return Undone(entry, problem)

    def _plan(self, entry: Entry, identity: Identity) -> Plan:
        self._movers.setdefault(entry.root, Mover(Path(entry.root)))
        folder, base = os.path.split(entry.name)
        photo = Photo(self._output, os.path.relpath(entry.destination, self._output), identity, 0.0)
        return Plan(photo, folder, base, new_token())

    def _move(self, entry: Entry, plan: Plan) -> None:
        try:
            make_folder(Path(entry.root, plan.folder))  # a subfolder that was taken away when it was empty
        except OSError as error:
            raise StayedError(f"its folder cannot be made ({error.strerror})") from None
        self._movers[entry.root].move(plan)

    def _intent(self, entry: Entry, plan: Plan) -> Move:
        return Move(
            token=plan.token,
            run=self._run,
            root=self._output,
            source=plan.photo.name,
            folder="",
            name=entry.name,
            identity=plan.photo.identity,
            kind="undone",
            label=entry.label,
            confidence=entry.confidence,
            target=Path(entry.root),
            undoes=entry.id,
        )
