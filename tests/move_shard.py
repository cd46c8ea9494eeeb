"""Run as a program: a node without a model, which decides on a shard's objects at random and moves them.

Arguments: the URL of the bucket, the job's folder in it, the mode, the shard, and how many threads; or `undo` for
these, to take the job back instead.
"""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

from sorter.cluster.job import Job
from sorter.cluster.object_mover import ObjectMover
from sorter.cluster.shards import Decided, JobFiles, MovedRow
from sorter.cluster.stores import StoredObject, open_store
from sorter.cluster.taking_back import take_back
from sorter.inbox.sidecars import SidecarNames

url, folder, mode, shard, threads = sys.argv[1:]
store, _ = open_store(url)
files = JobFiles(store, folder)
if threads == "undo":
    job = Job(folder.rstrip("/").rpartition("/")[2], store, "in/", store, "")
    list(take_back(job, mode, SidecarNames()))  # type: ignore[arg-type]
elif files.read_moves(shard) is None:
    items = {item.key: item for item in files.read_shard(shard)}
    # Two processors may disagree about a photo; what was written first counts.
    guesses = [Decided(key, "sorted", f"{random.choice(['cats', 'dogs'])}/{key.partition('/')[2]}") for key in items]
    decisions = files.put_decisions(shard, guesses)
    mover = ObjectMover(store, mode)  # type: ignore[arg-type]

    def moved(decided: Decided) -> MovedRow:
        item: StoredObject = items[decided.key]
        done = mover.move(item, str(decided.destination))
        return MovedRow(item.key, done.kind, done.key, done.etag, done.reason)

    with ThreadPoolExecutor(int(threads)) as pool:
        files.put_moves(shard, list(pool.map(moved, decisions)))
print("finished")
