"""A camera's raw file, decoded from the preview that the camera embedded in it.

In: a file descriptor and the model's `Preprocessing`. Out: the preview as `images.py` decodes it, or a `PhotoError`.

rawpy, an extra, extracts the preview; the sensor data is not decoded. Of several previews it
extracts the largest, which costs little: a JPEG is decoded at the smallest sufficient scale. rawpy is imported for the
first raw file, in the decoder processes only: the trainer does not read raw files.
"""

import io
import os
import struct

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from sorter import extras
from sorter.decoding import formats, images
from sorter.decoding.images import Limits, Preprocessing
from sorter.errors import PhotoError, Reason

EXTENSIONS = frozenset((".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"))
EXTENSIONS |= {".3fr", ".crw", ".erf", ".gpr", ".iiq", ".mrw", ".rwl", ".sr2", ".srf"}
# LibRaw's flip -> EXIF's orientation.
_ORIENTATIONS = (1, 2, 4, 3, 5, 8, 6, 7)

# And Olympus's variants. Panasonic's is missing: its directories hold no lengths.
_TIFFS = (b"II*\0", b"MM\0*", b"IIRO", b"IIRS", b"MMOR")
_SHORT, _LONG, _DIRECTORY = 3, 4, 13
_NEXT_DIRECTORIES = 330
# TIFF tags: offsets of a picture's pieces -> their lengths; strips, tiles, an embedded JPEG.
_PIECES = {273: 279, 324: 325, 513: 514}
_MAX_DIRECTORIES, _MAX_PIECES = 64, 100_000


def is_raw(name: str) -> bool:
    """True if a file's name is that of a raw file; by content most are TIFFs."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def decode(descriptor: int, preprocessing: Preprocessing, limits: Limits) -> Image.Image:
    """Decode the preview of an open raw file. Arguments and result are those of `images.decode`.

    Raises:
        PhotoError: rawpy is missing, or the file has no readable preview.
        OSError: the file cannot be read at all.
    """
    try:
        import rawpy
    except ImportError:
        raise PhotoError(Reason.NOT_A_PHOTO, extras.hint("sorting it by its preview", "raw")) from None
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        content = file.read()
    if not content:
        raise PhotoError(Reason.EMPTY, "the file is empty")
    if _is_truncated(content):
        raise PhotoError(Reason.TRUNCATED, "it ends before its data does")
    try:
        with rawpy.imread(io.BytesIO(content)) as opened:
            thumbnail, orientation = opened.extract_thumb(), _ORIENTATIONS[opened.sizes.flip & 7]
            if isinstance(thumbnail.data, bytes):  # a JPEG; otherwise an array of pixels
                preview = io.BytesIO(thumbnail.data)
                orientation = _own_orientation(preview) or orientation
            else:
                preview = io.BytesIO()
                Image.fromarray(thumbnail.data).save(preview, "BMP")
    except MemoryError:
        raise
    except Exception as error:  # an OSError too: LibRaw reads from memory, so it is not about the disk
        cause = error.args[0] if error.args else type(error).__name__
        detail = cause.decode("utf-8", "replace") if isinstance(cause, bytes) else str(cause)
        raise PhotoError(Reason.CORRUPT, f"its preview cannot be read: {detail}") from error
    return images.decode_file(preview, preprocessing, limits, orientation)


def _own_orientation(preview: io.BytesIO) -> int | None:
    """The orientation in the preview's own EXIF; None if it has none.

    LibRaw inserts EXIF with the raw file's orientation into a preview that does not begin with its own, so only the
    last block may be the preview's.
    """
    # Not `Image.open`: the limit on pixels is checked later.
    blocks = [block for name, block in JpegImageFile(preview).applist if name == "APP1" and block[:4] == b"Exif"]
    exif = Image.Exif()
    try:
        exif.load(blocks[-1])
        value = exif.get(ExifTags.Base.Orientation)
    except Exception:  # no EXIF, or broken: the raw file's orientation counts
        return None
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def _is_truncated(content: bytes) -> bool:
    """True if a raw file ends before the data that its headers describe; LibRaw checks only the preview."""
    if content[4:8] == b"ftyp":
        return formats.ends_early(io.BytesIO(content), content[: formats.SIGNATURE_BYTES])
    if content.startswith(b"FUJIFILMCCD-RAW"):
        places = struct.unpack_from(
            ">6I", content.ljust(108, b"\0"), 84
        )  # offset and length of preview, header, sensor data
        return max(map(sum, zip(places[::2], places[1::2], strict=True))) > len(content)
    if not content.startswith(_TIFFS):
        return False
    try:
        return _end_of_pieces(content) > len(content)
    except struct.error:  # a directory, or a list in one, is beyond the end
        return True


def _end_of_pieces(content: bytes) -> int:
    """Where the last piece of picture data in a TIFF ends, in bytes from its start."""
    order = "<" if content[:1] == b"I" else ">"
    waiting, seen, end = [struct.unpack_from(order + "I", content, 4)[0]], set[int](), 0
    while waiting and len(seen) < _MAX_DIRECTORIES:
        directory = waiting.pop()
        if directory in seen:
            continue
        seen.add(directory)
        (count,) = struct.unpack_from(order + "H", content, directory)
        values: dict[int, tuple[int, ...]] = {}
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, length = struct.unpack_from(order + "HHI", content, entry)
            if tag in (_NEXT_DIRECTORIES, *_PIECES, *_PIECES.values()) and kind in (_SHORT, _LONG, _DIRECTORY):
                values[tag] = _numbers(content, order, entry + 8, "H" if kind == _SHORT else "I", length)
        for offsets, lengths in _PIECES.items():
            pieces = zip(values.get(offsets, ()), values.get(lengths, ()), strict=False)
            end = max(end, max(map(sum, pieces), default=0))
        (following,) = struct.unpack_from(order + "I", content, directory + 2 + 12 * count)
        waiting += [offset for offset in (following, *values.get(_NEXT_DIRECTORIES, ())) if offset]
    return end


def _numbers(content: bytes, order: str, offset: int, kind: str, length: int) -> tuple[int, ...]:
    """The values of a directory entry, which are stored elsewhere if they need more than four bytes."""
    layout = struct.Struct(f"{order}{min(length, _MAX_PIECES)}{kind}")
    if layout.size > 4:
        (offset,) = struct.unpack_from(order + "I", content, offset)
    return layout.unpack_from(content, offset)
