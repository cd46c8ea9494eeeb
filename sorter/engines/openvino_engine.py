"""OpenVINO on a CPU: 8-bit weights where the model has them and they passed their gate, and no torch.

A batch is cut into pieces, and each piece runs on one core: cores that need not wait for each other lose nothing when a
decoder takes one of them away for a moment.
"""

import hashlib
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from sorter import compiled_cache
from sorter.errors import ModelError
from sorter.manifest import OPENVINO_FP16, OPENVINO_INT8, Manifest
from sorter.processors import available_cpus

# Photos a piece. From 2 on it makes no difference that can be measured, and small ones share out a small batch best.
_PIECE = 4


def network_files(manifest: Manifest) -> tuple[str, str] | None:
    """The files that OpenVINO runs of a model folder, its network and its weights; None if it has none."""
    return next((files for files in (OPENVINO_INT8, OPENVINO_FP16) if set(files) <= set(manifest.files)), None)


class OpenVinoEngine:
    """The network on the processor, with normalisation in its graph.

    Args:
        folder: the model folder.
        manifest: its manifest, which names a network for OpenVINO.

    Raises:
        ModelError: the network cannot be used.
    """

    name = "openvino"
    device = "cpu"
    # One batch's last pieces and the next one's first share the cores.
    concurrency = 2

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        files = network_files(manifest)
        assert files is not None, "the caller has looked"
        path = folder / files[0]
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = "int8" if files == OPENVINO_INT8 else "bf16" if has_bf16 else "fp32"
        streams = available_cpus()
        settings = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams,
            # Decoders and other programs need cores too: a thread that may not move waits for them.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if has_bf16 else "f32",
        }
        try:
            compiled = _compiled(core, path, [manifest.files[name] for name in files], manifest.input.size, settings)
        except RuntimeError as error:
            said = (str(error).strip().splitlines() or ["no reason given"])[-1][:200]
            raise ModelError(f"{path} cannot be used ({said}): export the model again") from None
        self._temperature = manifest.temperature
        self._idle: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(streams):
            self._idle.put(compiled.create_infer_request())
        # Threads that wait for a request each, and no `AsyncInferQueue`: its callbacks run Python in OpenVINO's own
        # threads, and a network that is taken down while one of them still wants the interpreter hangs.
        self._pool = ThreadPoolExecutor(streams, thread_name_prefix="openvino")

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `Engine.classify`."""
        pieces = [pixels[start : start + _PIECE] for start in range(0, len(pixels), _PIECE)]
        logits = np.concatenate(list(self._pool.map(self._answer, pieces))) / self._temperature  # (N, C)
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities: npt.NDArray[np.float32] = exponentials / exponentials.sum(1, keepdims=True)
        return probabilities

    def _answer(self, piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        request = self._idle.get()
        try:
            logits: npt.NDArray[np.float32] = request.infer([piece], share_inputs=True)[0].astype(np.float32)
            return logits
        finally:
            self._idle.put(request)


def _compiled(
    core: openvino.Core, path: Path, digests: list[str], side: int, settings: dict[str, Any]
) -> openvino.CompiledModel:
    """Compile a network for this processor, or take it from the cache."""
    processor = core.get_property("CPU", "FULL_DEVICE_NAME"), core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    version = openvino.get_version()
    key = hashlib.sha256(repr((version, processor, digests, side, _PIECE, settings)).encode()).hexdigest()
    if (stored := compiled_cache.load(key)) is not None:
        return core.import_model(stored, "CPU", settings)
    model = core.read_model(path)
    model.reshape([openvino.Dimension(1, _PIECE), side, side, 3])
    compiled = core.compile_model(model, "CPU", settings)
    compiled_cache.store(key, compiled.export_model().getvalue())
    return compiled
