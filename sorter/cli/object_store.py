"""`sorter cluster` with an object store: its actions, what they print, and their exit codes."""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import structlog

from sorter import logs
from sorter.classifier import manifest as manifests
from sorter.classifier.manifest import Manifest
from sorter.cli import console, entries, preflight
from sorter.cluster import exclusion, node, ray_cluster
from sorter.cluster import job as jobs
from sorter.cluster import status as statuses
from sorter.cluster.job import Job, Totals
from sorter.cluster.listing import SHARD_ROWS
from sorter.cluster.object_node import ObjectNode
from sorter.cluster.pool import Pool
from sorter.cluster.probe import probe
from sorter.cluster.shard_sorter import NAMED
from sorter.cluster.status import Status
from sorter.cluster.stores import Mode, open_store
from sorter.cluster.taking_back import take_back
from sorter.errors import ConfigurationError, ExitCode, JobFileError
from sorter.files import FAILED
from sorter.inbox.sidecars import SidecarNames
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

_UPLOADED = (
    "like OpenStack Swift, this store may check conditions only against requests that have ended, not against those at "
    "the same moment: run one job at a time, and let nothing else write to the inbox and the output meanwhile"
)


def run(
    settings: Settings, inbox: str, output: str, *, address: str | None, nodes: int | None, decide_only: bool
) -> ExitCode:
    """Sort what is in the inbox, or go on with that.

    Raises:
        SorterError: something is wrong, or it could not go on.
    """
    model = manifests.read(settings.model)
    settings = preflight.decided(settings, model)
    job, described = _job(settings, inbox, output, model)
    stream = logs.configure(settings.log_format, settings.log_level)
    shutdown = Shutdown(idle_code=ExitCode.INCOMPLETE)
    shutdown.unwinds = True
    shutdown.listen()
    mode = _probe(job)
    started = time.monotonic()
    with ExitStack() as stack:
        held = stack.enter_context(exclusion.begin(job, described))
        if mode == "upload":
            structlog.get_logger().warning("cluster.store", detail=_UPLOADED)
        objects, shards = jobs.list_inbox(job, preflight.selection(settings))
        to_do = list(jobs.unfinished(job, decide_only=decide_only))
        structlog.get_logger().info(
            "cluster.started", job=job.id, mode=mode, new_objects=objects, new_shards=shards, shards=len(to_do)
        )
        totals = Totals(Counter())
        if to_do:
            ray = stack.enter_context(ray_cluster.connected(address))
            shape = ray_cluster.shape(ray, settings.device, nodes)
            place = job.place(mode, decide_only=decide_only)
            setup = node.setup(settings, preflight.measured_engine(settings, model), shape.cpus, place)
            pool = Pool(ray, shape, setup, ObjectNode)
            stack.callback(pool.finish)
            pool.await_first()
            shutdown.move_lock = threading.Lock()  # a second signal ends it at once: the same command goes on
            total = (len(to_do) - 1) * SHARD_ROWS + len(job.files.read_shard(to_do[-1]))
            show = _bar(settings, stream, shutdown, stack, total, "sorting")
            loop = jobs.Run(
                pool,
                to_do,
                job.files,
                stopping=_stopping(shutdown),
                check=held.check,
                on_progress=lambda _, n: show(n),
            )
            totals = loop.run()
            structlog.get_logger().info(
                "cluster.finished", job=job.id, shards=totals.shards, lost_nodes=pool.deaths, **totals.counts
            )
    interrupted = totals.shards < totals.to_do
    seconds = time.monotonic() - started
    lines = _summary(job, totals, seconds, decide_only=decide_only, interrupted=interrupted)
    if not totals.counts and not job.files.shards():
        lines.append(
            f"  Nothing to sort is below {job.inbox.url}/{job.inbox_prefix}: check --inbox if there should be."
        )
    incomplete = interrupted or any(totals.counts[kind] for kind in (f"{FAILED}/", "left", "changed"))
    if not incomplete and jobs.any_left(job):
        incomplete = True
        lines.append(
            "  Objects that were left earlier are still in the inbox; sorter cluster status says where the reasons are."
        )
    console.say("\n".join(lines), sys.stdout)
    return ExitCode.INCOMPLETE if incomplete else ExitCode.DONE


def check(settings: Settings, inbox: str, output: str) -> ExitCode:
    """Ask the store for what a safe move needs, and print the answer.

    Raises:
        SorterError: the store lacks a condition or does not answer, or the model cannot be used.
    """
    model = manifests.read(settings.model)
    settings = preflight.decided(settings, model)
    job, _ = _job(settings, inbox, output, model)
    mode = _probe(job)
    engine = preflight.open_engine(settings, model)
    rows = {
        "inbox": f"{job.inbox.url}/{job.inbox_prefix}",
        "output": f"{job.output.url}/{job.output_prefix}",
        "store": f"keeps every condition that a safe move needs; objects are copied in the mode {mode}",
        **({"note": _UPLOADED} if mode == "upload" else {}),
        "job": job.id,
        "model": f"{model.name}, {model.architecture} at {model.input.size} px",
        "engine": f"{engine.name} on {engine.device}, {engine.precision}, on this machine",
    }
    _print_rows(list(rows.items()))
    return ExitCode.DONE


def status(settings: Settings, inbox: str, output: str, job_id: str | None) -> ExitCode:
    """Print how far a job is.

    Raises:
        SorterError: the job does not exist, or the store does not answer.
    """
    job, _ = _known(settings, inbox, output, job_id)
    found = statuses.read(job)
    share = found.moved / max(found.shards, 1)
    restored = _restored(found.restored, found.stayed)
    rows = [("job", job.id), ("state", _state(found, restored))]
    if found.holder.is_fresh or not found.is_undone:
        rows.append(("sorted", f"{found.moved} of {found.shards} shards of about {SHARD_ROWS:,} objects ({share:.1%})"))
        rows.append(("decided", f"{found.decided} of {found.shards} shards"))
        if found.undone:
            rows.append(("undone", f"{found.undone} of {found.moved} sorted shards. {restored}"))
        rows += [(kind, f"{found.problems[kind]}") for kind in ("failed", "left", "changed") if found.problems[kind]]
        if found.problems:
            rows.append(("reasons", _reasons(job)))
    is_sorting = found.holder.is_fresh and found.holder.action == "run"
    if is_sorting and found.moved < found.shards and found.seconds_left is not None:
        rows.append(("speed", f"about {found.per_second * SHARD_ROWS:.1f} photos/s"))
        rows.append(("time left", f"about {found.seconds_left / 60:.0f} minutes"))
    _print_rows(rows)
    if sys.stdout.isatty() and not found.undone:
        width = 50
        print(f"[{'#' * round(width * share):<{width}}]")
    return ExitCode.DONE


def _state(found: Status, restored: str) -> str:
    """What becomes of a job, for a person."""
    if found.holder.is_fresh:
        return f"{'undo under way' if found.holder.action == 'undo' else 'running'}, {found.holder.text}"
    if found.half_undone:
        return "undo interrupted: run sorter cluster undo again"
    if found.is_undone:
        return f"undone. {restored}"
    if found.moved < found.shards:
        return "not running"
    return "finished" if found.shards else "nothing was listed yet"


def undo(settings: Settings, inbox: str, output: str, job_id: str | None) -> ExitCode:
    """Bring a job's objects back under their old keys.

    Raises:
        NotNowError: the job is running, or another one of this output runs or is half done.
        SorterError: the job does not exist, or the store does not answer.
    """
    counts: Counter[str] = Counter()
    shutdown, interrupted = Shutdown(idle_code=ExitCode.INCOMPLETE), False
    shutdown.unwinds = True
    shutdown.listen()

    def stopping() -> bool:  # asked as long as something is to be restored
        nonlocal interrupted
        interrupted = interrupted or shutdown.requested
        return interrupted

    job, described = _known(settings, inbox, output, job_id)
    mode = _probe(job)
    with ExitStack() as stack:
        held = stack.enter_context(exclusion.begin(job, described, "undo"))
        shutdown.move_lock = threading.Lock()  # a second signal ends it at once: the same command goes on
        stream = stack.enter_context(closing(logs.LogStream(os.dup(2))))
        show = _bar(settings, stream, shutdown, stack, None, "restoring")
        sidecars = SidecarNames(described["sidecar_suffixes"])
        for row in stack.enter_context(closing(take_back(job, mode, sidecars, stopping))):
            held.check()
            counts[row.kind] += 1
            show(counts.total())
            if row.kind != "moved" and counts.total() - counts["moved"] <= NAMED:
                say = stream.above or partial(console.say, stream=sys.stderr)
                say(f"sorter: cannot restore {entries.printable(row.key)}: {row.reason}")
    stayed = counts.total() - counts["moved"]
    if stayed > NAMED:
        console.say(
            f"sorter: and {stayed - NAMED} more; {job.output.url}/{job.folder}undo/ has all of them, as Parquet",
            sys.stderr,
        )
    hint = " Interrupted: the same command goes on." if interrupted else ""
    console.say(_restored(counts["moved"], stayed) + hint, sys.stdout)
    return ExitCode.INCOMPLETE if stayed or interrupted else ExitCode.DONE


def _restored(restored: int, stayed: int) -> str:
    return f"Restored {entries.counted(restored, 'object')}; {stayed} could not be restored."


def _job(settings: Settings, inbox: str, output: str, model: Manifest) -> tuple[Job, dict[str, object]]:
    job, described = jobs.job_of(*open_store(inbox), *open_store(output), settings, model)
    jobs.check_urls(job, model)
    return job, described


def _known(settings: Settings, inbox: str, output: str, job_id: str | None) -> tuple[Job, dict[str, Any]]:
    """The one job of an inbox, or the one that was named, and what describes it."""
    stores = (*open_store(inbox), *open_store(output))
    url = f"{stores[0].url}/{stores[1]}"
    known, unread = dict[str, dict[str, Any]](), list[JobFileError]()
    for id_, described in jobs.known_jobs(*stores[2:]).items():
        if job_id in (None, id_):
            if isinstance(described, JobFileError):
                unread.append(described)
            elif described["inbox"] == url:
                known[id_] = described
    found = [*known]
    if not found and unread:
        raise unread[0]
    if not found:
        named = "job" if job_id is None else f"job {entries.printable(job_id)}"
        raise ConfigurationError(f"{output} has no {named} for {inbox}: check --inbox and --output")
    if len(found) > 1:  # one that was refused before it listed anything has no shards
        found = [id_ for id_ in found if Job(id_, *stores).files.shards()] or found
    if len(found) > 1:
        listed = "\n".join(f"    {id_}  {exclusion.began(known[id_])}" for id_ in found)
        raise ConfigurationError(f"{inbox} has several jobs: choose one with --job\n{listed}")
    return Job(found[0], *stores), known[found[0]]


def _probe(job: Job) -> Mode:
    """How objects are moved; a store that cannot do it safely is refused."""
    mode = probe(job.output, job.output_prefix)
    if job.inbox.url != job.output.url and (other := probe(job.inbox, job.inbox_prefix)) != mode:
        raise ConfigurationError(
            f"{job.inbox.url} and {job.output.url} are of different kinds ({other}, {mode}): use buckets of one store"
        )
    return mode


def _stopping(shutdown: Shutdown) -> Callable[[], bool]:
    """Whether a signal has come; says once what happens then."""
    told = False

    def stopping() -> bool:
        nonlocal told
        if shutdown.requested and not told:
            told = True
            structlog.get_logger().info(
                "cluster.stopping", detail="the shards in hand are finished first; a second signal ends it at once"
            )
        return shutdown.requested

    return stopping


def _bar(
    settings: Settings, stream: logs.LogStream, shutdown: Shutdown, stack: ExitStack, total: int | None, doing: str
) -> Callable[[int], None]:
    """What shows how many photos were decided on, moved by earlier decisions, or restored, if somebody watches."""
    if settings.log_format == "json" or not stream.isatty():
        return lambda _: None
    shutdown.restore_terminal = stream.show_cursor
    bar, started = stack.enter_context(console.bar(stream, total, doing)), time.monotonic()
    return lambda done: bar.show(done, done / max(time.monotonic() - started, 0.001))


def _summary(job: Job, totals: Totals, seconds: float, *, decide_only: bool, interrupted: bool) -> list[str]:
    named = {"sidecar": "sidecars moved along", "skipped": "skipped, not photos", "left": "left in the inbox"}
    named["changed"] = "changed meanwhile, left in the inbox"
    photos = sum(count for kind, count in totals.counts.items() if kind.endswith("/") and kind != f"{FAILED}/")
    head = f"Job {job.id}: {entries.counted(photos, 'photo')} {'would be ' if decide_only else ''}sorted in "
    head += f"{seconds:.1f} s"
    if interrupted:
        head += ", interrupted: the same command goes on"
    kinds = sorted(totals.counts, key=lambda kind: (kind in named, kind == f"{FAILED}/", kind))
    rows = [(named.get(kind, kind), totals.counts[kind]) for kind in kinds]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [head, *(f"  {name:<{width}}  {count:>7}" for name, count in rows)]
    if not decide_only and any(totals.counts[kind] for kind in (f"{FAILED}/", "left", "changed")):
        lines.append(f"  reasons: {_reasons(job)}")
    return lines


def _reasons(job: Job) -> str:
    return f"{job.output.url}/{job.files.problems_folder}, one line of JSON for each"


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {entries.printable(value)}")
