"""One scenario on every file system that can be mounted here: sort, kill, watch, undo; nothing lost, nothing twice."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Running, make_tree, photo
from mounts import ALL, mounted
from PIL import Image

from sorter.files import inodes
from sorter.files.atomic import status_after_rename
from sorter.files.photo import Identity, opened_folder

WITHOUT_DATABASES = ("rclone", "fusefat")
"""Where SQLite does not work, or not always; the history has to be on another disk."""
QUICK = ("mergerfs",)
PHOTOS = 60
_TAKEN = 1_700_000_000  # when every second photo was last modified
_UPLOAD_SECONDS = 7  # rclone uploads what it has cached after 5 s; until then the times of a file change


def _sorter(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sorter", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def _contents(folder: Path) -> dict[str, str]:
    """Digests of what people see in a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".sorter" not in path.parts
    }


def _fill(inbox: Path, start: int, count: int) -> None:
    for number in range(start, start + count):
        path = inbox / f"IMG_{number:04}.jpg"
        path.write_bytes(photo(number))
        if number % 2:
            os.utime(path, (_TAKEN, _TAKEN))


def _hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".") and name != ".sorter"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.torture) for name in ALL]
)
def test_photos_are_sorted_and_restored(
    name: str, tmp_path: Path, start: Callable[..., Running], proved: Callable[[str], None]
) -> None:
    with mounted(name, tmp_path) as disk:
        _scenario(name, disk, tmp_path, start, proved)


def _scenario(name: str, disk: Path, local: Path, start: Callable[..., Running], proved: Callable[[str], None]) -> None:
    inbox = disk / "in"
    inbox.mkdir()
    state: list[str | Path] = ["--state-dir", local / "state"] if name in WITHOUT_DATABASES else []
    folders: list[str | Path] = ["--inbox", inbox, *state]
    quickly = ["--settle-seconds", "0.5", "--log-format", "json"]

    # A taken name, and a sidecar.
    make_tree(inbox, {"cats/IMG_0000.jpg": b"other", "dogs/IMG_0000.jpg": b"other"})
    _fill(inbox, 0, PHOTOS)
    (inbox / "IMG_0000.xmp").write_bytes(b"edits")
    before = _contents(inbox)
    time.sleep(_UPLOAD_SECONDS if name == "rclone-writes" else 1.5)
    if name == "rclone":
        refused = _sorter("run", "--once", "--inbox", inbox, *quickly)
        assert refused.returncode in (1, 2)
        assert "--state-dir" in refused.stderr
        assert _contents(inbox) == before

    began = time.monotonic()
    done = _sorter("run", "--once", *folders, *quickly)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:]
    after = _contents(inbox)
    assert sorted(after.values()) == sorted(before.values())
    assert not [path for path in after if "/" not in path]
    (sidecar,) = [path for path in after if path.lower().endswith(".xmp")]
    assert sidecar.rpartition("-")[0].lower().endswith("/img_0000")  # the name was taken
    assert f"{sidecar[:-3]}jpg" in after
    if name == "rclone-writes":
        time.sleep(_UPLOAD_SECONDS)
    undone = _sorter("undo", "--last", *folders)
    assert undone.returncode == 0, undone.stderr
    assert _contents(inbox) == before
    assert {(inbox / f"IMG_{number:04}.jpg").stat().st_mtime for number in range(1, PHOTOS, 2)} == {_TAKEN}

    # Killed in the middle, and carried on.
    kills = (20,) if name in QUICK else (3, 20, 40)
    for count in kills:
        killed = start("run", "--once", "--include-undone", *folders, *quickly)
        _await_sorted(inbox, count, killed)
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
    done = _sorter("run", "--once", "--include-undone", *folders, *quickly)
    if name == "rclone-writes" and done.returncode == 3:  # a photo's times changed while it was sorted
        time.sleep(_UPLOAD_SECONDS)
        done = _sorter("run", "--once", "--include-undone", *folders, *quickly)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(_contents(inbox).values()) == sorted(before.values())
    assert [hidden for folder in ("", "cats", "dogs") for hidden in _hidden(inbox / folder)] == []

    # A daemon, with photos dropped while it runs, one of them over a taken name.
    daemon = start("run", *folders, *quickly, "--rescan-seconds", "3")
    daemon.wait_for_event("service.started")
    _fill(inbox, PHOTOS, 20)
    daemon.wait_for(lambda: not list(inbox.glob("*.jpg")), seconds=60)
    daemon.process.terminate()
    assert daemon.finish()[0] == 0
    everything = _contents(inbox)
    assert len(everything) == len(before) + 20
    assert set(before.values()) <= set(everything.values())

    listed = _sorter("history", "--json", "--limit", "1000", *folders)
    photos = [json.loads(line) for line in listed.stdout.splitlines()]
    there = [photo for photo in photos if not photo["undone"] and os.path.isfile(photo["destination"])]
    assert len(there) == PHOTOS + 20 + 1
    proved(f"{name}: {PHOTOS} photos sorted in {seconds:.1f} s with the start, {len(kills)} kills, watched, undone")


@pytest.mark.torture
@pytest.mark.parametrize("name", ["fusefat", "exfat-fuse", "sshfs", "mergerfs"])
def test_photos_go_to_another_disk_and_back(name: str, tmp_path: Path) -> None:
    with mounted(name, tmp_path) as disk:
        inbox, output = disk / "in", tmp_path / "out"
        inbox.mkdir()
        _fill(inbox, 0, 12)
        before = _contents(inbox)
        time.sleep(3)  # longer than times are stored to
        folders: list[str | Path] = ["--inbox", inbox, "--output", output]
        done = _sorter("run", "--once", *folders, "--settle-seconds", "0.5")
        assert done.returncode == 0, done.stderr[-3000:]
        assert (sorted(_contents(output).values()), _contents(inbox)) == (sorted(before.values()), {})
        undone = _sorter("undo", "--last", *folders)
        assert undone.returncode == 0, undone.stderr
        assert (_contents(output), _contents(inbox)) == ({}, before)


@pytest.mark.torture
def test_a_rename_that_sets_times_is_recognised_when_they_are_rounded_down_the_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inodes, "_real", {})
    # Even seconds, of a clock that is up to a tick late: just after an even second, the time is two seconds old.
    with mounted("fusefat", tmp_path) as disk, opened_folder(disk, "") as folder:
        (disk / "a.jpg").write_bytes(b"photo")
        os.utime(disk / "a.jpg", (_TAKEN, _TAKEN))
        assert not inodes.are_real(folder)
        identity = Identity.of((disk / "a.jpg").stat())
        time.sleep(2 - time.time() % 2)
        began = time.time_ns()
        (disk / "a.jpg").rename(disk / "b.jpg")
        assert Identity.of(status_after_rename(folder, "b.jpg", identity, began)).is_same_file(identity)
        assert (disk / "b.jpg").stat().st_mtime == _TAKEN


@pytest.mark.timeout(120)
def test_a_share_that_delivers_slowly_sends_no_good_photo_to_failed(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (1400, 1400, 3), np.uint8))
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=95)
    assert len(file.getvalue()) > 2_000_000
    with mounted("sshfs-1mb", tmp_path) as disk:
        make_tree(tmp_path / "remote/in", {"large.jpg": file.getvalue()})
        done = _sorter("run", "--once", "--inbox", disk / "in", "--decode-timeout-seconds", "1")
        assert done.returncode == 0, done.stderr
        assert [path.name for folder in ("cats", "dogs") for path in (disk / "in" / folder).glob("*")]


def _await_sorted(inbox: Path, count: int, running: Running) -> None:
    """Wait until so many photos are sorted, or the sorter has ended."""
    deadline = time.monotonic() + 100
    while _sorted(inbox) < count and running.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _sorted(inbox: Path) -> int:
    return sum(len(os.listdir(inbox / folder)) for folder in ("cats", "dogs"))


@pytest.mark.torture
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ntfs-3g", "exfat-fuse", "vfat", "tmpfs"])
def test_a_name_that_the_destination_refuses_concerns_that_photo_alone(name: str, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    make_tree(inbox, {"a.jpg": photo(1), "b.jpg": photo(2)})
    odd = os.fsencode(inbox) + b"/\xff\xe7.jpg"
    with open(odd, "wb") as file:
        file.write(photo(3))
    with mounted(name, tmp_path) as disk:
        done = _sorter("run", "--once", "--inbox", inbox, "--output", disk, "--settle-timeout-seconds", "5")
        found = sorted(path.name for folder in ("cats", "dogs") for path in (disk / folder).glob("*.jpg"))
        if name == "tmpfs":
            assert done.returncode == 0
        else:
            assert done.returncode == 3, done.stderr
            assert found == ["a.jpg", "b.jpg"]
            assert os.path.exists(odd)


@pytest.mark.torture
def test_a_second_writer_in_the_destination_keeps_its_files(tmp_path: Path) -> None:
    """The window of a reservation, without luck: another program takes every name that sorter is about to take."""
    with mounted("mergerfs", tmp_path) as disk:
        inbox = disk / "in"
        inbox.mkdir()
        _fill(inbox, 0, PHOTOS)
        for folder in ("cats", "dogs"):
            (inbox / folder).mkdir()
        time.sleep(1)
        run = subprocess.Popen(
            [sys.executable, "-m", "sorter", "run", "--once", "--inbox", inbox, "--settle-seconds", "0.5"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        mine = []
        while run.poll() is None:
            for number in range(PHOTOS):
                for folder in ("cats", "dogs"):
                    path = inbox / folder / f"IMG_{number:04}.jpg"
                    try:
                        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                    except FileExistsError:
                        continue
                    os.write(descriptor, b"mine")
                    os.close(descriptor)
                    mine.append(path)
        assert run.returncode == 0
        assert len(mine) == 2 * PHOTOS - sum(path.read_bytes() != b"mine" for path in inbox.glob("*s/IMG_????.jpg"))
        found = _contents(inbox)
        assert {hashlib.sha256(photo(n)).hexdigest() for n in range(PHOTOS)} <= set(found.values())
        assert all(path.read_bytes() == b"mine" for path in mine)
    assert shutil.which("mergerfs")
