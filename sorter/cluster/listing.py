"""List an inbox into shards, with little memory, so that each object is in exactly one of them.

In: a store with photos, and a job's files. Out: new shards. A second run adds what the first did not see.

Shards are numbered like the entries of a log: who writes number n has read all before it, and left out what is in them.
Of two that list at the same time, one gets each number, and the other takes out what that one wrote before it goes on.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, islice

import numpy as np
import numpy.typing as npt

from sorter.cluster.families import families
from sorter.cluster.shards import READERS, JobFiles
from sorter.cluster.stores import Store, StoredObject
from sorter.errors import StoreError
from sorter.inbox.sidecars import SidecarNames, is_photo

SHARD_ROWS = 1_000
"""A shard has a little more where a photo and its sidecars would fall apart."""

AHEAD_ROWS = 2 * SHARD_ROWS
"""So many rows are looked at for what belongs together: names of sidecars come soon after or before their photos'."""


def list_new(
    store: Store, prefix: str, files: JobFiles, wanted: Callable[[str], bool], sidecars: SidecarNames
) -> tuple[int, int]:
    """Write the objects below a prefix that no shard of the job has into new shards.

    Known is what has the same key, ETag and time; and what an undo of this job put back, until its content changes. A
    sidecar that is known, and that no unfinished shard may still move, is written once more with a photo that is new.

    Args:
        store: the bucket of the inbox.
        prefix: of the inbox, empty or with a slash at its end.
        files: the job's.
        wanted: whether an object is looked at, by its key without the prefix: not those in the output, not hidden ones.
        sidecars: which sidecar belongs to which photo. Both are in the same shard.

    Returns:
        How many objects and how many shards were added.

    Raises:
        StoreError: the store does not answer, or lists keys out of order, as directory buckets do.
    """
    names = [name for name in files.shards() if "-" not in name]  # the halves of a shard have what it has
    known = _Known(files, names)

    def is_candidate(item: StoredObject) -> bool:
        if item in known and not (sidecars.is_sidecar(item.key.rpartition("/")[2]) and known.may_follow(item)):
            return False
        return wanted(item.key.removeprefix(prefix))

    candidates = filter(is_candidate, _in_order(store.list(prefix)))
    number = int(names[-1]) + 1 if names else 0
    objects = shards = 0
    waiting: list[StoredObject] = []
    while True:
        waiting += islice(candidates, AHEAD_ROWS - len(waiting))
        if not waiting:
            return objects, shards
        rows, rest = _first(families(waiting, sidecars), known)
        if not rows:
            waiting = rest
            continue
        if files.put_shard(f"{number:05}", rows):
            objects, shards, waiting = objects + len(rows), shards + 1, rest
        else:
            known.add(files.read_shard(f"{number:05}"))
            waiting = [*filter(is_candidate, waiting)]
        number += 1


def _first(together: list[list[StoredObject]], known: "_Known") -> tuple[list[StoredObject], list[StoredObject]]:
    """The rows of a shard, which may be none, and those that remain, both in the order of keys."""
    ends = accumulate(len(family) for family in together)
    count = next((count for count, end in enumerate(ends, 1) if end >= SHARD_ROWS), len(together))
    rest = sorted(chain(*together[count:]), key=lambda row: row.key)
    return sorted(chain(*(_news(family, known) for family in together[:count])), key=lambda row: row.key), rest


def _news(family: list[StoredObject], known: "_Known") -> list[StoredObject]:
    """Of a family all, if it has a new photo; otherwise what is new."""
    fresh = [item for item in family if item not in known]
    return family if any(is_photo(item.key) for item in fresh) else fresh


def _in_order(listed: Iterator[StoredObject]) -> Iterator[StoredObject]:
    before = ""
    for item in listed:
        if item.key < before:
            raise StoreError(f"The store lists {item.key!r} after {before!r}: use a bucket whose keys are in order")
        before = item.key
        yield item


class _Known:
    """What is in a job's shards, in 8 bytes for each object, and what its undo put back."""

    def __init__(self, files: JobFiles, names: list[str]) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            parts = [*pool.map(lambda name: np.array([*map(_digest, files.read_shard(name))], np.uint64), names)]
        # The halves of a shard are finished after it.
        finished, halves = files.finished("moves"), (name for name in files.shards() if "-" in name)
        unfinished = {name.partition("-")[0] for name in (*names, *halves) if name not in finished}
        self._digests = _sorted(parts)
        self._unfinished = _sorted([part for name, part in zip(names, parts, strict=True) if name in unfinished])
        self._added: set[int] = set()
        self._restored: set[tuple[str, str | None]] = set()
        for undos in files.undos().values():
            for row in files.read_undos(undos).values():
                if row.destination is not None:  # also what could not be deleted where it came from, and is there twice
                    self._restored.add((row.destination, row.etag))

    def add(self, items: Iterable[StoredObject]) -> None:
        self._added.update(map(_digest, items))

    def __contains__(self, item: StoredObject) -> bool:
        digest = _digest(item)
        return _has(self._digests, digest) or digest in self._added or (item.key, item.etag) in self._restored

    def may_follow(self, item: StoredObject) -> bool:
        """Whether nobody moves this object any more but with another photo."""
        digest = _digest(item)
        return not _has(self._unfinished, digest) and digest not in self._added


def _sorted(parts: list[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _has(digests: npt.NDArray[np.uint64], digest: int) -> bool:
    place = int(np.searchsorted(digests, np.uint64(digest)))
    return place < len(digests) and int(digests[place]) == digest


def _digest(item: StoredObject) -> int:
    version = f"{item.key}\n{item.etag}\n{item.modified.timestamp():.0f}"
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest())
