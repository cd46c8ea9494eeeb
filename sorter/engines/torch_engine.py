"""PyTorch on a GPU or a CPU: weights loaded once, half precision where the device has it, channels-last."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sorter import network
from sorter.errors import ConfigurationError
from sorter.manifest import Manifest

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class TorchEngine:
    """The network on one device, with normalisation and temperature in the computation.

    Args:
        folder: the model folder.
        manifest: its manifest.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        ConfigurationError: there is no such device.
        ModelError: the weights cannot be used.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: str) -> None:
        self._device = choose_device(device)
        self._dtype = _choose_precision(self._device)
        self.device, self.precision = str(self._device), _PRECISIONS[self._dtype]
        if self._device.type == "cpu":
            torch.set_num_threads(available_cpus())
        folded = network.fold_batch_norm(network.load(folder, manifest))
        resident = folded.to(self._device, self._dtype).to(memory_format=torch.channels_last)
        self._classifier = network.Classifier(resident, manifest.input.mean, manifest.input.std).to(self._device)
        self._temperature = manifest.temperature

    @torch.inference_mode()
    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `Engine.classify`."""
        batch = torch.from_numpy(pixels)  # (N, S, S, 3)
        if self._device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self._device, non_blocking=True)
        logits = self._classifier(batch)  # (N, C)
        probabilities: npt.NDArray[np.float32] = (logits / self._temperature).softmax(1).cpu().numpy()
        return probabilities


def available_cpus() -> int:
    """How many processors this process may use, which in a container is fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str) -> torch.device:
    """Turn a setting into a device that exists.

    Raises:
        ConfigurationError: there is no such device here.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"--device {name}: PyTorch knows no such device; use --device auto") from None
    # The number from the name: torch keeps its index in 8 bits, and 256 becomes 0.
    if device.type == "cuda" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; use --device cpu, or "
            "install the NVIDIA driver and a CUDA build of PyTorch"
        )
    if device.type == "mps" and not has_mps:
        raise ConfigurationError("--device mps: PyTorch finds no Apple GPU here; use --device cpu")
    return device


def _choose_precision(device: torch.device) -> torch.dtype:
    if device.type in ("cuda", "mps"):
        return torch.float16
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; emulated bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return torch.backends.mkldnn.is_available() and ("avx512_bf16" in flags or "amx_bf16" in flags)
