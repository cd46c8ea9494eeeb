"""What ends or loses events, and the seconds until the photos are sorted: watchdog's stock emitter and ours.

    python tests/benchmarks/watcher_faults.py

Root, unshare and mount are needed. The daemon is the real one with a light engine; it looks at the folder every 5 s and
lists the inbox every 60 s, as by default. A photo that took about 60 s was found by that listing and not by an event.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import Running, make_tree
from test_watcher_faults import Limits, as_bound_by_permissions, drop, mounted

LIMIT_SECONDS = 90.0
Scenario = Callable[["Bench", Path], float]


class Bench:
    """Starts daemons, with one emitter or the other, and waits for photos."""

    def __init__(self, folder: Path, *, stock: bool) -> None:
        self.folder, self._stock = folder, stock
        self.running: Running | None = None

    def start(self, inbox: Path, *prefix: str, **settings: object) -> Running:
        """A daemon that has sorted `first.jpg`."""
        drop(inbox, "first.jpg")
        values = {"inbox": str(inbox), "output": str(self.folder / "out"), "settle_seconds": 0.1}
        values |= {"check_seconds": 5.0, "stock": self._stock, **settings}
        program = str(Path(__file__).resolve().parents[1] / "light_daemon.py")
        command = [*prefix, sys.executable, program, json.dumps(values)]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.running = Running(command, self.folder / "log", environment)
        self.seconds_until("first.jpg")
        time.sleep(1)
        return self.running

    def seconds_until(self, *names: str) -> float:
        """How long it takes from now until all of these are sorted; infinite beyond the limit."""
        assert self.running is not None
        began = time.monotonic()
        log = self.folder / "log"
        while time.monotonic() - began < LIMIT_SECONDS:
            said = log.read_bytes() if log.exists() else b""
            if all(f'/{name}", "destination'.encode() in said for name in names):
                return time.monotonic() - began
            time.sleep(0.02)
        return float("inf")


def nothing(bench: Bench, inbox: Path) -> float:
    bench.start(inbox)
    drop(inbox, "a.jpg")
    return bench.seconds_until("a.jpg")


def overflow(bench: Bench, inbox: Path, **settings: object) -> float:
    running = bench.start(inbox, **settings)
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    make_tree(bench.folder, {"note.txt": b"no photo"})
    running.process.send_signal(signal.SIGSTOP)
    for number in range(3 * queue):
        os.link(bench.folder / "note.txt", inbox / f"{number}.txt")
    drop(inbox, "a.jpg")
    running.process.send_signal(signal.SIGCONT)
    return bench.seconds_until("a.jpg")


def deleted(bench: Bench, inbox: Path) -> float:
    bench.start(inbox)
    shutil.rmtree(inbox)
    time.sleep(7)
    drop(inbox, "a.jpg")
    return bench.seconds_until("a.jpg")


def deleted_and_recreated_at_once(bench: Bench, inbox: Path) -> float:
    bench.start(inbox)
    shutil.rmtree(inbox)
    inbox.mkdir()
    time.sleep(7)
    drop(inbox, "a.jpg")
    return bench.seconds_until("a.jpg")


def renamed_away_and_back(bench: Bench, inbox: Path) -> float:
    bench.start(inbox)
    away = inbox.with_name("away")
    inbox.rename(away)
    drop(away, "a.jpg")
    time.sleep(1)
    away.rename(inbox)
    return bench.seconds_until("a.jpg")


def unmounted_and_mounted(bench: Bench, inbox: Path) -> float:
    disk = bench.folder / "disk"
    make_tree(bench.folder, {"disk/note.txt": b"x", "in/note.txt": b"x"})
    with mounted("mount", "-t", "tmpfs", "tmpfs", disk), mounted("mount", "--bind", disk, inbox):
        bench.start(inbox)
        subprocess.run(["umount", "-l", inbox], check=True)
        drop(disk, "a.jpg")
        subprocess.run(["mount", "--bind", disk, inbox], check=True)
        return bench.seconds_until("a.jpg")


def another_file_system_mounted_at_once(bench: Bench, inbox: Path) -> float:
    inbox.mkdir()
    with mounted("mount", "-t", "tmpfs", "tmpfs", inbox):
        bench.start(inbox)
        subprocess.run(["umount", "-l", inbox], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inbox], check=True)
        drop(inbox, "a.jpg")
        return bench.seconds_until("a.jpg")


def unreadable_for_a_moment(bench: Bench, inbox: Path) -> float:
    bench.start(inbox, *as_bound_by_permissions())
    inbox.chmod(0o300)
    drop(inbox, "a.jpg")
    time.sleep(0.3)
    inbox.chmod(0o700)
    return bench.seconds_until("a.jpg")


def folder_moved_in(bench: Bench, inbox: Path) -> float:
    bench.start(inbox, recursive=True)
    drop(bench.folder, "album/deep/b.jpg")
    (bench.folder / "album").rename(inbox / "album")
    bench.seconds_until("b.jpg")
    drop(inbox, "album/deep/a.jpg")
    return bench.seconds_until("a.jpg")


def folder_made_readable(bench: Bench, inbox: Path) -> float:
    drop(inbox, "shut/b.jpg")
    (inbox / "shut").chmod(0)
    bench.start(inbox, *as_bound_by_permissions(), recursive=True)
    (inbox / "shut").chmod(0o700)
    return bench.seconds_until("b.jpg")


def no_watches_left(bench: Bench, inbox: Path) -> float:
    bench.start(inbox, *Limits(watches=20).prefix, recursive=True)
    drop(inbox, *(f"{number}/b{number}.jpg" for number in range(40)))
    bench.seconds_until(*(f"b{number}.jpg" for number in range(40)))
    drop(inbox, "38/a.jpg")
    return bench.seconds_until("a.jpg")


def no_instance_left(bench: Bench, inbox: Path) -> float:
    bench.start(inbox, *Limits(instances=0).prefix)
    drop(inbox, "a.jpg")
    return bench.seconds_until("a.jpg")


SCENARIOS: dict[str, Scenario] = {
    "none: a photo is dropped": nothing,
    "the event queue overflows": overflow,
    "the same, with subfolders": lambda bench, inbox: overflow(bench, inbox, recursive=True),
    "inbox deleted, recreated 7 s later": deleted,
    "inbox deleted and recreated at once": deleted_and_recreated_at_once,
    "inbox renamed away and back": renamed_away_and_back,
    "inbox unmounted lazily and mounted": unmounted_and_mounted,
    "another file system mounted in its place": another_file_system_mounted_at_once,
    "inbox unreadable for 0.3 s": unreadable_for_a_moment,
    "folder moved in, written to later": folder_moved_in,
    "unreadable subfolder made readable": folder_made_readable,
    "no inotify watches left for subfolders": no_watches_left,
    "no inotify instance left": no_instance_left,
}


@contextlib.contextmanager
def bench(*, stock: bool) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        made = Bench(Path(folder), stock=stock)
        try:
            yield made
        finally:
            if made.running is not None:
                made.running.process.kill()
                made.running.process.communicate()


def main() -> None:
    print("| fault | stock, s | ours, s |\n|---|---|---|")
    for name, scenario in SCENARIOS.items():
        seconds = []
        for stock in (True, False):
            with bench(stock=stock) as made:
                seconds.append(scenario(made, made.folder / "in"))
        shown = (f"{s:.1f}" if s < LIMIT_SECONDS else f"over {LIMIT_SECONDS:.0f}" for s in seconds)
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
