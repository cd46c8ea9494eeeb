"""Photos in unsure/ and failed/ are sorted again: where they go, what the history says, and the way back."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import RED, RedGreenEngine, make_tree, photo, pipeline_to, plain, read_tree
from structlog.testing import capture_logs

from sorter.classifier.manifest import Manifest
from sorter.cli import preflight
from sorter.history.reader import Counts, Entry, HistoryReader
from sorter.history.store import History, Run
from sorter.moving.undo import Undo, Undone, planned_undo
from sorter.service.counters import Counters
from sorter.service.loop import Service
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

BROWN = (128, 124, 60)


class Folders:
    """An inbox and an output, and what can be done with them in this process."""

    def __init__(self, tmp_path: Path, manifest: Manifest) -> None:
        self.inbox, self.output, self._manifest = tmp_path / "in", tmp_path / "out", manifest
        self.inbox.mkdir()

    def sort(self, folder: str = "", **values: Any) -> tuple[Counters, list[Any]]:
        """Sort the inbox, or a folder of the output again; with the log."""
        inbox = self.output / folder if folder else self.inbox
        settings = Settings(inbox=inbox, output=self.output, once=True, settle_seconds=0, **values)
        box = preflight.watched(settings, self._manifest)
        again = preflight.sorted_again(settings)
        pipeline = pipeline_to(self.output, RedGreenEngine(), self._manifest, settings, sorted_again=again)
        with self.history() as reader, capture_logs() as logs:
            service = Service(settings, box, pipeline, Shutdown(0), None, log_fields={}, history=reader)
            return service.run_once(), logs

    def history(self) -> "Reading":
        return Reading(self.output)

    def undoable(self) -> list[Entry]:
        with self.history() as reader:
            return list(reader.undoable())

    def counts(self) -> Counts:
        with self.history() as reader:
            return reader.counts()

    def undo(self, entries: list[Entry]) -> list[Undone]:
        history = History(self.output)
        try:
            run = Run(uuid4().hex, "0", "", kind="undo")
            return list(Undo(self.output, history, run, threading.Event()).restore(entries))
        finally:
            history.close()


class Reading:
    def __init__(self, output: Path) -> None:
        self._reader = HistoryReader(output)

    def __enter__(self) -> HistoryReader:
        return self._reader

    def __exit__(self, *_: object) -> None:
        self._reader.close()


@pytest.fixture
def folders(tmp_path: Path, manifest: Manifest) -> Folders:
    return Folders(tmp_path, manifest)


def test_an_unsure_photo_that_belongs_elsewhere_now_is_moved_with_its_sidecar(folders: Folders) -> None:
    make_tree(folders.inbox, {"a.jpg": plain(BROWN), "a.xmp": b"edits"})
    folders.sort(min_confidence=0.9)
    assert set(read_tree(folders.output)) == {"unsure/a.jpg", "unsure/a.xmp"}
    counters, _ = folders.sort("unsure")
    assert read_tree(folders.output) == {"cats/a.jpg": plain(BROWN), "cats/a.xmp": b"edits"}
    assert (counters.photos, counters.sidecars, counters.exit_code) == (1, 1, 0)
    assert folders.counts() == Counts({"cats": 1}, 0)


def test_a_photo_that_is_unsure_again_stays_under_its_name(folders: Folders) -> None:
    make_tree(folders.inbox, {"a.jpg": plain(BROWN), "a.xmp": b"edits"})
    folders.sort(min_confidence=0.9)
    before, entries = read_tree(folders.output), folders.undoable()
    counters, logs = folders.sort("unsure", min_confidence=0.9)
    assert read_tree(folders.output) == before
    assert folders.undoable() == entries
    assert (counters.photos, counters.left, counters.kept.total(), counters.exit_code) == (0, 0, 1, 0)
    (kept,) = (log for log in logs if log["event"] == "photo.kept")
    assert (kept["path"], kept["reason"]) == (str(folders.output / "unsure/a.jpg"), "cat 62.2%")


def test_a_photo_that_fails_again_stays_and_counts_as_failed(folders: Folders) -> None:
    make_tree(folders.inbox, {"bad.jpg": photo(1)[:200], "good.jpg": plain(RED)})
    folders.sort()
    make_tree(folders.output, {"failed/repaired.jpg": plain(RED, 1)})
    counters, logs = folders.sort("failed")
    assert set(read_tree(folders.output)) == {"failed/bad.jpg", "cats/good.jpg", "cats/repaired.jpg"}
    assert (counters.photos, counters.kept.total(), counters.exit_code) == (1, 1, 3)
    (kept,) = (log for log in logs if log["event"] == "photo.kept")
    assert kept["reason"] == "truncated"
    with folders.history() as reader:
        failure = reader.last_failure()
    assert failure is not None
    assert failure.name == "bad.jpg"


def test_a_photo_that_was_sorted_twice_goes_back_to_unsure_and_then_to_the_inbox(folders: Folders) -> None:
    make_tree(folders.inbox, {"a.jpg": plain(BROWN), "a.xmp": b"edits"})
    folders.sort(min_confidence=0.9)
    folders.sort("unsure")
    again = [entry for entry in folders.undoable() if "unsure" in entry.source]
    assert [undone.problem for undone in folders.undo(again)] == ["", ""]
    assert set(read_tree(folders.output)) == {"unsure/a.jpg", "unsure/a.xmp"}
    assert folders.counts() == Counts({"unsure": 1}, 0)
    assert [undone.problem for undone in folders.undo(folders.undoable())] == ["", ""]
    assert read_tree(folders.inbox) == {"a.jpg": plain(BROWN), "a.xmp": b"edits"}
    assert folders.counts() == Counts({}, 1)


def test_both_sorts_of_a_photo_are_undone_at_once_as_the_dry_run_said(folders: Folders) -> None:
    names = [f"{number}.jpg" for number in range(5)]
    make_tree(folders.inbox, {name: plain(BROWN, number) for number, name in enumerate(names)})
    folders.sort(min_confidence=0.9)
    folders.sort("unsure")
    entries = folders.undoable()
    assert len(entries) == 10
    assert [undone.problem for undone in planned_undo(entries)] == [""] * 10
    assert [undone.problem for undone in folders.undo(entries)] == [""] * 10
    assert set(read_tree(folders.inbox)) == set(names)
    assert read_tree(folders.output) == {}


def test_a_photo_that_cannot_leave_cats_does_not_leave_unsure_either(folders: Folders) -> None:
    make_tree(folders.inbox, {"a.jpg": plain(BROWN)})
    folders.sort(min_confidence=0.9)
    folders.sort("unsure")
    make_tree(folders.output, {"unsure/a.jpg": b"another"})
    entries = folders.undoable()
    wanted = ["another file has its old name", "it was changed or replaced since it was sorted"]
    assert [undone.problem for undone in planned_undo(entries)] == wanted
    assert [undone.problem for undone in folders.undo(entries)] == wanted
    assert read_tree(folders.output) == {"cats/a.jpg": plain(BROWN), "unsure/a.jpg": b"another"}


def sorter(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "sorter", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.long
def test_retry_takes_the_folders_of_the_run_before_it(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    folders = ("--inbox", tmp_path / "in", "--output", tmp_path / "out")
    sorter("run", "--once", *folders, "--min-confidence", "0.9999")
    assert set(read_tree(tmp_path)) == {"out/unsure/a.jpg"}
    assert "kept in unsure/" in sorter("retry", "unsure", *folders, "--min-confidence", "0.9999")
    planned = json.loads(sorter("retry", "unsure", *folders, "--dry-run", "--json"))
    assert (planned["kind"], os.path.basename(planned["destination"])) == ("sorted", "a.jpg")
    sorter("retry", "unsure", *folders)
    assert set(read_tree(tmp_path)) < {"out/cats/a.jpg", "out/dogs/a.jpg"}
    sorter("undo", "--last", *folders)
    assert set(read_tree(tmp_path)) == {"out/unsure/a.jpg"}
    sorter("retry", "unsure", *folders)
    assert set(read_tree(tmp_path)) < {"out/cats/a.jpg", "out/dogs/a.jpg"}
    sorter("undo", "--last", *folders)
    sorter("run", "--once", "--include-undone", "--inbox", tmp_path / "out/unsure", "--output", tmp_path / "out")
    sorter("undo", "--since", "1h", *folders)
    assert set(read_tree(tmp_path)) == {"in/a.jpg"}


def test_retry_says_where_there_is_nothing_to_retry(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    assert sorter("retry", "failed", "--inbox", tmp_path / "in", code=2) == ""
    assert set(os.listdir(tmp_path / "in")) == {"a.jpg"}
