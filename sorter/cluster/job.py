"""One inbox in an object store, sorted by many nodes: what a job is, what is left of it, and the loop that deals it.

In: URLs and settings. Out: every shard finished, or a reason why not. The job's files are all that it remembers:
whoever runs the same command again, anywhere, goes on from there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog

from sorter.classifier.manifest import Manifest
from sorter.cluster.listing import list_new
from sorter.cluster.node import Place, model_digest
from sorter.cluster.pool import Finished, Pool, Task
from sorter.cluster.shard_sorter import NAMED, Result
from sorter.cluster.shards import READERS, JobFiles, Problem
from sorter.cluster.stores import Mode, Store, read_own
from sorter.errors import ConfigurationError, FailingObjectError, JobFileError, ObjectError
from sorter.files import FAILED, FOLDER, UNSURE
from sorter.inbox.selection import Selection
from sorter.settings import Settings

log = structlog.get_logger()

_WAIT_SECONDS = 1.0
DESCRIPTION = "job.json"
_REMEDY = "restore an intact copy, or remove it and repeat the command that began the job, which writes it again"
# What a decision depends on, beside the model.
_DECIDING = (
    *("min_confidence", "catch_neither", "engine", "include", "exclude", "ignored_folders", "temporary_names"),
    *("sidecar_suffixes", "max_megapixels", "max_jpeg_megapixels", "max_megabytes", "decode_timeout_seconds"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One inbox, one output, one way to decide.

    Attributes:
        id: of the inbox, the model and the settings that decisions depend on; names the job's folder.
        inbox, output: the buckets.
        inbox_prefix, output_prefix: of keys; empty, or with a slash at the end.
    """

    id: str
    inbox: Store
    inbox_prefix: str
    output: Store
    output_prefix: str

    @property
    def folder(self) -> str:
        """Prefix of the job's own files."""
        return f"{jobs_folder(self.output_prefix)}{self.id}/"

    @property
    def files(self) -> JobFiles:
        """The job's own files."""
        return JobFiles(self.output, self.folder)

    def place(self, mode: Mode, *, decide_only: bool) -> Place:
        """What the nodes are told of it."""
        return Place(
            inbox=self.inbox.url,
            inbox_prefix=self.inbox_prefix,
            output=self.output.url,
            output_prefix=self.output_prefix,
            folder=self.folder,
            mode=mode,
            decide_only=decide_only,
        )


def jobs_folder(output_prefix: str) -> str:
    """Prefix of the files of all jobs of an output."""
    return f"{output_prefix}{FOLDER}/cluster/"


def job_of(
    inbox: Store, inbox_prefix: str, output: Store, output_prefix: str, settings: Settings, model: Manifest
) -> tuple[Job, dict[str, Any]]:
    """The job that some settings stand for, and what describes it in `job.json`."""
    described = {
        "inbox": f"{inbox.url}/{inbox_prefix}",
        "output": f"{output.url}/{output_prefix}",
        "folders": [*(c.folder for c in model.classes), UNSURE, FAILED],
        "model": model.name,
        "model_digest": model_digest(settings.model),
        **{name: getattr(settings, name) for name in _DECIDING},
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return Job(digest[:12], inbox, inbox_prefix, output, output_prefix), described


def known_jobs(output: Store, output_prefix: str) -> dict[str, dict[str, Any] | JobFileError]:
    """What describes each job of an output, by id, or why that cannot be read."""
    folder = jobs_folder(output_prefix)
    found: dict[str, dict[str, Any] | JobFileError] = {}
    after = folder
    while (first := next(iter(output.list(folder, after=after)), None)) is not None:
        id_ = first.key.removeprefix(folder).partition("/")[0]
        try:
            described = read_own(output, f"{folder}{id_}/{DESCRIPTION}", _description, _REMEDY)
        except JobFileError as error:
            found[id_] = error
        else:
            if described is not None:
                found[id_] = described
        after = f"{folder}{id_}/\U0010ffff"  # behind all of this job's files
    return found


def _description(content: bytes) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(content)
    return described | {"inbox": str(described["inbox"])}


def list_inbox(job: Job, selection: Selection) -> tuple[int, int]:
    """Add what is new in the inbox to the job's shards; returns how many objects and shards that are.

    Raises:
        StoreError: the store does not answer, or what the inbox is cannot be told.
    """
    folders, is_shared = {FOLDER}, job.inbox.url == job.output.url
    for other in known_jobs(job.output, job.output_prefix).values():  # also those of models that were used before
        if not isinstance(other, JobFileError):
            folders.update(other["folders"])
        elif is_shared and job.output_prefix.startswith(job.inbox_prefix):
            raise JobFileError(f"the folders in the inbox that photos were sorted into are not known, as {other}")
    outputs = tuple(f"{job.output_prefix}{folder}/" for folder in folders)

    def wanted(name: str) -> bool:
        folder, slash, base = name.rpartition("/")
        if not base or (is_shared and f"{job.inbox_prefix}{name}".startswith(outputs)):
            return False
        return selection.takes(name) and (not slash or selection.enters(folder))

    return list_new(job.inbox, job.inbox_prefix, job.files, wanted, selection.sidecars)


@dataclass
class Totals:
    """What a command has done so far.

    Attributes:
        counts: objects by what became of them: a folder's name with a slash, `sidecar`, `skipped`, `left`, `changed`.
        shards: finished by this command.
        to_do: shards that were not finished when it began, and the halves of those that were split since.
    """

    counts: Counter[str]
    shards: int = 0
    to_do: int = 0


class Run:
    """The loop that hands out shards; used by one thread.

    Args:
        pool: of `ObjectNode`s.
        to_do: names of shards.
        files: the job's.
        stopping: says whether no more shards are to be handed out.
        check: raises if somebody else has taken the job over.
        on_progress: called every second or so.
    """

    def __init__(
        self,
        pool: Pool,
        to_do: list[str],
        files: JobFiles,
        *,
        stopping: Callable[[], bool],
        check: Callable[[], None],
        on_progress: Callable[[Totals, int], None],
    ) -> None:
        self._pool, self._waiting, self._files = pool, to_do, files
        self._stopping, self._check, self._on_progress = stopping, check, on_progress
        self.totals = Totals(Counter(), to_do=len(to_do))
        self._waiting.reverse()
        self._named = 0
        self._given_out = set(to_do)  # and the halves of those that were split since

    def run(self) -> Totals:
        """Have all shards done, or those that are in hand when it is to stop.

        Raises:
            SorterError: a node refused, the store failed, or nothing happened any more.
        """
        pool = self._pool
        while pool.in_hand or (self._waiting and not self._stopping()):
            while self._waiting and pool.wants_more and not self._stopping():
                self._give(self._waiting.pop())
            for finished in pool.wait(_WAIT_SECONDS):
                self._receive(finished)
            if self._stopping():
                pool.drop_waiting()
            pool.check_progress()
            self._check()
            self._on_progress(self.totals, pool.photos)
        return self.totals

    def _give(self, shard: str, *, suspected: bool = False) -> None:
        self._pool.submit(Task("sort_shard", (shard,), shard, alone=suspected))

    def _receive(self, finished: Finished) -> None:
        shard, result = finished.task.tag, finished.result
        if finished.died:
            log.warning("node.lost", shard=shard)
            # Only what this command has seen counts: where it was killed itself, the shard need not be the reason.
            self._files.add_death(shard, alone=finished.task.alone)
            self._give(shard, suspected=True)
            return
        assert isinstance(result, Result), "what sort_shard returns"
        self.totals.shards += 1
        self.totals.counts.update(result.counts)
        for problem in result.staying[: NAMED - self._named]:
            log.warning("photo.left", path=problem.key, reason=problem.reason)
        self._named = min(NAMED, self._named + len(result.staying))
        if result.halves:
            log.warning("shard.split", shard=shard, halves=list(result.halves))
            halves = [half for half in result.halves if half not in self._given_out]
            self._given_out.update(halves)
            self.totals.to_do += len(halves)
            for half in halves:
                self._give(half, suspected=True)
        else:
            log.info("shard.finished", shard=shard, **result.counts)


def unfinished(job: Job, *, decide_only: bool) -> Iterator[str]:
    """The shards that are to be done, in order."""
    done = job.files.finished("decisions" if decide_only else "moves")
    return (name for name in job.files.shards() if name not in done)


def any_left(job: Job) -> bool:
    """Whether an object that this job left at any time, or could not move, is still in the inbox as it was."""

    def is_there(problem: Problem) -> bool:
        if problem.kind != "left":
            return False
        try:
            there = job.inbox.head(problem.key)
        except (ObjectError, FailingObjectError):  # which may be why it was left
            return True
        return there is not None and there.etag == problem.etag

    with ThreadPoolExecutor(READERS) as pool:
        return any(any(pool.map(is_there, problems)) for problems in job.files.problems())


def check_urls(job: Job, model: Manifest) -> None:
    """Make sure that the inbox is not a folder that photos are sorted into.

    Raises:
        ConfigurationError: it is.
    """
    own = {*(c.folder for c in model.classes), UNSURE, FAILED, FOLDER}
    inside = job.inbox_prefix.removeprefix(job.output_prefix).partition("/")[0]
    if job.inbox.url == job.output.url and job.inbox_prefix.startswith(job.output_prefix) and inside in own:
        raise ConfigurationError("the inbox is a folder that photos are sorted into: use another --output")
