"""Compare JPEG decoders: photos/s on one core, and how many labels differ from decoding at full scale.

    python tests/benchmarks/decoders.py DIR [--model DIR] [--runs 3]

The sorter uses Pillow. The others are measured if they are installed:
pip install simplejpeg opencv-python-headless 'pyvips[binary]' PyTurboJPEG (the last one needs libturbojpeg).
"""

import argparse
import contextlib
import importlib
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sorter.bench import photos
from sorter.classifier import manifest
from sorter.classifier.openvino_engine import OpenVinoEngine
from sorter.settings import SHIPPED_MODEL

os.environ["VIPS_CONCURRENCY"] = "1"

FULL_SCALE = "Pillow, full scale"

Decode = Callable[[bytes, int], Any]
"""From a JPEG and a side S to RGB pixels, uint8 (S, S, 3)."""


def resized(pixels: Any, side: int) -> Any:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))


def pillow(times: float) -> Decode:
    """Pillow at the smallest scale that covers a multiple of the side; 0 decodes at full scale."""

    def decode(jpeg: bytes, side: int) -> Any:
        picture = Image.open(io.BytesIO(jpeg))
        if times:
            picture.draft(None, (int(times * side), int(times * side)))
        small = picture.convert("RGB").resize(
            (side, side), Image.Resampling.BILINEAR, reducing_gap=3 if times else None
        )
        return np.asarray(small)

    return decode


def simplejpeg() -> Decode:
    library = importlib.import_module("simplejpeg")

    def decode(jpeg: bytes, side: int) -> Any:
        return resized(library.decode_jpeg(jpeg, "RGB", min_height=side, min_width=side, min_factor=1), side)

    return decode


def turbojpeg() -> Decode:
    turbo = importlib.import_module("turbojpeg").TurboJPEG()

    def decode(jpeg: bytes, side: int) -> Any:
        width, height, *_ = turbo.decode_header(jpeg)
        eighths = next((k for k in range(1, 8) if min(width, height) * k >= 8 * side), 8)
        scale = Fraction(eighths, 8).as_integer_ratio()
        return resized(turbo.decode(jpeg, pixel_format=0, scaling_factor=scale), side)

    return decode


def opencv() -> Decode:
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    reduced = {
        8: cv2.IMREAD_REDUCED_COLOR_8,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        1: cv2.IMREAD_COLOR,
    }

    def decode(jpeg: bytes, side: int) -> Any:
        short = min(Image.open(io.BytesIO(jpeg)).size)
        flag = next(flag for scale, flag in reduced.items() if short // scale >= side or scale == 1)
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), flag)
        return cv2.cvtColor(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)

    return decode


def libvips() -> Decode:
    pyvips = importlib.import_module("pyvips")

    def decode(jpeg: bytes, side: int) -> Any:
        return pyvips.Image.thumbnail_buffer(jpeg, side, height=side, size="force").numpy()[:, :, :3]

    return decode


OTHERS = {"simplejpeg": simplejpeg, "PyTurboJPEG": turbojpeg, "OpenCV, area": opencv, "libvips": libvips}


def installed() -> Iterator[tuple[str, Decode]]:
    """The other decoders whose libraries can be loaded."""
    for name, load in OTHERS.items():
        with contextlib.suppress(ImportError, RuntimeError, OSError):
            yield name, load()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure JPEG decoders.")
    parser.add_argument("photos", type=Path, metavar="DIR")
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    jpegs = [jpeg for path in photos.find(options.photos) if (jpeg := path.read_bytes()).startswith(b"\xff\xd8\xff")]
    described = manifest.read(options.model)
    side, engine = described.input.size, OpenVinoEngine(options.model, described, min_confidence=1.0)
    decoders = {
        FULL_SCALE: pillow(0),
        "Pillow, at least twice the side": pillow(2),
        "Pillow, at least the side (the sorter)": pillow(1),
        **dict(installed()),
    }
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    labels: dict[str, list[int]] = {}
    for _ in range(options.runs):
        for name, decode in decoders.items():
            started = time.perf_counter()
            pictures = [decode(jpeg, side) for jpeg in jpegs]
            rates[name].append(len(jpegs) / (time.perf_counter() - started))
            if name not in labels:
                labels[name] = engine.classify(np.stack(pictures)).argmax(1).tolist()
    print(f"| {len(jpegs)} JPEGs, {side} px | photos/s per core | labels that differ |\n|---|---|---|")
    for name in decoders:
        differing = sum(one != other for one, other in zip(labels[name], labels[FULL_SCALE], strict=True))
        print(f"| {name} | {statistics.median(rates[name]):,.0f} | {differing} |")


if __name__ == "__main__":
    main()
