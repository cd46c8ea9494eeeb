"""A photo's way through all stages, with real decoders, real moves, and an engine that needs no torch."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import GREEN, LONG_AGO, RED, RUN, RedGreenEngine, hashes, make_tree, photo, pipeline_to, plain, read_tree

from sorter.classifier.manifest import Manifest
from sorter.deadlines import STEP_SECONDS, Deadline
from sorter.decisions import Outcome, complete_after, decide, decide_unclassified
from sorter.decoding.decoded import Decoded, Verdict
from sorter.errors import Reason, StorageError
from sorter.files.photo import Identity, Photo
from sorter.inbox.scan import Inbox
from sorter.pipeline.batcher import Batcher
from sorter.pipeline.pipeline import Pipeline
from sorter.settings import Settings

Sort = Callable[..., tuple[list[Outcome], RedGreenEngine]]


@pytest.fixture
def sort(tmp_path: Path, manifest: Manifest) -> Sort:
    """Sort tmp_path/in with some settings and return what came out."""

    def run(**values: object) -> tuple[list[Outcome], RedGreenEngine]:
        engine = RedGreenEngine()
        settings = Settings(inbox=tmp_path / "in", once=True, **{"batch_size": 8, **values})  # type: ignore[arg-type]
        pipeline = pipeline_to(tmp_path / "out", engine, manifest, settings, workers=2)
        box = Inbox(tmp_path / "in", recursive=True, excluded=frozenset(), settle_seconds=0)
        outcomes: list[Outcome] = []
        pipeline.backlog = True
        try:
            for found in box.scan(LONG_AGO + 10):
                while not pipeline.submit(found):
                    outcomes += pipeline.outcomes()
            pipeline.backlog = False
            deadline = time.monotonic() + 60
            while pipeline.in_flight:
                outcomes += pipeline.outcomes(timeout_seconds=0.1)
                assert time.monotonic() < deadline
        finally:
            pipeline.backlog = False
            pipeline.close()
        return outcomes, engine

    return run


def test_photos_go_to_the_folder_of_their_class(tmp_path: Path, sort: Sort) -> None:
    make_tree(tmp_path / "in", {"red.jpg": plain(RED), "green.png": plain(GREEN, kind="PNG")})
    sort()
    assert set(read_tree(tmp_path / "out")) == {"cats/red.jpg", "dogs/green.png"}
    assert read_tree(tmp_path / "in") == {}


def test_a_backlog_is_classified_in_full_batches(tmp_path: Path, sort: Sort) -> None:
    make_tree(tmp_path / "in", {f"{n}.jpg": plain(RED, n) for n in range(50)})
    _, engine = sort()
    assert sum(engine.batches) == 50
    assert engine.batches == [8] * 6 + [2]


def test_a_photo_that_cannot_be_decoded_does_not_touch_its_batch(tmp_path: Path, sort: Sort) -> None:
    files = {f"{n}.jpg": plain(RED, n) for n in range(10)}
    make_tree(tmp_path / "in", {**files, "broken.jpg": plain(RED)[:100], "empty.jpg": b"", "note.txt": b"hello"})
    before = hashes(tmp_path)
    outcomes, _ = sort()
    assert hashes(tmp_path) == before
    assert set(read_tree(tmp_path / "out")) == {f"cats/{n}" for n in files} | {"failed/broken.jpg", "failed/empty.jpg"}
    assert set(read_tree(tmp_path / "in")) == {"note.txt"}
    assert [o.photo.name for o in outcomes if o.kind == "skipped"] == ["note.txt"]


def test_a_photo_of_a_far_year_is_sorted(tmp_path: Path, sort: Sort) -> None:
    make_tree(tmp_path / "in", {"early.jpg": plain(RED, 1)}, modified=-9_000_000_000)
    make_tree(tmp_path / "in", {"late.jpg": plain(RED, 2)}, modified=12_000_000_000)
    if (tmp_path / "in/late.jpg").stat().st_mtime < 1e10:
        pytest.skip("this file system does not store such a year")
    sort()
    assert set(read_tree(tmp_path / "out")) == {"cats/early.jpg", "cats/late.jpg"}


def test_every_photo_has_exactly_one_outcome(tmp_path: Path, sort: Sort) -> None:
    make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(100)})
    outcomes, _ = sort()
    assert sorted(o.photo.name for o in outcomes) == sorted(f"{n}.jpg" for n in range(100))


@pytest.mark.parametrize("min_confidence", [0.0, 0.9])
def test_a_photo_that_the_model_answers_without_numbers_stays_and_its_batch_is_sorted(
    tmp_path: Path, sort: Sort, min_confidence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflowing(RedGreenEngine):
        """As half precision may: the answer for one photo is not a number."""

        def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            answers = super().classify(pixels)
            answers[pixels[..., 2].reshape(len(pixels), -1).mean(1) > 128] = np.nan
            return answers

    monkeypatch.setattr("test_pipeline.RedGreenEngine", Overflowing)
    make_tree(tmp_path / "in", {"red.jpg": plain(RED), "blue.jpg": plain((220, 30, 250))})
    outcomes, _ = sort(min_confidence=min_confidence)
    assert read_tree(tmp_path) == {"in/blue.jpg": plain((220, 30, 250)), "out/cats/red.jpg": plain(RED)}
    (left,) = (outcome for outcome in outcomes if outcome.kind == "left")
    assert left.photo.name == "blue.jpg"
    assert "not a number" in left.detail


def test_unsure_photos_go_to_unsure_only_when_asked(tmp_path: Path, sort: Sort) -> None:
    make_tree(tmp_path / "in", {"brown.jpg": plain((128, 124, 60)), "red.jpg": plain(RED)})
    sort(min_confidence=0.9)
    assert set(read_tree(tmp_path / "out")) == {"unsure/brown.jpg", "cats/red.jpg"}
    make_tree(tmp_path / "in", {"brown.jpg": plain((128, 124, 60))})
    sort()
    assert "cats/brown.jpg" in read_tree(tmp_path / "out")


def test_a_dry_run_changes_nothing_and_says_where_photos_would_go(tmp_path: Path, sort: Sort) -> None:
    make_tree(tmp_path, {"in/red.jpg": plain(RED), "in/bad.jpg": b"x", "out/cats/red.jpg": b"an older one"})
    before = read_tree(tmp_path)
    outcomes, _ = sort(dry_run=True)
    assert read_tree(tmp_path) == before
    assert {o.destination for o in outcomes} == {
        str(tmp_path / "out/cats/red-1.jpg"),
        str(tmp_path / "out/failed/bad.jpg"),
    }
    assert not (tmp_path / "out/failed").exists()


def test_a_photo_that_changes_while_it_is_classified_stays(tmp_path: Path, manifest: Manifest) -> None:
    make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    engine = RedGreenEngine()

    def replace() -> None:
        make_tree(tmp_path / "in", {"a.jpg": plain(GREEN)})

    engine.before_batch = replace
    settings = Settings(inbox=tmp_path / "in", once=True)
    pipeline = pipeline_to(tmp_path / "out", engine, manifest, settings)
    (found,) = Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    assert pipeline.submit(found, timeout_seconds=10)
    (outcome,) = pipeline.outcomes(timeout_seconds=30)
    pipeline.close()
    assert outcome.kind == "again"
    assert read_tree(tmp_path) == {"in/a.jpg": plain(GREEN)}


def test_closing_finishes_the_batch_in_hand_and_leaves_the_rest(tmp_path: Path, manifest: Manifest) -> None:
    make_tree(tmp_path / "in", {f"{n}.jpg": plain(RED, n) for n in range(20)})
    engine = RedGreenEngine()
    engine.concurrency = 1
    classifying, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        classifying.set()
        assert go_on.wait(30)

    engine.before_batch = hold
    settings = Settings(inbox=tmp_path / "in", once=True, batch_size=4)
    pipeline = pipeline_to(tmp_path / "out", engine, manifest, settings)
    pipeline.backlog = True
    for found in Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10):
        if not pipeline.submit(found, timeout_seconds=0.2):
            break
    assert classifying.wait(30)
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    time.sleep(0.1)
    go_on.set()
    closing.join(30)
    assert len(read_tree(tmp_path / "out")) == 4
    assert len(read_tree(tmp_path / "in")) == 16


def test_once_stops_when_the_output_accepts_no_photos(tmp_path: Path, sort: Sort) -> None:
    make_tree(tmp_path, {"in/a.jpg": plain(RED), "out/cats": b"a file is in the way"})
    with pytest.raises(StorageError, match="cats"):
        sort()
    assert set(read_tree(tmp_path)) == {"in/a.jpg", "out/cats"}


def test_while_the_output_accepts_no_photos_the_stages_before_it_stand_still_and_then_go_on(
    tmp_path: Path, manifest: Manifest
) -> None:
    files = {f"{n}.jpg": plain(RED, n) for n in range(100)}
    make_tree(tmp_path / "in", files)
    make_tree(tmp_path, {"out/cats": b"a file is in the way"})
    settings = Settings(inbox=tmp_path / "in", batch_size=4)
    pipeline = pipeline_to(tmp_path / "out", RedGreenEngine(), manifest, settings)
    box = Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0)
    accepted = 0
    for found in box.scan(LONG_AGO + 10):
        if not pipeline.submit(found, timeout_seconds=0.5):
            break
        accepted += 1
    assert 4 < accepted < 40
    deadline = time.monotonic() + 20
    while pipeline.blocked is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "cats" in (pipeline.blocked or "")
    assert set(read_tree(tmp_path / "in")) == set(files)
    assert set(read_tree(tmp_path / "out")) == {"cats"}
    (tmp_path / "out/cats").unlink()
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 30
    while pipeline.in_flight or not pipeline.idle:
        outcomes += pipeline.outcomes(timeout_seconds=0.1)
        assert time.monotonic() < deadline
    assert pipeline.waiting() == {"decode": 0, "classify": 0, "move": 0}
    assert pipeline.blocked is None
    pipeline.close()
    assert [o.kind for o in outcomes] == ["sorted"] * accepted
    assert len(read_tree(tmp_path / "out/cats")) == accepted


def test_an_engine_that_fails_stops_the_pipeline_with_its_error(tmp_path: Path, manifest: Manifest) -> None:
    make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    engine = RedGreenEngine()

    def fail() -> None:
        raise RuntimeError("out of memory")

    engine.before_batch = fail
    pipeline = pipeline_to(tmp_path / "out", engine, manifest, Settings(inbox=tmp_path / "in"))
    (found,) = Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    assert pipeline.submit(found, timeout_seconds=10)
    with pytest.raises(RuntimeError, match="out of memory"):
        _drain(pipeline)
    pipeline.close()
    assert set(read_tree(tmp_path)) == {"in/a.jpg"}


def _drain(pipeline: Pipeline) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        list(pipeline.outcomes(timeout_seconds=0.1))
    raise AssertionError("the error never came")


def some_photo(name: str = "a.jpg", *, mtime: float = 1000, seen: float = 1000) -> Photo:
    return Photo(Path("/in"), name, Identity(1, 2, 3, int(mtime * 1e9), 0), seen)


def decoded(reason: Reason, *, mtime: float, seen: float) -> Decoded:
    return Decoded(some_photo(mtime=mtime, seen=seen), "failed", reason=reason)


def batcher(*, batch_size: int = 4, max_wait_seconds: float = float("inf")) -> Batcher:
    stopping = threading.Event()
    return Batcher(batch_size=batch_size, max_wait_seconds=max_wait_seconds, decode_seconds=0, stopping=stopping)


def put(batcher: Batcher, *verdicts: Verdict) -> None:
    for verdict in verdicts:
        batcher.expect()
        batcher.put(Decoded(some_photo(), verdict))


def verdicts(batch: list[Decoded] | None) -> list[Verdict] | None:
    return None if batch is None else [decoded.verdict for decoded in batch]


def test_what_is_ready_is_dispatched_at_once_when_nothing_more_is_on_its_way() -> None:
    forming = batcher()
    put(forming, "pixels", "pixels")
    started = time.monotonic()
    assert verdicts(forming.next_batch()) == ["pixels", "pixels"]
    assert time.monotonic() - started < 1


def test_a_batch_waits_for_a_photo_that_is_being_decoded_but_no_longer_than_it_may() -> None:
    patient, hasty = batcher(), batcher(max_wait_seconds=0.05)
    for forming in (patient, hasty):
        put(forming, "pixels")
        forming.expect()
    assert verdicts(hasty.next_batch()) == ["pixels"]
    arriving = threading.Timer(0.2, patient.put, [Decoded(some_photo(), "pixels")])
    arriving.start()
    assert verdicts(patient.next_batch()) == ["pixels", "pixels"]
    arriving.join()


def test_a_photo_that_the_decoders_could_not_take_is_not_waited_for() -> None:
    forming = batcher()
    put(forming, "pixels")
    forming.expect()
    forming.cancel()
    assert verdicts(forming.next_batch()) == ["pixels"]


def test_during_a_backlog_a_batch_is_filled_however_long_that_takes() -> None:
    forming = batcher(batch_size=2, max_wait_seconds=0)
    forming.backlog = True
    put(forming, "pixels")
    arriving = threading.Timer(0.2, put, [forming, "failed", "pixels"])
    arriving.start()
    assert verdicts(forming.next_batch()) == ["pixels", "failed", "pixels"]
    arriving.join()


def test_photos_without_pixels_do_not_fill_a_batch_but_it_is_bounded() -> None:
    forming = batcher(batch_size=2)
    for _ in range(20):
        put(forming, "failed")
    assert verdicts(forming.next_batch()) == ["failed"] * 8


def test_a_closed_batcher_hands_out_the_rest_and_then_nothing_to_any_thread() -> None:
    forming = batcher()
    put(forming, "pixels")
    forming.expect()
    forming.close()
    assert verdicts(forming.next_batch()) == ["pixels"]
    assert [forming.next_batch(), forming.next_batch()] == [None, None]


def test_a_stage_is_overdue_when_no_step_was_finished_in_time() -> None:
    now = 100.0
    deadline = Deadline(lambda: now)
    assert not deadline.is_overdue
    deadline.begin(own_seconds=5)
    now += STEP_SECONDS + 4
    deadline.begin()  # work that arrives is no progress
    deadline.begin()
    deadline.cancel()  # neither is work that could not be handed over
    assert not deadline.is_overdue
    now += 2
    assert deadline.is_overdue
    deadline.finish()
    assert (deadline.is_overdue, deadline.in_hand) == (False, 1)
    deadline.finish()
    now += 1e6
    assert (deadline.is_overdue, deadline.in_hand) == (False, 0)


def test_a_photo_without_pixels_fails_stays_or_gets_another_look() -> None:
    def kind(verdict: Verdict, reason: Reason | None = None, *, mtime: float = 0) -> str:
        return decide_unclassified(Decoded(some_photo(mtime=mtime), verdict, reason=reason), 1000, RUN).kind

    assert kind("failed", Reason.CORRUPT) == "failed"
    assert kind("failed", Reason.TRUNCATED) == "failed"
    assert kind("failed", Reason.TRUNCATED, mtime=990) == "again"
    assert kind("skipped") == "skipped"
    assert kind("left") == "left"
    assert kind("gone") == "again"


def test_a_truncated_photo_counts_as_complete_a_minute_after_its_last_change() -> None:
    assert complete_after(decoded(Reason.TRUNCATED, mtime=1000, seen=1002), now=1003) == 1060
    assert complete_after(decoded(Reason.EMPTY, mtime=1000, seen=1002), now=1003) == 1060


def test_a_truncated_photo_from_the_future_counts_from_when_it_was_first_seen() -> None:
    assert complete_after(decoded(Reason.TRUNCATED, mtime=9999, seen=1002), now=1003) == 1062


def test_what_is_broken_but_complete_fails_at_once() -> None:
    assert complete_after(decoded(Reason.CORRUPT, mtime=1000, seen=1000), now=1000) == 0


def test_the_likeliest_class_decides_and_a_threshold_is_met_exactly(manifest: Manifest) -> None:
    any_photo = decoded(Reason.CORRUPT, mtime=0, seen=0)
    assert decide(any_photo, [0.2, 0.8], manifest, 0.0, 1, run=RUN).folder == "dogs"
    assert decide(any_photo, [0.75, 0.25], manifest, 0.75, 1, run=RUN).folder == "cats"
    unsure = decide(any_photo, [0.7, 0.3], manifest, 0.75, 1, run=RUN)
    assert (unsure.folder, unsure.label, unsure.confidence) == ("unsure", "cat", 0.7)
