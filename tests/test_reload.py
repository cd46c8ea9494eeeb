"""A new model without a stop: SIGHUP to a real daemon, and what can go wrong with the model or in between."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    GREEN,
    RED,
    RedGreenEngine,
    Running,
    hashes,
    make_tree,
    pipeline_to,
    plain,
    small_manifest,
)
from structlog.testing import capture_logs

from sorter.classifier import manifest as manifests
from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Class, Manifest
from sorter.cli import preflight
from sorter.cli.main import main
from sorter.decisions import Outcome
from sorter.errors import ModelError, NotNowError
from sorter.files import FOLDER, HISTORY
from sorter.history.store import Run
from sorter.pipeline.model_in_use import ModelInUse
from sorter.service.reload import Reloader, check_fits
from sorter.service.shutdown import Shutdown
from sorter.settings import SHIPPED_MODEL, Settings

pytestmark = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="SIGHUP is ignored here, as under nohup, and stays so"
)

Start = Callable[..., Running]
Log = MutableMapping[str, Any]


def model_folder(folder: Path, **changes: Any) -> Path:
    """The shipped model with another manifest; its weights are links."""
    folder.mkdir()
    for file in SHIPPED_MODEL.iterdir():
        if file.name != manifests.MANIFEST:
            os.link(file, folder / file.name)
    content = json.loads((SHIPPED_MODEL / manifests.MANIFEST).read_text())
    (folder / manifests.MANIFEST).write_text(json.dumps(content | changes))
    return folder


def point(link: Path, folder: Path) -> None:
    """What `ln -sfn` does, in one step."""
    new = link.with_name("new")
    new.symlink_to(folder)
    new.rename(link)


def models_of(output: Path) -> dict[str, str]:
    """The model that each photo's row names, by the photo's old name."""
    with contextlib.closing(sqlite3.connect(output / FOLDER / HISTORY)) as connection:
        query = "SELECT CAST(source AS TEXT), model FROM moves JOIN runs ON runs.id = run WHERE done IS NOT NULL"
        rows = connection.execute(query).fetchall()
    assert len(dict(rows)) == len(rows), "a photo was sorted twice"
    return dict(rows)


def runs_of(output: Path) -> list[tuple[str, bool]]:
    """The model of each run, in their order, and whether the run has ended."""
    with contextlib.closing(sqlite3.connect(output / FOLDER / HISTORY)) as connection:
        query = "SELECT model, finished IS NOT NULL FROM runs ORDER BY started"
        return [(model, bool(ended)) for model, ended in connection.execute(query)]


def test_a_daemon_takes_new_models_refuses_broken_ones_and_goes_back(tmp_path: Path, start: Start) -> None:
    model_folder(tmp_path / "second", name="second")
    broken = model_folder(tmp_path / "broken", name="broken")
    (broken / "openvino.bin").unlink()
    current, inbox = tmp_path / "current", make_tree(tmp_path / "in", {"0.jpg": plain(RED)})
    point(current, SHIPPED_MODEL)
    flags = ("--settle-seconds", "0.1", "--catch-neither", "--model", current)
    daemon = start("run", "--inbox", inbox, *flags, NOTIFY_SOCKET="/nobody/listens")

    def sort(name: str) -> str:
        """Sort another photo, and return the name of the model that the log names."""
        sorted_before = [*daemon.events("photo.sorted"), *daemon.events("photo.unsure")]
        make_tree(inbox, {name: plain(RED)})
        daemon.wait_for(lambda: len(daemon.events("photo.sorted") + daemon.events("photo.unsure")) > len(sorted_before))
        (event,) = [e for e in daemon.events() if e.get("path") == str(inbox / name) and "model" in e]
        return str(event["model"])

    daemon.wait_for(lambda: daemon.events("photo.sorted") + daemon.events("photo.unsure"))
    for folder, event in [("second", "reloaded"), ("broken", "refused"), ("second", "unchanged")]:
        point(current, tmp_path / folder)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_event(f"model.{event}")
        assert sort(f"{folder}-{event}.jpg") == "second"
    point(current, SHIPPED_MODEL)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_event("model.reloaded", 2)
    assert sort("back.jpg") == "catdog-resnet50"
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.finish()[0] == 0

    (refused,) = daemon.events("model.refused")
    assert (refused["level"], refused["model"]) == ("error", "second")
    assert refused["reason"].startswith(f"the model in {broken} cannot be used (openvino.bin: ")
    first, _ = daemon.events("model.reloaded")
    assert (first["model"], first["before"], first["path"]) == ("second", "catdog-resnet50", str(tmp_path / "second"))
    names = ("second-reloaded.jpg", "broken-refused.jpg", "second-unchanged.jpg")
    assert models_of(inbox) == dict.fromkeys(names, "second") | dict.fromkeys(("0.jpg", "back.jpg"), "catdog-resnet50")
    assert runs_of(inbox) == [("catdog-resnet50", True), ("second", True), ("catdog-resnet50", True)]


class _Bed:
    """A running pipeline whose model is replaced, with a test's own engine in place of a real one."""

    def __init__(self, inbox: Path, manifest: Manifest | None = None, settings: Settings | None = None) -> None:
        self.settings = settings or Settings(inbox=inbox, once=True, settle_seconds=0, batch_size=2)
        self.inbox, self.engine, self.manifest = inbox, RedGreenEngine(), manifest or small_manifest()
        self.logs: list[Log] = []
        self.pipeline = pipeline_to(inbox, self.engine, self.manifest, self.settings)
        self.shutdown = Shutdown(0)

    def sort(self) -> dict[str, str]:
        """Sort what is in the inbox: the model of each photo's decision."""
        found: dict[str, str] = {}
        waiting = 0
        for photo in preflight.watched(self.settings, self.manifest).scan(time.time() + 10):
            assert self.pipeline.submit(photo, timeout_seconds=10)
            waiting += 1
        deadline = time.monotonic() + 30
        while len(found) < waiting:
            assert time.monotonic() < deadline
            for outcome in self.pipeline.outcomes(timeout_seconds=0.1):
                assert outcome.decision is not None
                found[outcome.photo.name] = outcome.decision.run.model
        return found

    def reload(
        self,
        new: Manifest | Callable[[], tuple[Settings, Manifest]],
        open_engine: Callable[[Settings, Manifest], Engine] | None = None,
        requests: int = 1,
    ) -> list[Log]:
        """Answer requests that came before, and return the log."""
        opened = open_engine or (lambda _settings, _manifest: RedGreenEngine())
        read = (lambda: (self.settings, new)) if isinstance(new, Manifest) else new
        for _ in range(requests):
            self.shutdown.reloads.put(True)
        with capture_logs() as logs:
            reloader = Reloader(self.pipeline, self.shutdown, read, opened, lambda _: None)
            deadline = time.monotonic() + 10
            while not logs and not self.shutdown.requested and time.monotonic() < deadline:
                time.sleep(0.01)
            reloader.close()
        self.logs += logs
        return [*logs]


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[_Bed]:
    bed = _Bed(make_tree(tmp_path / "in", {"a.jpg": plain(RED), "b.jpg": plain(GREEN)}))
    yield bed
    bed.pipeline.close()


SECOND = small_manifest().model_copy(update={"name": "second"})


def test_the_new_model_takes_over_and_the_old_one_is_closed(bed: _Bed) -> None:
    assert bed.sort() == dict.fromkeys(("a.jpg", "b.jpg"), "model")
    (log,) = bed.reload(SECOND)
    assert (log["event"], log["model"], log["before"]) == ("model.reloaded", "second", "test")
    assert bed.engine.is_closed
    make_tree(bed.inbox, {"c.jpg": plain(RED), "broken.jpg": b"\xff\xd8\xff"})
    assert bed.sort() == dict.fromkeys(("c.jpg", "broken.jpg"), "second")
    assert log["run"] == bed.pipeline.model.run.id


def test_a_batch_in_hand_is_the_old_models_which_is_closed_after_it(bed: _Bed) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert go_on.wait(10)
        assert not bed.engine.is_closed

    bed.engine.before_batch = wait
    for photo in preflight.watched(bed.settings, bed.manifest).scan(time.time() + 10):
        assert bed.pipeline.submit(photo)
    assert entered.wait(20)
    new = ModelInUse(RedGreenEngine(), SECOND, 0.0, Run("2", "0", "second"))
    replacing = threading.Thread(target=bed.pipeline.replace_model, args=(new,))
    replacing.start()
    replacing.join(0.3)
    assert replacing.is_alive()
    go_on.set()
    replacing.join(10)
    assert bed.engine.is_closed
    outcomes: list[Outcome] = []
    while len(outcomes) < 2:
        outcomes += bed.pipeline.outcomes(timeout_seconds=10)
    # The other thread may have taken the second photo, as a batch of its own.
    models = [outcome.decision.run.model for outcome in outcomes if outcome.decision is not None]
    assert "model" in models
    assert set(models) <= {"model", "second"}
    recorded = models_of(bed.inbox)
    assert {o.photo.name: o.decision.run.model for o in outcomes if o.decision is not None} == recorded


def test_its_threshold_counts_from_then_on(bed: _Bed) -> None:
    bed.sort()
    bed.settings = bed.settings.model_copy(update={"min_confidence": 1.0})
    assert bed.reload(SECOND)[0]["event"] == "model.reloaded"
    make_tree(bed.inbox, {"c.jpg": plain((120, 110, 30))})
    bed.sort()
    assert (bed.inbox / "unsure/c.jpg").exists()


CLASSES = small_manifest().classes
BIRD = (*CLASSES, Class(label="bird", folder="birds"))


def refusal(new: Manifest) -> str:
    with pytest.raises(ModelError) as caught:
        check_fits(new, small_manifest())
    return str(caught.value)


def test_a_model_of_other_classes_or_another_input_is_refused_with_a_sentence() -> None:
    assert refusal(SECOND.model_copy(update={"classes": BIRD})) == (
        "the model second has other classes (cat in cats/, dog in dogs/, bird in birds/) than test (cat in cats/, "
        "dog in dogs/): restart sorter to use it"
    )
    larger = SECOND.input.model_copy(update={"size": 64})
    assert refusal(SECOND.model_copy(update={"input": larger})) == (
        "the model second sees photos in another size or crop (64 px, squash) than test (32 px, squash): restart "
        "sorter to use it"
    )
    cropped = SECOND.input.model_copy(update={"crop": "center", "resize": 40})
    assert "(32 px, center of 40 px)" in refusal(SECOND.model_copy(update={"input": cropped}))


def test_another_order_of_the_classes_and_other_means_are_no_obstacle() -> None:
    other = SECOND.input.model_copy(update={"mean": (0.4, 0.4, 0.4)})
    check_fits(SECOND.model_copy(update={"classes": CLASSES[::-1], "input": other}), small_manifest())


def _refuses(_settings: Settings, _manifest: Manifest) -> Engine:
    raise NotNowError("cuda:0 has no room for the model")


def _breaks(_settings: Settings, _manifest: Manifest) -> Engine:
    raise RuntimeError("driver")


@pytest.mark.parametrize(
    ("open_engine", "reason"),
    [
        (_refuses, "cuda:0 has no room for the model"),
        (_breaks, "it cannot be opened (RuntimeError: driver): export it again"),
    ],
)
def test_after_any_error_the_old_model_goes_on(
    bed: _Bed, open_engine: Callable[[Settings, Manifest], Engine], reason: str
) -> None:
    (log,) = bed.reload(SECOND, open_engine)
    assert (log["event"], log["model"], log["reason"]) == ("model.refused", "test", reason)
    assert not bed.engine.is_closed
    assert bed.sort() == dict.fromkeys(("a.jpg", "b.jpg"), "model")


def test_a_model_that_would_leave_the_gpu_is_refused(bed: _Bed) -> None:
    fallen_back = RedGreenEngine("cpu")
    fallen_back.unused_gpu = "cuda:0 cannot be used (out of memory): check its driver, or use --device cpu"
    (log,) = bed.reload(SECOND, lambda _settings, _manifest: fallen_back)
    assert (log["event"], log["reason"]) == ("model.refused", fallen_back.unused_gpu)
    assert fallen_back.is_closed
    assert not bed.engine.is_closed


def test_the_link_is_followed_once_and_the_new_models_table_gives_the_threshold(tmp_path: Path) -> None:
    link, inbox = tmp_path / "current", make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    point(link, SHIPPED_MODEL)
    given = Settings(inbox=inbox, once=True, model=link, device="cpu", max_error_rate=0.01)
    settings, shipped = preflight.read_model(given)
    table = json.loads(shipped.model_dump_json())["error_rates"]
    bed = _Bed(inbox, shipped, settings)
    assert bed.pipeline.model.min_confidence > 0.9
    opened: list[Path] = []

    def open_engine(settings: Settings, _manifest: Manifest) -> Engine:
        opened.append(settings.model)
        return RedGreenEngine()

    try:
        for name, thresholds in [("lower", 0.5), ("none", None)]:
            for rates in table:
                rates["rates"] = [r | {"threshold": thresholds} for r in rates["rates"]] if thresholds else []
            point(link, model_folder(tmp_path / name, name=name, error_rates=table))
            bed.reload(partial(preflight.read_model, given), open_engine)
        assert opened == [tmp_path / "lower"]
        assert bed.pipeline.model.min_confidence == 0.5
        assert [log["event"] for log in bed.logs] == ["model.reloaded", "model.refused"]
        assert bed.logs[-1]["reason"].endswith("was shown to keep no error rate: raise or omit --max-error-rate 0.01")
    finally:
        bed.pipeline.close()


def test_many_requests_at_once_are_one(bed: _Bed) -> None:
    opened: list[str] = []

    def count(_settings: Settings, manifest: Manifest) -> Engine:
        opened.append(manifest.name)
        return RedGreenEngine()

    logs = bed.reload(SECOND, count, requests=5)
    assert [log["event"] for log in logs] == ["model.reloaded"]
    assert opened == ["second"]


def test_the_same_model_is_not_opened_again(bed: _Bed) -> None:
    (log,) = bed.reload(small_manifest(), _breaks)
    assert (log["event"], log["model"]) == ("model.unchanged", "test")


def test_once_the_end_is_asked_for_nothing_is_replaced(bed: _Bed) -> None:
    late = RedGreenEngine()

    def open_late(_settings: Settings, _manifest: Manifest) -> Engine:
        bed.shutdown.requested = True
        return late

    assert bed.reload(SECOND, open_late) == []
    assert late.is_closed
    assert bed.pipeline.model.manifest.name == "test"


def test_undo_takes_back_what_the_new_model_sorted_and_then_what_the_old_one_did(
    bed: _Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    bed.sort()
    bed.reload(SECOND)
    make_tree(bed.inbox, {"c.jpg": plain(RED)})
    bed.sort()
    bed.pipeline.close()
    folders = ["--inbox", str(bed.inbox)]
    assert main(["history", *folders]) == 0
    assert " model " in (table := capsys.readouterr().out).splitlines()[0]
    assert [line.split()[3] for line in table.splitlines()[1:]] == ["model", "model", "second"]
    assert main(["undo", "--last", *folders]) == 0
    assert sorted(path.name for path in bed.inbox.glob("*.jpg")) == ["c.jpg"]
    assert main(["undo", "--last", *folders]) == 0
    assert sorted(path.name for path in bed.inbox.glob("*.jpg")) == ["a.jpg", "b.jpg", "c.jpg"]
    capsys.readouterr()


def test_a_history_that_was_removed_gets_every_run_that_is_still_needed(bed: _Bed) -> None:
    bed.sort()
    bed.reload(SECOND)
    for name in (HISTORY, f"{HISTORY}-wal", f"{HISTORY}-shm"):
        (bed.inbox / FOLDER / name).unlink()
    make_tree(bed.inbox, {"c.jpg": plain(RED)})
    assert bed.sort() == {"c.jpg": "second"}
    bed.pipeline.close()
    assert models_of(bed.inbox) == {"c.jpg": "second"}


@pytest.mark.long
def test_requests_before_the_model_is_ready_and_during_the_end_are_safe(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": plain(RED, n) for n in range(600)})
    before = hashes(inbox)
    point(tmp_path / "current", SHIPPED_MODEL)
    daemon = start("run", "--inbox", inbox, "--model", tmp_path / "current", NOTIFY_SOCKET="/nobody/listens")
    daemon.wait_for(lambda: catches_sighup(daemon.process.pid))
    assert daemon.events() == []
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_event("model.unchanged")
    daemon.wait_for_event("photo.sorted")
    point(tmp_path / "current", model_folder(tmp_path / "second", name="second"))
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
        daemon.process.send_signal(number)
    assert daemon.finish(seconds=60)[0] == 0, daemon.errors.read_text()
    assert hashes(inbox) == before
    assert [model for model, has_ended in runs_of(inbox) if not has_ended] == []


def catches_sighup(process: int) -> bool:
    """Whether it has a handler by now."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) & 1 << (signal.SIGHUP - 1))


@pytest.mark.shared
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["--once", "--no-once"])
def test_new_models_in_the_middle_of_5000_photos_lose_none_and_each_row_names_its_model(
    tmp_path: Path, shared: Path, start: Start, mode: str
) -> None:
    originals = sorted((shared / "kaggle-180/test_set/test_set").rglob("*.jpg"))
    assert len(originals) == 1000
    (inbox := tmp_path / "in").mkdir()
    for copy in range(5):
        for original in originals:
            shutil.copy(original, inbox / f"{copy}-{original.name}")
    before = hashes(inbox)
    # It answers the opposite of the shipped model, so that a photo's label says which of the two was asked.
    shipped = json.loads((SHIPPED_MODEL / manifests.MANIFEST).read_text())
    model_folder(tmp_path / "opposite", name="opposite", classes=shipped["classes"][::-1])
    broken = model_folder(tmp_path / "broken", name="broken")
    (broken / "openvino.xml").unlink()
    (broken / "openvino.xml").write_bytes(b"<net/>")
    current = tmp_path / "current"
    point(current, SHIPPED_MODEL)
    sort = start("run", mode, "--inbox", inbox, "--model", current, NOTIFY_SOCKET="/nobody/listens")

    def wait_for(event: str, count: int) -> None:
        """Count lines, because to parse this many again and again would keep a processor busy."""
        sort.wait_for(lambda: sort.errors.read_bytes().count(f'"event": "{event}"'.encode()) >= count, seconds=200)

    changes: list[tuple[str | Path, int]] = [("opposite", 1), ("broken", 1), (SHIPPED_MODEL, 3), ("opposite", 2)]
    for number, (folder, signals) in enumerate(changes):
        wait_for("photo.sorted", 500 + 1000 * number)
        point(current, tmp_path / folder)
        for _ in range(signals):
            sort.process.send_signal(signal.SIGHUP)
        wait_for("model.refused" if folder == "broken" else "model.reloaded", (1, 1, 2, 3)[number])
    if mode == "--no-once":
        wait_for("photo.sorted", 5000)
        sort.process.send_signal(signal.SIGTERM)
    assert sort.finish(seconds=200)[0] == 0, sort.errors.read_text()[-3000:]

    assert hashes(inbox) == before
    assert list(inbox.glob("*.jpg")) == []
    assert [event["model"] for event in sort.events("model.reloaded")] == ["opposite", "catdog-resnet50", "opposite"]
    (refused,) = sort.events("model.refused")
    assert "openvino.xml differs from its digest" in refused["reason"]
    recorded = models_of(inbox)
    assert len(recorded) == 5000
    assert {os.path.basename(e["path"]): e["model"] for e in sort.events("photo.sorted")} == recorded
    opposite = {"cat": "dog", "dog": "cat"}
    labels: dict[str, set[str]] = {}
    for event in sort.events("photo.sorted"):
        _, _, original = os.path.basename(event["path"]).partition("-")
        label = event["label"] if event["model"] == "catdog-resnet50" else opposite[event["label"]]
        labels.setdefault(original, set()).add(label)
    assert [original for original, found in labels.items() if len(found) > 1] == []
    counts = Counter(recorded.values())
    assert min(counts.values()) > 1000, counts
    assert runs_of(inbox) == [(model, True) for model in ("catdog-resnet50", "opposite", "catdog-resnet50", "opposite")]
