"""List an inbox into shards, in constant memory, so that each object is in exactly one of them.

In: a store with photos, and a job's files. Out: new shards. A second run adds what the first did not see.
"""

from collections.abc import Callable

from sorter.cluster.shards import JobFiles
from sorter.cluster.stores import Store
from sorter.inbox.sidecars import SidecarNames

SHARD_ROWS = 1_000
"""A shard has a little more where a photo and its sidecars would fall apart."""


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
        sidecars: which sidecar belongs to which photo. Both are always in the same shard.

    Returns:
        How many objects and how many shards were added.
    """
    raise NotImplementedError
