"""The distance of a photo from those of the classes: if it is large, the photo probably shows none of them.

In: what one layer of the network says about photos, (N, W). Out: distances, (N,), which have no unit. There are two
kinds of detector. It imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from sorter.classifier.manifest import NEITHER, Manifest
from sorter.errors import ModelError

Floats = npt.NDArray[np.float32]
Layer = Literal["features", "hidden"]
"""The backbone's pooled features, which the head takes; or the head's first hidden layer."""


class OutlierDetector(Protocol):
    """Measures distances.

    Attributes:
        layer: what the distances are measured from.
    """

    layer: ClassVar[Layer]

    @property
    def width(self) -> int:
        """Of that layer."""
        ...

    def __call__(self, activations: Floats) -> Floats:
        """Distances of photos, float32 (N,), from the layer's values for them, (N, W)."""
        ...

    def as_file(self) -> bytes:
        """The file that `read` reads."""
        ...


@dataclass(frozen=True, slots=True)
class LearnedDetector:
    """How much a photo looks like photos of other things: logistic regression on the backbone's features.

    The distance is the logarithm of the odds that a photo shows none of the classes.

    Attributes:
        weight: float32 (W,).
        bias: float32 (1,).
    """

    layer: ClassVar[Layer] = "features"

    weight: Floats
    bias: Floats

    @property
    def width(self) -> int:
        """Of the features."""
        return len(self.weight)

    def __call__(self, activations: Floats) -> Floats:
        """Distances, float32 (N,), from features, (N, W)."""
        distances: Floats = np.einsum("nw,w->n", activations, self.weight) + self.bias
        return distances

    def as_file(self) -> bytes:
        """The file that `read` reads."""
        return safetensors.numpy.save({"weight": self.weight, "bias": self.bias})


@dataclass(frozen=True, slots=True)
class MahalanobisDetector:
    """How far a photo is from the photos of the classes, without knowledge of anything else.

    Only the direction of the activations counts; the distance is Mahalanobis's, from the mean of the training photos
    (Lee et al. 2018, arXiv:1807.03888; one mean is enough, Kamoi and Kobayashi 2020, arXiv:2003.00402).

    Attributes:
        mean: of the training photos' normalised activations, float32 (H,).
        whitening: transforms their covariance to the identity, float32 (H, H).
    """

    layer: ClassVar[Layer] = "hidden"

    mean: Floats
    whitening: Floats

    @property
    def width(self) -> int:
        """Of the hidden layer."""
        return len(self.mean)

    def __call__(self, activations: Floats) -> Floats:
        """Distances, float32 (N,), from the hidden layer's activations, (N, H)."""
        # Not `@`: the BLAS threads would keep spinning and take a fifth of the CPU time from the network.
        white = np.einsum("nh,hk->nk", directions(activations) - self.mean, self.whitening)
        distances: Floats = np.sqrt((white * white).sum(1))
        return distances

    def as_file(self) -> bytes:
        """The file that `read` reads."""
        return safetensors.numpy.save({"mean": self.mean, "whitening": self.whitening})


def directions(activations: Floats) -> Floats:
    """Rows scaled to length 1; rows of zeros stay zero; float32 (N, H)."""
    lengths = np.linalg.norm(activations.astype(np.float32), axis=1, keepdims=True)
    scaled: Floats = (activations / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled


def read(folder: Path, manifest: Manifest) -> OutlierDetector:
    """Read the outlier detector of a model folder that has one.

    Raises:
        ModelError: the file does not fit the model.
    """
    assert manifest.neither is not None, "the caller has checked"
    try:
        tensors = safetensors.numpy.load_file(folder / NEITHER)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{folder / NEITHER} cannot be read ({error}): export the model again") from None
    shapes = {name: value.shape for name, value in tensors.items()}
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise ModelError(f"{folder / NEITHER} contains numbers that are not finite: export the model again")
    floats = {name: value.astype(np.float32) for name, value in tensors.items()}
    if manifest.neither.score == "learned":
        if set(shapes) != {"weight", "bias"} or len(shapes["weight"]) != 1 or shapes["bias"] != (1,):
            raise ModelError(f"{folder / NEITHER} is not a learned detector: export the model again")
        return LearnedDetector(**floats)
    width = manifest.head_hidden[0]
    if shapes != {"mean": (width,), "whitening": (width, width)}:
        raise ModelError(f"{folder / NEITHER} does not fit a head of {width} hidden units: export the model again")
    return MahalanobisDetector(**floats)


def check_width(folder: Path, detector: OutlierDetector, width: int) -> None:
    """Make sure that a detector fits a network whose layer has this width.

    Raises:
        ModelError: it does not.
    """
    if detector.width != width:
        raise ModelError(
            f"{folder / NEITHER} is for a layer of {detector.width} units, and the network's has {width}: "
            "export the model again"
        )
