"""Bringing photos back after kills, from folders that changed, however things are named, whoever listens."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from conftest import LONG_AGO, Running, as_nobody, make_tree, photo, read_tree
from test_undo import photos, sort, sorter, undo

from sorter.cli.main import main

Start = Callable[..., Running]

pytestmark = pytest.mark.long


def killed(method: str, moment: int, *arguments: str | Path) -> None:
    """Run a command that is killed after the `moment`th call of a method of the mover or the history."""
    package, module, owner = ("moving", "mover", "Mover") if method == "move" else ("history", "store", "History")
    code = (
        "import os, signal, sys\n"
        f"from sorter.{package} import {module}\n"
        "from sorter.cli.main import main\n"
        f"original, calls = {module}.{owner}.{method}, []\n"
        "def deadly(self, *arguments):\n"
        "    original(self, *arguments)\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {moment}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{module}.{owner}.{method} = deadly\n"
        f"sys.exit(main({[*map(str, arguments)]!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL


# --- after a kill ---


def test_the_last_run_is_brought_back_also_if_it_was_killed_before_it_wrote_that_down(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(3))
    sort(inbox)
    make_tree(inbox, photos(6, first=3))
    killed("move", 6, "run", "--once", "--inbox", inbox)
    assert undo(inbox, "--last") == "Restored 6 photos; 0 could not be restored.\n"
    assert {name for name in read_tree(inbox) if "/" not in name} == set(photos(6, first=3))


@pytest.mark.parametrize(("method", "moment"), [("intend", 1), ("move", 3)])
def test_an_undo_goes_on_where_another_was_killed(method: str, moment: int, tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(6))
    before = read_tree(inbox)
    sort(inbox)
    killed(method, moment, "undo", "--last", "--inbox", inbox)
    lines = undo(inbox, "--last", "--json").splitlines()
    assert all(json.loads(line)["problem"] is None for line in lines)
    assert read_tree(inbox) == before


def test_moves_of_a_sorter_that_is_at_work_are_left_to_it(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", photos(4))
    daemon = start("run", "--inbox", inbox)
    daemon.wait_for_event("photo.sorted", 4)
    assert undo(inbox, "--last") == "Restored 4 photos; 0 could not be restored.\n"
    assert daemon.process.poll() is None


# --- folders that changed ---


@pytest.mark.parametrize("obstacle", ["link", "file"])
def test_a_folder_that_takes_no_photo_back_holds_up_no_other(obstacle: str, tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"deep/0.jpg": photo(0), "deep/1.jpg": photo(1), **photos(3, first=2)})
    sort(inbox, "--recursive", "--output", tmp_path / "out")
    (inbox / "deep").rmdir()
    (tmp_path / "elsewhere").mkdir()
    if obstacle == "link":
        (inbox / "deep").symlink_to(tmp_path / "elsewhere")
    else:
        (inbox / "deep").write_bytes(b"a file")
    flags = ("--output", tmp_path / "out", "--last")
    assert undo(inbox, *flags, "--dry-run", code=3).splitlines()[-1] == "Would restore 3 photos; 2 would stay."
    assert undo(inbox, *flags, code=3) == "Restored 3 photos; 2 could not be restored.\n"
    assert set(photos(3, first=2)) <= set(read_tree(inbox))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def nobodys(inbox: Path) -> None:
    """Give a tree to the user that `as_nobody` is."""
    if os.geteuid() == 0:
        for path in (inbox, *inbox.rglob("*")):
            os.chown(path, 65534, 65534)


def test_a_folder_without_permission_holds_up_no_other(open_to_all: Path) -> None:
    inbox = make_tree(open_to_all / "in", {"deep/0.jpg": photo(0), "1.jpg": photo(1)})
    sort(inbox, "--recursive")
    nobodys(inbox)
    assert main(["undo", "--last", "--dry-run", "--inbox", str(inbox)]) == 0  # what it imports, nobody may not read
    (inbox / "deep").chmod(0o555)

    def bring_back() -> None:
        assert main(["undo", "--last", "--dry-run", "--inbox", str(inbox)]) == 3
        assert main(["undo", "--last", "--inbox", str(inbox)]) == 3

    as_nobody(bring_back)
    (inbox / "deep").chmod(0o755)
    assert (inbox / "1.jpg").read_bytes() == photo(1)
    assert list((inbox / "deep").iterdir()) == []


def test_a_history_that_may_not_be_read_is_a_sentence(open_to_all: Path) -> None:
    inbox = make_tree(open_to_all / "in", photos(1))
    sort(inbox)
    nobodys(inbox)
    assert main(["status", "--inbox", str(inbox)]) == 0  # what it imports, nobody may not read
    (inbox / ".sorter/history.sqlite3").chmod(0)

    structlog.reset_defaults()  # where it is set up, errors are lines of the log

    def ask() -> None:
        for command in ("history", "status", "undo"):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                assert main([command, "--inbox", str(inbox), *(["--last"] if command == "undo" else [])]) == 2
            assert "cannot be read (Permission denied): give this user permission to" in said.getvalue()

    as_nobody(ask)


# --- however it is named ---


def test_what_was_put_back_is_left_alone_by_whatever_name_its_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = make_tree(tmp_path / "in", photos(3))
    (tmp_path / "link").symlink_to(inbox)
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    before = read_tree(inbox)
    sort(Path("../in"))
    assert undo(tmp_path / "link", "../in") == "Restored 3 photos; 0 could not be restored.\n"
    for name in ("../in", tmp_path / "link", inbox):
        sort(Path(name))
        assert read_tree(inbox) == before


def test_folders_are_named_by_where_photos_are_or_were(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"sea/0.jpg": photo(0), "sea/deep/1.jpg": photo(1), "seaside/2.jpg": photo(2)})
    flags = ("--output", tmp_path / "out")
    before = read_tree(inbox)
    sort(inbox, "--recursive", *flags)
    undo(inbox, *flags, inbox / "sea")
    assert set(read_tree(inbox)) == {"sea/0.jpg", "sea/deep/1.jpg"}
    undo(inbox, *flags, tmp_path / "out")
    assert read_tree(inbox) == before
    undo(inbox, *flags, inbox, code=3)  # they are back


def test_names_of_any_bytes_name_photos(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    inbox = make_tree(tmp_path / "in", {name: photo(0)})
    sort(inbox)
    undo(inbox, inbox / os.fsdecode(b"caf\xe8.jpg"), code=3)
    undo(inbox, inbox / name)
    assert set(read_tree(inbox)) == {name}


def test_an_unset_variable_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = make_tree(tmp_path / "in", photos(2))
    sort(inbox)
    monkeypatch.chdir(inbox)
    undo(Path("."), "", code=2)
    assert not any(name in read_tree(inbox) for name in photos(2))


# --- sidecars ---


def test_a_sidecar_that_came_later_goes_back_with_its_photo(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"IMG_1.jpg": photo(0)})
    sort(inbox)
    run = json.loads(sorter("history", "--json", "--inbox", inbox))["run"]
    make_tree(inbox, {"IMG_1.mov": b"its film"})
    sort(inbox)
    assert undo(inbox, "--run", run) == "Restored 1 photo and 1 sidecar; 0 could not be restored.\n"
    assert set(read_tree(inbox)) == {"IMG_1.jpg", "IMG_1.mov"}


def test_a_photo_takes_no_sidecar_of_another_along(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"IMG_1.jpg": photo(0)})
    sort(inbox)
    make_tree(inbox, {"IMG_1.JPEG": photo(0, (64, 96)), "IMG_1.MOV": b"of the second"})
    sort(inbox)
    assert undo(inbox, inbox / "IMG_1.jpg") == "Restored 1 photo; 0 could not be restored.\n"
    assert undo(inbox, inbox / "IMG_1.JPEG") == "Restored 1 photo and 1 sidecar; 0 could not be restored.\n"


def test_a_dry_run_knows_what_stays_with_what(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(0), "a.xmp": b"a's", "b.jpg": photo(1)})
    sort(inbox)
    make_tree(inbox, {"b.jpg": photo(2)})
    sort(inbox)  # two that were called b.jpg
    make_tree(inbox, {"a.jpg": b"somebody else's"})
    told = undo(inbox, "--since", "1h", "--dry-run", code=3).splitlines()
    assert told[-1] == "Would restore 1 photo; 3 would stay."
    assert told[0].endswith(f" → {inbox / 'b.jpg'}")
    assert undo(inbox, "--since", "1h", code=3) == "Restored 1 photo; 3 could not be restored.\n"
    assert (inbox / "b.jpg").read_bytes() == photo(2)


def test_a_name_without_room_for_a_sidecar_holds_up_no_other_photo(tmp_path: Path) -> None:
    long = "a" * 247 + ".jpg"
    inbox = make_tree(tmp_path / "in", {long: photo(0), f"{long}.xmp": b"its", "b.jpg": photo(1)})
    make_tree(inbox, {f"{folder}/{long}": photo(2) for folder in ("cats", "dogs")})
    sort(inbox)
    names = [Path(name).name for name in read_tree(inbox) if "/" in name]
    (numbered,) = (name for name in names if name.startswith("a") and name.endswith("-1.jpg"))
    assert {f"{numbered}.xmp", "b.jpg"} <= set(names)


# --- whoever listens ---


@pytest.mark.parametrize("flags", [["--json"], []])
def test_it_ends_what_it_began_though_nobody_listens(flags: list[str], tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(130))
    before = read_tree(inbox)
    sort(inbox)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sorter", "undo", "--last", "--inbox", str(inbox), *flags]
    done = subprocess.run(command, stdout=writing, stderr=writing, timeout=100)
    os.close(writing)
    assert done.returncode == 0
    assert read_tree(inbox) == before


@pytest.mark.parametrize("command", [["status"], ["undo", "--last"]])
def test_a_closed_standard_output_is_no_error(command: list[str], tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(2))
    sort(inbox)
    words = [sys.executable, "-m", "sorter", *command, "--inbox", str(inbox)]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_standard_output_is_json_also_after_a_kill(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", photos(4))
    sort(inbox)
    killed("move", 2, "undo", "--last", "--inbox", inbox)
    assert all(json.loads(line) for line in undo(inbox, "--since", "1d", "--json").splitlines())


# --- beside a daemon ---


@pytest.mark.long
def test_what_a_daemon_sorts_after_an_undo_is_in_the_history_although_it_is_killed(
    tmp_path: Path, start: Start
) -> None:
    inbox = make_tree(tmp_path / "in", photos(1))
    daemon = start("run", "--inbox", inbox, "--rescan-seconds", "0.3")
    daemon.wait_for_event("photo.sorted", 1)
    undo(inbox, "--last")
    make_tree(inbox, photos(1, first=1), modified=LONG_AGO)
    daemon.wait_for_event("photo.sorted", 2)
    daemon.process.kill()
    daemon.process.wait()
    entries = [json.loads(line) for line in sorter("history", "--json", "--inbox", inbox).splitlines()]
    assert [Path(entry["path"]).name for entry in entries if entry["kind"] == "sorted"] == ["0.jpg", "1.jpg"]


def test_a_daemon_whose_history_was_taken_away_leaves_alone_what_is_put_back(tmp_path: Path, start: Start) -> None:
    inbox, output = make_tree(tmp_path / "in", photos(1)), tmp_path / "out"
    daemon = start("run", "--inbox", inbox, "--output", output, "--rescan-seconds", "0.3")
    daemon.wait_for_event("photo.sorted", 1)
    shutil.rmtree(output / ".sorter")
    make_tree(inbox, photos(2, first=1))
    daemon.wait_for_event("photo.sorted", 3)
    undo(inbox, "--output", output, "--last")
    daemon.wait_for_event("photo.skipped", 2)
    assert set(read_tree(inbox)) >= set(photos(2, first=1))


def test_the_status_of_an_output_knows_the_daemon_that_sorts_into_it(tmp_path: Path, start: Start) -> None:
    inbox, output = make_tree(tmp_path / "in", photos(1), modified=LONG_AGO), tmp_path / "out"
    daemon = start("run", "--inbox", inbox, "--output", output)
    daemon.wait_for_event("photo.sorted", 1)
    said = sorter("status", "--output", output, "--inbox", tmp_path / "nowhere")
    assert f"running, process {daemon.process.pid} " in said
    assert f"there is no folder {tmp_path / 'nowhere'}" in said
