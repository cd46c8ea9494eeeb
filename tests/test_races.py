"""Somebody works against the sorter: photos are swapped for links, FIFOs and other photos while they are sorted."""

import os
import queue
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import GREEN, LONG_AGO, RED, RedGreenEngine, make_tree, pipeline_to, read_tree
from pictures import encoded, plain

from sorter.classifier.manifest import Manifest
from sorter.decoding.decoded import Decoded
from sorter.decoding.decoders import Decoders
from sorter.decoding.images import Limits, Preprocessing
from sorter.files import atomic
from sorter.files.atomic import StayedError, rename_noreplace
from sorter.files.photo import Identity, Photo
from sorter.inbox.scan import Inbox
from sorter.moving import mover as mover_module
from sorter.moving import recovery
from sorter.moving.mover import Mover
from sorter.moving.recovery import Plan
from sorter.settings import Settings

RIVAL = Path(__file__).parent / "torture/rival.py"
BYSTANDER = (30, 30, 220)


@pytest.fixture(params=["one file system", "two file systems"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The parents of an inbox and of an output."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield (Path(folder) if request.param == "one file system" else tmp_path, Path(folder))


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often another file than the photo had been taken, and went back."""
    counts: Counter[str] = Counter()
    give_back = atomic.give_back

    def counted(target: int, name: str, source: int, base: str) -> None:
        counts["given back"] += 1
        give_back(target, name, source, base)

    for module in (atomic, mover_module):
        monkeypatch.setattr(module, "give_back", counted)
    return counts


@contextmanager
def rival(*arguments: str | Path) -> Iterator[Callable[[], int]]:
    """A hostile program at work; the call ends it and tells how often it struck."""
    command = [sys.executable, str(RIVAL), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def finish() -> int:
            out, _ = process.communicate(timeout=30)
            return int(out)

        try:
            yield finish
        finally:
            process.kill()


def picture(color: tuple[int, int, int], number: int) -> bytes:
    """A file of the same size for each number, and of another content."""
    return encoded(plain(color, (16, 16)), "BMP")[:-4] + number.to_bytes(4, "little")


class Target:
    """An inbox with one photo, red, and what a hostile program swaps it for: green is outside, blue inside.

    Args:
        way: what is swapped, the `file` or the `folder` on the way to it.
    """

    def __init__(self, parent: Path, way: str) -> None:
        self.inbox, self.outside = parent / "in", parent / "outside"
        make_tree(self.outside, {"a.bmp": picture(GREEN, 0)})
        make_tree(self.inbox, {"deep/x.part": b"x"})
        deep = self.inbox / "deep"
        if way == "file":
            self.name, others = deep / "a.bmp", [deep / f".{kind}" for kind in ("link", "fifo", "other", "folder")]
            others[0].symlink_to(self.outside / "a.bmp")
            os.mkfifo(others[1])
            make_tree(deep, {".other": picture(BYSTANDER, 0), ".folder/a.bmp": picture(BYSTANDER, 1)})
        else:
            self.name, others = deep, [self.inbox / ".link", self.inbox / ".folder"]
            others[0].symlink_to(self.outside)
            make_tree(self.inbox, {".folder/a.bmp": picture(BYSTANDER, 1)})
        self.others = others
        self._deep = os.open(deep, os.O_RDONLY)  # wherever it is just now
        self._scanner = Inbox(self.inbox, recursive=True, excluded=frozenset(), settle_seconds=0)
        self.specials = self._specials()
        self.sentinel = self._sentinel()
        self.number = 0
        self.supply()

    def close(self) -> None:
        os.close(self._deep)

    def supply(self) -> None:
        """Put a new photo where the last one was taken from."""
        self.number += 1
        self.content = picture(RED, self.number)
        make_tree(self.inbox.parent / "new", {"a.bmp": self.content})
        identity = Identity.of((self.inbox.parent / "new/a.bmp").stat())
        self._photo = Photo(self.inbox, "deep/a.bmp", identity, 0.0)
        new = os.open(self.inbox.parent / "new", os.O_RDONLY)
        try:
            rename_noreplace(new, "a.bmp", self._deep, "a.bmp")
        finally:
            os.close(new)

    def photo(self) -> Photo:
        """The red photo as the inbox shows it, or as it was when that showed it last."""
        found = self._scanner.look("deep/a.bmp", time.time())
        if found is not None and found.identity.is_same_file(self._photo.identity):
            self._photo = found
        return self._photo

    def _specials(self) -> Counter[int]:
        return Counter(stat.S_IFMT(path.lstat().st_mode) for path in self.inbox.rglob("*") if not path.is_file())

    def _sentinel(self) -> tuple[object, ...]:
        status = (self.outside / "a.bmp").stat()
        return os.listdir(self.outside), status.st_ino, status.st_nlink, status.st_ctime_ns, status.st_atime_ns

    def check(self) -> None:
        """Outside nothing was read or changed, inside nothing was lost."""
        assert self._sentinel() == self.sentinel
        assert self._specials() == self.specials
        inside = list(read_tree(self.inbox).values())
        assert inside.count(picture(BYSTANDER, 1)) == 1
        assert not [name for name in read_tree(self.inbox) if name.endswith((".sorter-part", ".sorter-away"))]
        if (self.inbox / "deep/.other").exists():
            assert inside.count(picture(BYSTANDER, 0)) == 1


def race_for_one(folders: tuple[Path, Path], way: str, seconds: float, tries: int) -> Counter[str]:
    """Decode and move one photo after another while it is swapped, so many times or so long."""
    figures: Counter[str] = Counter()
    output = folders[1] / "out"
    results: queue.SimpleQueue[Decoded] = queue.SimpleQueue()
    failures: list[BaseException] = []
    with ExitStack() as stack:
        decoders = Decoders(
            workers=1,
            rows=1,
            preprocessing=Preprocessing(8),
            limits=Limits(),
            max_bytes=1_000_000,
            timeout_seconds=20,
            deliver=results.put,
            fail=failures.append,
        )
        stack.callback(decoders.close)
        target = Target(folders[0], way)
        stack.callback(target.close)
        finish = stack.enter_context(rival("exchange", target.name, *target.others))
        mover = Mover(output)
        moved: set[bytes] = set()
        deadline = time.monotonic() + seconds
        while figures["tries"] < tries and time.monotonic() < deadline:
            figures["tries"] += 1
            assert decoders.submit(target.photo(), timeout_seconds=20)
            decoded = results.get(timeout=60)
            assert decoded.verdict in ("pixels", "gone"), decoded
            figures[decoded.verdict] += 1
            if decoded.verdict == "pixels":
                red, green, blue = np.frombuffer(decoders.pixels, np.uint8).reshape(-1, 3).mean(0)
                assert red > 150 > max(green, blue), "something else was decoded"
                decoders.release(decoded.row)
            plan = mover.plan(target.photo(), "cats")
            try:
                mover.move(plan)
            except StayedError:
                figures["stayed"] += 1
            else:
                figures["moved"] += 1
                assert stat.S_ISREG(os.lstat(mover.path(plan)).st_mode)
                assert Path(mover.path(plan)).read_bytes() == target.content
                moved.add(target.content)
                target.supply()
            finally:
                mover.forget(plan)
        figures["swaps"] = finish()
        assert not failures
        target.check()
        assert all(path.is_file() and not path.is_symlink() for path in (output / "cats").iterdir())
        assert set(read_tree(output / "cats").values()) == moved
        assert len(read_tree(output)) == figures["moved"]
    return figures


@pytest.mark.long
@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_photo_swapped_for_a_link_never_leads_out_of_the_inbox(folders: tuple[Path, Path], way: str) -> None:
    figures = race_for_one(folders, way, 5, 200)
    assert min(figures["moved"], figures["stayed"], figures["pixels"]) > 3, figures


@pytest.mark.torture
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["file", "folder"])
def test_thousands_of_swaps_never_lead_out_of_the_inbox(
    folders: tuple[Path, Path], way: str, given_back: Counter[str], proved: Callable[[str], None]
) -> None:
    figures = race_for_one(folders, way, 100, 5000) + given_back
    assert figures["tries"] == 5000
    proved(
        f"a photo's {way} swapped {figures['swaps']} times during {figures['tries']} tries to decode and move it, "
        f"{'one file system' if folders[0] == folders[1] else 'two file systems'}: {figures['pixels']} decoded, "
        f"{figures['moved']} moved, {figures['given back']} times something else had been taken and went back; "
        "nothing outside was read or moved"
    )


def sort_while_replaced(folders: tuple[Path, Path], manifest: Manifest, seconds: float, photos: int) -> Counter[str]:
    """Sort an inbox whose photos are replaced at random by others of the same size and time."""
    figures: Counter[str] = Counter()
    inbox, output = folders[0] / "in", folders[1] / "out"
    inbox.mkdir()
    make_tree(folders[0], {"red.bmp": picture(RED, 0), "green.bmp": picture(GREEN, 0)})
    settings = Settings(inbox=inbox, output=output, once=False, batch_size=8, max_wait_ms=1)
    pipeline = pipeline_to(output, RedGreenEngine(), manifest, settings)
    scanner = Inbox(inbox, recursive=False, excluded=frozenset(), settle_seconds=0)
    with rival("replace", inbox, folders[0] / "red.bmp", folders[0] / "green.bmp") as finish:
        try:
            deadline = time.monotonic() + seconds
            while figures["sorted"] < photos and time.monotonic() < deadline:
                for photo in scanner.scan(LONG_AGO):
                    pipeline.submit(photo)
                for outcome in pipeline.outcomes(timeout_seconds=0.05):
                    figures[outcome.kind] += 1
            figures["replaced"] = finish()
        finally:
            pipeline.close()
    for folder, color in (("cats", RED), ("dogs", GREEN)):
        wanted = picture(color, 0)[:-4]
        for path in (output / folder).iterdir():
            assert path.read_bytes()[:-4] == wanted, f"{path} was never judged to be there"
            figures["files"] += 1
    return figures


@pytest.mark.parametrize(
    "folders", ["one file system", pytest.param("two file systems", marks=pytest.mark.long)], indirect=True
)
def test_a_replaced_photo_is_never_moved_on_the_old_ones_verdict(
    folders: tuple[Path, Path], manifest: Manifest
) -> None:
    figures = sort_while_replaced(folders, manifest, 4, 300)
    assert min(figures["sorted"], figures["again"]) > 10, figures


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_thousands_of_replaced_photos_are_each_judged_by_themselves(
    folders: tuple[Path, Path], manifest: Manifest, given_back: Counter[str], proved: Callable[[str], None]
) -> None:
    figures = sort_while_replaced(folders, manifest, 60, 10_000) + given_back
    proved(
        f"{figures['replaced']} photos dropped over others while they were sorted, "
        f"{'one file system' if folders[0] == folders[1] else 'two file systems'}: {figures['sorted']} moved, "
        f"{figures['again']} refused because they had changed, {figures['given back']} after they had been taken; "
        "none on another's verdict"
    )


def test_a_photo_that_arrives_while_a_crash_is_cleared_up_is_not_taken_for_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The crash came after the copy had its name and before the original was removed.
    make_tree(tmp_path, {"in/a.jpg": b"photo", "out/cats/a.jpg": b"photo"})
    identity = Identity.of((tmp_path / "in/a.jpg").stat())

    def dropped_meanwhile(folder: int) -> None:
        if (tmp_path / "in/a.jpg").read_bytes() == b"photo":
            make_tree(tmp_path, {"new": b"another photo"})
            (tmp_path / "new").replace(tmp_path / "in/a.jpg")
        atomic.sync_folder(folder)

    monkeypatch.setattr(recovery, "sync_folder", dropped_meanwhile)
    assert recovery.resolve(tmp_path / "out", Plan(Photo(tmp_path / "in", "a.jpg", identity, 0), "cats", "a.jpg", "0"))
    assert read_tree(tmp_path) == {"in/a.jpg": b"another photo", "out/cats/a.jpg": b"photo"}
