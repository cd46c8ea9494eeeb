"""Figures of a classifier: accuracy, log-loss, calibration, and the thresholds for an error rate.

In: probabilities float32 (N, C) or logits of the same shape, and labels (N,). Out: numbers. Temperature and thresholds
are chosen on calibration photos; nothing is tuned on test photos.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest

from sorter.classifier.manifest import Coverage, Evaluation
from trainer.data.layouts import Sample

ERROR_RATES = (0.005, 0.01, 0.02, 0.05)
THRESHOLDS = (*(round(1 - 10 ** (-step / 20), 6) for step in range(100, 0, -1)), 0.0)
"""The confidences that are tried, from 0.99999 down; the last one sorts every photo."""
_ALPHA = 0.05
_FIRST_SHARE = 0.1
"""The first threshold that is tested is one that this share of the photos reach."""
TEMPERATURE_DEVIATION = 0.25
"""The standard deviation of the temperature's logarithm, before any photo is seen."""
_CALIBRATION_BINS = 15

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.intp]


def log(probabilities: Floats) -> Floats:
    """Logarithms of probabilities, which are logits up to a constant."""
    logs: Floats = np.log(probabilities.clip(1e-12))
    return logs


def softmax(logits: Floats, temperature: float) -> Floats:
    """Probabilities, float32 (N, C)."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    probabilities: Floats = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    return probabilities


def log_loss(probabilities: Floats, labels: Labels) -> float:
    """Mean negative logarithm of the true class's probability, natural units."""
    likelihoods = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return abs(float(np.log(likelihoods.clip(1e-7)).mean()))  # never -0.0


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The likeliest temperature (Guo et al. 2017, arXiv:1706.04599) under a log-normal prior around 1.

    Without the prior, few photos that are all right would make every answer look certain. With hundreds of photos it
    changes little. trainer/README.md has the measurements that its width comes from.
    """

    def loss(log_temperature: float) -> float:
        surprise = (log_temperature / TEMPERATURE_DEVIATION) ** 2 / 2
        return log_loss(softmax(logits, math.exp(log_temperature)), labels) + surprise / len(labels)

    found = minimize_scalar(loss, bounds=(-4, 4), method="bounded")
    return round(math.exp(float(found.x)), 4)


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """Expected calibration error over 15 equal bins of confidence, 0 to 1 (Guo et al. 2017, arXiv:1706.04599)."""
    confidence, is_right = probabilities.max(1), probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, _CALIBRATION_BINS + 1, dtype=np.float32)
    bins = np.digitize(confidence, edges)  # a confidence of exactly 1 is in a bin of its own
    # In each bin: |right - sum of confidences|, which is the gap between accuracy and confidence times the photos.
    gaps = np.bincount(bins, is_right) - np.bincount(bins, confidence)
    return round(float(np.abs(gaps).sum()) / len(labels), 4)


def evaluation(probabilities: Floats, labels: Labels, *, data: str, role: Literal["calibration", "test"]) -> Evaluation:
    """Everything that the manifest says about one set of photos.

    Args:
        probabilities: of the photos, (N, C).
        labels: of the photos, (N,).
        data: describes them to the manifest's reader.
        role: whether anything was chosen on them.
    """
    called = probabilities.argmax(1)
    right = int((called == labels).sum())
    confusion = np.zeros((probabilities.shape[1], probabilities.shape[1]), int)
    np.add.at(confusion, (labels, called), 1)
    return Evaluation(
        data=data,
        role=role,
        photos=len(labels),
        right=right,
        accuracy=round(right / len(labels), 4),
        accuracy_interval_95=wilson(right, len(labels)),
        log_loss=round(log_loss(probabilities, labels), 4),
        calibration_error=calibration_error(probabilities, labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def wilson(right: int, photos: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of an accuracy (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    interval = binomtest(right, photos).proportion_ci(0.95, method="wilson")
    return round(float(interval.low), 4), round(float(interval.high), 4)


def risk_coverage(answers_at: Callable[[float], Floats], labels: Labels) -> tuple[Coverage, ...]:
    """The share of photos that can be sorted automatically at some error rates, with the threshold for each rate.

    Fixed-sequence testing, one of the procedures of Learn then Test (Angelopoulos et al. 2021, arXiv:2110.01052): the
    thresholds of `THRESHOLDS`, which do not depend on the photos, are tested from the highest down, each at 5 %, until
    the first that is not shown to keep the rate. Of those before it, the one that sorts most is taken. A threshold is
    shown to keep the rate if so few errors would be less likely than 5 % at a higher rate (a binomial test, which is
    Clopper and Pearson's upper bound). The first to be tested is one that enough photos reach; that is sound where less
    confident photos are wrong more often. So the chance that the threshold breaks its rate is at most 5 %, for photos
    drawn like these and not used for anything else. (Geifman and El-Yaniv 2017, arXiv:1705.08500, search all
    thresholds, and pay for it with a union bound.)

    Args:
        answers_at: the probabilities, (N, C), that the engine gives when it runs with a threshold; negative ones for
            photos that are not sorted whatever their confidence.
        labels: of the photos.

    Returns:
        One entry for each rate that the photos support; few photos support no low rate.
    """
    counts = [_counts(answers_at(threshold), labels, threshold) for threshold in THRESHOLDS]
    sorted_photos, errors = np.array(counts, int).T
    table = []
    for rate in ERROR_RATES:
        is_shown = binom.cdf(errors, sorted_photos, rate) <= _ALPHA
        # Among few photos, one mistake by chance would end the sequence.
        enough = max(photos_needed(rate), _FIRST_SHARE * len(labels))
        first = int(np.argmax(sorted_photos >= enough))  # 0 if too few photos reach any threshold
        end = first + int(np.argmin(np.append(is_shown[first:], False)))
        if end > first:
            most = max(range(first, end), key=lambda number: (sorted_photos[number], number))
            coverage = round(int(sorted_photos[most]) / len(labels), 4)
            table.append(Coverage(error_rate=rate, threshold=THRESHOLDS[most], coverage=coverage))
    return tuple(table)


def _counts(answers: Floats, labels: Labels, threshold: float) -> tuple[int, int]:
    """How many photos a threshold sorts, and how many of them into a wrong folder."""
    # In double precision, in which the sorter compares.
    is_sorted = answers.max(1).astype(np.float64) >= threshold
    return int(is_sorted.sum()), int((answers.argmax(1) != labels)[is_sorted].sum())


def always(answers: Floats) -> Callable[[float], Floats]:
    """For `risk_coverage`: the answers of an engine that gives the same ones with every threshold."""
    return lambda _threshold: answers


def not_shown(table: Sequence[Coverage], photos: int) -> list[str]:
    """A sentence about each error rate that a table lacks, which is of this many photos."""
    sentences = []
    for rate in sorted(set(ERROR_RATES) - {entry.error_rate for entry in table}):
        if photos < (needed := photos_needed(rate)):
            reason = f"with {photos} photos: at least {needed} are needed, with no mistake among them"
        else:
            reason = f"with these {photos} photos: too many of the confident answers are wrong"
        sentences.append(f"no threshold for an error rate of {rate:.1%} can be shown {reason}")
    return sentences


def photos_needed(rate: float) -> int:
    """The fewest photos that can show an error rate, if none of them is wrong."""
    return math.ceil(math.log(_ALPHA) / math.log1p(-rate))


def mistakes(probabilities: Floats, samples: Sequence[Sample]) -> Iterator[tuple[Sample, int, float]]:
    """The wrongly classified photos, most confident first: sample, predicted class, confidence."""
    wrong = [i for i, sample in enumerate(samples) if probabilities[i].argmax() != sample.label]
    for i in sorted(wrong, key=lambda i: -probabilities[i].max()):
        yield samples[i], int(probabilities[i].argmax()), float(probabilities[i].max())
