"""What each optimisation contributes to the speed of engine, decoder and mover, as a table in Markdown.

    python tests/benchmarks/steps.py [--photos DIR] [--model DIR] [--runs 5]

Each row is measured alone, once per round; the table has the medians. Without --photos, photos are generated.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import openvino
import torch
from PIL import Image, ImageOps

from sorter.bench import parts, photos
from sorter.classifier import manifest, network
from sorter.classifier.openvino_engine import OpenVinoEngine
from sorter.classifier.torch_engine import TorchEngine, multiplies_bf16
from sorter.decoding import images
from sorter.decoding.decoders import default_workers
from sorter.processors import available_cpus
from sorter.settings import SHIPPED_MODEL
from trainer.fitting import features

BATCH, SECONDS, MOST_PHOTOS = 32, 3.0, 200

Step = Callable[[], float]
"""Measures once, in photos per second."""


def repeated(classify: Callable[[], object], count: int) -> float:
    """Classify `count` photos repeatedly for some seconds, in photos per second."""
    classify()
    started, done = time.perf_counter(), 0
    while time.perf_counter() < started + SECONDS:
        classify()
        done += count
    return done / (time.perf_counter() - started)


def engines(model: Path, folder: Path) -> Iterator[tuple[str, Step]]:
    """From the network as torchvision has it to what the sorter runs."""
    described = manifest.read(model)
    all_pixels = parts.pixels(sorted(folder.iterdir()), described)
    side = described.input.size
    pixels = all_pixels[:BATCH]
    normalised = torch.randn(BATCH, 3, side, side)
    torch.set_num_threads(available_cpus())

    def torch_step(net: torch.nn.Module, batch: torch.Tensor) -> Step:
        def step() -> float:
            with torch.inference_mode():
                return repeated(lambda: net(batch), BATCH)

        return step

    plain = network.load(model, described)
    yield "PyTorch, eager, fp32", torch_step(plain, normalised)
    folded = network.fold_batch_norm(network.load(model, described)).to(memory_format=torch.channels_last)
    last = normalised.to(memory_format=torch.channels_last)
    yield "… channels-last, batch-norms folded", torch_step(folded, last)
    if multiplies_bf16():
        engine = TorchEngine(model, described, torch.device("cpu"), BATCH)
        yield "… bf16 (`--engine torch`)", lambda: repeated(lambda: engine.classify(pixels), BATCH)
    converted = features.convert(network.load(model, described), described.input.mean, described.input.std, side)
    for precision in ("f32", "bf16") if multiplies_bf16() else ("f32",):
        yield f"OpenVINO, {precision.replace('f32', 'fp32')}", openvino_step(converted, precision, pixels)
    eight = openvino.Core().read_model(model / manifest.OPENVINO_INT8[0])
    eight.reshape([BATCH, side, side, 3])
    yield "OpenVINO, 8 bits, all cores on one batch", openvino_step(eight, "f32", pixels)
    full_size = OpenVinoEngine(model, described, min_confidence=1.0)
    yield "… eight photos per core", lambda: parts.classify(full_size, all_pixels, BATCH)
    for count in range(1, len(described.cascade) + 1):
        passes = described.cascade[:count]
        cascade = OpenVinoEngine(model, described.model_copy(update={"cascade": passes}))
        sizes = " and ".join(str(low.size) for low in passes)
        step = partial(parts.classify, cascade, all_pixels, BATCH)
        yield f"… after {'passes' if count > 1 else 'a pass'} at {sizes} px", step


def openvino_step(model: openvino.Model, precision: str, pixels: np.ndarray) -> Step:
    """OpenVINO with all cores working on one batch."""
    settings = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": available_cpus()}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda: repeated(lambda: compiled([pixels]), len(pixels))


def decoders(model: Path, folder: Path) -> Iterator[tuple[str, Step]]:
    """From decoding the full picture to what the sorter does."""
    described = manifest.read(model)
    side = described.input.size
    paths = sorted(folder.iterdir())

    def one_by_one(decode: Callable[[Path], object]) -> Step:
        def step() -> float:
            started = time.perf_counter()
            for path in paths:
                decode(path)
            return len(paths) / (time.perf_counter() - started)

        return step

    def full(path: Path) -> object:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)

    def scaled(path: Path) -> object:
        with path.open("rb") as file:
            return images.decode(file.fileno(), described.input.preprocessing, images.Limits())

    yield "Pillow, the full picture, one core", one_by_one(full)
    yield "… JPEGs at the smallest scale that covers the input", one_by_one(scaled)
    yield "… in one process per core (the sorter)", lambda: parts.decode(folder, described, default_workers())


def movers(model: Path, folder: Path) -> Iterator[tuple[str, Step]]:
    """From `shutil.move` to what the sorter does."""
    described = manifest.read(model)

    @contextmanager
    def copies() -> Iterator[tuple[Path, Path]]:
        with tempfile.TemporaryDirectory() as name:
            photos.copy(sorted(folder.iterdir()), Path(name) / "in", len(os.listdir(folder)))
            yield Path(name) / "in", Path(name) / "out"

    def plainly() -> float:
        with copies() as (source, target):
            target.mkdir()
            paths = sorted(source.iterdir())
            started = time.perf_counter()
            for path in paths:
                shutil.move(path, target / path.name)
            return len(paths) / (time.perf_counter() - started)

    def safely(batch: int) -> Step:
        def step() -> float:
            with copies() as (source, target):
                return parts.move(source, target, described, batch)

        return step

    yield "`shutil.move`, which may overwrite and cannot recover from a crash", plainly
    yield "recorded and synced, one photo at a time", safely(1)
    yield "… 32 at a time (the sorter)", safely(BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each optimisation contributes.")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        originals = photos.find(options.photos) if options.photos else photos.generate(Path(name) / "generated")
        folder = Path(name) / "photos"
        photos.copy(originals, folder, min(len(originals), MOST_PHOTOS))
        steps = [
            *(("engine", *step) for step in engines(options.model, folder)),
            *(("decoder", *step) for step in decoders(options.model, folder)),
            *(("mover", *step) for step in movers(options.model, folder)),
        ]
        rates: list[list[float]] = [[] for _ in steps]
        for _ in range(options.runs):
            for (_, _, step), found in zip(steps, rates, strict=True):
                found.append(step())
    print("| part | step | photos/s |\n|---|---|---|")
    for (part, name, _), found in zip(steps, rates, strict=True):
        print(f"| {part} | {name} | {statistics.median(found):,.0f} |")


if __name__ == "__main__":
    main()
