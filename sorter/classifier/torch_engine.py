"""PyTorch on a GPU or a CPU: weights loaded once, half precision where the device has it, channels-last.

On CUDA two batches are in flight: one is computed while the next is copied from pinned memory. On a CPU the same code
runs without the copies.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
import torch

from sorter.classifier import network, outliers
from sorter.classifier.manifest import Manifest
from sorter.classifier.outliers import OutlierDetector
from sorter.errors import ConfigurationError
from sorter.processors import available_cpus

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

log = structlog.get_logger()


class TorchEngine:
    """The network on one device, with normalisation and temperature in the computation.

    Args:
        folder: the model folder.
        manifest: its manifest.
        device: from `choose_device`.
        batch_size: the largest batch that is computed at once.
        detector: for `classify_with_distance`.

    Raises:
        ModelError: the weights cannot be used.
    """

    name = "torch"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: torch.device,
        batch_size: int,
        detector: OutlierDetector | None = None,
    ) -> None:
        self._device, dtype = device, _choose_precision(device)
        self.device, self.precision, self.unused_gpu = str(device), _PRECISIONS[dtype], ""
        self._on_cuda = device.type == "cuda"
        self.concurrency = 2 if self._on_cuda else 1
        if device.type == "cpu":
            torch.set_num_threads(available_cpus())
        # Worth it with few batch shapes: cuDNN tries its algorithms once for each.
        torch.backends.cudnn.benchmark = True
        self._shapes = shapes(batch_size)
        self._max_batch = batch_size
        loaded = network.load(folder, manifest)
        self._detector, self._classes = detector, len(manifest.classes)
        width = self._classes
        if detector is not None:
            head = network.head_layers_name(manifest.architecture)
            outliers.check_width(folder, detector, network.layer_width(loaded.get_submodule(head), detector.layer))
            network.replace(loaded, head, network.WithLayer(loaded.get_submodule(head), detector.layer))
            width += detector.width
        folded = network.fold_batch_norm(loaded)
        resident = folded.to(device, dtype).to(memory_format=torch.channels_last)
        self._classifier = network.Classifier(resident, manifest.input.mean, manifest.input.std).to(device)
        self._temperature = manifest.temperature_of("torch")
        self._farthest = manifest.neither.threshold if manifest.neither is not None else 0.0
        self._launching = threading.Lock()
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        with self._on_device():
            self._stream = torch.cuda.Stream() if self._on_cuda else None
            for _ in range(self.concurrency):
                self._slots.put(_Slot(batch_size, manifest.input.size, width, device))

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Classify any number of photos, batch by batch."""
        return self._outputs(pixels)[:, : self._classes]

    def classify_with_distance(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Classify any number of photos, and measure their distances."""
        assert self._detector is not None, "opened with catch_neither"
        outputs = self._outputs(pixels)
        return outputs[:, : self._classes], self._detector(outputs[:, self._classes :]) - np.float32(self._farthest)

    def close(self) -> None:
        """Give back memory. No thread uses the engine any more."""
        del self._classifier, self._slots
        if self._on_cuda:
            with self._on_device():
                torch.cuda.empty_cache()

    def _outputs(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities, (N, C), or with a detector (N, C + W). Batches that exhaust memory are halved for good."""
        outputs = []
        start = 0
        while start < len(pixels):
            batch = pixels[start : start + self._max_batch]
            if (output := self._computed(batch)) is None:
                self._halve_batches(len(batch))
                continue
            outputs.append(output)
            start += len(batch)
        return np.concatenate(outputs)

    def _computed(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32] | None:
        """Compute at most one batch; None if there is not enough memory for it."""
        slot = self._slots.get()
        count = len(pixels)
        shape = next(shape for shape in self._shapes if shape >= count)
        try:
            with self._on_device(), torch.inference_mode():
                batch = slot.copied_in(pixels, shape)
                # One batch after another: if the kernels of two alternated, both would finish late.
                with self._launching, self._computing(slot):
                    logits = self._classifier(batch)  # (shape, C), followed by the detector's layer if there is one
                    outputs = (logits[:, : self._classes] / self._temperature).softmax(1)
                    if self._detector is not None:
                        outputs = torch.cat([outputs, logits[:, self._classes :]], 1)
                    slot.copy_out(outputs)
                return slot.outputs(count)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            with self._on_device():
                slot.wait()  # kernels already launched may still read the slot
            return None
        finally:
            self._slots.put(slot)

    def _halve_batches(self, count: int) -> None:
        if (half := count // 2) < self._max_batch:  # unless another thread has done it
            self._max_batch = half
            log.warning("engine.smaller_batches", batch_size=half)
        if self._on_cuda:
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Make the engine's CUDA device that of this thread, whose default is the first GPU."""
        with torch.cuda.device(self._device) if self._on_cuda else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _computing(self, slot: "_Slot") -> Iterator[None]:
        """Compute on the stream that all batches share, once this batch has been copied."""
        if self._stream is None or slot.stream is None:
            yield
            return
        self._stream.wait_stream(slot.stream)
        with torch.cuda.stream(self._stream):
            yield


class _Slot:
    """Buffers for one batch in flight, on the CPU and on the device; reused, by one thread at a time.

    Nothing is written to a buffer before `wait` or `outputs` has waited for whatever read it.
    """

    def __init__(self, batch_size: int, side: int, width: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        # Only pinned memory can be copied asynchronously.
        self._pixels = torch.zeros((batch_size, side, side, 3), dtype=torch.uint8, pin_memory=on_cuda)
        self._outputs = torch.zeros((batch_size, width), pin_memory=on_cuda)
        self._resident = torch.empty_like(self._pixels, device=device) if device.type != "cpu" else self._pixels
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self._done = torch.cuda.Event() if on_cuda else None

    def copied_in(self, pixels: npt.NDArray[np.uint8], shape: int) -> torch.Tensor:
        """Start copying a batch to the device; uint8 (shape, S, S, 3), padded with arbitrary pixels."""
        self._pixels.numpy()[: len(pixels)] = pixels
        if self._resident is not self._pixels:
            # torch.cuda.stream(None) asks for an accelerator's current device, which torch.mps has no notion of.
            with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
                self._resident[:shape].copy_(self._pixels[:shape], non_blocking=self.stream is not None)
        return self._resident[:shape]

    def copy_out(self, outputs: torch.Tensor) -> None:
        """Start copying the outputs back, on the stream that computes them."""
        self._outputs[: len(outputs)].copy_(outputs, non_blocking=self._done is not None)
        if self._done is not None:
            self._done.record()

    def outputs(self, count: int) -> npt.NDArray[np.float32]:
        """Wait for the outputs; float32 (count, width)."""
        if self._done is not None:
            self._done.synchronize()
        outputs: npt.NDArray[np.float32] = self._outputs[:count].numpy().copy()
        return outputs

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.stream is not None:
            torch.cuda.synchronize()


def shapes(batch_size: int) -> list[int]:
    """The batch shapes that are computed: powers of two, and the largest. Other batches are padded."""
    return [*(1 << n for n in range((batch_size - 1).bit_length())), batch_size]


def choose_device(name: str) -> torch.device:
    """Turn the setting `--device` into a device that exists.

    Raises:
        ConfigurationError: this machine has no such device.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"--device {name}: PyTorch does not know this device; use --device auto") from None
    # Parsed from the name: torch keeps the index in 8 bits, and 256 becomes 0.
    if device.type == "cuda" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices on this machine; use "
            "--device cpu, or install the NVIDIA driver and a CUDA build of PyTorch"
        )
    if device.type == "mps" and not has_mps:
        raise ConfigurationError("--device mps: PyTorch finds no Apple GPU on this machine; use --device cpu")
    return device


def _choose_precision(device: torch.device) -> torch.dtype:
    if device.type in ("cuda", "mps"):
        return torch.float16
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively; emulated bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return torch.backends.mkldnn.is_available() and ("avx512_bf16" in flags or "amx_bf16" in flags)
