"""Each part of the pipeline alone, in photos per second, with all CPU cores to itself."""

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sorter import __version__
from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Manifest
from sorter.decisions import Decision
from sorter.decoding.decoded import Decoded
from sorter.decoding.decoders import Decoders
from sorter.decoding.images import Limits
from sorter.decoding.images import decode as decode_photo
from sorter.errors import ConfigurationError, PhotoError
from sorter.files.photo import Photo
from sorter.history.store import History, Run
from sorter.inbox.scan import Inbox
from sorter.moving.batch_mover import BatchMover
from sorter.moving.mover import Mover

ENGINE_SECONDS = 5.0


def _settled(folder: Path) -> list[Photo]:
    inbox = Inbox(folder, recursive=False, excluded=frozenset(), settle_seconds=0)
    return list(inbox.scan(time.time()))


def decode(folder: Path, manifest: Manifest, workers: int) -> float:
    """Decode every photo in a folder as the pipeline does, and discard the pixels."""
    photos = _settled(folder)
    left = threading.Semaphore(0)
    failures: list[BaseException] = []

    def deliver(decoded: Decoded) -> None:
        if decoded.verdict == "pixels":
            decoders.release(decoded.row)
        left.release()

    def fail(error: BaseException) -> None:
        failures.append(error)
        left.release()

    decoders = Decoders(
        workers=workers,
        rows=4 * workers,
        preprocessing=manifest.input.preprocessing,
        limits=Limits(),
        max_bytes=1 << 40,
        timeout_seconds=60,
        deliver=deliver,
        fail=fail,
    )
    try:
        for photo in photos[:workers]:  # waits until the processes have started
            decoders.submit(photo, timeout_seconds=60)
        for _ in photos[:workers]:
            left.acquire()
        started = time.perf_counter()
        for photo in photos:
            decoders.submit(photo, timeout_seconds=60)
        for _ in photos:
            left.acquire()
        seconds = time.perf_counter() - started
    finally:
        decoders.close()
    if failures:
        raise failures[0]
    return len(photos) / seconds


def pixels(photos: Sequence[Path], manifest: Manifest) -> npt.NDArray[np.uint8]:
    """Decode photos for `classify`, uint8 (N, S, S, 3).

    Raises:
        ConfigurationError: a photo cannot be decoded.
    """
    pictures = []
    for path in photos:
        with path.open("rb") as file:
            try:
                pictures.append(np.asarray(decode_photo(file.fileno(), manifest.input.preprocessing, Limits())))
            except PhotoError as error:
                raise ConfigurationError(f"{path} cannot be decoded ({error}): use other photos") from None
    return np.stack(pictures)


def classify(engine: Engine, pixels: npt.NDArray[np.uint8], batch_size: int) -> float:
    """Classify decoded photos in memory, repeatedly for `ENGINE_SECONDS`."""
    batches = [pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size)]
    engine.classify(batches[0])
    turns = itertools.count()
    started = time.perf_counter()

    def work(_number: int) -> int:
        photos = 0
        while time.perf_counter() < started + ENGINE_SECONDS:
            photos += len(engine.classify(batches[next(turns) % len(batches)]))
        return photos

    with ThreadPoolExecutor(engine.concurrency) as pool:
        photos = sum(pool.map(work, range(engine.concurrency)))
    return photos / (time.perf_counter() - started)


def move(folder: Path, output: Path, manifest: Manifest, batch_size: int) -> float:
    """Move every photo in a folder and record it in a history."""
    photos = _settled(folder)
    output.mkdir()
    history, run = History(output), Run("bench", __version__, manifest.name)
    history.begin(run)
    mover = BatchMover(Mover(output), history, patient=False, stopping=threading.Event())
    chosen = manifest.classes[0]
    started = time.perf_counter()
    for start in range(0, len(photos), batch_size):
        decoded = [Decoded(photo, "pixels") for photo in photos[start : start + batch_size]]
        mover.move(
            [Decision(d, "sorted", chosen.folder, chosen.label, 1.0, batch_size, run=run) for d in decoded],
            lambda _: None,
        )
    seconds = time.perf_counter() - started
    history.close()
    return len(photos) / seconds
