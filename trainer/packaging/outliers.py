"""Fits the outlier detector, which recognises photos that show none of the classes.

In: the network that OpenVINO will run, training photos to fit the detector on, and calibration photos to set its
threshold. It needs no photos of anything else. Out: the detector for the model folder, and the manifest's `neither`.
"""

import math
from collections.abc import Sequence

import numpy as np
import openvino

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Input, Neither
from sorter.classifier.openvino_graph import hidden_output
from sorter.classifier.outliers import OutlierDetector, directions
from trainer.data.layouts import Sample
from trainer.fitting import features
from trainer.fitting.features import Floats
from trainer.progress import Reporter

TRAINING_PHOTOS = 2000
"""The most that the detector is fitted on; more change nothing."""
MIN_PHOTOS = 100
"""Calibration photos needed for the threshold, so that one of them may be caught by mistake."""
CAUGHT = 0.01
"""Share of the calibration photos that is caught by mistake."""
_SHRINKAGE = 0.01
"""Added to the variance in each direction, in multiples of the mean variance: some hidden units are never active."""


def fit_detector(
    model: openvino.Model, hidden_layers: int, training: Sequence[Sample], described: Input, reporter: Reporter
) -> OutlierDetector | None:
    """Fit the detector on training photos.

    Args:
        model: the network, from uint8 (N, S, S, 3).
        hidden_layers: of its head.
        training: the photos that it was fitted on.
        described: the network's input.
        reporter: shows progress.

    Returns:
        None if the head has no hidden layer, or if that layer gives every photo the same values.
    """
    if not hidden_layers:
        return None
    backbone = openvino.Model([hidden_output(model, hidden_layers)], model.get_parameters())
    step, track = max(1, len(training) // TRAINING_PHOTOS), reporter.tracker("fitting the outlier detector")
    photos = training[::step][:TRAINING_PHOTOS]
    return detector_of(features.answers(features.on_openvino(backbone), photos, described.preprocessing, track=track))


def detector_of(rows: Floats) -> OutlierDetector | None:
    """A detector of what differs from the rows, the hidden layer's values for some photos, (N, H)."""
    units = directions(rows).astype(np.float64)
    mean = units.mean(0)
    variances, axes = np.linalg.eigh(np.cov(units - mean, rowvar=False, bias=True))  # (H,), (H, H)
    if variances.mean() < 1e-9:
        return None
    whitening = axes / np.sqrt(variances.clip(0) + _SHRINKAGE * variances.mean())
    return OutlierDetector(mean.astype(np.float32), whitening.astype(np.float32))


def classified(engine: Engine, samples: Sequence[Sample], described: Input) -> tuple[Floats, Floats]:
    """Probabilities, float32 (N, C), and distances, (N,), of photos that decode, through the engine that will run."""
    batches = features.batches(samples, described.preprocessing)
    probabilities, distances = zip(*(engine.classify_with_distance(pixels) for pixels in batches), strict=True)
    return np.concatenate(probabilities), np.concatenate(distances)


def describe(calibration: Floats) -> Neither:
    """The manifest's entry, with the lowest threshold that catches few enough calibration photos.

    Args:
        calibration: the photos' distances, (N,).
    """
    allowed = int(CAUGHT * len(calibration))
    farthest = float(np.sort(calibration)[::-1][allowed])
    threshold = math.ceil(farthest * 1e4) / 1e4
    caught = float((calibration > threshold).mean())
    return Neither(threshold=threshold, photos=len(calibration), caught=round(caught, 4))
