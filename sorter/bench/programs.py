"""Programs measured from the outside: the sorter as a person starts it, and the plain loop it is compared with."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sorter.errors import SorterError

_PLAIN_LOOP = Path(__file__).with_name("plain_loop.py")
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Sorted:
    """One run of the sorter.

    Attributes:
        rate: photos per second, without the start.
        start_seconds: from the command to the first photo in its folder.
        peak_mb: the peak resident memory of all processes, added up; shared memory counts once for each.
    """

    rate: float
    start_seconds: float
    peak_mb: float


def sort(inbox: Path, flags: Sequence[str], log: Path) -> Sorted:
    """Sort a folder with `sorter run --once`.

    Raises:
        SorterError: the sorter failed, or found nothing to sort.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "sorter",
        "run",
        "--once",
        "--log-format",
        "json",
        "--inbox",
        str(inbox),
        *flags,
    ]
    started = time.time()
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=_environment())
        peaks: dict[int, int] = {}
        try:
            while process.poll() is None:
                _note_peaks(process.pid, peaks)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            process.kill()  # has no effect if it has ended
            process.wait()
    first, last = "", "{}"
    with log.open(encoding="utf-8") as lines:
        for last in lines:
            first = first or (last if '"event": "photo.' in last else "")
    finished = json.loads(last)
    if finished.get("event") != "run.finished" or not first:
        raise SorterError(f"the sorter did not sort the copies: {finished.get('detail', 'no photo was sorted')}")
    begun = datetime.fromisoformat(json.loads(first)["timestamp"]).timestamp()
    return Sorted(finished["photos_per_second"], begun - started, sum(peaks.values()) / 1e6)


def has_torch() -> bool:
    """True if the plain loops can run."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "torchvision"))


def plain_loop(model: Path, folder: Path, batch_size: int, workers: int) -> float:
    """Sort a folder with the plain loop, in photos per second without the start.

    Args:
        model: the model folder.
        folder: of the photos.
        batch_size: photos that are classified together.
        workers: processes of the data loader; 0 decodes in the loop's own process.

    Raises:
        SorterError: the loop failed.
    """
    command = [sys.executable, str(_PLAIN_LOOP), str(model), str(folder), str(batch_size), str(workers)]
    # The data loader's processes meet at a socket in the folder for temporary files, and wait for ever if its path is
    # too long for a socket.
    environment = _environment() | {"TMPDIR": "/tmp"}  # noqa: S108 - what is made there has private folders
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SorterError(f"the plain loop failed: {(done.stderr.strip().splitlines() or ['without a message'])[-1]}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return float(said["photos"] / said["seconds"])


def folders(output: Path) -> dict[str, str]:
    """The name of the folder that each photo is in, by the photo's name."""
    return {path.name: path.parent.name for path in output.glob("[!.]*/*")}


def _environment() -> dict[str, str]:
    # The user's own settings must not affect the measurement.
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("SORTER_")} | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
    }


def _note_peaks(root: int, peaks: dict[int, int]) -> None:
    """Update the peak memory, in bytes, of a process and its descendants."""
    parents: dict[int, int] = {}
    found: dict[int, int] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if not entry.isdigit():
            continue
        try:
            status = Path("/proc", entry, "status").read_text(encoding="utf-8", errors="replace")
        except OSError:  # the process has ended
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        parents[int(entry)] = int(fields["PPid"])
        if "VmHWM" in fields:
            found[int(entry)] = int(fields["VmHWM"].split()[0]) * 1024
    for process, peak in found.items():
        above = process
        while above and above != root:
            above = parents.get(above, 0)
        if above == root:
            peaks[process] = max(peak, peaks.get(process, 0))
