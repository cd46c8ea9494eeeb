"""Photos to measure a model with: labelled by their folders or by a table, or not labelled at all.

In: a folder, zip or CSV, and the model's classes. Out: samples, before any photo is opened.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from sorter.classifier.manifest import Class
from sorter.decoding.formats import EXTENSIONS
from sorter.errors import ConfigurationError
from trainer.data.layouts import Sample, find, index_of


def labelled_photos(data: Path, classes: Sequence[Class]) -> list[Sample]:
    """Find the photos of a folder and their labels.

    Args:
        data: a folder with one subfolder for each class, named by its label or its folder, at any depth; or one with
            `labels.csv` (columns `name` and `label`) beside the photos; or such a CSV itself, where an empty label is
            that of a photo of none of the classes, which is left out.
        classes: the model's.

    Raises:
        ConfigurationError: there is no labelled photo.
    """
    index = index_of(classes)
    table = data if data.suffix.lower() == ".csv" else data / "labels.csv"
    if table.is_file():
        samples = _from_table(table, index)
    else:
        samples = [
            Sample(path, index[path.parent.name.lower()])
            for path in sorted(data.rglob("*"))
            if path.suffix.lower() in EXTENSIONS and path.parent.name.lower() in index
        ]
    if not samples:
        wanted = " and ".join(f"{c.folder}/" for c in classes)
        raise ConfigurationError(
            f"{data} has no labelled photos: give a folder that contains {wanted}, or photos and a labels.csv"
        )
    return samples


def _from_table(table: Path, index: dict[str, int]) -> list[Sample]:
    try:
        # Names are bytes, as `sorter history --verdicts --csv` writes them.
        with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as rows:
            return [
                Sample(table.parent / row["name"], index[row["label"].lower()])
                for row in csv.DictReader(rows)
                if row["label"] != ""
            ]
    except (OSError, csv.Error) as error:
        raise ConfigurationError(f"cannot read {table} ({error}): give a CSV file") from None
    except (KeyError, AttributeError):
        raise ConfigurationError(
            f"cannot use {table}: it needs the columns name and label, and the labels {' or '.join(index)}"
        ) from None


def dataset_photos(data: Path, classes: Sequence[Class], cache: Path) -> tuple[str, list[Sample]]:
    """Find the labelled photos of a dataset in any known layout, or of any folder that `labelled_photos` takes.

    Returns:
        What they are, for a person; and the test part, or all photos if the layout has none.

    Raises:
        ConfigurationError: there is no labelled photo, or a class that the model does not know.
    """
    if data.suffix.lower() == ".csv" or (data / "labels.csv").is_file():
        return data.resolve().name, labelled_photos(data, classes)
    try:
        found = find(data, cache)
    except ConfigurationError:
        if not data.is_dir():
            raise
        return data.resolve().name, labelled_photos(data, classes)
    index = index_of(classes)
    unknown = [c.label for c in found.classes if c.label.lower() not in index]
    if unknown:
        known = ", ".join(c.label for c in classes)
        raise ConfigurationError(
            f"{data} has photos of {unknown[0]}, and the model knows only {known}: give other photos with --data"
        )
    samples = [Sample(s.path, index[found.classes[s.label].label.lower()], s.part) for s in found.samples]
    test = [sample for sample in samples if sample.part == "test"]
    return f"{'the test part' if test else 'all'} of {data.resolve().name} ({found.layout})", test or samples


def unlabelled_photos(data: Path) -> list[Sample]:
    """Find the photos of a folder, ordered by the numbers that are their names; their labels mean nothing.

    Raises:
        ConfigurationError: there is none, or two have the same name.
    """
    paths = [path for path in data.rglob("*") if path.suffix.lower() in EXTENSIONS] if data.is_dir() else []
    if not paths:
        raise ConfigurationError(f"{data} has no photos: give the folder of photos with --data")
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise ConfigurationError(
            f"{data} has two photos with the same number: give the folder that directly contains the photos"
        )
    numbered = sorted(
        paths, key=lambda path: (not path.stem.isdigit(), int(path.stem) if path.stem.isdigit() else 0, path)
    )
    return [Sample(path, 0) for path in numbered]
