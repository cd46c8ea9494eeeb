"""Engines: uint8 pixels in, class probabilities out.

`open_engine` chooses one: OpenVINO on a CPU, PyTorch on a GPU where it is installed. An engine keeps its weights
resident for the life of the process.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sorter.classifier import outliers
from sorter.classifier.manifest import EngineName, Manifest
from sorter.classifier.outliers import OutlierDetector
from sorter.errors import ConfigurationError, ModelError

GPU_DEVICE_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What the drivers of NVIDIA and AMD GPUs, and of GPUs under WSL, create. Asking PyTorch would take seconds."""

Floats = npt.NDArray[np.float32]


class Engine(Protocol):
    """Classifies batches of pixels.

    Attributes:
        name: `openvino` or `torch`.
        device: `cpu`, `cuda:0` or `mps`.
        precision: of the weights and activations: `int8`, `bf16`, `fp16` or `fp32`.
        concurrency: how many threads should call `classify` at the same time for the best throughput.
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
            float32 (N, C), probabilities that sum to 1, in the order of the manifest's classes.
        """
        ...

    def classify_with_distance(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Classify a batch, and measure how far each photo is from the training photos.

        Only for an engine that was opened with `catch_neither`.

        Args:
            pixels: uint8 (N, S, S, 3), RGB.

        Returns:
            The probabilities, as from `classify`, and the distances of `outliers.OutlierDetector`, float32 (N,).
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
    """Load a model's weights onto a device and have it answer once.

    Args:
        folder: the model folder.
        manifest: the folder's manifest, from `manifest.read`.
        engine: `auto`, `openvino` or `torch`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        batch_size: the largest batch that will be classified.
        min_confidence: photos below it will not be sorted.
        catch_neither: also load the outlier detector, for `classify_with_distance`.

    Raises:
        ModelError: the weights cannot be used, or the answers are not probabilities.
        ConfigurationError: the device does not exist, or the engine cannot run on it or is not installed.
    """
    detector = outliers.read(folder, manifest) if catch_neither else None
    opened = _open(folder, manifest, engine, device, batch_size, min_confidence, detector)
    grey = np.full((1, manifest.input.size, manifest.input.size, 3), 128, np.uint8)
    try:
        answer = opened.classify(grey)
    except RuntimeError as error:  # an input too small for the architecture, a device out of memory
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise ModelError(
            f"the model in {folder} cannot run on {opened.device} ({reason}): use another --device, or export it again"
        ) from None
    if answer.shape != (1, len(manifest.classes)) or not np.isfinite(answer).all():
        raise ModelError(f"the model in {folder} does not answer with probabilities: export it again")
    return opened


def unused_gpu() -> str | None:
    """A hint for a machine whose GPU stays idle because PyTorch is not installed; None on any other machine."""
    if _has_torch() or not _may_have_gpu():
        return None
    return "this machine seems to have a GPU, which sorter uses only with PyTorch: pip install 'catdog-sorter[gpu]'"


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _may_have_gpu() -> bool:
    return sys.platform == "darwin" or any(map(os.path.exists, GPU_DEVICE_NODES))


def choose(folder: Path, manifest: Manifest, engine: str, device: str) -> EngineName:
    """Which engine runs a model with these settings.

    Raises:
        ConfigurationError: the device does not exist, or the engine cannot run on it or is not installed.
    """
    from sorter.classifier import openvino_engine

    has_network = openvino_engine.network_files(manifest) is not None
    if engine == "openvino" and device not in ("auto", "cpu"):
        raise ConfigurationError(f"--engine openvino runs on the CPU only: drop --device {device}")
    if engine == "openvino" and not has_network:
        raise ConfigurationError(
            f"the model in {folder} has no OpenVINO network: make one with trainer export, or use --engine torch"
        )
    if has_network and _prefers_openvino(engine, device):
        return "openvino"
    if not _has_torch():
        raise ConfigurationError(_torch_is_missing(folder, engine, device, has_network=has_network))
    from sorter.classifier.torch_engine import choose_device

    # Without a GPU that PyTorch can use, whatever the drivers say, OpenVINO is faster.
    on_cpu = choose_device(device).type == "cpu"
    return "openvino" if has_network and engine == "auto" and on_cpu else "torch"


def _open(
    folder: Path,
    manifest: Manifest,
    engine: str,
    device: str,
    batch_size: int,
    min_confidence: float,
    detector: OutlierDetector | None,
) -> Engine:
    # Each engine is imported only where it runs: importing torch takes seconds, and it may not be installed.
    if choose(folder, manifest, engine, device) == "openvino":
        from sorter.classifier import openvino_engine

        return openvino_engine.OpenVinoEngine(folder, manifest, min_confidence, detector)
    from sorter.classifier.torch_engine import TorchEngine, choose_device

    return TorchEngine(folder, manifest, choose_device(device), batch_size, detector)


def _prefers_openvino(engine: str, device: str) -> bool:
    """Whether a model that has an OpenVINO network runs on it."""
    if engine != "auto":
        return engine == "openvino"
    return device == "cpu" or (device == "auto" and not (_may_have_gpu() and _has_torch()))


def _torch_is_missing(folder: Path, engine: str, device: str, *, has_network: bool) -> str:
    install = "pip install 'catdog-sorter[gpu]'"
    if not has_network:
        return (
            f"the model in {folder} has no OpenVINO network, and PyTorch is not installed to run it: {install}, or "
            "use a model that has one"
        )
    flags = {"--engine torch": engine == "torch", f"--device {device}": device not in ("auto", "cpu")}
    wanted = " ".join(flag for flag, given in flags.items() if given)
    return f"{wanted} needs PyTorch, which is not installed: {install}, or drop {wanted} to run on the CPU"
