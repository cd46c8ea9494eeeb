"""Where sorter keeps what it knows about a folder: the history of an output, and the locks."""

import hashlib
import os
from pathlib import Path

from sorter.files import FOLDER


def state_folder(folder: Path, state_dir: Path | None) -> Path:
    """The hidden folder in an inbox or an output, or one of its own in `state_dir`.

    Args:
        folder: an inbox or an output, by any of its paths.
        state_dir: a folder on a local disk, for folders on file systems that have no databases or locks.
    """
    if state_dir is None:
        return folder / FOLDER
    real = os.path.realpath(folder)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    return state_dir.absolute() / f"{os.path.basename(real)[:40]}-{digest}"
