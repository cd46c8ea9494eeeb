"""The distance of a photo from the training photos: if it is large, the photo probably shows none of the classes.

In: activations of the head's first hidden layer, (N, H). Out: distances, (N,). Only the direction of the activations
counts; the distance is Mahalanobis's, from the mean of the training photos (Lee et al. 2018, arXiv:1807.03888; one mean
is enough, Kamoi and Kobayashi 2020, arXiv:2003.00402). It imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from sorter.classifier.manifest import NEITHER, Manifest
from sorter.errors import ModelError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class OutlierDetector:
    """Measures distances, which have no unit.

    Attributes:
        mean: of the training photos' normalised activations, float32 (H,).
        whitening: transforms their covariance to the identity, float32 (H, H).
    """

    mean: Floats
    whitening: Floats

    def __call__(self, hidden: Floats) -> Floats:
        """Distances of photos, float32 (N,), from their hidden activations, (N, H)."""
        # Not `@`: the BLAS threads would keep spinning and take a fifth of the CPU time from the network.
        white = np.einsum("nh,hk->nk", directions(hidden) - self.mean, self.whitening)
        distances: Floats = np.sqrt((white * white).sum(1))
        return distances

    def as_file(self) -> bytes:
        """The file that `read` reads."""
        return safetensors.numpy.save({"mean": self.mean, "whitening": self.whitening})


def directions(hidden: Floats) -> Floats:
    """Rows scaled to length 1; rows of zeros stay zero; float32 (N, H)."""
    lengths = np.linalg.norm(hidden.astype(np.float32), axis=1, keepdims=True)
    scaled: Floats = (hidden / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled


def read(folder: Path, manifest: Manifest) -> OutlierDetector:
    """Read a model folder's outlier detector.

    Raises:
        ModelError: the file does not fit the model.
    """
    width = manifest.head_hidden[0]
    try:
        tensors = safetensors.numpy.load_file(folder / NEITHER)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{folder / NEITHER} cannot be read ({error}): export the model again") from None
    shapes = {name: value.shape for name, value in tensors.items()}
    if shapes != {"mean": (width,), "whitening": (width, width)}:
        raise ModelError(f"{folder / NEITHER} does not fit a head of {width} hidden units: export the model again")
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise ModelError(f"{folder / NEITHER} contains numbers that are not finite: export the model again")
    return OutlierDetector(tensors["mean"].astype(np.float32), tensors["whitening"].astype(np.float32))
