"""The result of decoding one photo."""

from dataclasses import dataclass
from typing import Literal

from sorter.errors import Reason
from sorter.files.photo import Photo

Verdict = Literal["pixels", "failed", "skipped", "left", "gone"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """The result of decoding one photo.

    Attributes:
        photo: with the identity of the file that was decoded, which may be newer than the one the scan saw.
        verdict: `pixels` (in `row`), `failed` (with `reason`), `skipped` (not a photo, or a raw file with a `reason`),
            `left` (cannot be read now, or not by this user), `gone` (no longer there, or no longer the
            settled file).
        row: the row of `Decoders.pixels`; the consumer returns it with `Decoders.release`.
        detail: for a person; why the verdict is not `pixels`.
        size: width and height of the picture in the row, pixels.
        milliseconds: time in the decoder.
    """

    photo: Photo
    verdict: Verdict
    row: int = -1
    reason: Reason | None = None
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    milliseconds: float = 0.0
