"""Compiled networks, cached in the user's cache folder between starts.

Compiling takes up to two seconds and gives the same result each time. OpenVINO's own cache does not notice a damaged
file; this one does. If anything is wrong with the folder, the sorter runs without a cache.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from sorter.files.replaced import replaced

_DIGEST_BYTES = hashlib.sha256().digest_size


def load(key: str) -> bytes | None:
    """The bytes stored under a key; None if there are none, or if they are damaged."""
    try:
        content = _path(key).read_bytes()
    except (OSError, RuntimeError):
        return None
    digest, stored = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return stored if hashlib.sha256(stored).digest() == digest else None


def store(key: str, content: bytes) -> None:
    """Store bytes under a key, if the folder is writable."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            part.write_bytes(hashlib.sha256(content).digest() + content)


def _path(key: str) -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = configured if configured.is_absolute() else Path.home() / ".cache"  # RuntimeError: the user has no home
    return base / "sorter" / f"{key}.blob"
