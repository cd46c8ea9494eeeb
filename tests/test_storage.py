"""Disks that are full, gone or read-only under a running daemon: it waits, reports that once, and goes on unaided.

Real daemons on real mounts, started side by side; each test continues with one of them.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Running, make_tree, photo, read_tree
from pictures import encoded
from PIL import Image

from sorter.cli.main import main
from sorter.errors import StorageError
from sorter.history.reader import HistoryReader
from sorter.history.store import History, Run


class Daemon(Running):
    """A running daemon and all photos that it was given.

    Args:
        light: with an engine and a backoff that need no time.
    """

    def __init__(self, folder: Path, inbox: Path, output: Path, *, light: bool = False) -> None:
        self.inbox, self.output = inbox, output
        # Longer than the first wait of the backoff: a message that is repeated has been by then.
        self._silence_seconds = 0.3 if light else 1.5
        self.given: list[bytes] = []
        inbox.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "sorter", "run", "--inbox", str(inbox), "--output", str(output)]
        command += ["--settle-seconds", "0.2"]
        if light:
            values = {"inbox": str(inbox), "output": str(output), "settle_seconds": 0.1}
            command = [sys.executable, str(Path(__file__).with_name("light_daemon.py")), json.dumps(values)]
        super().__init__(command, folder / "log", {"OMP_NUM_THREADS": "1"})

    def drop(self, **files: bytes) -> None:
        make_tree(self.inbox, {f"{name}.jpg": content for name, content in files.items()})
        self.given += files.values()

    def wait_until_sorted(self) -> None:
        self.wait_for(lambda: len(self.events("photo.sorted")) == len(self.given), seconds=30)
        assert read_tree(self.inbox) == {}
        assert sorted(read_tree(self.output).values()) == sorted(self.given)
        assert self.done(self.output) == sorted(read_tree(self.output))

    def done(self, output: Path) -> list[str]:
        """The files that the history records as done."""
        with contextlib.closing(sqlite3.connect(f"file:{output}/.sorter/history.sqlite3?mode=ro", uri=True)) as history:
            rows = history.execute("SELECT folder, name FROM moves WHERE done IS NOT NULL").fetchall()
        return sorted(f"{folder}/{os.fsdecode(name)}" for folder, name in rows)

    def check_history(self, output: Path) -> None:
        """Nothing is recorded as done that is not; what has just moved may not be recorded yet."""
        assert set(self.done(output)) <= set(read_tree(output))

    @contextlib.contextmanager
    def waiting(self, *words: str) -> Iterator[None]:
        """The daemon waits in here and goes on after it; it reports each of the two once."""
        before = [len(self.events(name)) for name in ("storage.waiting", "storage.ready")]
        self.wait_for_event("storage.waiting", before[0] + 1, seconds=20)
        time.sleep(self._silence_seconds)
        assert any(word in self.events("storage.waiting")[-1]["detail"] for word in words), self.events()[-1]
        yield
        self.wait_for_event("storage.ready", before[1] + 1, seconds=20)
        self.wait_until_sorted()
        after = [len(self.events(name)) for name in ("storage.waiting", "storage.ready")]
        assert after == [number + 1 for number in before], "reported more than once"

    def end(self) -> None:
        """SIGTERM while it waits."""
        self.process.send_signal(signal.SIGTERM)
        code, _ = self.finish(seconds=20)
        assert code == 0, self.errors.read_text()
        assert self.events("run.failed") == []


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    """One on a small disk, one whose output is a mount, one whose inbox and output are on one small disk."""
    root = tmp_path_factory.mktemp("storage")
    for folder in ("full/disk", "mounted/disk", "mounted/out", "history/disk"):
        (root / folder).mkdir(parents=True)
    mounts = (
        ("-t", "tmpfs", "-o", "size=2m", "tmpfs", root / "full/disk"),
        ("--bind", root / "mounted/disk", root / "mounted/out"),
        ("-t", "tmpfs", "-o", "size=2m", "tmpfs", root / "history/disk"),
    )
    with contextlib.ExitStack() as stack:
        for arguments in mounts:
            if not mount(*arguments):
                pytest.skip("needs root to mount small disks")
            stack.callback(umount, "-l", arguments[-1])
        started = {
            "full": Daemon(root / "full", root / "full/in", root / "full/disk/out"),
            "mounted": Daemon(root / "mounted", root / "mounted/in", root / "mounted/out"),
            "history": Daemon(root / "history", root / "history/disk/in", root / "history/disk/out"),
        }
        for daemon in started.values():
            stack.callback(daemon.process.communicate)
            stack.callback(daemon.process.kill)
        for daemon in started.values():
            daemon.wait_for_event("service.started", seconds=100)
            daemon.drop(first=photo(0))
        for daemon in started.values():
            daemon.wait_until_sorted()
        yield started


def mount(*arguments: str | Path) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0


def umount(*arguments: str | Path) -> None:
    subprocess.run(["umount", *map(str, arguments)], check=True)


def fill(disk: Path, spare_bytes: int) -> Path:
    """Fill a disk but for a little."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    os.truncate(filler, filler.stat().st_size - spare_bytes)
    return filler


def big(seed: int) -> bytes:
    """A picture of 300 kB."""
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (250, 400, 3), np.uint8)), "BMP")


@pytest.mark.long
def test_a_full_disk_is_waited_for_and_reported_once(daemons: dict[str, Daemon]) -> None:
    daemon = daemons["full"]
    filler = fill(daemon.output.parent, 150_000)
    daemon.drop(big=big(1), bigger=big(2), small=photo(3))
    with daemon.waiting("No space left"):
        daemon.check_history(daemon.output)
        assert not [name for name in read_tree(daemon.output) if name.endswith((".sorter-part", ".sorter-away"))]
        filler.unlink()


def test_an_output_that_is_renamed_away_is_waited_for(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, tmp_path / "in", tmp_path / "disk/out", light=True)
    try:
        daemon.drop(first=photo(0))
        daemon.wait_until_sorted()
        away = daemon.output.rename(daemon.output.with_name("away"))
        daemon.drop(away=photo(10))
        with daemon.waiting("mount or recreate it"):
            assert [path.name for path in daemon.output.parent.iterdir()] == ["away"]
            daemon.check_history(away)
            away.rename(daemon.output)
        daemon.end()
    finally:
        daemon.process.kill()
        daemon.process.communicate()


@pytest.mark.long
def test_nothing_is_written_where_an_output_is_not_mounted(daemons: dict[str, Daemon]) -> None:
    daemon = daemons["mounted"]
    umount("-l", daemon.output)
    daemon.drop(unmounted=photo(20))
    with daemon.waiting("mount or recreate it"):
        assert os.listdir(daemon.output) == []
        assert mount("--bind", daemon.output.parent / "disk", daemon.output)


@pytest.mark.long
def test_an_output_that_becomes_read_only_is_waited_for(daemons: dict[str, Daemon]) -> None:
    # Open files keep a file system writable, so a read-only mount of the same folder is put over it.
    daemon = daemons["mounted"]
    assert mount("--bind", daemon.output, daemon.output)
    assert mount("-o", "remount,bind,ro", daemon.output)
    daemon.drop(readonly=photo(30))
    try:
        with daemon.waiting("Read-only"):
            daemon.check_history(daemon.output)
            umount("-l", daemon.output)
    except BaseException:
        with contextlib.suppress(subprocess.CalledProcessError):
            umount("-l", daemon.output)
        raise


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", disk):
        pytest.skip("needs root to mount small disks")
    yield disk
    umount("-l", disk)


def test_a_read_only_file_system_is_named_as_the_reason(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (small_disk / "in", small_disk / "out", tmp_path / "in"):
        folder.mkdir()
    assert mount("-o", "remount,ro", small_disk)
    for inbox, output in ((small_disk / "in", tmp_path), (tmp_path / "in", small_disk / "out")):
        assert main(["check", "--inbox", str(inbox), "--output", str(output)]) == 2
        assert "is on a read-only file system: " in capsys.readouterr().err


def test_a_history_on_a_full_disk_cannot_be_written_but_read(small_disk: Path) -> None:
    (small_disk / ".sorter").mkdir()
    history = History(small_disk)
    history.begin(Run("r", "0", "m"))
    history.close()
    filler = fill(small_disk, 0)
    with pytest.raises(StorageError, match="free some space"):
        History(small_disk)
    reader = HistoryReader(small_disk)
    assert reader.has_run("r")
    filler.unlink()
    history = History(small_disk)
    history.begin(Run("later", "0", "m"))
    assert reader.has_run("later")
    history.close()


@pytest.mark.long
def test_a_daemon_that_starts_on_a_full_disk_waits_for_space_and_its_history_can_be_read(
    small_disk: Path, start: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    inbox = make_tree(small_disk / "in", {"a.jpg": photo(0)})
    assert start("run", "--once", "--inbox", inbox).finish()[0] == 0
    filler = fill(small_disk, 0)
    capsys.readouterr()
    daemon = start("run", "--inbox", inbox, "--settle-seconds", "0.2")
    daemon.wait_for_event("storage.waiting")
    assert "free some space" in daemon.events("storage.waiting")[0]["detail"]
    for command in ("history", "status", "undo --last --dry-run"):
        assert main([*command.split(), "--inbox", str(inbox)]) == 0, capsys.readouterr()
        assert capsys.readouterr().out
    filler.unlink()
    make_tree(inbox, {"b.jpg": photo(1)})
    daemon.wait_for_event("storage.ready")
    daemon.wait_for_event("photo.sorted")
    assert len(daemon.events("storage.waiting")) == 1
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.finish()[0] == 0


@pytest.mark.long
def test_a_run_that_starts_on_a_full_disk_ends_with_1_and_can_be_repeated(
    small_disk: Path, start: Callable[..., Running]
) -> None:
    inbox = make_tree(small_disk / "in", {"a.jpg": photo(0)})
    filler = fill(small_disk, 0)
    for _ in range(2):
        running = start("run", "--once", "--inbox", inbox)
        assert running.finish()[0] == 1
        assert "free some space" in running.events("run.failed")[0]["detail"]
        assert (inbox / "a.jpg").exists()
    filler.unlink()
    assert start("run", "--once", "--inbox", inbox).finish()[0] == 0


def drop_and_fill(daemon: Daemon, first: int, count: int) -> Path:
    """Put photos on a disk that has no space left for their history."""
    hidden = {f".{first + n}.jpg": photo(first + n) for n in range(count)}
    make_tree(daemon.inbox, hidden)
    daemon.given += hidden.values()
    filler = fill(daemon.inbox.parent, 0)
    for name in hidden:
        (daemon.inbox / name).rename(daemon.inbox / name[1:])
    return filler


@pytest.mark.long
def test_no_photo_moves_while_there_is_no_space_for_its_history(daemons: dict[str, Daemon]) -> None:
    daemon = daemons["history"]
    filler = drop_and_fill(daemon, 100, 100)
    with daemon.waiting("history"):
        daemon.check_history(daemon.output)
        filler.unlink()


@pytest.mark.long
def test_a_daemon_that_waits_for_space_ends_with_0_at_sigterm_and_loses_nothing(daemons: dict[str, Daemon]) -> None:
    for kind, words in (("history", "history"), ("full", "space")):
        daemon = daemons[kind]
        if kind == "history":
            filler = drop_and_fill(daemon, 300, 100)
        else:
            filler = fill(daemon.output.parent, 150_000)
            daemon.drop(last=big(4), the_very_last=big(5))
        before = len(daemon.events("storage.waiting"))
        daemon.wait_for_event("storage.waiting", before + 1, seconds=20)
        assert words in daemon.events("storage.waiting")[-1]["detail"]
        daemon.end()
        daemon.check_history(daemon.output)
        left = [*read_tree(daemon.inbox).values(), *read_tree(daemon.output).values()]
        assert sorted(left) == sorted(daemon.given)
        filler.unlink()
