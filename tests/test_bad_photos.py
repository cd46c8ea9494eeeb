"""The limits at their boundaries, and what a photo may cost, through the sorter and its real processes."""

import contextlib
import io
import os
import signal
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import RED, Running, hashes, make_tree, plain, read_tree
from pictures import HAS_AVIF, claiming, encoded
from PIL import Image
from test_decoders import Bench, cpu_seconds, open_files, peak_bytes, repeatedly, reset_peak, slow, workers

from sorter.errors import Reason

MAX_SECONDS, MAX_BYTES = 10.0, 1_000_000_000


LIMITS = """
max_megapixels = 30
max_jpeg_megapixels = 40
max_megabytes = 2
decode_timeout_seconds = 2
"""


def red(kind: str, width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height), RED), kind)


def when_opened(parent: int, actions: dict[str, Callable[[int], None]]) -> contextlib.AbstractContextManager[None]:
    """Do something, once, to each worker of a sorter that opens a file of a given name."""
    treated = set[tuple[int, str]]()

    def look() -> None:
        for pid in workers(parent):
            for name in {os.path.basename(path) for path in open_files(pid)} & set(actions):
                if (pid, name) not in treated:
                    treated.add((pid, name))
                    with contextlib.suppress(ProcessLookupError):
                        actions[name](pid)

    return repeatedly(look)


def nap(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)).start()


@pytest.mark.long
def test_limits_hold_to_the_pixel_byte_and_second_and_no_photo_suffers_for_another(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    padded = plain(RED, kind="PNG")
    files = {
        "at-30.png": red("PNG", 6000, 5000),
        "over-30.png": red("PNG", 6000, 5001),
        "at-40.jpg": red("JPEG", 8000, 5000),
        "over-40.jpg": red("JPEG", 8000, 5001),
        "at-2.png": padded + bytes(2_000_000 - len(padded)),
        "over-2.png": padded + bytes(2_000_001 - len(padded)),
        "naps.png": slow(),
        "hangs.png": slow(),
        "crashes.png": slow(),
    }
    good = {f"good-{n}.jpg": plain(RED, n) for n in range(40)}
    inbox = make_tree(tmp_path / "in", files | good)
    before = hashes(inbox)
    (tmp_path / "sorter.toml").write_text(LIMITS)
    running = start("run", "--once", "--config", tmp_path / "sorter.toml", "--inbox", inbox)
    actions: dict[str, Callable[[int], None]] = {
        "naps.png": nap,
        "hangs.png": lambda pid: os.kill(pid, signal.SIGSTOP),
        "crashes.png": lambda pid: os.kill(pid, signal.SIGSEGV),
    }
    with when_opened(running.process.pid, actions):
        code, _ = running.finish()
    assert code == 3, running.errors.read_text()
    assert hashes(inbox) == before
    failed = {os.path.basename(event["path"]): event for event in running.events("photo.failed")}
    assert {name: event["reason"] for name, event in failed.items()} == {
        "over-30.png": "too-many-pixels",
        "over-40.jpg": "too-many-pixels",
        "over-2.png": "too-large",
        "hangs.png": "decoder-timeout",
        "crashes.png": "decoder-crash",
    }
    assert "limit is 30 megapixels" in failed["over-30.png"]["detail"]
    assert "limit is 40 megapixels" in failed["over-40.jpg"]["detail"]
    assert "limit is 2 MB" in failed["over-2.png"]["detail"]
    assert "2 s" in failed["hangs.png"]["detail"]
    assert "SIGSEGV" in failed["crashes.png"]["detail"]
    sorted_ = {os.path.basename(name) for name in read_tree(inbox) if name.startswith(("cats/", "dogs/"))}
    assert sorted_ == (set(files) | set(good)) - set(failed)


SIDE = 10_000  # 100 megapixels
JPEG_SIDE = 15_811  # just under 250
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # PNG's colour types


def png(depth: int, color_type: int, *, interlaced: bool = False, transparent: bytes = b"") -> bytes:
    """100 megapixels in a file of a few megabytes; Pillow writes neither 16-bit colours nor interlaced ones."""
    packer, data = zlib.compressobj(1), b""
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for left, top, across, down in starts if interlaced else ((0, 0, 1, 1),):
        width, height = (-(-(SIDE - left) // across), -(-(SIDE - top) // down))
        row = b"\0" + bytes(range(256)) * (SIDE * 8 // 256 + 1)
        for _ in range(height):
            data += packer.compress(row[: 1 + width * CHANNELS[color_type] * depth // 8])
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color_type, 0, 0, interlaced)
    palette = [(b"PLTE", bytes(768))] if color_type == 3 else []
    chunks = [(b"IHDR", header), *palette, (b"tRNS", transparent), (b"IDAT", data + packer.flush()), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
        if body or kind == b"IEND"
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def saved(mode: str, kind: str, *, side: int = SIDE, **options: object) -> bytes:
    gradient = Image.linear_gradient("L").resize((side, side)) if mode != "F" else Image.new("F", (side, side), 0.5)
    buffer = io.BytesIO()
    gradient.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def noise_tiff(**options: object) -> bytes:
    """Noise does not compress: the file is nearly as large as allowed, and is held in memory beside the picture."""
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "TIFF", **options)
    return buffer.getvalue()


LARGEST: dict[str, tuple[Callable[[], bytes], Reason | None]] = {
    "png, 8-bit RGB with a transparent colour": (lambda: png(8, 2, transparent=bytes(6)), None),
    "png, interlaced 16-bit RGBA": (lambda: png(16, 6, interlaced=True), None),
    "png, 16-bit grey": (lambda: png(16, 0), None),
    "png, 16-bit grey with alpha": (lambda: png(16, 4), None),
    "png, transparent palette": (lambda: png(8, 3, transparent=bytes(256)), None),
    "gif": (lambda: saved("L", "GIF"), None),
    "bmp": (lambda: saved("RGB", "BMP"), None),
    "tiff, LZW of noise": (lambda: noise_tiff(compression="tiff_lzw"), None),
    "tiff, CMYK": (lambda: saved("CMYK", "TIFF", compression="tiff_lzw"), None),
    "tiff, floats": (lambda: saved("F", "TIFF", compression="tiff_lzw"), None),
    "tiff, one strip": (lambda: saved("RGB", "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: SIDE}), None),
    "jpeg, baseline": (lambda: saved("RGB", "JPEG", side=JPEG_SIDE, subsampling=0), None),
    "jpeg, progressive 4:2:0": (lambda: saved("RGB", "JPEG", side=JPEG_SIDE, progressive=True), None),
    "jpeg, progressive 4:4:4": (
        lambda: saved("RGB", "JPEG", side=JPEG_SIDE, progressive=True, subsampling=0),
        Reason.OUT_OF_MEMORY,
    ),
    "webp": (lambda: saved("RGB", "WEBP", method=0, quality=20), Reason.OUT_OF_MEMORY),
    "webp of 45 megapixels": (lambda: saved("RGB", "WEBP", side=6700, method=0, quality=20), None),
    "webp of 45 megapixels, lossless": (lambda: saved("RGBA", "WEBP", side=6700, method=0, lossless=True), None),
}
LARGEST["heic"] = (lambda: saved("RGB", "HEIF", quality=30), None)
if HAS_AVIF:
    LARGEST["avif, 4:2:0"] = (lambda: saved("RGB", "AVIF", speed=10, quality=30), None)
    LARGEST["avif, 4:4:4 with alpha"] = (
        lambda: saved("RGBA", "AVIF", speed=10, quality=30, subsampling="4:4:4"),
        Reason.OUT_OF_MEMORY,
    )
SOONER = ("png, 8-bit RGB with a transparent colour", "png, interlaced 16-bit RGBA")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SOONER else pytest.mark.torture) for name in LARGEST]
)
def test_the_largest_pictures_stay_under_10_seconds_and_1_gb(
    name: str, tmp_path: Path, proved: Callable[[str], None]
) -> None:
    make, reason = LARGEST[name]
    make_tree(tmp_path / "in", {"large": make()})
    bench = Bench(tmp_path / "in", max_bytes=500_000_000)
    with contextlib.closing(bench.decoders):
        decoded = bench.decode("large")
        seconds, peak = cpu_seconds(), peak_bytes()
    result = decoded.reason or decoded.verdict
    assert (decoded.verdict, decoded.reason) == (("failed", reason) if reason else ("pixels", None))
    assert peak < MAX_BYTES
    assert seconds < MAX_SECONDS
    proved(f"{name}: {result}, {seconds:.1f} s of a processor, {peak / 1e6:.0f} MB")
    (tmp_path / "in/large").unlink()


def test_a_picture_that_exceeds_the_memory_limit_fails_as_out_of_memory_and_the_next_is_decoded(tmp_path: Path) -> None:
    progressive = bytearray(encoded(Image.new("RGB", (64, 48)), "JPEG", progressive=True, subsampling=0))
    struct.pack_into(">HH", progressive, progressive.index(b"\xff\xc2") + 5, JPEG_SIDE, JPEG_SIDE)
    make_tree(tmp_path / "in", {"huge.jpg": bytes(progressive), "good.png": claiming("PNG", 64, 48)})
    bench = Bench(tmp_path / "in")
    with contextlib.closing(bench.decoders):
        reset_peak()
        decoded = bench.decode("huge.jpg")
        assert decoded.reason is Reason.OUT_OF_MEMORY
        assert "memory" in decoded.detail
        assert peak_bytes() < MAX_BYTES
        assert bench.decode("good.png").verdict == "pixels"
