"""Figures of a classifier: accuracy, log-loss, calibration, and the thresholds for an error rate.

In: probabilities float32 (N, C) or logits of the same shape, and labels (N,). Out: numbers. Temperature and thresholds
are chosen on calibration photos; nothing is chosen on test photos.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from sorter.classifier.manifest import Coverage, Evaluation
from trainer.data.layouts import Sample, labels_of

ERROR_RATES = (0.005, 0.01, 0.02, 0.05)
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
    """The temperature with the lowest log-loss (Guo et al. 2017, arXiv:1706.04599)."""
    found = minimize_scalar(
        lambda log_t: log_loss(softmax(logits, math.exp(log_t)), labels), bounds=(-4, 4), method="bounded"
    )
    return round(math.exp(float(found.x)), 4)


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """Expected calibration error over 15 equal bins of confidence, 0 to 1 (Guo et al. 2017, arXiv:1706.04599)."""
    confidence, is_right = probabilities.max(1), probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, _CALIBRATION_BINS + 1, dtype=np.float32)
    bins = np.digitize(confidence, edges)  # a confidence of exactly 1 is in a bin of its own
    # In each bin: |right - sum of confidences|, which is the gap between accuracy and confidence times the photos.
    gaps = np.bincount(bins, is_right) - np.bincount(bins, confidence)
    return round(float(np.abs(gaps).sum()) / len(labels), 4)


def evaluation(
    probabilities: Floats, samples: Sequence[Sample], *, data: str, role: Literal["calibration", "test"]
) -> Evaluation:
    """Everything that the manifest says about one set of photos.

    Args:
        probabilities: of the samples, (N, C).
        samples: the photos.
        data: describes them to the manifest's reader.
        role: whether anything was chosen on them.
    """
    labels, called = labels_of(samples), probabilities.argmax(1)
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


def risk_coverage(probabilities: Floats, labels: Labels) -> tuple[Coverage, ...]:
    """The share of photos that can be sorted automatically at some error rates, with the threshold for each rate.

    For each rate it is the largest share, in steps of 1 % from the most confident photos down, whose error rate has a
    95 % upper bound (Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404) within the rate. Each share's bound holds
    for that share alone, as in selective classification (Geifman and El-Yaniv 2017, arXiv:1705.08500).

    Args:
        probabilities: calibrated, (N, C), of photos that were not used for fitting.
        labels: theirs.

    Returns:
        One entry for each rate that the photos support; few photos support no low rate.
    """
    order = np.argsort(-probabilities.max(1), kind="stable")
    confidence = probabilities.max(1)[order]
    errors = (probabilities.argmax(1) != labels)[order].cumsum()
    shares = [math.ceil(len(labels) * percent / 100) for percent in range(100, 0, -1)]  # in photos
    bounds = [(photos, _upper_bound(int(errors[photos - 1]), photos)) for photos in shares]
    table = []
    for rate in ERROR_RATES:
        photos = next((photos for photos, bound in bounds if bound <= rate), 0)
        if photos:
            threshold, coverage = round(float(confidence[photos - 1]), 4), round(photos / len(labels), 4)
            table.append(Coverage(error_rate=rate, threshold=threshold, coverage=coverage))
    return tuple(table)


def _upper_bound(errors: int, photos: int) -> float:
    """The one-sided 95 % Clopper-Pearson upper bound of an error rate."""
    return float(binomtest(errors, photos, alternative="less").proportion_ci(0.95, method="exact").high)


def mistakes(probabilities: Floats, samples: Sequence[Sample]) -> Iterator[tuple[Sample, int, float]]:
    """The wrongly classified photos, most confident first: sample, predicted class, confidence."""
    wrong = [i for i, sample in enumerate(samples) if probabilities[i].argmax() != sample.label]
    for i in sorted(wrong, key=lambda i: -probabilities[i].max()):
        yield samples[i], int(probabilities[i].argmax()), float(probabilities[i].max())
