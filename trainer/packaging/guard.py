"""The guard set: what the backbone says of the calibration photos, kept in the model folder.

In: the network that OpenVINO runs, and calibration photos. Out: `guard.safetensors`. A later fit of the head alone is
compared with the model on these features, and calibrated on them, where the photos are not at hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino
import safetensors
import safetensors.numpy
import torch
from torch import nn

from sorter.classifier.manifest import Manifest
from sorter.classifier.outliers import OutlierDetector
from sorter.errors import ModelError
from trainer.data.layouts import Sample, labels_of, spread
from trainer.packaging import backbone, metrics
from trainer.packaging.metrics import Floats, Labels
from trainer.progress import Reporter

FILE = "guard.safetensors"
MAX_PHOTOS = 2000
"""More would make the folder larger and the comparison no safer: two more mistakes among them refuse a model."""
_LABELS = "labels"


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """The features of labelled photos.

    Attributes:
        features: by the side of the network's input in pixels, of each pass of the cascade and the full one; (N, F).
        labels: (N,).
    """

    features: Mapping[int, Floats]
    labels: Labels

    def as_file(self) -> bytes:
        """The file that `read` reads, with features in fp16."""
        halves = {str(size): values.astype(np.float16) for size, values in self.features.items()}
        return safetensors.numpy.save({**halves, _LABELS: self.labels.astype(np.int32)})


def measure(model: openvino.Model, described: Manifest, samples: Sequence[Sample], reporter: Reporter) -> Guard:
    """Compute the features of photos at every size at which the model looks at a photo; of `MAX_PHOTOS` at most.

    Args:
        model: the network that OpenVINO runs; it is not changed.
        described: its manifest, with the cascade.
        samples: the photos.
        reporter: shows progress.
    """
    chosen = spread(samples, MAX_PHOTOS)
    sizes = (*(each.size for each in described.cascade), described.input.size)
    features = {size: backbone.features_at(model, described, size, chosen, reporter) for size in sizes}
    return Guard(features, labels_of(chosen))


def read(folder: Path, described: Manifest) -> Guard | None:
    """Read the guard set of a model folder; None if it has none.

    Raises:
        ModelError: the file does not fit the model.
    """
    if FILE not in described.files:
        return None
    try:
        tensors = safetensors.numpy.load_file(folder / FILE)
        labels = tensors.pop(_LABELS).astype(np.intp)
        features = {int(size): values.astype(np.float32) for size, values in tensors.items()}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / FILE} cannot be read ({error}): export the model again") from None
    sizes = {each.size for each in described.cascade} | {described.input.size}
    shapes = {values.shape for values in features.values()}
    is_sound = len(shapes) == 1 and all(len(shape) == 2 and shape[0] == len(labels) > 0 for shape in shapes)
    known = labels.size and labels.min() >= 0 and labels.max() < len(described.classes)
    if not (sizes <= set(features) and is_sound and known):
        raise ModelError(f"{folder / FILE} does not fit the model: export the model again")
    return Guard(features, labels)


@torch.inference_mode()
def logits_of(head: nn.Module, features: Mapping[int, Floats]) -> dict[int, Floats]:
    """What a head makes of features, (N, C), by size."""
    return {size: head(torch.from_numpy(values)).numpy() for size, values in features.items()}


def answers(
    logits: Mapping[int, Floats],
    described: Manifest,
    min_confidence: float = 0.0,
    distances: Mapping[int, Floats] | None = None,
) -> Floats:
    """The probabilities that OpenVINO's engine gives with its cascade, (N, C).

    Args:
        logits: by size, (N, C).
        described: the manifest.
        min_confidence: as for the engine.
        distances: of the outlier detector, by size, (N,); photos that are caught get probabilities of -1.
    """
    full = described.input.size
    result = metrics.softmax(logits[full], described.temperature)
    if distances is not None:
        assert described.neither is not None, "there is a detector"
        result[distances[full] > described.neither.threshold] = -1
    for each in reversed(described.cascade):
        if min_confidence > each.threshold:
            continue
        low = metrics.softmax(logits[each.size], each.temperature)
        is_final = low.max(1) >= each.threshold
        if distances is not None:
            if each.neither_threshold is None:
                continue
            is_final &= distances[each.size] <= each.neither_threshold
        result[is_final] = low[is_final]
    return result


@torch.inference_mode()
def distances_of(detector: OutlierDetector, head: nn.Module, features: Mapping[int, Floats]) -> dict[int, Floats]:
    """How far photos are from those of the classes, (N,), by size."""
    if detector.layer == "features":
        return {size: detector(values) for size, values in features.items()}
    assert isinstance(head, nn.Sequential), "it has a hidden layer"
    return {size: detector(head[:2](torch.from_numpy(values)).numpy()) for size, values in features.items()}
