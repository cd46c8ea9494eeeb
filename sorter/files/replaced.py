"""Files that are complete or absent: written under a hidden name in the same folder, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unfinished(path: Path) -> Path:
    """The temporary name of a file until it is complete; a killed process may leave it behind."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a name to write to. At the end it is synced and renamed to `path`; after an error `path` is as before."""
    part = unfinished(path)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
