"""From any of Pillow's modes to 8 bits per channel, on a picture that is reduced meanwhile.

In: a loaded picture. Out: RGB, RGBa where it is transparent, or CMYK where it has a profile for that.
"""

import math

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from sorter.decoding import profiles
from sorter.errors import PhotoError, Reason

_BAND_PIXELS = 4_000_000
# Of greys with more than 8 bits: masks, 8 bits, the sensors of cameras and scanners, 16 bits.
_WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
# How much brighter than white the lights of a float picture are, at most: four stops.
_HEADROOM = 16.0
_PHOTOMETRIC = 262


def reduced(image: Image.Image, across: int, down: int) -> Image.Image:
    """Average blocks of `across` by `down` pixels, in RGB, or in RGBa where the picture is transparent.

    Works on a band of rows at a time: most modes need two or three copies on their way to RGB, each 400 MB for a
    picture of 100 megapixels.
    """
    width, height = image.size
    rows = max(1, _BAND_PIXELS // (width * down)) * down
    bands = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    ends = _range_of(image, bands) if image.mode[0] in "IF" else None
    result: Image.Image | None = None
    for band in bands:
        part = _without_depth(image if len(bands) == 1 else image.crop(band), ends).reduce((across, down))
        if len(bands) == 1:
            return part
        if result is None:
            result = Image.new(part.mode, (part.width, math.ceil(height / down)))
        result.paste(part, (0, band[1] // down))
    assert result is not None, "a picture has at least one row"
    return result


def _without_depth(image: Image.Image, ends: tuple[float, float] | None) -> Image.Image:
    """Convert any of Pillow's modes to RGB, to RGBa if transparent, or keep CMYK with a profile; 8 bits per channel."""
    if ends is not None:  # 16-bit greys, 32-bit integers, floats
        black, white = ends
        scale = 255 / ((white - black) or 1.0)
        return image.convert("F").point(lambda value: (value - black) * scale).convert("L").convert("RGB")
    if image.mode == "CMYK" and profiles.fits(image.info.get("icc_profile"), "CMYK"):
        return image
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        return image.convert("RGBA").convert("RGBa")
    return image.convert("RGB")


def _range_of(image: Image.Image, bands: list[tuple[int, int, int, int]]) -> tuple[float, float]:
    """The values of black and white in a grey picture of more than 8 bits."""
    extremes: list[float] = []
    means: list[float] = []
    for band in bands:
        part = image.crop(band).convert("F")
        extremes += part.getextrema()  # type: ignore[arg-type]
        means.append(part.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))  # type: ignore[arg-type]
    mean = sum(means) / len(means)
    black, white = black_and_white(image.mode == "F", min(extremes), max(extremes), mean)
    is_inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
    return (white, black) if is_inverted else (black, white)


def black_and_white(is_float: bool, low: float, high: float, mean: float) -> tuple[float, float]:
    """The values of black and white: the narrowest usual range that contains the picture, else the picture's own.

    A float picture in which some lights are brighter than white (1) stays in its range: they are white.
    """
    if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(mean)):
        raise PhotoError(Reason.CORRUPT, "its pixel values are not finite numbers")
    if is_float and low >= -_HEADROOM and high <= _HEADROOM and 0 < mean <= 1:
        return 0.0, 1.0
    return next(((0.0, white) for white in _WHITES if low >= 0 and high <= white), (low, high))
