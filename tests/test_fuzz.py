"""Whatever a file contains, it is moved or left with a reason, unchanged, and the next photo is sorted.

`make test` tries some mutants of `fuzzing.py`, `make torture` thousands. A failure names seed and file, and keeps the
bytes in the test's folder.
"""

import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import LONG_AGO, RED, SHARED, RedGreenEngine, Running, hashes, make_tree, pipeline_to, plain, read_tree
from fuzzing import Mutant, from_shared, generated, mutant
from test_decoders import peak_bytes, reset_peak

from sorter.classifier.manifest import Manifest
from sorter.decisions import Outcome
from sorter.errors import Reason
from sorter.inbox.scan import Inbox
from sorter.pipeline.pipeline import Pipeline
from sorter.settings import Settings

MAX_SECONDS, MAX_BYTES = 10.0, 1_000_000_000


@pytest.fixture(scope="module")
def sources() -> dict[str, bytes]:
    """Pictures of every format; with ../shared, real photos and files broken in the wild too."""
    return generated() | (from_shared(SHARED, photos=40) if SHARED.is_dir() else {})


@dataclass
class Sorter:
    """The real pipeline with one real decoder process, given one file at a time to measure its cost."""

    root: Path
    pipeline: Pipeline
    problems: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")

    def sort(self, name: str, content: bytes) -> Outcome:
        inbox = make_tree(self.root / "in", {name: content})
        photo = Inbox(inbox, recursive=False, excluded=frozenset(), settle_seconds=0).look(name, LONG_AGO + 10)
        assert photo is not None
        assert self.pipeline.submit(photo, timeout_seconds=60)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for outcome in self.pipeline.outcomes(timeout_seconds=1):
                return outcome
        raise AssertionError("no outcome after a minute")

    def try_out(self, tried: Mutant) -> None:
        """Sort a mutant and then a good photo, and note everything that goes wrong."""
        reset_peak()
        start = time.monotonic()
        outcome = self.sort(tried.name, tried.content)
        seconds, peak = time.monotonic() - start, peak_bytes()
        self.slowest = max(self.slowest, (seconds, str(tried)))
        self.largest = max(self.largest, (peak, str(tried)))
        wrong = list(self._wrong(tried, outcome))
        if seconds > MAX_SECONDS:
            wrong.append(f"{seconds:.1f} s")
        if peak > MAX_BYTES:
            wrong.append(f"{peak / 1e6:.0f} MB")
        if self.sort("good.png", plain(RED, kind="PNG")).destination != str(self.root / "out/cats/good.png"):
            wrong.append("the next photo was not sorted")
        if left := set(read_tree(self.root / "in")) | set(read_tree(self.root / "out")) - {"cats/good.png"}:
            wrong.append(f"left over: {left}")
        (self.root / "out/cats/good.png").unlink()
        if wrong:
            kept = make_tree(self.root / "kept", {tried.name: tried.content}) / tried.name
            self.problems.append(f"{tried}: {'; '.join(wrong)}; its bytes are in {kept}")

    def _wrong(self, tried: Mutant, outcome: Outcome) -> Iterator[str]:
        reason = outcome.decision.decoded.reason if outcome.kind == "failed" and outcome.decision else None
        self.outcomes[str(reason or outcome.kind)] += 1
        if outcome.kind not in ("sorted", "failed", "skipped", "left"):
            yield f"it is {outcome.kind}"
        if outcome.kind == "failed" and not isinstance(reason, Reason):
            yield "it failed without a reason"
        if outcome.kind == "failed" and not (outcome.decision and outcome.decision.decoded.detail):
            yield "it failed without a detail"
        moved = outcome.kind in ("sorted", "failed")
        path = Path(outcome.destination or "nowhere") if moved else self.root / "in" / tried.name
        if not path.is_file() or path.read_bytes() != tried.content:
            yield f"it is not unchanged in {path}"
        else:
            path.unlink()

    def report(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.outcomes.most_common())
        return (
            f"{self.outcomes.total()} broken pictures: {counts}; slowest {self.slowest[0]:.2f} s, "
            f"largest {self.largest[0] / 1e6:.0f} MB; bytes unchanged, the next photo sorted after each"
        )


@pytest.fixture
def one_by_one(tmp_path: Path, manifest: Manifest) -> Iterator[Sorter]:
    settings = Settings(inbox=tmp_path / "in", max_wait_ms=0)
    pipeline = pipeline_to(tmp_path / "out", RedGreenEngine(), manifest, settings)
    yield Sorter(tmp_path, pipeline)
    pipeline.close()


def test_the_same_seed_gives_the_same_mutant(sources: dict[str, bytes]) -> None:
    first = [mutant(seed, sources) for seed in range(300)]
    assert first == [mutant(seed, sources) for seed in range(300)]
    assert len({tried.content for tried in first}) > 250


@pytest.mark.parametrize("mutants", [60, pytest.param(200, marks=pytest.mark.long)])
def test_mutants_end_with_a_reason_and_the_next_photo_is_sorted(
    mutants: int, one_by_one: Sorter, sources: dict[str, bytes]
) -> None:
    for seed in range(mutants):
        one_by_one.try_out(mutant(seed, sources))
    assert one_by_one.problems == []
    assert one_by_one.outcomes["decoder-crash"] < 2, "a decoder answers with an error, it does not crash"
    assert one_by_one.outcomes["sorted"] > mutants // 10, "some are still pictures"
    assert one_by_one.outcomes["corrupt"] > mutants // 10, "some are not any more"


@pytest.mark.torture
@pytest.mark.timeout(1200)
def test_thousands_of_mutants_end_with_a_reason_and_the_next_photo_is_sorted(
    one_by_one: Sorter, sources: dict[str, bytes], proved: Callable[[str], None]
) -> None:
    for seed in range(1000, 6000):
        one_by_one.try_out(mutant(seed, sources))
    assert one_by_one.problems == []
    proved(one_by_one.report())


@pytest.mark.parametrize(
    "mutants", [10, pytest.param(40, marks=pytest.mark.long), pytest.param(400, marks=pytest.mark.torture)]
)
def test_a_daemon_fed_with_mutants_lives_and_sorts_the_photos_between_them(
    mutants: int, tmp_path: Path, sources: dict[str, bytes], start: Callable[..., Running]
) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    running = start("run", "--inbox", inbox, "--output", tmp_path / "out")
    running.wait_for_event("service.started")
    dropped: dict[str, bytes] = {}
    for number in range(mutants):
        tried = mutant(10_000 + number, sources)
        _drop(inbox, dropped, tried.name, tried.content)
        if number % 10 == 9:
            _drop(inbox, dropped, f"good-{number}.jpg", plain(RED, number))
            running.wait_for(lambda: f"good-{number}.jpg" in _names(running, "photo.sorted"))  # noqa: B023
    kinds = ("photo.sorted", "photo.failed", "photo.skipped", "photo.left")
    running.wait_for(lambda: set().union(*(_names(running, kind) for kind in kinds)) == set(dropped))
    running.process.send_signal(signal.SIGTERM)
    assert running.finish()[0] == 0, running.errors.read_text()
    after = [hashlib.sha256(content).hexdigest() for content in dropped.values()]
    moved = hashes(tmp_path / "out")
    stayed = [hashlib.sha256((inbox / n).read_bytes()).hexdigest() for n in dropped if (inbox / n).is_file()]
    assert sorted(moved + stayed) == sorted(after)
    failed = running.events("photo.failed")
    assert all(event["reason"] in set(Reason) and event["detail"] for event in failed)
    assert {n for n in dropped if n.startswith("good")} <= _names(running, "photo.sorted")


def _drop(inbox: Path, dropped: dict[str, bytes], name: str, content: bytes) -> None:
    make_tree(inbox, {f".{name}.part": content})
    os.rename(inbox / f".{name}.part", inbox / name)
    dropped[name] = content


def _names(running: Running, kind: str) -> set[str]:
    return {os.path.basename(event["path"]) for event in running.events(kind)}
