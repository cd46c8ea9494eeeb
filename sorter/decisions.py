"""What is to become of a photo, and what became of it.

In: a decoded photo and its probabilities. Out: a `Decision`; later, from the mover, an `Outcome`.

The confidence threshold (`--min-confidence`, or the one that `--max-error-rate` stands for) is applied in `decide`, and
nowhere else. The OpenVINO engine compares it with the cascade's threshold, to know whether it can use the cascade.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from sorter.classifier.manifest import Manifest
from sorter.decoding.decoded import Decoded
from sorter.decoding.images import ARRIVING_SECONDS
from sorter.errors import Reason
from sorter.files import FAILED, UNSURE
from sorter.files.photo import Photo
from sorter.history.store import Run

Kind = Literal["sorted", "unsure", "failed", "sidecar", "kept", "skipped", "left", "again"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a photo belongs, and why.

    Attributes:
        kind: a `sidecar` is not a photo, and follows one.
        folder: the destination's name: `cats`, `unsure`, `failed`.
        label: the likeliest class, None if the photo was not classified.
        confidence: that class's probability, 0 to 1.
        batch_size: how many photos were classified together.
        name: the path that the file must have in the folder; empty for its own name, or the next free one.
        follows: for a sidecar, the path of its photo in the folder.
        detail: why it is unsure, for a person, where its confidence is not the reason.
        run: names the model that was in use when this was decided.
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
    run: Run = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a photo.

    Attributes:
        kind: `sorted`, `unsure`, `failed` and `sidecar` were moved; `kept` is in its folder already; `skipped` is not a
            photo; `left` could not be moved or read; `again` changed in the meantime and needs another look.
        destination: where it is now, None if it stayed.
        detail: why, for a person.
        look_again: for `again`, the earliest time for that look, in seconds since the epoch.
    """

    photo: Photo
    kind: Kind
    decision: Decision | None = None
    destination: str | None = None
    detail: str = ""
    look_again: float = 0.0


Decided = Decision | Outcome
"""What the engine's threads hand to the mover: photos to move, and photos that stay where they are."""


def decide(
    decoded: Decoded,
    probabilities: list[float],
    manifest: Manifest,
    min_confidence: float,
    batch_size: int,
    distance: float | None = None,
    *,
    run: Run,
) -> Decision:
    """Choose the folder of a classified photo.

    Args:
        decoded: the photo.
        probabilities: of each class.
        manifest: of the model.
        min_confidence: the threshold; photos with a lower confidence go to `unsure/`.
        batch_size: how many photos were classified together.
        distance: above 0 the photo looks like none of the classes; None if outliers are not looked for.
        run: in which the model is used.
    """
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    confidence, likeliest = probabilities[best], manifest.classes[best]
    if distance is not None and distance > 0:
        detail = "looks like neither " + " nor ".join(c.label for c in manifest.classes)
        return Decision(decoded, UNSURE, UNSURE, likeliest.label, confidence, batch_size, detail=detail, run=run)
    if confidence < min_confidence:
        return Decision(decoded, UNSURE, UNSURE, likeliest.label, confidence, batch_size, run=run)
    return Decision(decoded, "sorted", likeliest.folder, likeliest.label, confidence, batch_size, run=run)


def unanswered(decoded: Decoded) -> Outcome:
    """Leave a photo for which the engine's answer is not a number, as half precision overflows: it decides nothing."""
    return Outcome(decoded.photo, "left", detail="the model's answer is not a number: try --device cpu")


def kept(item: Decided, sorted_again: str | None) -> Decided:
    """Keep a photo where it is if that is where it belongs.

    Args:
        item: what was decided.
        sorted_again: that folder's name, `unsure` or `failed`; None for any other inbox.
    """
    if isinstance(item, Decision) and item.folder == sorted_again:
        return Outcome(item.decoded.photo, "kept", item)
    return item


def decide_unclassified(decoded: Decoded, now: float, run: Run) -> Decided:
    """Decide on a photo that has no pixels to classify: it fails, stays, or gets another look.

    Args:
        decoded: the photo, with any verdict but `pixels`.
        now: seconds since the epoch.
        run: the present one.
    """
    if (complete := complete_after(decoded, now)) > now:
        return Outcome(decoded.photo, "again", detail="may still be written", look_again=complete)
    match decoded.verdict:
        case "failed":
            return Decision(decoded, FAILED, FAILED, run=run)
        case "skipped" | "left":
            return Outcome(decoded.photo, decoded.verdict, detail=decoded.detail)
        case _:
            return Outcome(decoded.photo, "again", detail=decoded.detail)


def complete_after(decoded: Decoded, now: float) -> float:
    """When a photo that failed counts as complete, in seconds since the epoch; until then it may still be written.

    A modification time in the future says nothing: the grace period then starts when this version was first seen.
    """
    if decoded.reason not in (Reason.TRUNCATED, Reason.EMPTY):
        return 0.0
    modified = decoded.photo.identity.mtime_ns / 1e9
    return (modified if modified <= now else decoded.photo.seen) + ARRIVING_SECONDS


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
