"""A dataset in four parts: photos that all decode, and no photo in two parts, not even as a near copy.

In: what was found on disk, and each file's inspection. Out: a `Dataset`, and what was left out of it.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from sorter.classifier.manifest import Class
from sorter.errors import ConfigurationError
from trainer.data import near_copies
from trainer.data.inspection import Inspection
from trainer.data.layouts import Found, Part, Sample
from trainer.data.others import NONE, Others

VALIDATION_SHARE, CALIBRATION_SHARE, TEST_SHARE = 0.1, 0.1, 0.1
MAX_CONTRADICTORY_SHARE = 0.01
"""If more photos than this appear under two labels, it is no oversight and the dataset is refused."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A photo that was left out, and the held-out photo `of` which it is a copy."""

    path: Path
    of: Path
    kind: Literal["exact", "near"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Photos that decode, in four parts; no photo is in two of them, not even as a near copy.

    Attributes:
        unreadable: files that were left out, each with the reason.
        duplicates: copies that were left out.
        contradictions: pairs with the same content under two labels; both were left out.
        fingerprint: SHA-256 of every photo's content, label and part.
        others: photos that show none of the classes, which are in no part.
    """

    layout: str
    classes: tuple[Class, ...]
    training: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    calibration: tuple[Sample, ...]
    test: tuple[Sample, ...]
    unreadable: tuple[tuple[Path, str], ...]
    duplicates: tuple[Duplicate, ...]
    contradictions: tuple[tuple[Path, Path], ...]
    fingerprint: str
    others: Others = NONE


def divide(found: Found, inspected: dict[Path, Inspection], calibration: Sequence[Sample], seed: int) -> Dataset:
    """Leave out what cannot be used and divide the rest.

    Parts that the layout lacks are drawn from the training part, stratified by class, near copies together.

    Args:
        found: the dataset's photos.
        inspected: each file's inspection.
        calibration: photos given for calibration; none to draw them.
        seed: of the draw; the same seed and files give the same parts.

    Raises:
        ConfigurationError: too many photos appear under two labels, or a part has no photo of some class.
    """
    unreadable = [
        (sample.path, reason)
        for sample in (*found.samples, *calibration)
        if (reason := inspected[sample.path].reason) is not None
    ]
    readable = [sample for sample in found.samples if inspected[sample.path].reason is None]
    readable, contradictions = _without_contradictions(readable, inspected)
    parts: dict[Part, list[Sample]] = {"training": [], "validation": [], "calibration": [], "test": []}
    for sample in readable:
        parts[sample.part].append(sample)
    parts["calibration"] = [sample for sample in calibration if inspected[sample.path].reason is None]
    _draw_missing(parts, inspected, seed)
    duplicates = _leave_out_copies(parts, inspected)
    _check_every_class(parts, found.classes)
    return Dataset(
        found.layout,
        found.classes,
        training=tuple(parts["training"]),
        validation=tuple(parts["validation"]),
        calibration=tuple(parts["calibration"]),
        test=tuple(parts["test"]),
        unreadable=tuple(unreadable),
        duplicates=tuple(duplicates),
        contradictions=tuple(contradictions),
        fingerprint=_fingerprint(parts, inspected),
    )


def without_copies(
    samples: Sequence[Sample], held_out: Sequence[Sample], inspected: dict[Path, Inspection]
) -> tuple[list[Sample], list[Duplicate]]:
    """Leave out photos that show the same as a held-out photo."""
    by_digest = {inspected[sample.path].digest: sample.path for sample in held_out}
    hashes = _hashes(held_out, inspected)
    kept, duplicates = [], []
    for sample, own in zip(samples, _hashes(samples, inspected), strict=True):
        exact = by_digest.get(inspected[sample.path].digest)
        if exact is not None:
            duplicates.append(Duplicate(sample.path, exact, "exact"))
            continue
        distances = near_copies.distances(hashes, own)
        if len(distances) and distances.min() <= near_copies.MAX_BITS:
            duplicates.append(Duplicate(sample.path, held_out[int(distances.argmin())].path, "near"))
            continue
        kept.append(sample)
    return kept, duplicates


def _draw_missing(parts: dict[Part, list[Sample]], inspected: dict[Path, Inspection], seed: int) -> None:
    """Draw the parts that are empty from the training part."""
    draw = random.Random(seed)  # noqa: S311
    photos = len(parts["training"])
    clusters = _clusters(parts["training"], inspected)
    shares: dict[Part, float] = {
        "test": TEST_SHARE,
        "validation": VALIDATION_SHARE,
        "calibration": CALIBRATION_SHARE,
    }
    for part, share in shares.items():
        if not parts[part]:
            chosen = _draw(clusters, share * photos, draw)
            paths = {sample.path for cluster in chosen for sample in cluster}
            clusters = [cluster for cluster in clusters if cluster[0].path not in paths]
            taken = [sample for sample in parts["training"] if sample.path in paths]
            parts[part] = [Sample(sample.path, sample.label, part) for sample in taken]
            parts["training"] = [sample for sample in parts["training"] if sample.path not in paths]


def _leave_out_copies(parts: dict[Part, list[Sample]], inspected: dict[Path, Inspection]) -> list[Duplicate]:
    """Remove test photos' copies from all other parts, calibration photos' from the next two, then validation's."""
    held_out, duplicates = list(parts["test"]), []
    others: tuple[Part, ...] = ("calibration", "validation", "training")
    for part in others:
        parts[part], found = without_copies(parts[part], held_out, inspected)
        duplicates += found
        held_out += parts[part]
    return duplicates


def _check_every_class(parts: dict[Part, list[Sample]], classes: Sequence[Class]) -> None:
    for part, samples in parts.items():
        for index, one in enumerate(classes):
            if not any(sample.label == index for sample in samples):
                raise ConfigurationError(
                    f"the {part} part has no readable photo of {one.label}: add photos, or replace damaged ones"
                )


def _clusters(samples: Sequence[Sample], inspected: dict[Path, Inspection]) -> list[list[Sample]]:
    """The samples, near copies together: shots of one burst on both sides of a split would make it look too good."""
    clusters: dict[int, list[Sample]] = {}
    for sample, group in zip(samples, near_copies.groups(_hashes(samples, inspected)).tolist(), strict=True):
        clusters.setdefault(group, []).append(sample)
    return list(clusters.values())


def _draw(clusters: Sequence[list[Sample]], count: float, draw: random.Random) -> list[list[Sample]]:
    """Draw clusters of about `count` samples, the same share of each class."""
    photos, chosen = sum(map(len, clusters)), []
    for label in sorted({cluster[0].label for cluster in clusters}):
        of_label = [cluster for cluster in clusters if cluster[0].label == label]
        left = max(1, round(count * sum(map(len, of_label)) / photos))
        fitting = []
        for cluster in draw.sample(of_label, len(of_label)):
            if len(cluster) <= left:
                fitting.append(cluster)
                left -= len(cluster)
        chosen += fitting or [min(of_label, key=len)]
    return chosen


def _without_contradictions(
    samples: Sequence[Sample], inspected: dict[Path, Inspection]
) -> tuple[list[Sample], list[tuple[Path, Path]]]:
    """Leave out photos whose exact content also appears under another label; Kaggle's set has one such pair.

    Raises:
        ConfigurationError: there are too many for an oversight.
    """
    labels: dict[str, set[int]] = {}
    for sample in samples:
        labels.setdefault(inspected[sample.path].digest, set()).add(sample.label)
    contradictory = [sample for sample in samples if len(labels[inspected[sample.path].digest]) > 1]
    pairs = [
        (one.path, other.path)
        for i, one in enumerate(contradictory)
        for other in contradictory[i + 1 :]
        if inspected[one.path].digest == inspected[other.path].digest and one.label != other.label
    ]
    if len(contradictory) > MAX_CONTRADICTORY_SHARE * len(samples):
        one, other = pairs[0]
        raise ConfigurationError(
            f"{len(contradictory)} photos appear under two labels (for example {one} and {other}): "
            "remove the wrong copies"
        )
    left_out = {sample.path for sample in contradictory}
    return [sample for sample in samples if sample.path not in left_out], pairs


def _hashes(samples: Sequence[Sample], inspected: dict[Path, Inspection]) -> npt.NDArray[np.uint64]:
    return np.array([int(inspected[sample.path].perceptual_hash, 16) for sample in samples], np.uint64)


def _fingerprint(parts: dict[Part, list[Sample]], inspected: dict[Path, Inspection]) -> str:
    digest = hashlib.sha256()
    for part, samples in parts.items():
        for sample in samples:
            digest.update(f"{part} {sample.label} {inspected[sample.path].digest}\n".encode())
    return digest.hexdigest()


def describe(dataset: Dataset) -> str:
    """Describe a dataset in one line."""
    counts = {
        "training": dataset.training,
        "validation": dataset.validation,
        "calibration": dataset.calibration,
        "test": dataset.test,
    }
    labels = Counter(dataset.classes[s.label].label for samples in counts.values() for s in samples)
    parts = ", ".join(f"{len(samples)} {part}" for part, samples in counts.items())
    return f"layout {dataset.layout}: " + ", ".join(f"{n} {label}" for label, n in labels.items()) + f"; {parts}"
