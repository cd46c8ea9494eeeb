"""Raw files are sorted by their previews, and never end up in failed/."""

import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LONG_AGO, RED, Running, hashes, make_tree, photo, read_tree
from fuzzing import mutant
from pictures import encoded, plain, quarters, smooth, turned
from PIL import ExifTags, Image
from raws import dng
from test_decoders import Bench, signal_workers_that_open
from test_decoders import bench as bench  # a fixture
from test_images import difference

from sorter.decoding import images, raw
from sorter.decoding.images import Limits, Preprocessing
from sorter.errors import PhotoError, Reason

rawpy = pytest.importorskip("rawpy", reason="needs the extra raw")

SQUASH = Preprocessing(32)
JPEG = {"quality": 95, "subsampling": 0}


def decoded(folder: Path, content: bytes, limits: Limits | None = None) -> Image.Image:
    path = folder / "photo.dng"
    path.write_bytes(content)
    with path.open("rb") as file:
        return raw.decode(file.fileno(), SQUASH, limits or Limits())


def reason(folder: Path, content: bytes, limits: Limits | None = None) -> Reason:
    with pytest.raises(PhotoError) as caught:
        decoded(folder, content, limits)
    return caught.value.reason


def upright() -> Image.Image:
    return images.decode_file(io.BytesIO(encoded(quarters(), "PNG")), SQUASH, Limits())


def jpeg_without_exif(orientation: int) -> bytes:
    """`quarters` as a camera held in that orientation stores it, which only the raw file records."""
    with Image.open(io.BytesIO(turned("PNG", orientation))) as stored:
        return encoded(Image.frombytes("RGB", stored.size, stored.tobytes()), "JPEG", **JPEG)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_raw_file_looks_like_its_preview(tmp_path: Path, order: str) -> None:
    preview = encoded(smooth(1, (300, 200)), "JPEG", **JPEG)
    alone = images.decode_file(io.BytesIO(preview), SQUASH, Limits())
    assert difference(decoded(tmp_path, dng(preview, order=order)), alone) == 0


def test_of_several_previews_the_largest_is_decoded(tmp_path: Path) -> None:
    small, large = encoded(plain((255, 0, 0), (96, 64)), "JPEG"), encoded(plain((0, 0, 255), (192, 128)), "JPEG")
    picture = decoded(tmp_path, dng(small, large, bitmap=plain((0, 255, 0), (48, 32))))
    assert picture.getpixel((16, 16)) == (0, 0, 254)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_preview_without_exif_is_turned_as_the_raw_file_says(tmp_path: Path, orientation: int) -> None:
    content = dng(jpeg_without_exif(orientation), orientation=orientation)
    assert difference(decoded(tmp_path, content), upright()) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_preview_of_plain_pixels_is_turned_as_the_raw_file_says(tmp_path: Path, orientation: int) -> None:
    with Image.open(io.BytesIO(turned("PNG", orientation))) as stored:
        content = dng(orientation=orientation, bitmap=stored.convert("RGB"))
    assert difference(decoded(tmp_path, content), upright()) < 3


@pytest.mark.parametrize("jfif", [True, False], ids=["after JFIF", "first"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_previews_own_exif_wins_over_the_raw_file(tmp_path: Path, orientation: int, jfif: bool) -> None:
    preview = turned("JPEG", orientation)
    assert preview[6:10] == b"JFIF"
    if not jfif:
        preview = preview[:2] + preview[4 + struct.unpack_from(">H", preview, 4)[0] :]
        assert preview[6:10] == b"Exif"
    assert difference(decoded(tmp_path, dng(preview, orientation=3)), upright()) < 3


def test_a_preview_whose_exif_has_no_orientation_is_turned_as_the_raw_file_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Acme"
    with Image.open(io.BytesIO(jpeg_without_exif(6))) as stored:
        preview = encoded(stored, "JPEG", exif=exif, **JPEG)
    assert difference(decoded(tmp_path, dng(preview, orientation=6)), upright()) < 3


def test_a_raw_file_without_bytes_is_empty(tmp_path: Path) -> None:
    assert reason(tmp_path, b"") is Reason.EMPTY


@pytest.mark.parametrize(
    "content",
    [dng(), b"Dear cat, " * 100, photo(1), dng(b"\xff\xd8" + bytes(500))],
    ids=["none", "text", "jpeg", "zeros"],
)
def test_a_raw_file_without_a_readable_preview_is_corrupt(tmp_path: Path, content: bytes) -> None:
    assert reason(tmp_path, content) is Reason.CORRUPT


def test_the_limits_apply_to_previews(tmp_path: Path) -> None:
    tight = Limits(max_megapixels=0.002, max_jpeg_megapixels=0.004)
    assert reason(tmp_path, dng(encoded(plain(size=(96, 64)), "JPEG")), tight) is Reason.TOO_MANY_PIXELS
    assert reason(tmp_path, dng(bitmap=plain(size=(60, 50))), tight) is Reason.TOO_MANY_PIXELS
    assert decoded(tmp_path, dng(encoded(plain(size=(60, 50)), "JPEG")), tight).size == (32, 32)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_raw_file_that_ends_early_is_truncated_even_if_its_preview_is_complete(tmp_path: Path, order: str) -> None:
    content = dng(encoded(smooth(1, (96, 64)), "JPEG"), order=order)
    for length in (*range(9, len(content), 97), len(content) - 1):
        assert reason(tmp_path, content[:length]) is Reason.TRUNCATED
    assert decoded(tmp_path, content + b"and something more").size == (32, 32)


def test_a_fuji_or_canon_raw_file_that_ends_early_is_truncated(tmp_path: Path) -> None:
    places = struct.pack(">6I", 148, 100, 248, 100, 348, 1000)  # of preview, header and the sensor's values
    fuji = b"FUJIFILMCCD-RAW ".ljust(84, b"0") + places + bytes(2000)
    canon = struct.pack(">I4s4sI", 16, b"ftyp", b"crx ", 1) + struct.pack(">I4s", 1000, b"mdat") + bytes(2000)
    assert reason(tmp_path, fuji[:1347]) is Reason.TRUNCATED
    assert reason(tmp_path, canon[:1015]) is Reason.TRUNCATED
    assert reason(tmp_path, fuji[:1348]) is Reason.CORRUPT, "there is no preview in this one"
    assert reason(tmp_path, canon[:1016]) is Reason.CORRUPT


def test_a_directory_that_points_to_itself_is_read_once(tmp_path: Path) -> None:
    content = struct.pack("<4sIHHHIII", b"II*\0", 8, 1, 330, 4, 1, 8, 8)
    assert reason(tmp_path, content + bytes(500)) is Reason.CORRUPT


def test_a_failing_disk_is_not_a_failing_raw_file(tmp_path: Path) -> None:
    (tmp_path / "a.dng").write_bytes(dng())
    descriptor = os.open(tmp_path / "a.dng", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match=r"Bad file descriptor|not readable"):
            raw.decode(descriptor, SQUASH, Limits())
    finally:
        os.close(descriptor)


def test_rawpy_is_imported_with_the_first_raw_file_and_not_before() -> None:
    code = "import sys, sorter.decoding.decoders; sys.exit('rawpy' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def slow() -> bytes:
    """A raw file that takes long enough to decode to be caught in the act."""
    return dng(bitmap=Image.new("RGB", (3000, 3000)))


@pytest.mark.parametrize(
    "number", [signal.SIGSEGV, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGABRT, signal.SIGSTOP))]
)
def test_a_raw_file_that_kills_or_hangs_the_decoder_is_skipped_and_the_next_photo_is_decoded(
    number: signal.Signals, tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    make_tree(tmp_path / "in", {"bad.dng": slow()})
    made = bench(timeout_seconds=3, max_bytes=100_000_000)
    with signal_workers_that_open(tmp_path / "in/bad.dng", number):
        decoded = made.decode("bad.dng")
    wanted = Reason.DECODER_TIMEOUT if number is signal.SIGSTOP else Reason.DECODER_CRASH
    assert (decoded.verdict, decoded.reason) == ("skipped", wanted)
    assert decoded.detail.startswith("a camera's raw file, ")
    assert made.decode("b.jpg").verdict == "pixels"


def test_a_raw_file_that_exceeds_the_memory_or_size_limit_is_skipped(
    tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    files = {"good.dng": slow(), "memory.dng": dng(), "large.dng": dng()}
    make_tree(tmp_path / "in", files)
    for name, size in {"memory.dng": 1_200_000_000, "large.dng": 1_500_000_001}.items():
        with contextlib.suppress(OSError):
            os.truncate(tmp_path / "in" / name, size)  # sparse: takes no disk space
            os.utime(tmp_path / "in" / name, (LONG_AGO, LONG_AGO))
    made = bench(max_bytes=1_500_000_000)
    verdicts = {name: made.decode(name) for name in files}
    assert verdicts["good.dng"].verdict == "pixels"
    made.decoders.release(verdicts["good.dng"].row)
    for name, wanted in {"memory.dng": Reason.OUT_OF_MEMORY, "large.dng": Reason.TOO_LARGE}.items():
        assert (verdicts[name].verdict, verdicts[name].reason) == ("skipped", wanted)


def red_preview(seed: int) -> bytes:
    return encoded(plain(RED, (96 + seed, 64)), "JPEG")


@pytest.mark.parametrize("mutations", [30, pytest.param(150, marks=pytest.mark.long)])
def test_raw_files_are_sorted_or_skipped_and_never_fail(
    mutations: int, tmp_path: Path, start: Callable[..., Running]
) -> None:
    good = {f"good-{n}{suffix}": dng(red_preview(n)) for n, suffix in enumerate((".dng", ".DNG", ".nef", ".arw"))}
    intact = dng(red_preview(9))
    bad = {
        "without.dng": dng(),
        "half.dng": intact[: len(intact) // 2],
        "end.dng": intact[:-1],
        "empty.cr2": b"",
        "text.nef": b"Dear cat, thank you for the mouse.",
        "photo.orf": photo(1),
        "heic.cr3": b"\0\0\0\x18ftypcrx \0\0\0\1" + bytes(5000),
        "zeros.raf": b"FUJIFILMCCD-RAW " + bytes(5000),
    }
    sources = {name: content for name, content in good.items() if name.endswith(".dng")}
    mutants = {f"mutant-{seed}.dng": mutant(seed, sources).content for seed in range(mutations)}
    inbox = make_tree(tmp_path / "in", good | bad | mutants | {"cat.jpg": photo(2)})
    before = hashes(inbox)
    running = start("run", "--once", "--inbox", inbox)
    code, _ = running.finish()
    assert code == 0, running.errors.read_text()
    assert running.events("photo.failed") == []
    assert not (inbox / "failed").exists()
    assert hashes(inbox) == before
    sorted_names = {os.path.basename(event["path"]) for event in running.events("photo.sorted")}
    skipped = {os.path.basename(event["path"]): event["reason"] for event in running.events("photo.skipped")}
    assert sorted_names | set(skipped) == set(good | bad | mutants | {"cat.jpg": b""})
    assert set(good) | {"cat.jpg"} <= sorted_names
    assert set(bad) <= set(skipped)
    assert skipped["without.dng"] == "a camera's raw file, its preview cannot be read: No thumbnail in file"
    assert all(why.startswith("a camera's raw file, ") and len(why) > 25 for why in skipped.values())
    assert len(sorted_names & set(mutants)) > mutations // 15, "some still have a preview"
    assert len(set(skipped) & set(mutants)) > mutations // 15, "some have none any more"
    assert set(skipped) <= {name for name in read_tree(inbox) if "/" not in name}


def test_without_rawpy_raw_files_stay_and_the_log_says_what_to_install(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    needs = "sorting it by its preview needs the extra 'raw': run pip install '.[raw]' in sorter's folder"
    # Stands in for an environment without rawpy.
    make_tree(tmp_path / "without", {"rawpy.py": b"raise ImportError(\"No module named 'rawpy'\", name='rawpy')"})
    inbox = make_tree(tmp_path / "in", {"a.dng": dng(red_preview(1)), "b.jpg": photo(2), "half.nef": dng()[:500]})
    search = os.pathsep.join([str(tmp_path / "without"), *sys.path])
    running = start("run", "--once", "--inbox", inbox, PYTHONPATH=search)
    assert running.finish()[0] == 0, running.errors.read_text()
    skipped = running.events("photo.skipped")
    assert {os.path.basename(event["path"]) for event in skipped} == {"a.dng", "half.nef"}
    assert all(needs in event["reason"] for event in skipped)
    assert {"a.dng", "half.nef"} <= set(read_tree(inbox))


@pytest.mark.long
def test_a_raw_file_is_not_moved_before_it_is_completely_written(tmp_path: Path, start: Callable[..., Running]) -> None:
    (tmp_path / "in").mkdir()
    content = dng(red_preview(1))
    running = start("run", "--inbox", tmp_path / "in", "--settle-seconds", "0.2")
    running.wait_for_event("service.started")
    with (tmp_path / "in/a.dng").open("wb", buffering=0) as file:
        file.write(content[:-1000])  # the preview is there
        make_tree(tmp_path / "in", {"b.jpg": photo(1), "c.jpg": photo(2)})
        running.wait_for_event("photo.sorted", 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(1.5)
        assert (tmp_path / "in/a.dng").exists()
        assert len(running.events("photo.sorted")) == 2
        file.write(content[-1000:])
    running.wait_for_event("photo.sorted", 3)
    running.process.send_signal(signal.SIGTERM)
    assert running.finish()[0] == 0
    assert running.events("photo.skipped") == []
    assert content in read_tree(tmp_path / "in").values()
