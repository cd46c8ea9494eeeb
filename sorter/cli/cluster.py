"""`sorter cluster`: sort with many machines, in an object store or on a disk that all of them share."""

import argparse
import re
import textwrap
from contextlib import ExitStack
from functools import partial

from sorter import extras
from sorter.classifier.manifest import Manifest
from sorter.cli import check as check_command
from sorter.cli import options, preflight
from sorter.cli import run as run_command
from sorter.errors import ConfigurationError, ExitCode, NotBegunError
from sorter.history.store import Run
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

_ACTIONS = ("run", "status", "undo", "check")
_URL = re.compile(r"^([a-z][a-z0-9+.-]*):/+", re.IGNORECASE)
# What a folder has and an object store has not: a history, locks, links, files that are still being written, a watcher.
_OF_FOLDERS = (
    *("state_dir", "flat", "once", "dry_run", "link", "include_undone", "on_sorted", "metrics_port"),
    *("settle_seconds", "settle_timeout_seconds", "rescan_seconds"),
)
_IN_PLACE_OF = {"dry_run": "use --decide-only", "link": "objects have no links"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter cluster`."""
    parser.add_argument(
        "action", choices=_ACTIONS, help="sort; show progress; restore what was sorted; check whether the store is safe"
    )
    flags = ", ".join("--" + name.replace("_", "-") for name in _OF_FOLDERS)
    places = "--inbox and --output are two folders that all machines share, or two URLs, s3://bucket/prefix"
    group = parser.add_argument_group("the cluster", textwrap.fill(f"{places}. Not with URLs: {flags}.", 94))
    group.add_argument(
        "--address", metavar="ADDRESS", help="of a Ray cluster, ray://host:10001 (default: Ray on this machine)"
    )
    group.add_argument(
        "--workers",
        metavar="N",
        type=options.positive,
        help="number of nodes (default: one for each machine, or for each GPU)",
    )
    group.add_argument("--decide-only", action="store_true", help="decide on everything, and move nothing yet")
    group.add_argument("--job", metavar="ID", help="for status and undo: which job, if there are several")


def cluster(
    settings: Settings, *, action: str, address: str | None, workers: int | None, decide_only: bool, job: str | None
) -> ExitCode:
    """Sort an inbox with a cluster, or show, take back or check that.

    Raises:
        SorterError: something is wrong, or it could not go on.
    """
    _check_options(action, address, workers, decide_only=decide_only, job=job)
    inbox, output = str(settings.inbox), str(settings.output_folder)
    for flag, place in (("--inbox", inbox), ("--output", output)):
        if place.lower().startswith("s3:") and not _URL.match(place):
            raise ConfigurationError(f"{flag} {place} is not a URL: write s3://bucket/prefix")
    if bool(_URL.match(inbox)) != bool(_URL.match(output)):
        raise ConfigurationError("--inbox and --output are a folder and a URL: use two folders, or two URLs")
    try:
        if not _URL.match(inbox):
            return _with_folders(settings, action, address, workers, decide_only=decide_only)
        return _with_urls(settings, action, _url(inbox), _url(output), address, workers, decide_only, job)
    except KeyboardInterrupt:  # of `Shutdown`
        done = "restored" if action == "undo" else "sorted"
        raise NotBegunError(f"interrupted before this command had {done} anything: run it again") from None


def _url(path: str) -> str:
    """A URL that has been taken for a path, and has lost a slash; its scheme may be in capitals."""
    return _URL.sub(lambda match: f"{match[1].lower()}://", path)


def _check_options(
    action: str, address: str | None, workers: int | None, *, decide_only: bool, job: str | None
) -> None:
    given = {"--address": address, "--workers": workers, "--decide-only": decide_only, "--job": job}
    fitting = {"run": {"--address", "--workers", "--decide-only"}, "status": {"--job"}, "undo": {"--job"}}
    for flag, value in given.items():
        if value and flag not in fitting.get(action, ()):
            raise ConfigurationError(f"{flag} is not for sorter cluster {action}: omit it")


def _with_folders(
    settings: Settings, action: str, address: str | None, workers: int | None, *, decide_only: bool
) -> ExitCode:
    """A disk that all machines share: they decide, and this one moves, with the history of `sorter run`."""
    if action == "check":
        return check_command.check(settings)
    if action != "run":
        raise ConfigurationError(f"{settings.inbox} is a folder, whose history sorter {action} knows: use that")
    if decide_only:
        raise ConfigurationError("--decide-only is for object stores: use --dry-run")
    if settings.metrics_port:
        raise ConfigurationError("--metrics-port is for a daemon: omit it")
    extras.require("ray", "cluster", "sorter cluster")
    opened = partial(_open_nodes, address=address, workers=workers)
    return run_command.run(settings.model_copy(update={"once": True}), as_json=False, open_model=opened)


def _open_nodes(
    settings: Settings,
    model: Manifest,
    stack: ExitStack,
    shutdown: Shutdown,
    *,
    address: str | None,
    workers: int | None,
) -> run_command.Opened:
    from sorter.cluster import node, ray_cluster
    from sorter.cluster.pool import Pool
    from sorter.cluster.shared_disk import RemotePipeline
    from sorter.cluster.shared_folder import SharedFolder

    folder = SharedFolder.of(settings.inbox)
    shutdown.unwinds = True
    ray = stack.enter_context(ray_cluster.connected(address))
    shape = ray_cluster.shape(ray, settings.device, workers)
    engine = preflight.measured_engine(settings, model)
    pool = Pool(ray, shape, node.setup(settings, engine, shape.cpus, folder=folder))
    stack.callback(pool.finish)
    run = Run.new(model.name)
    return run_command.Opened(pool.await_first(), run, partial(RemotePipeline.start, pool, run))


def _with_urls(
    settings: Settings,
    action: str,
    inbox: str,
    output: str,
    address: str | None,
    workers: int | None,
    decide_only: bool,
    job: str | None,
) -> ExitCode:
    _refuse_of_folders(settings)
    preflight.check_sidecar_suffixes(settings)
    for module in ("boto3", "pyarrow", *(["ray"] if action == "run" else [])):
        extras.require(module, "cluster", "sorter cluster with an object store")
    from sorter.cli import object_store

    if action == "run":
        return object_store.run(settings, inbox, output, address=address, nodes=workers, decide_only=decide_only)
    if action == "check":
        return object_store.check(settings, inbox, output)
    return {"status": object_store.status, "undo": object_store.undo}[action](settings, inbox, output, job)


def _refuse_of_folders(settings: Settings) -> None:
    if "recursive" in settings.model_fields_set and not settings.recursive:
        raise ConfigurationError("--no-recursive does not apply to an object store, where folders are parts of names")
    for name in sorted(settings.model_fields_set.intersection(_OF_FOLDERS)):
        if getattr(settings, name) != Settings.model_fields[name].default:
            flag, instead = "--" + name.replace("_", "-"), _IN_PLACE_OF.get(name, "omit it")
            raise ConfigurationError(f"{flag} does not apply to an object store: {instead}")
