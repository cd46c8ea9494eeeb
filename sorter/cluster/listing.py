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


_UNFINISHED = 1  # the bit of a digest that says that a shard may still move the object


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
    known = _Known(files)

    def is_candidate(item: StoredObject) -> bool:
        if item in known and not (sidecars.is_sidecar(item.key.rpartition("/")[2]) and known.may_follow(item)):
            return False
        return wanted(item.key.removeprefix(prefix))

    candidates = filter(is_candidate, _in_order(store.list(prefix)))
    number = known.next_shard
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
    """What is in a job's shards, in 8 bytes for each object, and what its undo put back.

    Attributes:
        next_shard: the number of the first one that does not exist.
    """

    def __init__(self, files: JobFiles) -> None:
        finished = files.finished("moves")  # before its halves, which are finished after it
        names = files.shards()
        unfinished = {name.partition("-")[0] for name in names if name not in finished}

        def digests(name: str) -> npt.NDArray[np.uint64]:
            found = np.array([*map(_digest, files.read_shard(name))], np.uint64)
            return found | np.uint64(_UNFINISHED if name in unfinished else 0)

        whole = [name for name in names if "-" not in name]  # the halves of a shard have what it has
        with ThreadPoolExecutor(READERS) as pool:
            parts = [*pool.map(digests, whole)]
        self.next_shard = int(whole[-1]) + 1 if whole else 0
        self._digests = np.concatenate(parts) if parts else np.empty(0, np.uint64)
        self._digests.sort()
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
        is_listed = self._first_from(digest) in (digest, digest | _UNFINISHED)
        return is_listed or digest in self._added or (item.key, item.etag) in self._restored

    def may_follow(self, item: StoredObject) -> bool:
        """Whether nobody moves this object any more but with another photo."""
        digest = _digest(item)
        return self._first_from(digest | _UNFINISHED) != digest | _UNFINISHED and digest not in self._added

    def _first_from(self, digest: int) -> int | None:
        """The lowest digest that is not below this one."""
        place = int(np.searchsorted(self._digests, np.uint64(digest)))
        return int(self._digests[place]) if place < len(self._digests) else None


def _digest(item: StoredObject) -> int:
    """What tells versions of objects apart; the last bit is free."""
    version = f"{item.key}\n{item.etag}\n{item.modified.timestamp():.0f}"
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest()) & ~_UNFINISHED
