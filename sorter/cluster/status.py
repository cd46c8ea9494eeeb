"""How far a job is, how fast, and for how long still: from the names and times of its files, and what an undo wrote.

In: a job's folder. Out: a `Status`. It reads no photo and asks no node, so it can be had from anywhere, at any time.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sorter.cluster import lease
from sorter.cluster.job import Job
from sorter.cluster.lease import Holder
from sorter.cluster.shards import READERS

_RECENT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Status:
    """A job's state, in shards of about 1,000 objects.

    Attributes:
        shards: that were listed; the halves of one that was split count, and so does that one.
        decided: of which it is known what belongs where.
        moved: that are finished.
        undone: that were taken back, also those of which some objects could not be.
        half_undone: of which an undo has brought back a part.
        restored: objects of these that are back.
        stayed: objects of these that could not be brought back.
        problems: objects of finished shards that were `failed`, `left` or `changed`, as this was found.
        per_second: shards that were finished per second lately; 0 if none was.
        holder: who works on it.
    """

    shards: int
    decided: int
    moved: int
    undone: int
    half_undone: int
    restored: int
    stayed: int
    problems: Counter[str]
    per_second: float
    holder: Holder

    @property
    def is_undone(self) -> bool:
        """Whether all that the job has listed was taken back, as far as that was possible."""
        return 0 < self.shards == self.moved == self.undone and not self.half_undone

    @property
    def seconds_left(self) -> float | None:
        """How long it still takes at this rate; None if that cannot be told."""
        return (self.shards - self.moved) / self.per_second if self.per_second else None


def read(job: Job) -> Status:
    """Read a job's state.

    Raises:
        StoreError: the store does not answer.
    """
    files, now = job.files, time.time()
    times = [moment.timestamp() for moment in files.written("moves").values()]
    recent = sorted(moment for moment in times if moment > now - _RECENT_SECONDS)
    # From the first of them to now, because a job may have begun, or stood still, in between.
    per_second = (len(recent) - 1) / max(now - recent[0], 1.0) if len(recent) > 1 else 0.0
    undos = files.undos()
    with ThreadPoolExecutor(READERS) as pool:
        kinds = [row.kind for rows in pool.map(files.read_undos, undos.values()) for row in rows.values()]
    restored = kinds.count("moved")
    return Status(
        shards=sum(1 for _ in files.shards()),
        decided=len(files.finished("decisions")),
        moved=len(times),
        undone=len(undos),
        half_undone=len(files.half_undone()),
        restored=restored,
        stayed=len(kinds) - restored,
        problems=Counter(row.kind for rows in files.problems() for row in rows),
        per_second=per_second,
        holder=lease.holder(job.output, job.folder),
    )
