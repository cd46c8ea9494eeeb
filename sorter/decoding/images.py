"""One photo, from an open descriptor to the network's input.

In: a file descriptor and the model's `Preprocessing`. Out: an upright RGB picture (S, S), transparency on white; or a
`PhotoError` with a reason code. The trainer decodes with this module too: another decoder or resizer would cost more
accuracy than 8-bit weights do.

Runs inside the decoder processes (`decoders.py`), so it imports neither torch nor numpy.
"""

import io
import math
import re
import warnings
import zlib
from dataclasses import dataclass
from typing import BinaryIO, Literal

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from sorter.decoding.formats import FORMATS, SIGNATURE_BYTES, ends_early, has_signature
from sorter.errors import PhotoError, Reason

# Pillow's `reducing_gap`: how much of the reduction is left to the filter. With 3 no difference is visible.
_REDUCING_GAP = 3.0
_BAND_PIXELS = 4_000_000

# EXIF orientation -> the transposition that makes the picture upright (CIPA DC-008, 4.6.4.A).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes per pixel that decoding may need in total: beside the picture itself there are the coefficients of a progressive
# JPEG, WebP's two canvases, AVIF's planes, TIFF's strips. A library without memory often reports a broken picture.
_NEEDED_BYTES = {"JPEG": 6, "MPO": 6, "WEBP": 20, "AVIF": 16, "HEIF": 16, "TIFF": 16}

# JPEG's markers, except the standalone ones within a scan's data. Encoders write about a dozen scans.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_START_OF_SCAN, _END_OF_IMAGE, _MAX_SCANS = b"\xff\xda", b"\xff\xd9", 100
_MAX_JPEG_BYTES = 100_000_000

ImageFile.LOAD_TRUNCATED_IMAGES = False  # True would hide half-written files
warnings.simplefilter("error", Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a photo becomes the network's input.

    Attributes:
        size: the side S of the square that the network sees, pixels.
        crop: `squash` scales both sides to S; `center` scales the short side to `resize` and cuts S x S out of the
            middle; `none` keeps all of the picture with a short side of at most `resize`, for training to crop.
        resize: the short side before a crop or without one, pixels.
    """

    size: int
    crop: Literal["squash", "center", "none"] = "squash"
    resize: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused before it is decoded, and the memory available. Megapixels are millions of pixels."""

    max_megapixels: float = 100.0
    max_jpeg_megapixels: float = 250.0
    memory_bytes: float = math.inf


def decode(descriptor: int, preprocessing: Preprocessing, limits: Limits) -> Image.Image:
    """Decode the first frame of an open file.

    Args:
        descriptor: a regular file, read from its start; it stays open.
        preprocessing: size and crop.
        limits: of pixels and memory.

    Returns:
        An RGB picture of `preprocessing.size` squared, unless `preprocessing.crop` is `none`.

    Raises:
        PhotoError: the file cannot be read as a photo.
        OSError: the file cannot be read at all (a failing disk, a lost share): the photo may be fine.
    """
    with open(descriptor, "rb", closefd=False) as file:
        return decode_file(file, preprocessing, limits)


def decode_file(
    file: BinaryIO, preprocessing: Preprocessing, limits: Limits, orientation: int | None = None
) -> Image.Image:
    """`decode` for a file object.

    Args:
        file: read from its start.
        preprocessing: size and crop.
        limits: of pixels and memory.
        orientation: EXIF's number for the orientation, if the file's own does not count.
    """
    # A global of Pillow's, set per call because the limits are settings.
    Image.MAX_IMAGE_PIXELS = int(max(limits.max_megapixels, limits.max_jpeg_megapixels) * 1e6)
    file.seek(0)
    tracked = _Tracked(file)
    needed_bytes = 0
    try:
        with Image.open(tracked, formats=FORMATS) as image:  # type: ignore[arg-type]
            _check_size(image, limits)
            if image.info.get("progressive"):
                _check_scans(tracked)
            needed_bytes = image.width * image.height * _NEEDED_BYTES.get(image.format or "", 5)
            return _shrink(image, preprocessing, orientation)
    except (PhotoError, MemoryError):
        raise
    except Exception as error:
        raise _reason(error, tracked, limits, needed_bytes) from error


class _Tracked(io.BufferedIOBase):
    """A file that remembers a failed read, so that a failing disk is not mistaken for a broken photo."""

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


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    allowed = limits.max_jpeg_megapixels if image.format in ("JPEG", "MPO") else limits.max_megapixels
    if width * height > allowed * 1e6:
        raise PhotoError(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels; the limit is {allowed:g} megapixels")


def _check_scans(file: io.BufferedIOBase) -> None:
    """Refuse a progressive JPEG crafted to keep a CPU busy: decoding passes over all pixels once per scan."""
    before = file.tell()
    file.seek(0)
    content = file.read(_MAX_JPEG_BYTES)
    file.seek(before)
    position, scans = 2, 0
    while (marker := _MARKER.search(content, position)) is not None and marker[0] != _END_OF_IMAGE:
        scans += marker[0] == _START_OF_SCAN
        position = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])  # the segment's length
    if scans > _MAX_SCANS:
        raise PhotoError(Reason.CORRUPT, f"{scans} progressive scans; no photo has more than {_MAX_SCANS}")


def _shrink(image: Image.Image, preprocessing: Preprocessing, orientation: int | None) -> Image.Image:
    short = preprocessing.size if preprocessing.crop == "squash" else preprocessing.resize
    if image.format in ("JPEG", "MPO"):
        # libjpeg scales while it decodes, to the smallest of 1/8, 1/4, 1/2 that still covers what is asked for.
        image.draft(None, (short, short))
    image.load()
    if orientation is None:
        orientation = _orientation(image)  # after loading, which turns TIFFs upright and clears their orientation
    width, height = image.size
    if preprocessing.crop == "squash":
        size = (short, short)
    else:
        scale = short / min(width, height)
        if preprocessing.crop == "none":
            scale, short = min(scale, 1.0), 1
        size = (max(short, round(width * scale)), max(short, round(height * scale)))
    # The same as `resize` with a reducing gap, but without a full-size copy of the picture.
    across, down = (int(side / wanted / _REDUCING_GAP) or 1 for side, wanted in zip(image.size, size, strict=True))
    reduced = _reduced(image, across, down)
    small = reduced.resize(size, Image.Resampling.BILINEAR, box=(0, 0, width / across, height / down))
    if small.mode == "RGBa":
        small = small.convert("RGBA")
    if preprocessing.crop == "center":
        left, top = (size[0] - preprocessing.size) // 2, (size[1] - preprocessing.size) // 2
        small = small.crop((left, top, left + preprocessing.size, top + preprocessing.size))
    if small.mode == "RGBA":
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    small = small.convert("RGB")
    # Transposed last: a small square costs nothing, twelve megapixels do.
    return small.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else small


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF does not make a broken picture
        return 1
    return value if isinstance(value, int) else 1


def _reduced(image: Image.Image, across: int, down: int) -> Image.Image:
    """Average blocks of `across` by `down` pixels, in RGB, or in RGBa where the picture is transparent.

    A band of rows at a time: most modes need two or three copies during the conversion to RGB, and a picture of 100
    megapixels takes 400 MB in each.
    """
    width, height = image.size
    rows = max(1, _BAND_PIXELS // (width * down)) * down
    bands = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    depth = _low_and_high(image, bands) if image.mode[0] in "IF" else None
    reduced: Image.Image | None = None
    for band in bands:
        part = _without_depth(image if len(bands) == 1 else image.crop(band), depth).reduce((across, down))
        if len(bands) == 1:
            return part
        if reduced is None:
            reduced = Image.new(part.mode, (part.width, math.ceil(height / down)))
        reduced.paste(part, (0, band[1] // down))
    assert reduced is not None, "a picture has at least one row"
    return reduced


def _without_depth(image: Image.Image, low_and_high: tuple[float, float] | None) -> Image.Image:
    """Convert any of Pillow's modes to RGB, or to RGBa where it is transparent, with 8 bits per channel."""
    if low_and_high is not None:  # 16-bit greys, 32-bit integers, floats
        low, high = low_and_high
        return image.convert("F").point(lambda value: (value - low) * (255 / (high - low))).convert("L").convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return image.convert("RGBA").convert("RGBa")
    return image.convert("RGB")


def _low_and_high(image: Image.Image, bands: list[tuple[int, int, int, int]]) -> tuple[float, float]:
    """The values of black and white: the narrowest usual range that contains the picture, or else the picture's own."""
    extremes = [float(value) for band in bands for value in image.crop(band).convert("F").getextrema()]  # type: ignore[arg-type]
    if not all(map(math.isfinite, extremes)):
        raise PhotoError(Reason.CORRUPT, "its pixel values are not finite")
    low, high = min(extremes), max(extremes)
    return next(((0.0, white) for white in (1.0, 255.0, 65535.0) if low >= 0 and high <= white), (low, high))


def _reason(error: Exception, file: _Tracked, limits: Limits, needed_bytes: int) -> Exception:
    """Turn a decoder's exception into a reason code, or return the disk's failure behind it."""
    if file.failure is not None:
        return file.failure
    detail = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        detail = "the header cannot be read"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        others, jpeg = limits.max_megapixels, limits.max_jpeg_megapixels
        sentence = f"the limit is {jpeg:g} megapixels for JPEG, {others:g} megapixels for other formats"
        return PhotoError(Reason.TOO_MANY_PIXELS, sentence)
    file.seek(0)
    head = file.read(SIGNATURE_BYTES)
    if not head:
        return PhotoError(Reason.EMPTY, "the file is empty")
    if not has_signature(head):
        return PhotoError(Reason.NOT_A_PHOTO, "it has the extension of a photo but other content")
    if ends_early(file, head) or isinstance(error, (EOFError, zlib.error)) or "truncated" in detail.lower():
        return PhotoError(Reason.TRUNCATED, detail)
    if needed_bytes > limits.memory_bytes:
        return PhotoError(
            Reason.OUT_OF_MEMORY, f"a picture of this size needs too much memory in this format ({detail})"
        )
    return PhotoError(Reason.CORRUPT, detail)
