"""One sorter per folder, with real processes; a crash leaves no lock behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Running, make_tree, photo, read_tree

from sorter.errors import ConfigurationError, NotNowError
from sorter.files.lock import Lock

Start = Callable[..., Running]


@pytest.mark.parametrize(("taken", "mode"), [("in", ["--once"]), pytest.param("out", [], marks=pytest.mark.long)])
def test_the_second_sorter_says_who_has_a_folder_and_ends_with_4(
    tmp_path: Path, start: Start, taken: str, mode: list[str]
) -> None:
    make_tree(tmp_path, {"in/a.jpg": photo(1), "out/x": b"x"})
    Lock(tmp_path / taken).take()
    before = read_tree(tmp_path)
    second = start("run", *mode, "--inbox", tmp_path / "in", "--output", tmp_path / "out")
    assert second.finish()[0] == 4
    (detail,) = second.errors.read_text().splitlines()
    assert detail.startswith(f"sorter: {tmp_path / taken}")
    assert re.search(rf"process {os.getpid()} on \S+ since 2\d\d\d-\d\d-\d\d \d\d:\d\d", detail)
    assert "stop that one first" in detail
    assert {name: content for name, content in read_tree(tmp_path).items() if name in before} == before


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        Lock(tmp_path).take()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert f"process {child} " in (tmp_path / ".sorter/lock").read_text()
    Lock(tmp_path).take()


def test_after_the_inbox_is_replaced_the_new_folder_is_locked_and_the_old_one_released(tmp_path: Path) -> None:
    inbox, away = tmp_path / "in", tmp_path / "away"
    inbox.mkdir()
    ours = Lock(inbox)
    ours.take()
    inbox.rename(away)
    ours.take()
    Lock(away).take()
    inbox.mkdir()
    ours.take()
    with pytest.raises(NotNowError, match="stop that one first"):
        Lock(inbox).take()


def test_a_lock_that_is_taken_again_only_where_there_is_one_creates_nothing(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    lock = Lock(inbox)
    lock.take()
    inbox.rename(tmp_path / "away")
    inbox.mkdir()
    lock.take(create=False)
    assert os.listdir(inbox) == []
    assert not lock.is_held
    lock.take()
    assert lock.is_held


def test_taking_a_lock_again_holds_it_once(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        lock.take()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    lock.release()
    Lock(tmp_path).take()


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "folder", "fifo", "linked folder"])
def test_a_planted_lock_is_neither_followed_nor_written(tmp_path: Path, kind: str) -> None:
    make_tree(tmp_path, {"victim": b"precious", "in/x": b"x", "elsewhere/x": b"x"})
    hidden = tmp_path / "in/.sorter"
    if kind == "linked folder":
        hidden.symlink_to(tmp_path / "elsewhere")
    else:
        hidden.mkdir()
    if kind == "symbolic link":
        (hidden / "lock").symlink_to(tmp_path / "victim")
    elif kind == "hard link":
        os.link(tmp_path / "victim", hidden / "lock")
    elif kind == "folder":
        (hidden / "lock").mkdir()
    elif kind == "fifo":
        os.mkfifo(hidden / "lock")
    with pytest.raises(ConfigurationError, match="lock"):
        Lock(tmp_path / "in").take()
    assert read_tree(tmp_path)["victim"] == b"precious"
    assert os.listdir(tmp_path / "elsewhere") == ["x"]


def test_a_held_lock_is_kept_while_its_folder_cannot_be_reached(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    lock = Lock(inbox)
    lock.take()
    shutil.move(inbox / ".sorter", tmp_path / "kept")
    (inbox / ".sorter").write_bytes(b"in the way")
    lock.take()
    (inbox / ".sorter").unlink()
    shutil.move(tmp_path / "kept", inbox / ".sorter")
    with pytest.raises(NotNowError, match="stop that one first"):
        Lock(inbox).take()


def test_a_state_folder_that_is_named_relatively_holds_history_and_locks(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    for arguments in (("run", "--once"), ("history",), ("status",), ("undo", "--last")):
        command = [sys.executable, "-m", "sorter", *arguments, "--inbox", "in", "--state-dir", "state"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "state").glob("*/history.sqlite3"))) == 1
    assert not (tmp_path / "in/.sorter/history.sqlite3").exists()
    assert (tmp_path / "in/a.jpg").exists()


def test_two_sorters_with_one_state_folder_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    first, second = (Lock(tmp_path / "in", state_dir=tmp_path / "state") for _ in range(2))
    first.take()
    with pytest.raises(NotNowError, match="stop that one first"):
        second.take()
    first.release()
    second.take()
    second.release()
