"""The part of an OpenVINO network before its head: its features, and another head on them.

In: the network of a model folder, with 8 bits or 16. Out: networks that share its backbone bit for bit, so whatever was
measured on the features stays true of a model that has only another head.
"""

from collections.abc import Sequence
from pathlib import Path

import openvino
from openvino import opset13
from torch import nn

from sorter.classifier.manifest import Manifest
from sorter.classifier.openvino_engine import network_files
from sorter.classifier.openvino_graph import at_lower_resolution, layer_output
from sorter.errors import ConfigurationError, ModelError
from trainer.data.layouts import Sample
from trainer.fitting import features
from trainer.fitting.features import Floats
from trainer.progress import Reporter


def read(folder: Path, described: Manifest) -> openvino.Model:
    """Read the OpenVINO network of a model folder.

    Raises:
        ConfigurationError: it has none.
        ModelError: it cannot be read.
    """
    files = network_files(described)
    if files is None:
        raise ConfigurationError(f"the model in {folder} has no OpenVINO network: make one with trainer export")
    try:
        return openvino.Core().read_model(folder / files[0])
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1][:200]
        raise ModelError(f"{folder / files[0]} cannot be read ({reason}): export the model again") from None


def features_at(
    model: openvino.Model,
    described: Manifest,
    size: int,
    samples: Sequence[Sample],
    reporter: Reporter,
    *,
    mirrored: bool = False,
) -> Floats:
    """The features of photos, which the head takes, float32 (N, F).

    Args:
        model: the network, from uint8 (N, S, S, 3); it is not changed.
        described: its manifest.
        size: side of the network's input, pixels: the full one, or that of a low-resolution pass.
        samples: the photos.
        reporter: shows progress.
        mirrored: of the mirror image of each photo instead.
    """
    copy = model.clone()
    output = layer_output(copy, "features", len(described.head_hidden))
    backbone = openvino.Model([output], copy.get_parameters())
    if size != described.input.size:
        backbone = at_lower_resolution(backbone, described.input.size, size)
    title = f"features{' of mirror images' if mirrored else ''} at {size} px"
    return features.answers(
        features.on_openvino(backbone),
        samples,
        described.input.preprocessing,
        mirrored=mirrored,
        track=reporter.tracker(title),
    )


def with_head(model: openvino.Model, head: nn.Module, described: Manifest) -> openvino.Model:
    """The network with another head, which computes in 32 bits: it is small.

    Args:
        model: the network; it is not changed.
        head: from features (N, F) to logits (N, C), as `network.build` makes it.
        described: the manifest of both.
    """
    copy = model.clone()
    node = layer_output(copy, "features", len(described.head_hidden))
    for layer in head if isinstance(head, nn.Sequential) else [head]:
        if isinstance(layer, nn.Linear):
            weight, bias = (part.detach().numpy() for part in (layer.weight, layer.bias))
            node = opset13.add(opset13.matmul(node, weight, False, True), bias).output(0)
        else:
            node = opset13.relu(node).output(0)
    node.get_tensor().set_names({"logits"})
    return openvino.Model([node], copy.get_parameters())
