"""How far a photo is from everything that a model was fitted on: what is far enough shows none of its classes.

In: what the head's first hidden layer makes of photos, (N, H). Out: distances, (N,). The layer's direction counts and
not its length; the distance is Mahalanobis's, from the mean of the training photos (Lee et al. 2018, arXiv:1807.03888;
one mean is enough, Kamoi and Kobayashi 2020, arXiv:2003.00402). It imports no torch.
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
    """Measures distances; none has a unit.

    Attributes:
        mean: of the training photos' directions, float32 (H,).
        whitening: makes their spread the same in each direction, float32 (H, H).
    """

    mean: Floats
    whitening: Floats

    def __call__(self, hidden: Floats) -> Floats:
        """Distances of photos, float32 (N,), from what the hidden layer makes of them, (N, H)."""
        # No matrix product: its library's threads would go on turning, and take a fifth of the cores from the network.
        white = np.einsum("nh,hk->nk", directions(hidden) - self.mean, self.whitening)
        distances: Floats = np.sqrt((white * white).sum(1))
        return distances

    def as_file(self) -> bytes:
        """What `read` reads."""
        return safetensors.numpy.save({"mean": self.mean, "whitening": self.whitening})


def directions(hidden: Floats) -> Floats:
    """Rows of length 1, or 0 where nothing stirs; float32 (N, H)."""
    lengths = np.linalg.norm(hidden.astype(np.float32), axis=1, keepdims=True)
    found: Floats = (hidden / np.maximum(lengths, 1e-12)).astype(np.float32)
    return found


def read(folder: Path, manifest: Manifest) -> OutlierDetector:
    """Read a model folder's distance.

    Raises:
        ModelError: the file does not fit the model.
    """
    wide = manifest.head_hidden[0]
    try:
        tensors = safetensors.numpy.load_file(folder / NEITHER)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{folder / NEITHER} cannot be read ({error}): export the model again") from None
    shapes = {name: value.shape for name, value in tensors.items()}
    if shapes != {"mean": (wide,), "whitening": (wide, wide)}:
        raise ModelError(f"{folder / NEITHER} does not fit a head of {wide} hidden units: export the model again")
    if not all(np.isfinite(value).all() for value in tensors.values()):
        raise ModelError(f"{folder / NEITHER} has more than finite numbers: export the model again")
    return OutlierDetector(tensors["mean"].astype(np.float32), tensors["whitening"].astype(np.float32))
