"""What ends or loses events, made to happen to a running daemon: it recovers and leaves no photo behind.

The rescan comes once an hour here, so that it hides nothing: what is sorted was found by the watcher's own recovery.
The engine is `RedGreenEngine`; service, watcher, decoders and mover are the real ones, in a process of their own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import RED, Running, make_tree, plain, read_tree

pytestmark = pytest.mark.skipif(not Path("/proc/sys/fs/inotify").is_dir(), reason="needs inotify")

RECOVERED_SECONDS = 30
"""At most, on a busy machine; on an idle one it takes 1 to 3."""

Daemon = Callable[..., Running]
SEEDS = iter(range(1, 10_000))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Start a daemon that has sorted `first.jpg` and watches."""
    started: list[Running] = []

    def run(inbox: Path, *prefix: str, **settings: object) -> Running:
        name = inbox.name
        drop(inbox, "first.jpg")
        values = {"inbox": str(inbox), "output": str(tmp_path / f"out-{name}"), "settle_seconds": 0.1}
        values |= {"rescan_seconds": 3600, **settings}
        program = str(Path(__file__).with_name("light_daemon.py"))
        command = [*prefix, sys.executable, program, json.dumps(values)]
        running = Running(command, tmp_path / f"log-{name}", {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        started.append(running)
        running.wait_for_event("photo.sorted")
        return running

    yield run
    for running in started:
        running.process.kill()
        running.process.communicate()


def drop(inbox: Path, *names: str) -> None:
    """Write photos, each different from all others."""
    make_tree(inbox, {name: plain(RED, next(SEEDS)) for name in names})


def reasons(running: Running, event: str = "watcher.restarted") -> list[str]:
    return [line["reason"] for line in running.events(event)]


def wait_until_sorted(running: Running, *names: str) -> None:
    """Wait for photos by their base names."""
    wanted = set(names)
    running.wait_for(
        lambda: wanted <= {os.path.basename(line["path"]) for line in running.events("photo.sorted")},
        seconds=RECOVERED_SECONDS,
    )


def photos_in(inbox: Path) -> list[str]:
    return [name for name in read_tree(inbox) if name.endswith(".jpg")]


def as_bound_by_permissions() -> list[str]:
    """What to put before a command so that permissions bind it; nothing for anybody but root."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("as root it needs setpriv, to give up root's way around permissions")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


class Limits:
    """A user namespace in which inotify has limits of its own."""

    def __init__(self, *, watches: int = 1000, instances: int = 1000) -> None:
        set_all = f"echo {watches} > /proc/sys/user/max_inotify_watches"
        set_all += f" && echo {instances} > /proc/sys/user/max_inotify_instances"
        self.prefix = ["unshare", "--user", "--map-root-user", "sh", "-c", f'{set_all} && exec "$@"', "sh"]
        if shutil.which("unshare") is None or subprocess.run([*self.prefix, "true"], capture_output=True).returncode:
            pytest.skip("needs unshare and user namespaces, to use inotify up for one process alone")

    def raise_for(self, running: Running, watches: int) -> None:
        """Give a process that runs in it more watches."""
        command = f"echo {watches} > /proc/sys/user/max_inotify_watches"
        enter = ["nsenter", "--user", "--preserve-credentials", "--target", str(running.process.pid)]
        subprocess.run([*enter, "sh", "-c", command], check=True)


@contextmanager
def mounted(*command: str | Path) -> Iterator[None]:
    """Mount something, and in the end unmount whatever is there; the last word is where."""
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs root, and the right to mount")
    try:
        yield
    finally:
        while subprocess.run(["umount", "-l", command[-1]], capture_output=True).returncode == 0:
            pass


def cpu_seconds(running: Running) -> float:
    fields = Path(f"/proc/{running.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_overflowing_event_queue_leaves_no_photo_behind(tmp_path: Path, daemon: Daemon) -> None:
    inbox = tmp_path / "in"
    running = daemon(inbox)
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if queue > 200_000:
        pytest.skip(f"the event queue holds {queue} events, more than a test should make")
    texts = queue + 4000  # each of them is more than one event
    make_tree(tmp_path, {"note.txt": b"no photo"})
    running.process.send_signal(signal.SIGSTOP)
    for number in range(texts):
        os.link(tmp_path / "note.txt", inbox / f"{number}.txt")
    photos = [f"{number}.jpg" for number in range(20)]
    drop(inbox, *photos)
    running.process.send_signal(signal.SIGCONT)
    running.wait_for(lambda: running.errors.read_bytes().count(b"photo.skipped") == texts)
    running.wait_for(lambda: b"watcher.restarted" in running.errors.read_bytes(), seconds=RECOVERED_SECONDS)
    wait_until_sorted(running, *photos)
    assert reasons(running) == ["more happened at once than the inotify event queue holds"]
    assert photos_in(inbox) == []
    drop(inbox, "after.jpg")
    wait_until_sorted(running, "after.jpg")


@pytest.mark.long
def test_an_inbox_deleted_and_recreated_is_sorted_again(tmp_path: Path, daemon: Daemon) -> None:
    inbox = tmp_path / "in"
    running = daemon(inbox)
    shutil.rmtree(inbox)
    running.wait_for_event("watcher.waiting", seconds=RECOVERED_SECONDS)
    time.sleep(1.5)
    inbox.mkdir()
    drop(inbox, "during.jpg")
    running.wait_for_event("watcher.restarted", seconds=RECOVERED_SECONDS)
    drop(inbox, "after.jpg")
    wait_until_sorted(running, "during.jpg", "after.jpg")
    assert len(reasons(running, "watcher.waiting")) == 1, "it is said once"
    shutil.rmtree(inbox)
    inbox.mkdir()  # at once, and mostly with the inode number of the old one
    drop(inbox, "quick.jpg")
    running.wait_for_event("watcher.restarted", 2, seconds=RECOVERED_SECONDS)
    drop(inbox, "last.jpg")
    wait_until_sorted(running, "quick.jpg", "last.jpg")
    assert reasons(running) == ["the inbox was deleted"] * 2 or "another folder" in reasons(running)[1]
    assert photos_in(inbox) == []


@pytest.mark.long
@pytest.mark.parametrize("output", ["", "sorted"])
def test_an_inbox_that_holds_its_output_is_sorted_again_after_being_deleted_and_recreated(
    tmp_path: Path, daemon: Daemon, output: str
) -> None:
    inbox = tmp_path / "in"
    running = daemon(inbox, output=str(inbox / output))
    shutil.rmtree(inbox)
    running.wait_for_event("watcher.waiting")
    drop(inbox, "a.jpg")
    wait_until_sorted(running, "a.jpg")
    assert (inbox / output / "cats/a.jpg").exists()
    assert running.events("storage.waiting") == []


def test_an_inbox_renamed_away_and_back_is_sorted_again(tmp_path: Path, daemon: Daemon) -> None:
    inbox, away = tmp_path / "in", tmp_path / "away"
    running = daemon(inbox)
    inbox.rename(away)
    drop(away, "at-once.jpg")
    running.wait_for_event("watcher.waiting", seconds=RECOVERED_SECONDS)
    drop(away, "during.jpg")
    away.rename(inbox)
    running.wait_for_event("watcher.restarted", seconds=RECOVERED_SECONDS)
    drop(inbox, "after.jpg")
    wait_until_sorted(running, "at-once.jpg", "during.jpg", "after.jpg")
    assert reasons(running) == ["the inbox was renamed"]
    assert photos_in(inbox) == []


@pytest.mark.long
def test_an_inbox_unmounted_lazily_and_mounted_again_is_sorted_again(tmp_path: Path, daemon: Daemon) -> None:
    disk, inbox = tmp_path / "disk", tmp_path / "in"
    make_tree(tmp_path, {"disk/note.txt": b"x", "in/note.txt": b"x"})
    with mounted("mount", "-t", "tmpfs", "tmpfs", disk), mounted("mount", "--bind", disk, inbox):
        running = daemon(inbox)
        subprocess.run(["umount", "-l", inbox], check=True)
        drop(disk, "at-once.jpg")
        running.wait_for_event("watcher.restarted", seconds=RECOVERED_SECONDS)
        drop(disk, "during.jpg")
        subprocess.run(["mount", "--bind", disk, inbox], check=True)
        running.wait_for_event("watcher.restarted", 2, seconds=RECOVERED_SECONDS)
        drop(inbox, "after.jpg")
        wait_until_sorted(running, "at-once.jpg", "during.jpg", "after.jpg")
        assert reasons(running) == ["the inbox is another folder now"] * 2
        assert photos_in(disk) == []


@pytest.mark.long
def test_a_file_system_unmounted_and_mounted_at_once_is_noticed(tmp_path: Path, daemon: Daemon) -> None:
    # The new one often has the numbers of the old one: the same device, the same inode.
    inbox = tmp_path / "in"
    inbox.mkdir()
    with mounted("mount", "-t", "tmpfs", "tmpfs", inbox):
        running = daemon(inbox)
        subprocess.run(["umount", "-l", inbox], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inbox], check=True)
        drop(inbox, "during.jpg")
        running.wait_for_event("watcher.restarted", seconds=RECOVERED_SECONDS)
        drop(inbox, "after.jpg")
        wait_until_sorted(running, "during.jpg", "after.jpg")
        assert reasons(running)[0] in ("the file system of the inbox was unmounted", "the inbox is another folder now")
        assert photos_in(inbox) == []


@pytest.mark.long
def test_an_inbox_made_unreadable_and_readable_is_sorted_again(tmp_path: Path, daemon: Daemon) -> None:
    inbox = tmp_path / "in"
    running = daemon(inbox, *as_bound_by_permissions())
    inbox.chmod(0o300)
    drop(inbox, "at-once.jpg")
    running.wait_for_event("watcher.waiting", seconds=RECOVERED_SECONDS)
    drop(inbox, "during.jpg")
    time.sleep(1.5)
    assert len(os.listdir(tmp_path / "out-in/cats")) == 1
    inbox.chmod(0o700)
    running.wait_for_event("watcher.restarted", seconds=RECOVERED_SECONDS)
    drop(inbox, "after.jpg")
    wait_until_sorted(running, "at-once.jpg", "during.jpg", "after.jpg")
    assert reasons(running) == ["the inbox is gone or cannot be listed"]
    assert reasons(running, "watcher.waiting") == reasons(running), "it is said once"
    inbox.chmod(0o300)
    drop(inbox, "blink.jpg")
    time.sleep(0.3)
    inbox.chmod(0o700)  # before any look could see it
    wait_until_sorted(running, "blink.jpg")
    assert photos_in(inbox) == []


def test_folders_moved_in_or_made_readable_and_written_to_afterwards_are_sorted(tmp_path: Path, daemon: Daemon) -> None:
    inbox = tmp_path / "in"
    drop(inbox, "shut/a.jpg")
    (inbox / "shut").chmod(0)
    running = daemon(inbox, *as_bound_by_permissions(), recursive=True)
    drop(tmp_path, "album/b.jpg", "album/deep/er/c.jpg")
    (tmp_path / "album").rename(inbox / "album")
    wait_until_sorted(running, "b.jpg", "c.jpg")
    drop(inbox, "album/d.jpg", "album/deep/er/e.jpg", "album/new/f.jpg")
    (inbox / "shut").chmod(0o700)
    wait_until_sorted(running, "a.jpg", "d.jpg", "e.jpg", "f.jpg")
    drop(inbox, "shut/g.jpg")
    wait_until_sorted(running, "g.jpg")
    assert reasons(running) == []


def test_an_exception_in_the_handler_stops_neither_the_daemon_nor_the_watcher(tmp_path: Path, daemon: Daemon) -> None:
    inbox, broken = tmp_path / "in", tmp_path / "broken"
    running = daemon(inbox, fail_on=str(broken))
    broken.touch()
    drop(inbox, "a.jpg")
    wait_until_sorted(running, "a.jpg")
    drop(inbox, "b.jpg")  # it fails again and again
    wait_until_sorted(running, "b.jpg")
    drop(inbox, "c.jpg")
    wait_until_sorted(running, "c.jpg")
    broken.unlink()
    drop(inbox, "d.jpg")
    wait_until_sorted(running, "d.jpg")
    assert reasons(running) == ["RuntimeError: the handler failed"], "it is said once"
    assert photos_in(inbox) == []


def test_without_inotify_watches_left_the_inbox_is_polled_until_there_are_some(tmp_path: Path, daemon: Daemon) -> None:
    limits, inbox = Limits(watches=20), tmp_path / "in"
    drop(inbox, *(f"{number}/a{number}.jpg" for number in range(10)))
    running = daemon(inbox, *limits.prefix, recursive=True, retry_seconds=1)
    wait_until_sorted(running, *(f"a{number}.jpg" for number in range(10)))
    assert reasons(running, "watcher.polling") == []
    names = [f"{number}/b{number}.jpg" for number in range(50)]
    drop(inbox, *names)
    wait_until_sorted(running, *map(os.path.basename, names))
    running.wait_for_event("watcher.polling", seconds=RECOVERED_SECONDS)
    drop(inbox, "5/polled.jpg", "45/polled-too.jpg")
    wait_until_sorted(running, "polled.jpg", "polled-too.jpg")
    (reason,) = reasons(running, "watcher.polling")  # said once
    assert reason == "all inotify watches are in use: raise fs.inotify.max_user_watches"
    limits.raise_for(running, 1000)
    running.wait_for_event("watcher.restarted", seconds=RECOVERED_SECONDS)
    drop(inbox, "45/heard.jpg")
    wait_until_sorted(running, "heard.jpg")
    assert reasons(running) == ["there are inotify watches again"]
    assert photos_in(inbox) == []


@pytest.mark.long
def test_without_an_inotify_instance_left_the_inbox_is_polled(tmp_path: Path, daemon: Daemon) -> None:
    inbox = tmp_path / "in"
    running = daemon(inbox, *Limits(instances=0).prefix)
    assert reasons(running, "watcher.polling") == [
        "all inotify instances are in use: raise fs.inotify.max_user_instances"
    ]
    drop(inbox, "a.jpg")
    wait_until_sorted(running, "a.jpg")
    shutil.rmtree(inbox)
    running.wait_for_event("watcher.waiting", seconds=RECOVERED_SECONDS)
    inbox.mkdir()
    drop(inbox, "b.jpg")
    wait_until_sorted(running, "b.jpg")
    assert photos_in(inbox) == []


def test_a_file_system_without_working_events_is_polled(tmp_path: Path, daemon: Daemon) -> None:
    # What is written to the folder behind it makes no event in front of it, as on a network file system.
    if shutil.which("bindfs") is None:
        pytest.skip("needs bindfs, a file system by FUSE")
    behind, inbox = tmp_path / "behind", tmp_path / "in"
    behind.mkdir()
    inbox.mkdir()
    with mounted("bindfs", behind, inbox):
        running = daemon(inbox)
        drop(behind, "a.jpg", "b.jpg")
        wait_until_sorted(running, "a.jpg", "b.jpg")
        assert [reason.split()[0] for reason in reasons(running, "watcher.polling")] == ["fuse"]
        assert photos_in(behind) == []


@pytest.mark.long
def test_waiting_takes_no_processor_time_and_no_log(tmp_path: Path, daemon: Daemon) -> None:
    gone = daemon(tmp_path / "gone")
    (tmp_path / "gone").rename(tmp_path / "away")
    unheard = daemon(tmp_path / "unheard", fail_on=str(tmp_path / "unheard"))
    drop(tmp_path / "unheard", "a.jpg")
    wait_until_sorted(unheard, "a.jpg")
    idle = daemon(tmp_path / "idle")
    unheard.wait_for_event("watcher.restarted", seconds=RECOVERED_SECONDS)
    gone.wait_for_event("watcher.waiting", seconds=RECOVERED_SECONDS)
    running = [gone, unheard, idle]
    logs = [process.errors.read_bytes() for process in running]
    before = [cpu_seconds(process) for process in running]
    time.sleep(3)
    used = [cpu_seconds(process) - start for process, start in zip(running, before, strict=True)]
    assert max(used) < 0.2, used
    assert [process.errors.read_bytes() for process in running] == logs


def test_nothing_is_written_into_the_empty_mount_point_of_an_inbox(tmp_path: Path, daemon: Daemon) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    with mounted("mount", "-t", "tmpfs", "none", inbox):
        running = daemon(inbox, rescan_seconds=0.5)
        subprocess.run(["umount", "-l", inbox], check=True)
        running.wait_for_event("watcher.restarted", seconds=RECOVERED_SECONDS)
        time.sleep(1)
        assert list(inbox.iterdir()) == []
        subprocess.run(["mount", "-t", "tmpfs", "none", inbox], check=True)
        drop(inbox, "back.jpg")
        wait_until_sorted(running, "back.jpg")
        assert (inbox / ".sorter" / "lock").is_file()
    assert list(inbox.iterdir()) == []
