"""`sorter cluster undo`: brings the objects of a job back under the keys that they had.

In: what the job's files say was moved. Out: for each object, whether it is back, or why it stayed; written down as the
moves were, so that whoever is killed goes on, and a second undo tries only what stayed.
"""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from sorter.cluster import shard_mover
from sorter.cluster.job import Job
from sorter.cluster.object_mover import Moved, ObjectMover
from sorter.cluster.shard_mover import TRANSFERS, ShardMover
from sorter.cluster.shards import JobFiles, MovedRow
from sorter.cluster.stores import Mode
from sorter.inbox.sidecars import SidecarNames


def take_back(job: Job, mode: Mode, sidecars: SidecarNames) -> Iterator[list[MovedRow]]:
    """Bring back what is not back yet, a shard at a time; yields what became of each of these objects.

    A shard of which only a part was moved is finished first, because no file says which part that is.

    Args:
        job: nobody else works on it.
        mode: what both buckets were found to do.
        sidecars: what names sidecars have.

    Raises:
        StoreError: the store does not answer; the same command goes on.
    """
    files = job.files
    mover = ObjectMover(job.output, mode, job.inbox, prefix=job.output_prefix, source_prefix=job.inbox_prefix)
    for name in sorted(shard_mover.begun(files) - files.finished("moves")):
        with closing(ShardMover(files, mover, sidecars)) as unfinished:
            unfinished.move(name, files.read_decisions(name) or [])
    undos = files.undos()
    with ThreadPoolExecutor(TRANSFERS, "undo") as pool:
        for name in sorted(files.finished("moves") - files.finished("undo")):
            earlier = files.read_undos(undos.get(name, ())).values()
            restored = {row.key for row in earlier if row.kind == "moved"}
            rows = _take_back(files, mover, name, restored, pool)
            files.put_undo(name, rows)
            yield rows


def _take_back(
    files: JobFiles, mover: ObjectMover, name: str, restored: Collection[str], pool: ThreadPoolExecutor
) -> list[MovedRow]:
    """What became of the objects of a shard: `key` is where one was sorted to, `destination` where it is back.

    A sidecar stays with a photo that stays.
    """
    moved = [row for row in files.read_moves(name) or [] if row.kind == "moved" and row.destination not in restored]
    if not moved:
        return []
    items = {item.key: item for item in files.read_shard(name)}
    follows = {decided.key: decided.follows for decided in files.read_decisions(name) or []}
    stayed: set[str] = set()  # photos, by the keys that they had in the inbox

    def back(row: MovedRow) -> MovedRow:
        assert row.destination is not None, "it was moved"
        if follows[row.key] in stayed:
            return MovedRow(row.destination, "stayed", reason="its photo stays too")
        there = mover.move_back(items[row.key], Moved("moved", row.destination, row.etag))
        if there.kind != "moved":
            stayed.add(row.key)
        return MovedRow(row.destination, there.kind, there.key, there.etag, there.reason)

    photos = [row for row in moved if follows[row.key] is None]
    followers = [row for row in moved if follows[row.key] is not None]
    return [*pool.map(back, photos), *pool.map(back, followers)]
