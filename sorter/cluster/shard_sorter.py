"""What a node does with a shard of an object store: fetch it, decide on it, write that down, move by what is written.

In: the name of a shard. Out: what became of its objects, in the job's files and as counts. Any number of nodes may work
on the same shard: the first decisions that were written are what all of them go by.
"""

import os
import queue
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from sorter.cluster.deciding import Decider
from sorter.cluster.families import families
from sorter.cluster.node import MAX_DEATHS, Place
from sorter.cluster.object_mover import ObjectMover
from sorter.cluster.scratch import Scratch
from sorter.cluster.shard_mover import PHOTOS, TRANSFERS, ShardMover, problems
from sorter.cluster.shards import Decided, JobFiles, MovedRow, Problem
from sorter.cluster.stores import Store, StoredObject
from sorter.decisions import Outcome
from sorter.errors import ChangedError, ObjectError, Reason
from sorter.files import FAILED
from sorter.files.photo import Identity, Photo
from sorter.inbox.sidecars import SidecarNames, is_photo
from sorter.settings import Settings

NAMED = 20
"""So many of the objects that stay are named by a command."""

_FINISHED_BEFORE = 3600.0  # an object is complete once it is listed: its copy must not look as if it just arrived


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a shard.

    Attributes:
        counts: objects by what became of them: a folder with a slash, or `sidecar`, `skipped`, `left`, `changed`.
        staying: the first of those that are left or were changed.
        halves: the shards that it was split into; it has no counts then.
    """

    counts: Counter[str] = field(default_factory=Counter)
    staying: tuple[Problem, ...] = ()
    halves: tuple[str, ...] = ()


class ShardSorter:
    """Sorts shards of one job, for any number of threads at once.

    Args:
        decider: of this machine.
        settings: those that the decider has.
        place: where the job is.
        inbox, output: the buckets.
    """

    def __init__(self, decider: Decider, settings: Settings, place: Place, inbox: Store, output: Store) -> None:
        self._decider, self._settings, self._place = decider, settings, place
        self._inbox = inbox
        self._files = JobFiles(output, place.folder)
        self._sidecars = SidecarNames(settings.sidecar_suffixes)
        self._objects = ObjectMover(
            output, place.mode, inbox, prefix=place.output_prefix, source_prefix=place.inbox_prefix
        )
        self._mover = ShardMover(self._files, self._objects, self._sidecars)
        self._scratch = Scratch()
        self._fetchers = ThreadPoolExecutor(TRANSFERS, "fetch")

    @property
    def moved(self) -> int:
        """Objects that were moved, or found to stay, since the start."""
        return self._mover.moved

    def sort(self, name: str) -> Result:
        """Decide on a shard, unless somebody has, and move its objects.

        Raises:
            StoreError: the store does not answer; the shard is to be done again.
        """
        decisions = self._files.read_decisions(name)
        if decisions is None:
            if self._files.deaths(name) < MAX_DEATHS:
                decisions = self._files.put_decisions(name, self._decide(self._files.read_shard(name)))
            elif halves := self._files.split(name, self._sidecars):
                return Result(halves=tuple(halves))
            else:
                decisions = self._files.put_decisions(name, self._blamed(self._files.read_shard(name)))
        if not decisions:  # it was split, by somebody who may have died before both halves were there
            return Result(halves=tuple(self._files.split(name, self._sidecars)))
        if self._place.decide_only:
            return self._result(decisions, {})
        return self._result(decisions, {row.key: row for row in self._mover.move(name, decisions)})

    def close(self) -> None:
        """End the threads and remove the scratch folder."""
        self._mover.close()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._scratch.close()

    def _result(self, decisions: Sequence[Decided], rows: dict[str, MovedRow]) -> Result:
        staying = [problem for problem in problems(decisions, rows) if problem.kind != "failed"]
        return Result(_counted(decisions, rows, self._place), tuple(staying[:NAMED]))

    def _decide(self, items: Sequence[StoredObject]) -> list[Decided]:
        """What is to become of each object, in the order of keys."""
        follows = self._followers(items)
        rows = {key: Decided(key, "sidecar", follows=photo) for key, photo in follows.items()}
        wanted: list[StoredObject] = []
        for item in items:
            if item.key not in rows:
                if (row := self._unfetched(item)) is not None:
                    rows[item.key] = row
                else:
                    wanted.append(item)
        decided = {row.key: row for row in self._fetch_and_decide(wanted)}
        rows |= decided
        for key, photo in follows.items():
            rows[key] = self._following(rows[key], rows.get(photo))
        return [rows[item.key] for item in items]

    def _unfetched(self, item: StoredObject) -> Decided | None:
        """What an object is that need not be fetched for that; None if it has to be."""
        limit = self._settings.max_megabytes
        if item.is_archived:
            return Decided(item.key, "left", detail=f"its storage class is {item.storage_class}: restore it first")
        if item.size <= limit * 1e6:
            return None
        detail = f"{item.size / 1e6:.0f} MB; the limit is {limit:g} MB"
        if not is_photo(item.key):
            return Decided(item.key, "skipped", detail=f"not a photo's name, and {detail}")
        return self._failed(item.key, Reason.TOO_LARGE, detail)

    def _failed(self, key: str, reason: Reason, detail: str) -> Decided:
        return Decided(key, "failed", self._destination(key, FAILED), reason=str(reason), detail=detail)

    def _blamed(self, items: Sequence[StoredObject]) -> list[Decided]:
        """Of a photo, with its sidecars, that killed every node that worked on it."""
        follows, detail = self._followers(items), f"{MAX_DEATHS} nodes died while they worked on it"
        rows = {i.key: self._failed(i.key, Reason.DECODER_CRASH, detail) for i in items if i.key not in follows}
        for key, photo in follows.items():
            rows[key] = self._following(Decided(key, "sidecar", follows=photo), rows[photo])
        return [rows[item.key] for item in items]

    def _destination(self, key: str, folder: str) -> str:
        return f"{self._place.output_prefix}{folder}/{key.removeprefix(self._place.inbox_prefix)}"

    def _followers(self, items: Sequence[StoredObject]) -> dict[str, str]:
        """The sidecars among the objects, and the photo of each, by key; the last of those that fit equally well."""
        found: dict[str, str] = {}
        for family in families(items, self._sidecars):
            names = {item.key: item.key.rpartition("/")[2] for item in family}
            photos = [key for key, name in names.items() if is_photo(name)]
            for key, name in names.items():
                ranks = {photo: self._sidecars.rank(name, names[photo]) for photo in photos if photo != key}
                fitting = [(rank, photo) for photo, rank in ranks.items() if rank is not None]
                if fitting and self._sidecars.is_sidecar(name):
                    best = min(rank for rank, _ in fitting)
                    found[key] = max(photo for rank, photo in fitting if rank == best)
        return found

    def _following(self, row: Decided, photo: Decided | None) -> Decided:
        if photo is None or photo.destination is None:
            return Decided(row.key, "skipped", detail="its photo stays")
        folder = photo.destination.rpartition("/")[0]
        return replace(row, destination=_joined(folder, row.key.rpartition("/")[2]))

    def _fetch_and_decide(self, items: Sequence[StoredObject]) -> list[Decided]:
        rows: list[Decided] = []
        by_path: dict[str, StoredObject] = {}

        def tell(outcome: Outcome) -> None:
            item = by_path.pop(outcome.photo.path)
            os.unlink(outcome.photo.path)
            self._scratch.release(item.size)
            rows.append(self._row(item, outcome))

        def fetched() -> Iterator[Photo]:
            ready: queue.SimpleQueue[tuple[StoredObject, Photo | ObjectError | BaseException]] = queue.SimpleQueue()
            for item in items:
                self._fetchers.submit(lambda item: ready.put((item, self._fetch(item))), item)
            for _ in items:
                item, photo = ready.get()
                if isinstance(photo, Photo):
                    by_path[photo.path] = item
                    yield photo
                elif isinstance(photo, ChangedError):
                    rows.append(Decided(item.key, "changed", detail=str(photo)))
                elif isinstance(photo, ObjectError):
                    rows.append(Decided(item.key, "left", detail=str(photo)))
                else:
                    raise photo

        self._decider.decide(fetched(), tell)
        return rows

    def _fetch(self, item: StoredObject) -> Photo | BaseException:
        """A copy of an object on this machine; whatever went wrong, if that did."""
        name = self._scratch.new_name(os.path.splitext(item.key.rpartition("/")[2])[1][:20])
        path = self._scratch.folder / name
        self._scratch.reserve(item.size)
        try:
            self._objects.insist(lambda: self._inbox.download(item, path))
            past = time.time() - _FINISHED_BEFORE
            os.utime(path, (past, past))
            return Photo(self._scratch.folder, name, Identity.of(os.stat(path)), past)
        except BaseException as error:
            path.unlink(missing_ok=True)
            self._scratch.release(item.size)
            return error

    def _row(self, item: StoredObject, outcome: Outcome) -> Decided:
        decision = outcome.decision
        if decision is None:
            return Decided(item.key, "skipped" if outcome.kind == "skipped" else "left", detail=outcome.detail or None)
        reason = decision.decoded.reason
        return Decided(
            item.key,
            decision.kind,
            self._destination(item.key, decision.folder),
            decision.label,
            decision.confidence,
            reason=None if reason is None else str(reason),
            detail=decision.detail or decision.decoded.detail or None,
        )


def _joined(folder: str, base: str) -> str:
    return f"{folder}/{base}" if folder else base


def _counted(decisions: Iterable[Decided], moves: dict[str, MovedRow], place: Place) -> Counter[str]:
    """Objects by what became of them, or is to."""
    counts: Counter[str] = Counter()
    for decided in decisions:
        row = moves.get(decided.key)
        if row is not None and decided.destination is not None and row.kind != "moved":
            counts["changed" if row.kind == "changed" else "left"] += 1  # so is a sidecar that stays with its photo
        elif decided.kind in PHOTOS and decided.destination is not None:
            counts[decided.destination.removeprefix(place.output_prefix).partition("/")[0] + "/"] += 1
        else:
            counts[decided.kind] += 1
    return counts
