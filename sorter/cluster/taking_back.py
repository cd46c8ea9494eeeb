"""`sorter cluster undo`: brings the objects of a job back under the keys that they had.

In: what the job's files say was moved. Out: for each object, whether it is back, or why it stayed; written down as the
moves were, so that whoever is killed goes on, and a second undo does nothing.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

from sorter.cluster import shard_mover
from sorter.cluster.job import Job
from sorter.cluster.object_mover import Moved, ObjectMover
from sorter.cluster.shard_mover import TRANSFERS, ShardMover
from sorter.cluster.shards import MovedRow
from sorter.cluster.stores import Mode, StoredObject
from sorter.inbox.sidecars import SidecarNames


def take_back(job: Job, mode: Mode, sidecars: SidecarNames) -> Iterator[list[MovedRow]]:
    """Bring everything back, a shard at a time; yields what became of each object that the job has moved.

    A shard of which only a part was moved is finished first, because no file says which part that is.

    Args:
        job: nobody else works on it.
        mode: what both buckets were found to do.
        sidecars: what names sidecars have.

    Raises:
        StoreError: the store does not answer; the same command goes on.
    """
    files, mover = job.files, ObjectMover(job.output, mode, job.inbox)
    for name in sorted(shard_mover.begun(files) - files.finished("moves")):
        with closing(ShardMover(files, mover, sidecars)) as unfinished:
            unfinished.move(name, files.read_decisions(name) or [])
    with ThreadPoolExecutor(TRANSFERS, "undo") as pool:
        for name in sorted(files.finished("moves") - files.finished("undo")):
            moved = [row for row in files.read_moves(name) or [] if row.kind == "moved"]
            items = {item.key: item for item in files.read_shard(name)} if moved else {}
            rows = list(pool.map(partial(_take_back, mover, items), moved))
            files.put_moves(name, rows, "undo")
            yield rows


def _take_back(mover: ObjectMover, items: Mapping[str, StoredObject], row: MovedRow) -> MovedRow:
    """What became of one object: its `key` is where it was sorted to, its `destination` where it is back."""
    assert row.destination is not None, "it was moved"
    back = mover.move_back(items[row.key], Moved("moved", row.destination, row.etag))
    return MovedRow(row.destination, back.kind, back.key, back.etag, back.reason)
