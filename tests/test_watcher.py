"""The watcher on a real file system with real inotify and an injected clock."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tree
from structlog.testing import capture_logs

from sorter.files import file_systems
from sorter.inbox import watcher as watcher_module
from sorter.inbox.listener import Listener
from sorter.inbox.scan import Inbox
from sorter.inbox.watcher import CHECK_SECONDS, GATHER_SECONDS, MAX_NAMES, POLL_SECONDS, STABLE_SECONDS, Watcher

TURNS = itertools.count(1)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watcher]]:
    watchers: list[Watcher] = []

    def make(*, recursive: bool = False) -> Watcher:
        (tmp_path / "in").mkdir(exist_ok=True)
        excluded = frozenset({os.path.realpath(tmp_path / "in/cats")})
        inbox = Inbox(tmp_path / "in", recursive=recursive, excluded=excluded, settle_seconds=0)
        watchers.append(Watcher(inbox))
        watchers[-1].start(next(TURNS) * 1000.0)
        watchers[-1].take_rescan()
        if watchers[-1].poll_seconds == POLL_SECONDS:
            pytest.skip("inotify does not work in the temporary folder")
        return watchers[-1]

    yield make
    for made in watchers:
        made.stop()


def noticed(watcher: Watcher, *, seconds: float = 10) -> set[str]:
    """The names that events bring, until none come any more."""
    names: set[str] = set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        watcher.wait(0.3)
        new = set(watcher.take_names())
        if names and not new:
            break
        names |= new
    return names


def supervised(watcher: Watcher, turns: int = 3) -> list[str]:
    """The log of a few turns of supervision, each late enough after the last to look."""
    with capture_logs() as events:
        for _ in range(turns):
            watcher.supervise(next(TURNS) * 1000.0)
    return [f"{event['event']}: {event.get('reason')}" for event in events]


def until_supervised(watcher: Watcher) -> list[str]:
    """The same, once there is anything in it: events take a moment."""
    deadline = time.monotonic() + 10
    while not (lines := supervised(watcher, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return lines


def test_written_and_renamed_files_are_noticed(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    (tmp_path / "in/ä b.jpg").write_bytes(b"x")
    assert noticed(watcher) == {"ä b.jpg"}
    make_tree(tmp_path, {"c.jpg": b"x"})
    os.rename(tmp_path / "c.jpg", tmp_path / "in" / os.fsdecode(b"\xff.jpg"))
    assert noticed(watcher) == {os.fsdecode(b"\xff.jpg")}


def test_a_file_made_readable_is_noticed(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"x"})
    (tmp_path / "in/a.jpg").chmod(0)
    watcher = watch()
    (tmp_path / "in/a.jpg").chmod(0o600)
    assert noticed(watcher) == {"a.jpg"}


def test_files_that_leave_the_inbox_are_not_noticed(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"x", "b.jpg": b"x", "cats/c.jpg": b"x"})
    watcher = watch(recursive=True)
    os.rename(tmp_path / "in/a.jpg", tmp_path / "in/cats/a.jpg")
    os.unlink(tmp_path / "in/b.jpg")
    assert noticed(watcher, seconds=0.5) == set()


def test_subfolders_are_ignored_without_recursive(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    make_tree(tmp_path / "in", {"sub/a.jpg": b"x"})
    watcher = watch()
    make_tree(tmp_path / "in", {"sub/b.jpg": b"x", "new/c.jpg": b"x"})
    assert noticed(watcher, seconds=0.5) == set()


def test_a_folder_moved_in_is_noticed_file_by_file_and_watched_from_then_on(
    tmp_path: Path, watch: Callable[..., Watcher]
) -> None:
    watcher = watch(recursive=True)
    make_tree(tmp_path / "new", {"a.jpg": b"x", "deep/er/b.jpg": b"x", ".hidden/c.jpg": b"x"})
    os.rename(tmp_path / "new", tmp_path / "in/new")
    assert noticed(watcher) == {"new/a.jpg", "new/deep/er/b.jpg"}
    make_tree(tmp_path / "in", {"new/deep/er/d.jpg": b"x", "new/.hidden/e.jpg": b"x"})
    assert noticed(watcher) == {"new/deep/er/d.jpg"}


def test_folders_created_inside_each_other_are_all_watched(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch(recursive=True)
    names = {f"a{n}/b/c/d/{n}.jpg" for n in range(200)}
    make_tree(tmp_path / "in", dict.fromkeys(names, b"x"))
    assert noticed(watcher) == names


def test_a_folder_moved_within_the_inbox_is_watched_under_its_new_name(
    tmp_path: Path, watch: Callable[..., Watcher]
) -> None:
    make_tree(tmp_path / "in", {"old/deep/a.jpg": b"x", "older/b.jpg": b"x"})
    watcher = watch(recursive=True)
    os.rename(tmp_path / "in/old", tmp_path / "in/new")
    assert noticed(watcher) == {"new/deep/a.jpg"}
    make_tree(tmp_path / "in", {"new/deep/c.jpg": b"x", "older/d.jpg": b"x"})
    assert noticed(watcher) == {"new/deep/c.jpg", "older/d.jpg"}


def test_a_folder_moved_out_of_the_inbox_is_no_longer_watched(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    make_tree(tmp_path / "in", {"old/deep/a.jpg": b"x"})
    watcher = watch(recursive=True)
    os.rename(tmp_path / "in/old", tmp_path / "old")
    make_tree(tmp_path / "in", {"b.jpg": b"x"})
    assert noticed(watcher) == {"b.jpg"}
    make_tree(tmp_path, {"old/deep/c.jpg": b"x", "old/d.jpg": b"x"})
    assert noticed(watcher, seconds=0.5) == set()


def test_a_subfolder_deleted_and_recreated_is_watched(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    watcher = watch(recursive=True)
    for turn in range(3):
        (tmp_path / "in/sub").rmdir()
        (tmp_path / "in/sub").mkdir()
        make_tree(tmp_path, {"in/sub/a.jpg": b"x"})
        assert noticed(watcher) == {"sub/a.jpg"}, turn
        (tmp_path / "in/sub/a.jpg").unlink()


def test_too_many_names_to_remember_request_a_rescan(watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    for number in range(MAX_NAMES + 5):
        watcher.notice(f"{number}.jpg")
    assert len(watcher.take_names()) == MAX_NAMES
    assert watcher.take_rescan()
    assert not watcher.take_rescan()


def test_nothing_is_logged_while_nothing_is_wrong(watch: Callable[..., Watcher]) -> None:
    assert supervised(watch()) == []


def test_an_inbox_deleted_and_recreated_is_watched_again(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    (tmp_path / "in").rmdir()
    assert [line.split(":")[0] for line in until_supervised(watcher)] == ["watcher.waiting"]
    assert supervised(watcher) == [], "logged once"
    (tmp_path / "in").mkdir()
    assert [line.split(":")[0] for line in supervised(watcher)] == ["watcher.restarted"]
    assert watcher.take_rescan()
    (tmp_path / "in/a.jpg").write_bytes(b"x")
    assert noticed(watcher) == {"a.jpg"}


def test_an_inbox_recreated_between_two_checks_is_noticed(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    # The new folder often gets the old one's inode number, so that alone does not tell them apart.
    watcher = watch()
    (tmp_path / "in").rmdir()
    (tmp_path / "in").mkdir()
    assert until_supervised(watcher)[-1].startswith("watcher.restarted")
    (tmp_path / "in/a.jpg").write_bytes(b"x")
    assert noticed(watcher) == {"a.jpg"}


def test_an_inbox_deleted_while_somebody_holds_it_open_is_noticed(
    tmp_path: Path, watch: Callable[..., Watcher]
) -> None:
    # The kernel reports no deletion as long as somebody holds the folder.
    watcher = watch()
    held = os.open(tmp_path / "in", os.O_RDONLY)
    try:
        (tmp_path / "in").rmdir()
        (tmp_path / "in").mkdir()
        assert supervised(watcher, 1) == ["watcher.restarted: the inbox is another folder now"]
    finally:
        os.close(held)
    (tmp_path / "in/a.jpg").write_bytes(b"x")
    assert noticed(watcher) == {"a.jpg"}


def test_an_inbox_renamed_away_and_back_is_watched_again(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    (tmp_path / "in").rename(tmp_path / "away")
    (waiting,) = until_supervised(watcher)
    assert waiting.startswith("watcher.waiting: the inbox ")
    (tmp_path / "away").rename(tmp_path / "in")
    assert supervised(watcher) == [waiting.replace("waiting", "restarted")]


def test_a_folder_above_the_inbox_that_is_renamed_is_noticed(tmp_path: Path) -> None:
    # There is no event for that.
    (tmp_path / "above/in").mkdir(parents=True)
    inbox = Inbox(tmp_path / "above/in", recursive=False, excluded=frozenset(), settle_seconds=0)
    watcher = Watcher(inbox)
    watcher.start(next(TURNS) * 1000.0)
    (tmp_path / "above").rename(tmp_path / "elsewhere")
    assert supervised(watcher) == ["watcher.waiting: the inbox is gone or cannot be listed"]
    (tmp_path / "above/in").mkdir(parents=True)
    assert supervised(watcher) == ["watcher.restarted: the inbox is gone or cannot be listed"]
    (tmp_path / "above/in/a.jpg").write_bytes(b"x")
    assert noticed(watcher) == {"a.jpg"}
    watcher.stop()


def test_an_inbox_link_that_is_pointed_elsewhere_is_noticed(tmp_path: Path) -> None:
    make_tree(tmp_path, {"first/a.jpg": b"x", "second/b.jpg": b"x"})
    (tmp_path / "in").symlink_to("first")
    watcher = Watcher(Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0))
    watcher.start(next(TURNS) * 1000.0)
    (tmp_path / "first/c.jpg").write_bytes(b"x")
    assert noticed(watcher) == {"c.jpg"}
    (tmp_path / "new").symlink_to("second")
    (tmp_path / "new").rename(tmp_path / "in")
    assert supervised(watcher) == ["watcher.restarted: the inbox is another folder now"]
    (tmp_path / "second/d.jpg").write_bytes(b"x")
    assert noticed(watcher) == {"d.jpg"}
    watcher.stop()


def test_a_listener_that_keeps_failing_is_restarted_less_and_less_often_and_logged_once(
    watch: Callable[..., Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    now = next(TURNS) * 1000.0

    class Failing(Listener):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.failure = "it does not work"
            starts.append(now)

    monkeypatch.setattr(watcher_module, "Listener", Failing)
    watcher = watch()
    starts.clear()
    with capture_logs() as events:
        for _ in range(900):
            now += 1
            watcher.supervise(now)
    assert [event["event"] for event in events] == ["watcher.restarted"]
    waits = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert waits == sorted(waits)
    assert 5 < len(starts) < 30
    assert waits[-1] >= STABLE_SECONDS


def test_a_memory_file_system_does_not_count_as_a_network_file_system() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("needs /dev/shm")
    assert not file_systems.is_network(memory)


def test_the_folder_is_checked_no_more_often_than_promised(tmp_path: Path) -> None:
    (tmp_path / "above/in").mkdir(parents=True)
    watcher = Watcher(Inbox(tmp_path / "above/in", recursive=False, excluded=frozenset(), settle_seconds=0))
    watcher.start(next(TURNS) * 1000.0)
    watcher.supervise(start := next(TURNS) * 1000.0)
    assert watcher.next_check == start + CHECK_SECONDS
    (tmp_path / "above").rename(tmp_path / "elsewhere")  # which causes no event
    with capture_logs() as events:
        watcher.supervise(start + CHECK_SECONDS - 0.1)
        assert events == []
        watcher.supervise(start + CHECK_SECONDS)
        assert len(events) == 1
    watcher.stop()


def test_a_signal_handler_ends_the_wait(tmp_path: Path) -> None:
    # In a process of its own: what test runners do with signals and threads is theirs.
    program = """
import signal, sys, time
from pathlib import Path
from sorter.inbox.scan import Inbox
from sorter.inbox.watcher import Watcher
watcher = Watcher(Inbox(Path(sys.argv[1]), recursive=False, excluded=frozenset(), settle_seconds=0))
watcher.start(time.monotonic())
signal.signal(signal.SIGALRM, lambda *_: watcher.wake())
signal.setitimer(signal.ITIMER_REAL, 0.2)
began = time.monotonic()
watcher.wait(30)
print(time.monotonic() - began < 10)
watcher.stop()
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_endless_events_run_the_loop_at_most_twenty_times_a_second(watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    began = time.monotonic()
    for _ in range(10):
        watcher.wake()
        watcher.wait(30)
    assert time.monotonic() - began >= 10 * GATHER_SECONDS
    for _ in range(100_000):  # more than a pipe holds
        watcher.wake()
    watcher.wait(30)
    began = time.monotonic()
    watcher.wait(0.3)
    assert time.monotonic() - began >= 0.3, "what was heard wakes nobody again"


def test_stopping_releases_every_descriptor(watch: Callable[..., Watcher]) -> None:
    watcher = watch(recursive=True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        watcher.stop()
        watcher.start(0.0)
    assert len(os.listdir("/proc/self/fd")) == before
