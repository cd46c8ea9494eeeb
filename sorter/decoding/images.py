"""One photo, from an open descriptor to the network's input.

In: a file descriptor and the model's `Preprocessing`. Out: an RGB picture (S, S), rotated by its EXIF, transparency on
white; or a `PhotoError` with a reason code. The trainer decodes with this module too: a different decoder or resizer
costs more accuracy than 8-bit weights do.

Runs inside the decoder processes (`decoders.py`), so it imports no torch, and numpy for rare TIFFs only.
"""

import io
import math
import os
import time
import warnings
import zlib
from dataclasses import dataclass
from typing import BinaryIO, Literal

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from sorter.decoding import depth, heif_grid, jpeg, profiles, tiff_samples
from sorter.decoding.formats import FORMATS, SIGNATURE_BYTES, ends_early, has_signature
from sorter.errors import PhotoError, Reason

# Pillow's `reducing_gap`: at 3 the result is indistinguishable from filtering at full size.
_REDUCING_GAP = 3.0
# A HEIC picture takes 7 bytes per pixel, unless it is decoded tile by tile.
_MAX_HEIF_MEGAPIXELS = 100.0

# EXIF orientation -> the transposition that puts the picture upright (CIPA DC-008, 4.6.4.A).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes per pixel that decoding may need, since a library that gets no memory reports a broken picture. Besides the
# picture itself: coefficients of a progressive JPEG, WebP's two canvases, AVIF's planes, TIFF's strips.
_NEEDED_BYTES = {"JPEG": 6, "MPO": 6, "WEBP": 20, "AVIF": 16, "HEIF": 16, "TIFF": 16}

_MAX_JPEG_BYTES = 100_000_000

ARRIVING_SECONDS = 60.0
"""A photo that reads as truncated and changed within this time may still be arriving: it is looked at again."""

ImageFile.LOAD_TRUNCATED_IMAGES = False  # True would hide incomplete files
warnings.simplefilter("error", Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a photo becomes the network's input, or a picture for a person.

    Attributes:
        size: the side S of the network's square input, pixels.
        crop: `squash` scales both sides to S; `center` scales the short side to `resize` and cuts S x S out of the
            middle; `none` keeps the full picture with a short side of at most `resize`, for training to cut from;
            `fit` keeps the full picture with a long side of at most S, to be looked at.
        resize: the short side before or without a crop, pixels.
    """

    size: int
    crop: Literal["squash", "center", "none", "fit"] = "squash"
    resize: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused before decoding, and how much memory there is. Megapixels are millions of pixels."""

    max_megapixels: float = 100.0
    max_jpeg_megapixels: float = 250.0
    memory_bytes: float = math.inf


def decode(descriptor: int, preprocessing: Preprocessing, limits: Limits) -> Image.Image:
    """Decode the first frame of an open file.

    Args:
        descriptor: a regular file, read from its start; it stays open.
        preprocessing: size and crop.
        limits: what is refused.

    Returns:
        An RGB picture of `preprocessing.size` squared, unless `preprocessing.crop` is `none` or `fit`.

    Raises:
        PhotoError: the file cannot be read as a photo.
        OSError: the file cannot be read (a failing disk, a lost network share); the photo itself may be fine.
    """
    may_lack_end = time.time() - os.fstat(descriptor).st_mtime >= ARRIVING_SECONDS
    with open(descriptor, "rb", closefd=False) as file:
        return decode_file(file, preprocessing, limits, may_lack_end=may_lack_end)


def decode_file(
    file: BinaryIO,
    preprocessing: Preprocessing,
    limits: Limits,
    orientation: int | None = None,
    *,
    may_lack_end: bool = True,
) -> Image.Image:
    """Decode the first frame of an open or in-memory file, as `decode` does.

    Args:
        file: read from its start.
        preprocessing: size and crop.
        limits: what is refused.
        orientation: EXIF orientation that overrides the file's own.
        may_lack_end: decode a JPEG that lacks nothing but its last two bytes, as viewers do.
    """
    # Set for each call: the limits are settings.
    Image.MAX_IMAGE_PIXELS = int(max(limits.max_megapixels, limits.max_jpeg_megapixels) * 1e6)
    file.seek(0)
    tracked = _Tracked(file)
    needed_bytes = 0
    try:
        if (layout := tiff_samples.find(tracked)) is not None:
            _check_size("TIFF", *layout.size, limits)
            needed_bytes = layout.size[0] * layout.size[1] * _NEEDED_BYTES["TIFF"]
            picture = tiff_samples.decode(tracked, layout, depth.black_and_white)
            return _shrink(picture, preprocessing, orientation or layout.orientation)
        tracked.seek(0)
        with Image.open(tracked, formats=FORMATS) as image:  # type: ignore[arg-type]
            if (tiled := _from_tiles(image, tracked, preprocessing, limits)) is not None:
                return _shrink(tiled, preprocessing, orientation=1)
            _check_size(image.format, image.width, image.height, limits)
            if image.info.get("progressive"):
                _check_scans(tracked)
            needed_bytes = image.width * image.height * _NEEDED_BYTES.get(image.format or "", 5)
            return _shrink(image, preprocessing, orientation)
    except (PhotoError, MemoryError):
        raise
    except Exception as error:
        found = _reason(error, tracked, limits, needed_bytes)
        if may_lack_end and isinstance(found, PhotoError) and found.reason is Reason.TRUNCATED:
            content = _completed(tracked)
            if content is not None:
                return decode_file(io.BytesIO(content), preprocessing, limits, orientation, may_lack_end=False)
        raise found from error


class _Tracked(io.BufferedIOBase):
    """A file that remembers a failed read, so that a broken disk is not mistaken for a broken photo."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return self._file.read(-1 if size is None else size)
        except OSError as error:
            self.failure = error
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _completed(file: _Tracked) -> bytes | None:
    """A JPEG with its missing end; None if more is missing, or it is no JPEG."""
    file.seek(0)
    content = file.read(_MAX_JPEG_BYTES + 1)
    if not content.startswith(b"\xff\xd8\xff") or len(content) > _MAX_JPEG_BYTES:
        return None
    try:
        return jpeg.completed(content)
    except Exception:  # it cannot be decoded even then
        return None


def _check_size(kind: str | None, width: int, height: int, limits: Limits) -> None:
    allowed = limits.max_jpeg_megapixels if kind in ("JPEG", "MPO") else limits.max_megapixels
    if width * height > allowed * 1e6:
        raise PhotoError(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels; the limit is {allowed:g} megapixels")


def _from_tiles(image: Image.Image, file: _Tracked, preprocessing: Preprocessing, limits: Limits) -> Image.Image | None:
    """A HEIC picture that is too large to be decoded at once, reduced; None if it is none, or has no tiles."""
    megapixels = image.width * image.height / 1e6
    at_once = min(limits.max_megapixels, _MAX_HEIF_MEGAPIXELS)
    if image.format != "HEIF" or not at_once < megapixels <= limits.max_jpeg_megapixels:
        return None
    grid = heif_grid.find(file)
    if grid is None:
        return None
    picture = heif_grid.decode(file, grid, _short_side(preprocessing) * _REDUCING_GAP)
    picture.info["icc_profile"] = image.info.get("icc_profile")
    return picture


def _short_side(preprocessing: Preprocessing) -> int:
    return preprocessing.size if preprocessing.crop in ("squash", "fit") else preprocessing.resize


def _check_scans(file: io.BufferedIOBase) -> None:
    """Refuse a progressive JPEG made to keep a CPU busy: each scan is a pass over the full picture."""
    position = file.tell()
    file.seek(0)
    scans = jpeg.count_scans(file.read(_MAX_JPEG_BYTES))
    file.seek(position)
    if scans > jpeg.MAX_SCANS:
        raise PhotoError(Reason.CORRUPT, f"{scans} scans; the limit is {jpeg.MAX_SCANS}")


def _shrink(image: Image.Image, preprocessing: Preprocessing, orientation: int | None) -> Image.Image:
    short = _short_side(preprocessing)
    if image.format in ("JPEG", "MPO"):
        # libjpeg scales while it decodes, to the smallest of 1/8, 1/4, 1/2 that still covers the target.
        image.draft(None, _fitting(image.size, short) if preprocessing.crop == "fit" else (short, short))
    image.load()
    if orientation is None:
        orientation = _orientation(image)  # after loading: Pillow rotates TIFFs itself and resets it
    width, height = image.size
    if preprocessing.crop == "squash":
        size = (short, short)
    elif preprocessing.crop == "fit":
        size = _fitting(image.size, short)
    else:
        scale = short / min(width, height)
        if preprocessing.crop == "none":
            scale, short = min(scale, 1.0), 1
        size = (max(short, round(width * scale)), max(short, round(height * scale)))
    # As `resize` with a reducing gap, but without ever copying the full picture.
    across, down = (int(side / target / _REDUCING_GAP) or 1 for side, target in zip(image.size, size, strict=True))
    reduced = depth.reduced(image, across, down)
    small = reduced.resize(size, Image.Resampling.BILINEAR, box=(0, 0, width / across, height / down))
    if small.mode == "RGBa":
        small = small.convert("RGBA")
    if preprocessing.crop == "center":
        left, top = (size[0] - preprocessing.size) // 2, (size[1] - preprocessing.size) // 2
        small = small.crop((left, top, left + preprocessing.size, top + preprocessing.size))
    small = profiles.to_srgb(small, image.info.get("icc_profile"))
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    small = small.convert("RGB")
    # Rotated last: a small square costs nothing to rotate, twelve megapixels do.
    return small.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else small


def _fitting(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height reduced, if need be, so that neither is larger than `side`."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF is metadata: even if it is broken, the picture counts
        return 1
    return value if isinstance(value, int) else 1


def _reason(error: Exception, file: _Tracked, limits: Limits, needed_bytes: int) -> Exception:
    """Turn a decoder's exception into a `PhotoError`, or return the failed read behind it."""
    if file.failure is not None:
        return file.failure
    detail = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        detail = "the header cannot be read"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        others, for_jpeg = limits.max_megapixels, limits.max_jpeg_megapixels
        return PhotoError(
            Reason.TOO_MANY_PIXELS, f"the limit is {for_jpeg:g} megapixels for JPEG, {others:g} for others"
        )
    file.seek(0)
    head = file.read(SIGNATURE_BYTES)
    if not head:
        return PhotoError(Reason.EMPTY, "the file is empty")
    if not has_signature(head):
        return PhotoError(Reason.NOT_A_PHOTO, "it is named like a photo, but its content is something else")
    if ends_early(file, head) or isinstance(error, (EOFError, zlib.error)) or "truncated" in detail.lower():
        return PhotoError(Reason.TRUNCATED, detail)
    if needed_bytes > limits.memory_bytes:
        return PhotoError(
            Reason.OUT_OF_MEMORY, f"decoding this many pixels of this format needs too much memory ({detail})"
        )
    return PhotoError(Reason.CORRUPT, detail)
