"""Datasets on disk: which photo has which label and belongs to which part.

In: a folder or a zip. Out: a `Dataset` whose photos all decode, with no content of its test part in any other.

Recognised layouts, first match wins:

    cat-and-dog     training_set/training_set/{cats,dogs}/cat.1.jpg, test_set/…    Kaggle's tongpython/cat-and-dog
    dogs-vs-cats    train/cat.0.jpg and train/dog.0.jpg flat, or still in train.zip    Kaggle's c/dogs-vs-cats
    image-folder    {train,val,test}/class/…    torchvision's ImageFolder
    pet-images      PetImages/{Cat,Dog}/…    Microsoft's
    classes         class/…    an ImageFolder without parts
"""

import random
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from sorter.errors import ConfigurationError
from sorter.images import EXTENSIONS
from sorter.manifest import Class
from trainer.inspection import Inspection

Part = Literal["training", "validation", "calibration", "test"]

CATS_AND_DOGS = (Class(label="cat", folder="cats"), Class(label="dog", folder="dogs"))
VALIDATION_SHARE, CALIBRATION_SHARE, TEST_SHARE = 0.1, 0.1, 0.1
NEAR_DUPLICATE_BITS = 4
"""Perceptual hashes of 64 bits that differ in at most so many are taken for the same photo."""

MAX_CONTRADICTORY_SHARE = 0.01
"""More photos than this under two labels are no oversight: the dataset is refused."""

_SPLIT_NAMES: dict[str, Part] = {
    "train": "training",
    "training": "training",
    "training_set": "training",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "test_set": "test",
}
_JUNK = ("__MACOSX",)


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo, the index of its class, and the part that its layout puts it in."""

    path: Path
    label: int
    part: Part = "training"


@dataclass(frozen=True, slots=True)
class Found:
    """What lies in a dataset, before any photo was opened."""

    layout: str
    classes: tuple[Class, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A training photo that was left out because a test photo shows the same."""

    path: Path
    of: Path
    kind: Literal["exact", "near"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Photos that decode, in four disjoint parts.

    Attributes:
        unreadable: what was left out, with the reason.
        duplicates: training photos that were left out.
        contradictions: pairs of one content under two labels; both were left out.
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


def find(data: Path, cache: Path) -> Found:
    """Recognise a dataset's layout.

    Args:
        data: a folder or a zip.
        cache: where zips are unpacked, once.

    Raises:
        ConfigurationError: no layout fits, or there is but one class.
    """
    if not data.exists():
        raise ConfigurationError(f"there is no {data}: name the dataset's folder or zip with --data")
    root = _inner(unpack(data, cache) if data.is_file() else data)
    found = _flat(root, cache) or _split(root) or _classes(root)
    if found is None:
        raise ConfigurationError(
            f"{data} has no layout that is known: it needs a folder for each class, train/ and test/ with such "
            "folders, or train/ with cat.0.jpg and dog.0.jpg"
        )
    if len(found.classes) < 2 or len({sample.label for sample in found.samples}) < 2:
        raise ConfigurationError(f"{data} has photos of one class only: a classifier needs two or more")
    return found


def unpack(archive: Path, cache: Path) -> Path:
    """Unpack a zip into the cache, once for each version of it.

    Raises:
        ConfigurationError: it is no zip, or is damaged.
    """
    status = archive.stat()
    target = cache / "unpacked" / f"{archive.stem}-{status.st_size}-{status.st_mtime_ns}"
    if target.is_dir():
        return target
    beside = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(beside)
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigurationError(f"{archive} cannot be unpacked ({error}): download it again") from None
    beside.rename(target)
    return target


def divide(found: Found, inspected: dict[Path, Inspection], calibration: Sequence[Sample], seed: int) -> Dataset:
    """Leave out what cannot be used and divide the rest.

    Parts that the layout lacks are drawn from the training part, stratified by class.

    Args:
        found: the layout.
        inspected: what each file's inspection said.
        calibration: photos named for calibration; none to draw them.
        seed: of the draw; the same seed and files give the same parts.

    Raises:
        ConfigurationError: too many contents have two labels, or nothing of a class is left.
    """
    readable = [sample for sample in found.samples if inspected[sample.path].reason is None]
    unreadable = [(s.path, str(inspected[s.path].reason)) for s in found.samples if inspected[s.path].reason]
    readable, contradictions = _without_contradictions(readable, inspected, found.classes)
    parts: dict[Part, list[Sample]] = {"training": [], "validation": [], "calibration": list(calibration), "test": []}
    for sample in readable:
        parts[sample.part].append(sample)
    draw = random.Random(seed)  # noqa: S311
    shares: list[tuple[Part, float]] = [("test", TEST_SHARE), ("validation", VALIDATION_SHARE)]
    shares.append(("calibration", CALIBRATION_SHARE))
    whole = len(parts["training"])
    for part, share in shares:
        if not parts[part]:
            parts[part], parts["training"] = _draw(parts["training"], share * whole, draw, part)
    held_out = [sample for part in ("test", "calibration") for sample in parts[part]]
    parts["training"], duplicates = _without_copies(parts["training"], held_out, inspected)
    parts["validation"], more = _without_copies(parts["validation"], held_out, inspected)
    for part, samples in parts.items():
        for index, one in enumerate(found.classes):
            if not any(sample.label == index for sample in samples):
                raise ConfigurationError(
                    f"the {part} part has no readable photo of {one.label}: the dataset is too small, or its files are "
                    "broken"
                )
    return Dataset(
        found.layout,
        found.classes,
        training=tuple(parts["training"]),
        validation=tuple(parts["validation"]),
        calibration=tuple(parts["calibration"]),
        test=tuple(parts["test"]),
        unreadable=tuple(unreadable),
        duplicates=tuple(duplicates + more),
        contradictions=tuple(contradictions),
    )


# --- layouts -----------------------------------------------------------------------------------------------------


def _inner(root: Path) -> Path:
    """Go down while a folder holds one folder and nothing else of interest."""
    while True:
        inside = [entry for entry in root.iterdir() if entry.name not in _JUNK and not entry.name.startswith(".")]
        folders = [entry for entry in inside if entry.is_dir()]
        photos = [entry for entry in inside if entry.suffix.lower() in EXTENSIONS | {".zip"}]
        if len(folders) != 1 or photos or folders[0].name.lower() in _SPLIT_NAMES or _has_photos(folders[0]):
            return root
        root = folders[0]


def _flat(root: Path, cache: Path) -> Found | None:
    """The competition's layout: labels in the names of the files."""
    packed, folder = root / "train.zip", root / "train"
    if packed.is_file() and not folder.is_dir():
        folder = _inner(unpack(packed, cache))
        folder = folder / "train" if (folder / "train").is_dir() else folder
    elif not folder.is_dir():
        folder = root
    samples = [
        Sample(path, ("cat", "dog").index(kind))
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in EXTENSIONS and (kind := path.name.split(".")[0].lower()) in ("cat", "dog")
    ]
    return Found("dogs-vs-cats", CATS_AND_DOGS, tuple(samples)) if samples else None


def _split(root: Path) -> Found | None:
    """Folders for the parts, and in them folders for the classes."""
    folders = {entry: _SPLIT_NAMES.get(entry.name.lower()) for entry in sorted(root.iterdir()) if entry.is_dir()}
    # Kaggle's set has each part's folder twice, one in the other.
    doubled = {entry: entry / entry.name for entry in folders}
    parts = {inner if (inner := doubled[e]).is_dir() else e: part for e, part in folders.items() if part is not None}
    if "training" not in parts.values():
        return None
    names = sorted({entry.name for folder in parts for entry in folder.iterdir() if entry.is_dir()})
    classes = _named(names)
    samples = [s for folder, part in parts.items() for s in _in_class_folders(folder, classes, part)]
    layout = "cat-and-dog" if any(entry.name == "training_set" for entry in folders) else "image-folder"
    return Found(layout, classes, tuple(samples))


def _classes(root: Path) -> Found | None:
    """Folders for the classes."""
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and any(_photos(entry)))
    if not names:
        return None
    classes = _named(names)
    layout = "pet-images" if root.name == "PetImages" else "classes"
    return Found(layout, classes, tuple(_in_class_folders(root, classes, "training")))


def _named(names: Sequence[str]) -> tuple[Class, ...]:
    """Cats and dogs by whatever name are always `cats/` and `dogs/`; other classes keep their folders' names."""
    if {name.lower().rstrip("s") for name in names} == {"cat", "dog"}:
        return CATS_AND_DOGS
    return tuple(Class(label=name, folder=name) for name in names)


def index_of(classes: Sequence[Class]) -> dict[str, int]:
    """The index of each class by its label and by its folder, in lower case."""
    return {name.lower(): i for i, c in enumerate(classes) for name in (c.label, c.folder)}


def _in_class_folders(root: Path, classes: Sequence[Class], part: Part) -> list[Sample]:
    index = index_of(classes)
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name.lower() in index]
    return [Sample(path, index[folder.name.lower()], part) for folder in folders for path in _photos(folder)]


def _has_photos(folder: Path) -> bool:
    return any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())


def _photos(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    )


# --- dividing ----------------------------------------------------------------------------------------------------


def _draw(
    samples: Sequence[Sample], count: float, draw: random.Random, part: Part
) -> tuple[list[Sample], list[Sample]]:
    """Take about `count` samples, the same share of each class; return them and the rest."""
    taken: list[Sample] = []
    for label in sorted({sample.label for sample in samples}):
        of_label = [sample for sample in samples if sample.label == label]
        share = max(1, round(count * len(of_label) / len(samples)))
        taken += draw.sample(of_label, min(share, len(of_label)))
    chosen = {sample.path for sample in taken}
    return (
        [Sample(sample.path, sample.label, part) for sample in samples if sample.path in chosen],
        [sample for sample in samples if sample.path not in chosen],
    )


def _without_contradictions(
    samples: Sequence[Sample], inspected: dict[Path, Inspection], classes: Sequence[Class]
) -> tuple[list[Sample], list[tuple[Path, Path]]]:
    """Leave out photos whose very content also stands under another label; Kaggle's own set has such a pair.

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
            f"{len(contradictory)} photos stand under two labels, {one} and {other} for example: take the wrong out"
        )
    left_out = {sample.path for sample in contradictory}
    return [sample for sample in samples if sample.path not in left_out], pairs


def _without_copies(
    samples: Sequence[Sample], held_out: Sequence[Sample], inspected: dict[Path, Inspection]
) -> tuple[list[Sample], list[Duplicate]]:
    """Leave out what shows the same as a held-out photo."""
    by_digest = {inspected[sample.path].digest: sample.path for sample in held_out}
    hashes = _hashes(held_out, inspected)
    kept, duplicates = [], []
    for sample, own in zip(samples, _hashes(samples, inspected), strict=True):
        exact = by_digest.get(inspected[sample.path].digest)
        if exact is not None:
            duplicates.append(Duplicate(sample.path, exact, "exact"))
            continue
        distances = _ones(hashes ^ own)
        if len(distances) and distances.min() <= NEAR_DUPLICATE_BITS:
            duplicates.append(Duplicate(sample.path, held_out[int(distances.argmin())].path, "near"))
            continue
        kept.append(sample)
    return kept, duplicates


def _hashes(samples: Sequence[Sample], inspected: dict[Path, Inspection]) -> npt.NDArray[np.uint64]:
    return np.array([int(inspected[sample.path].perceptual_hash, 16) for sample in samples], np.uint64)


def _ones(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """How many bits are set in each value, (N,) -> (N,)."""
    ones: npt.NDArray[np.intp] = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(1, dtype=np.intp)
    return ones


def describe(dataset: Dataset) -> str:
    """A dataset in one line for a person."""
    counts = {
        "training": dataset.training,
        "validation": dataset.validation,
        "calibration": dataset.calibration,
        "test": dataset.test,
    }
    labels = Counter(dataset.classes[s.label].label for samples in counts.values() for s in samples)
    parts = ", ".join(f"{len(samples)} {part}" for part, samples in counts.items())
    return f"layout {dataset.layout}: " + ", ".join(f"{n} {label}" for label, n in labels.items()) + f"; {parts}"
