"""Which commands may work at the same time: one on a job, and none beside it that would be in its way.

In: a job, and what is to be done with it. Out: its lease, or a sentence that says what is in the way.
"""

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import sorter
from sorter.cluster import lease, shard_mover
from sorter.cluster.job import DESCRIPTION, Job, jobs_folder, known_jobs
from sorter.cluster.lease import Action, Lease
from sorter.cluster.shards import JobFiles
from sorter.errors import JobFileError, NotNowError


@contextmanager
def begin(job: Job, described: dict[str, Any], action: Action = "run") -> Iterator[Lease]:
    """Hold the job's lease while the context lasts, unless its photos could go to two places.

    Each of two that begin at once writes its description and its lease before it looks for the other's. So at least
    one of them sees the other and ends; it may be both.

    Raises:
        NotNowError: somebody works on this job, or its undo is half done, which only an undo may finish; or somebody
            works on another job that is in the way, or such a job or its undo is half done.
    """
    content = json.dumps(described | {"version": sorter.__version__, "began": time.time()})
    job.output.put_new(f"{job.folder}{DESCRIPTION}", content.encode())
    with Lease(job.output, job.folder, action) as held:
        if action == "run" and job.files.half_undone():
            raise NotNowError(_half_undone(job, job.id, described["inbox"]))
        for id_, other in known_jobs(job.output, job.output_prefix).items():
            if id_ != job.id:
                overlaps = isinstance(other, JobFileError) or _overlap(other["inbox"], described["inbox"])
                _check_beside(job, id_, other, action, overlaps=overlaps)
        yield held


def began(described: dict[str, Any]) -> str:
    """When a job began, and with what."""
    when = datetime.fromtimestamp(described["began"]).strftime("%Y-%m-%d %H:%M:%S")
    return f"began {when}, model {described['model']}, min_confidence {described['min_confidence']:g}" + (
        ", catch_neither" if described["catch_neither"] else ""
    )


def _overlap(inbox: str, other: str) -> bool:
    """Whether one inbox is the other, or a folder in it. Both end in a slash."""
    return inbox.startswith(other) or other.startswith(inbox)


def _check_beside(job: Job, id_: str, other: dict[str, Any] | JobFileError, action: Action, *, overlaps: bool) -> None:
    """Make sure that another job of the same output is not in the way of this one.

    Runs that have no photos in common are not in each other's way. An undo is in the way of all: it makes keys free,
    and whoever is half done and found them taken before would put its photos there once more.

    Raises:
        NotNowError: it is in the way.
        JobFileError: it is half done, and its inbox is not known.
    """
    folder = f"{jobs_folder(job.output_prefix)}{id_}/"
    holder = lease.holder(job.output, folder)  # before its moves: who has released it has written all of them
    # Nodes of the same job would do no harm: they go by the same decisions.
    if holder.may_have_nodes and (overlaps or "undo" in (action, holder.action)):
        where = "an inbox that is not known" if isinstance(other, JobFileError) else other["inbox"]
        raise holder.refusal(f"{where}, as the job {id_}")
    if action == "run" and not overlaps:
        return
    files = JobFiles(job.output, folder)
    is_half_moved = bool(shard_mover.half_moved(files))
    if action == "undo" and is_half_moved:  # should both be half done, one has to be taken back first
        is_half_moved = not (shard_mover.half_moved(job.files) or job.files.half_undone())
    is_half_undone = action == "run" and bool(files.half_undone())
    if isinstance(other, JobFileError):
        if is_half_moved or is_half_undone:
            raise JobFileError(f"a job that is not finished may have the same inbox, but {other}") from other
        return
    if is_half_undone:
        raise NotNowError(_half_undone(job, id_, other["inbox"]))
    if is_half_moved:
        raise NotNowError(
            f"the job {id_} of {other['inbox']} ({began(other)}) is not finished: finish it with the settings and the "
            f"model that it has in {job.output.url}/{folder}{DESCRIPTION}, or take it back with "
            f"{_undo_command(job, id_, other['inbox'])}"
        )


def _half_undone(job: Job, id_: str, inbox: str) -> str:
    return f"an undo of the job {id_} was interrupted: finish it first, with {_undo_command(job, id_, inbox)}"


def _undo_command(job: Job, id_: str, inbox: str) -> str:
    urls = shlex.join(["--inbox", inbox, "--output", f"{job.output.url}/{job.output_prefix}"])
    return f"sorter cluster undo {urls} --job {id_}"
