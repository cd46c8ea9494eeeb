"""How good a model is, on photos that fitting never saw.

In: a model folder and labelled photos. Out: an `Evaluation`, measured through the sorter's own decoder and engine.
"""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from sorter.engines import Engine
from sorter.errors import ConfigurationError, PhotoError
from sorter.images import EXTENSIONS, Limits, Preprocessing, decode
from sorter.manifest import Class, Evaluation

BATCH = 50


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo and the index of its class in the manifest."""

    path: Path
    label: int


def labelled_photos(data: Path, classes: Sequence[Class]) -> list[Sample]:
    """Find the photos of a folder and their labels.

    Args:
        data: a folder with one subfolder for each class, named by its label or its folder, at any depth; or one with
            `labels.csv` (columns `name` and `label`) beside loose photos.
        classes: the model's.

    Raises:
        ConfigurationError: there is no labelled photo.
    """
    index = {name.lower(): i for i, c in enumerate(classes) for name in (c.label, c.folder)}
    table = data / "labels.csv"
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as rows:
            try:
                samples = [Sample(data / row["name"], index[row["label"].lower()]) for row in csv.DictReader(rows)]
            except (KeyError, AttributeError):
                labels = " or ".join(c.label for c in classes)
                raise ConfigurationError(
                    f"{table} is not understood: it needs the columns name and label, and labels {labels}"
                ) from None
    else:
        samples = [
            Sample(path, index[path.parent.name.lower()])
            for path in sorted(data.rglob("*"))
            if path.suffix.lower() in EXTENSIONS and path.parent.name.lower() in index
        ]
    if not samples:
        wanted = " and ".join(f"{c.folder}/" for c in classes)
        raise ConfigurationError(
            f"{data} has no labelled photos: give a folder with {wanted} in it, or with labels.csv"
        )
    return samples


def probabilities(
    engine: Engine, samples: Sequence[Sample], preprocessing: Preprocessing
) -> Iterator[npt.NDArray[np.float32]]:
    """Classify photos through the sorter's decoder and engine.

    Yields:
        float32 (`BATCH`, C) at a time; `joined` makes one array of them.

    Raises:
        ConfigurationError: one of them cannot be decoded.
    """
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), BATCH):
            batch = samples[start : start + BATCH]
            pictures = pool.map(lambda sample: np.asarray(_decode(sample.path, preprocessing)), batch)
            yield engine.classify(np.stack(list(pictures)))  # (N, S, S, 3) -> (N, C)


def joined(batches: Iterable[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """All batches as one array, float32 (N, C)."""
    return np.concatenate(list(batches))


def _decode(path: Path, preprocessing: Preprocessing) -> Image.Image:
    try:
        with path.open("rb") as file:
            return decode(file.fileno(), preprocessing, Limits())
    except (PhotoError, OSError) as error:
        raise ConfigurationError(f"{path} cannot be decoded ({error}): take it out of the data") from None


def judge(
    answers: npt.NDArray[np.float32], samples: Sequence[Sample], *, data: str, role: Literal["calibration", "test"]
) -> Evaluation:
    """Accuracy with its interval, and log-loss.

    Args:
        answers: probabilities (N, C).
        samples: what they are of.
        data: what the photos are, for the manifest's reader.
        role: whether anything was chosen on them.
    """
    labels = np.array([sample.label for sample in samples])
    right = int((answers.argmax(1) == labels).sum())
    of_label = answers[np.arange(len(labels)), labels].clip(1e-7)
    return Evaluation(
        data=data,
        role=role,
        photos=len(labels),
        right=right,
        accuracy=round(right / len(labels), 4),
        accuracy_interval_95=wilson(right, len(labels)),
        log_loss=round(float(-np.log(of_label).mean()), 4),
    )


def wilson(right: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    share, squared = right / of, z * z / of
    middle = (share + squared / 2) / (1 + squared)
    reach = z / (1 + squared) * math.sqrt(share * (1 - share) / of + squared / (4 * of))
    return round(middle - reach, 4), round(middle + reach, 4)


def mistakes(answers: npt.NDArray[np.float32], samples: Sequence[Sample]) -> Iterator[tuple[Path, float]]:
    """The photos that were called something else, most confident first, with that confidence."""
    wrong = [i for i, sample in enumerate(samples) if answers[i].argmax() != sample.label]
    for i in sorted(wrong, key=lambda i: -answers[i].max()):
        yield samples[i].path, float(answers[i].max())
