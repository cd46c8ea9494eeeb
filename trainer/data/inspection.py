"""Every file of a dataset, decoded once: whether it decodes, its digest, and its perceptual hash.

In: paths. Out: an `Inspection` for each, cached by path, size and modification time, so that inspecting a dataset again
takes a second.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import imagehash

from sorter.decoding.images import Limits, Preprocessing, decode
from sorter.errors import PhotoError
from sorter.files.replaced import replaced

_CHUNK = 64
_TRANSIENT = "cannot be read now: "


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one file contains.

    Attributes:
        reason: why it cannot be used; None if it can.
        digest: SHA-256 of its bytes, hexadecimal.
        perceptual_hash: 64 bits of `imagehash.phash`, hexadecimal; similar photos differ in few of them.
    """

    reason: str | None
    digest: str
    perceptual_hash: str


def inspect(path: Path) -> Inspection:
    """Read and decode one file fully."""
    digest = ""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            picture = decode(file.fileno(), Preprocessing(64), Limits())
    except PhotoError as error:
        return Inspection(str(error), digest, "0")
    except (MemoryError, OSError) as error:  # the machine's fault and not the photo's: not cached
        return Inspection(f"{_TRANSIENT}{error}", digest, "0")
    return Inspection(None, digest, str(imagehash.phash(picture)))


def inspect_all(
    paths: Sequence[Path], cache: Path, workers: int, track: Callable[[Iterable[Inspection], int], Iterable[Inspection]]
) -> dict[Path, Inspection]:
    """Inspect files in parallel, except for those that the cache knows.

    Args:
        paths: the files.
        cache: folder of the results.
        workers: processes.
        track: given the results as they come and their number, passes them on; for a progress bar.
    """
    store = cache / "inspected.json"
    known = _read(store)
    keys = {path: _key(path) for path in paths}
    new = [path for path in paths if keys[path] not in known]
    if new:
        workers = min(workers, -(-len(new) // _CHUNK))  # each takes a second to start
        # Not forked: by now there are threads, of PyTorch and between the machines, and a fork of them may hang.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            results = track(pool.map(inspect, new, chunksize=_CHUNK), len(new))
            for path, result in zip(new, results, strict=True):
                known[keys[path]] = result
        cacheable = {key: one for key, one in known.items() if not (one.reason or "").startswith(_TRANSIENT)}
        _write(store, cacheable)
    return {path: known[keys[path]] for path in paths}


def _key(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:  # a dangling link: inspecting it gives the reason
        return f"{os.fsencode(path.absolute()).hex()}:"
    return f"{os.fsencode(path.absolute()).hex()}:{status.st_size}:{status.st_mtime_ns}"


def _read(store: Path) -> dict[str, Inspection]:
    try:
        table = json.loads(store.read_text(encoding="utf-8"))
        return {key: Inspection(**value) for key, value in table.items()}
    except (OSError, ValueError, TypeError):  # not there yet, or damaged: it is only a cache
        return {}


def _write(store: Path, known: dict[str, Inspection]) -> None:
    """Add to the store; another trainer may have added to it since it was read."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged = {**_read(store), **known}
        with replaced(store) as part:
            part.write_text(json.dumps(dict(_entries(merged))), encoding="utf-8")


def _entries(known: dict[str, Inspection]) -> Iterator[tuple[str, dict[str, str | None]]]:
    for key, value in known.items():
        yield key, asdict(value)
