"""Checkpoints of a fitting: written beside and renamed, read as tensors and plain values only.

A kill at any moment leaves the last whole one.
"""

from pathlib import Path
from typing import Any

import torch

from sorter.errors import ConfigurationError
from sorter.files.replaced import replaced

NAME = "checkpoint.pt"
_VERSION = 1


def write(path: Path, options: str, state: dict[str, Any]) -> None:
    """Write a state; `options` says what may go on from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as part:
        torch.save({"version": _VERSION, "options": options, "state": state}, part)


def read(path: Path, options: str) -> dict[str, Any]:
    """Read a state.

    Raises:
        ConfigurationError: it cannot be read, or comes from other options.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, written_with, state = content["version"], content["options"], content["state"]
    except Exception as error:  # whatever pickle, zip or torch make of a damaged file
        raise ConfigurationError(
            f"the checkpoint {path} cannot be read ({str(error).splitlines()[0]}): take it away and start again"
        ) from None
    if version != _VERSION:
        raise ConfigurationError(f"{path} is of another version of the trainer: take it away and start again")
    if written_with != options:
        raise ConfigurationError(
            f"{path} was made with other options, weights or photos: give the same ones, or take it away to start again"
        )
    return dict(state)
