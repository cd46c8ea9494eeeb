"""The mover, the history and the recovery for real, with decisions that are always the same and no torch.

    python driver.py INBOX OUTPUT {move,reserve,link,unlink,correct,revert,follow}

`reserve` moves as on a file system without hard links, or renames that replace nothing; `link` is what --link does,
`unlink` the undo of it. `correct` makes dogs of all cats and cats of all dogs, `revert` takes that back, and `follow`
records that somebody has done it by hand.

Exit codes: 0 every photo was moved, 1 the storage refused, 2 it could not start, 3 some photos stayed.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from sorter.classifier.manifest import Class
from sorter.decisions import Decision, Outcome
from sorter.decoding.decoded import Decoded
from sorter.errors import SorterError
from sorter.files import atomic, inodes
from sorter.files.atomic import make_folder
from sorter.files.lock import UNDOING, Lock
from sorter.files.photo import Photo
from sorter.history.reader import HistoryReader
from sorter.history.store import History, Run
from sorter.inbox.scan import Inbox
from sorter.moving.batch_mover import BatchMover
from sorter.moving.mover import Mover
from sorter.moving.recovery import recover
from sorter.moving.undo import Undo
from sorter.review.corrections import Corrections, Verdict, Version

BATCH_SIZE = 2
CLASSES = (Class(label="cat", folder="cats"), Class(label="dog", folder="dogs"))


def decide(photo: Photo, run: Run) -> Decision:
    folder = "dogs" if photo.name.startswith("deep/") else "cats"
    return Decision(Decoded(photo, "pixels"), "sorted", folder, folder[:-1], 0.9, BATCH_SIZE, run=run)


def without_links() -> None:
    """Play a file system that has neither; none that this machine surely has lacks them."""
    atomic._rename_function = None
    for device in {os.stat(folder).st_dev for folder in (inbox, output.parent)}:
        inodes.distrust(device)


def sort(
    inbox: Path, output: Path, decide: Callable[[Photo, Run], Decision | None] = decide, *, link: bool = False
) -> int:
    make_folder(output)
    for folder in (inbox, output):
        Lock(folder).take()
    history = History(output)
    recover(history, output)
    run = Run(str(time.time_ns()), "0", "constant")
    history.begin(run)
    mover = BatchMover(Mover(output, link=link), history, patient=False, stopping=threading.Event())
    excluded = frozenset({str(output / "cats"), str(output / "dogs")})
    photos = sorted(Inbox(inbox, recursive=True, excluded=excluded, settle_seconds=0).scan(time.time()), key=str)
    if link:
        reader = HistoryReader(output, beside_writer=True)
        photos = [photo for photo in photos if reader.last_link(photo) is None]
        reader.close()
    outcomes: list[Outcome] = []
    for start in range(0, len(photos), BATCH_SIZE):
        decisions = [decide(photo, run) for photo in photos[start : start + BATCH_SIZE]]
        if batch := [decision for decision in decisions if decision is not None]:
            mover.move(batch, outcomes.append)
    history.finish()
    history.close()
    return 0 if all(outcome.destination for outcome in outcomes) else 3


def unlink(output: Path) -> int:
    Lock(output, UNDOING).take()
    history = History(output)
    recover(history, output)
    reader = HistoryReader(output, beside_writer=True)
    run = Run(str(time.time_ns()), "0", "", kind="undo")
    results = list(Undo(output, history, run, threading.Event()).restore(list(reader.undoable())))
    reader.close()
    history.close()
    return 3 if any(undone.problem for undone in results) else 0


def review(output: Path, mode: str) -> int:
    corrections, outcomes = Corrections(output, CLASSES), []
    corrections.decide([])  # clears up what a kill has left
    if mode == "follow":
        corrections.follow_hand_moves()
        corrections.close()
        return 0
    reader = HistoryReader(output, beside_writer=True)
    judged = "EXISTS (SELECT 1 FROM verdicts v WHERE v.move = m.id)"
    entries = reader.photos(f" AND {'NOT ' if mode == 'correct' else ''}{judged}")
    reader.close()
    if mode == "revert":
        outcomes += [corrections.take_back(entry.id) for entry in entries]
    for start in range(0, len(entries) if mode == "correct" else 0, BATCH_SIZE):
        outcomes += corrections.decide(
            [
                Verdict(e.id, Version(e.size, e.mtime_ns), "cat" if e.place.startswith("dogs/") else "dog", "corrected")
                for e in entries[start : start + BATCH_SIZE]
            ]
        )
    corrections.close()
    return 3 if any(outcome.error for outcome in outcomes) else 0


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        inbox, output, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
        if mode == "reserve":
            without_links()
        if mode in ("correct", "revert", "follow"):
            sys.exit(review(output, mode))
        sys.exit(unlink(output) if mode == "unlink" else sort(inbox, output, link=mode == "link"))
    except SorterError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
