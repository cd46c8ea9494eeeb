"""Datasets on disk: the label of each photo, and the part of the dataset that it belongs to.

In: a folder or a zip. Out: what was found, before any photo is opened.

The layouts, of which the first that matches is taken:

    cat-and-dog     training_set/training_set/{cats,dogs}/cat.1.jpg, test_set/…    Kaggle's tongpython/cat-and-dog
    dogs-vs-cats    train/cat.0.jpg and train/dog.0.jpg flat, or packed in train.zip    Kaggle's c/dogs-vs-cats
    image-folder    {train,val,test}/class/…    torchvision's ImageFolder
    pet-images      PetImages/{Cat,Dog}/…    Microsoft's
    classes         class/…    an ImageFolder without parts
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from sorter.classifier.manifest import Class, check_classes, is_reserved
from sorter.decoding.formats import EXTENSIONS
from sorter.errors import ConfigurationError

Part = Literal["training", "validation", "calibration", "test"]

CATS_AND_DOGS = (Class(label="cat", folder="cats"), Class(label="dog", folder="dogs"))

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
    """A photo, the index of its class, and its part of the dataset.

    Attributes:
        pixels: what the network sees of it, (S, S, 3), where that is kept because the file may be moved; None to decode
            the file each time.
    """

    path: Path
    label: int
    part: Part = "training"
    pixels: npt.NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Found:
    """The photos of a dataset, before any is opened.

    Attributes:
        reserved: folders that are left out, because the sorter keeps their names for photos of no class.
    """

    layout: str
    classes: tuple[Class, ...]
    samples: tuple[Sample, ...]
    reserved: tuple[str, ...] = ()


def find(data: Path, cache: Path) -> Found:
    """Recognise a dataset's layout.

    Args:
        data: a folder or a zip.
        cache: where zips are unpacked, once.

    Raises:
        ConfigurationError: no layout matches, there is only one class, or a folder's name cannot be a class.
    """
    if not data.exists():
        raise ConfigurationError(f"{data} does not exist: give the dataset's folder or zip with --data")
    root = _inner(unpack(data, cache) if data.is_file() else data)
    found = _flat(root, cache) or _split(root) or _classes(root)
    if found is None:
        raise ConfigurationError(
            f"{data} has no known layout: it needs a folder for each class, or train/ and test/ with such folders, "
            "or train/ with cat.0.jpg and dog.0.jpg"
        )
    if len(found.classes) < 2 or len({sample.label for sample in found.samples}) < 2:
        raise ConfigurationError(f"{data} has photos of one class only: add photos of at least one other class")
    return found


def unpack(archive: Path, cache: Path) -> Path:
    """Unpack a zip into the cache, once for each version of it.

    Raises:
        ConfigurationError: it is not a zip, or is damaged.
    """
    status = archive.stat()
    target = cache / "unpacked" / f"{archive.stem}-{status.st_size}-{status.st_mtime_ns}"
    if target.is_dir():
        return target
    beside = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(beside)
        beside.mkdir(parents=True, exist_ok=True)  # for an empty zip
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:  # RuntimeError: it needs a password
        raise ConfigurationError(
            f"cannot unpack {archive} ({error}): free some space in {cache}, or download it again"
        ) from None
    beside.rename(target)
    return target


def _inner(root: Path) -> Path:
    """Go down while a folder contains one folder and nothing else of interest."""
    while True:
        inside = [entry for entry in root.iterdir() if entry.name not in _JUNK and not entry.name.startswith(".")]
        folders = [entry for entry in inside if entry.is_dir()]
        photos = [entry for entry in inside if entry.suffix.lower() in EXTENSIONS | {".zip"}]
        if len(folders) != 1 or photos or folders[0].name.lower() in _SPLIT_NAMES or _has_photos(folders[0]):
            return root
        root = folders[0]


def _flat(root: Path, cache: Path) -> Found | None:
    """The competition's layout: labels in the file names."""
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
    """A folder for each part, and in it a folder for each class."""
    folders = {entry: _SPLIT_NAMES.get(entry.name.lower()) for entry in sorted(root.iterdir()) if entry.is_dir()}
    parts = {_undoubled(folder): part for folder, part in folders.items() if part is not None}
    if "training" not in parts.values():
        return None
    names = sorted({entry.name for folder in parts for entry in _folders(folder)})
    if not names:  # a class named train
        return None
    classes, reserved = _named(names)
    samples = [s for folder, part in parts.items() for s in _in_class_folders(folder, classes, part)]
    layout = "cat-and-dog" if any(entry.name == "training_set" for entry in folders) else "image-folder"
    return Found(layout, classes, tuple(samples), reserved)


def _undoubled(folder: Path) -> Path:
    """Kaggle's set has training_set/training_set/ and test_set/test_set/."""
    inner = folder / folder.name
    return inner if inner.is_dir() else folder


def _classes(root: Path) -> Found | None:
    """A folder for each class."""
    names = [entry.name for entry in _folders(root) if any(_photos(entry))]
    if not names:
        return None
    classes, reserved = _named(names)
    layout = "pet-images" if root.name == "PetImages" else "classes"
    return Found(layout, classes, tuple(_in_class_folders(root, classes, "training")), reserved)


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _named(names: Sequence[str]) -> tuple[tuple[Class, ...], tuple[str, ...]]:
    """The classes of folders, and the reserved ones among the folders.

    Cats and dogs, however spelled, become `cats/` and `dogs/`; other classes keep their folders' names.

    Raises:
        ConfigurationError: no model can have such a class.
    """
    reserved = tuple(name for name in names if is_reserved(name))
    names = [name for name in names if name not in reserved]
    if {name.lower().rstrip("s") for name in names} == {"cat", "dog"}:
        return CATS_AND_DOGS, reserved
    classes = tuple(_class(name) for name in names)
    try:
        check_classes(classes)
    except ValueError as error:
        raise ConfigurationError(f"the folders of the dataset cannot be classes ({error}): rename one") from None
    return classes, reserved


def _class(name: str) -> Class:
    try:
        return Class(label=name, folder=name)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"the folder {ascii(name)[:60]} cannot be a class ({reason}): rename it") from None


def index_of(classes: Sequence[Class]) -> dict[str, int]:
    """The index of each class by its label and by its folder, in lower case."""
    return {name.lower(): i for i, c in enumerate(classes) for name in (c.label, c.folder)}


def _in_class_folders(root: Path, classes: Sequence[Class], part: Part) -> list[Sample]:
    index = index_of(classes)
    folders = [entry for entry in _folders(root) if entry.name.lower() in index]
    return [Sample(path, index[folder.name.lower()], part) for folder in folders for path in _photos(folder)]


def _has_photos(folder: Path) -> bool:
    return any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())


def _photos(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    )


def spread(samples: Sequence[Sample], most: int) -> tuple[Sample, ...]:
    """At most so many of some photos, evenly."""
    return tuple(samples[:: -(-len(samples) // most)]) if samples else ()


def labels_of(samples: Sequence[Sample]) -> npt.NDArray[np.intp]:
    """The labels as an array, (N,)."""
    return np.array([sample.label for sample in samples], np.intp)
