"""`sorter cluster undo`: brings the objects of a job back under the keys that they had.

In: what the job's files say was moved. Out: for each object, whether it is back, or why it stayed; written down as the
moves were, so that whoever is killed goes on, and a second undo tries only what stayed.
"""

from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from sorter.cluster import shard_mover
from sorter.cluster.job import Job
from sorter.cluster.object_mover import Moved, ObjectMover
from sorter.cluster.shard_mover import TRANSFERS, ShardMover
from sorter.cluster.shards import JobFiles, MovedRow
from sorter.cluster.stores import Mode
from sorter.inbox.sidecars import SidecarNames


def take_back(
    job: Job, mode: Mode, sidecars: SidecarNames, stopping: Callable[[], bool] = lambda: False
) -> Generator[MovedRow, None, None]:
    """Bring back what is not back yet, a shard at a time; yields what became of each of these objects.

    A shard of which only a part was moved is finished first, because no file says which part that is. For the same
    reason one of which only a part is back keeps the job from being run, until another undo has finished it.

    Args:
        job: nobody else works on it.
        mode: what both buckets were found to do.
        sidecars: what names sidecars have, by the settings of the job.
        stopping: says whether to end after the objects in hand; once it does, it has to go on doing so.

    Raises:
        StoreError: the store does not answer; the same command goes on.
    """
    files = job.files
    mover = ObjectMover(job.output, mode, job.inbox, prefix=job.output_prefix, source_prefix=job.inbox_prefix)
    for name in sorted(shard_mover.half_moved(files)):
        if stopping():
            return
        unfinished = ShardMover(files, mover, sidecars)
        try:
            unfinished.move(name, files.read_decisions(name) or [])
        finally:
            unfinished.close(wait=True)
    undos = files.undos()
    with ThreadPoolExecutor(TRANSFERS, "undo") as pool:
        for name in sorted(files.finished("moves") - files.finished("undo")):
            earlier = files.read_undos(undos.get(name, ())).values()
            restored = {row.key for row in earlier if row.kind == "moved"}
            # Also what was left because it could not be deleted once it was copied: it is there twice.
            sorted_ = [row for row in files.read_moves(name) or [] if row.destination is not None]
            there = [row for row in sorted_ if row.destination not in restored]
            if stopping():
                return
            if there:
                files.begin_undo(name, len(undos.get(name, ())) + 1)
            rows: list[MovedRow | None] = []
            with closing(_take_back(files, mover, name, there, stopping, pool)) as taken_back:
                for row in taken_back:
                    rows.append(row)
                    if row is not None:
                        yield row
            if None in rows:
                return
            files.put_undo(name, [row for row in rows if row is not None])


def _take_back(
    files: JobFiles,
    mover: ObjectMover,
    name: str,
    there: Collection[MovedRow],
    stopping: Callable[[], bool],
    pool: ThreadPoolExecutor,
) -> Generator[MovedRow | None, None, None]:
    """What became of objects of a shard: `key` is where one was sorted to, `destination` where it is back.

    A sidecar stays with a photo that stays. None is for an object that was not tried any more.
    """
    items = {item.key: item for item in files.read_shard(name)}
    follows = {decided.key: decided.follows for decided in files.read_decisions(name) or []}
    stayed: set[str] = set()  # photos, by the keys that they had in the inbox

    def back(row: MovedRow) -> MovedRow | None:
        if stopping():
            return None
        assert row.destination is not None, "it was moved, or copied"
        if follows[row.key] in stayed:
            return MovedRow(row.destination, "stayed", reason="its photo stays too")
        restore = mover.move_back if row.kind == "moved" else mover.move_back_copied
        found = restore(items[row.key], Moved("moved", row.destination, row.etag))
        if found.kind != "moved":
            stayed.add(row.key)
        return MovedRow(row.destination, found.kind, found.key, found.etag, found.reason)

    yield from pool.map(back, [row for row in there if follows[row.key] is None])
    yield from pool.map(back, [row for row in there if follows[row.key] is not None])
