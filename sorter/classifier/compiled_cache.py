"""Compiled networks, cached in the user's cache folder between starts.

Compiling takes up to two seconds and gives the same result each time. OpenVINO's own cache does not notice a damaged
file; this one does. If anything is wrong with the folder, the sorter runs without a cache. Of the entries, those that
were used last are kept: each model, OpenVINO version, number of CPUs and image size has its own.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from sorter.files.replaced import replaced

_KEPT = 8
_SUFFIX = ".blob"
_DIGEST_BYTES = hashlib.sha256().digest_size


def load(key: str) -> bytes | None:
    """The bytes stored under a key; None if there are none, or if they are damaged."""
    try:
        path = _path(key)
        content = path.read_bytes()
        with contextlib.suppress(OSError):
            os.utime(path)  # for `_prune`
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
        _prune(path.parent)


def _prune(folder: Path) -> None:
    entries = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
    for path in entries[:-_KEPT]:
        path.unlink()


def _path(key: str) -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = configured if configured.is_absolute() else Path.home() / ".cache"  # RuntimeError: the user has no home
    return base / "sorter" / f"{key}{_SUFFIX}"
