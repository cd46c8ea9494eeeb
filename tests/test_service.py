"""The loop's own promises, in this process, with an engine that needs no torch: retries, what is ignored, the log."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RED, RedGreenEngine, make_tree, pipeline_to, plain, read_tree
from structlog.testing import capture_logs

from sorter.classifier.manifest import Manifest
from sorter.decisions import Outcome
from sorter.files.atomic import rename_noreplace
from sorter.files.photo import Identity, Photo, open_folder
from sorter.history.reader import HistoryReader
from sorter.inbox.scan import Inbox
from sorter.inbox.watcher import Watcher
from sorter.moving import mover
from sorter.service import loop
from sorter.service.accounting import Accounting, Ignored
from sorter.service.counters import Counters
from sorter.service.loop import Service
from sorter.service.retries import FIRST_SECONDS, Retries
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
    due = 100 + FIRST_SECONDS
    assert retries.next_due == due
    assert retries.admit(later, due - 0.1) is None
    assert list(retries.due(due - 0.1)) == []
    assert list(retries.due(due)) == ["a.jpg"]
    admitted = retries.admit(later, due)
    assert admitted is not None
    assert admitted.seen == 5.0
    assert retries.waiting == {}


def test_a_photo_that_keeps_failing_waits_twice_as_long_each_time_up_to_a_minute() -> None:
    retries, now, waits = Retries(), 100.0, []
    for _ in range(10):
        retries.add(again(version()), now)
        waits.append(retries.next_due - now)
        now = retries.next_due
        assert retries.admit(version(), now) is not None
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    retries.forget("a.jpg")
    retries.add(again(version()), now)
    assert retries.next_due - now == 0.5


def test_a_photo_that_keeps_changing_waits_too() -> None:
    retries = Retries()
    for number in range(5):
        retries.add(again(version(inode=number)), now=100.0)
    assert retries.admit(version(inode=9), 107.9) is None
    assert retries.admit(version(inode=9), 108.0) is not None


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
    watched = Inbox(inbox, recursive=settings.recursive, excluded=folders, settle_seconds=0)
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


def test_a_photo_that_keeps_changing_is_looked_at_less_and_less_often_and_is_left(
    tmp_path: Path, manifest: Manifest
) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    engine = RedGreenEngine()
    engine.before_batch = lambda: os.utime(inbox / "a.jpg", (0, len(engine.batches)))
    with capture_logs() as logs:
        counters = sort_once(inbox, manifest, engine, settle_timeout_seconds=5)
    assert 2 <= len(engine.batches) <= 4  # at 0, 0.5, 1.5 and 3.5 s
    assert (counters.left, counters.exit_code) == (1, 3)
    retried = [log for log in logs if log["event"] == "photo.again"]
    assert {log["log_level"] for log in retried} == {"info"}
    (left,) = (log for log in logs if log["event"] == "photo.left")
    assert left["reason"] == retried[-1]["reason"] == "changed after it was classified"


NAMES = ["a.jpg", os.fsdecode(b"caf\xe9.jpg"), "z.jpg"]
UNMOVABLE = NAMES[1]


@pytest.mark.parametrize("code", [errno.EILSEQ, errno.EPERM, errno.EBUSY, errno.ENAMETOOLONG, errno.EFBIG])
def test_a_photo_that_the_file_system_refuses_is_left_and_the_others_are_sorted(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    inbox = make_tree(tmp_path / "in", {name: plain(RED, number) for number, name in enumerate(NAMES)})
    refuse(monkeypatch, code)
    with capture_logs() as logs:
        counters = sort_once(inbox, manifest, RedGreenEngine())
    assert set(read_tree(inbox)) == {UNMOVABLE, "cats/a.jpg", "cats/z.jpg"}
    assert (counters.photos, counters.left, counters.exit_code) == (2, 1, 3)
    (left,) = (log for log in logs if log["event"] == "photo.left")
    assert os.path.basename(left["path"]) == UNMOVABLE
    assert left["reason"]


def test_a_subfolder_that_may_no_longer_be_opened_stops_no_other_photo(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = make_tree(tmp_path / "in", {"sub/a.jpg": plain(RED), "z.jpg": plain(RED, 1)})
    engine = RedGreenEngine()

    def refusing(root: Path, relative: str) -> int:
        if relative == "sub" and engine.batches:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_folder(root, relative)

    monkeypatch.setattr("sorter.files.photo.open_folder", refusing)
    with capture_logs() as logs:
        counters = sort_once(inbox, manifest, engine, recursive=True)
    assert set(read_tree(inbox)) == {"sub/a.jpg", "cats/z.jpg"}
    assert (counters.photos, counters.left, counters.exit_code) == (1, 1, 3)
    (left,) = (log for log in logs if log["event"] == "photo.left")
    assert left["reason"] == "may not be moved: its folder or its owner forbids it"


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> list[float]:
    """Have `cats/` refuse one name, as exFAT and NTFS refuse some; returns the times of the tries."""
    stat = os.stat
    tries: list[float] = []

    def refusing_rename(source: int, old: str, target: int, new: str) -> None:
        if new == UNMOVABLE:
            tries.append(time.monotonic())
            raise OSError(code, os.strerror(code), new)
        rename_noreplace(source, old, target, new)

    def refusing_stat(path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        in_cats = path == UNMOVABLE and dir_fd is not None and os.readlink(f"/proc/self/fd/{dir_fd}").endswith("/cats")
        if in_cats and code in (errno.EILSEQ, errno.ENAMETOOLONG):
            raise OSError(code, os.strerror(code), path)
        return stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(mover, "rename_noreplace", refusing_rename)
    monkeypatch.setattr(os, "stat", refusing_stat)
    return tries


def watch(
    tmp_path: Path, manifest: Manifest, until: Callable[[], bool], *, moving: type[mover.Mover] = mover.Mover
) -> list[Any]:
    """Run the daemon on tmp_path/in until something is the case, for at most 10 seconds; its log."""
    inbox = tmp_path / "in"
    settings = Settings(inbox=inbox, output=tmp_path / "out", settle_seconds=0, rescan_seconds=3600)
    box = Inbox(inbox, recursive=False, excluded=frozenset(), settle_seconds=0)
    pipeline = pipeline_to(tmp_path / "out", RedGreenEngine(), manifest, settings, mover=moving)
    shutdown, watcher = Shutdown(0), Watcher(box)

    def stop() -> None:
        deadline = time.monotonic() + 10
        while not until() and time.monotonic() < deadline:
            time.sleep(0.02)
        shutdown.requested = True
        watcher.wake()

    ending = threading.Thread(target=stop)
    ending.start()
    with capture_logs() as logs:
        Service(settings, box, pipeline, shutdown, None, log_fields={}).run(watcher)
    ending.join()
    return logs


def test_a_daemon_tries_a_photo_that_cannot_be_moved_less_and_less_often(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path / "in", {UNMOVABLE: plain(RED)})
    tries = refuse(monkeypatch, errno.EPERM)
    logs = watch(tmp_path, manifest, lambda: len(tries) >= 4)
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    assert [round(pause * 2) / 2 for pause in pauses] == pytest.approx([0.5, 1, 2], abs=0.6)
    assert pauses == sorted(pauses)
    assert [log["event"] for log in logs if log["event"].startswith("photo.")] == ["photo.left"]


def test_a_photo_that_takes_the_name_of_one_in_hand_is_sorted_promptly(tmp_path: Path, manifest: Manifest) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": plain(RED)})

    class Slow(mover.Mover):
        """Moves the first photo, and holds its outcome back until the next one has been announced."""

        def settle(self) -> None:
            if not (inbox / "a.jpg").exists() and not (tmp_path / "out/cats/a-1.jpg").exists():
                make_tree(inbox, {"a.jpg": plain(RED, 1)})
                time.sleep(1)
            super().settle()

    watch(tmp_path, manifest, (tmp_path / "out/cats/a-1.jpg").exists, moving=Slow)
    assert read_tree(tmp_path) == {"out/cats/a.jpg": plain(RED), "out/cats/a-1.jpg": plain(RED, 1)}
