"""Photos to a model's probabilities, through the sorter's own decoder and engine; and tables of them.

In: an engine and samples. Out: probabilities float32 (N, C), or a CSV file.
"""

import csv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Class
from sorter.decoding.images import Preprocessing
from sorter.errors import ConfigurationError, PhotoError
from sorter.files.replaced import replaced
from trainer.data.layouts import Sample
from trainer.data.pixels import read

BATCH = 50

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


class Classified(NamedTuple):
    """One batch.

    Attributes:
        samples: the photos that decode.
        probabilities: theirs, float32 (N, C).
        unreadable: the other photos, each with the reason.
    """

    samples: list[Sample]
    probabilities: Floats
    unreadable: list[str]


def classify(engine: Engine, samples: Sequence[Sample], preprocessing: Preprocessing) -> Iterator[Classified]:
    """Decode and classify photos, `BATCH` at a time."""

    def pixels_or_reason(sample: Sample) -> Pixels | str:
        try:
            return read(sample.path, preprocessing)
        except (PhotoError, OSError) as error:
            return f"{sample.path} ({error})"

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), BATCH):
            batch = samples[start : start + BATCH]
            results = list(zip(batch, pool.map(pixels_or_reason, batch), strict=True))
            readable = [(sample, pixels) for sample, pixels in results if not isinstance(pixels, str)]
            probabilities = np.zeros((0, 0), np.float32)
            if readable:
                probabilities = engine.classify(np.stack([pixels for _, pixels in readable]))  # (N, S, S, 3) -> (N, C)
            unreadable = [reason for _, reason in results if isinstance(reason, str)]
            yield Classified([sample for sample, _ in readable], probabilities, unreadable)


def joined(batches: Sequence[Classified]) -> tuple[list[Sample], Floats]:
    """The readable photos of all batches, and their probabilities, float32 (N, C).

    Raises:
        ConfigurationError: no photo can be decoded.
    """
    samples = [sample for batch in batches for sample in batch.samples]
    if not samples:
        raise ConfigurationError("none of the photos can be decoded: check --data")
    return samples, np.concatenate([batch.probabilities for batch in batches if len(batch.probabilities)])


def write_answers(path: Path, samples: Sequence[Sample], probabilities: Floats, classes: Sequence[Class]) -> None:
    """Write a CSV with each photo's path, its label and the probability of each class."""
    with _replaced(path) as file:
        table = csv.writer(file)
        table.writerow(["path", "label", *(f"probability of {c.label}" for c in classes)])
        for sample, row in zip(samples, probabilities.tolist(), strict=True):
            table.writerow([sample.path, classes[sample.label].label, *(round(p, 6) for p in row)])


def write_submission(path: Path, samples: Sequence[Sample], probabilities: Floats, clip: float) -> None:
    """Write `id,label` rows; the label is the second class's probability, clipped to [clip, 1 - clip]."""
    with _replaced(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "label"])
        for sample, probability in zip(samples, probabilities[:, 1].clip(clip, 1 - clip).tolist(), strict=True):
            table.writerow([sample.path.stem, f"{probability:.6f}"])


@contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name when it is complete; an older file stays until then."""
    try:
        with (
            replaced(path) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            yield file
    except OSError as error:
        raise ConfigurationError(f"cannot write {path} ({error.strerror}): give another file") from None
