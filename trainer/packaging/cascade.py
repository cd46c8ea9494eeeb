"""Chooses the cascade: low-resolution passes over every photo, and larger ones only where those are not confident.

In: the network that OpenVINO will run, and calibration photos. Out: the manifest's `cascade`. Sizes and thresholds are
compared by what they cost and by the labels that they change, never by which labels are right.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import openvino

from sorter.classifier.manifest import Input, LowResolutionPass
from sorter.classifier.openvino_graph import at_lower_resolution
from trainer.data.layouts import Sample, labels_of
from trainer.fitting import features
from trainer.packaging import metrics
from trainer.packaging.metrics import Floats
from trainer.progress import Reporter

MIN_PHOTOS = 300
"""If no label changes among this many photos, the share that changes has a 95 % upper bound of 1 %."""
MAX_CHANGED = 0.002
MIN_THRESHOLD = 0.9
"""Whatever the photos say, a less confident photo gets a larger pass."""
MAX_COST, MAX_NEXT_COST = 0.8, 0.95
"""In multiples of the cost without the first pass, and with one pass less: above it they do not pay off."""
MAX_PASSES = 2
"""Before the one at full size."""
_SIZES = (0.4, 0.8)
"""The smallest and the largest size that are tried, in multiples of the full size."""
_STEP = 16
_FIXED_PIXELS = 900
"""What a pass costs at any size, in pixels: a photo is scaled and handed over, and small layers fill a core badly."""

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a size would answer.

    Attributes:
        size: side of the network's input, pixels.
        temperature: fitted for it.
        confidence: of its answers, (N,).
        changed: whether the full-size pass gives another label, (N,).
    """

    size: int
    temperature: float
    confidence: Floats
    changed: Bools


def choose(
    model: openvino.Model, full: Floats, samples: Sequence[Sample], described: Input, reporter: Reporter
) -> tuple[LowResolutionPass, ...]:
    """Find the low-resolution passes that make the cascade cheapest.

    Args:
        model: the network, from uint8 (N, S, S, 3); it is not changed.
        full: its logits for the samples at full size, (N, C).
        samples: calibration photos.
        described: the network's input.
        reporter: shows progress.

    Returns:
        None of them if there are too few photos to decide, or if no cascade pays off.
    """
    if len(samples) < MIN_PHOTOS:
        return ()
    smallest, largest = (math.ceil(share * described.size / _STEP) * _STEP for share in _SIZES)
    sizes = range(smallest, largest, _STEP)
    return cheapest(list(_candidates(model, sizes, full, samples, described, reporter)), described.size)


def cheapest(candidates: Sequence[Candidate], full_size: int) -> tuple[LowResolutionPass, ...]:
    """The passes that cost least, of those that change few enough labels together.

    Args:
        candidates: by rising size, of the same photos.
        full_size: side of the network's input, pixels.
    """
    best: tuple[LowResolutionPass, ...] = ()
    best_cost = 1.0
    for count in range(1, MAX_PASSES + 1):
        found = [
            (cost(passes, full_size), passes)
            for chosen in combinations(candidates, count)
            for passes in _with_thresholds(chosen)
        ]
        least, passes = min(found, default=(math.inf, ()), key=lambda entry: entry[0])
        if least > best_cost * (MAX_COST if count == 1 else MAX_NEXT_COST):
            break
        best, best_cost = passes, least
    return best


def cost(passes: Sequence[LowResolutionPass], full_size: int) -> float:
    """What a cascade costs for a photo, in multiples of the full-size pass alone."""
    left, total = 1.0, 0.0
    for each in passes:
        total += left * (each.size**2 + _FIXED_PIXELS) / (full_size**2 + _FIXED_PIXELS)
        left -= each.enough
    return total + left


def _candidates(
    model: openvino.Model,
    sizes: Sequence[int],
    full: Floats,
    samples: Sequence[Sample],
    described: Input,
    reporter: Reporter,
) -> Iterator[Candidate]:
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
        yield Candidate(size, temperature, probabilities.max(1), probabilities.argmax(1) != expected)


def _with_thresholds(chosen: Sequence[Candidate]) -> Iterator[tuple[LowResolutionPass, ...]]:
    """The passes of these sizes, with each way to divide the labels that may change between them."""
    photos = len(chosen[0].changed)
    allowed = int(MAX_CHANGED * photos)
    for own in range(allowed + 1) if len(chosen) > 1 else [allowed]:
        passes, is_open, changed = [], np.ones(photos, bool), 0
        for candidate, may_change in zip(chosen, (own, allowed), strict=False):
            threshold = lowest_threshold(
                candidate.confidence[is_open], candidate.changed[is_open], may_change - changed
            )
            is_final = is_open & (candidate.confidence >= threshold)
            changed += int((candidate.changed & is_final).sum())
            is_open &= ~is_final
            passes.append(
                LowResolutionPass(
                    size=candidate.size,
                    temperature=candidate.temperature,
                    threshold=threshold,
                    photos=photos,
                    enough=round(float(is_final.mean()), 4),
                    agreement=round(1 - changed / photos, 4),
                )
            )
        if changed <= allowed:  # otherwise one is fully confident and gives another label
            yield tuple(passes)


def lowest_threshold(confidence: Floats, changed: Bools, allowed: int) -> float:
    """The lowest threshold at which few enough labels change.

    Args:
        confidence: of the low-resolution pass, (N,).
        changed: whether the full-size pass gives another label, (N,).
        allowed: how many may change.
    """
    most_confident = np.sort(confidence[changed])[::-1]
    if len(most_confident) <= allowed:
        return MIN_THRESHOLD
    return min(1.0, max(MIN_THRESHOLD, (math.floor(float(most_confident[max(0, allowed)]) * 1e4 + 0.01) + 1) / 1e4))


def levels(passes: Sequence[LowResolutionPass]) -> list[float]:
    """The confidence thresholds at which the engine leaves passes out, with 0 for none: rising."""
    return [0.0, *(math.nextafter(lowest, 2) for lowest in sorted({each.threshold for each in passes}) if lowest < 1)]


def level(passes: Sequence[LowResolutionPass], threshold: float) -> int:
    """Which of the `levels` a confidence threshold is on."""
    return max(number for number, lowest in enumerate(levels(passes)) if threshold >= lowest)


def at(by_level: Sequence[Floats], passes: Sequence[LowResolutionPass], threshold: float) -> Floats:
    """Of the answers on each of the `levels`, (N, C) each, those that the engine gives with a confidence threshold."""
    return by_level[level(passes, threshold)]
