"""A HEIC picture that is too large to decode at once, decoded tile by tile.

In: a file whose primary item is a grid of tiles (ISO/IEC 23008-12), as phones write it. Out: the picture, reduced.

libheif decodes a grid only as one picture, which takes 7 bytes per pixel. But each tile is an item of its own: with a
header around it it is a HEIC file, and takes the memory of one tile.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

_UPRIGHT = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
_MAX_META_BYTES, _MAX_TILES = 4_000_000, 4096
_FTYP = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic")


class _File(Protocol):
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the tiles of a picture are, row by row.

    Attributes:
        size: of the picture before it is turned, pixels.
        tile: of each tile, pixels.
        columns: tiles in a row.
        places: offset and length of each tile's data.
        properties: of a tile, the boxes that its decoder needs.
        turns: quarters by which the picture has to be turned, counter-clockwise.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    columns: int
    places: list[tuple[int, int]]
    properties: list[bytes]
    turns: int


def find(file: _File) -> Grid | None:
    """The grid of a HEIC file; None if its picture is none, or has a part that this module does not know."""
    try:
        return _find(file)
    except (struct.error, IndexError, KeyError, ValueError):
        return None


def decode(file: _File, grid: Grid, least_side: float) -> Image.Image:
    """Decode the picture, reduced as far as both of its sides stay that long, and turn it upright.

    Raises:
        Exception: a tile cannot be decoded.
    """
    factor = 1
    while min(grid.size) >= 2 * factor * least_side and not any(side % (2 * factor) for side in grid.tile):
        factor *= 2
    width, height = (side // factor for side in grid.tile)
    rows = len(grid.places) // grid.columns
    picture = Image.new("RGB", (width * grid.columns, height * rows))
    for number, (offset, length) in enumerate(grid.places):
        file.seek(offset)
        with Image.open(io.BytesIO(_file_of(grid, file.read(length))), formats=("HEIF",)) as tile:
            part = tile.convert("RGB").reduce(factor)
        picture.paste(part, (number % grid.columns * width, number // grid.columns * height))
    picture = picture.crop((0, 0, grid.size[0] // factor or 1, grid.size[1] // factor or 1))
    turn = _UPRIGHT[grid.turns]
    return picture if turn is None else picture.transpose(turn)


def _find(file: _File) -> Grid | None:
    meta = _meta(file)
    boxes = dict(_boxes(meta[4:]))
    primary = int.from_bytes(boxes[b"pitm"][4:])
    kinds = dict(_kinds(boxes[b"iinf"]))
    tiles = next((to for kind, of, to in _references(boxes[b"iref"]) if kind == b"dimg" and of == primary), [])
    properties = dict(_properties(boxes[b"iprp"]))
    places = dict(_places(boxes[b"iloc"]))
    method, offset, length = places[primary]
    if method == 1:
        content = boxes[b"idat"][offset : offset + length]
    else:
        file.seek(offset)
        content = file.read(length)
    rows, columns = content[2] + 1, content[3] + 1
    size: tuple[int, int] = struct.unpack_from(">II" if content[1] & 1 else ">HH", content, 4)
    of_grid, of_tile = dict(properties[primary]), dict(properties[tiles[0]])
    known = (
        kinds[primary] == b"grid"
        and all(kinds[tile] == b"hvc1" and properties[tile] == properties[tiles[0]] for tile in tiles)
        and all(places[tile][0] == 0 for tile in tiles)
        and len(tiles) == rows * columns <= _MAX_TILES
        and not {b"imir", b"clap"} & of_grid.keys()
        and not {b"imir", b"clap", b"irot"} & of_tile.keys()
    )
    if not known:
        return None
    tile: tuple[int, int] = struct.unpack_from(">II", of_tile[b"ispe"], 4)
    boxed = [_box(name, body) for name, body in properties[tiles[0]]]
    turns = of_grid.get(b"irot", b"\0")[0] & 3
    return Grid(size, tile, columns, [places[number][1:] for number in tiles], boxed, turns)


def _file_of(grid: Grid, data: bytes) -> bytes:
    """A HEIC file with one tile as its only picture."""
    hdlr = _box(b"hdlr", bytes(8) + b"pict" + bytes(13))
    iinf = _box(b"iinf", struct.pack(">IH", 0, 1) + _box(b"infe", struct.pack(">IHH4sx", 2 << 24, 1, 0, b"hvc1")))
    count = len(grid.properties)
    ipma = _box(b"ipma", struct.pack(">IIHB", 0, 1, 1, count) + bytes(0x80 | index + 1 for index in range(count)))
    iprp = _box(b"iprp", _box(b"ipco", b"".join(grid.properties)) + ipma)
    before = hdlr + _box(b"pitm", struct.pack(">IH", 0, 1)) + iinf + iprp
    start = len(_FTYP) + 12 + len(before) + 30 + 8  # and the header of `meta`, `iloc`, and the header of `mdat`
    iloc = _box(b"iloc", struct.pack(">IHHHHHII", 0, 0x4400, 1, 1, 0, 1, start, len(data)))
    return _FTYP + _box(b"meta", bytes(4) + before + iloc) + _box(b"mdat", data)


def _meta(file: _File) -> bytes:
    position = 0
    while True:
        file.seek(position)
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"meta" and 8 <= length <= _MAX_META_BYTES:
            return file.read(length - 8)
        if length < 8:
            raise ValueError
        position += length


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, name) + body


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position < len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        if length < 8:
            raise ValueError
        yield name, content[position + 8 : position + length]
        position += length


def _kinds(iinf: bytes) -> Iterator[tuple[int, bytes]]:
    for _, infe in _boxes(iinf[6 if iinf[0] == 0 else 8 :]):
        layout = ">4xH2x4s" if infe[0] == 2 else ">4xI2x4s"
        number, kind = struct.unpack_from(layout, infe)
        yield number, kind


def _references(iref: bytes) -> Iterator[tuple[bytes, int, list[int]]]:
    kind = "I" if iref[0] else "H"
    for name, body in _boxes(iref[4:]):
        of, count = struct.unpack_from(f">{kind}H", body)
        yield name, of, list(struct.unpack_from(f">{count}{kind}", body, struct.calcsize(f">{kind}H")))


def _properties(iprp: bytes) -> Iterator[tuple[int, list[tuple[bytes, bytes]]]]:
    boxes = dict(_boxes(iprp))
    known, ipma = [*_boxes(boxes[b"ipco"])], boxes[b"ipma"]
    number_kind, index_kind = ("I" if ipma[0] else "H"), ("H" if ipma[3] & 1 else "B")
    (count,), position = struct.unpack_from(">I", ipma, 4), 8
    for _ in range(count):
        number, length = struct.unpack_from(f">{number_kind}B", ipma, position)
        position += struct.calcsize(f">{number_kind}B")
        indices = struct.unpack_from(f">{length}{index_kind}", ipma, position)
        position += struct.calcsize(f">{length}{index_kind}")
        yield number, [known[(index & (0x7FFF if index_kind == "H" else 0x7F)) - 1] for index in indices]


def _places(iloc: bytes) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Construction method, offset and length of each item in one piece."""
    version, position = iloc[0], 4
    sizes = iloc[4] >> 4, iloc[4] & 15, iloc[5] >> 4, (iloc[5] & 15) * (version > 0)

    def number(length: int) -> int:
        nonlocal position
        position += length
        return int.from_bytes(iloc[position - length : position])

    position = 6
    for _ in range(number(4 if version == 2 else 2)):
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        number(2)  # the file itself
        base, extents = number(sizes[2]), number(2)
        pieces = []
        for _ in range(extents):
            number(sizes[3])
            pieces.append((base + number(sizes[0]), number(sizes[1])))
        if len(pieces) == 1:
            yield item, (method, *pieces[0])
