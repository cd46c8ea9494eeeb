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

from sorter.cluster.families import families
from sorter.cluster.shards import READERS, JobFiles
from sorter.cluster.stores import Store, StoredObject
from sorter.errors import StoreError
from sorter.inbox.sidecars import SidecarNames

SHARD_ROWS = 1_000
"""A shard has a little more where a photo and its sidecars would fall apart."""

AHEAD_ROWS = 2 * SHARD_ROWS
"""So many rows are looked at for what belongs together: names of sidecars come soon after or before their photos'."""


def list_new(
    store: Store, prefix: str, files: JobFiles, wanted: Callable[[str], bool], sidecars: SidecarNames
) -> tuple[int, int]:
    """Write the objects below a prefix that no shard of the job has into new shards.

    Known is what has the same key, ETag and time; and what an undo of this job put back, until its content changes.

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
    listed = _in_order(store.list(prefix))
    fresh = (item for item in listed if item not in known and wanted(item.key.removeprefix(prefix)))
    number = int(names[-1]) + 1 if names else 0
    objects = shards = 0
    waiting: list[StoredObject] = []
    while True:
        waiting += islice(fresh, AHEAD_ROWS - len(waiting))
        if not waiting:
            return objects, shards
        rows, rest = _first(families(waiting, sidecars))
        if files.put_shard(f"{number:05}", rows):
            objects, shards, waiting = objects + len(rows), shards + 1, rest
        else:
            known.add(files.read_shard(f"{number:05}"))
            waiting = [item for item in waiting if item not in known]
        number += 1


def _first(together: list[list[StoredObject]]) -> tuple[list[StoredObject], list[StoredObject]]:
    """The rows of a shard, and those that remain, both in the order of keys."""
    ends = accumulate(len(family) for family in together)
    count = next((count for count, end in enumerate(ends, 1) if end >= SHARD_ROWS), len(together))
    first, rest = (sorted(chain(*part), key=lambda row: row.key) for part in (together[:count], together[count:]))
    return first, rest


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
        self._digests = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
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
        place = int(np.searchsorted(self._digests, np.uint64(digest)))
        is_listed = place < len(self._digests) and int(self._digests[place]) == digest
        return is_listed or digest in self._added or (item.key, item.etag) in self._restored


def _digest(item: StoredObject) -> int:
    version = f"{item.key}\n{item.etag}\n{item.modified.timestamp():.0f}"
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest())
