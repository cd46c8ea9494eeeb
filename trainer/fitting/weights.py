"""Where a network starts from: torchvision's ImageNet weights, a file, or random numbers."""

import urllib.error
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from sorter.classifier import network
from sorter.errors import ConfigurationError


def start(architecture: str, weights: str, head_hidden: tuple[int, ...], classes: int) -> nn.Module:
    """Build a network with the given weights in its backbone and a new head.

    Args:
        architecture: one of `network.ARCHITECTURES`.
        weights: `imagenet`, `none`, or the path of a state dict in torchvision's names.
        head_hidden: widths of the head's hidden layers.
        classes: number of classes.

    Raises:
        ConfigurationError: the weights cannot be read or downloaded, or do not fit.
    """
    built = network.build(architecture, head_hidden, classes)
    if weights == "none":
        return built
    state = _imagenet(architecture) if weights == "imagenet" else _read(Path(weights))
    head = network.head_name(architecture) + "."
    # Leaves out the 1,000 classes of ImageNet, and the auxiliary classifiers, which help only training from scratch.
    backbone = {k: v for k, v in state.items() if not k.startswith((head, "AuxLogits.", "aux1.", "aux2."))}
    try:
        missing, unexpected = built.load_state_dict(backbone, strict=False)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{weights} does not fit {architecture}: {str(error).splitlines()[-1].strip()}"
        ) from None
    missing = [key for key in missing if not key.startswith(head)]
    if missing or unexpected:
        raise ConfigurationError(
            f"{weights} does not fit {architecture}: {len(missing)} tensors are missing and {len(unexpected)} are "
            f"unknown (for example {[*missing, *unexpected][0]})"
        )
    return built


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise ConfigurationError(f"cannot read the weights {path} ({error}): check --weights") from None
    except Exception as error:  # pickle's own kinds: the file holds more than tensors
        raise ConfigurationError(
            f"{path} holds more than tensors and is not loaded ({error}): save model.state_dict() instead"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigurationError(f"{path} is not a state dict: save model.state_dict() and give that file")
    return state


def _imagenet(architecture: str) -> dict[str, torch.Tensor]:
    models = network.torchvision_models()
    entry = models.get_model_weights(architecture).DEFAULT
    try:
        state: dict[str, torch.Tensor] = entry.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        file, folder = entry.url.rsplit("/", 1)[1], Path(torch.hub.get_dir()) / "checkpoints"
        raise ConfigurationError(
            f"cannot download the ImageNet weights of {architecture} ({error}): fetch {file} from PyTorch's model zoo "
            f"on another machine and put it into {folder}, or give a file with --weights"
        ) from None
    return state
