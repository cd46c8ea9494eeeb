"""The photos to measure with: copies of real photos, or generated ones."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sorter.decoding.formats import EXTENSIONS
from sorter.errors import ConfigurationError

_GENERATED, _SIZE = 100, (2000, 1500)


def find(folder: Path) -> list[Path]:
    """The photos in a folder, by their extension.

    Raises:
        ConfigurationError: there are none, or the folder cannot be read.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file())
    except OSError as error:
        raise ConfigurationError(f"--photos {folder}: {error.strerror}") from None
    if not found:
        raise ConfigurationError(f"--photos {folder}: there are no photos in this folder")
    return found


def generate(folder: Path) -> list[Path]:
    """Make JPEGs of 3 megapixels that compress like photos.

    Args:
        folder: created for them.
    """
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(_GENERATED):
        picture = Image.fromarray(random.integers(0, 256, (15, 20, 3), np.uint8)).resize(
            _SIZE, Image.Resampling.BICUBIC
        )
        grain = Image.fromarray(random.integers(0, 256, (_SIZE[1] // 4, _SIZE[0] // 4, 3), np.uint8))
        Image.blend(picture, grain.resize(_SIZE, Image.Resampling.BICUBIC), 0.1).save(
            folder / f"{number:03}.jpg", quality=90
        )
    return sorted(folder.iterdir())


def copy(photos: Sequence[Path], folder: Path, count: int) -> None:
    """Fill a new folder with `count` copies: each photo once, then each of them again."""
    folder.mkdir()
    for number, photo in zip(range(count), itertools.cycle(photos), strict=False):
        shutil.copy2(photo, folder / f"{number // len(photos)}-{photo.name}")


def gather(folder: Path, into: Path) -> None:
    """Collect sorted copies in one new folder."""
    into.mkdir()
    for path in list(folder.rglob("*")):
        if path.is_file() and ".sorter" not in path.parts:
            path.rename(into / path.name)
    shutil.rmtree(folder)
