"""What the decoders hand on."""

from dataclasses import dataclass
from typing import Literal

from sorter.errors import Reason
from sorter.files.photo import Photo

Verdict = Literal["pixels", "failed", "skipped", "left", "gone"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of one photo.

    Attributes:
        photo: with the identity of the file that was decoded, which need not be the one the scan saw.
        verdict: `pixels` (in `row`), `failed` (with `reason`), `skipped` (not a photo, or a raw file with a `reason`),
            `left` (may not or cannot be read now), `gone` (no longer there, or no longer the settled file).
        row: the row of `Decoders.pixels`; whoever takes it gives it back with `Decoders.release`.
        detail: what a person wants to know about a verdict other than `pixels`.
        milliseconds: time in the decoder.
    """

    photo: Photo
    verdict: Verdict
    row: int = -1
    reason: Reason | None = None
    detail: str = ""
    milliseconds: float = 0.0
