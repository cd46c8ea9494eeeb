"""Photos that show none of the classes, for the outlier detector to learn from.

In: a folder, with subfolders or without, and the dataset. Out: `Others`, in two parts, near copies together.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sorter.decoding.formats import EXTENSIONS
from sorter.errors import ConfigurationError
from trainer.data import near_copies
from trainer.data.inspection import Inspection
from trainer.data.layouts import Sample

HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Others:
    """Photos that decode; their labels mean nothing.

    Attributes:
        fitting: for the detector to learn from.
        held_out: to measure it on, and for the thresholds of the cascade.
        left_out: files that cannot be used, each with the reason.
    """

    fitting: tuple[Sample, ...] = ()
    held_out: tuple[Sample, ...] = ()
    left_out: tuple[tuple[Path, str], ...] = ()


NONE = Others()


def find(folder: Path) -> list[Path]:
    """The photos below a folder.

    Raises:
        ConfigurationError: there is none.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in EXTENSIONS and path.is_file()]
    if not paths:
        raise ConfigurationError(f"{folder} has no photos: give a folder of photos that show none of the classes")
    return paths


def divide(paths: Sequence[Path], inspected: dict[Path, Inspection], of_classes: Iterable[Path]) -> Others:
    """Leave out what does not decode or is a photo of the classes, and hold a fifth of the rest out.

    Args:
        paths: the photos.
        inspected: theirs, and those of the classes' photos.
        of_classes: the photos of the classes.
    """
    known = {inspected[path].digest: path for path in of_classes}
    left_out = []
    usable = []
    for path in paths:
        one = inspected[path]
        if one.reason is not None:
            left_out.append((path, one.reason))
        elif one.digest in known:
            left_out.append((path, f"a copy of {known[one.digest]}"))
        else:
            usable.append(path)
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    hashes = np.array([int(inspected[path].perceptual_hash, 16) for path in usable], np.uint64)
    for path, group in zip(usable, near_copies.groups(hashes).tolist(), strict=True):
        # By a digest, and not in turn: neighbours in a folder are alike.
        drawn = hashlib.sha256(f"{group}".encode()).digest()[0] / 256
        parts[drawn < HELD_OUT_SHARE].append(Sample(path, 0))
    return Others(tuple(parts[0]), tuple(parts[1]), tuple(left_out))
