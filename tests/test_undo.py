"""Bringing photos back: every one under its own name, none over anything, beside a daemon, and after a kill."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LONG_AGO, Running, make_tree, photo, read_tree

Start = Callable[..., Running]


def sorter(*arguments: str | Path, code: int = 0) -> str:
    """Run a command, check its exit code, and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "sorter", *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout


def sort(inbox: Path, *flags: str | Path, code: int = 0) -> None:
    sorter("run", "--once", "--log-format", "json", "--inbox", inbox, *flags, code=code)


def undo(inbox: Path, *flags: str | Path, code: int = 0) -> str:
    return sorter("undo", "--inbox", inbox, *flags, code=code)


def photos(count: int, first: int = 0) -> dict[str, bytes]:
    return {f"{n}.jpg": photo(n) for n in range(first, first + count)}


def described(root: Path) -> dict[str, tuple[Any, ...]]:
    """Every file with its content and what a move must not change; but for the sorter's own."""
    found = {}
    for name, content in read_tree(root).items():
        status = (root / name).stat()
        attributes = {key: os.getxattr(root / name, key) for key in os.listxattr(root / name)}
        found[name] = (content, status.st_mtime_ns, status.st_mode, status.st_ino, attributes)
    return found


@pytest.mark.long
def test_a_tree_of_a_thousand_files_is_sorted_and_undone_to_what_it_was(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    folders = ("", "holiday/", "holiday/sea/", "a folder/", os.fsdecode(b"caf\xe9/"))
    pictures = [photo(n) for n in range(50)]
    make_tree(inbox, {f"{folders[n % 5]}{n % 400:03}-{n // 400}.jpg": pictures[n % 50] for n in range(1000)})
    make_tree(inbox, {"notes.txt": b"hello", "broken.jpg": photo(3)[:300], ".hidden.jpg": photo(4)})
    for n, name in enumerate(sorted(read_tree(inbox))):
        os.utime(inbox / name, ns=(0, int(LONG_AGO * 1e9) + 1_000_000_007 * n))
        os.chmod(inbox / name, 0o640 if n % 2 else 0o600)
        with contextlib.suppress(OSError):  # a file system without them
            os.setxattr(inbox / name, "user.rating", str(n).encode())
    before = described(inbox)
    sort(inbox, "--recursive", code=3)
    assert len([name for name in read_tree(inbox) if name.startswith(("cats/", "dogs/"))]) == 1000
    assert undo(inbox, "--last").splitlines()[-1] == "Restored 1001 photos; 0 could not be restored."
    assert described(inbox) == before
    assert undo(inbox, "--last", code=2) == ""


@pytest.mark.long
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_photos_come_back_from_another_file_system(tmp_path: Path) -> None:
    inbox, output = make_tree(tmp_path / "in", photos(5)), Path("/dev/shm") / f"sorter-{os.getpid()}"
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second file system")
    before = {name: entry[:3] for name, entry in described(inbox).items()}
    try:
        sort(inbox, "--output", output)
        assert read_tree(inbox) == {}
        undo(inbox, "--output", output, "--last")
        assert read_tree(output) == {}
    finally:
        shutil.rmtree(output, ignore_errors=True)
    assert {name: entry[:3] for name, entry in described(inbox).items()} == before


@pytest.mark.long
def test_what_cannot_go_back_is_said_and_the_rest_goes(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(6))
    sort(inbox)
    placed = {path.name: path for path in inbox.glob("*s/*.jpg")}
    make_tree(inbox, {"0.jpg": b"somebody else's"})
    placed["1.jpg"].unlink()
    placed["2.jpg"].write_bytes(b"edited")
    placed["3.jpg"].rename(tmp_path / "elsewhere.jpg")
    placed["3.jpg"].symlink_to(tmp_path / "elsewhere.jpg")
    done = subprocess.run(
        [sys.executable, "-m", "sorter", "undo", "--last", "--inbox", str(inbox)], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stdout == "Restored 2 photos; 4 could not be restored.\n"
    lines = [line.removeprefix("sorter: cannot restore ").split(": ") for line in done.stderr.splitlines()]
    said = {Path(path).name: problem for path, problem in lines}
    assert said == {
        "0.jpg": "another file has its old name",
        "1.jpg": "it is gone",
        "2.jpg": "it was changed or replaced since it was sorted",
        "3.jpg": "it was changed or replaced since it was sorted",
    }
    assert (inbox / "0.jpg").read_bytes() == b"somebody else's"
    assert placed["0.jpg"].read_bytes() == photo(0)
    assert {"4.jpg", "5.jpg"} <= set(read_tree(inbox))


@pytest.mark.long
def test_a_dry_run_says_the_same_and_changes_nothing(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(3))
    sort(inbox)
    make_tree(inbox, {"0.jpg": b"somebody else's"})
    before = {path: path.stat().st_mtime_ns for path in inbox.rglob("*")}
    lines = [json.loads(line) for line in undo(inbox, "--last", "--dry-run", "--json", code=3).splitlines()]
    assert {Path(line["destination"]).name: line["problem"] for line in lines} == {
        "0.jpg": "another file has its old name",
        "1.jpg": None,
        "2.jpg": None,
    }
    assert undo(inbox, "--last", "--dry-run", code=3).splitlines()[-1] == "Would restore 2 photos; 1 would stay."
    assert {path: path.stat().st_mtime_ns for path in inbox.rglob("*")} == before


@pytest.mark.long
def test_one_photo_by_where_it_is_or_was_and_a_whole_folder(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(8))
    sort(inbox)
    placed = {path.name: path for path in inbox.glob("*s/*.jpg")}
    undo(inbox, placed["0.jpg"])
    undo(inbox, inbox / "1.jpg")
    assert {"0.jpg", "1.jpg"} == {name for name in read_tree(inbox) if "/" not in name}
    folder = placed["2.jpg"].parent
    undo(inbox, folder)
    assert list(folder.iterdir()) == []
    undo(inbox, placed["2.jpg"], code=3)  # it is back already


@pytest.mark.long
def test_by_run_and_by_time(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(2))
    sort(inbox)
    runs = {json.loads(line)["run"] for line in sorter("history", "--json", "--inbox", inbox).splitlines()}
    make_tree(inbox, photos(2, first=2))
    sort(inbox)
    assert undo(inbox, "--since", "1h", "--dry-run").splitlines()[-1] == "Would restore 4 photos; 0 would stay."
    assert undo(inbox, "--since", "2999-01-01") == "Restored 0 photos; 0 could not be restored.\n"
    (first,) = runs
    undo(inbox, "--run", first)
    assert {"0.jpg", "1.jpg"} == {name for name in read_tree(inbox) if "/" not in name}
    undo(inbox, "--run", first, code=2)
    undo(inbox, "--run", "nonsense", code=2)
    undo(inbox, "--since", "yesteryear", code=2)
    undo(inbox, code=2)


def test_two_photos_of_one_name_each_get_their_own_back(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a/x.jpg": photo(1), "b/x.jpg": photo(1), "c/x.jpg": photo(2)})
    before = described(inbox)
    sort(inbox, "--recursive")
    shutil.rmtree(inbox / "b")
    undo(inbox, "--last")
    assert described(inbox) == before


@pytest.mark.long
def test_undo_is_itself_in_the_history_and_what_it_put_back_is_left_alone(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(3))
    sort(inbox)
    undo(inbox, "--last")
    lines = [json.loads(line) for line in sorter("history", "--json", "--inbox", inbox).splitlines()]
    assert [line["kind"] for line in lines] == ["sorted"] * 3 + ["undone"] * 3
    assert [line["undone"] for line in lines] == [True] * 3 + [False] * 3
    assert {(line["path"], line["destination"]) for line in lines[:3]} == {
        (line["destination"], line["path"]) for line in lines[3:]
    }
    sort(inbox)
    assert set(read_tree(inbox)) == set(photos(3)), "left alone"
    assert sorter("run", "--once", "--dry-run", "--json", "--log-format", "json", "--inbox", inbox) == ""
    make_tree(inbox, {"1.jpg": photo(77)}, modified=LONG_AGO + 60)
    sort(inbox)
    assert {"0.jpg", "2.jpg"} == {name for name in read_tree(inbox) if "/" not in name}, "one has changed"
    sort(inbox, "--include-undone")
    assert {name for name in read_tree(inbox) if "/" not in name} == set()
    undo(inbox, "--since", "1h")
    assert set(read_tree(inbox)) == set(photos(3))


@pytest.mark.long
def test_it_works_beside_a_daemon_which_leaves_alone_what_was_put_back(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", photos(5))
    daemon = start("run", "--inbox", inbox, "--settle-seconds", "0.1", "--rescan-seconds", "0.3")
    daemon.wait_for_event("photo.sorted", 5)
    undo(inbox, "--last")
    assert set(read_tree(inbox)) == set(photos(5))
    make_tree(inbox, photos(2, first=5))
    daemon.wait_for_event("photo.sorted", 7)
    daemon.wait_for_event("photo.skipped", 5)
    time.sleep(1)  # several rescans
    assert {name for name in read_tree(inbox) if "/" not in name} == set(photos(5))
    make_tree(inbox, {"3.jpg": photo(33)}, modified=LONG_AGO + 60)
    daemon.wait_for_event("photo.sorted", 8)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.finish()[0] == 0
    assert len(daemon.events("photo.sorted")) == 8


@pytest.mark.parametrize("moment", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 5))])
def test_a_killed_undo_leaves_each_photo_once_and_the_next_start_clears_up(moment: int, tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(20))
    sort(inbox)
    code = (
        "import os, signal, sys\n"
        "from sorter.moving import mover\n"
        "from sorter.cli.main import main\n"
        "original, moved = mover.Mover.move, []\n"
        "def move(self, plan):\n"
        "    original(self, plan)\n"
        "    moved.append(plan)\n"
        f"    if len(moved) == {moment}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "mover.Mover.move = move\n"
        f"sys.exit(main(['undo', '--last', '--inbox', {str(inbox)!r}]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert sorted(Path(name).name for name in read_tree(inbox)) == sorted(photos(20))
    sort(inbox)  # recovers, and leaves alone what is back
    back = {name for name in read_tree(inbox) if "/" not in name}
    assert len(back) == moment
    with sqlite3.connect(inbox / ".sorter" / "history.sqlite3") as connection:
        assert connection.execute("SELECT count(*) FROM moves WHERE done IS NULL").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM moves WHERE kind = 'undone'").fetchone() == (moment,)
    undo(inbox, "--last")
    assert set(read_tree(inbox)) == set(photos(20))


@pytest.mark.long
def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(2))
    sort(inbox)
    from sorter.files.lock import UNDOING, Lock

    held = Lock(inbox, UNDOING)
    held.take()
    undo(inbox, "--last", code=4)
    sort(inbox)  # a sort starts all the same
    held.release()
    undo(inbox, "--last")
