"""Generated raw files: previews and sensor data in the directories of a TIFF."""

import struct
from collections.abc import Sequence

from PIL import Image

_BYTE, _ASCII, _SHORT, _LONG, _RATIONAL, _SIGNED = 1, 2, 3, 4, 5, 10
_LETTERS = {_BYTE: "B", _ASCII: "B", _SHORT: "H", _LONG: "I", _RATIONAL: "I", _SIGNED: "i"}
_SIDE = 64

Entries = dict[int, tuple[int, Sequence[int]]]


def dng(*previews: bytes, orientation: int = 1, bitmap: Image.Image | None = None, order: str = "<") -> bytes:
    """A valid DNG, laid out as cameras do: the sensor data is at the end.

    Args:
        previews: JPEGs, each in its own directory.
        orientation: of the raw file, EXIF's number.
        bitmap: an uncompressed preview, in the first directory.
        order: byte order in the notation of `struct`.
    """
    values = struct.pack(f"{order}{_SIDE * _SIDE}H", *(position * 37 % 4096 for position in range(_SIDE * _SIDE)))
    length = len(_without_values(previews, orientation, bitmap, order, 0))
    return _without_values(previews, orientation, bitmap, order, length) + values


def _without_values(
    previews: tuple[bytes, ...], orientation: int, bitmap: Image.Image | None, order: str, values_at: int
) -> bytes:
    content = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))

    def put(piece: bytes) -> int:
        content.extend(bytes(len(content) % 2) + piece)
        return len(content) - len(piece)

    def directory(entries: Entries) -> int:
        listed = b""
        for tag, (kind, numbers) in sorted(entries.items()):
            value = struct.pack(f"{order}{len(numbers)}{_LETTERS[kind]}", *numbers)
            count = len(numbers) // (2 if kind in (_RATIONAL, _SIGNED) else 1)
            where = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", put(value))
            listed += struct.pack(f"{order}HHI", tag, kind, count) + where
        return put(struct.pack(f"{order}H", len(entries)) + listed + bytes(4))

    def picture(size: tuple[int, int], at: int, length: int, compression: int, photometric: int) -> Entries:
        return {
            254: (_LONG, [1]),  # a smaller version of the picture
            256: (_LONG, [size[0]]),
            257: (_LONG, [size[1]]),
            258: (_SHORT, [8, 8, 8]),
            259: (_SHORT, [compression]),
            262: (_SHORT, [photometric]),
            273: (_LONG, [at]),
            277: (_SHORT, [3]),
            278: (_LONG, [size[1]]),
            279: (_LONG, [length]),
        }

    inner = []
    for number, preview in enumerate(previews):
        size = (96 * (number + 1), 64 * (number + 1))
        inner.append(directory(picture(size, put(preview), len(preview), compression=7, photometric=6)))
    sensor = picture((_SIDE, _SIDE), values_at, _SIDE * _SIDE * 2, compression=1, photometric=32803)
    sensor |= {254: (_LONG, [0]), 258: (_SHORT, [16]), 277: (_SHORT, [1]), 50717: (_LONG, [4095])}
    sensor |= {33421: (_SHORT, [2, 2]), 33422: (_BYTE, [0, 1, 1, 2])}  # a Bayer pattern
    first: Entries = {}
    if bitmap is not None:
        pixels = bitmap.tobytes()
        first = picture(bitmap.size, put(pixels), len(pixels), compression=1, photometric=2)
    first |= {
        254: (_LONG, [1]),
        271: (_ASCII, b"Acme\0"),
        272: (_ASCII, b"Catcam 1\0"),
        274: (_SHORT, [orientation]),
        330: (_LONG, [*inner, directory(sensor)]),
        50706: (_BYTE, [1, 4, 0, 0]),
        50708: (_ASCII, b"Acme Catcam 1\0"),
        50721: (_SIGNED, [1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1]),
        50728: (_RATIONAL, [1, 2, 1, 1, 1, 2]),
        50778: (_SHORT, [21]),
    }
    struct.pack_into(f"{order}I", content, 4, directory(first))
    return bytes(content)
