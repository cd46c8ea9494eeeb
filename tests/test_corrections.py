"""What a person says of sorted photos: recorded, carried out inside the output, taken back, and undone with all."""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest
from conftest import GREEN, LONG_AGO, RED, RedGreenEngine, make_tree, pipeline_to, plain, read_tree
from structlog.testing import capture_logs
from test_undo import sorter

from sorter.classifier.manifest import Manifest
from sorter.cli import preflight
from sorter.decisions import Decision
from sorter.decoding.decoded import Decoded
from sorter.errors import ConfigurationError, ExitCode, NotNowError, StorageError
from sorter.files import FOLDER, HISTORY
from sorter.files.atomic import StayedError, sync_folder
from sorter.files.lock import UNDOING, Lock
from sorter.files.state import state_folder
from sorter.history.reader import Counts, Entry, HistoryReader
from sorter.history.store import History, Run
from sorter.inbox.scan import Inbox
from sorter.moving.batch_mover import BatchMover
from sorter.moving.mover import Mover
from sorter.review.corrections import Corrections, Outcome, Verdict, Version
from sorter.service.counters import Counters
from sorter.service.loop import Service
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

BROWN = (128, 124, 60)  # a cat at 62 %
How = Literal["corrected", "confirmed", "checked"]


class Library:
    """An inbox and an output, and what can be done with both in this process."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.inbox, self.output, self.manifest = root / "in", root / "out", manifest
        self.inbox.mkdir()
        self.output.mkdir()

    def sort(self, inbox: Path | None = None, **values: Any) -> tuple[Counters, list[Any]]:
        """Sort a backlog."""
        settings = Settings(inbox=inbox or self.inbox, output=self.output, once=True, settle_seconds=0, **values)
        box = preflight.watched(settings, self.manifest)
        again = preflight.sorted_again(settings)
        pipeline = pipeline_to(self.output, RedGreenEngine(), self.manifest, settings, sorted_again=again)
        reader = HistoryReader(self.output, beside_writer=True)
        try:
            with capture_logs() as logs:
                service = Service(settings, box, pipeline, Shutdown(0), None, log_fields={}, history=reader)
                return service.run_once(), logs
        finally:
            reader.close()

    def take_as(self, label: str, *names: str) -> None:
        """Sort photos, and sidecars named after them, as a model would that answers so; quicker than one that looks."""
        scanned = Inbox(self.inbox, recursive=True, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
        found = {photo.name: photo for photo in scanned}
        with contextlib.closing(History(self.output)) as history:
            run = Run(uuid4().hex[:12], "0", "model")
            history.begin(run)
            batch_mover = BatchMover(Mover(self.output), history, patient=False, stopping=threading.Event())
            for name in names:
                decoded, folder = Decoded(found[name], "pixels"), f"{label}s"
                if name.endswith(".xmp"):
                    photo = name.replace(".xmp", ".jpg")
                    decision = Decision(decoded, "sidecar", folder, name=name, follows=photo, run=run)
                else:
                    decision = Decision(decoded, "sorted", folder, label, 0.75, run=run)
                batch_mover.move([decision], lambda _: None)
            history.finish()

    @contextlib.contextmanager
    def reader(self) -> Iterator[HistoryReader]:
        reader = HistoryReader(self.output)
        try:
            yield reader
        finally:
            reader.close()

    @contextlib.contextmanager
    def review(self) -> Iterator[Corrections]:
        corrections = Corrections(self.output, self.manifest.classes)
        try:
            yield corrections
        finally:
            corrections.close()

    def entry(self, name: str) -> Entry:
        """The last sorting move of a photo from the inbox."""
        with self.reader() as reader:
            return [e for e in reader.entries() if e.name == name and e.root == str(self.inbox)][-1]

    def verdict(self, name: str, label: str | None, how: How = "corrected") -> Verdict:
        """A verdict on a photo as it is now."""
        entry = self.entry(name)
        status = os.stat(entry.destination)
        return Verdict(entry.id, Version(status.st_size, status.st_mtime_ns), label, how)

    def decide(self, *verdicts: Verdict) -> list[Outcome]:
        with self.review() as review:
            return review.decide(verdicts)

    def correct(self, name: str, label: str | None) -> str:
        """Correct one photo; where it is then, inside the output."""
        (outcome,) = self.decide(self.verdict(name, label))
        assert outcome.error == ""
        return os.path.relpath(outcome.path, self.output)

    def rows(self, query: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.output / FOLDER / HISTORY)) as connection:
            return connection.execute(query).fetchall()

    def undo(self, *flags: str | Path, code: int = 0) -> str:
        return sorter("undo", "--inbox", self.inbox, "--output", self.output, *flags, code=code)

    def history(self) -> list[dict[str, Any]]:
        text = sorter("history", "--inbox", self.inbox, "--output", self.output, "--json")
        return [json.loads(line) for line in text.splitlines()]

    def counts(self) -> Counts:
        with self.reader() as reader:
            return reader.counts()


@pytest.fixture
def library(tmp_path: Path, manifest: Manifest) -> Library:
    return Library(tmp_path, manifest)


@pytest.fixture
def sorted_library(library: Library) -> Library:
    """A dog from one run, and from the next a cat with its sidecar."""
    make_tree(library.inbox, {"a.jpg": plain(RED), "a.xmp": b"about a", "b.jpg": plain(GREEN)})
    library.take_as("dog", "b.jpg")
    library.take_as("cat", "a.jpg", "a.xmp")
    assert set(read_tree(library.output)) == {"cats/a.jpg", "cats/a.xmp", "dogs/b.jpg"}
    return library


def test_a_correction_moves_the_photo_and_its_sidecar_and_is_recorded(sorted_library: Library) -> None:
    entry = sorted_library.entry("a.jpg")
    (outcome,) = sorted_library.decide(sorted_library.verdict("a.jpg", "dog"))
    assert outcome == Outcome(entry.id, str(sorted_library.output / "dogs/a.jpg"))
    assert read_tree(sorted_library.output) == {
        "dogs/a.jpg": plain(RED),
        "dogs/a.xmp": b"about a",
        "dogs/b.jpg": plain(GREEN),
    }
    digest = hashlib.sha256(plain(RED)).digest()
    assert sorted_library.rows("SELECT move, label, how, digest, label_was, model FROM verdicts") == [
        (entry.id, "dog", "corrected", digest, "cat", "model")
    ]
    assert sorted_library.rows("SELECT confidence FROM verdicts") == [(entry.confidence,)]
    assert sorted_library.rows("SELECT count(*) FROM moves WHERE done IS NULL") == [(0,)]
    assert sorted_library.rows("SELECT count(*), count(finished) FROM runs WHERE kind = 'review'") == [(1, 1)]
    assert sorted_library.entry("a.jpg").destination == outcome.path
    assert sorted_library.counts() == Counts({"dogs": 2}, 0)


def test_a_correction_is_durable_before_it_moves_and_belongs_to_its_output(
    sorted_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, found = Mover.move, []

    def looked_at(self: Mover, plan: Any) -> None:
        found.append(sorted_library.rows("SELECT target, folder FROM moves WHERE done IS NULL ORDER BY id"))
        found.append(sorted_library.rows("SELECT label FROM verdicts"))
        move(self, plan)

    monkeypatch.setattr(Mover, "move", looked_at)
    sorted_library.correct("a.jpg", "dog")
    target = os.fsencode(sorted_library.output)
    assert found[:2] == [[(target, "dogs"), (target, "dogs")], [("dog",)]]


def test_each_photo_of_a_batch_is_durable_in_its_new_folder_before_its_old_one_is_synced(
    sorted_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, ...]] = []
    move = Mover.move

    def noted_move(self: Mover, plan: Any) -> None:
        move(self, plan)
        events.append(("move", os.path.dirname(plan.photo.name), plan.folder))

    def noted_sync(descriptor: int) -> None:
        sync_folder(descriptor)
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))

    monkeypatch.setattr(Mover, "move", noted_move)
    monkeypatch.setattr("sorter.moving.mover.sync_folder", noted_sync)
    both = sorted_library.verdict("a.jpg", "dog"), sorted_library.verdict("b.jpg", "cat")
    assert [outcome.error for outcome in sorted_library.decide(*both)] == ["", ""]
    moves = [(number, event) for number, event in enumerate(events) if event[0] == "move"]
    assert len(moves) == 3
    for number, (_, old, new) in moves:
        assert events.index(("sync", new), number) < events.index(("sync", old), number)


def test_what_is_neither_goes_to_unsure(sorted_library: Library) -> None:
    assert sorted_library.correct("a.jpg", None) == "unsure/a.jpg"
    assert sorted_library.rows("SELECT label, how FROM verdicts") == [(None, "corrected")]
    assert sorted_library.counts() == Counts({"dogs": 1, "unsure": 1}, 0)


def test_a_confirmation_moves_nothing(sorted_library: Library) -> None:
    before = {path: path.stat().st_ctime_ns for path in sorted_library.output.glob("*s/*")}
    outcomes = sorted_library.decide(
        sorted_library.verdict("a.jpg", "cat", "confirmed"), sorted_library.verdict("b.jpg", "dog", "checked")
    )
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert {path: path.stat().st_ctime_ns for path in sorted_library.output.glob("*s/*")} == before
    assert sorted_library.rows("SELECT label, how, correction FROM verdicts ORDER BY id") == [
        ("cat", "confirmed", None),
        ("dog", "checked", None),
    ]
    assert sorted_library.rows("SELECT count(*) FROM moves WHERE target IS NOT NULL") == [(0,)]


def test_a_check_that_finds_the_photo_wrong_moves_it(sorted_library: Library) -> None:
    (outcome,) = sorted_library.decide(sorted_library.verdict("a.jpg", "dog", "checked"))
    assert outcome.path == str(sorted_library.output / "dogs/a.jpg")
    assert sorted_library.rows("SELECT how FROM verdicts") == [("checked",)]


def test_a_confirmation_of_another_folder_than_the_photos_is_refused(sorted_library: Library) -> None:
    (outcome,) = sorted_library.decide(sorted_library.verdict("a.jpg", "dog", "confirmed"))
    assert outcome.error == f"{outcome.path} is not in dogs/: correct it instead of confirming it"
    assert outcome.is_changed
    assert sorted_library.rows("SELECT count(*) FROM verdicts") == [(0,)]
    assert (sorted_library.output / "cats/a.jpg").is_file()


def test_a_class_of_another_model_is_confirmed_in_the_folder_that_it_had_there(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED)})
    library.take_as("bird", "a.jpg")
    assert library.decide(library.verdict("a.jpg", "bird", "confirmed"))[0].error == ""
    assert library.correct("a.jpg", "bird") == "birds/a.jpg"
    assert library.correct("a.jpg", "dog") == "dogs/a.jpg"
    (outcome,) = library.decide(library.verdict("a.jpg", "bird"))
    assert "no class of the model" in outcome.error
    assert library.rows("SELECT label, label_was FROM verdicts") == [
        ("bird", "bird"),
        ("bird", "bird"),
        ("dog", "bird"),
    ]


def test_a_history_on_another_disk_is_used_with_its_lock(tmp_path: Path, sorted_library: Library) -> None:
    state = state_folder(sorted_library.output, tmp_path / "state")
    state.parent.mkdir()
    (sorted_library.output / FOLDER).rename(state)
    version = Version(len(plain(RED)), (sorted_library.output / "cats/a.jpg").stat().st_mtime_ns)
    with contextlib.closing(
        Corrections(sorted_library.output, sorted_library.manifest.classes, tmp_path / "state")
    ) as corrections:
        (outcome,) = corrections.decide([Verdict(2, version, "dog", "corrected")])
    assert outcome == Outcome(2, str(sorted_library.output / "dogs/a.jpg"))
    assert (state / UNDOING).is_file()
    assert not (sorted_library.output / FOLDER).exists()


def test_an_output_that_is_gone_is_said_and_not_created(sorted_library: Library) -> None:
    verdict = sorted_library.verdict("a.jpg", "dog")
    with sorted_library.review() as review:
        sorted_library.output.rename(sorted_library.inbox / "away")
        with pytest.raises(StorageError, match="is not there: mount or recreate it"):
            review.decide([verdict])
    assert not sorted_library.output.exists()


def test_a_taken_name_gets_a_number_and_so_does_the_sidecar(sorted_library: Library) -> None:
    make_tree(sorted_library.output, {"dogs/a.jpg": b"somebody else's"})
    assert sorted_library.correct("a.jpg", "dog") == "dogs/a-1.jpg"
    assert set(read_tree(sorted_library.output)) == {"dogs/a.jpg", "dogs/a-1.jpg", "dogs/a-1.xmp", "dogs/b.jpg"}
    assert (sorted_library.output / "dogs/a.jpg").read_bytes() == b"somebody else's"


def test_a_name_that_a_sorter_takes_meanwhile_is_numbered_too(
    sorted_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    intend, others = History.intend, iter([b"first", b"second"])

    def taken(history: History, moves: Any, judgements: Any = ()) -> None:
        with contextlib.suppress(StopIteration):
            make_tree(sorted_library.output, {f"dogs/{os.fsdecode(moves[0].name)}": next(others)})
        intend(history, moves, judgements)

    monkeypatch.setattr(History, "intend", taken)
    assert sorted_library.correct("a.jpg", "dog") == "dogs/a-2.jpg"
    assert (sorted_library.output / "dogs/a.jpg").read_bytes() == b"first"
    assert sorted_library.rows("SELECT count(*), count(correction) FROM verdicts") == [(1, 1)]
    assert sorted_library.rows("SELECT count(*) FROM moves WHERE done IS NULL") == [(0,)]


@pytest.mark.parametrize("is_shown", [True, False], ids=["before it was shown", "after it was shown"])
def test_a_photo_that_changed_is_not_moved(sorted_library: Library, is_shown: bool) -> None:
    photo = sorted_library.output / "cats/a.jpg"
    verdict = sorted_library.verdict("a.jpg", "dog")
    photo.write_bytes(b"edited")
    if is_shown:
        verdict = sorted_library.verdict("a.jpg", "dog")
    (outcome,) = sorted_library.decide(verdict)
    assert outcome.is_changed
    # Never that the page should be reloaded, which does not show it again.
    assert outcome.error == f"{photo} was changed or replaced since it was sorted: move it yourself"
    assert photo.read_bytes() == b"edited"
    assert sorted_library.rows("SELECT count(*) FROM verdicts") == [(0,)]


def test_a_photo_that_is_gone_or_only_touched_since_it_was_shown_is_said_with_what_helps(
    sorted_library: Library,
) -> None:
    verdict, photo = sorted_library.verdict("a.jpg", "dog"), sorted_library.output / "cats/a.jpg"
    os.utime(photo, ns=(0, verdict.version.mtime_ns + 10**9))  # as sorted, to a coarse file system
    assert sorted_library.decide(verdict)[0].error == f"{photo} changed since it was shown: reload the page"
    photo.unlink()
    (outcome,) = sorted_library.decide(verdict)
    assert outcome.error == f"{photo} is gone: if you moved it, start sorter review again"


def test_one_bad_verdict_holds_up_no_other(sorted_library: Library) -> None:
    good, bad = sorted_library.verdict("b.jpg", "cat"), sorted_library.verdict("a.jpg", "bird")
    (sorted_library.output / "cats/a.jpg").rename(sorted_library.output / "elsewhere")
    gone = Verdict(bad.photo, bad.version, "dog", "corrected")
    unknown = Verdict(999, bad.version, "dog", "corrected")
    outcomes = sorted_library.decide(unknown, gone, good)
    assert [(outcome.photo, bool(outcome.error), outcome.is_changed) for outcome in outcomes] == [
        (999, True, True),
        (gone.photo, True, True),
        (good.photo, False, False),
    ]
    (outcome,) = sorted_library.decide(Verdict(good.photo, good.version, "bird", "corrected"))
    assert outcome.error.endswith("which is no class of the model: choose one of cat, dog")
    assert set(read_tree(sorted_library.output)) == {"elsewhere", "cats/a.xmp", "cats/b.jpg"}


def test_a_link_or_a_fifo_in_a_photos_place_is_neither_read_nor_moved(sorted_library: Library) -> None:
    verdict, photo = sorted_library.verdict("a.jpg", "dog"), sorted_library.output / "cats/a.jpg"
    photo.rename(sorted_library.output / "elsewhere.jpg")
    photo.symlink_to(sorted_library.output / "elsewhere.jpg")
    assert sorted_library.decide(verdict)[0].is_changed
    photo.unlink()
    os.mkfifo(photo)
    assert sorted_library.decide(verdict)[0].is_changed
    assert not (sorted_library.output / "dogs/a.jpg").exists()


def test_a_failed_photo_has_no_class_to_correct(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED)[:200]})
    library.sort()
    (outcome,) = library.decide(library.verdict("a.jpg", "cat"))
    assert outcome.error == f"{outcome.path} could not be read and has no class: use sorter retry failed"


def test_photos_in_subfolders_keep_them_and_names_may_be_any_bytes(library: Library) -> None:
    name = os.fsdecode(b"2019/caf\xe9 <img src=x onerror=alert(1)>\n.jpg")
    make_tree(library.inbox, {name: plain(RED)})
    library.sort(recursive=True)
    assert library.correct(name, "dog") == f"dogs/{name}"
    library.undo("--last")
    assert read_tree(library.inbox) == {name: plain(RED)}


def test_sidecars_go_with_the_photo_that_they_belong_to(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED), "a.png": plain(RED, 1, "PNG"), "b.jpg": plain(RED, 2)})
    library.take_as("cat", "a.jpg", "a.png", "b.jpg")
    # Programs write these after the photos were sorted.
    make_tree(library.output, {"cats/a.jpg.xmp": b"the jpg's", "cats/a.xmp": b"of both", "cats/b.xmp": b"b's"})
    assert library.correct("b.jpg", "dog") == "dogs/b.jpg"
    assert library.correct("a.jpg", "dog") == "dogs/a.jpg"
    assert set(read_tree(library.output / "cats")) == {"a.png", "a.xmp"}
    with library.review() as review:
        both = [library.verdict("a.png", None), library.verdict("a.jpg", None)]
        assert [outcome.error for outcome in review.decide(both)] == ["", ""]
    assert set(read_tree(library.output)) == {
        "dogs/b.jpg",
        "dogs/b.xmp",
        *(f"unsure/{name}" for name in ("a.jpg", "a.jpg.xmp", "a.png", "a.xmp")),
    }


def test_a_sidecar_that_two_photos_of_a_batch_share_goes_with_the_last(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED), "a.png": plain(RED, 1, "PNG")})
    library.take_as("cat", "a.jpg", "a.png")
    make_tree(library.output, {"cats/a.xmp": b"of both"})
    library.decide(library.verdict("a.jpg", "dog"), library.verdict("a.png", "dog"))
    assert set(read_tree(library.output)) == {"dogs/a.jpg", "dogs/a.png", "dogs/a.xmp"}


def test_a_sidecar_whose_name_is_taken_stays_and_is_said(
    sorted_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = Mover.move

    def taken(self: Mover, plan: Any) -> None:
        move(self, plan)
        (sorted_library.output / "dogs/a.xmp").write_bytes(b"somebody else's")

    monkeypatch.setattr(Mover, "move", taken)
    (outcome,) = sorted_library.decide(sorted_library.verdict("a.jpg", "dog"))
    assert outcome.path == str(sorted_library.output / "dogs/a.jpg")
    assert "a.xmp cannot follow its photo" in outcome.warning
    assert (outcome.error, outcome.is_changed) == ("", False)
    assert (sorted_library.output / "cats/a.xmp").read_bytes() == b"about a"


@pytest.mark.parametrize("label", [None, "cat"])
def test_a_sidecar_that_was_left_behind_follows_at_the_next_correction(
    sorted_library: Library, monkeypatch: pytest.MonkeyPatch, label: str | None
) -> None:
    move = Mover.move

    def without_sidecars(self: Mover, plan: Any) -> None:
        if plan.name.endswith(".xmp"):
            raise StayedError("may not be moved")
        move(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Mover, "move", without_sidecars)
        (outcome,) = sorted_library.decide(sorted_library.verdict("a.jpg", "dog"))
    assert (outcome.error, outcome.warning) == ("", f"{sorted_library.output}/cats/a.xmp may not be moved")
    folder = os.path.dirname(sorted_library.correct("a.jpg", label))
    assert set(read_tree(sorted_library.output)) == {f"{folder}/a.jpg", f"{folder}/a.xmp", "dogs/b.jpg"}
    assert sorted_library.rows("SELECT count(*) FROM moves WHERE done IS NULL") == [(0,)]


def test_a_correction_taken_back_leaves_everything_as_it_was(sorted_library: Library) -> None:
    before = read_tree(sorted_library.output)
    with sorted_library.review() as review:
        (outcome,) = review.decide([sorted_library.verdict("a.jpg", "dog")])
        assert review.take_back(outcome.photo) == Outcome(outcome.photo, str(sorted_library.output / "cats/a.jpg"))
        assert read_tree(sorted_library.output) == before
        assert sorted_library.rows("SELECT count(*) FROM verdicts") == [(0,)]
        again = review.take_back(outcome.photo)
        assert again.error == f"{again.path} has no verdict to take back: reload the page"
    assert sorted_library.counts() == Counts({"cats": 1, "dogs": 1}, 0)
    assert not sorted_library.entry("a.jpg").corrected
    sorted_library.undo("--last")
    assert set(read_tree(sorted_library.output)) == {"dogs/b.jpg"}


def test_verdicts_are_taken_back_from_the_newest_to_the_oldest(sorted_library: Library) -> None:
    with sorted_library.review() as review:
        for label, how in (("cat", "confirmed"), ("dog", "corrected"), (None, "corrected"), (None, "confirmed")):
            (outcome,) = review.decide([sorted_library.verdict("a.jpg", label, how)])  # type: ignore[arg-type]
            assert outcome.error == ""
        places = [os.path.relpath(review.take_back(outcome.photo).path, sorted_library.output) for _ in range(4)]
    assert places == ["unsure/a.jpg", "dogs/a.jpg", "cats/a.jpg", "cats/a.jpg"]
    assert sorted_library.rows("SELECT count(*) FROM verdicts") == [(0,)]


def test_a_photo_taken_back_gets_its_own_name_again_or_the_next_free_one(sorted_library: Library) -> None:
    make_tree(sorted_library.output, {"dogs/a.jpg": b"somebody else's"})
    with sorted_library.review() as review:
        (outcome,) = review.decide([sorted_library.verdict("a.jpg", "dog")])
        assert outcome.path.endswith("dogs/a-1.jpg")
        assert review.take_back(outcome.photo).path.endswith("cats/a.jpg")
        review.decide([sorted_library.verdict("a.jpg", "dog")])
        make_tree(sorted_library.output, {"cats/a.jpg": b"a new one"})
        path = review.take_back(outcome.photo).path
    assert (sorted_library.output / "cats/a.jpg").read_bytes() == b"a new one"
    assert Path(path).parent == sorted_library.output / "cats"
    assert Path(path).with_suffix(".xmp").read_bytes() == b"about a"


def test_a_photo_twice_in_a_batch_follows_the_later_verdict(sorted_library: Library) -> None:
    outcomes = sorted_library.decide(sorted_library.verdict("a.jpg", "dog"), sorted_library.verdict("a.jpg", None))
    assert {outcome.path for outcome in outcomes} == {str(sorted_library.output / "unsure/a.jpg")}
    assert sorted_library.rows("SELECT label FROM verdicts") == [(None,)]


def test_undo_brings_corrected_photos_back_to_the_inbox(sorted_library: Library) -> None:
    sorted_library.correct("a.jpg", "dog")
    sorted_library.correct("b.jpg", "cat")
    sorted_library.correct("a.jpg", None)
    planned = sorted_library.undo("--last", "--dry-run").splitlines()
    assert planned[0].split(" ")[::2] == [f"{sorted_library.output}/unsure/a.jpg", f"{sorted_library.inbox}/a.jpg"]
    text = sorted_library.undo("--run", sorted_library.entry("a.jpg").run)
    assert text == "Restored 1 photo and 1 sidecar; 0 could not be restored.\n"
    assert read_tree(sorted_library.output) == {"cats/b.jpg": plain(GREEN)}
    sorted_library.undo("--last")
    assert read_tree(sorted_library.output) == {}
    assert read_tree(sorted_library.inbox) == {"a.jpg": plain(RED), "a.xmp": b"about a", "b.jpg": plain(GREEN)}
    assert sorted_library.counts() == Counts({}, 2)
    sorted_library.undo("--last", code=ExitCode.USAGE)


def test_last_means_the_last_run_that_sorted(sorted_library: Library) -> None:
    sorted_library.correct("b.jpg", "cat")
    with sorted_library.reader() as reader:
        assert reader.last_run() == sorted_library.entry("a.jpg").run
    ((review,),) = sorted_library.rows("SELECT id FROM runs WHERE kind = 'review'")
    sorted_library.undo("--run", review, code=ExitCode.USAGE)
    sorted_library.undo("--last")
    assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "a.xmp"}


@pytest.mark.parametrize("chosen", ["dogs/a.jpg", "dogs", "in/a.jpg", "--since"])
def test_undo_finds_a_corrected_photo_by_any_of_its_places(sorted_library: Library, chosen: str) -> None:
    sorted_library.correct("b.jpg", "cat")
    sorted_library.correct("a.jpg", "dog")
    sorted_library.undo(sorted_library.output / "cats/a.jpg", code=ExitCode.INCOMPLETE)  # it is not there any more
    if chosen == "--since":
        sorted_library.undo("--since", "2020-01-01")
    else:
        sorted_library.undo(sorted_library.output / chosen if chosen[0] == "d" else sorted_library.inbox / "a.jpg")
        assert (sorted_library.output / "cats/b.jpg").is_file()
    assert (sorted_library.inbox / "a.jpg").read_bytes() == plain(RED)
    assert (sorted_library.inbox / "a.xmp").read_bytes() == b"about a"


def test_undo_of_a_folder_leaves_the_photos_that_were_corrected_out_of_it(sorted_library: Library) -> None:
    sorted_library.correct("a.jpg", "dog")
    sorted_library.undo(sorted_library.output / "cats", code=ExitCode.INCOMPLETE)
    assert set(read_tree(sorted_library.output)) == {"dogs/a.jpg", "dogs/a.xmp", "dogs/b.jpg"}


def test_a_corrected_photo_that_was_edited_since_is_not_restored(sorted_library: Library) -> None:
    sorted_library.correct("a.jpg", "dog")
    (sorted_library.output / "dogs/a.jpg").write_bytes(b"edited")
    with sorted_library.review() as review:
        outcome = review.take_back(sorted_library.entry("a.jpg").id)
        assert outcome.is_changed
    sorted_library.undo("--last", code=ExitCode.INCOMPLETE)
    assert (sorted_library.output / "dogs/a.jpg").read_bytes() == b"edited"


def test_a_restored_photo_can_neither_be_corrected_nor_taken_back(sorted_library: Library) -> None:
    verdict = sorted_library.verdict("a.jpg", None)
    sorted_library.correct("a.jpg", "dog")
    sorted_library.undo("--last")
    with sorted_library.review() as review:
        outcomes = [*review.decide([verdict]), review.take_back(verdict.photo)]
    assert {outcome.is_changed for outcome in outcomes} == {True}
    assert sorted_library.rows("SELECT label FROM verdicts") == [("dog",)], "it is still true of the photo"


def test_the_history_shows_where_a_photo_is_and_its_correction(sorted_library: Library) -> None:
    sorted_library.correct("a.jpg", "dog")
    found = {(line["kind"], os.path.basename(line["path"])): line for line in sorted_library.history()}
    first, second = found["sorted", "a.jpg"], found["corrected", "a.jpg"]
    assert first["path"] == str(sorted_library.inbox / "a.jpg")
    assert first["destination"] == second["destination"] == str(sorted_library.output / "dogs/a.jpg")
    assert second["path"] == str(sorted_library.output / "cats/a.jpg")
    assert (first["corrected"], second["corrected"]) == (True, False)
    assert (first["label"], second["label"], second["confidence"], second["model"]) == ("cat", "dog", None, None)
    table = sorter("history", "--inbox", sorted_library.inbox, "--output", sorted_library.output)
    assert "corrected" in table
    assert "a person sees dog" in table
    status = json.loads(sorter("status", "--inbox", sorted_library.inbox, "--output", sorted_library.output, "--json"))
    assert status["in_all"] == {"dogs": 2}


def test_a_sidecar_that_arrives_later_follows_to_where_its_photo_is_now(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED)})
    library.sort()
    make_tree(library.output, {"dogs/a.jpg": b"somebody else's"})
    assert library.correct("a.jpg", "dog") == "dogs/a-1.jpg"
    make_tree(library.inbox, {"a.xmp": b"late"})
    library.sort()
    assert (library.output / "dogs/a-1.xmp").read_bytes() == b"late"
    library.undo(library.output / "dogs/a-1.jpg")
    assert read_tree(library.inbox) == {"a.jpg": plain(RED), "a.xmp": b"late"}


def test_a_retry_leaves_alone_what_a_person_called_neither(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(BROWN), "b.jpg": plain(BROWN, 1), "c.jpg": plain(BROWN, 2)})
    library.sort(min_confidence=0.9)
    library.decide(library.verdict("a.jpg", None, "confirmed"), library.verdict("c.jpg", "cat"))
    library.correct("c.jpg", None)
    counters, logs = library.sort(library.output / "unsure", include_undone=True)
    assert set(read_tree(library.output)) == {"unsure/a.jpg", "cats/b.jpg", "unsure/c.jpg"}
    assert counters.kept == {"unsure": 2}
    assert [log["reason"] for log in logs if log["event"] == "photo.kept"] == ["a person sees none of the classes"] * 2


def test_a_photo_that_is_sorted_again_and_corrected_counts_once_and_goes_back_step_by_step(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(BROWN)})
    library.sort(min_confidence=0.9)
    library.sort(library.output / "unsure")
    assert set(read_tree(library.output)) == {"cats/a.jpg"}
    first = library.entry("a.jpg")
    with library.reader() as reader:
        (again,) = reader.photos()
    version = Version(first.size, first.mtime_ns)
    outcomes = library.decide(*(Verdict(photo, version, "dog", "corrected") for photo in (first.id, again.id)))
    assert [outcome.is_changed for outcome in outcomes] == [True, False]
    assert library.counts() == Counts({"dogs": 1}, 0)
    for _ in range(2):
        library.undo("--last")
    assert read_tree(library.inbox) == {"a.jpg": plain(BROWN)}


def test_a_photo_corrected_into_a_place_that_another_had_before_is_there(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED)})
    library.take_as("cat", "a.jpg")
    first = library.entry("a.jpg")
    make_tree(library.inbox, {"a.jpg": plain(BROWN)})
    library.sort(min_confidence=0.9)
    library.sort(library.output / "unsure")
    assert set(read_tree(library.output)) == {"cats/a.jpg", "cats/a-1.jpg"}
    version = Version(first.size, first.mtime_ns)
    (outcome,) = library.decide(Verdict(first.id, version, None, "corrected"))
    assert outcome.path == str(library.output / "unsure/a.jpg")
    assert library.counts() == Counts({"cats": 1, "unsure": 1}, 0)
    with library.reader() as reader:
        assert {entry.place for entry in reader.photos()} == set(read_tree(library.output))


def test_a_photo_called_neither_that_changed_since_is_sorted_again_and_counts_once(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED)})
    library.take_as("dog", "a.jpg")
    library.correct("a.jpg", None)
    os.utime(library.output / "unsure/a.jpg", (LONG_AGO + 9, LONG_AGO + 9))
    library.sort(library.output / "unsure")
    assert set(read_tree(library.output)) == {"cats/a.jpg"}
    assert library.counts() == Counts({"cats": 1}, 0)
    library.undo("--last")
    assert library.counts() == Counts({"unsure": 1}, 0)


def test_a_corrected_photo_is_not_sorted_again(tmp_path: Path, manifest: Manifest) -> None:
    library = Library(tmp_path, manifest)
    library.output = library.inbox
    make_tree(library.inbox, {"a.jpg": plain(RED), "2019/b.jpg": plain(RED, 1)})
    library.sort(recursive=True)
    library.correct("a.jpg", "dog")
    library.correct("2019/b.jpg", None)
    before = read_tree(library.output)
    counters, _ = library.sort(recursive=True)
    assert (counters.photos, read_tree(library.output)) == (0, before)


def test_corrections_wait_for_an_undo_and_then_say_who_has_the_lock(
    sorted_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict, held = sorted_library.verdict("a.jpg", "dog"), Lock(sorted_library.output, UNDOING)
    held.take()
    timer = threading.Timer(0.5, held.release)
    timer.start()
    assert sorted_library.decide(verdict)[0].error == ""
    timer.join()
    held.take()
    monkeypatch.setattr("sorter.files.lock.UNDOING_PATIENCE_SECONDS", 0.1)
    try:
        with pytest.raises(NotNowError, match="is having photos restored or corrected by process"):
            sorted_library.decide(sorted_library.verdict("a.jpg", None))
    finally:
        held.release()


def test_an_undo_waits_for_a_correction(sorted_library: Library) -> None:
    held = Lock(sorted_library.output, UNDOING)
    held.take()
    timer = threading.Timer(1.0, held.release)
    timer.start()
    sorted_library.undo("--last")
    timer.join()
    assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "a.xmp"}


def test_an_open_review_does_not_block_an_undo(sorted_library: Library) -> None:
    with sorted_library.review() as review:
        (outcome,) = review.decide([sorted_library.verdict("a.jpg", "dog")])
        sorted_library.undo("--last")
        assert review.decide([Verdict(outcome.photo, Version(0, 0), "cat", "corrected")])[0].is_changed
    assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "a.xmp"}


def test_an_output_without_a_history_is_refused_and_left_as_it_is(library: Library) -> None:
    with pytest.raises(ConfigurationError, match="there is no history"):
        Corrections(library.output, library.manifest.classes)
    assert list(library.output.iterdir()) == []


def test_a_review_in_which_nothing_was_decided_leaves_no_run(sorted_library: Library) -> None:
    sorted_library.decide()
    assert sorted_library.rows("SELECT count(*) FROM runs WHERE kind = 'review'") == [(0,)]
