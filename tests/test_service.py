"""The loop's own promises, in this process, with an engine that needs no torch: retries, what is ignored, the log."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import RED, RedGreenEngine, make_tree, pipeline_to, plain, read_tree
from structlog.testing import capture_logs

from sorter.classifier.manifest import Manifest
from sorter.decisions import Outcome
from sorter.files.photo import Identity, Photo
from sorter.history.reader import HistoryReader
from sorter.inbox.scan import Inbox
from sorter.service import loop
from sorter.service.accounting import Accounting, Ignored
from sorter.service.counters import Counters
from sorter.service.loop import Service
from sorter.service.retries import AGAIN_SECONDS, Retries
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings


def version(name: str = "a.jpg", *, inode: int = 1, root: Path = Path("/in"), seen: float = 5.0) -> Photo:
    return Photo(root, name, Identity(1, inode, 3, 4, 5), seen)


def again(photo: Photo, look_again: float = 0.0) -> Outcome:
    return Outcome(photo, "again", look_again=look_again)


def accounting(**settings: bool) -> Accounting:
    wanted = {"once": False, "dry_run": False, **settings}
    return Accounting({"run": "1"}, on_outcome=lambda _: None, on_decision=lambda _: None, **wanted)


def test_a_version_that_has_to_wait_is_admitted_when_it_is_due_with_the_time_it_was_first_seen() -> None:
    retries = Retries()
    retries.add(again(version(seen=5.0)), now=100.0)
    later = version(seen=99.0)
    due = 100 + AGAIN_SECONDS
    assert retries.next_due == due
    assert retries.admit(later, due - 0.1) is None
    assert list(retries.due(due - 0.1)) == []
    assert list(retries.due(due)) == ["a.jpg"]
    admitted = retries.admit(later, due)
    assert admitted is not None
    assert admitted.seen == 5.0
    assert retries.names == set()


def test_a_new_version_does_not_wait_for_the_old_one() -> None:
    retries = Retries()
    retries.add(again(version(), look_again=160.0), now=100.0)
    new = version(inode=2)
    assert retries.admit(new, 101.0) == new
    assert retries.next_due == float("inf")


def test_what_a_rescan_does_not_meet_is_forgotten() -> None:
    ignored = Ignored()
    ignored.add(version("a.txt"))
    ignored.add(version("b.txt"))
    ignored.begin_rescan()
    assert ignored.meet(version("a.txt"))
    assert not ignored.meet(version("a.txt", inode=2))
    ignored.end_rescan()
    assert ignored.meet(version("a.txt"))
    assert not ignored.meet(version("b.txt"))


def test_a_photo_that_stays_is_logged_once_for_each_version_and_counted_while_it_is_there(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"x", "b.jpg": b"x"})
    accounts = accounting()
    with capture_logs() as logs:
        for photo in (version(root=tmp_path), version(root=tmp_path), version(root=tmp_path, inode=2)):
            accounts.record(Outcome(photo, "left", detail="may not be read"))
        accounts.leave_name(tmp_path, "locked", "this folder cannot be listed")
        accounts.leave(version("b.jpg", root=tmp_path), "may not be read")
    assert [(log["event"], os.path.basename(log["path"])) for log in logs] == [
        ("photo.left", "a.jpg"),
        ("photo.left", "a.jpg"),
        ("photo.left", "locked"),
        ("photo.left", "b.jpg"),
    ]
    assert accounts.counters.left == 3
    (tmp_path / "b.jpg").unlink()
    accounts.begin_rescan()
    accounts.end_rescan(unlisted=[])
    assert accounts.counters.left == 1


def test_waiting_for_the_disk_is_logged_once_whatever_the_reason_becomes() -> None:
    accounts = accounting()
    with capture_logs() as logs:
        for blocked in (None, "disk full", "read-only", None, None):
            accounts.storage(blocked)
    assert [log["event"] for log in logs] == ["storage.waiting", "storage.ready"]


def sort_once(inbox: Path, manifest: Manifest, engine: RedGreenEngine, **values: Any) -> Counters:
    settings = Settings(inbox=inbox, once=True, settle_seconds=0, **values)
    folders = frozenset(str(inbox / folder) for folder in ("cats", "dogs", "unsure", "failed"))
    watched = Inbox(inbox, recursive=False, excluded=folders, settle_seconds=0)
    pipeline = pipeline_to(inbox, engine, manifest, settings)
    history = HistoryReader(inbox)
    try:
        return Service(settings, watched, pipeline, Shutdown(0), None, log_fields={}, history=history).run_once()
    finally:
        history.close()


def test_a_photo_that_changes_while_it_is_sorted_is_sorted_after_another_look(
    tmp_path: Path, manifest: Manifest
) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    engine = RedGreenEngine()

    def replace_once() -> None:
        if len(engine.batches) == 1:
            make_tree(inbox, {"a.jpg": plain(RED, 1)})

    engine.before_batch = replace_once
    counters = sort_once(inbox, manifest, engine)
    assert read_tree(inbox) == {"cats/a.jpg": plain(RED, 1)}
    assert (counters.photos, counters.left, counters.exit_code) == (1, 0, 0)


def test_a_wait_for_a_file_is_logged_once_and_does_not_count_as_slow(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "QUIET_SECONDS", 0.5)
    inbox = make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    (inbox / "empty.jpg").touch()  # just now, so that it may still be written
    with capture_logs() as logs:
        counters = sort_once(inbox, manifest, RedGreenEngine(), settle_timeout_seconds=2)
    (waiting,) = (log for log in logs if log["event"] == "inbox.waiting")
    assert (waiting["files"], waiting["path"]) == (1, str(inbox / "empty.jpg"))
    assert 1 < waiting["seconds"] <= 2
    assert counters.waited > 1.5
    assert counters.photos_per_second == pytest.approx(1 / (counters.seconds - counters.waited))


def test_a_photo_that_was_put_back_while_it_waited_for_another_look_is_counted_once(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    engine = RedGreenEngine()
    engine.before_batch = lambda: os.utime(inbox / "a.jpg", (0, len(engine.batches)))
    put_back: list[str] = []

    def was_restored(_reader: HistoryReader, photo: Photo) -> bool:
        if engine.batches:
            put_back.append(photo.name)
        return bool(put_back)

    monkeypatch.setattr(HistoryReader, "was_restored", was_restored)
    started = time.monotonic()
    counters = sort_once(inbox, manifest, engine)
    assert time.monotonic() - started < 20  # not `settle_timeout_seconds`
    assert set(read_tree(inbox)) == {"a.jpg"}
    assert put_back == ["a.jpg"]
    assert (counters.put_back, counters.left, counters.photos, counters.exit_code) == (1, 0, 0, 0)
