"""A model folder's files: fp16 weights, and the 8-bit network for CPUs. Or one ONNX file.

In: a fitted network and photos. Out: the files' content.

The 8-bit network is quantised with training photos, and must be about as good as the 32-bit one on the calibration
part; otherwise a 16-bit network replaces it.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import openvino
import torch
from torch import nn

from sorter.classifier import network
from sorter.classifier.manifest import OPENVINO_FP16, OPENVINO_INT8, WEIGHTS, Input, Int8, Manifest
from sorter.decoding.images import Preprocessing
from sorter.files.replaced import replaced
from trainer.data.layouts import Sample, labels_of
from trainer.fitting.features import Floats, answers, batches, on_openvino
from trainer.packaging.metrics import Labels, fit_temperature, log_loss, softmax

INT8_PHOTOS = 300
"""Training photos that the ranges of the 8-bit values are taken from."""
MIN_AGREEMENT = 0.99
"""Share of the calibration photos to which both networks must give the same label."""
MAX_LOG_LOSS_INCREASE = 0.01
"""How much higher the 8-bit network's log-loss may be: thresholds depend on confidences, not only on labels."""


@dataclass(frozen=True, slots=True)
class Networks:
    """The contents of a model folder beside its manifest.

    Attributes:
        files: content by name.
        int8: how well the 8-bit network agrees.
        best: the network that OpenVINO will run, from uint8 (N, S, S, 3).
        logits: its logits for the calibration photos, float32 (N, C).
    """

    files: dict[str, bytes]
    int8: Int8
    best: openvino.Model
    logits: Floats


def networks(
    fitted: nn.Module,
    converted: openvino.Model,
    described: Input,
    training: Sequence[Sample],
    calibration: Sequence[Sample],
    logits: Floats,
) -> Networks:
    """Make the files of a model folder.

    Args:
        fitted: from normalised float (N, 3, S, S) to logits (N, C).
        converted: the same network, made by `features.convert`.
        described: its input.
        training: photos for the ranges of the 8-bit network.
        calibration: photos to compare it on.
        logits: the 32-bit network's logits for them, float32 (N, C).
    """
    weights = {WEIGHTS: network.half(fitted.state_dict())}
    quantised = _quantise(converted, training, described.preprocessing)
    int8_logits = answers(on_openvino(quantised), calibration, described.preprocessing)
    int8 = compare(int8_logits, logits, labels_of(calibration))
    if is_good_enough(int8):
        return Networks(weights | saved(quantised, OPENVINO_INT8), int8, quantised, int8_logits)
    return Networks(weights | saved(converted, OPENVINO_FP16), int8, converted, logits)


def compare(int8_logits: Floats, logits: Floats, labels: Labels) -> Int8:
    """How far the 8-bit network is from the 32-bit one, by their logits for the calibration photos, (N, C)."""
    agreement = float((int8_logits.argmax(1) == logits.argmax(1)).mean())
    losses = [log_loss(softmax(each, fit_temperature(each, labels)), labels) for each in (int8_logits, logits)]
    increase = round(losses[0] - losses[1], 4)
    return Int8(photos=len(labels), agreement=round(agreement, 4), log_loss_increase=increase)


def is_good_enough(int8: Int8) -> bool:
    """Whether the 8-bit network may replace the 32-bit one."""
    assert int8.log_loss_increase is not None, "measured just now"
    return int8.agreement >= MIN_AGREEMENT and int8.log_loss_increase <= MAX_LOG_LOSS_INCREASE


def _quantise(model: openvino.Model, training: Sequence[Sample], preprocessing: Preprocessing) -> openvino.Model:
    logging.getLogger("torch.utils.cpp_extension").setLevel(
        logging.ERROR
    )  # nncf looks for a CUDA compiler, and torch warns
    import nncf

    nncf.set_log_level(logging.ERROR)
    step = max(1, len(training) // INT8_PHOTOS)
    chosen = training[::step][:INT8_PHOTOS]
    pixels = [photo[None] for batch in batches(chosen, preprocessing) for photo in batch]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        quantised: openvino.Model = nncf.quantize(
            model, nncf.Dataset(pixels), preset=nncf.QuantizationPreset.MIXED, subset_size=len(pixels)
        )
    return quantised


def saved(model: openvino.Model, names: tuple[str, str]) -> dict[str, bytes]:
    """The content of a network's files, graph and weights, by name."""
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, Path(folder) / names[0])  # compresses floats to 16 bits
        return {name: (Path(folder) / name).read_bytes() for name in names}


class _Probabilities(nn.Module):
    """Pixels to probabilities, with normalisation and temperature in the graph."""

    def __init__(self, fitted: nn.Module, manifest: Manifest) -> None:
        super().__init__()
        self.classifier = network.Classifier(fitted, manifest.input.mean, manifest.input.std)
        self.temperature = manifest.temperature_of("torch")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) to float32 (N, C)."""
        logits: torch.Tensor = self.classifier(pixels)
        return (logits / self.temperature).softmax(1)


def export_onnx(path: Path, fitted: nn.Module, manifest: Manifest) -> float:
    """Write one ONNX file, from `pixels`, uint8 (N, S, S, 3), to `probabilities`, float32 (N, C).

    Returns:
        The largest difference between torch's probabilities and those of the file, on random pixels.
    """
    network_to_export = _Probabilities(fitted, manifest).eval()
    side = manifest.input.size
    noise = torch.randint(0, 256, (4, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    program = torch.onnx.export(
        network_to_export,
        (noise,),
        dynamo=True,
        input_names=["pixels"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("photos", max=4096)},),
        verbose=False,
    )
    with torch.inference_mode():
        expected = network_to_export(noise)
    with replaced(path) as part:
        program.save(str(part), external_data=False)  # type: ignore[union-attr]
        compiled = openvino.Core().compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        exported = compiled(noise.numpy())[0]
    return float(abs(expected.numpy() - exported).max())
