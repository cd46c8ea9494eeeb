"""Engines: uint8 pixels in, class probabilities out.

`open_engine` chooses one: OpenVINO on a CPU, PyTorch on a GPU where it is installed. An engine keeps its weights
resident for the life of the process.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sorter import extras
from sorter.classifier import outliers
from sorter.classifier.manifest import EngineName, Manifest
from sorter.classifier.outliers import OutlierDetector
from sorter.errors import ConfigurationError, ModelError, NotNowError, SorterError

NVIDIA_FILES = ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
"""What NVIDIA's driver creates on Linux, and under WSL. `config/environment` looks for the same files."""
GPU_FILES = (*NVIDIA_FILES, "/dev/kfd")
"""And what AMD's driver creates. Asking PyTorch instead would take seconds."""

_TAKEN = ("out of memory", "busy or unavailable")
"""What PyTorch's error says where another program has the GPU or its memory."""


class Engine(Protocol):
    """Classifies batches of pixels.

    Attributes:
        name: `openvino` or `torch`.
        device: `cpu`, `cuda:0` or `mps`.
        precision: of the weights and activations: `int8`, `bf16`, `fp16` or `fp32`.
        concurrency: how many threads should call `classify` at the same time for the best throughput.
        unused_gpu: why it does not run on this machine's GPU; empty if it does, was not to, or there is none.
    """

    name: str
    device: str
    precision: str
    concurrency: int
    unused_gpu: str

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
        """Classify a batch, and measure how far each photo is from those of the classes.

        Only for an engine that was opened with `catch_neither`.

        Args:
            pixels: uint8 (N, S, S, 3), RGB.

        Returns:
            The probabilities, as from `classify`; and by how much each photo's distance exceeds the threshold,
            float32 (N,): above 0 it probably shows none of the classes.
        """
        ...

    def close(self) -> None:
        """Give back memory and threads. No thread uses the engine any more."""
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

    A GPU that was not asked for by name, and that cannot be used, is left alone: the model then runs on the CPU.

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
        NotNowError: the device is there, and its memory is taken.
        ConfigurationError: the device does not exist, or the engine cannot run on it or is not installed.
    """
    detector = outliers.read(folder, manifest) if catch_neither else None

    def opened_on(name: str) -> Engine:
        return _answering(folder, manifest, _open(folder, manifest, engine, name, batch_size, min_confidence, detector))

    try:
        opened = opened_on(device)
    except _DeviceError as error:
        if device != "auto" or error.device == "cpu":
            raise error.named(folder) from None
        opened = _on_cpu(opened_on, folder)
        opened.unused_gpu = f"{error.device} cannot be used ({error}): check its driver, or use --device cpu"
    else:
        if engine == device == "auto":
            opened.unused_gpu = _missing_torch()
    return opened


class _DeviceError(Exception):
    """A model cannot run on a device; the message is the library's."""

    def __init__(self, device: str, error: Exception) -> None:
        super().__init__((str(error).strip().splitlines() or [type(error).__name__])[0][:200])
        self.device = device

    def named(self, folder: Path) -> SorterError:
        """The same as a sentence for the user."""
        if any(words in str(self).lower() for words in _TAKEN):
            return NotNowError(
                f"{self.device} has no room for the model ({self}): stop what else uses it, or use --device cpu"
            )
        return ModelError(
            f"the model in {folder} cannot run on {self.device} ({self}): use another --device, or export it again"
        )


def _on_cpu(opened_on: Callable[[str], Engine], folder: Path) -> Engine:
    try:
        return opened_on("cpu")
    except _DeviceError as error:
        raise error.named(folder) from None


def _answering(folder: Path, manifest: Manifest, opened: Engine) -> Engine:
    """An engine that has answered once.

    Raises:
        _DeviceError: it cannot, or not with numbers.
        ModelError: it has another number of classes.
    """
    grey = np.full((1, manifest.input.size, manifest.input.size, 3), 128, np.uint8)
    try:
        answer = opened.classify(grey)
    except Exception as error:  # an input too small for the architecture, a device out of memory, a broken driver
        raise _DeviceError(opened.device, error) from None
    problem = f"the model in {folder} does not answer with probabilities: export it again"
    if answer.shape != (1, len(manifest.classes)):
        raise ModelError(problem)
    if not np.isfinite(answer).all():
        if opened.device == "cpu":
            raise ModelError(problem)
        raise _DeviceError(opened.device, ArithmeticError("its answers are not numbers"))
    return opened


def _missing_torch() -> str:
    """A hint for a machine whose GPU stays idle because PyTorch is not installed; empty on any other machine."""
    if _has_torch() or not _may_have_gpu():
        return ""
    return "this machine seems to have a GPU; " + extras.hint("using it", "gpu")


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _may_have_gpu() -> bool:
    return sys.platform == "darwin" or any(map(os.path.exists, GPU_FILES))


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

    chosen = choose_device(device)
    try:
        return TorchEngine(folder, manifest, chosen, batch_size, detector)
    except SorterError:
        raise
    except Exception as error:  # whatever a driver may fail with
        raise _DeviceError(str(chosen), error) from None


def _prefers_openvino(engine: str, device: str) -> bool:
    """Whether a model that has an OpenVINO network runs on it."""
    if engine != "auto":
        return engine == "openvino"
    return device == "cpu" or (device == "auto" and not (_may_have_gpu() and _has_torch()))


def _torch_is_missing(folder: Path, engine: str, device: str, *, has_network: bool) -> str:
    if not has_network:
        without = extras.hint(f"the model in {folder} has no OpenVINO network and", "gpu")
        return f"{without}, or use a model that has one"
    flags = {"--engine torch": engine == "torch", f"--device {device}": device not in ("auto", "cpu")}
    wanted = " ".join(flag for flag, given in flags.items() if given)
    return f"{extras.hint(wanted, 'gpu')}, or drop {wanted} to run on the CPU"
