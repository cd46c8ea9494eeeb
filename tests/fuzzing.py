"""A seeded fuzzer of pictures that knows the formats well enough to get past their headers.

`mutant(seed, sources)` gives the same bytes for the same seed and sources. Format-specific mutations
know where dimensions, counts, sizes and checksums are; the others flip, cut and repeat bytes.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from pictures import HAS_AVIF, encoded, every_format, smooth, turned
from PIL import Image

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
SIDES = (0, 1, 3, 255, 4000, 9999, 10_000, 15_000, 16_383, 32_767, 65_500, 65_535, 1_000_000, 0x7FFFFFFF)
_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "AVIF": ".avif",
    "HEIF": ".heic",
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file to sort.

    Attributes:
        source: the name of the original file.
        mutations: in order.
        name: unique for each seed.
    """

    seed: int
    source: str
    mutations: tuple[str, ...]
    name: str
    content: bytes

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.source}, {' then '.join(self.mutations)}"


def generated() -> dict[str, bytes]:
    """Pictures with some content, in every supported format."""
    files = {f"made-{name}": content for name, (content, _) in every_format().items()}
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "HEIF", *(["AVIF"] if HAS_AVIF else [])):
        files[f"smooth-{kind}"] = encoded(smooth(1, (160, 120)), kind)
        if kind in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
            files[f"turned-{kind}"] = turned(kind, 6)
    picture, alpha = smooth(2, (160, 120)), smooth(3, (160, 120)).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize((160, 120)))
    frames = {"save_all": True, "append_images": [smooth(n, (160, 120)) for n in range(4, 8)]}
    files["smooth-progressive"] = encoded(picture, "JPEG", progressive=True, subsampling=0)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"smooth-{compression}"] = encoded(picture, "TIFF", compression=compression)
    files["smooth-group4"] = encoded(picture.convert("1"), "TIFF", compression="group4")
    for kind in ("PNG", "WEBP", "TIFF"):
        files[f"alpha-{kind}"] = encoded(alpha, kind)
        files[f"frames-{kind}"] = encoded(picture, kind, **frames)
    files["frames-GIF"] = encoded(picture, "GIF", **frames)
    return files


def from_shared(data: Path, photos: int) -> dict[str, bytes]:
    """Files broken in the wild, and an even selection of real photos."""
    paths = sorted(path for path in (data / "bad").iterdir() if path.is_file())
    real = sorted((data / "photos").glob("*.jpg"))
    paths += real[:: max(1, len(real) // photos)][:photos]
    return {path.name: path.read_bytes() for path in paths}


def mutant(seed: int, sources: dict[str, bytes]) -> Mutant:
    """Mutate one of the files one to three times."""
    random = Random(seed)
    source = random.choice(sorted(sources))
    content, mutations = sources[source], []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        choices = _GENERAL if random.random() < 0.4 else _BY_FORMAT.get(kind_of(content) or "", _GENERAL)
        mutate = random.choice(choices)
        mutations.append(mutate.__name__.strip("_"))
        try:
            content = _swap_header(random, content, sources) if mutate is _swap_header else mutate(random, content)
        except (struct.error, IndexError, ValueError):  # an earlier mutation destroyed that structure
            content = _flip_bits(random, content or b"\0")
    own = _SUFFIXES.get(kind_of(sources[source]) or "", ".jpg")
    suffix = random.choices((own, random.choice(sorted(_SUFFIXES.values())), "", ".txt"), (90, 6, 3, 1))[0]
    return Mutant(seed, source, tuple(mutations), f"mutant-{seed}{suffix}", content)


def kind_of(content: bytes) -> str | None:
    """The format according to a file's first bytes."""
    starts = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    for start, kind in starts.items():
        if content.startswith(start):
            return kind
    if content[:4] == b"RIFF":
        return "WEBP"
    if content[4:8] == b"ftyp":
        return "AVIF" if b"avif" in content[8:64] else "HEIF"
    return None


def _span(random: Random, content: bytes, longest: int = 4096) -> tuple[int, int]:
    start = random.randrange(len(content))
    return start, min(len(content), start + random.randint(1, longest))


def _truncate(random: Random, content: bytes) -> bytes:
    return content[: random.choice((random.randrange(len(content)), random.randrange(min(64, len(content)) + 1)))]


def _flip_bits(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    near = len(changed) if random.random() < 0.5 else min(len(changed), 512)
    for _ in range(random.choice((1, 2, 8, 64))):
        changed[random.randrange(near)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _repeated(random: Random, block: bytes, *times: int) -> bytes:
    """A block repeated, but no larger than a large photo."""
    return block * min(random.choice(times), 4_000_000 // max(1, len(block)))


@cache
def _compressed_zeros(length: int) -> bytes:
    return zlib.compress(bytes(length), 1)


def _extreme_number(random: Random, content: bytes) -> bytes:
    changed, size = bytearray(content), random.choice("BHI")
    at = random.randrange(max(1, min(len(changed), random.choice((64, 512, 1 << 30))) - 4))
    mask = (1 << 8 * struct.calcsize(size)) - 1
    struct.pack_into(random.choice("<>") + size, changed, at, random.choice(EXTREMES) & mask)
    return bytes(changed)


def _swap_header(random: Random, content: bytes, sources: dict[str, bytes] | None = None) -> bytes:
    assert sources is not None
    other = sources[random.choice(sorted(sources))]
    length = random.choice((4, 8, 12, 16, 32, 64, 200, 600))
    return other[:length] + content[random.choice((0, length)) :]


def _insert(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    block = random.choice((random.randbytes(random.randint(1, 4096)), bytes(random.randint(1, 100_000))))
    return content[:at] + block + content[at:]


def _delete(random: Random, content: bytes) -> bytes:
    start, end = _span(random, content)
    return content[:start] + content[end:]


def _repeat(random: Random, content: bytes) -> bytes:
    start, end = _span(random, content)
    return content[:end] + _repeated(random, content[start:end], 1, 2, 20) + content[end:]


def _zero(random: Random, content: bytes) -> bytes:
    start, end = _span(random, content)
    return content[:start] + bytes(end - start) + content[end:]


def _damaged_exif(random: Random) -> bytes:
    """A TIFF directory with invalid entries: types, counts and offsets that point out of the file or into itself."""
    order, mark = random.choice((("<", b"II*\0"), (">", b"MM\0*")))
    entries = b""
    for _ in range(number := random.choice((1, 3, 12))):
        tag = random.choice((0x0112, 0x0112, 0x8769, 0x8825, 0xA005, 0x011A, 0x0201, 0x927C, random.randrange(65536)))
        value = random.choice((*EXTREMES, 3, 6, 8, 9, 10, random.randrange(200)))
        entries += struct.pack(
            order + "HHII", tag, random.choice((0, 1, 2, 3, 4, 5, 7, 9, 10, 12, 13, 99)), random.choice(EXTREMES), value
        )
    counted = random.choice((number, number, 0, 65535))
    first = random.choice((8, 8, 8, 0, 7, 0xFFFFFFFF))
    last = struct.pack(order + "I", random.choice((0, 8, 0xFFFFFFFF)))
    return mark + struct.pack(order + "IH", first, counted) + entries + last


def _damaged_profile(random: Random) -> bytes:
    size = random.choice((0, 100, 128, 200, 3000))
    profile = bytearray(random.randbytes(size))
    if size >= 128:
        struct.pack_into(">I", profile, 0, random.choice((size, 0, 0xFFFFFFFF)))
        profile[36:40] = b"acsp"
    return bytes(profile)


def _segments(content: bytes) -> list[tuple[int, bytes]]:
    """The marker segments before the first scan; the last one, with marker 0, is the rest of the file."""
    found, at = [], 2
    while content[at] == 0xFF and content[at + 1] != 0xDA:
        length = struct.unpack_from(">H", content, at + 2)[0]
        found.append((content[at + 1], content[at + 4 : at + 2 + length]))
        at += 2 + length
    return [*found, (0, content[at:])]


def _jpeg(segments: list[tuple[int, bytes]]) -> bytes:
    parts = [struct.pack(">BBH", 0xFF, m, min(65535, len(b) + 2)) + b if m else b for m, b in segments]
    return b"\xff\xd8" + b"".join(parts)


def _jpeg_size(random: Random, content: bytes) -> bytes:
    changed = [
        (m, b[:1] + struct.pack(">HH", random.choice(SIDES) & 0xFFFF, random.choice(SIDES) & 0xFFFF) + b[5:])
        if m in (0xC0, 0xC1, 0xC2)
        else (m, b)
        for m, b in _segments(content)
    ]
    return _jpeg(changed)


def _jpeg_segment(random: Random, content: bytes) -> bytes:
    segments = _segments(content)
    at = random.randrange(max(1, len(segments) - 1))
    marker, body = segments[at]
    change = random.randrange(5)
    if change == 0:
        segments[at] = (marker, _flip_bits(random, body))
    elif change == 1:
        del segments[at]
    elif change == 2:
        segments.insert(at, segments[at])
    elif change == 3:
        segments[at] = (random.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xDB, 0xC4, 0xDD, 0xE0, 0xEE)), body)
    else:
        segments[at] = (marker, body[: random.randrange(len(body) + 1)])
    return _jpeg(segments)


def _jpeg_metadata(random: Random, content: bytes) -> bytes:
    exif = (0xE1, b"Exif\0\0" + _damaged_exif(random))
    numbers = bytes((random.randrange(4), random.randrange(4)))
    profile = (0xE2, b"ICC_PROFILE\0" + numbers + _damaged_profile(random))
    pages = (0xE2, b"MPF\0" + _damaged_exif(random))
    return _jpeg([random.choice((exif, exif, profile, pages)), *_segments(content)])


def _jpeg_scans(random: Random, content: bytes) -> bytes:
    """A progressive JPEG may have any number of scans, each of which costs a pass over all pixels."""
    start = content.rindex(b"\xff\xda")
    return content[:-2] + _repeated(random, content[start:-2], 1, 10, 100, 1000) + content[-2:]


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        found.append((kind, content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Chunks with correct checksums, so that decoders read their invalid contents."""
    packed = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _png_header(random: Random, content: bytes) -> bytes:
    chunks = _chunks(content)
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    if random.random() < 0.6:
        width, height = random.choice((*SIDES, width)), random.choice((*SIDES, height))
    else:
        rest[random.choice((0, 1, 4))] = random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", width, height, *rest))
    return _png(chunks)


def _png_chunk(random: Random, content: bytes) -> bytes:
    chunks = _chunks(content)
    at = random.randrange(len(chunks))
    kind, body = chunks[at]
    change = random.randrange(5)
    if change == 0:
        chunks[at] = (kind, _flip_bits(random, body))
    elif change == 1:
        del chunks[at]
    elif change == 2:
        chunks[at:at] = [chunks[at]] * min(random.choice((1, 1000)), 4_000_000 // max(1, len(body)))
    elif change == 3:
        random.shuffle(chunks)
    else:
        chunks[at] = (kind, body[: random.randrange(len(body) + 1)])
    return _png(chunks)


def _png_metadata(random: Random, content: bytes) -> bytes:
    chunks = _chunks(content)
    profile = random.choice((zlib.compress(_damaged_profile(random)), _compressed_zeros(30_000_000)))
    added = random.choice(
        (
            (b"eXIf", _damaged_exif(random)),
            (b"iCCP", b"profile\0\0" + profile),
            (b"zTXt", b"Comment\0\0" + _compressed_zeros(30_000_000)),
            (b"tRNS", random.randbytes(random.choice((0, 1, 2, 6, 300)))),
            (b"PLTE", random.randbytes(random.choice((0, 3, 5, 768, 3000)))),
            (b"pHYs", struct.pack(">IIB", random.choice(EXTREMES), 0, 1)),
        )
    )
    return _png([chunks[0], added, *chunks[1:]])


def _png_bomb(random: Random, content: bytes) -> bytes:
    """Far more pixel data than the header declares, or just as much as is allowed."""
    chunks = [c for c in _chunks(content) if c[0] != b"IDAT"]
    pixels = _compressed_zeros(random.choice((1000, 30_000_000)))
    if random.random() < 0.3:
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", random.choice((6000, 9000)), 6000, 8, 0, 0, 0, 0))
    return _png([*chunks[:-1], (b"IDAT", pixels), chunks[-1]])


def _png_frames(random: Random, content: bytes) -> bytes:
    chunks = _chunks(content)
    count = (b"acTL", struct.pack(">II", random.choice(EXTREMES), random.choice(EXTREMES)))
    sides = [random.choice((*SIDES, 64, 48)) for _ in range(4)]
    frame = (b"fcTL", struct.pack(">IIIIIHHBB", random.choice((0, 7)), *sides, 1, 0, random.randrange(4), 1))
    return _png([chunks[0], count, frame, *(c for c in chunks[1:] if c[0] != b"acTL")])


def _gif_size(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    places = [6, *(at + 1 for at in range(13, len(content)) if content[at] == 0x2C)][:40]
    at = random.choice(places)
    for offset in (0, 2) if at == 6 else (0, 2, 4, 6):
        struct.pack_into("<H", changed, at + offset, random.choice((*SIDES, 64, 48)) & 0xFFFF)
    return bytes(changed)


def _gif_frames(random: Random, content: bytes) -> bytes:
    start = content.index(b",", 13)
    return content[:-1] + _repeated(random, content[start:-1], 1, 50, 2000) + content[-1:]


def _bmp_header(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    at, size = random.choice(((10, "I"), (14, "I"), (18, "i"), (22, "i"), (28, "H"), (30, "I"), (46, "I")))
    if size == "i":
        struct.pack_into("<i", changed, at, random.choice((*SIDES, -1, -48, -0x7FFFFFFF)))
    else:
        struct.pack_into(
            "<" + size, changed, at, random.choice((*EXTREMES, 4, 8, 16, 24, 32)) & (0xFFFF if size == "H" else ~0)
        )
    return bytes(changed)


_TAGS = (256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 322, 323, 324, 338, 339, 347, 530, 34675)


def _tiff_tag(random: Random, content: bytes) -> bytes:
    """Change entries of the first directory: tag, type, count, or value and its offset."""
    order = "<" if content[:1] == b"I" else ">"
    changed = bytearray(content)
    at = struct.unpack_from(order + "I", content, 4)[0]
    count = struct.unpack_from(order + "H", content, at)[0]
    for _ in range(random.choice((1, 1, 2))):
        entry = at + 2 + 12 * random.randrange(max(1, count))
        change = random.randrange(5)
        if change == 0:
            struct.pack_into(order + "H", changed, entry, random.choice(_TAGS))
        elif change == 1:
            struct.pack_into(order + "H", changed, entry + 2, random.choice((0, 1, 2, 3, 4, 5, 12, 16, 99)))
        elif change == 2:
            struct.pack_into(order + "I", changed, entry + 4, random.choice(EXTREMES))
        else:
            compressions = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 34712, 50000)
            value = random.choice((*EXTREMES, *SIDES, *compressions))
            struct.pack_into(order + "I", changed, entry + 8, value)
    return bytes(changed)


def _tiff_directories(random: Random, content: bytes) -> bytes:
    order = "<" if content[:1] == b"I" else ">"
    changed = bytearray(content)
    at = struct.unpack_from(order + "I", content, 4)[0]
    count = struct.unpack_from(order + "H", content, at)[0]
    if random.random() < 0.5:
        struct.pack_into(order + "I", changed, at + 2 + 12 * count, random.choice((at, 8, 0xFFFFFFFF, len(content))))
    else:
        struct.pack_into(order + "H", changed, at, random.choice((0, count + 1, 1000, 65535)))
    return bytes(changed)


def _webp_chunk(random: Random, content: bytes) -> bytes:
    places, at = [4], 12
    while at + 8 <= len(content):
        places.append(at + 4)
        at += 8 + (struct.unpack_from("<I", content, at + 4)[0] + 1 & ~1)
    changed = bytearray(content)
    at = random.choice(places)
    if at == 4 or random.random() < 0.5:
        struct.pack_into("<I", changed, at, random.choice((*EXTREMES, len(content), random.randrange(1000))))
    else:
        for _ in range(random.choice((1, 4))):  # a chunk starts with its flags and dimensions
            changed[at + 4 + random.randrange(12)] = random.randrange(256)
    return bytes(changed)


def _webp_extended(random: Random, content: bytes) -> bytes:
    size = b"".join((random.choice(SIDES) & 0xFFFFFF).to_bytes(3, "little") for _ in range(2))
    head = b"VP8X" + struct.pack("<IB3x", 10, random.choice((0x02, 0x08, 0x10, 0x20, 0x3E, 0xFF))) + size
    exif, profile = _damaged_exif(random), _damaged_profile(random)
    body = head + b"ICCP" + struct.pack("<I", len(profile)) + profile + bytes(len(profile) % 2) + content[12:]
    body += b"EXIF" + struct.pack("<I", len(exif)) + exif + bytes(len(exif) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _heif_box(random: Random, content: bytes) -> bytes:
    names = (
        b"ftyp",
        b"meta",
        b"hdlr",
        b"pitm",
        b"iloc",
        b"iinf",
        b"iprp",
        b"ipco",
        b"ispe",
        b"pixi",
        b"av1C",
        b"hvcC",
        b"colr",
    )
    places = [at for name in (*names, b"ipma", b"irot", b"mdat") if (at := content.find(name)) > 0]
    changed = bytearray(content)
    at = random.choice(places)
    if random.random() < 0.4:
        struct.pack_into(">I", changed, at - 4, random.choice((*EXTREMES, 7, 8, 9, 16, len(content))))
    elif bytes(changed[at : at + 4]) == b"ispe":
        struct.pack_into(">II", changed, at + 8, random.choice(SIDES), random.choice(SIDES))
    else:
        for _ in range(random.choice((1, 4))):
            changed[at + 4 + random.randrange(24)] = random.choice((0, 1, 255, random.randrange(256)))
    return bytes(changed)


_Mutation = Callable[..., bytes]
_GENERAL: tuple[_Mutation, ...] = (
    _truncate,
    _flip_bits,
    _extreme_number,
    _swap_header,
    _insert,
    _delete,
    _repeat,
    _zero,
)
_BY_FORMAT: dict[str, tuple[_Mutation, ...]] = {
    "JPEG": (_jpeg_size, _jpeg_segment, _jpeg_metadata, _jpeg_scans),
    "PNG": (_png_header, _png_chunk, _png_metadata, _png_bomb, _png_frames),
    "GIF": (_gif_size, _gif_frames),
    "BMP": (_bmp_header,),
    "TIFF": (_tiff_tag, _tiff_tag, _tiff_directories),
    "WEBP": (_webp_chunk, _webp_extended),
    "AVIF": (_heif_box,),
    "HEIF": (_heif_box,),
}
