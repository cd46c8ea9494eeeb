"""`sorter history` and `sorter status`; `sorter run --dry-run --json`."""

import argparse
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
from conftest import Running, make_tree, photo, read_tree

from sorter.cli.main import main
from sorter.cli.options import point_in_time

Start = Callable[..., Running]

# As version 1 made it. It must stay readable, so it is not taken from the code.
_FIRST_SCHEMA = """
PRAGMA application_id = 0x736F7274;
PRAGMA user_version = 1;
CREATE TABLE runs (
    id TEXT PRIMARY KEY, started REAL NOT NULL, finished REAL, version TEXT NOT NULL, model TEXT NOT NULL
) STRICT;
CREATE TABLE moves (
    id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, run TEXT NOT NULL REFERENCES runs (id), done REAL,
    root BLOB NOT NULL, source BLOB NOT NULL, folder TEXT NOT NULL, name BLOB NOT NULL, device INTEGER NOT NULL,
    inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns TEXT NOT NULL, kind TEXT NOT NULL, label TEXT,
    confidence REAL, reason TEXT, detail TEXT
) STRICT;
CREATE INDEX moves_unfinished ON moves (id) WHERE done IS NULL;
INSERT INTO runs VALUES ('r', 1.0, 2.0, '0', 'm');
"""


def sorter(*arguments: str | Path, code: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "sorter", *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


@dataclass(frozen=True)
class Printed:
    """What a command prints to standard output and standard error."""

    stdout: str
    stderr: str


class Commands:
    """Runs commands that only read, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path, code: int = 0) -> Printed:
        assert main([*map(str, arguments)]) == code
        return Printed(*self.capsys.readouterr())


@pytest.fixture
def reading(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="module")
def sorted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"{n}.jpg" for n in range(5)] + [os.fsdecode(b"caf\xe9.jpg"), "new\nline.jpg"]
    inbox = make_tree(tmp_path_factory.mktemp("sorted"), {name: photo(n) for n, name in enumerate(names)})
    make_tree(inbox, {"broken.jpg": photo(5)[:200], "notes.txt": b"hello"})
    sorter("run", "--once", "--log-format", "json", "--inbox", inbox, code=3)
    return inbox


def test_the_history_says_what_went_where_and_why(sorted_once: Path, reading: Commands) -> None:
    lines = [json.loads(line) for line in reading("history", "--json", "--inbox", sorted_once).stdout.splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert Path(line["destination"]).is_file()
        assert Path(line["path"]).parent == sorted_once
        if line["kind"] == "sorted":
            assert 0.5 <= line["confidence"] <= 1
            assert line["destination"] == str(sorted_once / f"{line['label']}s" / Path(line["path"]).name)
            assert line["model"] == "catdog-resnet50"
    (failed,) = (line for line in lines if line["kind"] == "failed")
    assert failed["reason"] == "truncated"


def test_a_person_gets_a_table_with_one_line_per_photo(sorted_once: Path, reading: Commands) -> None:
    lines = reading("history", "--inbox", sorted_once).stdout.splitlines()
    assert lines[0].split() == ["when", "run", "photo", "went", "to", "why"]
    assert len(lines) == 9
    assert all("%" in line or "truncated" in line for line in lines[1:])
    assert not any(str(sorted_once) in line for line in lines)
    assert len(reading("history", "--limit", "3", "--inbox", sorted_once).stdout.splitlines()) == 4
    assert "No photos match." in reading("history", "--since", "2999-01-01", "--inbox", sorted_once).stdout


def test_a_run_that_does_not_exist_is_an_error(sorted_once: Path, reading: Commands) -> None:
    for command in ("history", "undo"):
        done = reading(command, "--run", "zzz", "--inbox", sorted_once, code=2)
        assert done.stdout == ""
        assert done.stderr == "sorter: there is no run zzz: sorter history lists the runs\n"


def test_a_closed_pipe_is_not_an_error(sorted_once: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "sorter", "history", "--inbox", str(sorted_once)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_reading_changes_nothing(sorted_once: Path, reading: Commands) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (sorted_once / ".sorter").iterdir())
    reading("history", "--inbox", sorted_once)
    reading("status", "--inbox", sorted_once)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (sorted_once / ".sorter").iterdir()) == before


def test_the_status_counts_waiting_and_sorted_photos(sorted_once: Path, reading: Commands) -> None:
    found = json.loads(reading("status", "--json", "--inbox", sorted_once).stdout)
    assert (found["state"], found["waiting"], found["undone"]) == ("not running", 1, 0)
    assert found["in_all"]["failed"] == 1
    assert sum(found["in_all"].values()) == 8
    assert found["today"] == found["in_all"] or time.localtime().tm_hour == 0
    assert found["share_sorted"] == 1.0
    assert found["last_error"]["reason"] == "truncated"
    said = reading("status", "--inbox", sorted_once).stdout
    assert "not running" in said
    assert "truncated" in said


def test_the_status_of_a_daemon_names_its_process(tmp_path: Path, start: Start, reading: Commands) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    daemon = start("run", "--inbox", inbox)
    daemon.wait_for_event("photo.sorted")
    found = json.loads(reading("status", "--json", "--inbox", inbox).stdout)
    assert found["state"] == "running"
    assert str(daemon.process.pid) in found["process"]
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.finish()[0] == 0


def test_a_missing_or_broken_history_is_refused_in_a_sentence(tmp_path: Path, reading: Commands) -> None:
    (tmp_path / "in").mkdir()
    for command in (("history",), ("status",), ("undo", "--last")):
        done = reading(*command, "--inbox", tmp_path / "in", code=2)
        assert "there is no history" in done.stderr
        assert done.stderr.count("\n") == 1
    assert list((tmp_path / "in").iterdir()) == []
    (tmp_path / "in" / ".sorter").mkdir()
    (tmp_path / "in" / ".sorter" / "history.sqlite3").write_bytes(b"nonsense" * 1000)
    assert reading("history", "--inbox", tmp_path / "in", code=2).stderr.count("\n") == 1


def test_a_point_in_time_is_an_age_a_date_or_a_time() -> None:
    for text, seconds_ago in (("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604800), ("1w", 604800)):
        assert point_in_time(text) == pytest.approx(time.time() - seconds_ago, abs=5)
    for text in ("2026-11-24", "2026-11-24T18:00"):
        assert point_in_time(text) == datetime.fromisoformat(text).timestamp()
    for text in ("", "yesterday", "2h30m", "-1h", "2026-13-01", "9" * 7 + "w"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a time"):
            point_in_time(text)


def test_undo_changes_nothing_if_the_settings_ask_for_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    sorter("run", "--once", "--inbox", inbox)
    placed = read_tree(inbox)
    monkeypatch.setenv("SORTER_DRY_RUN", "true")
    assert main(["undo", "--last", "--inbox", str(inbox)]) == 0
    assert capsys.readouterr().out.endswith("Would restore 1 photo; 0 would stay.\n")
    assert read_tree(inbox) == placed
    assert main(["undo", "--last", "--no-dry-run", "--inbox", str(inbox)]) == 0
    assert read_tree(inbox) == {"a.jpg": photo(1)}


def test_a_dry_run_prints_one_decision_per_line_and_writes_nothing(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1), "b.jpg": photo(2), "c.jpg": photo(3)[:99], "d.txt": b"no"})
    before = {path: path.stat().st_mtime_ns for path in (inbox, *inbox.rglob("*"))}
    done = sorter("run", "--once", "--dry-run", "--json", "--log-format", "json", "--inbox", inbox, code=3)
    lines = {Path(line["path"]).name: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(lines) == {"a.jpg", "b.jpg", "c.jpg"}
    assert lines["a.jpg"]["destination"] == str(inbox / f"{lines['a.jpg']['label']}s" / "a.jpg")
    assert lines["c.jpg"]["reason"] == "truncated"
    assert {path: path.stat().st_mtime_ns for path in (inbox, *inbox.rglob("*"))} == before
    assert "--dry-run" in sorter("run", "--once", "--json", "--inbox", inbox, code=2).stderr


def test_a_dry_run_names_each_photo_and_where_it_would_go(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1), "sea/a.jpg": photo(1), "c.jpg": photo(3)[:99], "d.txt": b""})
    before = read_tree(inbox)
    done = sorter("run", "--once", "--dry-run", "--recursive", "--inbox", inbox, "--output", tmp_path / "out", code=3)
    planned, summary = done.stdout.splitlines()[:3], done.stdout.splitlines()[3]
    assert summary.startswith("2 photos would be sorted")
    patterns = (
        r"a\.jpg → (cat|dog)s/ \(\1 \d+\.\d%\)",
        r"sea/a\.jpg → (cat|dog)s/sea/ \(\1 \d+\.\d%\)",
        r"c\.jpg → failed/ \(truncated: .*\)",
    )
    for pattern in patterns:
        assert len([line for line in planned if re.fullmatch(pattern, line)]) == 1, planned
    assert read_tree(inbox) == before
    assert not (tmp_path / "out").exists()


def test_a_history_of_the_first_schema_is_upgraded(tmp_path: Path, reading: Commands) -> None:
    (tmp_path / ".sorter").mkdir()
    path = tmp_path / ".sorter" / "history.sqlite3"
    connection = sqlite3.connect(path)
    connection.executescript(_FIRST_SCHEMA)
    connection.execute(
        "INSERT INTO moves VALUES (1, 't', 'r', 2.0, ?, ?, 'cats', ?, 1, 1, 1, '1', 'sorted', 'cat', 0.9, NULL, NULL)",
        (os.fsencode(tmp_path), b"a.jpg", b"a.jpg"),
    )
    connection.commit()
    connection.close()
    (line,) = reading("history", "--json", "--inbox", tmp_path).stdout.splitlines()
    assert json.loads(line)["destination"] == str(tmp_path / "cats" / "a.jpg")
    assert read_tree(tmp_path) == {}
