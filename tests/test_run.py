"""`sorter run` as people run it: real processes, the model that ships, real inotify, real signals."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RED, Running, hashes, make_tree, photo, plain, read_tree

from sorter.settings import SHIPPED_MODEL

Start = Callable[..., Running]


def test_once_sorts_what_is_there_and_every_log_line_is_json(tmp_path: Path, start: Start) -> None:
    names = [f"{n}.jpg" for n in range(40)] + ["emoji 🐈.jpg", "new\nline.JPG", os.fsdecode(b"caf\xe9.jpg"), "png.jpg"]
    make_tree(tmp_path / "in", {name: photo(n) for n, name in enumerate(names)})
    make_tree(tmp_path / "in", {"png.jpg": photo(99, kind="PNG"), "broken.jpg": photo(5)[:200], "notes.txt": b"hello"})
    make_tree(tmp_path / "in", {"half.jpg.part": photo(7), ".hidden.jpg": photo(8), "sub/deep.jpg": photo(9)})
    before = hashes(tmp_path / "in")
    running = start("run", "--once", "--inbox", tmp_path / "in")
    code, out = running.finish()
    assert code == 3, running.errors.read_text()
    assert hashes(tmp_path / "in") == before
    tree = read_tree(tmp_path / "in")
    moved = {os.path.basename(name) for name in tree if name.startswith(("cats/", "dogs/"))}
    assert moved == set(names)
    assert {n for n in tree if not n.startswith(("cats/", "dogs/"))} == {
        "failed/broken.jpg",
        "notes.txt",
        "half.jpg.part",
        ".hidden.jpg",
        "sub/deep.jpg",
    }
    events = running.events()
    assert events[0]["event"] == "service.started"
    assert {"device", "precision", "batch_size", "model", "accuracy"} <= set(events[0])
    for event in events:
        assert {"event", "level", "timestamp"} <= set(event)
        assert event["timestamp"].endswith("Z")
    (first, *_), kinds = running.events("photo.sorted"), [e["event"] for e in events]
    wanted = {"path", "destination", "label", "confidence", "run", "model", "bytes", "decode_ms", "batch_size"}
    assert wanted <= set(first)
    assert kinds.count("photo.sorted") == len(names)
    assert kinds.count("photo.skipped") == 1
    (failed,) = running.events("photo.failed")
    assert (failed["reason"], bool(failed["detail"])) == ("truncated", True)
    (finished,) = running.events("run.finished")
    assert sum(finished["folders"].values()) == len(names) + 1
    assert f"{len(names)} photos sorted" in out
    assert "failed/" in out


@pytest.mark.long
def test_an_empty_inbox_is_success(tmp_path: Path, start: Start) -> None:
    (tmp_path / "in").mkdir()
    code, out = start("run", "--once", "--inbox", tmp_path / "in").finish()
    assert code == 0
    assert out.startswith("0 photos sorted")
    assert os.listdir(tmp_path / "in") == [".sorter"]


def test_a_daemon_sorts_the_backlog_and_whatever_is_dropped_and_ends_with_0(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", {"backlog.jpg": photo(0)})
    make_tree(tmp_path / "elsewhere", {"moved.jpg": photo(1), "copied.jpg": photo(2), "folder/a.jpg": photo(3)})
    make_tree(tmp_path / "elsewhere", {"folder/deep/b.jpg": photo(4)})
    before = hashes(tmp_path)
    running = start("run", "--inbox", inbox, "--recursive", "--settle-seconds", "0.5")
    running.wait_for_event("photo.sorted")
    os.rename(tmp_path / "elsewhere/moved.jpg", inbox / "moved.jpg")
    shutil.copy(tmp_path / "elsewhere/copied.jpg", inbox / "copied.jpg")
    os.rename(tmp_path / "elsewhere/folder", inbox / "folder")
    (inbox / "download.jpg.part").write_bytes(photo(6))
    with (inbox / "slow.jpg").open("wb", buffering=0) as slow:
        content = photo(5, size=(1200, 900))
        for start_byte in range(0, len(content), len(content) // 4):
            slow.write(content[start_byte : start_byte + len(content) // 4])
            time.sleep(0.25)
    assert (inbox / "download.jpg.part").exists()
    os.rename(inbox / "download.jpg.part", inbox / "download.jpg")
    running.wait_for_event("photo.sorted", 7, seconds=30)
    running.process.send_signal(signal.SIGTERM)
    code, _ = running.finish()
    assert code == 0, running.errors.read_text()
    assert running.events("photo.failed") == []
    (tmp_path / "elsewhere/copied.jpg").unlink()
    moved = read_tree(inbox)
    assert {os.path.basename(name) for name in moved if name.startswith(("cats/", "dogs/"))} == {
        "backlog.jpg",
        "moved.jpg",
        "copied.jpg",
        "a.jpg",
        "b.jpg",
        "slow.jpg",
        "download.jpg",
    }
    assert set(before) <= set(hashes(tmp_path))
    assert [e["event"] for e in running.events()][-2:] == ["service.stopping", "run.finished"]


@pytest.mark.long
def test_a_second_signal_ends_it_at_once_with_every_photo_intact(tmp_path: Path, start: Start) -> None:
    make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(600)})
    before = hashes(tmp_path / "in")
    running = start("run", "--inbox", tmp_path / "in")
    running.wait_for_event("photo.sorted", 32)
    running.process.send_signal(signal.SIGINT)
    running.process.send_signal(signal.SIGTERM)
    code, _ = running.finish(seconds=10)
    assert code in (130, 143)
    assert hashes(tmp_path / "in") == before
    assert any(not name.startswith(("cats/", "dogs/")) for name in read_tree(tmp_path / "in")), "it ended early"


def test_a_killed_sort_loses_nothing_and_the_next_one_goes_on(tmp_path: Path, start: Start) -> None:
    make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(150)})
    before = hashes(tmp_path / "in")
    running = start("run", "--once", "--inbox", tmp_path / "in")
    running.wait_for_event("photo.sorted", 32)
    running.process.kill()
    running.finish()
    assert hashes(tmp_path / "in") == before
    code, _ = start("run", "--once", "--inbox", tmp_path / "in").finish()
    assert code == 0
    assert hashes(tmp_path / "in") == before
    assert all(name.startswith(("cats/", "dogs/")) for name in read_tree(tmp_path / "in"))


@pytest.mark.long
def test_inbox_and_output_may_be_on_different_file_systems(tmp_path: Path, start: Start) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    inbox = memory / f"sorter-test-{os.getpid()}"
    try:
        make_tree(inbox, {f"{n}.jpg": photo(n) for n in range(20)})
        before = hashes(inbox)
        code, _ = start("run", "--once", "--inbox", inbox, "--output", tmp_path / "out").finish()
        assert code == 0
        assert read_tree(inbox) == {}
        assert hashes(tmp_path / "out") == before
    finally:
        shutil.rmtree(inbox)


@pytest.mark.long
def test_special_files_are_neither_opened_nor_moved(tmp_path: Path, start: Start) -> None:
    make_tree(tmp_path, {"in/a.jpg": photo(1), "outside.jpg": photo(2), "folder/b.jpg": photo(3)})
    os.mkfifo(tmp_path / "in/fifo.jpg")
    (tmp_path / "in/link.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "in/folder").symlink_to(tmp_path / "folder")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path / "in"):
        server.bind("socket.jpg")
    code, _ = start("run", "--once", "--recursive", "--inbox", tmp_path / "in").finish()
    assert code == 0
    assert {p.name for p in (tmp_path / "in").iterdir()} - {"cats", "dogs", ".sorter"} == {
        "fifo.jpg",
        "link.jpg",
        "folder",
        "socket.jpg",
    }
    kept = {name for name in read_tree(tmp_path) if not name.startswith("log-")}
    assert kept in ({"outside.jpg", "folder/b.jpg", f"in/{folder}/a.jpg"} for folder in ("cats", "dogs"))


@pytest.mark.long
def test_a_file_that_keeps_changing_is_left_and_named(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    running = start("run", "--once", "--inbox", inbox, "--settle-timeout-seconds", "2")
    with (inbox / "growing.jpg").open("wb", buffering=0) as growing:
        deadline = time.monotonic() + 60
        while running.process.poll() is None:
            growing.write(b"x")
            time.sleep(0.05)
            assert time.monotonic() < deadline
    code, out = running.finish()
    assert code == 3
    (left,) = running.events("photo.left")
    assert left["path"] == str(inbox / "growing.jpg")
    assert "changing" in left["reason"]
    assert "left in the inbox" in out


@pytest.mark.long
def test_an_inbox_that_vanishes_ends_once_with_1(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(300)})
    running = start("run", "--once", "--inbox", inbox, "--output", tmp_path / "out")
    running.wait_for_event("photo.sorted", 1)
    os.rename(inbox, tmp_path / "away")
    code, _ = running.finish()
    assert code == 1
    assert "restore it" in running.events("run.failed")[0]["detail"]
    assert len(read_tree(tmp_path / "away")) + len(read_tree(tmp_path / "out")) == 300


@pytest.mark.long
def test_a_daemon_waits_for_an_inbox_that_vanishes(tmp_path: Path, start: Start) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    running = start("run", "--inbox", inbox, "--settle-seconds", "0.2")
    running.wait_for_event("service.started")
    time.sleep(1)
    inbox.rename(tmp_path / "away")
    running.wait_for_event("watcher.waiting", seconds=20)
    make_tree(inbox, {"a.jpg": photo(1)})
    running.wait_for_event("watcher.restarted", seconds=20)
    running.wait_for_event("photo.sorted", seconds=20)
    running.process.send_signal(signal.SIGTERM)
    assert running.finish()[0] == 0


def test_a_daemon_stopped_while_the_model_loads_ends_with_0(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    running = start("run", "--inbox", inbox)
    status = Path(f"/proc/{running.process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc to see when the process listens to signals")
    running.wait_for(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1)
    running.process.send_signal(signal.SIGTERM)
    code, _ = running.finish(seconds=20)
    assert code == 0
    assert running.events("run.failed") == []
    assert len(read_tree(inbox)) == 1


@pytest.mark.long
def test_an_inbox_and_output_with_two_paths_to_one_folder_is_sorted_once(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "real", {"a.jpg": photo(1), "deep/b.jpg": photo(2)})
    (tmp_path / "link").symlink_to(inbox)
    for _ in range(2):
        code, _out = start("run", "--once", "--recursive", "--inbox", tmp_path / "link", "--output", inbox).finish()
        assert code == 0
    assert {os.path.basename(name) for name in read_tree(inbox)} == {"a.jpg", "b.jpg"}


@pytest.mark.long
def test_a_summary_that_cannot_be_written_does_not_turn_success_into_failure(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "sorter", "run", "--once", "--inbox", str(inbox)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_closed_standard_streams_do_not_matter(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(5)})
    command = [sys.executable, "-m", "sorter", "run", "--once", "--log-level", "debug", "--inbox", str(inbox)]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], timeout=60, check=False)
    assert done.returncode == 0
    assert all(name.startswith(("cats/", "dogs/")) for name in read_tree(inbox))


_FROM_NOWHERE = """
import os, sys
from sorter.cli.main import main
os.rmdir(os.getcwd())
sys.exit(main(sys.argv[1:]))
"""


def test_a_current_folder_that_is_gone_does_not_matter(tmp_path: Path) -> None:
    inbox, current = make_tree(tmp_path / "in", {"a.jpg": photo(1)}), tmp_path / "here"
    current.mkdir()
    command = [sys.executable, "-P", "-c", _FROM_NOWHERE, "run", "--once", "--inbox", str(inbox)]
    done = subprocess.run(command, cwd=current, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a.jpg" not in read_tree(inbox)


def test_what_was_moved_before_the_disk_was_full_is_logged(tmp_path: Path, start: Start) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("needs root to mount a small tmpfs")
    try:
        inbox = make_tree(tmp_path / "in", {f"{n}.jpg": photo(n, (900, 700)) for n in range(40)})
        before = hashes(inbox)
        running = start("run", "--once", "--inbox", inbox, "--output", disk / "out")
        code, _ = running.finish()
        assert code == 1
        assert sorted(hashes(inbox) + hashes(disk)) == before
        assert len(running.events("photo.sorted")) == len(read_tree(disk)) > 0
        assert len(running.events("run.finished")) == 1
        assert re.search("No space left|is full", running.events("run.failed")[0]["detail"])
        assert [name for name in read_tree(disk) if name.endswith((".sorter-part", ".sorter-away"))] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.long
def test_a_file_replaced_by_a_link_while_it_settles_is_not_waited_for(tmp_path: Path, start: Start) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    (inbox / "a.jpg").write_bytes(photo(1))
    running = start("run", "--once", "--inbox", inbox, "--settle-seconds", "15")
    running.wait_for_event("service.started")
    (inbox / "a.jpg").unlink()
    (inbox / "a.jpg").symlink_to("/etc/hostname")
    code, _ = running.finish(seconds=14)
    assert code == 0
    assert running.events("photo.left") == []


# The modules are imported once; each case runs in a fork.
_IN_FORKS = """
import json, os, sys
from sorter.cli.main import main
for arguments in json.loads(sys.argv[1]):
    readable, writable = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(writable, 2)
        os._exit(main(arguments))
    os.close(writable)
    with os.fdopen(readable) as errors:
        lines = errors.read().splitlines()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines]), flush=True)
"""


def test_what_is_wrong_at_the_start_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    make_tree(tmp_path, {"in/a.jpg": photo(1), "file": b"x", "real/x": b"x"})
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/cats").symlink_to(tmp_path / "real")
    before = read_tree(tmp_path)
    cases: list[tuple[list[str], str]] = [  # arguments, and what the sentence has to name
        (["--inbox", "a" * 300], "aaa"),
        (["--config", "~nosuchuser/x"], "nosuchuser"),
        (["--inbox", "file"], "file"),
        (["--inbox", "in", "--output", "file"], "file"),
        (["--inbox", "in", "--model", "in"], "model"),
        (["--inbox", "in", "--batch-size", "0"], "--batch-size"),
        (["--inbox", "in", "--output", "linked"], "symbolic link"),
        (["--inbox", "linked/cats", "--output", "linked"], "--output"),
    ]
    requests = json.dumps([["run", "--once", *arguments] for arguments, _ in cases])
    command = [sys.executable, "-c", _IN_FORKS, requests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, named), (code, lines) in zip(cases, answers, strict=True):
        assert (code, len(lines)) == (2, 1), (arguments, lines)
        assert lines[0].startswith("sorter: ")
        assert named in lines[0], arguments
    assert read_tree(tmp_path) == before


def test_an_inbox_that_is_missing_at_the_start_of_once_is_one_sentence_and_exit_code_4(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sorter", "run", "--once", "--inbox", "in"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 4
    assert line.startswith("sorter: the inbox folder 'in' does not exist: create or mount it")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_daemon_waits_for_an_inbox_that_is_not_there_yet(tmp_path: Path, start: Start) -> None:
    running = start("run", "--inbox", tmp_path / "in", "--settle-seconds", "0.2")
    running.wait_for_event("watcher.waiting")
    time.sleep(2.5)
    assert [(event["event"], event["path"]) for event in running.events()] == [
        ("watcher.waiting", str(tmp_path / "in"))
    ]
    make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    running.wait_for_event("photo.sorted")
    running.process.send_signal(signal.SIGTERM)
    assert running.finish()[0] == 0


@pytest.mark.long
def test_a_daemon_that_is_stopped_while_it_waits_for_its_inbox_ends_with_0(tmp_path: Path, start: Start) -> None:
    running = start("run", "--inbox", tmp_path / "in")
    running.wait_for_event("watcher.waiting")
    running.process.send_signal(signal.SIGTERM)
    assert running.finish(seconds=5)[0] == 0
    assert list(tmp_path.glob("in")) == []


@pytest.mark.long
def test_a_daemon_that_has_run_never_ends_with_the_code_for_a_wrong_configuration(tmp_path: Path, start: Start) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    running = start("run", "--inbox", inbox, "--output", tmp_path / "out", "--rescan-seconds", "0.5")
    running.wait_for_event("service.started")
    time.sleep(1)
    inbox.rename(tmp_path / "away")
    make_tree(tmp_path, {"new/.sorter/lock": b"", "new/a.jpg": photo(1)})
    os.link(tmp_path / "new/.sorter/lock", tmp_path / "second name")
    (tmp_path / "new").rename(inbox)
    assert running.finish(seconds=20)[0] == 1
    assert "lock" in running.events("run.failed")[0]["detail"]


@pytest.mark.long
def test_a_gpu_that_does_not_exist_is_one_sentence_and_exit_code_2(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    running = start("run", "--once", "--inbox", inbox, "--device", "cuda:99")
    assert running.finish()[0] == 2
    (line,) = running.errors.read_text().splitlines()
    assert line.startswith("sorter: ")
    assert "CUDA" in line
    assert list(inbox.iterdir()) == [inbox / "a.jpg"]


def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    inbox.chmod(0o555)
    try:
        command = [sys.executable, "-m", "sorter", "run", "--once", "--inbox", str(inbox)]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == 2
        assert b"permission" in done.stderr
    finally:
        inbox.chmod(0o755)


@pytest.mark.long
def test_another_model_sorts_into_its_own_folders(tmp_path: Path, start: Start) -> None:
    model = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    text = (model / "manifest.json").read_text()
    (model / "manifest.json").write_text(text.replace('"cats"', '"katzen"').replace('"dogs"', '"hunde"'))
    inbox = make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    code, _ = start("run", "--once", "--inbox", inbox, "--model", model).finish()
    assert code == 0
    assert set(read_tree(inbox)) <= {"katzen/a.jpg", "hunde/a.jpg"}


@pytest.mark.shared
@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.long)])
def test_the_shipped_model_sorts_real_photos_as_well_as_its_manifest_says(
    every: int, shared: Path, tmp_path: Path, start: Start
) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    with (shared / "photos/labels.csv").open() as rows:
        labels = {row["name"]: row["label"] + "s" for row in list(csv.DictReader(rows))[::every]}
    for name in labels:
        shutil.copy2(shared / "photos" / name, inbox)
    code, out = start("run", "--once", "--inbox", inbox).finish()
    assert code == 0
    right = sum((inbox / folder / name).exists() for name, folder in labels.items())
    stated = json.loads((SHIPPED_MODEL / "manifest.json").read_text())["evaluations"][0]
    assert abs(right - stated["accuracy"] * len(labels)) <= 3, "arithmetic differs a little between processors"
    assert sorted(p.name for p in inbox.iterdir()) == [".sorter", "cats", "dogs"]
    assert f"{len(labels)} photos sorted" in out


@pytest.mark.long
@pytest.mark.shared
def test_every_broken_file_is_sorted_or_failed_with_a_reason(shared: Path, tmp_path: Path, start: Start) -> None:
    inbox = tmp_path / "in"
    shutil.copytree(shared / "bad", inbox)
    make_tree(inbox, read_tree(inbox))
    before = hashes(inbox)
    running = start("run", "--once", "--inbox", inbox)
    code, _ = running.finish()
    assert code == 3
    assert hashes(inbox) == before
    assert {os.path.dirname(name) for name in read_tree(inbox)} <= {"cats", "dogs", "failed"}
    failed = running.events("photo.failed")
    assert len(failed) == len([n for n in read_tree(inbox) if n.startswith("failed/")]) > 0
    assert all(event["reason"] and event["detail"] for event in failed)


@pytest.mark.long
def test_a_sort_connects_to_nothing_outside_the_machine(tmp_path: Path) -> None:
    if shutil.which("strace") is None or subprocess.run(["strace", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs strace, and the right to use it")
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(5)})
    command = ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg", "-o", str(tmp_path / "trace")]
    done = subprocess.run(
        [*command, sys.executable, "-m", "sorter", "run", "--once", "--inbox", str(inbox)],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"5 photos sorted" in done.stdout
    calls = (tmp_path / "trace").read_text().splitlines()
    assert any("sendmsg" in call for call in calls), "the descriptors that the decoders get"
    assert [call for call in calls if "AF_INET" in call or ("connect(" in call and "AF_UNIX" not in call)] == []
