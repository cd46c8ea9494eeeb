"""With --link photos stay where they are: the folders get hard links or copies, and undo removes only those."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import (
    GREEN,
    LONG_AGO,
    RED,
    RedGreenEngine,
    Running,
    as_nobody,
    make_tree,
    photo,
    pipeline_to,
    plain,
    read_tree,
    small_manifest,
)
from mounts import mounted
from structlog.testing import capture_logs
from test_undo import sorter

from sorter.classifier.manifest import Manifest
from sorter.cli import entries, preflight
from sorter.files import atomic, inodes
from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import History, Run
from sorter.inbox.scan import Inbox
from sorter.moving import linker
from sorter.moving.mover import Mover
from sorter.moving.undo import Undo, Undone, planned_undo
from sorter.review.corrections import Corrections, Outcome, Verdict, Version
from sorter.service.counters import Counters
from sorter.service.loop import Service
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

Start = Callable[..., Running]


class Library:
    """Photos that stay, the output beside them, and what can be done with both in this process."""

    def __init__(self, inbox: Path, output: Path, manifest: Manifest) -> None:
        self.inbox, self.output, self._manifest = inbox, output, manifest
        inbox.mkdir(exist_ok=True)
        output.mkdir(exist_ok=True)

    def sort(self, **values: Any) -> tuple[Counters, list[Any]]:
        """Sort a backlog with --link, unless other values are given."""
        given = {"link": True, "once": True, "settle_seconds": 0, **values}
        settings = Settings(inbox=self.inbox, output=self.output, **given)
        box = preflight.watched(settings, self._manifest)
        pipeline = pipeline_to(self.output, RedGreenEngine(), self._manifest, settings)
        reader = HistoryReader(self.output, beside_writer=not settings.dry_run)
        try:
            with capture_logs() as logs:
                service = Service(settings, box, pipeline, Shutdown(0), None, log_fields={}, history=reader)
                return service.run_once(), logs
        finally:
            reader.close()

    def entries(self) -> list[Entry]:
        reader = HistoryReader(self.output)
        try:
            return reader.entries()
        finally:
            reader.close()

    def undo(self, *, dry_run: bool = False) -> dict[str, str]:
        """Undo everything that can be; by what is removed, why it was not."""
        reader = HistoryReader(self.output)
        chosen = list(reader.undoable())
        reader.close()
        if dry_run:
            return told(list(planned_undo(chosen)))
        history = History(self.output)
        try:
            run = Run(uuid4().hex, "0", "", kind="undo")
            return told(list(Undo(self.output, history, run, threading.Event()).restore(chosen)))
        finally:
            history.close()


def told(results: list[Undone]) -> dict[str, str]:
    return {os.path.basename(undone.entry.destination): undone.problem for undone in results}


@pytest.fixture(params=["hard link", "copy to another file system", "copy where links are refused"])
def library(
    request: pytest.FixtureRequest, tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Library]:
    """A library for each way to have a photo in two places."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as memory:
        output = tmp_path / "out"
        if request.param == "copy to another file system":
            output = Path(memory, "out")
            if os.stat(memory).st_dev == tmp_path.stat().st_dev:
                pytest.skip("needs /dev/shm on a file system of its own")
        elif request.param == "copy where links are refused":
            # No file system here lacks hard links, so their absence is played.
            monkeypatch.setattr(inodes, "are_real", lambda _: False)
        yield Library(tmp_path / "in", output, manifest)


@pytest.fixture
def linked(tmp_path: Path, manifest: Manifest) -> Library:
    """A library and an output on one file system."""
    return Library(tmp_path / "in", tmp_path / "out", manifest)


PHOTOS = {"a.jpg": plain(RED, 1), "b.jpg": plain(GREEN, 2)}


def test_photos_stay_and_the_folders_get_them_too(library: Library) -> None:
    make_tree(library.inbox, PHOTOS)
    before = {path: os.stat(path).st_mtime_ns for path in library.inbox.rglob("*")}
    counters, _ = library.sort()
    assert read_tree(library.inbox) == PHOTOS
    assert {path: os.stat(path).st_mtime_ns for path in library.inbox.rglob("*")} == before
    assert read_tree(library.output) == {"cats/a.jpg": PHOTOS["a.jpg"], "dogs/b.jpg": PHOTOS["b.jpg"]}
    assert os.stat(library.output / "cats/a.jpg").st_mtime_ns == os.stat(library.inbox / "a.jpg").st_mtime_ns
    assert (counters.photos, counters.left, counters.exit_code) == (2, 0, 0)


def test_on_one_file_system_both_names_are_one_file(linked: Library) -> None:
    make_tree(linked.inbox, PHOTOS)
    linked.sort()
    assert os.path.samefile(linked.inbox / "a.jpg", linked.output / "cats/a.jpg")


def test_a_second_run_links_nothing_again(library: Library) -> None:
    make_tree(library.inbox, {**PHOTOS, "a.xmp": b"edits"})
    library.sort()
    before = read_tree(library.output)
    counters, logs = library.sort()
    assert read_tree(library.output) == before
    assert (counters.photos, counters.linked_before, counters.left, counters.exit_code) == (0, 2, 0, 0)
    skipped = [log["reason"] for log in logs if log["event"] == "photo.skipped"]
    assert skipped == ["it was linked before, and has not changed"] * 2


def test_a_photo_that_changed_since_is_linked_again(library: Library) -> None:
    make_tree(library.inbox, PHOTOS)
    library.sort()
    (library.inbox / "a.jpg").unlink()
    make_tree(library.inbox, {"a.jpg": plain(RED, 3)}, modified=LONG_AGO + 60)
    library.sort()
    assert read_tree(library.output)["cats/a.jpg"] == PHOTOS["a.jpg"]
    assert read_tree(library.output)["cats/a-1.jpg"] == plain(RED, 3)


def test_a_taken_name_gets_a_number_and_so_do_the_sidecars(library: Library) -> None:
    make_tree(library.output, {"cats/a.jpg": b"an older one", "cats/a.xmp": b"its edits"})
    files = {"a.jpg": plain(RED, 1), "a.xmp": b"edits", "a.jpg.xmp": b"more edits"}
    make_tree(library.inbox, files)
    counters, _ = library.sort()
    assert read_tree(library.inbox) == files
    assert read_tree(library.output) == {
        "cats/a.jpg": b"an older one",
        "cats/a.xmp": b"its edits",
        "cats/a-1.jpg": files["a.jpg"],
        "cats/a-1.xmp": b"edits",
        "cats/a-1.jpg.xmp": b"more edits",
    }
    assert (counters.photos, counters.sidecars, counters.exit_code) == (1, 2, 0)


def test_a_sidecar_of_two_photos_goes_with_the_last_and_one_that_comes_late_follows(linked: Library) -> None:
    make_tree(linked.inbox, {"a.jpg": plain(RED, 1), "a.png": plain(RED, 2, "PNG"), "a.xmp": b"edits"})
    linked.sort()
    assert set(read_tree(linked.output)) == {"cats/a.jpg", "cats/a.png", "cats/a.xmp"}
    make_tree(linked.inbox, {"a.jpg.json": b"late"})
    counters, _ = linked.sort()
    assert read_tree(linked.output)["cats/a.jpg.json"] == b"late"
    assert (counters.photos, counters.sidecars, counters.exit_code) == (0, 1, 0)
    assert len(read_tree(linked.inbox)) == 4


def test_a_folder_that_may_only_be_read_is_linked_from(open_to_all: Path) -> None:
    make_tree(open_to_all / "in", {"2024/a.jpg": plain(RED, 1), "2024/b.jpg": plain(RED, 2)})
    (open_to_all / "out").mkdir(mode=0o777)
    (open_to_all / "out").chmod(0o777)
    (open_to_all / "in/2024/a.jpg").chmod(0o444)
    (open_to_all / "in/2024").chmod(0o555)
    photos = Inbox(open_to_all / "in", recursive=True, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)

    def link() -> None:
        mover = Mover(open_to_all / "out", link=True)
        for found in photos:
            mover.move(mover.plan(found, "cats"))

    as_nobody(link)
    assert len(read_tree(open_to_all / "in")) == len(read_tree(open_to_all / "out")) == 2


def test_a_photo_that_another_program_is_writing_to_is_not_copied_yet(
    linked: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inodes, "are_real", lambda _: False)
    make_tree(linked.inbox, {"a.jpg": plain(RED, 1)})
    (found,) = Inbox(linked.inbox, recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    linking = Mover(linked.output, link=True)
    with (linked.inbox / "a.jpg").open("ab"), pytest.raises(atomic.ChangedError, match="open for writing"):
        linking.move(linking.plan(found, "cats"))
    assert read_tree(linked.output) == {}
    linking.move(linking.plan(found, "cats"))
    assert len(read_tree(linked.output)) == 1


def test_two_names_of_one_file_are_two_photos(linked: Library) -> None:
    make_tree(linked.inbox, {"a.jpg": plain(RED, 1)})
    os.link(linked.inbox / "a.jpg", linked.inbox / "b.jpg")
    counters, _ = linked.sort()
    assert set(read_tree(linked.output)) == {"cats/a.jpg", "cats/b.jpg"}
    assert (counters.photos, counters.exit_code) == (2, 0)
    assert linked.undo() == {"a.jpg": "", "b.jpg": ""}
    assert set(read_tree(linked.inbox)) == {"a.jpg", "b.jpg"}


def test_a_dry_run_shows_where_photos_would_be_linked_and_changes_nothing(linked: Library) -> None:
    make_tree(linked.inbox, PHOTOS)
    linked.sort()
    make_tree(linked.inbox, {"c.jpg": plain(RED, 3)})
    counters, _ = linked.sort(dry_run=True)
    assert (counters.photos, counters.linked_before) == (1, 2)
    assert set(read_tree(linked.output)) == {"cats/a.jpg", "dogs/b.jpg"}


def test_the_history_says_what_was_linked(linked: Library) -> None:
    make_tree(linked.inbox, {"a.jpg": plain(RED, 1), "a.xmp": b"edits"})
    linked.sort()
    linked.undo()
    table = sorter("history", "--inbox", linked.inbox, "--output", linked.output).splitlines()
    assert [re.split(r" {2,}", line.rstrip())[-1] for line in table] == [
        "why",
        "cat 100.0%, linked, undone",
        "linked with its photo, undone",
        "link removed",
        "link removed",
    ]
    assert [entries.to_json(entry)["linked"] for entry in linked.entries()] == [True] * 4


# --- undo ---


def test_undo_removes_the_links_and_nothing_else_and_later_runs_leave_the_photos_alone(library: Library) -> None:
    make_tree(library.inbox, {**PHOTOS, "a.xmp": b"edits"})
    library.sort()
    make_tree(library.output, {"cats/mine.jpg": b"somebody else's"})
    before = read_tree(library.output)
    assert library.undo(dry_run=True) == {"a.jpg": "", "b.jpg": "", "a.xmp": ""}
    assert read_tree(library.output) == before
    assert library.undo() == {"a.jpg": "", "b.jpg": "", "a.xmp": ""}
    assert read_tree(library.inbox) == {**PHOTOS, "a.xmp": b"edits"}
    assert read_tree(library.output) == {"cats/mine.jpg": b"somebody else's"}
    counters, _ = library.sort()
    assert (counters.photos, counters.put_back, counters.exit_code) == (0, 2, 0)
    counters, _ = library.sort(include_undone=True)
    assert (counters.photos, counters.sidecars) == (2, 1)
    assert set(read_tree(library.output)) == {"cats/a.jpg", "cats/a.xmp", "cats/mine.jpg", "dogs/b.jpg"}
    assert library.undo() == {"a.jpg": "", "b.jpg": "", "a.xmp": ""}


def test_a_link_whose_original_is_gone_or_another_is_never_removed(library: Library) -> None:
    make_tree(library.inbox, {"gone.jpg": plain(RED, 1), "replaced.jpg": plain(RED, 2), "there.jpg": plain(RED, 3)})
    library.sort()
    (library.inbox / "gone.jpg").unlink()
    (library.inbox / "replaced.jpg").unlink()
    # Of the same size and time, with other contents.
    make_tree(library.inbox, {"replaced.jpg": bytes(len(plain(RED, 2)))})
    expected = {
        "gone.jpg": "the photo itself is gone, so this may be the only copy",
        "replaced.jpg": "the original has changed since, so this may be the only copy",
        "there.jpg": "",
    }
    assert library.undo(dry_run=True) == expected
    assert library.undo() == expected
    assert read_tree(library.output) == {"cats/gone.jpg": plain(RED, 1), "cats/replaced.jpg": plain(RED, 2)}


def test_what_has_taken_the_place_of_a_link_is_not_removed(library: Library) -> None:
    make_tree(library.inbox, {"edited.jpg": plain(RED, 1), "gone.jpg": plain(RED, 2), "touched.jpg": plain(RED, 3)})
    library.sort()
    for name in ("edited.jpg", "gone.jpg", "touched.jpg"):
        (library.output / "cats" / name).unlink()
    make_tree(library.output, {"cats/edited.jpg": b"edited"}, modified=LONG_AGO + 60)
    make_tree(library.output, {"cats/touched.jpg": plain(RED, 3)}, modified=LONG_AGO + 60)
    expected = {
        "edited.jpg": "it was changed or replaced since it was sorted",
        "gone.jpg": "it is gone",
        "touched.jpg": "it was changed or replaced since it was sorted",
    }
    assert library.undo() == expected
    assert read_tree(library.output) == {"cats/edited.jpg": b"edited", "cats/touched.jpg": plain(RED, 3)}
    assert len(read_tree(library.inbox)) == 3


def test_an_original_that_vanishes_at_the_last_moment_leaves_the_link(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED, 1)})
    library.sort()
    calls = 0

    def vanishing(*names: Any) -> bool:
        nonlocal calls
        same = atomic.same_contents(*names)
        calls += 1
        if calls == 2:  # the first comparison is the check before anything is planned
            (library.inbox / "a.jpg").rename(library.inbox / "elsewhere.jpg")
        return same

    monkeypatch.setattr(linker, "same_contents", vanishing)
    assert library.undo() == {"a.jpg": "changed while it was being moved: both versions are kept"}
    assert calls == 2
    assert read_tree(library.output) == {"cats/a.jpg": plain(RED, 1)}


def test_a_link_that_is_replaced_at_the_last_moment_stays(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED, 1)})
    library.sort()
    calls = 0

    def replacing(*names: Any) -> bool:
        nonlocal calls
        same = atomic.same_contents(*names)
        calls += 1
        if calls == 2:
            make_tree(library.output, {"new": b"an edited version"})
            (library.output / "new").rename(library.output / "cats/a.jpg")
        return same

    monkeypatch.setattr(linker, "same_contents", replacing)
    assert library.undo() == {"a.jpg": "changed while it was being moved: both versions are kept"}
    assert read_tree(library.output) == {"cats/a.jpg": b"an edited version"}
    assert read_tree(library.inbox) == {"a.jpg": plain(RED, 1)}


def test_a_link_that_is_reached_through_the_photos_own_path_is_not_taken_for_the_photo(linked: Library) -> None:
    make_tree(linked.inbox, {"a.jpg": plain(RED, 1)})
    linked.sort()
    (linked.inbox / "a.jpg").unlink()
    linked.inbox.rename(linked.inbox.with_name("was"))
    linked.inbox.symlink_to(linked.output / "cats")
    (problem,) = linked.undo().values()
    assert problem
    assert read_tree(linked.output) == {"cats/a.jpg": plain(RED, 1)}


def test_a_link_edited_through_either_name_is_still_one_file_and_can_be_removed(linked: Library) -> None:
    make_tree(linked.inbox, {"a.jpg": plain(RED, 1)})
    linked.sort()
    (linked.output / "cats/a.jpg").write_bytes(b"edited in place")
    assert linked.undo() == {"a.jpg": ""}
    assert read_tree(linked.inbox) == {"a.jpg": b"edited in place"}
    assert read_tree(linked.output) == {}


def test_a_photo_that_was_linked_and_then_moved_is_undone_step_by_step(linked: Library) -> None:
    make_tree(linked.inbox, {"a.jpg": plain(RED, 1)})
    linked.sort()
    linked.sort(link=False)
    assert set(read_tree(linked.output)) == {"cats/a.jpg", "cats/a-1.jpg"}
    assert linked.undo(dry_run=True) == {"a-1.jpg": "", "a.jpg": ""}
    assert linked.undo() == {"a-1.jpg": "", "a.jpg": ""}
    assert read_tree(linked.inbox) == {"a.jpg": plain(RED, 1)}
    assert read_tree(linked.output) == {}


# --- the real thing ---


def test_sorting_a_folder_again_moves_photos_so_link_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, {"unsure/a.jpg": plain(RED, 1)})
    for command in (("retry", "unsure"), ("run", "--once", "--inbox", tmp_path / "unsure")):
        sorter(*command, "--link", "--output", tmp_path, code=2)
    assert read_tree(tmp_path) == {"unsure/a.jpg": plain(RED, 1)}


def test_run_link_and_undo_in_a_library_that_is_its_own_output(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"2024/a.jpg": plain(RED, 1), "2024/b.jpg": plain(GREEN, 2)})
    flags = ("--once", "--link", "--recursive", "--log-format", "json", "--inbox", inbox)
    sorter("run", *flags)
    lines = [json.loads(line) for line in sorter("history", "--json", "--inbox", inbox).splitlines()]
    assert [line["linked"] for line in lines] == [True, True]
    assert all(os.path.samefile(line["path"], line["destination"]) for line in lines)
    assert "linked before, not sorted again" in sorter("run", *flags)
    assert len(read_tree(inbox)) == 4
    shown = sorter("undo", "--last", "--dry-run", "--inbox", inbox)
    assert shown.count("would be removed") == 2
    assert sorter("undo", "--last", "--inbox", inbox) == "Restored 2 photos; 0 could not be restored.\n"
    assert set(read_tree(inbox)) == {"2024/a.jpg", "2024/b.jpg"}


@pytest.mark.long
def test_a_daemon_links_each_photo_once(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", PHOTOS)
    watching = ("--settle-seconds", "0.1", "--rescan-seconds", "0.2", "--log-format", "json")
    daemon: Running = start("run", "--link", "--inbox", inbox, "--output", tmp_path / "out", *watching)
    daemon.wait_for_event("photo.sorted", 2)
    make_tree(inbox, {"c.jpg": plain(RED, 3), "c.xmp": b"edits"})
    daemon.wait_for_event("sidecar.moved")
    threading.Event().wait(2)  # ten rescans
    daemon.process.terminate()
    assert daemon.finish()[0] == 0
    assert len(daemon.events("photo.sorted")) == 3
    assert daemon.events("photo.skipped") == daemon.events("photo.left") == daemon.events("photo.again") == []
    assert set(read_tree(inbox)) == {*PHOTOS, "c.jpg", "c.xmp"}
    assert sorted(os.path.basename(name) for name in read_tree(tmp_path / "out")) == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
        "c.xmp",
    ]


@pytest.mark.long
@pytest.mark.parametrize("name", ["btrfs", "xfs"])
def test_where_hard_links_are_refused_a_copy_shares_its_blocks(
    name: str, tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(name, tmp_path) as folder:
        library = Library(folder / "in", folder / "out", manifest)
        make_tree(library.inbox, {"a.jpg": plain(RED, 1) + bytes(50_000_000)})
        os.sync()
        before = os.statvfs(folder).f_bfree
        with monkeypatch.context() as patch:
            patch.setattr(inodes, "are_real", lambda _: False)
            library.sort()
        os.sync()
        used = (before - os.statvfs(folder).f_bfree) * os.statvfs(folder).f_frsize
        assert not os.path.samefile(library.inbox / "a.jpg", library.output / "cats/a.jpg")
        assert read_tree(library.output)["cats/a.jpg"] == read_tree(library.inbox)["a.jpg"]
        assert used < 10_000_000


def test_a_photo_that_is_edited_in_place_keeps_its_one_hard_link(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    command = [
        sys.executable,
        "-m",
        "sorter",
        "run",
        "--once",
        "--link",
        "--inbox",
        str(inbox),
        "--settle-seconds",
        "0",
    ]
    for _ in range(3):
        assert subprocess.run(command, capture_output=True).returncode == 0
        with (inbox / "a.jpg").open("ab") as file:
            file.write(b"a rating")
    assert len([path for folder in ("cats", "dogs") for path in (inbox / folder).glob("*")]) == 1


def test_a_corrected_link_moves_and_its_photo_stays_and_undo_still_removes_it(library: Library) -> None:
    make_tree(library.inbox, {**PHOTOS, "a.xmp": b"edits"})
    before = {path: os.stat(path).st_mtime_ns for path in library.inbox.rglob("*")}
    library.sort()
    (entry,) = (entry for entry in library.entries() if entry.name == "a.jpg")
    corrections = Corrections(library.output, small_manifest().classes)
    verdict = Verdict(entry.id, Version(entry.size, os.stat(entry.destination).st_mtime_ns), "dog", "corrected")
    assert corrections.decide([verdict]) == [Outcome(entry.id, str(library.output / "dogs/a.jpg"))]
    corrections.close()
    moved = {"dogs/a.jpg": PHOTOS["a.jpg"], "dogs/a.xmp": b"edits", "dogs/b.jpg": PHOTOS["b.jpg"]}
    assert read_tree(library.output) == moved
    counters, _ = library.sort()
    assert (counters.photos, counters.linked_before, read_tree(library.output)) == (0, 2, moved)
    make_tree(library.inbox, {"a.jpg.xmp": b"late"})
    library.sort()
    assert (library.output / "dogs/a.jpg.xmp").read_bytes() == b"late"
    assert set(library.undo(dry_run=True).values()) == set(library.undo().values()) == {""}
    assert read_tree(library.output) == {}
    assert read_tree(library.inbox) == {**PHOTOS, "a.xmp": b"edits", "a.jpg.xmp": b"late"}
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
