"""TIFFs with samples that Pillow cannot read, or reads wrongly.

These are floats of 16 and 64 bits or in colour, 32-bit integers, 16 bits in planes or with alpha, big-endian BigTIFF.

In: a file. Out: its first page with 8 bits per channel; the range of its values is chosen as for Pillow's greys.

Strips or tiles are read one at a time and twice, first for the range. They may be uncompressed or deflated. numpy is
imported for the first such file: no other needs it.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import numpy.typing as npt

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS = 256, 257, 258, 259, 262, 273
_ORIENTATION, _SAMPLES, _ROWS, _STRIP_LENGTHS, _PLANES, _PREDICTOR = 274, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_LENGTHS, _EXTRA, _FORMAT, _PROFILE = 322, 323, 324, 325, 338, 339, 34675
_TYPES = {1: "B", 3: "H", 4: "I", 7: "B", 13: "I", 16: "Q"}
_MAX_ENTRIES, _MAX_VALUES, _MAX_BLOCK_BYTES = 500, 4_000_000, 400_000_000
_BAND_SAMPLES = 4_000_000
_UNCOMPRESSED, _DEFLATE = (1,), (8, 32946)
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_FORMATS = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}

Range = Callable[[bool, float, float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a page is stored.

    Attributes:
        size: width and height, pixels.
        block: width and height of a strip or tile, pixels.
        samples: per pixel; the first `colors` of them are grey or RGB.
        kind: numpy's name of a sample's type, with its byte order.
        is_white_zero: whether 0 is white, in a grey.
        alpha: Pillow's name of the mode with alpha; empty without.
    """

    order: str
    size: tuple[int, int]
    block: tuple[int, int]
    samples: int
    colors: int
    kind: str
    is_planar: bool
    is_deflated: bool
    predictor: int
    places: list[tuple[int, int]]
    is_white_zero: bool
    alpha: str
    orientation: int
    profile: bytes | None


def find(file: io.BufferedIOBase) -> Layout | None:
    """The layout of a TIFF that has to be read here; None for every other file."""
    try:
        return _find(file)
    except (struct.error, IndexError, KeyError, ValueError):
        return None


def decode(file: io.BufferedIOBase, layout: Layout, black_and_white: Range) -> Image.Image:
    """Read the page as L, RGB, RGBA or RGBa.

    Args:
        file: of the layout.
        layout: from `find`.
        black_and_white: the values of both, from whether they are floats, the lowest, the highest and the mean.

    Raises:
        EOFError: the file ends early.
        zlib.error: it is corrupt.
    """
    import numpy as np

    exact = np.float64 if layout.kind[2:] in ("4", "8") and layout.kind[1:] != "f4" else np.float32
    low, high, total, count = math.inf, -math.inf, 0.0, 0
    for _, _, block in _bands(file, layout):
        colors = block[..., : layout.colors].astype(exact)
        if not (finite := np.isfinite(colors)).all():
            colors = colors[finite]
        if colors.size:
            low, high = min(low, float(colors.min())), max(high, float(colors.max()))
            total, count = total + float(colors.sum(dtype=np.float64)), count + colors.size
    is_float = layout.kind[1] == "f"
    opaque = 1.0 if is_float else float(np.iinfo(layout.kind).max)
    if layout.kind[1:] == "u1" or (layout.kind[1:] == "u2" and layout.colors == 3):  # as Pillow reads them
        black, white = 0.0, opaque
    else:
        black, white = black_and_white(is_float, low, high, total / (count or 1))
    if layout.is_white_zero:
        black, white = white, black
    width, height = layout.size
    pixels = np.zeros((height, width, layout.colors + bool(layout.alpha)), np.uint8)
    for x, y, block in _bands(file, layout):
        values = np.nan_to_num(block.astype(exact), posinf=white, neginf=black)
        colors = (values[..., : layout.colors] - black) * (255 / ((white - black) or 1.0))
        if layout.alpha:
            colors = np.concatenate([colors, values[..., layout.colors :][..., :1] * (255 / opaque)], axis=-1)
        part = pixels[y : y + block.shape[0], x : x + block.shape[1]]  # tiles reach beyond the picture
        part[...] = np.clip(colors, 0, 255)[: part.shape[0], : part.shape[1]]
    mode = layout.alpha or ("RGB" if layout.colors == 3 else "L")
    picture = Image.frombytes(mode, layout.size, pixels.tobytes())
    if layout.profile:
        picture.info["icc_profile"] = layout.profile
    return picture


def _find(file: io.BufferedIOBase) -> Layout | None:
    tags, order, is_big = _tags(file)
    bits, samples, photometric = tags.get(_BITS, (1,)), tags.get(_SAMPLES, (1,))[0], tags[_PHOTOMETRIC][0]
    kind = tags.get(_FORMAT, (_UNSIGNED,))[0]
    is_planar = tags.get(_PLANES, (1,))[0] == 2 and samples > 1
    strange = (
        (kind == _FLOAT and (bits[0], samples) != (32, 1))
        or (bits[0] == 32 and kind != _FLOAT and (kind == _UNSIGNED or samples > 1))
        or (bits[0] == 16 and (is_planar or samples == 2))
        or (is_big and order == ">")
    )
    colors, predictor = (3 if photometric == 2 else 1), tags.get(_PREDICTOR, (1,))[0]
    compression = tags.get(_COMPRESSION, (1,))[0]
    known = (
        photometric in (0, 1, 2)
        and bits[0] in ((16, 32, 64) if kind == _FLOAT else (8, 16, 32))
        and set(bits) == {bits[0]}
        and set(tags.get(_FORMAT, (kind,))) == {kind}
        and kind in _FORMATS
        and colors <= samples <= 8
        and compression in (*_UNCOMPRESSED, *_DEFLATE)
        and predictor in (1, 2, 3)
    )
    if not (strange and known):
        return None
    size = tags[_WIDTH][0], tags[_HEIGHT][0]
    if _TILES in tags:
        block, places = (
            (tags[_TILE_WIDTH][0], tags[_TILE_HEIGHT][0]),
            zip(tags[_TILES], tags[_TILE_LENGTHS], strict=True),
        )
    else:
        block = size[0], min(tags.get(_ROWS, (size[1],))[0], size[1])
        places = zip(tags[_STRIPS], tags[_STRIP_LENGTHS], strict=True)
    expected = math.ceil(size[0] / block[0]) * math.ceil(size[1] / block[1]) * (samples if is_planar else 1)
    found = [*places]
    if len(found) != expected or block[0] * block[1] * samples * bits[0] // 8 > _MAX_BLOCK_BYTES:
        return None
    extra = tags.get(_EXTRA, (0,))[0] if samples > colors else 0
    alpha = {1: "RGBa" if colors == 3 else "La", 2: "RGBA" if colors == 3 else "LA"}.get(extra, "")
    return Layout(
        order,
        size,
        block,
        samples,
        colors,
        f"{order}{_FORMATS[kind]}{bits[0] // 8}",
        is_planar,
        compression in _DEFLATE,
        predictor,
        found,
        photometric == 0,
        alpha,
        tags.get(_ORIENTATION, (1,))[0],
        bytes(tags[_PROFILE]) if _PROFILE in tags else None,
    )


def _tags(file: io.BufferedIOBase) -> tuple[dict[int, tuple[int, ...]], str, bool]:
    """The tags of the first page that hold integers, the byte order, and whether it is a BigTIFF."""
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}[head[:2]]
    is_big = struct.unpack_from(order + "H", head, 2)[0] == 43
    counted, entry, offset = ("Q", "HHQ8s", 8) if is_big else ("H", "HHI4s", 4)
    wide = "Q" if is_big else "I"
    file.seek(struct.unpack_from(order + wide, head, offset)[0])
    (count,) = struct.unpack(order + counted, file.read(struct.calcsize(order + counted)))
    layout = struct.Struct(order + entry)
    entries = file.read(layout.size * min(count, _MAX_ENTRIES))
    tags: dict[int, tuple[int, ...]] = {}
    for tag, kind, length, value in layout.iter_unpack(entries):
        if kind in _TYPES and length <= _MAX_VALUES:
            values = struct.Struct(f"{order}{length}{_TYPES[kind]}")
            if values.size > len(value):
                file.seek(struct.unpack(order + wide, value)[0])
                value = file.read(values.size)
            tags[tag] = values.unpack(value[: values.size])
    return tags, order, is_big


def _bands(file: io.BufferedIOBase, layout: Layout) -> Iterator[tuple[int, int, "npt.NDArray[Any]"]]:
    """The same as `_blocks`, a few rows at a time: some programs write a picture as one strip."""
    for x, y, block in _blocks(file, layout):
        rows = max(1, _BAND_SAMPLES // (block.shape[1] * layout.samples))
        for top in range(0, block.shape[0], rows):
            yield x, y + top, block[top : top + rows]


def _blocks(file: io.BufferedIOBase, layout: Layout) -> Iterator[tuple[int, int, "npt.NDArray[Any]"]]:
    """Left and top of each strip or tile, and its samples (height, width, samples)."""
    import numpy as np

    across = math.ceil(layout.size[0] / layout.block[0])
    count = len(layout.places) // (layout.samples if layout.is_planar else 1)
    for number in range(count):
        x, y = number % across * layout.block[0], number // across * layout.block[1]
        # The last strip is as high as what is left of the picture; tiles are padded.
        height = min(layout.block[1], layout.size[1] - y) if layout.block[0] == layout.size[0] else layout.block[1]
        if layout.is_planar:
            planes = [_block(file, layout, plane * count + number, height, 1) for plane in range(layout.samples)]
            yield x, y, np.concatenate(planes, axis=-1)
        else:
            yield x, y, _block(file, layout, number, height, layout.samples)


def _block(file: io.BufferedIOBase, layout: Layout, number: int, height: int, samples: int) -> "npt.NDArray[Any]":
    import numpy as np

    kind, width = np.dtype(layout.kind), layout.block[0]
    wanted = width * height * samples * kind.itemsize
    offset, length = layout.places[number]
    file.seek(offset)
    data = file.read(min(length, _MAX_BLOCK_BYTES))
    if layout.is_deflated:
        data = zlib.decompressobj().decompress(data, wanted)
    if len(data) < wanted:
        raise EOFError(f"a strip has {len(data)} bytes instead of {wanted}")
    if layout.predictor == 3:  # differences of bytes, the most significant bytes of a row first (Adobe TechNote 3)
        rows = np.frombuffer(data[:wanted], np.uint8).reshape(height, -1, samples)
        summed = np.cumsum(rows, axis=1, dtype=np.uint8).reshape(height, kind.itemsize, width * samples)
        values = np.ascontiguousarray(summed.transpose(0, 2, 1)).view(f">f{kind.itemsize}")
        return values.reshape(height, width, samples)
    values = np.frombuffer(data[:wanted], kind).reshape(height, width, samples)
    if layout.predictor == 2:
        integers = values.view(f"{layout.order}u{kind.itemsize}")
        return np.cumsum(integers, axis=1, dtype=integers.dtype).view(kind)
    return values
