"""Corrections beside a daemon, beside each other, and after a kill: each photo once, and a history that is true."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import GREEN, RED, Running, hashes, make_tree, plain, read_tree, small_manifest
from test_corrections import Library

from sorter.history.corrections_reader import CorrectionsReader
from sorter.history.reader import Counts, HistoryReader
from sorter.history.store import History
from sorter.moving.recovery import Recovered, recover
from sorter.review.corrections import Corrections, Verdict, Version

CLASSES = small_manifest().classes
REVIEW = """
import os, sys, time
from pathlib import Path
from conftest import small_manifest
from sorter.history.reader import HistoryReader
from sorter.history.store import History
from sorter.moving.mover import Mover
from sorter.review.corrections import Corrections, Verdict, Version
output = Path(sys.argv[1])
corrections = Corrections(output, small_manifest().classes)
reader = HistoryReader(output, beside_writer=True)
def verdict(entry, label):
    return Verdict(entry.id, Version(entry.size, entry.mtime_ns), label, "corrected")
"""
KILLED = {
    "before the move": "Mover.move = lambda *_: os.kill(os.getpid(), 9)",
    "after the move": "Mover.settle = lambda *_: os.kill(os.getpid(), 9)",
    "before it is recorded": "History.settle = lambda *_: os.kill(os.getpid(), 9)",
}


def review(output: Path, code: str) -> "subprocess.Popen[str]":
    """Start a review in a process of its own."""
    command = [sys.executable, "-c", REVIEW + code, str(output)]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)


@pytest.fixture(params=KILLED)
def killed(request: pytest.FixtureRequest, library: Library) -> Library:
    """An output in which a correction of cats/a.jpg, with a sidecar, to dogs/ was killed."""
    make_tree(library.inbox, {"a.jpg": plain(RED), "a.xmp": b"about a"})
    library.take_as("cat", "a.jpg", "a.xmp")
    code = f"{KILLED[request.param]}\ncorrections.decide([verdict(reader.photos()[0], 'dog')])"
    with review(library.output, code) as process:
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -9
    assert library.rows("SELECT count(*) FROM moves WHERE done IS NULL") == [(2,)]
    return library


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path, small_manifest())


def is_true(library: Library) -> bool:
    """Whether the photo and the sidecar are where the history says, and its verdict as well."""
    with contextlib.closing(CorrectionsReader(library.output)) as reader:
        places = {reader.photos()[0].place} | {entry.place for entry in reader.sidecars(reader.photos()[0])}
    ((unfinished,),) = library.rows("SELECT count(*) FROM moves WHERE done IS NULL")
    verdicts = library.rows("SELECT label FROM verdicts")
    expected = [("dog",)] if "dogs/a.jpg" in places else []
    return (set(read_tree(library.output)), unfinished, verdicts) == (places, 0, expected)


def test_the_next_review_clears_up(killed: Library) -> None:
    killed.decide()
    assert is_true(killed)
    assert killed.correct("a.jpg", None) == "unsure/a.jpg"
    assert set(read_tree(killed.output)) == {"unsure/a.jpg", "unsure/a.xmp"}


def test_an_undo_clears_up_and_restores_the_photo(killed: Library) -> None:
    killed.undo("--last")
    assert read_tree(killed.output) == {}
    assert read_tree(killed.inbox) == {"a.jpg": plain(RED), "a.xmp": b"about a"}
    assert killed.rows("SELECT count(*) FROM moves WHERE done IS NULL") == [(0,)]


def test_a_start_of_the_sorter_clears_up_under_the_lock_of_undo_and_not_under_its_own(killed: Library) -> None:
    with contextlib.closing(History(killed.output)) as history:
        assert recover(history, killed.output, undoing=False) == Recovered(0, 0, ())
        found = recover(history, killed.output, sorting=False)
        assert found.moved + found.stayed == 2
    assert is_true(killed)


def test_an_output_that_was_renamed_after_the_kill_is_cleared_up_as_well(killed: Library) -> None:
    arrived = (killed.output / "dogs/a.jpg").exists()
    killed.output = killed.output.rename(killed.output.with_name("renamed"))
    killed.decide()
    assert is_true(killed)
    assert (killed.output / "dogs/a.jpg").exists() == arrived


def test_two_reviews_of_the_same_photos_lose_none(library: Library) -> None:
    names = [f"{n}.jpg" for n in range(10)]
    make_tree(library.inbox, {name: plain(RED, n) for n, name in enumerate(names)})
    before = hashes(library.inbox)
    library.take_as("cat", *names)
    code = """
def done(outcome):
    assert not outcome.error, outcome
    time.sleep(0.005)  # a person takes longer, and so the other one gets the lock too
for label in ("dog", "cat", None, "dog") * 2:
    for entry in reader.photos():
        done(corrections.decide([verdict(entry, label)])[0])
for entry in reader.photos():
    done(corrections.take_back(entry.id))
corrections.close()
"""
    processes = [review(library.output, code) for _ in range(2)]
    assert [process.communicate(timeout=100)[1] for process in processes] == ["", ""]
    assert hashes(library.output) == before
    with library.reader() as reader:
        assert {entry.place for entry in reader.photos()} == set(read_tree(library.output))
    assert library.rows("SELECT count(*) FROM moves WHERE done IS NULL") == [(0,)]
    library.undo("--last")
    assert hashes(library.inbox) == before


@pytest.fixture
def daemon(tmp_path: Path, library: Library) -> Iterator[Running]:
    """A daemon that sorts the library's inbox."""
    values = {"inbox": str(library.inbox), "output": str(library.output), "settle_seconds": 0.1}
    program = str(Path(__file__).with_name("light_daemon.py"))
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = Running([sys.executable, program, json.dumps(values)], tmp_path / "log", path)
    yield running
    running.process.kill()
    running.process.communicate()


@pytest.mark.long
def test_corrections_beside_a_daemon_lose_nothing_and_undo_brings_everything_back(
    library: Library, daemon: Running, proved: Callable[[str], None]
) -> None:
    count, corrected, seconds = 2000, set[int](), list[float]()
    make_tree(library.output, {f"{('dogs', 'cats')[n % 2]}/{n}.jpg": b"taken" for n in range(0, count, 3)})
    taken = set(read_tree(library.output))
    make_tree(library.inbox, {f"{n}.jpg": plain((RED, GREEN)[n % 2], n) for n in range(count)})
    before = read_tree(library.inbox)
    daemon.wait_for_event("photo.sorted", 20)
    with contextlib.closing(Corrections(library.output, CLASSES)) as corrections:
        reader = HistoryReader(library.output, beside_writer=True)
        while len(corrected) < 200:
            entry = next(entry for entry in reader.photos(order="m.id DESC", limit=300) if entry.id not in corrected)
            label = "dog" if entry.place.startswith("cats/") else "cat"
            began = time.perf_counter()
            verdict = Verdict(entry.id, Version(entry.size, entry.mtime_ns), label, "corrected")
            assert [outcome.error for outcome in corrections.decide([verdict])] == [""]
            seconds.append(time.perf_counter() - began)
            corrected.add(entry.id)
        daemon.wait_for_event("photo.sorted", count, seconds=200)
        reader.close()
    daemon.process.terminate()
    assert daemon.finish()[0] == 0
    there = read_tree(library.output)
    assert Counter(there.values()) == Counter([*before.values(), *[b"taken"] * len(taken)])
    with library.reader() as reader:
        assert {entry.place for entry in reader.photos()} == set(there) - taken
        assert sum(entry.corrected for entry in reader.photos()) == len(corrected)
    assert library.rows("SELECT count(*) FROM moves WHERE done IS NULL") == [(0,)]
    assert library.rows("SELECT count(*), count(DISTINCT source) FROM moves WHERE target IS NULL") == [(count,) * 2]
    library.undo("--last")
    assert (read_tree(library.inbox), set(read_tree(library.output))) == (before, taken)
    assert library.counts() == Counts({}, count)
    middle, late = sorted(seconds)[len(seconds) // 2], sorted(seconds)[len(seconds) * 95 // 100]
    proved(f"200 corrections beside a daemon that sorts {count} photos: {middle * 1e3:.0f} ms, p95 {late * 1e3:.0f} ms")


@pytest.mark.long
def test_photos_moved_by_hand_beside_a_daemon_are_followed_and_undo_brings_everything_back(
    library: Library, daemon: Running
) -> None:
    count, moved = 600, dict[str, str]()
    make_tree(library.inbox, {f"{n}.jpg": plain((RED, GREEN)[n % 2], n) for n in range(count)})
    before = read_tree(library.inbox)
    daemon.wait_for_event("photo.sorted", 20)
    with contextlib.closing(Corrections(library.output, CLASSES)) as corrections:
        followed = 0
        while len(moved) < 50:
            there = {path.name: path for path in library.output.glob("*s/*.jpg") if path.name not in moved}
            for name in sorted(there)[:10]:
                folder = "dogs" if there[name].parent.name == "cats" else "cats"
                subprocess.run(["mv", "-n", there[name], library.output / folder], check=True)
                moved[name] = folder
            followed += corrections.follow_hand_moves()
        daemon.wait_for_event("photo.sorted", count, seconds=200)
        followed += corrections.follow_hand_moves()
    daemon.process.terminate()
    assert daemon.finish()[0] == 0
    assert followed == len(moved) == 50
    with library.reader() as reader:
        assert {entry.place for entry in reader.photos()} == set(read_tree(library.output))
        assert {entry.name for entry in reader.photos() if entry.corrected} == set(moved)
    found = library.rows("SELECT m.source, v.label || 's' FROM verdicts v JOIN moves m ON m.id = v.move")
    assert {os.fsdecode(name): folder for name, folder in found} == moved
    assert library.rows("SELECT count(*), count(DISTINCT source) FROM moves WHERE target IS NULL") == [(count,) * 2]
    library.undo("--last")
    assert (read_tree(library.inbox), read_tree(library.output)) == (before, {})
