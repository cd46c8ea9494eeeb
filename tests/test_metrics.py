"""`--metrics-port`: what Prometheus scrapes, over real HTTP."""

import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RUN, RedGreenEngine, Running, make_tree, photo, pipeline_to, plain

import sorter
from sorter.classifier.manifest import Manifest
from sorter.errors import ConfigurationError
from sorter.inbox.scan import Inbox
from sorter.inbox.watcher import Watcher
from sorter.pipeline.model_in_use import ModelInUse
from sorter.service.counters import Counters
from sorter.settings import Settings

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

from sorter.service.metrics import Metrics

Start = Callable[..., Running]
Values = dict[tuple[str, str], float]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int) -> Values:
    """The metrics, by name and the values of their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_served_for_this_machine_as_they_are_at_each_scrape(tmp_path: Path, manifest: Manifest) -> None:
    port = free_port()
    metrics = Metrics(port, ModelInUse(RedGreenEngine(), manifest, 0.0, RUN))
    inbox = Inbox(make_tree(tmp_path, {"a.jpg": photo()}), recursive=False, excluded=frozenset(), settle_seconds=0)
    counters, settings = Counters(), Settings(inbox=tmp_path, batch_size=4)
    pipeline = pipeline_to(tmp_path, RedGreenEngine(), manifest, settings, measures=metrics)
    try:
        metrics.watch(counters, pipeline, Watcher(inbox))
        assert ask(port)["sorter_photos_total", "failed,failed"] == 0
        (found,) = inbox.scan(time.time())
        assert pipeline.submit(found)
        assert [outcome.kind for outcome in pipeline.outcomes(timeout_seconds=30)] == ["sorted"]
    finally:
        pipeline.close()
    counters.folders.update(cats=5, unsure=2, failed=1)
    counters.skipped = 3
    values = ask(port)
    assert values["sorter_photos_total", "cats,sorted"] == 5
    assert values["sorter_photos_total", "unsure,unsure"] == 2
    assert values["sorter_photos_total", "failed,failed"] == 1
    assert values["sorter_photos_total", ",skipped"] == 3
    assert values["sorter_batch_size_photos_sum", ""] == 1
    assert [values["sorter_stage_seconds_count", stage] for stage in ("decode", "classify", "move")] == [1, 1, 1]
    assert [labels for name, labels in values if name == "sorter_info"] == [f"test,test,{sorter.__version__}"]
    other = manifest.model_copy(update={"name": "second"})
    metrics.describe(ModelInUse(RedGreenEngine(), other, 0.0, RUN))
    assert [labels for name, labels in ask(port) if name == "sorter_info"] == [f"test,second,{sorter.__version__}"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
    with pytest.raises(ConfigurationError, match=f"--metrics-port {port} cannot be used .*: choose another port"):
        Metrics(port, ModelInUse(RedGreenEngine(), manifest, 0.0, RUN))


@pytest.mark.long
def test_a_daemons_metrics_say_what_it_did(tmp_path: Path, start: Start) -> None:
    files = {f"{n}.jpg": plain((30 * n, 90, 90), n) for n in range(6)}
    inbox = make_tree(tmp_path / "inbox", {**files, "broken.jpg": b"\xff\xd8\xff", "notes.txt": b"hello"})
    port = free_port()
    daemon = start(
        "run", "--inbox", inbox, "--metrics-port", str(port), "--log-format", "json", "--max-wait-ms", "2000"
    )
    daemon.wait_for_event("photo.sorted", 6)
    daemon.wait_for_event("photo.failed")
    daemon.wait_for_event("photo.skipped")
    values = ask(port)
    sorted_ = [v for (name, labels), v in values.items() if name == "sorter_photos_total" and "sorted" in labels]
    assert sum(sorted_) == 6
    assert values["sorter_photos_total", "failed,failed"] == 1
    assert values["sorter_photos_total", ",skipped"] == 1
    assert values["sorter_left_photos", ""] == 0
    assert values["sorter_batch_size_photos_sum", ""] == 6
    assert values["sorter_stage_seconds_count", "decode"] >= 7
    assert 0 < values["sorter_stage_seconds_sum", "classify"] < 60
    assert 0 < values["sorter_stage_seconds_sum", "move"] < 60
    assert {values["sorter_queue_photos", stage] for stage in ("decode", "classify", "move")} == {0}
    assert values["sorter_watcher_restarts_total", ""] == 0
    assert values["sorter_last_success_timestamp_seconds", ""] == pytest.approx(inbox.stat().st_mtime, abs=60)
    (info,) = [labels.split(",") for name, labels in values if name == "sorter_info"]
    assert {"catdog-resnet50", "openvino"} < set(info)

    inbox.rename(tmp_path / "away")
    daemon.wait_for_event("watcher.waiting")
    (tmp_path / "away").rename(inbox)
    daemon.wait_for_event("watcher.restarted")
    assert ask(port)["sorter_watcher_restarts_total", ""] >= 1

    with socket.create_connection(("127.0.0.1", port)):  # a silent client delays nothing
        make_tree(inbox, {"late.jpg": photo(99)})
        daemon.wait_for_event("photo.sorted", 7)
        assert ask(port)["sorter_batch_size_photos_sum", ""] == 7
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.finish()[0] == 0
    assert {event["level"] for event in daemon.events()} <= {"info", "warning"}


@pytest.mark.long
def test_only_this_machine_can_connect(tmp_path: Path, start: Start) -> None:
    (tmp_path / "inbox").mkdir()
    port = free_port()
    daemon = start("run", "--inbox", tmp_path / "inbox", "--metrics-port", str(port), "--log-format", "json")
    daemon.wait_for_event("service.started")
    listening = Path(f"/proc/{daemon.process.pid}/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    places = {line.split()[1] for line in listening.splitlines() if f":{port:04X} " in line and " 0A " in line}
    assert places == {f"0100007F:{port:04X}"}


@pytest.mark.long
def test_a_port_that_is_taken_is_refused_before_anything_is_touched(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "inbox", {"a.jpg": photo()})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = start("run", "--inbox", inbox, "--metrics-port", port)
        assert refused.finish()[0] == 2
        assert f"--metrics-port {port} cannot be used" in refused.errors.read_text()
        assert start("run", "--once", "--inbox", inbox, "--dry-run", "--metrics-port", port).finish()[0] == 0
    assert list(inbox.iterdir()) == [inbox / "a.jpg"]


def test_without_its_extra_the_flag_is_refused(tmp_path: Path, start: Start) -> None:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'prometheus_client' else find(name, *rest)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    refused = start("run", "--inbox", tmp_path / "inbox", "--metrics-port", "9464", PYTHONPATH=f"{tmp_path}:{root}")
    assert refused.finish()[0] == 2
    assert "pip install '.[metrics]'" in refused.errors.read_text()
