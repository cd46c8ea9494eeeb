"""One run of the driver under strace for each place where it can be killed or refused, and the look afterwards.

In: an inbox's and an output's parent folders. Out: what was wrong, a line for each; none is the promise kept.
"""

import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Mode = Literal["move", "reserve", "link", "unlink", "correct", "revert", "follow"]
# What the driver has to have done before.
BEFORE: dict[Mode, list[Mode]] = {
    "unlink": ["link"],
    "correct": ["move"],
    "revert": ["move", "correct"],
    "follow": ["move"],
}

DRIVER = Path(__file__).with_name("driver.py")
ERRORS = ("ENOSPC", "EIO", "EACCES", "EXDEV", "EINVAL")
# Every call that changes a file, its name or its place on the disk, as x86-64 and arm64 name them.
CALLS = (
    "openat,write,pwrite64,pwritev,ftruncate,fallocate,fsync,fdatasync,mkdir,mkdirat,rmdir,rename,renameat,renameat2,"
    "link,linkat,symlink,symlinkat,unlink,unlinkat,fchmod,fchmodat,chmod,fchown,fchownat,chown,utimensat,fsetxattr"
)
PHOTOS = {
    "a.jpg": b"first",
    "b.jpg": b"second" * 40_000,
    "deep/a.jpg": b"third",
    "caf\udce9 \n.jpg": b"fourth",
    "deep/\udce9r/a.jpg": b"fifth",
}
SIDECAR = ("cats/b.xmp", b"about b")  # written by the owner's program before the correction of b.jpg
BYSTANDERS = {"in/notes.txt.part": b"not ours", "out/cats/a.jpg": b"an older photo"}


@dataclass(frozen=True)
class Point:
    """The nth use of a system call."""

    call: str
    number: int
    line: str


class Place:
    """A fresh inbox and output, and what has to be true of them.

    Args:
        inbox_parent: where the inbox is made.
        output_parent: where the output is made; on another file system photos are copied.
        mode: what the driver does; corrections happen inside the output, so for these `dogs/` is a file system of its
            own then, which needs the right to mount.
    """

    def __init__(self, inbox_parent: Path, output_parent: Path, mode: Mode = "move") -> None:
        self.mode: Mode = mode
        self.folders = [Path(tempfile.mkdtemp(prefix="sorter-torture-", dir=p)) for p in (inbox_parent, output_parent)]
        self.inbox, self.output = self.folders[0] / "in", self.folders[1] / "out"
        self._mounted = self.output / "dogs" if self._has_sidecar and inbox_parent != output_parent else None
        if self._mounted is not None:
            self._mounted.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", self._mounted], check=True)
        for name, content in PHOTOS.items():
            self._write(self.inbox / name, content)
        for name, content in BYSTANDERS.items():
            self._write(self._bystander(name), content)
        for self.mode in BEFORE.get(mode, []):
            self._add_sidecar()
            assert self.run().returncode == 0
        self.mode = mode
        self._add_sidecar()
        if mode == "follow":
            self._move_by_hand()

    def _move_by_hand(self) -> None:
        """All cats into the folder of dogs, and all dogs into that of cats."""
        cats, dogs = self.output / "cats", self.output / "dogs"
        photos = [p for folder in (cats, dogs) for p in folder.rglob("*") if p.is_file()]
        for photo in photos:
            other, inner = (
                (dogs, photo.relative_to(cats)) if photo.is_relative_to(cats) else (cats, photo.relative_to(dogs))
            )
            if photo != self._bystander("out/cats/a.jpg"):
                (other / inner).parent.mkdir(parents=True, exist_ok=True)
                photo.rename(other / inner)

    def _add_sidecar(self) -> None:
        if self.mode == "correct":
            self._write(self.output / SIDECAR[0], SIDECAR[1])

    @property
    def _has_sidecar(self) -> bool:
        return self.mode in ("correct", "revert")

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (1_600_000_000, 1_600_000_000))

    def _bystander(self, name: str) -> Path:
        root, _, rest = name.partition("/")
        return (self.inbox if root == "in" else self.output) / rest

    def remove(self) -> None:
        if self._mounted is not None:
            subprocess.run(["umount", self._mounted], check=True)
        for folder in self.folders:
            shutil.rmtree(folder)

    def run(self, *strace: str) -> subprocess.CompletedProcess[bytes]:
        """Run the driver, under strace where options are given."""
        command = [sys.executable, str(DRIVER), str(self.inbox), str(self.output), self.mode]
        if strace:
            # Its filter makes a run four times as fast, and keeps strace 6.1 from sending signals.
            fast = () if any("signal=" in option for option in strace) else ("--seccomp-bpf",)
            command = ["strace", "-f", *fast, "-y", "-o", str(self.folders[0] / "trace"), *strace, *command]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
        return subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)

    def trace(self) -> list[str]:
        return (self.folders[0] / "trace").read_text(errors="surrogateescape").splitlines()

    def points(self) -> list[Point]:
        """Where a clean run changes something: each call of CALLS that names a file of this place."""
        done = self.run("-e", f"trace={CALLS}")
        assert done.returncode == 0, done.stderr
        counts: Counter[str] = Counter()
        points = []
        for line in self.trace():
            match = re.match(r"\d+ +(\w+)\(", line)
            if match is None:
                continue
            counts[match[1]] += 1
            changes = match[1] != "openat" or "O_CREAT" in line
            if changes and any(str(folder) in line for folder in self.folders):
                points.append(Point(match[1], counts[match[1]], line))
        return points

    def wrong_now(self) -> list[str]:
        """At every instant: each photo is intact under one of its two names, and nobody else's file has changed."""
        found = {h for path, h in self._hashes().items() if not Path(path).name.startswith(".")}
        wrong = [f"{name!r} is under neither of its names" for name, c in PHOTOS.items() if _hash(c) not in found]
        if self._has_sidecar and _hash(SIDECAR[1]) not in found:
            wrong.append("the sidecar is in neither of its folders")
        if self.mode in ("link", "unlink"):
            wrong += [f"{name!r} is not at its place" for name, c in PHOTOS.items() if _content(self.inbox / name) != c]
        return wrong + [
            f"{name} was changed" for name, content in BYSTANDERS.items() if _content(self._bystander(name)) != content
        ]

    def wrong_after(self) -> list[str]:
        """After recovery: each photo is there exactly once, in its folder, nothing hidden is left, history is true.

        With `link` it is there twice, with `unlink` only in the inbox.
        """
        wrong = self.wrong_now()
        hashes = self._hashes()
        counts = Counter(hashes.values())
        times = 2 if self.mode == "link" else 1
        wrong += [
            f"{name!r} is there {counts[_hash(c)]} times" for name, c in PHOTOS.items() if counts[_hash(c)] != times
        ]
        extra = len(hashes) - times * len(PHOTOS) - len(BYSTANDERS) - self._has_sidecar
        wrong += [f"{extra} files too many: {sorted(hashes)}"] if extra else []
        with sqlite3.connect(self.output / ".sorter/history.sqlite3") as history:
            if (state := history.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                wrong.append(f"the history is damaged: {state}")
            query = "SELECT source, now_folder, now_name FROM moves WHERE target IS NULL"
            rows = history.execute(query).fetchall()
            reviewed = history.execute("SELECT count(*), count(done) FROM moves WHERE corrects IS NOT NULL").fetchone()
            unfinished = history.execute("SELECT count(*) FROM moves WHERE done IS NULL").fetchone()[0]
            verdicts = history.execute(
                "SELECT count(*), coalesce(sum(v.label || 's' = m.now_folder AND c.done IS NOT NULL), 0), "
                "count(v.reversal) FROM verdicts v JOIN moves m ON m.id = v.move JOIN moves c ON c.id = v.correction"
            ).fetchone()
            undone = history.execute("SELECT count(*), count(done) FROM moves WHERE undoes IS NOT NULL").fetchone()
        history.close()
        if undone != ((len(PHOTOS),) * 2 if self.mode == "unlink" else (0, 0)):
            wrong.append(f"the history lists {undone[0]} undone, {undone[1]} of them done")
        count = len(PHOTOS)
        decided = (count, count), (count, count, 0)
        expected = {"correct": decided, "follow": decided, "revert": ((2 * count,) * 2, (0, 0, 0))}
        if (reviewed, verdicts) != expected.get(self.mode, ((0, 0), (0, 0, 0))):
            wrong.append(f"the history lists {reviewed} corrections and {verdicts} verdicts")
        told = {os.fsdecode(source): self.output / folder / os.fsdecode(name) for source, folder, name in rows}
        wrong += [f"{unfinished} intents for ever"] if unfinished else []
        home = {name: self.output / ("dogs" if name.startswith("deep/") else "cats") for name in told}
        wrong += [
            f"{name!r} is in the wrong folder: {path}"
            for name, path in told.items()
            if path.is_relative_to(home[name]) == (self.mode in ("correct", "follow"))
        ]
        if sorted(told) != sorted(PHOTOS) or len(rows) != len(PHOTOS):
            wrong.append(f"the history lists {sorted(os.fsdecode(row[0]) for row in rows)}")
        contents = {name: None if self.mode == "unlink" else content for name, content in PHOTOS.items()}
        return wrong + [
            f"{n!r} is not where history says" for n, c in contents.items() if n in told and _content(told[n]) != c
        ]

    def _hashes(self) -> dict[str, str]:
        """Every file but the sorter's own, by path."""
        return {
            str(path): _hash(path.read_bytes())
            for root in (self.inbox, self.output)
            for path in root.rglob("*")
            if path.is_file() and ".sorter" not in path.parts
        }


def attack(inbox_parent: Path, output_parent: Path, mode: Mode, point: Point, fault: str) -> list[str]:
    """One fault at one point, then a restart.

    Args:
        fault: as strace's inject option names it, `signal=SIGKILL` or `error=EIO`.

    Returns:
        What was wrong; a fault that did not strike is wrong too.
    """
    place = Place(inbox_parent, output_parent, mode)
    try:
        done = place.run("-e", f"trace={point.call}", "-e", f"inject={point.call}:{fault}:when={point.number}")
        if fault.startswith("signal"):
            struck = done.returncode in (-9, 137)
        else:
            struck = any("(INJECTED)" in line for line in place.trace())
        wrong = [] if struck else [f"it did not strike: exit code {done.returncode}"]
        if b"Traceback" in done.stderr or done.returncode not in (-9, 137, 0, 1, 2, 3):
            wrong.append(f"exit code {done.returncode}: {done.stderr.decode(errors='replace')[-1500:]}")
        wrong += place.wrong_now()
        again = place.run()
        if again.returncode != 0:
            wrong.append(f"the restart ended with {again.returncode}: {again.stderr.decode(errors='replace')[-1500:]}")
        wrong += place.wrong_after()
    finally:
        place.remove()
    return [f"{fault} at {point.call} {point.number} ({point.line[:200]}): {what}" for what in wrong]


def sample(points: Sequence[Point], count: int) -> list[Point]:
    """So many of them, evenly spread."""
    return [points[i * len(points) // count] for i in range(min(count, len(points)))]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
