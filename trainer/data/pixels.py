"""One photo to the pixels that the network sees, through the sorter's own decoder."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sorter.decoding.images import Limits, Preprocessing, decode
from sorter.errors import ConfigurationError, PhotoError


def read(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode a photo, uint8 (S, S, 3).

    Raises:
        PhotoError: the file is not a photo, or is damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return np.asarray(decode(file.fileno(), preprocessing, Limits()))


def decoded(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode a photo that was inspected before, uint8 (S, S, 3).

    Raises:
        ConfigurationError: it is no longer there, or cannot be decoded.
    """
    try:
        return read(path, preprocessing)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path} was moved or removed meanwhile: run this again, without reviewing, undoing or moving photos "
            "beside it"
        ) from None
    except (PhotoError, OSError) as error:
        raise ConfigurationError(f"cannot decode {path} ({error}): remove it from the dataset") from None
