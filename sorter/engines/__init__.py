"""Engines: uint8 pixels in, class probabilities out, whatever computes them.

`open_engine` chooses one for a device. An engine keeps its weights resident for the life of the process.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sorter.errors import ModelError
from sorter.manifest import Manifest


class Engine(Protocol):
    """Anything that classifies.

    Attributes:
        device: where it computes, `cpu`, `cuda:0`, `mps`.
        precision: of the weights and activations, `fp32`, `bf16`, `fp16`.
    """

    device: str
    precision: str

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Classify a batch.

        Args:
            pixels: uint8 (N, S, S, 3), RGB, N at most the batch size.

        Returns:
            float32 (N, C), probabilities that add up to 1, in the order of the manifest's classes.
        """
        ...


def open_engine(folder: Path, manifest: Manifest, device: str) -> Engine:
    """Load a model's weights onto a device and let it answer once.

    Args:
        folder: the model folder.
        manifest: what `manifest.read` made of it.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        ModelError: the weights cannot be used, or their answers are no probabilities.
        ConfigurationError: there is no such device.
    """
    from sorter.engines.torch_engine import TorchEngine  # seconds to import: only when there is something to classify

    engine = TorchEngine(folder, manifest, device)
    grey = np.full((1, manifest.input.size, manifest.input.size, 3), 128, np.uint8)
    try:
        answer = engine.classify(grey)
    except RuntimeError as error:  # a picture too small for the architecture, a device without memory
        said = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise ModelError(
            f"the model in {folder} cannot answer on {engine.device} ({said}): use another --device, or export it again"
        ) from None
    if answer.shape != (1, len(manifest.classes)) or not np.isfinite(answer).all():
        raise ModelError(f"the model in {folder} answers with something else than probabilities: export it again")
    return engine
