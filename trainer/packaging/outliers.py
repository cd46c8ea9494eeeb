"""What tells photos that show none of the classes: fitted on training photos, its threshold set on calibration photos.

In: the network that OpenVINO will run, and photos of the classes; photos of anything else are not needed. Out: the
distance that the model folder keeps, and what the manifest says of it.
"""

import math
from collections.abc import Sequence

import numpy as np
import openvino

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Input, Neither
from sorter.classifier.openvino_engine import hidden
from sorter.classifier.outliers import OutlierDetector, directions
from trainer.data.layouts import Sample
from trainer.fitting import features
from trainer.fitting.features import Floats
from trainer.progress import Reporter

TRAINING_PHOTOS = 2000
"""That the distance is fitted on; more change nothing."""
LEAST_PHOTOS = 100
"""Calibration photos, so that one of them may be caught by mistake."""
CAUGHT = 0.01
"""Share of the calibration photos that is caught by mistake."""
_SHRINKAGE = 0.01
"""Added to the spread in each direction, in multiples of the mean spread: some hidden units never stir."""


def choose(
    model: openvino.Model, hidden_layers: int, training: Sequence[Sample], seen: Input, reporter: Reporter
) -> OutlierDetector | None:
    """Fit the distance.

    Args:
        model: the network, from uint8 (N, S, S, 3).
        hidden_layers: of its head.
        training: the photos that it was fitted on.
        seen: how it sees a photo.
        reporter: is told how far it is.

    Returns:
        None if the head has no hidden layer, or says the same of every photo.
    """
    if not hidden_layers:
        return None
    upto = openvino.Model([hidden(model, hidden_layers)], model.get_parameters())
    step = max(1, len(training) // TRAINING_PHOTOS)
    some, track = training[::step][:TRAINING_PHOTOS], reporter.tracker("what the classes look like")
    return fit(features.answers(features.on_openvino(upto), some, seen.preprocessing, track=track))


def fit(rows: Floats) -> OutlierDetector | None:
    """The distance from the mean of some photos, given what the hidden layer makes of them, (N, H)."""
    found = directions(rows).astype(np.float64)
    mean = found.mean(0)
    spread, axes = np.linalg.eigh(np.cov(found - mean, rowvar=False, bias=True))  # (H,), (H, H)
    if spread.mean() < 1e-9:
        return None
    whitening = axes / np.sqrt(spread.clip(0) + _SHRINKAGE * spread.mean())
    return OutlierDetector(mean.astype(np.float32), whitening.astype(np.float32))


def distances(engine: Engine, samples: Sequence[Sample], seen: Input) -> Floats:
    """Of photos that decode, through the engine that will run, float32 (N,)."""
    found = [engine.classify_with_distance(pixels)[1] for pixels in features.batches(samples, seen.preprocessing)]
    return np.concatenate(found)


def describe(calibration: Floats) -> Neither:
    """The lowest threshold at which few enough of the calibration photos, of these distances, are caught."""
    allowed = int(CAUGHT * len(calibration))
    farthest = float(np.sort(calibration)[::-1][allowed])
    threshold = math.ceil(farthest * 1e4) / 1e4
    caught = float((calibration > threshold).mean())
    return Neither(threshold=threshold, photos=len(calibration), caught=round(caught, 4))
