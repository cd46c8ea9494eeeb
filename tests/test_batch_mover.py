"""A batch across file systems: photos that must be seen unchanged twice wait together, also after the disk was full."""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RUN, make_tree, read_tree

from sorter.decisions import Decision, Outcome
from sorter.decoding.decoded import Decoded
from sorter.history.store import History
from sorter.inbox.scan import Inbox
from sorter.moving import batch_mover, copies
from sorter.moving.batch_mover import BatchMover
from sorter.moving.mover import Mover

SETTLE_SECONDS, PHOTOS = 0.4, 8


class NoLease:
    """What Linux gives for another user's file without CAP_LEASE."""

    is_certain = is_broken = False

    def __init__(self, _descriptor: int) -> None:
        pass


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on another file system, and no leases."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    monkeypatch.setattr(copies, "Lease", NoLease)
    monkeypatch.setattr(batch_mover, "_FIRST_DELAY_SECONDS", 0.05)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def seconds_to_move(inbox: Path, output: Path) -> float:
    """How long a fresh batch takes to be moved."""
    content = {f"{number}.jpg": b"photo %d" % number for number in range(PHOTOS)}
    make_tree(inbox, content)
    for name in content:
        os.utime(inbox / name)
    photos = Inbox(inbox, recursive=False, excluded=frozenset(), settle_seconds=0).scan(time.time() + 10)
    batch = [Decision(Decoded(photo, "pixels"), "sorted", "cats", "cat", 0.9, run=RUN) for photo in photos]
    history = History(output)
    history.begin(RUN)
    mover = BatchMover(Mover(output, settle_seconds=SETTLE_SECONDS), history, patient=True, stopping=threading.Event())
    outcomes: list[Outcome] = []
    started = time.monotonic()
    mover.move(batch, outcomes.append)
    seconds = time.monotonic() - started
    history.close()
    assert [outcome.kind for outcome in outcomes] == ["sorted"] * PHOTOS
    assert read_tree(output / "cats") == content
    return seconds


def test_the_photos_of_a_batch_wait_together(tmp_path: Path, output: Path) -> None:
    assert SETTLE_SECONDS <= seconds_to_move(tmp_path / "in", output) < 3 * SETTLE_SECONDS


def test_they_also_do_when_the_disk_was_full_at_first(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = iter(range(2 * PHOTOS))

    def full_at_first(_folder: int, _size: int) -> None:
        if next(refusals, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(copies, "_check_room", full_at_first)
    monkeypatch.setattr(batch_mover, "_LONGEST_DELAY_SECONDS", 0.05)
    assert seconds_to_move(tmp_path / "in", output) < (PHOTOS - 2) * SETTLE_SECONDS
