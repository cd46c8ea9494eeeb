"""PyTorch on a GPU or a CPU: weights loaded once, half precision where the device has it, channels-last.

On CUDA two batches are under way: one computes while the next is copied, from memory that the GPU reads by itself. On a
CPU the same code runs, only that nothing has to be copied.
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

from sorter.classifier import network
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
        device: as `choose_device` gives it.
        batch_size: the largest batch that is computed at a time.
        distance: for `classify_with_distance`.

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
        distance: OutlierDetector | None = None,
    ) -> None:
        self._device, dtype = device, _choose_precision(device)
        self.device, self.precision = str(device), _PRECISIONS[dtype]
        self._on_cuda = device.type == "cuda"
        self.concurrency = 2 if self._on_cuda else 1
        if device.type == "cpu":
            torch.set_num_threads(available_cpus())
        # Few shapes: cuDNN tries its algorithms once for each, and memory for each is reserved once.
        torch.backends.cudnn.benchmark = True
        self._shapes = shapes(batch_size)
        self._most = batch_size
        loaded = network.load(folder, manifest)
        self._distance, self._classes = distance, len(manifest.classes)
        width = self._classes
        if distance is not None:
            place = network.head_layers_name(manifest.architecture)
            network.replace(loaded, place, network.WithHidden(loaded.get_submodule(place)))
            width += len(distance.mean)
        folded = network.fold_batch_norm(loaded)
        resident = folded.to(device, dtype).to(memory_format=torch.channels_last)
        self._classifier = network.Classifier(resident, manifest.input.mean, manifest.input.std).to(device)
        self._temperature = manifest.temperature
        self._launching = threading.Lock()
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        with self._current():
            self._stream = torch.cuda.Stream() if self._on_cuda else None
            for _ in range(self.concurrency):
                self._slots.put(_Slot(batch_size, manifest.input.size, width, device))

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `Engine.classify`."""
        return self._all(pixels)[:, : self._classes]

    def classify_with_distance(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """See `Engine.classify_with_distance`."""
        assert self._distance is not None, "opened with catch_neither"
        answers = self._all(pixels)
        return answers[:, : self._classes], self._distance(answers[:, self._classes :])

    def _all(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Answers to any number of photos; a batch that the device has no memory for is halved, from then on."""
        answers = []
        start = 0
        while start < len(pixels):
            some = pixels[start : start + self._most]
            if (answer := self._classified(some)) is None:
                self._take_less(len(some))
                continue
            answers.append(answer)
            start += len(some)
        return np.concatenate(answers)

    def _classified(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32] | None:
        """Classify at most a batch; None if there is no memory for it."""
        slot = self._slots.get()
        count = len(pixels)
        shape = next(shape for shape in self._shapes if shape >= count)
        try:
            with self._current(), torch.inference_mode():
                batch = slot.copied_in(pixels, shape)
                # Whole batches, one after the other: kernels of two that alternate would finish both late.
                with self._launching, self._computing(slot):
                    found = self._classifier(batch)  # (shape, C) or (shape, C + H)
                    answers = (found[:, : self._classes] / self._temperature).softmax(1)
                    if self._distance is not None:
                        answers = torch.cat([answers, found[:, self._classes :]], 1)
                    slot.copy_out(answers)
                return slot.answers(count)
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            with self._current():
                slot.wait()  # what was begun may still read the slot
            return None
        finally:
            self._slots.put(slot)

    def _take_less(self, count: int) -> None:
        # Another thread may have halved it already.
        if (half := count // 2) < self._most:
            self._most = half
            log.warning("engine.smaller_batches", batch_size=half)
        if self._on_cuda:
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make ours the CUDA device of this thread, which begins with the first."""
        with torch.cuda.device(self._device) if self._on_cuda else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _computing(self, slot: "_Slot") -> Iterator[None]:
        """Compute on the stream that all batches share, after this one has been copied."""
        if self._stream is None or slot.stream is None:
            yield
            return
        self._stream.wait_stream(slot.stream)
        with torch.cuda.stream(self._stream):
            yield


class _Slot:
    """The memory of one batch that is under way, on both sides; reused, and used by one thread at a time.

    Nothing in it is written before `wait` or `answers` has seen the end of what read it.
    """

    def __init__(self, batch_size: int, side: int, width: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        # Pinned: only such memory is copied while the processor goes on.
        self._pixels = torch.zeros((batch_size, side, side, 3), dtype=torch.uint8, pin_memory=on_cuda)
        self._answers = torch.zeros((batch_size, width), pin_memory=on_cuda)
        self._resident = torch.empty_like(self._pixels, device=device) if device.type != "cpu" else self._pixels
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self._done = torch.cuda.Event() if on_cuda else None

    def copied_in(self, pixels: npt.NDArray[np.uint8], shape: int) -> torch.Tensor:
        """Begin to copy a batch to the device; uint8 (shape, S, S, 3), with anything behind the pixels."""
        self._pixels.numpy()[: len(pixels)] = pixels
        if self._resident is not self._pixels:
            with torch.cuda.stream(self.stream):
                self._resident[:shape].copy_(self._pixels[:shape], non_blocking=self.stream is not None)
        return self._resident[:shape]

    def copy_out(self, answers: torch.Tensor) -> None:
        """Begin to copy the answers back, on the stream that computes them."""
        self._answers[: len(answers)].copy_(answers, non_blocking=self._done is not None)
        if self._done is not None:
            self._done.record()

    def answers(self, count: int) -> npt.NDArray[np.float32]:
        """Wait for the answers; float32 (count, width)."""
        if self._done is not None:
            self._done.synchronize()
        found: npt.NDArray[np.float32] = self._answers[:count].numpy().copy()
        return found

    def wait(self) -> None:
        """Wait for whatever the device still does."""
        if self.stream is not None:
            torch.cuda.synchronize()


def shapes(batch_size: int) -> list[int]:
    """The batches that are computed: powers of two, and the largest; others are filled up."""
    return [*(1 << n for n in range((batch_size - 1).bit_length())), batch_size]


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
