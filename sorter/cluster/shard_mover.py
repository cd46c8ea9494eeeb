"""Moves the objects of a shard by its decisions, and writes down what became of each.

In: a shard's decisions. Out: its `moves` file, and one of what failed or stayed. Whoever finds a shard that was begun
and not finished does all of it again: what is moved already stays where it is.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from sorter.cluster.object_mover import ObjectMover
from sorter.cluster.shards import Decided, JobFiles, MovedRow, Problem, is_shard_name
from sorter.inbox.sidecars import SidecarNames

TRANSFERS = 32
"""Objects that are moved at a time."""

PHOTOS = ("sorted", "unsure", "failed")
"""What decisions about photos that are to be moved are called."""

_BEGUN = "moving/"


class ShardMover:
    """Moves shards of one job. Any number of threads and processes may move the same shard at once.

    Args:
        files: the job's.
        mover: from the inbox to the output.
        sidecars: what names sidecars get.
    """

    def __init__(self, files: JobFiles, mover: ObjectMover, sidecars: SidecarNames) -> None:
        self._files, self._mover, self._sidecars = files, mover, sidecars
        self._pool = ThreadPoolExecutor(TRANSFERS, "move")
        self._counting = threading.Lock()
        self.moved = 0
        """Objects that were moved, or found to stay, since the start: a sign of life."""

    def move(self, name: str, decisions: Sequence[Decided]) -> list[MovedRow]:
        """Move what is to be moved: photos, and after them their sidecars.

        Raises:
            StoreError: the store does not answer; the shard is to be done again.
        """
        # An undo has to know where something may have been moved that no file says yet.
        self._files.store.put_new(f"{self._files.folder}{_BEGUN}{name}", b"")
        items = {item.key: item for item in self._files.read_shard(name)}
        rows: dict[str, MovedRow] = {}

        def move(decided: Decided) -> None:
            place = self._place(decided, rows)
            if place is None:
                rows[decided.key] = MovedRow(decided.key, "stayed", reason="its photo stays")
            else:
                moved = self._mover.move(items[decided.key], place, numbered=decided.follows is None)
                rows[decided.key] = MovedRow(decided.key, moved.kind, moved.key, moved.etag, moved.reason)
            with self._counting:
                self.moved += 1

        for kinds in (PHOTOS, ("sidecar",)):
            # The list raises what one of them failed with.
            list(self._pool.map(move, [decided for decided in decisions if decided.kind in kinds]))
        if bad := [replace(problem, etag=items[problem.key].etag) for problem in problems(decisions, rows)]:
            self._files.put_problems(name, bad)
        stayed = [MovedRow(d.key, "stayed", reason=d.detail) for d in decisions if d.key not in rows]
        found = sorted([*rows.values(), *stayed], key=lambda row: row.key.encode())
        self._files.put_moves(name, found)
        return found

    def close(self, *, wait: bool = False) -> None:
        """End the threads, at once or after the moves in hand; what is not moved then is for whoever comes next."""
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _place(self, decided: Decided, rows: dict[str, MovedRow]) -> str | None:
        """The key that an object should have: a sidecar is called as its photo was in the end."""
        assert decided.destination is not None, "only what is to be moved is asked about"
        if decided.follows is None:
            return decided.destination
        photo = rows[decided.follows]
        if photo.kind != "moved" or photo.destination is None:
            return None
        folder, slash, new = photo.destination.rpartition("/")
        sidecar, old = (key.rpartition("/")[2] for key in (decided.key, decided.follows))
        return folder + slash + self._sidecars.renamed(sidecar, old, new)


def problems(decisions: Sequence[Decided], rows: Mapping[str, MovedRow]) -> list[Problem]:
    """What failed or stays, and why.

    Args:
        decisions: of a shard.
        rows: what became of each object, by key; none before they are moved.
    """
    found: list[Problem] = []
    for decided in decisions:
        row = rows.get(decided.key)
        if row is not None and decided.destination is not None and row.kind != "moved":
            kind: Literal["changed", "left"] = "changed" if row.kind == "changed" else "left"
            found.append(Problem(decided.key, kind, row.reason or ""))
        elif decided.kind in ("left", "changed"):
            found.append(Problem(decided.key, decided.kind, decided.detail or ""))
        elif decided.kind == "failed":
            found.append(Problem(decided.key, "failed", ": ".join(filter(None, (decided.reason, decided.detail)))))
    return found


def half_moved(files: JobFiles) -> set[str]:
    """The shards of which something may have been moved that no file says."""
    folder = files.folder + _BEGUN
    begun = {name for item in files.store.list(folder) if is_shard_name(name := item.key.removeprefix(folder))}
    return begun - files.finished("moves") if begun else begun
