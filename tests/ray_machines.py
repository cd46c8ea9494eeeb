"""A Ray cluster of several machines on this one, for the tests: its raylets can be killed, and others added.

Run as a program it is the cluster: a head without CPUs, and machines that the lines of its standard input add or kill.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "ab" * 32
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_worker_niceness": "0",
}
INTERRUPTED = "sorter: interrupted before this command had sorted anything: run it again"


class Machines:
    """The cluster, from the outside.

    Attributes:
        address: of its head.
        client_address: the same for commands on other machines, ray://….
        pid: all of its processes descend from this one.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process, self.pid = process, process.pid
        self.address, self.client_address = self._answer().split()

    def add(self) -> None:
        """Add a machine with one CPU."""
        self._tell("add")

    def kill(self) -> None:
        """Kill the oldest machine: its raylet, and with it all of its processes, get SIGKILL."""
        self._tell("kill")

    def _tell(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):  # Ray says what it likes
                return line[2:].strip()
        raise AssertionError("the cluster has ended")


def with_another_disk_in(folder: Path) -> list[str | Path]:
    """What runs a command for which an empty disk is mounted in a folder."""
    mount = 'mount -t tmpfs none "$0" && exec "$@"'
    prefix: list[str | Path] = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, folder]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and user namespaces, to mount a disk for some processes alone")
    return prefix


@contextmanager
def machines(
    count: int, folder: Path, environment: dict[str, str], within: Sequence[str | Path] = ()
) -> Iterator[Machines]:
    """A cluster with so many machines of one CPU each; its nodes have this environment, not the command's.

    Args:
        count: of machines.
        folder: for the log.
        environment: beside the one of the tests.
        within: a command that runs the one that follows it.
    """
    with (folder / "ray.log").open("ab") as log:
        process = subprocess.Popen(
            [*within, sys.executable, __file__, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
            start_new_session=True,
        )
    with process:
        try:
            yield Machines(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def processes(name: str, parent: int) -> list[int]:
    """The descendants of a process with a name in their title: Ray's workers are called after what they run."""
    titles, parents = {}, {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            titles[int(entry)] = Path("/proc", entry, "cmdline").read_bytes().decode(errors="replace")
            parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue

    def descends(process: int) -> bool:
        while process and process != parent:
            process = parents.get(process, 0)
        return process == parent

    return [process for process, title in titles.items() if name in title and descends(process)]


def interrupt(command: "subprocess.Popen[str]", phase: Callable[[], object], number: int) -> tuple[str, str, float]:
    """Send a command a signal once it is in a phase: what it printed, and when the last of Ray's had ended, in s."""
    while not phase():
        assert command.poll() is None, command.communicate()
        time.sleep(0.02)
    before, sent = token_of(command.pid), time.monotonic()
    assert before is not None
    command.send_signal(number)
    out, err = command.communicate(timeout=60)
    while any(token_of(int(entry)) == before for entry in filter(str.isdigit, os.listdir("/proc"))):
        assert time.monotonic() < sent + 60
        time.sleep(0.1)
    return out, err, time.monotonic() - sent


def token_of(process: int) -> str | None:
    """The token that a process was started with; None once it has ended."""
    try:
        entries = Path("/proc", str(process), "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry.decode() for entry in entries if entry.startswith(b"RAY_AUTH_TOKEN=")), None)


def main(count: int) -> None:
    from object_stores import free_port
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 80_000_000, "include_dashboard": False}
    port = free_port()
    head = {"num_cpus": 0, "ray_client_server_port": port, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(count)]
    print(f"> {cluster.address} ray://127.0.0.1:{port}", flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            nodes.append(cluster.add_node(num_cpus=1, **small))
        else:
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
        print("> done", flush=True)
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(int(sys.argv[1]))
