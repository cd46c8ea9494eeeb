"""Nodes that share a disk decide, and the command moves: kills of both, the history and its undo; how fast that is."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import RED, hashes, make_tree, plain, read_tree
from ray_machines import ENVIRONMENT, INTERRUPTED, interrupt, machines, processes, with_another_disk_in

from sorter.history.reader import HistoryReader

pytestmark = pytest.mark.timeout(1800)

NODE = "ray::Node"


def start(inbox: Path, output: Path, *flags: str) -> "subprocess.Popen[str]":
    places = ("--inbox", inbox, "--output", output)
    # Fewer lines than a pipe holds, because nobody reads it meanwhile.
    return subprocess.Popen(
        [sys.executable, "-m", "sorter", *["cluster", "run", "--log-level", "warning"], *places, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )


def sorter(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "sorter", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.torture
def test_kills_of_nodes_and_of_the_command_lose_nothing_and_undo_brings_everything_back(
    tmp_path: Path, shared: Path, proved: Callable[[str], None]
) -> None:
    generator, killed = random.Random(3), Counter[str]()
    photos = sorted((shared / "kaggle-180" / "training_set" / "training_set").glob("*/*.jpg"))
    chosen = generator.sample(photos, 1_500)
    files = {f"{photo.parent.name}/{photo.name}": photo.read_bytes() for photo in chosen}
    files[next(iter(files)).replace(".jpg", ".xmp")] = b"<xmp>"
    inbox, output = make_tree(tmp_path / "in", files), tmp_path / "out"
    before = hashes(inbox)
    with machines(2, tmp_path, {}) as cluster:
        flags = ("--recursive", "--address", cluster.address, "--workers", "2")
        while True:
            command = start(inbox, output, *flags)
            while command.poll() is None:
                time.sleep(generator.uniform(0.5, 3.0))
                nodes, moved = processes(NODE, cluster.pid), len(read_tree(output)) if output.is_dir() else 0
                if killed["node"] < 4 and nodes and moved >= 100 * killed["node"]:
                    os.kill(generator.choice(nodes), signal.SIGKILL)
                    killed["node"] += 1
                elif killed["command"] < 3 and moved > 300 * (killed["command"] + 1):
                    command.kill()
                    killed["command"] += 1
            _, err = command.communicate()
            if command.returncode != -signal.SIGKILL:
                break
    assert command.returncode == 0, err[-2000:]
    assert read_tree(inbox) == {}
    assert hashes(output) == before
    reader = HistoryReader(output)
    recorded = {entry.destination for entry in reader.entries()}
    reader.close()
    assert recorded == {str(output / name) for name in read_tree(output)}
    proved(f"{len(files)} photos, {killed['node']} nodes and {killed['command']} commands killed: 0 lost, 0 twice")
    assert killed == {"node": 4, "command": 3}
    assert sorter("undo", "--since", "1h", "--inbox", inbox, "--output", output).returncode == 0
    assert read_tree(inbox) == files


@pytest.mark.long
@pytest.mark.parametrize(
    ("phase", "number"), [("gcs_server", signal.SIGTERM), ("raylet/raylet", signal.SIGINT), (NODE, signal.SIGTERM)]
)
def test_a_signal_before_the_first_node_is_ready_ends_the_command_and_all_of_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, number: int, proved: Callable[[str], None]
) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    monkeypatch.setitem(ENVIRONMENT, "RAY_AUTH_TOKEN", uuid4().hex)
    command = start(inbox, tmp_path / "out")
    out, err, seconds = interrupt(command, lambda: processes(phase, command.pid), number)
    assert (command.returncode, out, err.splitlines()[-1]) == (3, "", INTERRUPTED)
    assert set(read_tree(tmp_path)) == {"in/a.jpg"}
    proved(f"{signal.Signals(number).name} at {phase}: the command and all of Ray ended within {seconds:.1f} s")


@pytest.mark.long
def test_a_photo_that_changes_between_listing_and_deciding_is_not_moved_by_that(tmp_path: Path) -> None:
    """Nodes that a command on another machine reaches are stopped while the photo becomes another one."""
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": plain(RED, n) for n in range(3)})
    with machines(1, tmp_path, {}) as cluster:
        command = start(inbox, tmp_path / "out", "--address", cluster.client_address)
        while not (nodes := processes(NODE, cluster.pid)):
            time.sleep(0.1)
        os.kill(nodes[0], signal.SIGSTOP)
        make_tree(inbox, {"1.jpg": plain(RED, 7)})
        os.kill(nodes[0], signal.SIGCONT)
        out, err = command.communicate(timeout=600)
    assert command.returncode == 0, err
    assert "3 photos sorted" in out
    assert read_tree(tmp_path / "out")["cats/1.jpg"] == plain(RED, 7)


@pytest.mark.long
@pytest.mark.parametrize("address", ["address", "client_address"])
def test_a_machine_on_which_the_shared_disk_is_not_mounted_is_named(tmp_path: Path, address: str) -> None:
    """All machines but the command's, in a mount namespace of their own with an empty disk in the inbox's place."""
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": plain(RED, n) for n in range(5)})
    with machines(1, tmp_path, {}, with_another_disk_in(inbox)) as cluster:
        command = start(inbox, tmp_path / "out", "--address", getattr(cluster, address))
        out, err = command.communicate(timeout=300)
    said = (
        f"the node {os.uname().nodename} has another folder in {inbox} than this machine: mount the shared disk there"
    )
    assert (command.returncode, out) == (2, "")
    assert said in err
    assert set(read_tree(tmp_path)) >= {f"in/{n}.jpg" for n in range(5)}


@pytest.mark.torture
@pytest.mark.whole
def test_a_node_is_nearly_as_fast_as_one_machine_alone(
    tmp_path: Path, shared: Path, proved: Callable[[str], None]
) -> None:
    """Photos per second after the start, in turns, because other programs take what they want of the processors."""
    photos = sorted((shared / "kaggle-180" / "training_set" / "training_set").glob("*/*.jpg"))[:2_000]
    rates: dict[str, list[float]] = {"run": [], "cluster": []}
    for turn in range(3):
        for way in rates:
            inbox = make_tree(tmp_path / f"{way}{turn}", {photo.name: photo.read_bytes() for photo in photos})
            words = ["run", "--once"] if way == "run" else ["cluster", "run"]
            done = sorter(*words, "--inbox", inbox, "--log-format", "json")
            assert done.returncode == 0, done.stderr[-2000:]
            rates[way].append(json.loads(done.stderr.splitlines()[-1])["photos_per_second"])
    shares = sorted(cluster / alone for alone, cluster in zip(rates["run"], rates["cluster"], strict=True))
    proved(f"{rates['run']} photos/s alone, {rates['cluster']} in a cluster of one node: median share {shares[1]:.2f}")
    assert shares[1] >= 0.85
