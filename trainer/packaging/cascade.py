"""Chooses the cascade: a low-resolution pass over every photo, and the full-size pass only where it is not confident.

In: the network that OpenVINO will run, and calibration photos. Out: the manifest's `first_look`, or None. Sizes and
thresholds are compared by what they cost and by the labels that they change, never by which labels are right.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import openvino

from sorter.classifier.manifest import Coverage, FirstLook, Input
from sorter.classifier.openvino_graph import at_lower_resolution
from trainer.data.layouts import Sample, labels_of
from trainer.fitting import features
from trainer.packaging import metrics
from trainer.packaging.metrics import Floats, Labels
from trainer.progress import Reporter

MIN_PHOTOS = 300
"""If no label changes among this many photos, the share that changes has a 95 % upper bound of 1 %."""
MAX_CHANGED = 0.002
MIN_THRESHOLD = 0.9
"""Whatever the photos say, a less confident photo gets the full-size pass."""
MAX_COST = 0.8
"""In multiples of the full-size pass; above it the cascade does not pay off."""
_SIZES = (0.4, 0.8)
"""The smallest and the largest size that are tried, in multiples of the full size."""
_STEP = 16


def choose(
    model: openvino.Model, full: Floats, samples: Sequence[Sample], described: Input, reporter: Reporter
) -> FirstLook | None:
    """Find the low-resolution pass that makes the cascade cheapest.

    Args:
        model: the network, from uint8 (N, S, S, 3); it is not changed.
        full: its logits for the samples at full size, (N, C).
        samples: calibration photos.
        described: the network's input.
        reporter: shows progress.

    Returns:
        None if there are too few photos to decide, or if no cascade pays off.
    """
    if len(samples) < MIN_PHOTOS:
        return None
    smallest, largest = (math.ceil(share * described.size / _STEP) * _STEP for share in _SIZES)
    sizes = range(smallest, largest, _STEP)
    costs = [
        ((low.size / described.size) ** 2 + 1 - low.enough, low)
        for low in _candidates(model, sizes, full, samples, described, reporter)
        if low.agreement >= 1 - MAX_CHANGED  # otherwise it is fully confident and wrong
    ]
    cost, cheapest = min(costs, default=(1.0, None), key=lambda entry: entry[0])
    return cheapest if cost <= MAX_COST else None


def _candidates(
    model: openvino.Model,
    sizes: Sequence[int],
    full: Floats,
    samples: Sequence[Sample],
    described: Input,
    reporter: Reporter,
) -> Iterator[FirstLook]:
    """A low-resolution pass at each size, with its own temperature and threshold."""
    labels, expected = labels_of(samples), full.argmax(1)
    for size in sizes:
        try:
            run = features.on_openvino(at_lower_resolution(model.clone(), described.size, size))
        except RuntimeError:  # a network that takes one size only
            continue
        track = reporter.tracker(f"low-resolution pass at {size} px")
        logits = features.answers(run, samples, described.preprocessing, track=track)
        temperature = metrics.fit_temperature(logits, labels)
        probabilities = metrics.softmax(logits, temperature)
        changed = probabilities.argmax(1) != expected
        threshold = lowest_threshold(probabilities.max(1), changed)
        is_enough = probabilities.max(1) >= threshold
        yield FirstLook(
            size=size,
            temperature=temperature,
            threshold=threshold,
            photos=len(samples),
            enough=round(float(is_enough.mean()), 4),
            agreement=round(1 - float((changed & is_enough).mean()), 4),
        )


def lowest_threshold(confidence: Floats, changed: "np.typing.NDArray[np.bool_]") -> float:
    """The lowest threshold at which few enough labels change.

    Args:
        confidence: of the low-resolution pass, (N,).
        changed: whether the full-size pass gives another label, (N,).
    """
    allowed = int(MAX_CHANGED * len(changed))
    most_confident = np.sort(confidence[changed])[::-1]
    if len(most_confident) <= allowed:
        return MIN_THRESHOLD
    return min(1.0, max(MIN_THRESHOLD, (math.floor(float(most_confident[allowed]) * 1e4 + 0.01) + 1) / 1e4))


def risk_coverage(cascaded: Floats, full: Floats, labels: Labels, low: FirstLook | None) -> tuple[Coverage, ...]:
    """`metrics.risk_coverage` of an engine that skips the low-resolution pass above its threshold.

    Args:
        cascaded: probabilities of the cascade, (N, C).
        full: those of the full-size pass alone.
        labels: of the photos.
        low: the low-resolution pass; None if the model has no cascade.
    """
    return metrics.risk_coverage(lambda t: full if low is None or t > low.threshold else cascaded, labels)
