"""Kill or refuse the mover and the history at every single call that changes a file; `make torture` does all of it."""

import compileall
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Running, hashes, make_tree, photo, read_tree

import sorter

sys.path.insert(0, str(Path(__file__).parent / "torture"))
import sweep

MODES: tuple[sweep.Mode, ...] = ("move", "reserve", "link", "unlink", "correct", "revert", "follow")
FAULTS = ("signal=SIGKILL", *(f"error={error}" for error in sweep.ERRORS))
# The others share most of their steps with moves, so of the errors one will do, and for corrections a full disk.
SWEEPS = [("move", fault) for fault in FAULTS] + [(m, f) for m in MODES[1:] for f in ("signal=SIGKILL", "error=EIO")]
SWEEPS += [(mode, "error=ENOSPC") for mode in ("correct", "revert")]


@pytest.fixture(params=["one file system", "two file systems"])
def parents(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Where an inbox and an output can be made."""
    if shutil.which("strace") is None or subprocess.run(["strace", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs strace, and the right to use it")
    memory = Path("/dev/shm")
    if request.param == "one file system":
        yield tmp_path, tmp_path
    elif not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    else:
        yield tmp_path, memory


def points_of(parents: tuple[Path, Path], mode: sweep.Mode) -> list[sweep.Point]:
    if mode in ("correct", "revert") and parents[0] != parents[1] and os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    if mode == "follow" and parents[0] != parents[1]:
        pytest.skip("no file is touched, wherever it is")
    # Calls are found again by their number, and a module that another test compiles meanwhile has fewer of them.
    compileall.compile_dir(Path(sorter.__file__).parent, quiet=1)
    place = sweep.Place(*parents, mode)
    try:
        found = place.points()
        assert place.wrong_after() == []
    finally:
        place.remove()
    return found


def attack_all(parents: tuple[Path, Path], mode: sweep.Mode, attacks: list[tuple[sweep.Point, str]]) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda attack: sweep.attack(*parents, mode, *attack), attacks))
    return [line for report in reports for line in report]


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_a_sample_of_kills_and_errors_loses_nothing(parents: tuple[Path, Path], mode: sweep.Mode) -> None:
    points = points_of(parents, mode)
    moves = [p for p in points if p.call.startswith(("rename", "link", "unlink", "mkdir"))]
    kills = [(point, FAULTS[0]) for point in (*sweep.sample(moves, 6), *sweep.sample(points, 6))]
    errors = [(point, fault) for fault, point in zip(FAULTS[1:], sweep.sample(points, len(FAULTS) - 1), strict=True)]
    assert attack_all(parents, mode, kills + errors) == []


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_no_kill_of_the_real_sorter_at_a_random_moment_loses_anything(
    parents: tuple[Path, Path], start: Callable[..., Running], proved: Callable[[str], None]
) -> None:
    moments, kills = random.Random(20), 0
    inbox, output = (Path(tempfile.mkdtemp(prefix="sorter-torture-", dir=parent)) for parent in parents)
    try:
        make_tree(inbox, {f"{n}.jpg": photo(n) for n in range(4000)})  # more than fast machines sort before 12 kills
        before = hashes(inbox)
        for _ in range(12):
            running = start("run", "--once", "--inbox", inbox, "--output", output)
            running.wait_for_event("photo.sorted", moments.randrange(1, 100))
            time.sleep(moments.random() / 10)
            running.process.kill()
            kills += running.process.wait() == -9
            assert set(hashes(inbox)) | set(hashes(output)) >= set(before)
        code, _ = start("run", "--once", "--inbox", inbox, "--output", output).finish(seconds=600)
        assert (code, read_tree(inbox), hashes(output)) == (0, {}, before)
        with sqlite3.connect(output / ".sorter/history.sqlite3") as history:
            assert history.execute("SELECT count(*), count(done) FROM moves").fetchone() == (len(before), len(before))
        history.close()
    finally:
        shutil.rmtree(inbox)
        shutil.rmtree(output)
    assert kills == 12
    proved(f"{kills} kills of the real sorter at random moments, {_where(parents)}: none of {len(before)} photos lost")


def _where(parents: tuple[Path, Path]) -> str:
    return "two file systems" if parents[0] != parents[1] else "one file system"


@pytest.mark.torture
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("mode", "fault"), SWEEPS)
def test_no_kill_and_no_error_at_any_call_loses_anything(
    parents: tuple[Path, Path],
    mode: sweep.Mode,
    fault: str,
    proved: Callable[[str], None],
    pytestconfig: pytest.Config,
) -> None:
    points = points_of(parents, mode)
    assert len(points) > 40
    every = pytestconfig.getoption("every")
    attacks = [(point, fault) for point in points[::every]]
    assert attack_all(parents, mode, attacks) == []
    what = {
        "move": "",
        "reserve": " without renames or links that are safe",
        "link": " with --link",
        "unlink": " in the undo of --link",
        "correct": " in corrections",
        "revert": " where corrections are taken back",
        "follow": " where moves by hand are recorded",
    }[mode]
    proved(
        f"{fault.partition('=')[2]} at {'each' if every == 1 else len(attacks)} of {len(points)} calls that change a "
        f"file{what}, {_where(parents)}: zero lost"
    )


def test_what_is_durable_comes_in_the_right_order(parents: tuple[Path, Path]) -> None:
    """A kill cannot show what a power cut takes: the order of the syncs is read from the trace."""
    place = sweep.Place(*parents)
    try:
        calls = [re.sub(r"^\d+ +", "", point.line) for point in place.points()]
    finally:
        place.remove()
    across = parents[0].stat().st_dev != parents[1].stat().st_dev

    def find(pattern: str, start: int = 0) -> int:
        return next((i for i in range(start, len(calls)) if re.search(pattern, calls[i])), len(calls))

    written, synced = r"^pwrite64\(.*-wal>", r"^f(data)?sync\(.*-wal>"
    removed = rf'^renameat2\(.*/in>, "b\.jpg", .*{"sorter-away" if across else "b.jpg"}"'
    published = r'^renameat2\(.*/out/cats>, ".*sorter-part", .*"b\.jpg"' if across else removed
    intent = max(i for i in range(find(published)) if re.search(written, calls[i]))
    assert intent < find(synced, intent) < find(published), "the intent is on the disk before its photo moves"
    if across:
        copied = max(i for i in range(find(published)) if re.search(r"^write\(.*sorter-part>", calls[i]))
        assert copied < find(r"^fsync\(.*sorter-part>", copied) < find(published), (
            "the copy is, before it gets its name"
        )
        assert find(published) < find(r"^fsync\(.*/out/cats>", find(published)) < find(removed), "its name is, before"
    done = find(written, find(removed))
    new = find(r"^fsync\(.*/out/cats>", find(published))
    old = find(r"^fsync\(.*/in>", find(removed))
    assert find(published) < new < old < done < len(calls), "both folders are, before the move is recorded as done"
    moved = find(r'^renameat2\(.*/out/dogs/deep>, "a\.jpg"')
    for parent, folder in (("/out", "dogs"), ("/out/dogs", "deep")):
        made = find(rf'^mkdirat\(.*{parent}>, "{folder}"')
        assert made < find(rf"^fsync\(.*{parent}>", made) < moved < len(calls), (
            "a new folder is, before its first photo"
        )


@pytest.mark.parametrize("mode", ["correct", "revert"])
def test_what_is_durable_of_a_correction_comes_in_the_right_order(tmp_path: Path, mode: sweep.Mode) -> None:
    if shutil.which("strace") is None or subprocess.run(["strace", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs strace, and the right to use it")
    place = sweep.Place(tmp_path, tmp_path, mode)
    try:
        calls = [re.sub(r"^\d+ +", "", point.line) for point in place.points()]
    finally:
        place.remove()

    def find(pattern: str, start: int) -> int:
        return next((i for i in range(start, len(calls)) if re.search(pattern, calls[i])), len(calls))

    folders = r'^renameat2\(\d+<([^>]*/out/[^>]*)>, ".*", \d+<([^>]*/out/[^>]*)>'
    moved = [(number, match) for number, call in enumerate(calls) if (match := re.match(folders, call))]
    assert len(moved) == len(sweep.PHOTOS) + 1, "and the sidecar"
    for number, match in moved:
        old, new = (find(rf"^fsync\(\d+<{re.escape(folder)}>\)", number) for folder in match.groups())
        intent = max(i for i in range(number) if re.search(r"^pwrite64\(.*-wal>", calls[i]))
        assert intent < find(r"^f(data)?sync\(.*-wal>", intent) < number, "the intent is on the disk before"
        assert number < new < old < find(r"^pwrite64\(.*-wal>", number), "and both folders are, before it is done"
