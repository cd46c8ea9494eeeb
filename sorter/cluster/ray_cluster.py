"""The Ray cluster that the nodes run on: one that is there, or one of this machine's own for as long as the job takes.

In: an address, or none. Out: how many nodes fit, and what each may use. Ray's own telemetry stays off, and nobody talks
to the cluster without its token, unless the user's environment says otherwise.
"""

import atexit
import contextlib
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from sorter import extras
from sorter.cluster.scratch import PrivateFolder
from sorter.errors import ConfigurationError, ExitCode, NotNowError
from sorter.processors import available_cpus

_OBJECT_STORE_BYTES = 100_000_000  # names and decisions; no pixels travel
_LEAST_SHARE = 8  # a machine with less than an eighth of the largest one's CPUs has no node
_LOCAL_PREFIX = "sorter-ray-"  # in the folder for temporary files: paths of sockets must stay short


@dataclass(frozen=True, slots=True)
class Shape:
    """How a cluster is divided into nodes.

    Attributes:
        nodes: how many there are.
        cpus: of each.
        gpus: of each, 0 or 1.
    """

    nodes: int
    cpus: int
    gpus: int


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to a cluster, or start one, and yield the module `ray`; end the connection, or the cluster, afterwards.

    Args:
        address: as `ray.init` takes it: `ray://host:10001` from outside, `auto` on one of its machines.

    Raises:
        ConfigurationError: the extra is not installed.
        NotNowError: the cluster cannot be reached or started.
    """
    extras.require("ray", "cluster", "sorter cluster")
    _prepare_environment(local=address is None)
    import ray

    # This program's lines say what happens; about a node that was killed Ray writes to standard error all the same.
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "error"}
    folder = None
    if address is None:
        folder = PrivateFolder(Path(tempfile.gettempdir()), _LOCAL_PREFIX)
        options |= {
            "num_cpus": available_cpus(),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": str(folder.path),
        }
    structlog.get_logger().info("cluster.connecting", address=address or "this machine")  # which may take minutes
    started, ending = Future[None](), threading.Event()

    def hold() -> None:
        try:
            ray.init(address=address or "local", **options)  # whatever RAY_ADDRESS says
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(None)
            ending.wait()

    def end() -> None:
        ray.shutdown()
        ending.set()
        thread.join()
        if folder is not None:
            folder.close()

    # Ray's start takes up to half a minute, in which it sees no signal: in a thread of its own it leaves both the
    # signals and their handlers alone. Its processes die with the thread that has started them.
    thread = threading.Thread(target=hold, name="ray", daemon=True)
    thread.start()
    try:
        try:
            started.result()
        except Exception as error:  # whatever Ray and gRPC raise here
            where, hint = (
                f"the Ray cluster at {address} cannot be used",
                "start it, or check --address and RAY_AUTH_TOKEN",
            )
            if address is None:
                where, hint = "Ray did not start on this machine", "check free memory and space for temporary files"
            raise NotNowError(f"{where} ({_cause(error)}): {hint}") from error
        yield ray
    finally:
        if started.done():
            end()
        else:
            # Only the end of this process ends Ray's start. The next command removes the folder.
            atexit.register(os._exit, ExitCode.INCOMPLETE)


def shape(ray: Any, device: str, nodes: int | None) -> Shape:
    """Divide the cluster: a node for each machine, or for each GPU.

    Args:
        ray: the connected module.
        device: the setting; GPUs are left alone with `cpu`.
        nodes: how many there are to be; None for as many as fit.

    Raises:
        ConfigurationError: the cluster has no CPUs to offer.
    """
    machines = [m["Resources"] for m in ray.nodes() if m["Alive"] and m["Resources"].get("CPU", 0) >= 1]
    if not machines:
        raise ConfigurationError("the Ray cluster has no machine with CPUs to offer: start its workers first")
    with_gpu = [m for m in machines if m.get("GPU", 0) >= 1] if device != "cpu" else []
    if with_gpu:
        cpus = max(1, min(int(m["CPU"] // m["GPU"]) for m in with_gpu))
        return Shape(nodes or sum(int(m["GPU"]) for m in with_gpu), cpus, 1)
    # Nodes are of one size: a small machine among large ones, such as a head, would cut all of them into pieces.
    largest = max(int(m["CPU"]) for m in machines)
    machines = [m for m in machines if int(m["CPU"]) * _LEAST_SHARE >= largest]
    cpus = min(int(m["CPU"]) for m in machines)
    fitting = sum(int(m["CPU"]) // cpus for m in machines)
    if nodes is None or nodes <= fitting:
        return Shape(nodes or fitting, cpus, 0)
    if len(machines) == 1:  # they share it
        return Shape(min(nodes, cpus), max(1, cpus // nodes), 0)
    return Shape(nodes, cpus, 0)  # on a cluster that grows, some wait for that


def _prepare_environment(*, local: bool) -> None:
    """What Ray's processes find in their environment, unless the user has set it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if local and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise Ray writes one to the home folder
    # By default Ray's workers give way to everything else on the machine; here they are as nice as the command is.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A node that uses no GPU may still look at one that Ray does not know of.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _cause(error: Exception) -> str:
    """The first line of what Ray says, and the last one where that announces a traceback of the server's."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[-1].strip()}"[:400] if others and first.endswith(":") else first[:200]
