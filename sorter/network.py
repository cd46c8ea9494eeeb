"""The torch networks: torchvision's architectures with our head, weights in and out.

The head replaces the architecture's last linear layer, so a state dict keeps torchvision's names. Importing this module
imports torch; the parts of the sorter that need no network do without it.
"""

import importlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sorter.errors import ModelError
from sorter.manifest import WEIGHTS, Manifest

if TYPE_CHECKING:
    from types import ModuleType


def _import_torchvision() -> "ModuleType":
    """Import torchvision, also one that was built for CUDA beside a torch that was not.

    Such a torchvision cannot load its own operators and then fails to describe them, one after the other. The networks
    use none of them: it is enough that they are declared.
    """
    while True:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.fullmatch(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor _) -> Tensor")


# torchvision's name of the part that ends in the classes.
_HEAD_NAMES = {"resnet50": "fc"}
ARCHITECTURES = tuple(_HEAD_NAMES)


def build(architecture: str, head_hidden: Sequence[int], classes: int) -> nn.Module:
    """Build an untrained network.

    Args:
        architecture: one of `ARCHITECTURES`.
        head_hidden: widths of the hidden layers between the pooled features and the classes; none makes it linear.
        classes: how many.

    Returns:
        A module from float (N, 3, S, S) to logits (N, classes).

    Raises:
        ModelError: there is no such architecture.
    """
    if architecture not in _HEAD_NAMES:
        raise ModelError(f"unknown architecture {architecture}: this sorter knows {', '.join(ARCHITECTURES)}")
    network: nn.Module = getattr(_import_torchvision().models, architecture)(weights=None)
    name = _HEAD_NAMES[architecture]
    width = network.get_submodule(name).in_features
    setattr(network, name, _head([int(width), *head_hidden], classes))  # type: ignore[arg-type]
    return network


def _head(widths: Sequence[int], classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    last = nn.Linear(widths[-1], classes)
    return nn.Sequential(*layers, last) if layers else last


def load(folder: Path, manifest: Manifest) -> nn.Module:
    """Build the network of a model folder with its weights, fp32, in evaluation mode.

    Raises:
        ModelError: the weights do not fit the architecture, or are not finite numbers.
    """
    network = build(manifest.architecture, manifest.head_hidden, len(manifest.classes))
    try:
        state = safetensors.torch.load_file(folder / WEIGHTS)
        network.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        said = str(error).strip().splitlines()[0]
        raise ModelError(f"the weights in {folder} do not fit {manifest.architecture} ({said}): export again") from None
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
    """Fold each batch-norm that follows a convolution into it: the same function with a third of the memory traffic.

    Works on residual networks, whose blocks name a convolution and its batch-norm `convK` and `bnK`, and put the
    shortcut's pair into a `Sequential`.
    """
    for module in network.modules():
        children = dict(module.named_children())
        for name, norm in children.items():
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            before = str(int(name) - 1) if name.isdigit() else name.replace("bn", "conv")
            convolution = children.get(before)
            if isinstance(convolution, nn.Conv2d):
                setattr(module, before, fuse_conv_bn_eval(convolution, norm))
                setattr(module, name, nn.Identity())
    return network
