"""Checkpoints of a fit: written beside and renamed, read as tensors and plain values only.

A kill at any moment leaves the last complete one.
"""

from pathlib import Path
from typing import Any

import torch

from sorter.errors import ConfigurationError
from sorter.files.replaced import replaced

NAME = "checkpoint.pt"
_VERSION = 1


def write(path: Path, identity: str, state: dict[str, Any]) -> None:
    """Write a state; only a run with the same identity may resume from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as part:
        torch.save({"version": _VERSION, "options": identity, "state": state}, part)


def read(path: Path, identity: str) -> dict[str, Any]:
    """Read a state.

    Raises:
        ConfigurationError: the file is damaged, or of a run with another identity.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, written_with, state = content["version"], content["options"], content["state"]
    except Exception as error:  # whatever pickle, zip or torch raise for a damaged file
        raise ConfigurationError(
            f"cannot read the checkpoint {path} ({str(error).splitlines()[0]}): delete it and start again"
        ) from None
    if version != _VERSION:
        raise ConfigurationError(f"{path} was written by another version of the trainer: delete it and start again")
    if written_with != identity:
        raise ConfigurationError(
            f"{path} was made with other options, weights or photos: give the same ones, or delete it to start again"
        )
    return dict(state)
