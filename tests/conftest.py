"""Shared by many tests: pictures, trees of files, and an engine that needs no torch."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pytest
import structlog
from PIL import Image

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Class, Input, Manifest
from sorter.classifier.manifest import read as read_manifest
from sorter.decoding.images import Preprocessing
from sorter.files import FOLDER
from sorter.history.store import History, Run
from sorter.moving.mover import Mover
from sorter.pipeline.measures import Measures
from sorter.pipeline.model_in_use import ModelInUse
from sorter.pipeline.pipeline import Pipeline
from sorter.settings import SHIPPED_MODEL, Settings

if TYPE_CHECKING:
    from object_stores import Server

RUN = Run("run", "0", "model")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LONG_AGO = time.time() - 3600


@pytest.fixture(scope="session")
def shipped() -> Manifest:
    """The manifest of the shipped model."""
    return read_manifest(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def _own_signals() -> Iterator[None]:
    """For commands that run in this process: their handlers end with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _unconfigured_log() -> Iterator[None]:
    """No test inherits the log configuration of another in its process."""
    yield
    structlog.reset_defaults()


def photo(seed: int = 0, size: tuple[int, int] = (96, 64), kind: str = "JPEG") -> bytes:
    """A small picture that differs for each seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def make_tree(root: Path, files: dict[str, bytes], *, modified: float = LONG_AGO) -> Path:
    """Write files, old enough to be settled."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (modified, modified))
    return root


def read_tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder by relative path, without the sorter's own."""
    files = (p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and ".sorter" not in p.parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def hashes(root: Path) -> list[str]:
    """Digests of all contents below a folder, wherever they are: these must never change."""
    return sorted(hashlib.sha256(content).hexdigest() for content in read_tree(root).values())


class RedGreenEngine:
    """Calls a picture a cat if it is redder than green. Real enough to sort, and it needs no torch."""

    name, precision, concurrency, unused_gpu = "test", "exact", 2, ""

    def __init__(self, device: str = "test") -> None:
        self.device = device
        self.batches: list[int] = []
        self.is_closed = False
        self.before_batch: Callable[[], None] = lambda: None

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.batches.append(len(pixels))
        self.before_batch()
        red, green, _ = pixels.reshape(len(pixels), -1, 3).mean(1).T
        cat = 1 / (1 + np.exp(-(red - green) / 8))
        return np.stack([cat, 1 - cat], 1).astype(np.float32)

    def close(self) -> None:
        self.is_closed = True

    def classify_with_distance(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The bluer, the farther from cats and dogs."""
        return self.classify(pixels), pixels[..., 2].reshape(len(pixels), -1).mean(1).astype(np.float32)


def pipeline_to(
    output: Path,
    engine: Engine,
    manifest: Manifest,
    settings: Settings,
    workers: int = 1,
    mover: type[Mover] = Mover,
    measures: Measures | None = None,
    sorted_again: str | None = None,
) -> Pipeline:
    """A running pipeline with a real mover and history."""
    model = ModelInUse(engine, manifest, settings.min_confidence, Run(uuid4().hex, "0", "model"))
    history = None
    if not settings.dry_run:
        (output / FOLDER).mkdir(parents=True, exist_ok=True)
        history = History(output)
        history.begin(model.run)
    return Pipeline.start(
        model,
        mover(output, link=settings.link),
        history,
        settings,
        workers,
        measures=measures,
        sorted_again=sorted_again,
    )


def small_manifest() -> Manifest:
    """The manifest of the model that `RedGreenEngine` stands for."""
    classes = (Class(label="cat", folder="cats"), Class(label="dog", folder="dogs"))
    seen = Input(size=32, crop="squash", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Manifest(
        format_version=1, name="test", architecture="resnet50", classes=classes, input=seen, temperature=1.0, files={}
    )


@pytest.fixture
def manifest() -> Manifest:
    return small_manifest()


@pytest.fixture
def preprocessing() -> Preprocessing:
    return Preprocessing(32)


RED, GREEN = (220, 30, 30), (30, 220, 30)


def plain(color: tuple[int, int, int], seed: int = 0, kind: str = "JPEG") -> bytes:
    """A picture of one colour, its bytes different for each seed."""
    buffer = io.BytesIO()
    Image.new("RGB", (64 + seed % 64, 48 + seed // 64), color).save(buffer, kind)
    return buffer.getvalue()


def as_nobody(action: Callable[[], None]) -> None:
    """Run something as an unprivileged user; in a child that gives up its rights if the tests run as root."""
    if os.geteuid() != 0:
        action()
        return
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def open_to_all(tmp_path: Path) -> Iterator[Path]:
    """A folder that any user reaches, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.fixture
def proved(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Collects sentences with the figures of a proof, printed at the end of the test run."""
    # In the test's report, because that is what comes back from another process (--numprocesses).
    return lambda line: request.node.user_properties.append(("proved", line))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="sweeps strike at every Nth call only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("every") > 1:
        for item in items:
            if item.get_closest_marker("whole"):
                item.add_marker(pytest.mark.skip(reason="runs in all of make torture, without EVERY"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, line in report.user_properties:
            if name == "proved":
                terminalreporter.write_line(f"proved: {line}")


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the photos in ../shared/data, which are not part of the project")
    return SHARED


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """OpenStack Swift, for the tests of one process: it takes 4 s to start, so only long tests use it."""
    import object_stores

    with object_stores.swift(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(scope="session")
def strict_moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """moto with the conditions of Amazon's CopyObject."""
    import object_stores

    with object_stores.moto(tmp_path_factory.mktemp("moto"), strict=True) as server:
        yield server


class Running:
    """A `sorter` process and its log."""

    def __init__(self, command: list[str], errors: Path, environment: dict[str, str]) -> None:
        self.errors = errors
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
            )

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log so far; every complete line must be JSON."""
        lines = self.errors.read_bytes().split(b"\n")[:-1]
        return [event for line in lines if name in (None, (event := json.loads(line))["event"])]

    def wait_for(self, condition: Callable[[], object], *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.02)

    def wait_for_event(self, name: str, count: int = 1, *, seconds: float = 60) -> None:
        self.wait_for(lambda: len(self.events(name)) >= count, seconds=seconds)

    def finish(self, *, seconds: float = 100) -> tuple[int, str]:
        """The exit code and standard output."""
        out, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, out.decode()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start `sorter` processes that do not outlive the test."""
    processes: list[Running] = []

    def run(*arguments: str | Path, **environment: str) -> Running:
        errors = tmp_path / f"log-{len(processes)}"
        command = [sys.executable, "-m", "sorter", *map(str, arguments)]
        processes.append(Running(command, errors, environment))
        return processes[-1]

    yield run
    for running in processes:
        running.process.kill()
        running.process.communicate()
