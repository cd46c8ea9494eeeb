"""Generated ICC profiles (ICC.1:2010): wide-gamut RGB, grey, and a CMYK one that is made up."""

import itertools
import struct

# Colorants adapted to D50, and the gamma of all channels.
_DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
_ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
_SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {
        b"desc": b"desc\0\0\0\0\0\0\0\5test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(0.9642, 1.0, 0.8249),
        **tags,
    }
    table, data = struct.pack(">I", len(tags)), b""
    offset = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", offset + len(data), b"test", 0x02400000, kind, space, connection) + bytes(12)
    head += b"acsp" + bytes(28) + _fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + data


def _curve(gamma: float | None = None) -> bytes:
    """A gamma, or the curve of sRGB."""
    if gamma is not None:
        return b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(gamma * 256))
    steps = (step / 1023 for step in range(1024))
    linear = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in steps)
    return b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *(round(y * 65535) for y in linear))


def _rgb(colorants: tuple[tuple[float, ...], ...], gamma: float | None = None) -> bytes:
    names = zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)
    tags = {name: b"XYZ \0\0\0\0" + _fixed(*color) for name, color in names}
    return _profile(b"RGB ", b"XYZ ", {**tags, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))})


def display_p3() -> bytes:
    """That of phones and of Apple's screens."""
    return _rgb(_DISPLAY_P3)


def adobe_rgb() -> bytes:
    """That of cameras and editors."""
    return _rgb(_ADOBE_RGB, 2.2)


def srgb() -> bytes:
    """sRGB, in other bytes than those of any program."""
    return _rgb(_SRGB)


def grey(gamma: float) -> bytes:
    """A grey profile with a gamma of its own."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def greenish_cmyk() -> bytes:
    """A printer whose paper is white, whose black is black, and whose other inks are all green."""
    ends = struct.pack("B" * 256, *range(256))
    lab = [(round(2.55 * (100 - 30 * (c + m + y > 0))) * (not k), 128 - 60 * (c + m + y > 0 and not k), 128)
           for c, m, y, k in itertools.product((0, 1), repeat=4)]  # fmt: skip
    table = b"mft1\0\0\0\0\4\3\2\0" + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ends * 4
    table += bytes(itertools.chain.from_iterable(lab)) + ends * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table})
