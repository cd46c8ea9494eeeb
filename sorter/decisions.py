"""What is to become of a photo, and what became of it.

In: a decoded photo and its probabilities. Out: a `Decision`; later, from the mover, an `Outcome`.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sorter.classifier.manifest import Manifest
from sorter.decoding.decoded import Decoded
from sorter.errors import Reason
from sorter.files.photo import Photo
from sorter.history.store import UNSURE

TRUNCATED_GRACE_SECONDS = 60.0
"""A photo that reads as truncated and changed within this time may still be on its way: it is looked at again."""

Kind = Literal["sorted", "unsure", "failed", "sidecar", "skipped", "left", "again"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a photo belongs, and why.

    Attributes:
        kind: `sidecar` is no photo, and follows one.
        folder: beside the other destinations, `cats`, `unsure`, `failed`.
        label: the likeliest class, None if it was not classified.
        confidence: that class's probability, 0 to 1.
        batch_size: how many photos were classified together.
        name: the one that it has to have there; empty for its own, or the next that is free.
        follows: of a sidecar, the name that its photo has in that folder.
        detail: why it is unsure, for a person, where its confidence does not say it.
    """

    decoded: Decoded
    kind: Literal["sorted", "unsure", "failed", "sidecar"]
    folder: str
    label: str | None = None
    confidence: float | None = None
    batch_size: int = 0
    name: str = ""
    follows: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a photo.

    Attributes:
        kind: `sorted`, `unsure`, `failed` and `sidecar` were moved; `skipped` is no photo; `left` is a photo that
            could not be moved or read; `again` changed meanwhile and wants another look.
        destination: where it is now, None where it stayed.
        detail: why, for a person.
        look_again: when `again` wants its look, in seconds since the epoch.
    """

    photo: Photo
    kind: Kind
    decision: Decision | None = None
    destination: str | None = None
    detail: str = ""
    look_again: float = 0.0


def complete_after(decoded: Decoded, now: float) -> float:
    """When a photo that failed counts as complete, in seconds since the epoch; until then it may still be written.

    A modification time in the future tells nothing: then it counts from when this version was first seen.
    """
    if decoded.reason not in (Reason.TRUNCATED, Reason.EMPTY):
        return 0.0
    modified = decoded.photo.identity.mtime_ns / 1e9
    return (modified if modified <= now else decoded.photo.seen) + TRUNCATED_GRACE_SECONDS


def decide(
    decoded: Decoded,
    probabilities: list[float],
    manifest: Manifest,
    min_confidence: float,
    batch_size: int,
    distance: float | None = None,
) -> Decision:
    """Choose the folder of a classified photo.

    Args:
        decoded: the photo.
        probabilities: of each class.
        manifest: of the model.
        min_confidence: what is less sure is not sorted.
        batch_size: how many photos were classified together.
        distance: from what the model was fitted on; None if photos of none of the classes are not looked for.
    """
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    confidence, chosen = probabilities[best], manifest.classes[best]
    if distance is not None and manifest.neither is not None and distance > manifest.neither.threshold:
        detail = "looks like neither " + " nor ".join(c.label for c in manifest.classes)
        return Decision(decoded, "unsure", UNSURE, chosen.label, confidence, batch_size, detail=detail)
    if confidence < min_confidence:
        return Decision(decoded, "unsure", UNSURE, chosen.label, confidence, batch_size)
    return Decision(decoded, "sorted", chosen.folder, chosen.label, confidence, batch_size)


def described(outcome: Outcome) -> dict[str, Any]:
    """What became of a photo that was decided on, for JSON."""
    decision = outcome.decision
    assert decision is not None, "called only for photos with a decision"
    return {
        "path": outcome.photo.path,
        "destination": outcome.destination,
        "kind": outcome.kind,
        "label": decision.label,
        "confidence": None if decision.confidence is None else round(decision.confidence, 4),
        "reason": decision.decoded.reason,
    }
