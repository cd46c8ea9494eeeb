"""The model folder: fp16 weights, manifest, model card, and the 8-bit network for CPUs. Or one ONNX file.

In: a fitted network and its figures. Out: a folder that `sorter run --model` takes.

The 8-bit network is calibrated on training photos and has to agree with the 32-bit one on the calibration part;
otherwise one in 16 bits takes its place.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import openvino
import torch
from torch import nn

from sorter import manifest as manifest_module
from sorter import network
from sorter.manifest import OPENVINO_FP16, OPENVINO_INT8, WEIGHTS, Int8, Manifest
from trainer import files
from trainer.features import Floats, answers, batches, on_openvino
from trainer.layouts import Sample

INT8_PHOTOS = 300
"""Training photos that the 8-bit ranges are taken from."""
LEAST_AGREEMENT = 0.99


def export(
    folder: Path,
    fitted: nn.Module,
    converted: openvino.Model,
    manifest: Manifest,
    training: Sequence[Sample],
    calibration: Sequence[Sample],
    calibration_logits: Floats,
    card: str,
) -> Manifest:
    """Write a model folder.

    Args:
        folder: made where it is missing.
        fitted: from normalised float (N, 3, S, S) to logits (N, C).
        converted: the same as `features.convert` made it.
        manifest: everything but `int8` and `files`.
        training: photos for the ranges of the 8-bit network.
        calibration: photos that judge it.
        calibration_logits: the 32-bit network's answers to them, float32 (N, C).
        card: Markdown; `{int8}` in it becomes a sentence on the 8-bit network.

    Returns:
        The manifest as written.
    """
    contents = {WEIGHTS: network.half(fitted.state_dict())}
    quantised = _quantise(converted, training, manifest)
    mine = answers(on_openvino(quantised), calibration, manifest.input.preprocessing)
    agreement = float((mine.argmax(1) == calibration_logits.argmax(1)).mean())
    int8 = Int8(photos=len(calibration), agreement=round(agreement, 4))
    passed = agreement >= LEAST_AGREEMENT
    contents |= _saved(quantised, OPENVINO_INT8) if passed else _saved(converted, OPENVINO_FP16)
    said = f"it agrees with the 32-bit network on {agreement:.1%} of {len(calibration)} calibration photos"
    if not passed:
        said = f"left out: {said}, and {LEAST_AGREEMENT:.0%} are needed"
    complete = manifest.model_copy(update={"int8": int8})
    return manifest_module.write(folder, complete, contents, card.replace("{int8}", said))


def _quantise(model: openvino.Model, training: Sequence[Sample], manifest: Manifest) -> openvino.Model:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # nncf asks for CUDA's compiler
    import nncf

    nncf.set_log_level(logging.ERROR)
    step = max(1, len(training) // INT8_PHOTOS)
    chosen = training[::step][:INT8_PHOTOS]
    pixels = [photo[None] for batch in batches(chosen, manifest.input.preprocessing) for photo in batch]
    with contextlib.redirect_stdout(io.StringIO()):  # its bars would stand among the figures
        quantised: openvino.Model = nncf.quantize(
            model, nncf.Dataset(pixels), preset=nncf.QuantizationPreset.MIXED, subset_size=len(pixels)
        )
    return quantised


def _saved(model: openvino.Model, names: tuple[str, str]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, Path(folder) / names[0])  # compresses what is float to 16 bits
        return {name: (Path(folder) / name).read_bytes() for name in names}


class _Probabilities(nn.Module):
    """Pixels to probabilities, with normalisation and temperature in the graph."""

    def __init__(self, fitted: nn.Module, manifest: Manifest) -> None:
        super().__init__()
        self.classifier = network.Classifier(fitted, manifest.input.mean, manifest.input.std)
        self.temperature = manifest.temperature

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) to float32 (N, C)."""
        logits: torch.Tensor = self.classifier(pixels)
        return (logits / self.temperature).softmax(1)


def export_onnx(path: Path, fitted: nn.Module, manifest: Manifest) -> float:
    """Write one ONNX file, from `pixels`, uint8 (N, S, S, 3), to `probabilities`, float32 (N, C).

    Returns:
        The largest difference between torch's probabilities and the file's, on noise.
    """
    whole = _Probabilities(fitted, manifest).eval()
    side = manifest.input.size
    noise = torch.randint(0, 256, (4, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    program = torch.onnx.export(
        whole,
        (noise,),
        dynamo=True,
        input_names=["pixels"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("photos", max=4096)},),
        verbose=False,
    )
    with torch.inference_mode():
        wanted = whole(noise)
    with files.replaced(path) as unfinished:
        program.save(str(unfinished), external_data=False)  # type: ignore[union-attr]
        compiled = openvino.Core().compile_model(unfinished, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        got = compiled(noise.numpy())[0]
    return float(abs(wanted.numpy() - got).max())
