"""OpenVINO on a CPU: 8-bit weights where the model has them and they passed their gate, and no torch.

Most photos are easy. Where the model says so, the network looks at each made smaller first, and only at those again, at
full size, that it was not sure of.

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
from openvino.preprocess import PrePostProcessor, ResizeAlgorithm

from sorter.classifier import compiled_cache
from sorter.classifier.manifest import OPENVINO_FP16, OPENVINO_INT8, Manifest
from sorter.classifier.outliers import OutlierDetector
from sorter.errors import ModelError
from sorter.processors import available_cpus

# Photos a piece at most. Fewer cost up to a tenth of the speed at small sizes, more bring nothing.
_PIECE = 8


def network_files(manifest: Manifest) -> tuple[str, str] | None:
    """The files that OpenVINO runs of a model folder, its network and its weights; None if it has none."""
    return next((files for files in (OPENVINO_INT8, OPENVINO_FP16) if set(files) <= set(manifest.files)), None)


class OpenVinoEngine:
    """The network on the processor, with normalisation in its graph.

    Args:
        folder: the model folder.
        manifest: its manifest, which names a network for OpenVINO.
        min_confidence: what is less sure will not be sorted. Above the first look's threshold there is no first look:
            the more modest confidence of a smaller picture would keep photos from being sorted.
        distance: for `classify_with_distance`. With it there is no first look either, since its threshold is for
            full-size looks.

    Raises:
        ModelError: the network cannot be used.
    """

    name = "openvino"
    device = "cpu"
    # One batch's last pieces and the next one's first share the cores.
    concurrency = 2

    def __init__(
        self, folder: Path, manifest: Manifest, min_confidence: float = 0.0, distance: OutlierDetector | None = None
    ) -> None:
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
        digests = [manifest.files[name] for name in files]
        # Threads that wait for a request each, and no `AsyncInferQueue`: its callbacks run Python in OpenVINO's own
        # threads, and a network that is taken down while one of them still wants the interpreter hangs.
        pool = ThreadPoolExecutor(streams, thread_name_prefix="openvino")
        self._distance = distance
        hidden_layers = 0 if distance is None else len(manifest.head_hidden)

        def look(size: int, temperature: float) -> _Look:
            compiled = _compiled(core, path, digests, manifest.input.size, size, hidden_layers, settings)
            return _Look(compiled, len(manifest.classes), temperature, pool, streams)

        first = manifest.first_look
        self._first: _Look | None = None
        try:
            self._whole = look(manifest.input.size, manifest.temperature)
            if first is not None and distance is None and min_confidence <= first.threshold:
                self._first, self._enough = look(first.size, first.temperature), first.threshold
        except RuntimeError as error:
            said = (str(error).strip().splitlines() or ["no reason given"])[-1][:200]
            raise ModelError(f"{path} cannot be used ({said}): export the model again") from None

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `Engine.classify`."""
        if self._first is None:
            return self._whole(pixels)[0]
        probabilities, _ = self._first(pixels)  # (N, C)
        unsure = probabilities.max(1) < self._enough
        if unsure.any():
            probabilities[unsure], _ = self._whole(pixels[unsure])
        return probabilities

    def classify_with_distance(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """See `Engine.classify_with_distance`."""
        assert self._distance is not None, "opened with catch_neither"
        probabilities, hidden = self._whole(pixels)
        return probabilities, self._distance(hidden)


class _Look:
    """A network at one size: uint8 (N, S, S, 3) to probabilities (N, C) and what is hidden before them (N, 0 or H)."""

    def __init__(
        self,
        compiled: openvino.CompiledModel,
        classes: int,
        temperature: float,
        pool: ThreadPoolExecutor,
        requests: int,
    ) -> None:
        self._classes, self._temperature, self._pool, self._requests = classes, temperature, pool, requests
        self._outputs = len(compiled.outputs)
        self._idle: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(requests):
            self._idle.put(compiled.create_infer_request())

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        size = min(_PIECE, -(-len(pixels) // self._requests))  # a small batch is shared out too
        pieces = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        answers = np.concatenate(list(self._pool.map(self._answer, pieces)))  # (N, C + H)
        logits = answers[:, : self._classes] / self._temperature
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities: npt.NDArray[np.float32] = exponentials / exponentials.sum(1, keepdims=True)
        return probabilities, answers[:, self._classes :]

    def _answer(self, piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        request = self._idle.get()
        try:
            found = request.infer([piece], share_inputs=True)
            answers = [found[number].astype(np.float32) for number in range(self._outputs)]
            return answers[0] if len(answers) == 1 else np.concatenate(answers, 1)
        finally:
            self._idle.put(request)


def hidden(model: openvino.Model, layers: int) -> openvino.Output:
    """What the first of a head's hidden layers makes of photos, (N, H), inside a network.

    Args:
        model: the network; its last nodes are the head.
        layers: how many hidden layers the head has, at least 1.

    Raises:
        RuntimeError: it has no such head.
    """
    node = model.output(0).get_node()
    for kind in [*["MatMul"] * layers, "Relu"]:
        node = node.input_value(0).get_node()
        while node.get_type_name() != kind:  # sums, and the rounding of 8 bits
            node = node.input_value(0).get_node()
    return node.output(0)


def smaller(model: openvino.Model, side: int, size: int) -> openvino.Model:
    """A network that sees its photos, uint8 (N, side, side, 3), scaled to `size`; the model itself is changed.

    Raises:
        RuntimeError: it takes one size only.
    """
    model.reshape([model.input().partial_shape[0], size, size, 3])
    processor = PrePostProcessor(model)
    photos = processor.input()
    photos.tensor().set_layout(openvino.Layout("NHWC")).set_spatial_static_shape(side, side)
    photos.model().set_layout(openvino.Layout("NHWC"))
    photos.preprocess().resize(ResizeAlgorithm.RESIZE_LINEAR)
    return processor.build()


def _compiled(
    core: openvino.Core,
    path: Path,
    digests: list[str],
    side: int,
    size: int,
    hidden_layers: int,
    settings: dict[str, Any],
) -> openvino.CompiledModel:
    """Compile a network for this processor, or take it from the cache.

    Args:
        core: OpenVINO.
        path: the network's.
        digests: of its files.
        side: of the photos that it is given, pixels.
        size: what they are scaled to.
        hidden_layers: of its head, whose first is a second output; 0 for none.
        settings: OpenVINO's.
    """
    processor = core.get_property("CPU", "FULL_DEVICE_NAME"), core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    version = openvino.get_version()
    what = (version, processor, digests, side, size, hidden_layers, _PIECE, settings)
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    if (stored := compiled_cache.load(key)) is not None:
        return core.import_model(stored, "CPU", settings)
    model = core.read_model(path)
    if hidden_layers:
        model.add_outputs([hidden(model, hidden_layers)])
    model.reshape([openvino.Dimension(1, _PIECE), side, side, 3])
    if size != side:
        model = smaller(model, side, size)
    compiled = core.compile_model(model, "CPU", settings)
    compiled_cache.store(key, compiled.export_model().getvalue())
    return compiled
