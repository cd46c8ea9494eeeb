"""Engines: uint8 pixels in, class probabilities out, whatever computes them.

`open_engine` chooses one: OpenVINO on a CPU, torch on a GPU. An engine keeps its weights resident for the life of the
process.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sorter.classifier import outliers as neither
from sorter.classifier.manifest import Manifest
from sorter.classifier.outliers import OutlierDetector
from sorter.errors import ConfigurationError, ModelError

# What the drivers of NVIDIA's and AMD's GPUs put there. Asking torch would take seconds.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

Floats = npt.NDArray[np.float32]


class Engine(Protocol):
    """Anything that classifies.

    Attributes:
        name: `openvino` or `torch`.
        device: where it computes, `cpu`, `cuda:0`, `mps`.
        precision: of the weights and activations, `int8`, `bf16`, `fp16`, `fp32`.
        concurrency: how many threads may be in `classify` at a time, for the most photos a second.
    """

    name: str
    device: str
    precision: str
    concurrency: int

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Classify a batch.

        Args:
            pixels: uint8 (N, S, S, 3), RGB.

        Returns:
            float32 (N, C), probabilities that add up to 1, in the order of the manifest's classes.
        """
        ...

    def classify_with_distance(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Classify a batch, and say how far each photo is from what the model was fitted on.

        Only of an engine that was opened with `catch_neither`.

        Args:
            pixels: uint8 (N, S, S, 3), RGB.

        Returns:
            As `classify`, and distances as `sorter.neither` has them, float32 (N,).
        """
        ...


def open_engine(
    folder: Path,
    manifest: Manifest,
    engine: str,
    device: str,
    batch_size: int,
    min_confidence: float = 0.0,
    *,
    catch_neither: bool = False,
) -> Engine:
    """Load a model's weights onto a device and let it answer once.

    Args:
        folder: the model folder.
        manifest: what `manifest.read` made of it.
        engine: `auto`, `openvino` or `torch`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        batch_size: the largest batch that will be asked for.
        min_confidence: what is less sure will not be sorted.
        catch_neither: be able to `classify_with_distance`; the manifest says what is neither.

    Raises:
        ModelError: the weights cannot be used, or their answers are no probabilities.
        ConfigurationError: there is no such device, or the engine does not run there.
    """
    distance = neither.read(folder, manifest) if catch_neither else None
    opened = _open(folder, manifest, engine, device, batch_size, min_confidence, distance)
    grey = np.full((1, manifest.input.size, manifest.input.size, 3), 128, np.uint8)
    try:
        answer = opened.classify(grey)
    except RuntimeError as error:  # a picture too small for the architecture, a device without memory
        said = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise ModelError(
            f"the model in {folder} cannot answer on {opened.device} ({said}): use another --device, or export it again"
        ) from None
    if answer.shape != (1, len(manifest.classes)) or not np.isfinite(answer).all():
        raise ModelError(f"the model in {folder} answers with something else than probabilities: export it again")
    return opened


def unused_gpu() -> str | None:
    """A sentence for a machine whose GPU is idle because PyTorch is missing; None elsewhere."""
    if _has_torch() or not _may_have_gpu():
        return None
    return "this machine may have a GPU that sorter can use with PyTorch: pip install '.[gpu]'"


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _may_have_gpu() -> bool:
    return sys.platform == "darwin" or any(map(os.path.exists, _GPU_DEVICES))


def _open(
    folder: Path,
    manifest: Manifest,
    engine: str,
    device: str,
    batch_size: int,
    min_confidence: float,
    distance: OutlierDetector | None,
) -> Engine:
    # Each is imported only where it runs: a sort with OpenVINO does without the seconds that importing torch takes.
    if engine == "openvino" and device not in ("auto", "cpu"):
        raise ConfigurationError(f"--engine openvino runs on the processor: leave out --device {device}")
    on_cpu = device == "cpu" or (device == "auto" and not _may_have_gpu())
    from sorter.classifier import openvino_engine

    has_network = openvino_engine.network_files(manifest) is not None
    if engine == "openvino" and not has_network:
        raise ConfigurationError(
            f"the model in {folder} has no network for OpenVINO: make one with trainer export, or use --engine torch"
        )
    without_torch = device == "auto" and not _has_torch()
    if engine == "openvino" or (engine == "auto" and has_network and (on_cpu or without_torch)):
        return openvino_engine.OpenVinoEngine(folder, manifest, min_confidence, distance)
    if not _has_torch():
        wanted = f"--device {device}" if engine == "auto" and has_network else "--engine torch"
        if not has_network:
            wanted = f"the model in {folder}, which has no network for OpenVINO,"
        raise ConfigurationError(f"{wanted} needs PyTorch: install sorter with it, pip install '.[gpu]'")
    from sorter.classifier.torch_engine import TorchEngine, choose_device

    chosen = choose_device(device)
    if engine == "auto" and chosen.type == "cpu" and has_network:  # a driver, but no GPU that torch can use
        return openvino_engine.OpenVinoEngine(folder, manifest, min_confidence, distance)
    return TorchEngine(folder, manifest, chosen, batch_size, distance)
