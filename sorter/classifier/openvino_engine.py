"""OpenVINO on a CPU, without torch: 8-bit weights where the model has them.

Most photos are easy. If the model has a cascade, the network first runs on a smaller copy of each photo (the
low-resolution pass), and at full size only on those for which that pass was not confident.

A batch is cut into chunks, each of which runs on one core: cores that do not wait for each other lose nothing when a
decoder borrows one of them for a moment.
"""

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino

from sorter.classifier import compiled_cache
from sorter.classifier.manifest import OPENVINO_FP16, OPENVINO_INT8, Manifest
from sorter.classifier.openvino_graph import at_lower_resolution, hidden_output
from sorter.classifier.outliers import OutlierDetector
from sorter.classifier.request_pool import RequestPool
from sorter.errors import ModelError
from sorter.processors import available_cpus

# Photos in a chunk, at most. Fewer cost up to a tenth of the speed at small sizes, more bring nothing.
_CHUNK = 8


def network_files(manifest: Manifest) -> tuple[str, str] | None:
    """The model folder's OpenVINO files, graph and weights: 8-bit if it has them; None if it has none."""
    return next((files for files in (OPENVINO_INT8, OPENVINO_FP16) if set(files) <= set(manifest.files)), None)


class OpenVinoEngine:
    """The network on the CPU, with normalisation in its graph.

    Args:
        folder: the model folder.
        manifest: its manifest, which must name an OpenVINO network.
        min_confidence: photos below it will not be sorted. Above the cascade's threshold every photo gets the full-size
            pass: the lower confidence of the low-resolution pass would keep photos from being sorted.
        detector: for `classify_with_distance`. It turns the cascade off too: its threshold is for full-size passes.

    Raises:
        ModelError: the network cannot be used.
    """

    name = "openvino"
    device = "cpu"
    concurrency = 2  # the last chunks of one batch and the first of the next share the cores

    def __init__(
        self, folder: Path, manifest: Manifest, min_confidence: float = 0.0, detector: OutlierDetector | None = None
    ) -> None:
        compiler = _Compiler(folder, manifest, hidden_layers=len(manifest.head_hidden) if detector else 0)
        self.precision, self.unused_gpu, self._detector = compiler.precision, "", detector
        threads = ThreadPoolExecutor(compiler.streams, thread_name_prefix="openvino")
        classes, cascade = len(manifest.classes), manifest.first_look
        self._low_resolution: _Pass | None = None
        try:
            compiled = compiler.compiled(manifest.input.size)
            self._full_size = _Pass(compiled, classes, manifest.temperature, threads, compiler.streams)
            if cascade is not None and detector is None and min_confidence <= cascade.threshold:
                compiled = compiler.compiled(cascade.size)
                self._low_resolution = _Pass(compiled, classes, cascade.temperature, threads, compiler.streams)
                self._threshold = cascade.threshold
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1][:200]
            raise ModelError(f"{compiler.path} cannot be used ({reason}): export the model again") from None

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Classify a batch, with the cascade if it is on."""
        if self._low_resolution is None:
            return self._full_size(pixels)[0]
        probabilities, _ = self._low_resolution(pixels)  # (N, C)
        unsure = ~(probabilities.max(1) >= self._threshold)  # also where it is not a number
        if unsure.any():
            probabilities[unsure], _ = self._full_size(pixels[unsure])
        return probabilities

    def classify_with_distance(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Classify a batch at full size, and measure the distances from what the network computes on the way."""
        assert self._detector is not None, "opened with catch_neither"
        probabilities, hidden = self._full_size(pixels)
        return probabilities, self._detector(hidden)


class _Pass:
    """A network at one resolution: uint8 (N, S, S, 3) to probabilities (N, C) and the hidden layer, (N, 0 or H)."""

    def __init__(
        self,
        compiled: openvino.CompiledModel,
        classes: int,
        temperature: float,
        threads: ThreadPoolExecutor,
        streams: int,
    ) -> None:
        self._classes, self._temperature, self._threads, self._streams = classes, temperature, threads, streams
        self._requests = RequestPool(compiled, streams)

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        size = min(_CHUNK, -(-len(pixels) // self._streams))  # a small batch uses all cores too
        chunks = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        outputs = np.concatenate(list(self._threads.map(self._requests.infer, chunks)))  # (N, C + H)
        logits = outputs[:, : self._classes] / self._temperature
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities: npt.NDArray[np.float32] = exponentials / exponentials.sum(1, keepdims=True)
        return probabilities, outputs[:, self._classes :]


class _Compiler:
    """Compiles a model folder's network for this CPU, or takes it from the cache.

    Args:
        folder: the model folder.
        manifest: its manifest, which must name an OpenVINO network.
        hidden_layers: of the head, whose first becomes a second output; 0 for none.

    Attributes:
        path: of the network's graph.
        precision: `int8`, `bf16` or `fp32`.
        streams: how many threads run a compiled network.
    """

    def __init__(self, folder: Path, manifest: Manifest, hidden_layers: int) -> None:
        files = network_files(manifest)
        assert files is not None, "the caller has checked"
        self.path = folder / files[0]
        self._digests = [manifest.files[name] for name in files]
        self._side, self._hidden_layers = manifest.input.size, hidden_layers
        self._core = openvino.Core()
        has_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = "int8" if files == OPENVINO_INT8 else "bf16" if has_bf16 else "fp32"
        self.streams = available_cpus()
        self._settings = {
            "NUM_STREAMS": self.streams,
            "INFERENCE_NUM_THREADS": self.streams,
            # Decoders and other programs need cores too, and a pinned thread would wait for them.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if has_bf16 else "f32",
        }

    def compiled(self, size: int) -> openvino.CompiledModel:
        """A network that takes photos of the manifest's size and scales them to `size` pixels a side."""
        key = self._cache_key(size)
        if (stored := compiled_cache.load(key)) is not None:
            with contextlib.suppress(RuntimeError):  # OpenVINO refuses it: compile again
                return self._core.import_model(stored, "CPU", self._settings)
        model = self._core.read_model(self.path)
        if self._hidden_layers:
            model.add_outputs([hidden_output(model, self._hidden_layers)])
        model.reshape([openvino.Dimension(1, _CHUNK), self._side, self._side, 3])
        if size != self._side:
            model = at_lower_resolution(model, self._side, size)
        compiled = self._core.compile_model(model, "CPU", self._settings)
        compiled_cache.store(key, compiled.export_model().getvalue())
        return compiled

    def _cache_key(self, size: int) -> str:
        """A digest of everything that the compiled network depends on."""
        processor = tuple(
            self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
        )
        network = (self._digests, self._side, size, self._hidden_layers, _CHUNK)
        return hashlib.sha256(repr((openvino.get_version(), processor, network, self._settings)).encode()).hexdigest()
