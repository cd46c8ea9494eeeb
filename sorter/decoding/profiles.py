"""Embedded colour profiles: the colours of a picture that is already small become those of sRGB.

In: a picture and the ICC profile of its file. Out: the picture in sRGB. A broken profile, or one of another kind of
picture, is ignored: the photo counts, and it is shown as viewers without colour management show it.
"""

import io
import itertools
from functools import lru_cache

from PIL import Image, ImageChops, ImageCms, ImageStat

# A picture's mode -> what the header of its profile says.
_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}
# On average over all colours, of 255: variants of sRGB differ by less, and nobody sees it.
_SMALL_DIFFERENCE = 2.0
# The profiles of one camera or editor are the same bytes: they are parsed once for each process.
_MAX_TRANSFORMS = 8


def fits(profile: bytes | None, mode: str) -> bool:
    """Whether a profile is one for pictures of this mode (L, RGB or CMYK)."""
    return profile is not None and profile[16:20] == _SPACES.get(mode)


def to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an RGB, RGBA or CMYK picture of 8 bits per channel to RGB or RGBA in sRGB."""
    target = "RGBA" if picture.mode == "RGBA" else "RGB"
    mode = picture.mode if picture.mode == "CMYK" else "RGB"
    if profile is None or not (fits(profile, mode) or (mode == "RGB" and fits(profile, "L"))):
        return picture.convert(target)
    mode = next(name for name in _SPACES if fits(profile, name))
    transform = _transform(profile, mode)
    if transform is None:
        return picture.convert(target)
    small = picture.getchannel("G") if mode == "L" else picture.convert(mode)
    converted = ImageCms.applyTransform(small, transform)
    assert converted is not None, "only a conversion in place returns nothing"
    if target == "RGBA":
        converted.putalpha(picture.getchannel("A"))
    return converted


@lru_cache(_MAX_TRANSFORMS)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion to sRGB; None if it is impossible or changes hardly anything."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        colors = _every_color(mode)
        changed = ImageChops.difference(ImageCms.applyTransform(colors, transform), colors.convert("RGB"))  # type: ignore[arg-type]
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    means = ImageStat.Stat(changed).mean
    return transform if sum(means) / len(means) > _SMALL_DIFFERENCE else None


def _every_color(mode: str) -> Image.Image:
    """256 greys, or 512 colours."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    colors = itertools.product(range(0, 256, 36), repeat=3)
    return Image.frombytes("RGB", (512, 1), bytes(itertools.chain.from_iterable(colors)))
