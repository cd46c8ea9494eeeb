"""Changes to an OpenVINO network's graph: a lower resolution in front, a second output in the head."""

import openvino
from openvino.preprocess import PrePostProcessor, ResizeAlgorithm


def hidden_output(model: openvino.Model, hidden_layers: int) -> openvino.Output:
    """The output of the head's first hidden layer, (N, H).

    Args:
        model: the network; its last nodes are the head.
        hidden_layers: of the head, at least 1.

    Raises:
        RuntimeError: the network has no such head.
    """
    node = model.output(0).get_node()
    for kind in [*["MatMul"] * hidden_layers, "Relu"]:
        node = node.input_value(0).get_node()
        while node.get_type_name() != kind:  # additions, and the quantisation of an 8-bit network
            node = node.input_value(0).get_node()
    return node.output(0)


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
