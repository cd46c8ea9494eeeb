"""Changes to an OpenVINO network's graph: a lower resolution in front, a second output before or in the head."""

import openvino
from openvino.preprocess import PrePostProcessor, ResizeAlgorithm

from sorter.classifier.outliers import Layer


def layer_output(model: openvino.Model, layer: Layer, hidden_layers: int) -> openvino.Output:
    """The output of the layer that an outlier detector looks at, (N, W).

    Args:
        model: the network; its last nodes are the head.
        layer: the features that the head takes, or its first hidden layer.
        hidden_layers: of the head; at least 1 for the hidden layer.

    Raises:
        RuntimeError: the network has no such head.
    """
    node = model.output(0).get_node()
    for kind in ["MatMul"] * (hidden_layers + (layer == "features")):
        node = _before(node, kind)
    if layer == "hidden":
        return _before(node, "Relu").output(0)
    source = node.input_value(0)
    while source.get_node().get_type_name() == "FakeQuantize":  # of an 8-bit network
        source = source.get_node().input_value(0)
    return source


def _before(node: openvino.Node, kind: str) -> openvino.Node:
    """The nearest node of a kind before another. Between them are additions, and an 8-bit network's quantisation."""
    node = node.input_value(0).get_node()
    while node.get_type_name() != kind:
        node = node.input_value(0).get_node()
    return node


def at_lower_resolution(model: openvino.Model, side: int, size: int) -> openvino.Model:
    """A network that takes uint8 (N, side, side, 3) and scales it to `size`. The given model is changed.

    Raises:
        RuntimeError: the network accepts only one size.
    """
    model.reshape([model.input().partial_shape[0], size, size, 3])
    processor = PrePostProcessor(model)
    photos = processor.input()
    photos.tensor().set_layout(openvino.Layout("NHWC")).set_spatial_static_shape(side, side)
    photos.model().set_layout(openvino.Layout("NHWC"))
    photos.preprocess().resize(ResizeAlgorithm.RESIZE_LINEAR)
    return processor.build()
