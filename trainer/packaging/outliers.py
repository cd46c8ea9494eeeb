"""Fits the outlier detector, which recognises photos that show none of the classes.

In: the network that OpenVINO will run, training photos, and photos of other things where there are any. Out: the
detector for the model folder, and the manifest's thresholds, which are chosen on calibration photos.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import openvino
from scipy.optimize import minimize
from scipy.special import expit

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Input, LowResolutionPass, Manifest, Neither
from sorter.classifier.openvino_graph import at_lower_resolution, layer_output
from sorter.classifier.outliers import Layer, LearnedDetector, MahalanobisDetector, OutlierDetector, directions
from trainer.data.layouts import Sample
from trainer.data.others import HELD_OUT_SHARE
from trainer.fitting import features
from trainer.fitting.features import Floats
from trainer.packaging import metrics
from trainer.progress import Reporter

Doubles = npt.NDArray[np.float64]

TRAINING_PHOTOS = 2000
"""The most that a detector is fitted on without photos of other things; more change nothing."""
MIN_PHOTOS = 100
"""Calibration photos needed for the threshold, so that one of them may be caught by mistake."""
MIN_OTHERS = 50
"""Photos of other things that a detector can be learned from; with a few hundred it becomes useful."""
LET_THROUGH = 0.01
"""Share of the photos of other things that the low-resolution passes may let through, and the last would not."""
_SHRINKAGE = 0.01
"""Added to the variance in each direction, in multiples of the mean variance: some hidden units are never active."""
_PENALTY = 1e-3
"""Of the weights' squares, for standardised features."""


@dataclass(frozen=True, slots=True)
class Distances:
    """What an outlier detector measured at full size.

    Attributes:
        calibration: of the calibration photos, (N,).
        others: of the photos of other things that it was not fitted on, (M,).
    """

    calibration: Floats
    others: Floats


def fit(
    model: openvino.Model, described: Manifest, training: Sequence[Sample], others: Sequence[Sample], reporter: Reporter
) -> OutlierDetector | None:
    """Fit a detector.

    Args:
        model: the network, from uint8 (N, S, S, 3).
        described: its manifest so far.
        training: photos that it was fitted on.
        others: photos of other things; without enough of them the distance from the training photos has to do.
        reporter: shows progress.

    Returns:
        None if there are not enough others, and the head has no hidden layer or one that gives every photo the same
        values.
    """
    if len(others) >= MIN_OTHERS:
        run = _answers_of(model, "features", described, reporter)
        return learned(run(training, "features of the classes"), run(others, "features of other photos"))
    if others:
        needed = math.ceil(MIN_OTHERS / (1 - HELD_OUT_SHARE))
        reporter.say(f"{len(others)} photos of other things are too few to learn from: give at least {needed}")
    if not described.head_hidden:
        return None
    step = max(1, len(training) // TRAINING_PHOTOS)
    run = _answers_of(model, "hidden", described, reporter)
    return mahalanobis(run(training[::step][:TRAINING_PHOTOS], "fitting the outlier detector"))


def _answers_of(
    model: openvino.Model, layer: Layer, described: Manifest, reporter: Reporter
) -> Callable[[Sequence[Sample], str], Floats]:
    output = layer_output(model, layer, len(described.head_hidden))
    run = features.on_openvino(openvino.Model([output], model.get_parameters()))

    def answers(samples: Sequence[Sample], title: str) -> Floats:
        return features.answers(run, samples, described.input.preprocessing, track=reporter.tracker(title))

    return answers


def learned(classes: Floats, others: Floats) -> LearnedDetector:
    """The logistic regression that tells photos of the classes, (N, W), from others, (M, W); both weigh the same."""
    rows = np.concatenate([classes, others]).astype(np.float64)
    is_other = np.repeat([0.0, 1.0], [len(classes), len(others)])
    weights = np.where(is_other > 0, 0.5 / len(others), 0.5 / len(classes))
    mean = weights @ rows
    deviation = np.sqrt(weights @ (rows - mean) ** 2) + 1e-3
    rows = (rows - mean) / deviation

    def loss(parameters: Doubles) -> tuple[float, Doubles]:
        odds = rows @ parameters[:-1] + parameters[-1]
        value = float(weights @ (np.logaddexp(0, odds) - is_other * odds)) + _PENALTY * float(
            parameters[:-1] @ parameters[:-1]
        )
        wrong = weights * (expit(odds) - is_other)
        return value, np.append(wrong @ rows + 2 * _PENALTY * parameters[:-1], wrong.sum())

    found = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    weight = found[:-1] / deviation
    bias = found[-1:] - mean @ weight
    return LearnedDetector(weight.astype(np.float32), bias.astype(np.float32))


def mahalanobis(rows: Floats) -> MahalanobisDetector | None:
    """A detector of what differs from the rows, the hidden layer's values for some photos, (N, H)."""
    units = directions(rows).astype(np.float64)
    mean = units.mean(0)
    variances, axes = np.linalg.eigh(np.cov(units - mean, rowvar=False, bias=True))  # (H,), (H, H)
    if variances.mean() < 1e-9:
        return None
    whitening = axes / np.sqrt(variances.clip(0) + _SHRINKAGE * variances.mean())
    return MahalanobisDetector(mean.astype(np.float32), whitening.astype(np.float32))


def distances(engine: Engine, samples: Sequence[Sample], described: Input) -> Floats:
    """Distances, float32 (N,), of photos that decode, through the engine that will run."""
    batches = features.batches(samples, described.preprocessing)
    return np.concatenate([np.zeros(0, np.float32), *(engine.classify_with_distance(each)[1] for each in batches)])


def describe(detector: OutlierDetector, calibration: Floats, others: Floats, max_lost: float) -> Neither:
    """The manifest's entry, with the lowest threshold that catches few enough calibration photos.

    Args:
        detector: whose distances they are.
        calibration: of the calibration photos, (N,).
        others: of photos of other things that it was not fitted on, (M,); M may be 0.
        max_lost: the share of the calibration photos that may be caught by mistake.
    """
    allowed = int(max_lost * len(calibration))
    farthest = float(np.sort(calibration)[::-1][allowed])
    threshold = math.ceil(farthest * 1e4) / 1e4
    return Neither(
        score="learned" if isinstance(detector, LearnedDetector) else "mahalanobis",
        threshold=threshold,
        photos=len(calibration),
        caught=round(float((calibration > threshold).mean()), 4),
        others=len(others),
        others_caught=round(float((others > threshold).mean()), 4) if len(others) else 0.0,
    )


def with_thresholds(
    model: openvino.Model,
    detector: OutlierDetector,
    described: Manifest,
    others: Sequence[Sample],
    distances: Floats,
    reporter: Reporter,
) -> tuple[LowResolutionPass, ...]:
    """The cascade's passes with the distance up to which each is final; unchanged without photos of other things.

    Args:
        model: the network, from uint8 (N, S, S, 3); it is not changed.
        detector: the same for all sizes.
        described: the manifest, with the passes and the threshold at full size.
        others: photos of other things that the detector was not fitted on.
        distances: theirs at full size, (M,).
        reporter: shows progress.
    """
    assert described.neither is not None, "the caller has described the detector"
    passes = described.cascade
    is_caught = distances > described.neither.threshold
    if not is_caught.any():
        return passes
    allowed = int(LET_THROUGH * len(others) / max(1, len(passes)))
    chosen = []
    for each in passes:
        small = at_lower_resolution(_with_layer(model, detector, described), described.input.size, each.size)
        run = features.on_openvino(small)
        title = f"other photos at {each.size} px"
        rows = features.answers(run, others, described.input.preprocessing, track=reporter.tracker(title))
        logits, activations = np.split(rows, [len(described.classes)], axis=1)
        confident = metrics.softmax(logits, each.temperature).max(1) >= each.threshold
        would_pass = np.sort(detector(activations)[confident & is_caught])
        nearest = float(would_pass[allowed]) if len(would_pass) > allowed else float(described.neither.threshold)
        threshold = min(described.neither.threshold, math.floor(nearest * 1e4 - 1) / 1e4)
        chosen.append(each.model_copy(update={"neither_threshold": threshold}))
    return tuple(chosen)


def _with_layer(model: openvino.Model, detector: OutlierDetector, described: Manifest) -> openvino.Model:
    copy = model.clone()
    copy.add_outputs([layer_output(copy, detector.layer, len(described.head_hidden))])
    return copy
