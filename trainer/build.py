"""From a dataset to a model folder with its report, step by step.

In: the options of `trainer fit`. Out: a folder that `sorter run --model` takes, and in it `report.html`, `metrics.csv`
and `predictions.csv`.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from sorter.classifier.manifest import FORMAT_VERSION, MANIFEST, Class, Manifest
from sorter.errors import ConfigurationError
from sorter.files.replaced import unfinished
from trainer.data import inspection, layouts
from trainer.data import split as data
from trainer.data.layouts import Sample
from trainer.data.split import Dataset
from trainer.fitting import checkpoint, fit, parallel
from trainer.fitting.features import Floats
from trainer.fitting.loop import Epoch
from trainer.fitting.options import Options
from trainer.packaging import evaluate, package, report
from trainer.progress import Reporter


def build(options: Options, reporter: Reporter) -> Manifest | None:
    """Fit, calibrate, judge and export.

    Returns:
        The manifest as written; None in all but the first of several processes.

    Raises:
        ConfigurationError: the data or the weights cannot be used.
    """
    started = time.monotonic()
    left_over = options.output / checkpoint.NAME
    if left_over.exists() and not options.resume:
        raise ConfigurationError(f"{left_over} is of a run that did not end: go on with it, --resume, or take it away")
    _check_output(options.output)
    with parallel.joined(options.device) as (group, device):
        heard = reporter if group.is_first else Reporter()
        dataset = group.first_then_others(
            lambda: load(options.data, options.calibration, options.seed, options.workers, options.cache, heard)
        )
        fitted, epochs = fit.fit(options, dataset, device, group, heard)
    if not group.is_first:
        return None
    reporter.close()
    described = Manifest(
        format_version=FORMAT_VERSION,
        name=options.output.name,
        architecture=options.architecture,
        head_hidden=options.head_hidden,
        classes=dataset.classes,
        input=options.input,
        temperature=1.0,
        training={
            "command": options.command,
            "data": f"{options.data.name}, {data.describe(dataset)}",
            "weights": Path(options.weights).name,
            "recipe": options.recipe.name,
            "epochs": len(epochs),
            "seed": options.seed,
            "seconds": round(time.monotonic() - started),
        },
        files={},
    )
    named = partial(name_of, options.data, options.calibration, dataset)
    packed = package.write(options.output, fitted, described, dataset, named, reporter)
    _write_tables(options.output, epochs, dataset.test, packed.tested, dataset.classes)
    before = packed.calibration_error_before
    page = report.page(packed.manifest, dataset, epochs, packed.tested, calibration_error_before=before)
    (options.output / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    left_over.unlink(missing_ok=True)  # it is ours, and what it led to is complete
    return packed.manifest


def _check_output(folder: Path) -> None:
    """Refuse what would be written over: a finished model, or whatever else lies in the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written ({error.strerror}): name another --output") from None
    if MANIFEST in inside:
        raise ConfigurationError(f"{folder} has a finished model: name another --output, or take it away")
    if inside - {checkpoint.NAME, unfinished(folder / checkpoint.NAME).name}:
        raise ConfigurationError(f"{folder} is not empty: name a new folder with --output")


def load(source: Path, calibration: Path | None, seed: int, workers: int, cache: Path, reporter: Reporter) -> Dataset:
    """Find, inspect and divide a dataset, and say what was left out of it.

    Raises:
        ConfigurationError: it cannot be used.
    """
    found = layouts.find(source, cache)
    named = [] if calibration is None else evaluate.labelled_photos(calibration, found.classes)
    paths = [sample.path for sample in (*found.samples, *named)]
    inspected = inspection.inspect_all(paths, cache, max(1, workers), reporter.tracker("inspecting"))
    dataset = data.divide(found, inspected, named, seed)
    reporter.say(data.describe(dataset))
    for path, reason in dataset.unreadable:
        reporter.say(f"left out, unreadable: {path} ({reason})")
    for duplicate in dataset.duplicates:
        reporter.say(f"left out of training, {duplicate.kind} copy of {duplicate.of}: {duplicate.path}")
    for one, other in dataset.contradictions:
        reporter.say(f"left out, one content under two labels: {one} and {other}")
    return dataset


def name_of(data: Path, calibration: Path | None, dataset: Dataset, part: str) -> str:
    """What the figures of a part are said to be of, for the reader of a manifest."""
    if part == "calibration" and calibration is not None:
        return f"{calibration.name}, {len(dataset.calibration)} photos; temperature and thresholds come from them"
    return f"the {part} part of {data.name} ({dataset.layout})"


def _write_tables(
    folder: Path, epochs: Sequence[Epoch], test: Sequence[Sample], tested: Floats, classes: Sequence[Class]
) -> None:
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(epochs[0])))
        writer.writeheader()
        writer.writerows(asdict(epoch) for epoch in epochs)
    evaluate.write_answers(folder / "predictions.csv", test, tested, classes)
