"""OpenVINO on a CPU, without torch: 8-bit weights where the model has them.

Most photos are easy. If the model has a cascade, the network first runs on a smaller copy of each photo (a
low-resolution pass), and at a larger size only on those for which that pass was not confident.

A batch is cut into chunks, each of which runs on one core: cores that do not wait for each other lose nothing when a
decoder borrows one of them for a moment.
"""

import contextlib
import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino

from sorter.classifier import compiled_cache
from sorter.classifier.manifest import OPENVINO_FP16, OPENVINO_INT8, Manifest
from sorter.classifier.openvino_graph import at_lower_resolution, layer_output
from sorter.classifier.outliers import OutlierDetector, check_width
from sorter.classifier.request_pool import RequestPool
from sorter.errors import ModelError, NotNowError
from sorter.processors import available_cpus

Floats = npt.NDArray[np.float32]

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
        min_confidence: photos below it will not be sorted. Passes of the cascade with a lower threshold are left out:
            their lower confidence would keep photos from being sorted.
        detector: for `classify_with_distance`. Passes that have no threshold for its distances are left out.

    Raises:
        ModelError: the network cannot be used.
        NotNowError: there is too little memory.
    """

    name = "openvino"
    device = "cpu"
    concurrency = 2  # the last chunks of one batch and the first of the next share the cores

    def __init__(
        self, folder: Path, manifest: Manifest, min_confidence: float = 0.0, detector: OutlierDetector | None = None
    ) -> None:
        compiler = _Compiler(folder, manifest, detector)
        self.precision, self.unused_gpu, self._detector = compiler.precision, "", detector
        threads = self._threads = ThreadPoolExecutor(compiler.streams, thread_name_prefix="openvino")

        def opened(size: int, temperature: float, threshold: float, farthest: float | None) -> _Pass:
            compiled = compiler.compiled(size)
            classes, streams = len(manifest.classes), compiler.streams
            return _Pass(compiled, classes, temperature, threshold, farthest, detector, threads, streams)

        low = [
            each
            for each in manifest.cascade
            if min_confidence <= each.threshold and (detector is None or each.neither_threshold is not None)
        ]
        farthest = None if manifest.neither is None else manifest.neither.threshold
        try:
            self._passes = [opened(each.size, each.temperature, each.threshold, each.neither_threshold) for each in low]
            self._passes.append(opened(manifest.input.size, manifest.temperature, 0.0, farthest))
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1][:200]
            if "bad_alloc" in reason:
                raise NotNowError("there is too little memory for the model: free some, or raise the limit") from None
            raise ModelError(f"{compiler.path} cannot be used ({reason}): export the model again") from None

    def classify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Classify a batch, with the cascade."""
        return self._answers(pixels)[0]

    def classify_with_distance(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Classify a batch, with the cascade, and measure the distances from what the network computes on the way."""
        assert self._detector is not None, "opened with catch_neither"
        return self._answers(pixels)

    def close(self) -> None:
        """Give back memory and threads. No thread uses the engine any more."""
        self._threads.shutdown()
        self._passes.clear()  # OpenVINO frees a network with the last object that refers to it

    def _answers(self, pixels: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Probabilities, (N, C), and distances, (N,), which are 0 without a detector."""
        first, *others = self._passes
        probabilities, distances, is_final = first(pixels)
        for each in others:
            rows = np.flatnonzero(~is_final)
            if len(rows) == 0:
                break
            probabilities[rows], distances[rows], is_final[rows] = each(pixels[rows])
        return probabilities, distances


class _Pass:
    """A network at one resolution.

    Args:
        compiled: from uint8 (N, S, S, 3) to logits (N, C), followed by the detector's layer, (N, W).
        classes: C.
        temperature: divides the logits.
        threshold: the confidence from which an answer is final.
        farthest: the largest distance at which it is.
        detector: measures the distances; None for none.
        threads: run the network.
        streams: how many of them at a time.
    """

    def __init__(
        self,
        compiled: openvino.CompiledModel,
        classes: int,
        temperature: float,
        threshold: float,
        farthest: float | None,
        detector: OutlierDetector | None,
        threads: ThreadPoolExecutor,
        streams: int,
    ) -> None:
        self._classes, self._temperature, self._threshold = classes, temperature, threshold
        self._farthest, self._detector = farthest or 0.0, detector
        self._threads, self._streams = threads, streams
        self._requests = RequestPool(compiled, streams)

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        """Probabilities, (N, C); distances beyond the threshold, (N,); and whether these are final, (N,)."""
        size = min(_CHUNK, -(-len(pixels) // self._streams))  # a small batch uses all cores too
        chunks = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        outputs = np.concatenate(list(self._threads.map(self._requests.infer, chunks)))  # (N, C + W)
        logits = outputs[:, : self._classes] / self._temperature
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities: Floats = exponentials / exponentials.sum(1, keepdims=True)
        distances = np.zeros(len(pixels), np.float32)
        if self._detector is not None:
            distances = self._detector(outputs[:, self._classes :]) - np.float32(self._farthest)
        is_final = (probabilities.max(1) >= self._threshold) & (distances <= 0)  # False for what is not a number
        return probabilities, distances, is_final


@functools.cache
def _core() -> openvino.Core:
    """OpenVINO, once for the process.

    Its plugin for CPUs gives a signal stack to the thread that loads it, and unmaps that stack with the last network,
    in whichever thread this is: the next signal would kill the process.
    """
    return openvino.Core()


class _Compiler:
    """Compiles a model folder's network for this CPU, or takes it from the cache.

    Args:
        folder: the model folder.
        manifest: its manifest, which must name an OpenVINO network.
        detector: whose layer becomes a second output; None for none.

    Attributes:
        path: of the network's graph.
        precision: `int8`, `bf16` or `fp32`.
        streams: how many threads run a compiled network.
    """

    def __init__(self, folder: Path, manifest: Manifest, detector: OutlierDetector | None) -> None:
        files = network_files(manifest)
        assert files is not None, "the caller has checked"
        self.path = folder / files[0]
        self._digests = [manifest.files[name] for name in files]
        self._side, self._hidden_layers = manifest.input.size, len(manifest.head_hidden)
        self._detector = detector
        self._core = _core()
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
        if self._detector is not None:
            output = layer_output(model, self._detector.layer, self._hidden_layers)
            check_width(self.path.parent, self._detector, output.partial_shape[1].get_length())
            model.add_outputs([output])
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
        layer = self._detector and self._detector.layer
        network = (self._digests, self._side, size, layer, _CHUNK)
        return hashlib.sha256(repr((openvino.get_version(), processor, network, self._settings)).encode()).hexdigest()
