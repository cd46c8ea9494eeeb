"""The PyTorch networks: torchvision's architectures with another head, and their weights.

The head replaces the architecture's last linear layer, so a state dict keeps torchvision's names. Importing this module
imports torch.
"""

import importlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from sorter.classifier.manifest import WEIGHTS, Manifest
from sorter.classifier.outliers import Layer
from sorter.errors import ModelError

if TYPE_CHECKING:
    from types import ModuleType


def torchvision_models() -> "ModuleType":
    """Import torchvision's models, even from a torchvision built for CUDA beside a torch that was not.

    Such a torchvision cannot load its own operators and then fails to describe them, one after another. The networks
    use none of them, so declaring them is enough.
    """
    while True:
        try:
            return importlib.import_module("torchvision.models")
        except RuntimeError as error:
            missing = re.fullmatch(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor _) -> Tensor")


# torchvision's name for each architecture's last layer. SqueezeNet's is a convolution followed by pooling, so its
# classifier is replaced as a whole.
_HEAD_NAMES = {
    "alexnet": "classifier.6",
    "vgg16": "classifier.6",
    "resnet18": "fc",
    "resnet34": "fc",
    "resnet50": "fc",
    "resnet101": "fc",
    "squeezenet1_1": "classifier",
    "densenet121": "classifier",
    "inception_v3": "fc",
    "googlenet": "fc",
    "shufflenet_v2_x1_0": "fc",
    "mobilenet_v2": "classifier.1",
    "resnext50_32x4d": "fc",
    "wide_resnet50_2": "fc",
    "mnasnet1_0": "classifier.1",
}
_SQUEEZENET_WIDTH = 512
ARCHITECTURES = tuple(_HEAD_NAMES)


def build(architecture: str, head_hidden: Sequence[int], classes: int) -> nn.Module:
    """Build an untrained network.

    Args:
        architecture: one of `ARCHITECTURES`.
        head_hidden: widths of the hidden layers between the backbone's features and the classes; without any the head
            is linear.
        classes: their number.

    Returns:
        A module from float (N, 3, S, S) to logits (N, classes).

    Raises:
        ModelError: the architecture is not one of these.
    """
    if architecture not in _HEAD_NAMES:
        raise ModelError(f"unknown architecture {architecture}: this sorter knows {', '.join(ARCHITECTURES)}")
    # The auxiliary classifiers of the Inception family help only when training from scratch.
    options = {"aux_logits": False, "init_weights": True} if architecture in ("inception_v3", "googlenet") else {}
    network: nn.Module = getattr(torchvision_models(), architecture)(weights=None, **options)
    name = head_name(architecture)
    if architecture == "squeezenet1_1":
        head = _head([_SQUEEZENET_WIDTH, *head_hidden], classes)
        replace(network, name, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head))
    else:
        width = int(network.get_submodule(name).in_features)  # type: ignore[arg-type]
        replace(network, name, _head([width, *head_hidden], classes))
    return network


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule with a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


def head_name(architecture: str) -> str:
    """The dotted name of the head that `build` adds: the prefix of its keys in a state dict."""
    return _HEAD_NAMES[architecture]


def head_layers_name(architecture: str) -> str:
    """The dotted name of the layers that take features (N, W): in SqueezeNet, pooling comes before them."""
    return head_name(architecture) + (".2" if architecture == "squeezenet1_1" else "")


def _head(widths: Sequence[int], classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    last = nn.Linear(widths[-1], classes)
    return nn.Sequential(*layers, last) if layers else last


class WithLayer(nn.Module):
    """A head that returns its logits and the layer that an outlier detector looks at, side by side, (N, C + W)."""

    def __init__(self, head: nn.Module, layer: Layer) -> None:
        super().__init__()
        layers = list(head) if isinstance(head, nn.Sequential) else [head]
        first = 0 if layer == "features" else 2  # a linear layer and its ReLU
        self.before, self.rest = nn.Sequential(*layers[:first]), nn.Sequential(*layers[first:])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, F) to (N, C + W)."""
        activations = self.before(features)
        return torch.cat([self.rest(activations), activations], 1)


def layer_width(head: nn.Module, layer: Layer) -> int:
    """The width of the layer that `WithLayer` puts beside a head's logits."""
    first = head[0] if isinstance(head, nn.Sequential) else head
    assert isinstance(first, nn.Linear), "a head starts with a linear layer"
    return first.in_features if layer == "features" else first.out_features


def load(folder: Path, manifest: Manifest) -> nn.Module:
    """Build the network of a model folder with its weights, fp32, in evaluation mode.

    Raises:
        ModelError: the weights do not fit the architecture, or are not finite numbers.
    """
    try:
        # On the meta device it takes no memory before the weights are loaded: a manifest may claim any size.
        with torch.device("meta"):
            network = build(manifest.architecture, manifest.head_hidden, len(manifest.classes))
        state = OrderedDict(safetensors.torch.load_file(folder / WEIGHTS))
        # MNASNet reads a layout version from the metadata, which safetensors does not keep.
        state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
        network.load_state_dict(state, assign=True)
    except (safetensors.SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:2][-1].strip()  # torch's first line says only that there are errors
        raise ModelError(
            f"the weights in {folder} do not fit {manifest.architecture} ({reason}): export the model again"
        ) from None
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"the weights in {folder} are not finite numbers ({name}): export the model again")
    return network.float().eval()


def half(state: Mapping[str, torch.Tensor]) -> bytes:
    """A state dict as a safetensors file with fp16 weights."""
    tensors: dict[str, Any] = {
        name: (value.half() if value.is_floating_point() else value).contiguous() for name, value in state.items()
    }
    return safetensors.torch.save(tensors)


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Fold batch-norms into the convolutions before them: the same function with a third of the memory traffic."""
    folded: nn.Module = fuse(network)
    return folded


class Classifier(nn.Module):
    """A network with its preprocessing in the graph: pixels in, logits out.

    Args:
        network: from normalised float (N, 3, S, S) to logits (N, C) or other outputs.
        mean, std: of pixels from 0 to 1, by channel.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        mean_, std_ = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        # (pixel / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", 1 / (255 * std_))
        self.register_buffer("shift", -mean_ / std_)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) to float32 (N, C)."""
        image = pixels.permute(0, 3, 1, 2)  # (N, 3, S, S), channels-last without a copy
        normalised = image.float() * self.scale + self.shift
        dtype = next(self.network.parameters()).dtype
        logits: torch.Tensor = self.network(normalised.to(dtype)).float()  # (N, C)
        return logits
