"""Compiled networks, kept in the user's cache folder between starts.

Compiling takes up to two seconds and always gives the same result. OpenVINO has a cache of its own, but does not notice
a damaged file in it; this cache does. If the folder cannot be used for any reason, the sorter runs without a cache.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from sorter.files.replaced import replaced

_DIGEST_BYTES = hashlib.sha256().digest_size


def load(key: str) -> bytes | None:
    """What was stored under a key; None if there is nothing, or if it is damaged."""
    try:
        content = _path(key).read_bytes()
    except (OSError, RuntimeError):
        return None
    digest, stored = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return stored if hashlib.sha256(stored).digest() == digest else None


def store(key: str, content: bytes) -> None:
    """Store something under a key, if the folder can be written."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            part.write_bytes(hashlib.sha256(content).digest() + content)


def _path(key: str) -> Path:
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = chosen if chosen.is_absolute() else Path.home() / ".cache"  # RuntimeError for a user without a home
    return base / "sorter" / f"{key}.blob"
