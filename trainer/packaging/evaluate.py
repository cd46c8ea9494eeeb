"""How good a model is, on photos that fitting never saw.

In: what a model answers to labelled photos. Out: figures for the manifest and the report. Nothing here chooses anything
on the test part: temperature and thresholds come from the calibration part.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import numpy.typing as npt

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Class, Coverage, Evaluation
from sorter.decoding.images import EXTENSIONS, Preprocessing
from sorter.errors import ConfigurationError, PhotoError
from sorter.files.replaced import replaced
from trainer.data.layouts import Sample, find, index_of, labels_of
from trainer.data.pixels import read

BATCH = 50
ERROR_RATES = (0.005, 0.01, 0.02, 0.05)

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


def labelled_photos(data: Path, classes: Sequence[Class]) -> list[Sample]:
    """Find the photos of a folder and their labels.

    Args:
        data: a folder with one subfolder for each class, named by its label or its folder, at any depth; or one with
            `labels.csv` (columns `name` and `label`) beside loose photos; or such a CSV itself.
        classes: the model's.

    Raises:
        ConfigurationError: there is no labelled photo.
    """
    index = index_of(classes)
    table = data if data.suffix.lower() == ".csv" else data / "labels.csv"
    if table.is_file():
        samples = _from_table(table, index)
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


def _from_table(table: Path, index: dict[str, int]) -> list[Sample]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as rows:
            return [Sample(table.parent / row["name"], index[row["label"].lower()]) for row in csv.DictReader(rows)]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{table} cannot be read ({error}): name a CSV file") from None
    except (KeyError, AttributeError):
        raise ConfigurationError(
            f"{table} is not understood: it needs the columns name and label, and labels {' or '.join(index)}"
        ) from None


def dataset_photos(data: Path, classes: Sequence[Class], cache: Path) -> tuple[str, list[Sample]]:
    """Find the labelled photos of a dataset in any layout that is known, or of any folder that `labelled_photos` takes.

    Returns:
        What they are, and the test part, or everything where there is none.

    Raises:
        ConfigurationError: there is no labelled photo, or it shows other classes than the model knows.
    """
    if data.suffix.lower() == ".csv" or (data / "labels.csv").is_file():
        return data.name, labelled_photos(data, classes)
    try:
        found = find(data, cache)
    except ConfigurationError:
        if not data.is_dir():
            raise
        return data.name, labelled_photos(data, classes)
    index = index_of(classes)
    strange = [c.label for c in found.classes if c.label.lower() not in index]
    if strange:
        known = ", ".join(c.label for c in classes)
        raise ConfigurationError(f"{data} has photos of {strange[0]}, and the model knows {known}: name other data")
    samples = [Sample(s.path, index[found.classes[s.label].label.lower()], s.part) for s in found.samples]
    test = [sample for sample in samples if sample.part == "test"]
    return f"{'the test part' if test else 'all'} of {data.name} ({found.layout})", test or samples


Classified = tuple[list[Sample], Floats, list[str]]
"""The photos of a batch that decode, what the engine says of them, and the others with the reason."""


def probabilities(engine: Engine, samples: Sequence[Sample], preprocessing: Preprocessing) -> Iterator[Classified]:
    """Classify photos through the sorter's decoder and engine, `BATCH` at a time; `joined` makes one of all."""

    def picture(sample: Sample) -> Pixels | str:
        try:
            return read(sample.path, preprocessing)
        except (PhotoError, OSError) as error:
            return f"{sample.path} ({error})"

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), BATCH):
            batch = samples[start : start + BATCH]
            pictures = list(zip(batch, pool.map(picture, batch), strict=True))
            good = [(sample, pixels) for sample, pixels in pictures if not isinstance(pixels, str)]
            if good:
                answers = engine.classify(np.stack([pixels for _, pixels in good]))  # (N, S, S, 3) -> (N, C)
            else:
                answers = np.zeros((0, 0), np.float32)
            yield [sample for sample, _ in good], answers, [bad for _, bad in pictures if isinstance(bad, str)]


def joined(batches: Sequence[Classified]) -> tuple[list[Sample], Floats]:
    """The photos of all batches and their probabilities, float32 (N, C).

    Raises:
        ConfigurationError: none of them decodes.
    """
    samples = [sample for batch, _, _ in batches for sample in batch]
    if not samples:
        raise ConfigurationError("none of the photos can be decoded: check --data")
    return samples, np.concatenate([answers for _, answers, _ in batches if len(answers)])


def log(answers: Floats) -> Floats:
    """Logarithms of probabilities: logits again, but for a constant."""
    logs: Floats = np.log(answers.clip(1e-12))
    return logs


def softmax(logits: Floats, temperature: float) -> Floats:
    """Probabilities, float32 (N, C)."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    answers: Floats = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    return answers


def log_loss(answers: Floats, labels: npt.NDArray[np.intp]) -> float:
    """Mean negative logarithm of the right class's probability, natural units."""
    likelihoods = answers[np.arange(len(labels)), labels].astype(np.float64)
    return abs(float(np.log(likelihoods.clip(1e-7)).mean()))  # never -0.0


def fit_temperature(logits: Floats, labels: npt.NDArray[np.intp]) -> float:
    """The temperature with the least log-loss (Guo et al. 2017, arXiv:1706.04599).

    Args:
        logits: of photos that fitting never saw, (N, C).
        labels: theirs, (N,).
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: log_loss(softmax(logits, math.exp(log_t)), labels), bounds=(-4, 4), method="bounded"
    )
    return round(math.exp(float(found.x)), 4)


def calibration_error(answers: Floats, labels: npt.NDArray[np.intp]) -> float:
    """Expected calibration error over 15 bins of confidence, 0 to 1 (Guo et al. 2017)."""
    import torch

    from sorter.classifier.network import torchvision_models

    torchvision_models()  # torchmetrics imports torchvision too
    from torchmetrics.functional.classification import multiclass_calibration_error

    error = multiclass_calibration_error(
        torch.from_numpy(answers), torch.from_numpy(labels), num_classes=answers.shape[1], n_bins=15
    )
    return round(float(error), 4)


def judge(answers: Floats, samples: Sequence[Sample], *, data: str, role: Literal["calibration", "test"]) -> Evaluation:
    """Accuracy with its interval, log-loss and confusion.

    Args:
        answers: probabilities (N, C).
        samples: what they are of.
        data: what the photos are, for the manifest's reader.
        role: whether anything was chosen on them.
    """
    labels = labels_of(samples)
    right = int((answers.argmax(1) == labels).sum())
    confusion = np.zeros((answers.shape[1], answers.shape[1]), int)
    np.add.at(confusion, (labels, answers.argmax(1)), 1)
    return Evaluation(
        data=data,
        role=role,
        photos=len(labels),
        right=right,
        accuracy=round(right / len(labels), 4),
        accuracy_interval_95=wilson(right, len(labels)),
        log_loss=round(log_loss(answers, labels), 4),
        calibration_error=calibration_error(answers, labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def risk_coverage(answers: Floats, labels: npt.NDArray[np.intp]) -> tuple[Coverage, ...]:
    """The share of photos that can be sorted automatically at some error rates, and the threshold of each.

    The largest share, in steps of 1 % from the most confident down, among which the 95 % upper bound of the error rate
    (Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404) stays within the rate. The bound is that of each share by
    itself, as in selective classification (Geifman and El-Yaniv 2017, arXiv:1705.08500).

    Args:
        answers: calibrated probabilities (N, C) of photos that fitting never saw.
        labels: theirs.

    Returns:
        One entry for each rate that the photos support; few photos support no low rate.
    """
    from scipy.stats import beta

    order = np.argsort(-answers.max(1), kind="stable")
    confidence = answers.max(1)[order]
    wrong = (answers.argmax(1) != labels)[order].cumsum()
    table = []
    for rate in ERROR_RATES:
        for percent in range(100, 0, -1):
            taken = math.ceil(len(labels) * percent / 100)
            errors = int(wrong[taken - 1])
            if errors < taken and beta.ppf(0.95, errors + 1, taken - errors) <= rate:
                threshold, coverage = float(confidence[taken - 1]), taken / len(labels)
                table.append(Coverage(error_rate=rate, threshold=round(threshold, 4), coverage=round(coverage, 4)))
                break
    return tuple(table)


def wilson(right: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    share, squared = right / of, z * z / of
    middle = (share + squared / 2) / (1 + squared)
    reach = z / (1 + squared) * math.sqrt(share * (1 - share) / of + squared / (4 * of))
    return round(max(0.0, middle - reach), 4), round(min(1.0, middle + reach), 4)


def mistakes(answers: Floats, samples: Sequence[Sample]) -> Iterator[tuple[Sample, int, float]]:
    """The photos that were called something else, most confident first: sample, what it was called, how surely."""
    wrong = [i for i, sample in enumerate(samples) if answers[i].argmax() != sample.label]
    for i in sorted(wrong, key=lambda i: -answers[i].max()):
        yield samples[i], int(answers[i].argmax()), float(answers[i].max())


def unlabelled_photos(data: Path) -> list[Sample]:
    """The photos of a folder, by the number in their names where they have one; their labels mean nothing.

    Raises:
        ConfigurationError: there is none.
    """
    paths = [path for path in data.rglob("*") if path.suffix.lower() in EXTENSIONS] if data.is_dir() else []
    if not paths:
        raise ConfigurationError(f"{data} has no photos: name the folder with --data")
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{data} has two photos of one number: name the folder that has the photos themselves")
    numbered = sorted(
        paths, key=lambda path: (not path.stem.isdigit(), int(path.stem) if path.stem.isdigit() else 0, path)
    )
    return [Sample(path, 0) for path in numbered]


@contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name when it is complete; what was there before stays until then."""
    try:
        with (
            replaced(path) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            yield file
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}): name another file") from None


def write_answers(path: Path, samples: Sequence[Sample], answers: Floats, classes: Sequence[Class]) -> None:
    """Write a CSV with each photo's path, its label and the probability of each class."""
    with _replaced(path) as file:
        table = csv.writer(file)
        table.writerow(["path", "label", *(f"probability of {c.label}" for c in classes)])
        for sample, row in zip(samples, answers.tolist(), strict=True):
            table.writerow([sample.path, classes[sample.label].label, *(round(p, 6) for p in row)])


def write_submission(path: Path, samples: Sequence[Sample], answers: Floats, clip: float) -> None:
    """Write `id,label` rows, the label being the second class's probability, kept `clip` away from 0 and 1."""
    with _replaced(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "label"])
        for sample, probability in zip(samples, answers[:, 1].clip(clip, 1 - clip).tolist(), strict=True):
            table.writerow([sample.path.stem, f"{probability:.6f}"])
