"""A dataset to a model folder with its report, step by step.

In: the options of `trainer fit`. Out: a folder that `sorter run --model` takes, which also holds `report.html`,
`metrics.csv` and `predictions.csv`.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sorter.classifier.manifest import FORMAT_VERSION, MANIFEST, Class, Manifest, Printable
from sorter.errors import ConfigurationError
from sorter.files.replaced import unfinished
from trainer.data import inspection, layouts, others, split
from trainer.data.labelled import labelled_photos
from trainer.data.layouts import Sample
from trainer.data.split import Dataset
from trainer.fitting import checkpoint, fit, parallel
from trainer.fitting.options import Options, Source
from trainer.packaging import evaluate, package, report
from trainer.packaging.metrics import Floats
from trainer.progress import Epoch, Reporter


def build(options: Options, reporter: Reporter) -> Manifest | None:
    """Fit, calibrate, measure and package a model.

    Returns:
        The manifest as written; None in all but the first of several processes.

    Raises:
        ConfigurationError: the data, the weights or the output folder cannot be used.
    """
    started = time.monotonic()
    check_output(options.output, resume=options.resume)
    with parallel.joined(options.device) as (group, device):
        own_reporter = reporter if group.is_first else Reporter()
        dataset = group.first_then_others(lambda: load(options.source, options.workers, options.cache, own_reporter))
        draft = _described(options, dataset)
        fitted, epochs = fit.fit(options, dataset, device, group, own_reporter)
    if not group.is_first:
        return None
    reporter.close()
    seconds = round(time.monotonic() - started)
    described = draft.model_copy(update={"training": {**draft.training, "epochs": len(epochs), "seconds": seconds}})
    describe = partial(describe_part, options.source, dataset)
    packed = package.write(options.output, fitted, described, dataset, describe, options.max_lost, reporter)
    _write_tables(options.output, epochs, dataset.test, packed.tested, dataset.classes)
    errors = packed.calibration_errors
    page = report.page(
        packed.manifest, dataset, epochs, packed.tested, calibration_errors=errors, distances=packed.distances
    )
    (options.output / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    (options.output / checkpoint.NAME).unlink(missing_ok=True)  # the model is complete
    return packed.manifest


def check_output(folder: Path, *, resume: bool) -> None:
    """Refuse a folder in which something would be overwritten: a checkpoint, a finished model, or other files."""
    unfinished_run = folder / checkpoint.NAME
    if unfinished_run.exists() and not resume:
        raise ConfigurationError(
            f"{unfinished_run} belongs to an unfinished run: continue it with --resume, or delete it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConfigurationError(f"cannot write {folder} ({error.strerror}): give another --output") from None
    if MANIFEST in names:
        raise ConfigurationError(f"{folder} contains a finished model: give another --output, or delete the folder")
    if names - {checkpoint.NAME, unfinished(unfinished_run).name}:
        raise ConfigurationError(f"{folder} is not empty: give a new folder with --output")


def load(source: Source, workers: int, cache: Path, reporter: Reporter) -> Dataset:
    """Find, inspect and divide a dataset, and report what was left out of it.

    Raises:
        ConfigurationError: it cannot be used.
    """
    found = layouts.find(source.data, cache)
    named = [] if source.calibration is None else labelled_photos(source.calibration, found.classes)
    of_classes = [sample.path for sample in (*found.samples, *named)]
    of_others = [] if source.others is None else others.find(source.others)
    track = reporter.tracker("inspecting photos")
    inspected = inspection.inspect_all([*of_classes, *of_others], cache, max(1, workers), track)
    dataset = split.divide(found, inspected, named, source.seed)
    dataset = replace(dataset, others=others.divide(of_others, inspected, of_classes))
    reporter.say(split.describe(dataset))
    for name in found.reserved:
        reporter.say(f"left out, the folder {name}: sorter keeps that name for photos of no class")
    for path, reason in dataset.unreadable:
        reporter.say(f"left out, unreadable: {path} ({reason})")
    for path, reason in dataset.others.left_out:
        reporter.say(f"left out of the others: {path} ({reason})")
    for duplicate in dataset.duplicates:
        reporter.say(f"left out, {duplicate.kind} copy of {duplicate.of}: {duplicate.path}")
    for one, other in dataset.contradictions:
        reporter.say(f"left out, same content under two labels: {one} and {other}")
    return dataset


def describe_part(source: Source, dataset: Dataset, part: str) -> str:
    """Describe the photos of a part to the manifest's reader."""
    if part == "calibration" and source.calibration is not None:
        return source.calibration.resolve().name
    return f"the {part} part of {source.data.resolve().name} ({dataset.layout})"


def _described(options: Options, dataset: Dataset) -> Manifest:
    """The manifest before anything is fitted or measured, so that an impossible one costs nobody a fit."""
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name_of(options.output),
        architecture=options.architecture,
        head_hidden=options.head_hidden,
        classes=dataset.classes,
        input=options.input,
        temperature=1.0,
        training={
            "command": options.command,
            "data": f"{options.source.data.resolve().name}, {split.describe(dataset)}",
            "weights": Path(options.weights).name,
            "recipe": options.recipe.name,
            "seed": options.seed,
        },
        files={},
    )


def name_of(output: Path) -> str:
    """The name of a model: its folder's.

    Raises:
        ConfigurationError: the folder's name cannot be a model's.
    """
    name = output.resolve().name
    try:
        return TypeAdapter(Printable).validate_python(name)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigurationError(
            f"{ascii(name)[:60]} cannot be the model's name ({reason}): give another --output"
        ) from None


def _write_tables(
    folder: Path, epochs: Sequence[Epoch], test: Sequence[Sample], tested: Floats, classes: Sequence[Class]
) -> None:
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(epochs[0])))
        writer.writeheader()
        writer.writerows(asdict(epoch) for epoch in epochs)
    evaluate.write_answers(folder / "predictions.csv", test, tested, classes)
