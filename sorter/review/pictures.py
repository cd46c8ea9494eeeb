"""Photos as the page shows them: decoded in the confined decoders, encoded again, never the file itself.

In: a `Photo` with the identity of the version to show. Out: a JPEG without metadata whose long side has at most so many
pixels. Pictures are kept in memory only: no copy of a private photo stays on a disk.
"""

import io
import threading
from collections import OrderedDict
from concurrent.futures import Future, wait

from PIL import Image

from sorter.decoding.decoded import Decoded
from sorter.decoding.decoders import Decoders
from sorter.decoding.images import Limits, Preprocessing
from sorter.errors import SorterError
from sorter.files.photo import Photo

THUMBNAIL, LARGE = 320, 1600
"""The long sides, pixels: of many photos at once, and of one."""

_WORKERS = {THUMBNAIL: 1, LARGE: 2}
_QUALITY = {THUMBNAIL: 78, LARGE: 88}
_CACHE_BYTES = 64_000_000
_MARGIN_SECONDS = 60.0  # for photos that wait their turn, and for decoders that start again


class PictureError(Exception):
    """A photo cannot be shown; the message says why.

    Attributes:
        is_changed: it is gone, or no longer the version that was asked for.
    """

    def __init__(self, message: str, *, is_changed: bool = False) -> None:
        super().__init__(message)
        self.is_changed = is_changed


class Pictures:
    """Makes pictures, for many threads at a time.

    Args:
        limits: pixels; larger photos are refused.
        max_bytes: larger files are refused without being read.
        timeout_seconds: for decoding one photo.
    """

    def __init__(self, limits: Limits, max_bytes: int, timeout_seconds: float) -> None:
        self._cache: OrderedDict[tuple[int, ...], bytes] = OrderedDict()  # the most recently used last
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._pools = {side: _Pool(side, limits, max_bytes, timeout_seconds) for side in _WORKERS}

    def close(self) -> None:
        """End the decoders; pictures that are being made fail."""
        for pool in self._pools.values():
            pool.close()

    def jpeg(self, photo: Photo, side: int) -> bytes:
        """The picture of a photo.

        Args:
            photo: below a folder that the user chose; its identity is of the version to show.
            side: `THUMBNAIL` or `LARGE`.

        Raises:
            PictureError: it cannot be shown.
        """
        key = (side, *photo.identity[:4])  # all but the status change time, which a new link changes
        with self._lock:
            if (found := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                return found
        made = self._pools[side].jpeg(photo)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = made
                self._cached_bytes += len(made)
            while self._cached_bytes > _CACHE_BYTES:
                self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return made


class _Pool:
    """Decoders for pictures of one size, and those who wait for them."""

    def __init__(self, side: int, limits: Limits, max_bytes: int, timeout_seconds: float) -> None:
        self._side = side
        self._patience = timeout_seconds + _MARGIN_SECONDS
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[Photo, Future[bytes]]] = {}  # by path
        self._error: BaseException | None = None
        self._decoders = Decoders(
            workers=_WORKERS[side],
            rows=_WORKERS[side] + 1,
            preprocessing=Preprocessing(side, "fit"),
            limits=limits,
            max_bytes=max_bytes,
            timeout_seconds=timeout_seconds,
            deliver=self._deliver,
            fail=self._fail,
        )

    def jpeg(self, photo: Photo) -> bytes:
        """The picture; those who ask for the same one meanwhile get that one.

        Raises:
            PictureError: it cannot be shown.
        """
        try:
            while True:
                asked, future = self._ask(photo)
                if asked.identity == photo.identity:
                    return future.result(self._patience)
                wait((future,), self._patience)  # for another version of the file
        except TimeoutError:
            raise PictureError("the decoders are busy: try again") from None

    def _ask(self, photo: Photo) -> "tuple[Photo, Future[bytes]]":
        """What is being decoded from a photo's path: the photo, unless another version of it is."""
        with self._lock:
            if self._error is not None:
                raise _ended(self._error)
            if photo.path in self._waiting:
                return self._waiting[photo.path]
            asked = self._waiting[photo.path] = (photo, Future())
        if not self._decoders.submit(photo, timeout_seconds=self._patience):
            self._answer(photo).set_exception(TimeoutError())
        return asked

    def close(self) -> None:
        """End the decoders."""
        self._decoders.close()
        self._fail(SorterError("the review has ended"))

    def _answer(self, photo: Photo) -> "Future[bytes]":
        with self._lock:
            return self._waiting.pop(photo.path, (photo, Future()))[1]

    def _deliver(self, decoded: Decoded) -> None:
        waiting = self._answer(decoded.photo)
        if decoded.verdict == "pixels":
            try:
                waiting.set_result(self._encode(decoded))
            finally:
                self._decoders.release(decoded.row)
        elif decoded.verdict == "gone":
            waiting.set_exception(PictureError(f"the photo {decoded.detail}", is_changed=True))
        else:
            reason = f"{decoded.reason}: " if decoded.reason else ""
            waiting.set_exception(PictureError(f"the photo cannot be shown ({reason}{decoded.detail})"))

    def _encode(self, decoded: Decoded) -> bytes:
        (width, height), start = decoded.size, decoded.row * self._side**2 * 3
        pixels = self._decoders.pixels[start : start + width * height * 3]  # uint8 (height, width, 3)
        content = io.BytesIO()
        Image.frombytes("RGB", (width, height), pixels).save(content, "JPEG", quality=_QUALITY[self._side])
        return content.getvalue()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            waiting, self._waiting = self._waiting, {}
        for _, future in waiting.values():
            future.set_exception(_ended(error))


def _ended(error: BaseException) -> PictureError:
    return PictureError(f"no photos can be shown any more: {error}")
