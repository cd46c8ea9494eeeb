"""Compiled networks, kept in the user's cache folder from one start to the next.

Compiling takes up to two seconds and comes to the same each time. OpenVINO has a cache of its own, which does not
notice a file that is damaged inside; this one does. Whatever is wrong with the folder, the sorter goes on without it.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from sorter.files.replaced import replaced

_DIGEST_BYTES = hashlib.sha256().digest_size


def load(key: str) -> bytes | None:
    """What was stored under a key; None if there is nothing, or nothing whole."""
    try:
        content = _path(key).read_bytes()
    except (OSError, RuntimeError):
        return None
    digest, stored = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return stored if hashlib.sha256(stored).digest() == digest else None


def store(key: str, content: bytes) -> None:
    """Keep something, if the folder takes it."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            part.write_bytes(hashlib.sha256(content).digest() + content)


def _path(key: str) -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = named if named.is_absolute() else Path.home() / ".cache"  # RuntimeError for a user without a home
    return base / "sorter" / f"{key}.blob"
