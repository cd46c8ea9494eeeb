"""One photo, from an open descriptor to the network's input."""

import contextlib
import io
import os
import time
import zlib
from pathlib import Path
from typing import Any

import color_profiles
import numpy as np
import pytest
from pictures import BRICK, HAS_AVIF, claiming, encoded, every_format, plain, quarters, ramp, smooth, tiff, turned
from PIL import ExifTags, Image, ImageCms

from sorter.decoding.formats import SIGNATURE_BYTES, has_signature
from sorter.decoding.images import Limits, Preprocessing, decode, decode_file
from sorter.errors import PhotoError, Reason

FILES = every_format()
SQUASH = Preprocessing(32)
TIGHT = Limits(max_megapixels=0.002, max_jpeg_megapixels=0.004)

NOT_PHOTOS = {
    "text": b"Dear cat, thank you for the mouse that you left on the doormat this morning.",
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n" + bytes(64),
    "mp4": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(64),
    "wave": b"RIFF\x24\x08\0\0WAVEfmt " + bytes(64),
    "bmw": b"BMW prices went up again this year, says the dealer in our street, and cats do not care.",
    "icon": b"\0\0\1\0\1\0\x10\x10" + bytes(64),
    "two letters": b"BM",
}


def decoded(
    folder: Path, content: bytes, preprocessing: Preprocessing = SQUASH, limits: Limits | None = None
) -> Image.Image:
    path = folder / "photo.jpg"
    path.write_bytes(content)
    with path.open("rb") as file:
        return decode(file.fileno(), preprocessing, limits or Limits())


def reason(folder: Path, content: bytes, limits: Limits | None = None) -> Reason:
    with pytest.raises(PhotoError) as caught:
        decoded(folder, content, limits=limits)
    return caught.value.reason


def mean_color(picture: Image.Image) -> list[float]:
    return [float(value) for value in np.asarray(picture, float).reshape(-1, 3).mean(0)]


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference between two pictures' values, 0 to 255."""
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def test_every_format_becomes_rgb_of_the_wanted_size_in_its_own_colour(tmp_path: Path) -> None:
    for name, (content, color) in FILES.items():
        picture = decoded(tmp_path, content)
        assert (picture.mode, picture.size) == ("RGB", (32, 32)), name
        assert mean_color(picture) == pytest.approx(color, abs=4), name


def test_transparency_becomes_white(tmp_path: Path) -> None:
    for content in (
        encoded(Image.new("RGBA", (64, 48), (*BRICK, 0)), "PNG"),
        encoded(Image.new("L", (64, 48), 9), "PNG", transparency=9),
        encoded(plain(), "PNG", transparency=BRICK),
    ):
        assert mean_color(decoded(tmp_path, content)) == [255, 255, 255]


def test_a_16_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    for kind in ("PNG", "TIFF"):
        values = np.asarray(decoded(tmp_path, encoded(ramp(), kind), Preprocessing(64)))
        assert (values.min(), values.max()) == (0, 127)
    uniform = np.full((8, 8), 32768, np.uint16)
    assert mean_color(decoded(tmp_path, encoded(Image.fromarray(uniform), "PNG"))) == [127, 127, 127]


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    content = encoded(smooth(1), "PNG")  # `decoded` calls every file photo.jpg
    expected = smooth(1).resize((32, 32), Image.Resampling.BILINEAR)
    assert difference(decoded(tmp_path, content), expected) < 2


def test_a_descriptor_is_read_from_its_start_whatever_its_position(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(plain(), "PNG"))
    with path.open("rb") as file:
        os.lseek(file.fileno(), 0, os.SEEK_END)
        assert mean_color(decode(file.fileno(), SQUASH, Limits())) == pytest.approx(BRICK, abs=1)


def test_a_descriptor_stays_open(tmp_path: Path) -> None:
    for content in (encoded(plain(), "PNG"), b"no photo"):
        path = tmp_path / "photo.png"
        path.write_bytes(content)
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(PhotoError):
            decode(descriptor, SQUASH, Limits())
        os.close(descriptor)  # fails if it is closed already


def stripes() -> bytes:
    """Twice as wide as high: a quarter red, half green, a quarter blue."""
    picture = plain((0, 255, 0), (128, 64))
    picture.paste((255, 0, 0), (0, 0, 32, 64))
    picture.paste((0, 0, 255), (96, 0, 128, 64))
    return encoded(picture, "PNG")


def test_squash_keeps_the_full_picture(tmp_path: Path) -> None:
    picture = decoded(tmp_path, stripes(), Preprocessing(32, "squash"))
    assert [picture.getpixel((x, 16)) for x in (2, 16, 29)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_center_crop_keeps_the_middle_in_its_own_proportions(tmp_path: Path) -> None:
    picture = decoded(tmp_path, stripes(), Preprocessing(24, "center", 32))
    assert np.array_equal(np.asarray(picture), np.asarray(plain((0, 255, 0), (24, 24))))


def test_a_center_crop_discards_what_exceeds_its_size(tmp_path: Path) -> None:
    framed = plain((255, 0, 0), (64, 64))
    framed.paste((255, 255, 255), (8, 8, 56, 56))
    content = encoded(framed, "PNG")
    full = decoded(tmp_path, content, Preprocessing(32, "center", 32))
    inner = decoded(tmp_path, content, Preprocessing(24, "center", 40))
    assert (full.getpixel((0, 0)), inner.getpixel((0, 0))) == ((255, 0, 0), (255, 255, 255))


def test_a_picture_that_is_to_fit_keeps_its_proportions_and_is_never_enlarged(tmp_path: Path) -> None:
    for size, wanted in (((400, 100), (64, 16)), ((100, 400), (16, 64)), ((63, 20), (63, 20)), ((6000, 1), (64, 1))):
        for kind in ("JPEG", "PNG"):
            content = encoded(smooth(1, size), kind)
            assert decoded(tmp_path, content, Preprocessing(64, "fit")).size == wanted, (size, kind)
    expected = smooth(2, (1200, 400)).resize((120, 40), Image.Resampling.BOX)
    assert (
        difference(decoded(tmp_path, encoded(smooth(2, (1200, 400)), "PNG"), Preprocessing(120, "fit")), expected) < 2
    )


def test_a_picture_smaller_than_wanted_is_enlarged(tmp_path: Path) -> None:
    for crop in (Preprocessing(32, "squash"), Preprocessing(32, "center", 36)):
        picture = decoded(tmp_path, encoded(plain(size=(1, 3)), "PNG"), crop)
        assert picture.size == (32, 32)
        assert mean_color(picture) == list(BRICK)


def test_a_large_jpeg_looks_like_the_same_picture_in_a_lossless_format(tmp_path: Path) -> None:
    large = smooth(2, (1200, 900))
    from_jpeg = decoded(tmp_path, encoded(large, "JPEG", quality=95))
    assert difference(from_jpeg, decoded(tmp_path, encoded(large, "PNG"))) < 2


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", *(["AVIF"] if HAS_AVIF else [])])
def test_every_exif_orientation_comes_out_upright(tmp_path: Path, kind: str) -> None:
    upright = decoded(tmp_path, encoded(quarters(), "PNG"))
    for orientation in range(1, 9):
        assert difference(decoded(tmp_path, turned(kind, orientation)), upright) < 3, orientation


def test_every_exif_orientation_comes_out_upright_from_a_center_crop(tmp_path: Path) -> None:
    crop = Preprocessing(24, "center", 32)
    upright = decoded(tmp_path, encoded(quarters(), "PNG"), crop)
    for orientation in range(1, 9):
        assert difference(decoded(tmp_path, turned("PNG", orientation), crop), upright) < 3, orientation


@pytest.mark.filterwarnings("ignore::UserWarning")  # as in the decoder processes: Pillow warns about what it skips
def test_invalid_orientations_and_broken_exif_are_ignored(tmp_path: Path) -> None:
    upright = decoded(tmp_path, encoded(quarters(), "PNG"))
    for orientation in (0, 9, 65535):
        assert difference(decoded(tmp_path, turned("PNG", orientation)), upright) == 0
    for kind in ("JPEG", "PNG", "WEBP"):
        plain_file = decoded(tmp_path, encoded(quarters(), kind))
        for exif in (b"Exif\0\0garbage!", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"?"):
            assert difference(decoded(tmp_path, encoded(quarters(), kind, exif=exif)), plain_file) == 0


HALVES = {
    "jpeg": encoded(smooth(3), "JPEG"),
    "jpeg-progressive": encoded(smooth(3), "JPEG", progressive=True),
    "png": encoded(smooth(3), "PNG"),
    "gif": encoded(smooth(3), "GIF"),
    "bmp": encoded(smooth(3), "BMP"),
    "tiff": encoded(smooth(3), "TIFF"),
    "webp": encoded(smooth(3), "WEBP"),
    **({"avif": encoded(smooth(3), "AVIF")} if HAS_AVIF else {}),
}


BROKEN = {
    "png with a wrong checksum": encoded(plain(), "PNG").replace(b"IHDR\0\0\0\x40", b"IHDR\0\0\0\x41"),
    "png without a header": encoded(plain(), "PNG")[:8] + bytes(64) + b"IEND\xaeB`\x82",
    "bmp of an impossible depth": encoded(plain(), "BMP")[:28] + b"\x30\x75" + encoded(plain(), "BMP")[30:],
    "gif without a width": claiming("GIF", 0, 0)[:13] + b";",
    "jpeg of noise": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(range(1, 200)) + b"\xff\xd9",
    "webp of noise": b"RIFF\x64\0\0\0WEBPVP8 \x58\0\0\0" + bytes(range(1, 89)),
}


def test_a_file_that_is_not_a_readable_photo_gets_its_reason(tmp_path: Path) -> None:
    assert reason(tmp_path, b"") is Reason.EMPTY
    for name, content in HALVES.items():
        assert reason(tmp_path, content[: len(content) // 2]) is Reason.TRUNCATED, name
    for name, content in BROKEN.items():
        assert reason(tmp_path, content) is Reason.CORRUPT, name
    for name, content in NOT_PHOTOS.items():
        assert reason(tmp_path, content) is Reason.NOT_A_PHOTO, name


def test_a_picture_over_its_pixel_limit_is_refused_and_one_at_the_limit_is_not(tmp_path: Path) -> None:
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        assert reason(tmp_path, encoded(plain(size=(60, 50)), kind), TIGHT) is Reason.TOO_MANY_PIXELS, kind
    assert reason(tmp_path, encoded(plain(size=(100, 50)), "JPEG"), TIGHT) is Reason.TOO_MANY_PIXELS
    assert decoded(tmp_path, encoded(plain(size=(50, 40)), "PNG"), limits=TIGHT).size == (32, 32)
    assert decoded(tmp_path, encoded(plain(size=(60, 50)), "JPEG"), limits=TIGHT).size == (32, 32), "JPEG may be larger"


def test_a_small_file_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    for kind in ("PNG", "GIF", "BMP", "JPEG"):
        for size in ((11_000, 10_000), (20_000, 15_000), (60_000, 60_000)):
            if kind == "JPEG" and size == (11_000, 10_000):  # within JPEG's limit
                continue
            assert reason(tmp_path, claiming(kind, *size)) is Reason.TOO_MANY_PIXELS, (kind, size)


def test_a_failing_disk_is_not_a_failing_photo(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(plain(), "PNG"))
    descriptor = os.open(path, os.O_WRONLY)  # reading from it fails in the kernel, as from a broken disk
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            decode(descriptor, SQUASH, Limits())
    finally:
        os.close(descriptor)


@pytest.mark.shared
@pytest.mark.filterwarnings("ignore::UserWarning")  # as in the decoder processes: Pillow warns about what it skips
def test_every_file_broken_in_the_wild_gives_a_picture_or_a_reason(shared: Path) -> None:
    files = sorted(path for path in (shared / "bad").iterdir() if path.is_file())
    before = {path.name: path.read_bytes() for path in files}
    outcomes: dict[str, object] = {}
    for path in files:
        with path.open("rb") as file:
            try:
                picture = decode(file.fileno(), SQUASH, Limits())
                outcomes[path.name] = (picture.mode, picture.size)
            except PhotoError as error:
                outcomes[path.name] = type(error.reason)
    assert outcomes
    assert {name: outcome for name, outcome in outcomes.items() if outcome not in (("RGB", (32, 32)), Reason)} == {}
    assert {path.name: path.read_bytes() for path in files} == before


def test_signatures_recognise_every_format_and_nothing_else() -> None:
    assert [name for name, (content, _) in FILES.items() if not has_signature(content[:SIGNATURE_BYTES])] == []
    assert [name for name, content in NOT_PHOTOS.items() if has_signature(content[:SIGNATURE_BYTES])] == []
    assert not has_signature(b"")


def test_a_float_tiff_without_finite_numbers_is_corrupt(tmp_path: Path) -> None:
    values = np.full((8, 8), np.nan, np.float32)
    assert reason(tmp_path, encoded(Image.fromarray(values), "TIFF")) is Reason.CORRUPT


def test_a_jpeg_of_endless_scans_is_refused_and_an_ordinary_progressive_one_is_not() -> None:
    seen = Preprocessing(32)
    good = encoded(smooth(0, (64, 48)), "JPEG", progressive=True)
    begin = good.index(b"\xff\xda")
    head, scans, end = good[:begin], good[begin:-2], good[-2:]
    film = b"\xff\xda" * 1000  # such as phones append to a photo
    assert decode_file(io.BytesIO(good + film), seen, Limits()).size == (32, 32)
    with pytest.raises(PhotoError, match="200 scans; the limit is 100") as caught:
        decode_file(io.BytesIO(head + scans * 20 + end), seen, Limits())
    assert caught.value.reason == Reason.CORRUPT


RED_IN = {  # the red of sRGB
    "P3": ((234, 51, 35), color_profiles.display_p3()),
    "Adobe RGB": ((219, 0, 0), color_profiles.adobe_rgb()),
    "sRGB": ((255, 0, 0), color_profiles.srgb()),
}


@pytest.mark.parametrize("space", RED_IN)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", *(["AVIF"] if HAS_AVIF else [])])
def test_the_colours_of_a_profile_become_those_of_srgb(space: str, kind: str, tmp_path: Path) -> None:
    color, profile = RED_IN[space]
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 95},
    }
    content = encoded(plain(color), kind, icc_profile=profile, **options.get(kind, {}))
    assert mean_color(decoded(tmp_path, content)) == pytest.approx((255, 0, 0), abs=6)


def test_a_profile_leaves_transparency_alone(tmp_path: Path) -> None:
    color, profile = RED_IN["P3"]
    picture = plain(color)
    picture.putalpha(128)
    found = mean_color(decoded(tmp_path, encoded(picture, "PNG", icc_profile=profile)))
    assert found == pytest.approx((255, 127, 127), abs=3)


def test_profiles_of_grey_and_cmyk_pictures_count_too(tmp_path: Path) -> None:
    grey = encoded(Image.new("L", (64, 48), 128), "JPEG", quality=95, icc_profile=color_profiles.grey(1.0))
    assert mean_color(decoded(tmp_path, grey)) == pytest.approx((188, 188, 188), abs=2)
    profile = color_profiles.greenish_cmyk()
    for kind in ("JPEG", "TIFF"):
        red = Image.new("CMYK", (64, 48), (0, 255, 255, 0))
        r, g, b = mean_color(decoded(tmp_path, encoded(red, kind, icc_profile=profile)))
        assert g > r + 50, kind
        assert g > b + 20, kind
        assert mean_color(decoded(tmp_path, encoded(red, kind))) == pytest.approx((255, 0, 0), abs=4)


def test_a_profile_that_is_broken_or_of_another_kind_is_ignored(tmp_path: Path) -> None:
    p3 = color_profiles.display_p3()
    wrong = (b"", b"junk", p3[:200], p3[:128] + bytes(len(p3) - 128), color_profiles.greenish_cmyk(), p3[:60] * 50)
    for profile in wrong:
        content = encoded(plain(), "PNG", icc_profile=profile)
        assert mean_color(decoded(tmp_path, content)) == pytest.approx(BRICK, abs=1), profile[:20]


def test_a_profile_that_changes_hardly_anything_costs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = encoded(smooth(1), "PNG", icc_profile=color_profiles.srgb())
    before = decoded(tmp_path, content)
    monkeypatch.setattr(ImageCms, "applyTransform", None)
    monkeypatch.setattr(ImageCms, "buildTransform", None)
    assert decoded(tmp_path, content) == before


@pytest.mark.parametrize("highest", [1.0, 1.2, 4.0])
def test_a_float_grey_with_lights_above_white_is_not_black(highest: float, tmp_path: Path) -> None:
    values = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))
    values[0, 0] = highest
    picture = decoded(tmp_path, encoded(Image.fromarray(values), "TIFF"), Preprocessing(64))
    assert np.asarray(picture)[24].mean() == pytest.approx(127, abs=3)


@pytest.mark.parametrize("highest", [255, 1023, 4095, 16383, 65535])
def test_a_grey_of_any_usual_range_becomes_white_at_its_end(highest: int, tmp_path: Path) -> None:
    for kind in (np.uint16, np.int32, np.float32):
        values = np.tile(np.linspace(0, highest, 64).astype(kind), (48, 1))
        row = np.asarray(decoded(tmp_path, encoded(Image.fromarray(values), "TIFF"), Preprocessing(64)))[24]
        assert (row.min(), row.max()) == (0, 255), kind
        assert row.mean() == pytest.approx(127, abs=3), kind


def test_a_16_bit_grey_whose_zero_is_white_is_no_negative(tmp_path: Path) -> None:
    content = encoded(ramp(), "TIFF", tiffinfo={262: 0})
    row = np.asarray(decoded(tmp_path, content, Preprocessing(64)))[24, :, 0].astype(int)
    assert row[0] == 255
    assert row[63] == pytest.approx(128, abs=2)


def settled(folder: Path, content: bytes, *, seconds_ago: float) -> Image.Image:
    path = folder / "settled.jpg"
    path.write_bytes(content)
    os.utime(path, (time.time() - seconds_ago,) * 2)
    with path.open("rb") as file:
        return decode(file.fileno(), SQUASH, Limits())


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_only_its_last_two_bytes_is_a_photo_once_it_is_surely_complete(
    progressive: bool, tmp_path: Path
) -> None:
    content = encoded(smooth(1, (640, 480)), "JPEG", progressive=progressive)
    wanted = settled(tmp_path, content, seconds_ago=100)
    for missing in (1, 2):
        assert settled(tmp_path, content[:-missing], seconds_ago=100) == wanted
        with pytest.raises(PhotoError) as caught:
            settled(tmp_path, content[:-missing], seconds_ago=10)
        assert caught.value.reason is Reason.TRUNCATED


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_some_of_its_picture_is_truncated_forever(progressive: bool, tmp_path: Path) -> None:
    content = encoded(smooth(1, (640, 480)), "JPEG", progressive=progressive)
    for missing in (6, 10, 40, 200, len(content) // 2):
        with pytest.raises(PhotoError) as caught:
            settled(tmp_path, content[:-missing], seconds_ago=100)
        assert caught.value.reason is Reason.TRUNCATED, missing


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_heic_of_tiles_over_the_limit_is_decoded_tile_by_tile(orientation: int, tmp_path: Path) -> None:
    picture, exif = smooth(3, (700, 500)), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    profile = color_profiles.display_p3()
    content = encoded(picture, "HEIF", quality=90, tile_size=128, exif=exif.tobytes(), icc_profile=profile)
    at_once = decoded(tmp_path, content)
    tight = Limits(max_megapixels=0.1, max_jpeg_megapixels=1)
    assert difference(decoded(tmp_path, content, limits=tight), at_once) < 2
    for limits in (Limits(max_megapixels=0.1, max_jpeg_megapixels=0.1), Limits(0.1, 0.2)):
        assert reason(tmp_path, content, limits) is Reason.TOO_MANY_PIXELS


def test_a_heic_in_one_piece_over_the_limit_is_refused(tmp_path: Path) -> None:
    content = encoded(smooth(3, (700, 500)), "HEIF", quality=90)
    assert reason(tmp_path, content, Limits(max_megapixels=0.1, max_jpeg_megapixels=1)) is Reason.TOO_MANY_PIXELS


def test_a_heic_of_broken_tiles_has_a_reason(tmp_path: Path) -> None:
    content = bytearray(encoded(smooth(3, (700, 500)), "HEIF", quality=90, tile_size=128))
    tight = Limits(max_megapixels=0.1, max_jpeg_megapixels=1)
    assert reason(tmp_path, bytes(content[:-2000]), tight) is Reason.TRUNCATED
    content[-3000:] = bytes(3000)
    assert reason(tmp_path, bytes(content), tight) in (Reason.CORRUPT, Reason.TRUNCATED)
    for position in range(0, 1600, 41):  # any byte of the header
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        with contextlib.suppress(PhotoError):
            decode_file(io.BytesIO(bytes(damaged)), SQUASH, tight)


GREY = np.tile(np.linspace(0, 1, 64)[:, None], (48, 1, 1))
COLOR = np.concatenate([GREY, GREY[:, ::-1], np.full_like(GREY, 0.25)], axis=-1)
HALF = np.full_like(GREY, 0.5)
STRANGE = {
    "float16 grey": (tiff(GREY.astype("<f2")), GREY),
    "float16 RGB": (tiff(COLOR.astype("<f2")), COLOR),
    "float32 RGB": (tiff(COLOR.astype("<f4")), COLOR),
    "float32 RGB to 255": (tiff((COLOR * 255).astype("<f4")), COLOR),
    "float32 RGB to 65535": (tiff((COLOR * 65535).astype("<f4")), COLOR),
    "float32 RGB with lights": (tiff(np.where(COLOR > 0.99, 3, COLOR).astype("<f4")), COLOR),
    "float32 RGB with gaps": (tiff(np.where(COLOR < 0.01, np.nan, COLOR).astype("<f4")), COLOR),
    "float32 RGB, big-endian": (tiff(COLOR.astype(">f4")), COLOR),
    "float32 RGB, tiles": (tiff(COLOR.astype("<f4"), tile=16, deflate=True, predictor=3), COLOR),
    "float32 RGB, planes": (tiff(COLOR.astype("<f4"), planar=True, deflate=True), COLOR),
    "float64 RGB": (tiff(COLOR.astype("<f8"), deflate=True, predictor=3), COLOR),
    "float32 RGBA": (tiff(np.concatenate([COLOR, HALF], -1).astype("<f4"), alpha=2), COLOR / 2 + 0.5),
    "float32 RGBA, multiplied": (tiff(np.concatenate([COLOR / 2, HALF], -1).astype("<f4"), alpha=1), COLOR / 2 + 0.5),
    "uint16 grey with alpha": (tiff((np.concatenate([GREY, HALF], -1) * 65535).astype("<u2"), alpha=2), GREY / 2 + 0.5),
    "uint16 grey, multiplied": (
        tiff((np.concatenate([GREY / 2, HALF], -1) * 65535).astype("<u2"), alpha=1),
        GREY / 2 + 0.5,
    ),
    "uint16 RGB, planes": (tiff((COLOR * 65535).astype("<u2"), planar=True, deflate=True, predictor=2), COLOR),
    "uint16 RGB, big-endian BigTIFF": (tiff((COLOR * 65535).astype(">u2"), big=True), COLOR),
    "uint8 RGB, big-endian BigTIFF": (tiff((COLOR * 255).astype(np.uint8).astype(">u1"), big=True), COLOR),
    "uint32 grey": (tiff((GREY * 4294967295).astype("<u4")), GREY),
    "uint32 grey, zero is white": (tiff(((1 - GREY) * 4294967295).astype("<u4"), t262=0), GREY),
    "uint32 RGB": (tiff((COLOR * 4294967295).astype("<u4")), COLOR),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_tiff_with_samples_that_pillow_cannot_read_is_shown(kind: str, tmp_path: Path) -> None:
    content, wanted = STRANGE[kind]
    found = np.asarray(decoded(tmp_path, content, Preprocessing(48, "center", 48))) / 255
    assert np.abs(found - wanted[:, 8:56]).max() < 0.03


def test_such_a_tiff_is_turned_upright_and_keeps_the_limits(tmp_path: Path) -> None:
    values = np.zeros((48, 96, 3), "<f4")
    values[:, :48, 0] = 1
    picture = decoded(tmp_path, tiff(values, t274=6), Preprocessing(32))
    assert picture.getpixel((16, 4)) == (255, 0, 0)
    assert picture.getpixel((16, 28)) == (0, 0, 0)
    assert reason(tmp_path, tiff(values), TIGHT) is Reason.TOO_MANY_PIXELS


def test_such_a_tiff_that_is_broken_has_a_reason(tmp_path: Path) -> None:
    content = tiff(COLOR.astype("<f4"), deflate=True)
    assert reason(tmp_path, content[: len(content) // 2]) is Reason.TRUNCATED
    assert reason(tmp_path, content[:8] + bytes(100) + content[108:]) in (Reason.TRUNCATED, Reason.CORRUPT)
    assert reason(tmp_path, tiff(np.full((8, 8, 3), np.nan, "<f4"))) is Reason.CORRUPT
    for position in range(content.index(zlib.compress(b"")[:1]), len(content), 11):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        with contextlib.suppress(PhotoError):
            decode_file(io.BytesIO(bytes(damaged)), SQUASH, Limits())
