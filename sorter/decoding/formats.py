"""The photo formats that are decoded, and how a file of one is recognised.

Importing this module registers HEIC with Pillow.
"""

import contextlib
import io
import struct

import pillow_heif
from PIL import Image

SIGNATURE_BYTES = 64
_BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
# What a complete file ends with; a few stray bytes may follow.
_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND", b"GIF8": b";"}

# Workers are parallel already, so one thread each; a phone's depth maps and thumbnails are not needed.
pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
Image.init()  # registers AVIF and MPO too
with contextlib.suppress(ImportError):  # since Pillow 11.3
    from PIL import AvifImagePlugin

    # On 64 CPUs the stacks of 64 threads would fill a worker's memory.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "DIB": (),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
FORMATS = tuple(name for name in _EXTENSIONS if name in Image.OPEN)
EXTENSIONS = frozenset(extension for name in FORMATS for extension in _EXTENSIONS[name])


def has_signature(head: bytes) -> bool:
    """True if a file's first `SIGNATURE_BYTES` bytes are those of a supported format."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")):
        return True
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        # AVIF and HEIC share the container `mif1`: the compatible brands say which it is.
        if b"avif" in head[8:] or b"avis" in head[8:]:
            return "AVIF" in FORMATS
        return any(brand in head[8:] for brand in _HEIC_BRANDS)
    # Two letters alone are too common: require a valid header size too.
    return head[:2] == b"BM" and len(head) >= 18 and struct.unpack_from("<I", head, 14)[0] in _BMP_HEADER_SIZES


def ends_early(file: io.BufferedIOBase, head: bytes) -> bool:
    """True if a file ends earlier than its format says; not every decoder reports it."""
    size = file.seek(0, io.SEEK_END)
    for signature, end in _ENDS.items():
        if head.startswith(signature):
            file.seek(max(0, size - 64))
            return end not in file.read(64)
    if head[:4] == b"RIFF":
        return bool(struct.unpack_from("<I", head.ljust(8, b"\0"), 4)[0] + 8 > size)
    if head[:2] in (b"II", b"MM"):  # TIFF: where its directory is, usually at the end
        order, head = "<" if head[:1] == b"I" else ">", head.ljust(16, b"\0")
        is_big = b"+" in head[2:4]
        return bool(struct.unpack_from(order + ("Q" if is_big else "I"), head, 8 if is_big else 4)[0] >= size)
    if head[4:8] != b"ftyp":
        return False
    position = 0
    while position < size:
        file.seek(position)
        box = file.read(8).ljust(8, b"\0")
        length = struct.unpack_from(">I", box)[0]
        if length < 8:  # 0: to the end of the file; 1: a 64-bit length, which no photo has
            return False
        position += length
    return position > size
