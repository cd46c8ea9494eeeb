"""Generated picture files: one of every supported format, and some with false headers."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, features

Color = tuple[int, int, int]

BRICK: Color = (200, 60, 30)
HAS_AVIF = "avif" in features.get_supported()

# EXIF orientation -> how the stored picture differs from the upright one.
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file of one of Pillow's formats."""
    buffer = io.BytesIO()
    picture.copy().save(buffer, kind, **options)  # saving changes the object, which the next format may stumble over
    return buffer.getvalue()


def plain(color: Color = BRICK, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, color)


def smooth(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture with some content, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def ramp() -> Image.Image:
    """A 16-bit grey gradient, from black on the left to half of white on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 32767, 64).astype(np.uint16), (48, 1)))


def quarters() -> Image.Image:
    """A wide picture with a different colour in each corner, so that every orientation looks different."""
    picture = Image.new("RGB", (96, 64))
    for corner, color in {(0, 0): "red", (48, 0): "lime", (0, 32): "blue", (48, 32): "white"}.items():
        picture.paste(color, (*corner, corner[0] + 48, corner[1] + 32))
    return picture


def turned(kind: str, orientation: int) -> bytes:
    """`quarters` as a camera stores it: the pixels turned, with the orientation in EXIF."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = quarters()
    stored = picture.transpose(_STORED[orientation]) if orientation in _STORED else picture
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 95},
    }
    return encoded(stored, kind, exif=exif, **options.get(kind, {}))


def every_format() -> dict[str, tuple[bytes, Color]]:
    """A file of each kind and its mean colour. Animated ones continue with a blue frame."""
    brick, grey = plain(), Image.new("L", (64, 48), 130)
    half = brick.copy()
    half.putalpha(128)
    files: dict[str, tuple[bytes, Color]] = {
        "jpeg-rgb": (encoded(brick, "JPEG", quality=95), BRICK),
        "jpeg-cmyk": (encoded(brick.convert("CMYK"), "JPEG", quality=95), BRICK),
        "jpeg-grey": (encoded(grey, "JPEG"), (130, 130, 130)),
        "jpeg-progressive": (encoded(brick, "JPEG", quality=95, progressive=True), BRICK),
        "jpeg-mpo": (encoded(brick, "MPO", quality=95, **_followed_by_blue()), BRICK),
        "png-rgb": (encoded(brick, "PNG"), BRICK),
        "png-palette": (encoded(brick.quantize(8), "PNG"), BRICK),
        "png-grey-16": (encoded(ramp(), "PNG"), (63, 63, 63)),
        "png-alpha": (encoded(half, "PNG"), (227, 157, 142)),
        "png-animated": (encoded(brick, "PNG", **_followed_by_blue()), BRICK),
        "webp": (encoded(brick, "WEBP", quality=95), BRICK),
        "webp-lossless": (encoded(brick, "WEBP", lossless=True), BRICK),
        "gif": (encoded(brick, "GIF"), BRICK),
        "gif-animated": (encoded(brick, "GIF", **_followed_by_blue()), BRICK),
        "bmp": (encoded(brick, "BMP"), BRICK),
        "tiff": (encoded(brick, "TIFF"), BRICK),
        "tiff-lzw": (encoded(brick, "TIFF", compression="tiff_lzw"), BRICK),
        "tiff-pages": (encoded(brick, "TIFF", **_followed_by_blue()), BRICK),
    }
    files["heic"] = (encoded(brick, "HEIF", quality=95), BRICK)
    if HAS_AVIF:
        files["avif"] = (encoded(brick, "AVIF", quality=95), BRICK)
    return files


def _followed_by_blue() -> dict[str, Any]:
    return {"save_all": True, "append_images": [plain((0, 0, 255))]}


def claiming(kind: str, width: int, height: int) -> bytes:
    """A small file whose header claims that size."""
    content = bytearray(encoded(plain(), kind))
    if kind == "PNG":
        struct.pack_into(">II", content, 16, width, height)
        struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    elif kind == "JPEG":
        struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, height, width)
    elif kind == "GIF":
        struct.pack_into("<HH", content, 6, width, height)
    elif kind == "BMP":
        struct.pack_into("<ii", content, 18, width, height)
    else:
        raise NotImplementedError(kind)
    return bytes(content)


def tinted(color: tuple[int, int, int], seed: int) -> bytes:
    """A pattern in shades of one colour, different for each seed."""
    noise = np.random.default_rng(seed).random((6, 6, 1)) * np.array(color)
    buffer = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def tiff(
    values: npt.NDArray[Any],
    *,
    big: bool = False,
    planar: bool = False,
    deflate: bool = False,
    predictor: int = 1,
    tile: int = 0,
    rows: int = 7,
    alpha: int = 0,
    **tags: int,
) -> bytes:
    """A TIFF of samples (height, width, channels) of any type, in strips or tiles.

    Args:
        alpha: 1 if the last channel is alpha that the colours are multiplied with, 2 if it is other alpha.
        tags: more of them, such as `t262=0`.
    """
    height, width, samples = values.shape
    kind = values.dtype
    order = ">" if kind.byteorder == ">" else "<"
    across, down = (tile, tile) if tile else (width, rows)
    padded = np.pad(values, ((0, -height % tile if tile else 0), (0, -width % across), (0, 0)))
    planes = [padded[..., n : n + 1] for n in range(samples)] if planar else [padded]
    pieces = [
        _piece(plane[y : y + down, x : x + across], order, deflate, predictor)
        for plane in planes
        for y in range(0, padded.shape[0], down)
        for x in range(0, padded.shape[1], across)
    ]
    head = 16 if big else 8
    places = [head + sum(map(len, pieces[:n])) for n in range(len(pieces))]
    sizes = list(map(len, pieces))
    found: dict[int, list[int]] = {
        256: [width],
        257: [height],
        258: [8 * kind.itemsize] * samples,
        259: [8 if deflate else 1],
        262: [2 if samples >= 3 else 1],
        277: [samples],
        284: [2 if planar else 1],
        317: [predictor],
        339: [{"u": 1, "i": 2, "f": 3}[kind.kind]] * samples,
    }
    found |= {322: [tile], 323: [tile], 324: places, 325: sizes} if tile else {273: places, 278: [rows], 279: sizes}
    found |= {338: [alpha]} if alpha else {}
    found |= {int(name[1:]): [value] for name, value in tags.items()}
    start = head + sum(sizes)
    wide, counted = ("Q", "Q") if big else ("I", "H")
    after = start + struct.calcsize("=" + counted) + len(found) * (20 if big else 12) + struct.calcsize("=" + wide)
    entries, more = b"", b""
    for tag, numbers in sorted(found.items()):
        content = struct.pack(f"{order}{len(numbers)}I", *numbers)
        room = 8 if big else 4
        entries += struct.pack(f"{order}HH{wide}", tag, 4, len(numbers))
        entries += content.ljust(room, b"\0") if len(content) <= room else struct.pack(order + wide, after + len(more))
        more += content if len(content) > room else b""
    mark = b"MM" if order == ">" else b"II"
    first = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, start) if big else (42, start)))
    directory = struct.pack(order + counted, len(found)) + entries + bytes(8 if big else 4)
    return mark + first + b"".join(pieces) + directory + more


def _piece(values: npt.NDArray[Any], order: str, deflate: bool, predictor: int) -> bytes:
    """A strip or tile, with the differences of a predictor."""
    if predictor == 2:
        integers = values.view(f"{order}u{values.dtype.itemsize}")
        values = np.diff(integers, axis=1, prepend=np.zeros_like(integers[:, :1])).astype(integers.dtype)
    content = values.tobytes()
    if predictor == 3:
        size, (height, width, samples) = values.dtype.itemsize, values.shape
        parts = values.astype(f">f{size}").view(np.uint8).reshape(height, width * samples, size).transpose(0, 2, 1)
        rows = parts.reshape(height, -1, samples)
        content = np.diff(rows, axis=1, prepend=np.zeros_like(rows[:, :1])).astype(np.uint8).tobytes()
    return zlib.compress(content) if deflate else content
