"""The watcher on a real file system with real inotify; its clock is given to it."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import make_tree
from structlog.testing import capture_logs

from sorter import file_systems
from sorter.watcher import CHECK_SECONDS, MAX_NAMES, POLL_SECONDS, Watcher


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watcher]]:
    watchers: list[Watcher] = []

    def make(*, recursive: bool = False) -> Watcher:
        (tmp_path / "in").mkdir(exist_ok=True)
        watchers.append(Watcher(tmp_path / "in", recursive=recursive))
        watchers[-1].start()
        if watchers[-1].poll_seconds == POLL_SECONDS:
            pytest.skip("inotify does not work in the temporary folder")
        return watchers[-1]

    yield make
    for made in watchers:
        made.stop()


def heard(watcher: Watcher, *, seconds: float = 10) -> set[str]:
    """The names that events bring, until none come any more."""
    names: set[str] = set()
    deadline = time.monotonic() + seconds
    while not names and time.monotonic() < deadline:
        watcher.wait(0.1)
        names |= set(watcher.take_names())
    watcher.wait(0.2)
    return names | set(watcher.take_names())


TURNS = itertools.count(1)


def supervised(watcher: Watcher, turns: int = 3) -> list[str]:
    """The log of a few turns of supervision, each late enough after the last to look."""
    with capture_logs() as events:
        for _ in range(turns):
            watcher.supervise(next(TURNS) * 1000.0)
    return [f"{event['event']}: {event.get('reason')}" for event in events]


def test_a_written_and_a_renamed_file_are_named(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    (tmp_path / "in/ä b.jpg").write_bytes(b"x")
    assert heard(watcher) == {"ä b.jpg"}
    make_tree(tmp_path, {"c.jpg": b"x"})
    os.rename(tmp_path / "c.jpg", tmp_path / "in" / os.fsdecode(b"\xff.jpg"))
    assert heard(watcher) == {os.fsdecode(b"\xff.jpg")}


def test_a_folder_moved_in_asks_for_a_rescan(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch(recursive=True)
    make_tree(tmp_path / "new", {"a.jpg": b"x"})
    os.rename(tmp_path / "new", tmp_path / "in/new")
    deadline = time.monotonic() + 10
    while not watcher.take_rescan():
        watcher.wait(0.1)
        assert time.monotonic() < deadline


def test_more_names_than_are_worth_remembering_ask_for_a_rescan(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path, recursive=False)
    for number in range(MAX_NAMES + 5):
        watcher.notice(str(tmp_path / f"{number}.jpg"), folder=False)
    assert len(watcher.take_names()) == MAX_NAMES
    assert watcher.take_rescan()
    assert not watcher.take_rescan()


def test_nothing_is_said_while_all_is_well(watch: Callable[..., Watcher]) -> None:
    assert supervised(watch()) == []


def test_an_inbox_deleted_and_recreated_is_watched_again(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    (tmp_path / "in").rmdir()
    assert [line.split(":")[0] for line in supervised(watcher, 1)] == ["watcher.waiting"]
    (tmp_path / "in").mkdir()
    assert [line.split(":")[0] for line in supervised(watcher)] == ["watcher.restarted"]
    assert watcher.take_rescan()
    (tmp_path / "in/a.jpg").write_bytes(b"x")
    assert heard(watcher) == {"a.jpg"}


def test_an_inbox_recreated_between_two_looks_is_noticed(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    # The new folder often gets the old one's inode number, so that alone does not tell them apart.
    watcher = watch()
    (tmp_path / "in").rmdir()
    (tmp_path / "in").mkdir()
    deadline = time.monotonic() + 10
    while not (lines := supervised(watcher, 2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert lines[-1].startswith("watcher.restarted")
    (tmp_path / "in/a.jpg").write_bytes(b"x")
    assert heard(watcher) == {"a.jpg"}


def test_an_inbox_renamed_away_and_back_is_watched_again(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    (tmp_path / "in").rename(tmp_path / "away")
    assert supervised(watcher, 1) == ["watcher.waiting: the inbox is gone or cannot be listed"]
    (tmp_path / "away").rename(tmp_path / "in")
    assert supervised(watcher) == ["watcher.restarted: the inbox is gone or cannot be listed"]


def test_where_inotify_is_used_up_the_inbox_is_polled_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used_up(_watcher: Watcher) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(Watcher, "_observe", used_up)
    watcher = Watcher(tmp_path, recursive=False)
    with capture_logs() as events:
        watcher.start()
    assert watcher.poll_seconds == POLL_SECONDS
    assert "max_user_watches" in events[0]["reason"]
    assert events[0]["event"] == "watcher.polling"


def test_a_memory_file_system_is_not_taken_for_a_deaf_one() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("needs /dev/shm")
    assert not file_systems.is_network(memory)


def test_supervision_looks_no_more_often_than_it_says(tmp_path: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch()
    watcher.supervise(100.0)
    (tmp_path / "in").rmdir()
    with capture_logs() as events:
        watcher.supervise(100.0 + CHECK_SECONDS - 0.1)
    assert events == []
