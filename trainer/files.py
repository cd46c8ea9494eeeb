"""Files that are whole or not there: written beside their name, and renamed when they are complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(path: Path) -> Path:
    """The name that a file has until it is complete."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a name to write to, which becomes `path` at the end; until then, and after an error, `path` is as it was."""
    yield beside(path)
    beside(path).replace(path)
