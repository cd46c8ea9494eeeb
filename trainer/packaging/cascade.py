"""Whether a look at the photo made smaller is enough for most, and how sure it has to be.

In: the network that OpenVINO will run, and calibration photos. Out: what the manifest says of it, or None. Sizes and
thresholds are judged by what they would cost and by the labels that they would change, never by which labels are right.
"""

import math
from collections.abc import Sequence

import numpy as np
import openvino

from sorter.classifier.manifest import Coverage, FirstLook, Input
from sorter.classifier.openvino_engine import smaller
from trainer.data.layouts import Sample, labels_of
from trainer.fitting import features
from trainer.fitting.features import Floats
from trainer.packaging import evaluate
from trainer.progress import Reporter

LEAST_PHOTOS = 300
"""With no label changed among them, a 95 % upper bound of 1 % can be said."""
MOST_CHANGED = 0.002
LEAST_SURE = 0.9
"""Whatever the photos say: what is less sure deserves to be looked at properly."""
MOST_COST = 0.8
"""In multiples of what the whole look costs; above it, two looks are not worth their trouble."""
_SIZES = (0.4, 0.8)
_STEP = 16


def choose(
    model: openvino.Model,
    whole: Floats,
    samples: Sequence[Sample],
    seen: Input,
    reporter: Reporter,
) -> FirstLook | None:
    """Find the first look that costs least.

    Args:
        model: the network, from uint8 (N, S, S, 3).
        whole: its logits for the samples, (N, C).
        samples: calibration photos.
        seen: how the network sees a photo.
        reporter: is told how far it is.

    Returns:
        None if there are too few photos to judge it, or if it would save too little.
    """
    if len(samples) < LEAST_PHOTOS:
        return None
    labels, expected = labels_of(samples), whole.argmax(1)
    found: list[tuple[float, FirstLook]] = []
    least, most = (math.ceil(share * seen.size / _STEP) * _STEP for share in _SIZES)
    for size in range(least, most, _STEP):
        try:
            run = features.on_openvino(smaller(model.clone(), seen.size, size))
        except RuntimeError:  # a network that takes one size only
            continue
        track = reporter.tracker(f"a first look at {size} px")
        logits = features.answers(run, samples, seen.preprocessing, track=track)
        temperature = evaluate.fit_temperature(logits, labels)
        answers = evaluate.softmax(logits, temperature)
        changed = answers.argmax(1) != expected
        threshold = _threshold(answers.max(1), changed)
        enough = answers.max(1) >= threshold
        look = FirstLook(
            size=size,
            temperature=temperature,
            threshold=threshold,
            photos=len(samples),
            enough=round(float(enough.mean()), 4),
            agreement=round(1 - float((changed & enough).mean()), 4),
        )
        if look.agreement < 1 - MOST_CHANGED:  # it is wholly sure, and says something else
            continue
        found.append(((size / seen.size) ** 2 + 1 - look.enough, look))
    cost, cheapest = min(found, default=(1.0, None), key=lambda entry: entry[0])
    return cheapest if cost <= MOST_COST else None


def _threshold(confidence: Floats, changed: "np.typing.NDArray[np.bool_]") -> float:
    """The lowest threshold at which few enough labels change."""
    allowed = int(MOST_CHANGED * len(changed))
    surest = np.sort(confidence[changed])[::-1]
    if len(surest) <= allowed:
        return LEAST_SURE
    return min(1.0, max(LEAST_SURE, (math.floor(float(surest[allowed]) * 1e4 + 0.01) + 1) / 1e4))


def risk_coverage(
    answers: Floats, whole: Floats, labels: "np.typing.NDArray[np.intp]", look: FirstLook | None
) -> tuple[Coverage, ...]:
    """`evaluate.risk_coverage` for an engine that has no first look above that one's threshold.

    Args:
        answers: probabilities (N, C) with the first look.
        whole: those without it.
        labels: the photos'.
        look: the first look.
    """
    table = evaluate.risk_coverage(answers, labels)
    if look is None:
        return table
    low = {entry.error_rate: entry for entry in table if entry.threshold <= look.threshold}
    high = {}
    for entry in evaluate.risk_coverage(whole, labels):
        threshold = max(entry.threshold, round(look.threshold + 1e-4, 4))
        coverage = round(float((whole.max(1) >= threshold).mean()), 4)
        high[entry.error_rate] = entry.model_copy(update={"threshold": threshold, "coverage": coverage})
    both = high | low
    return tuple(both[rate] for rate in sorted(both))
