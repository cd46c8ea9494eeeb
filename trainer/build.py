"""From a dataset to a model folder with its report, step by step.

In: the options of `trainer fit`. Out: a folder that `sorter run --model` takes, and in it `report.html`, `metrics.csv`
and `predictions.csv`.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from sorter import network
from sorter.errors import ConfigurationError
from sorter.manifest import FORMAT_VERSION, MANIFEST, Class, Manifest
from trainer import checkpoint, data, evaluate, export, features, files, fit, inspection, layouts, parallel, report
from trainer.data import Dataset
from trainer.features import Floats
from trainer.layouts import Sample
from trainer.loop import Epoch
from trainer.options import Options
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
    seen = options.input
    converted = features.convert(fitted, seen.mean, seen.std, seen.size)
    run = features.on_openvino(converted)

    def answers(samples: Sequence[Sample], what: str) -> Floats:
        return features.answers(run, samples, seen.preprocessing, track=reporter.tracker(what))

    calibration_logits = answers(dataset.calibration, "calibrating")
    calibration_labels = evaluate.labels_of(dataset.calibration)
    temperature = evaluate.fit_temperature(calibration_logits, calibration_labels)
    calibrated = evaluate.softmax(calibration_logits, temperature)
    # The test part is looked at once, here, after everything was chosen.
    tested = evaluate.softmax(answers(dataset.test, "testing"), temperature)
    evaluations = (
        evaluate.judge(
            calibrated, dataset.calibration, data=_named(options, dataset, "calibration"), role="calibration"
        ),
        evaluate.judge(tested, dataset.test, data=_named(options, dataset, "test"), role="test"),
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=options.output.name,
        architecture=options.architecture,
        head_hidden=options.head_hidden,
        classes=dataset.classes,
        input=seen,
        temperature=temperature,
        evaluations=evaluations,
        risk_coverage=evaluate.risk_coverage(calibrated, calibration_labels),
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
    reporter.say("exporting the model folder")
    written = export.export(
        options.output,
        fitted,
        converted,
        manifest,
        dataset.training,
        dataset.calibration,
        calibration_logits,
        report.card(manifest),
    )
    _write_tables(options.output, epochs, dataset.test, tested, dataset.classes)
    before = evaluate.calibration_error(evaluate.softmax(calibration_logits, 1.0), calibration_labels)
    page = report.page(written, dataset, epochs, tested, calibrated, calibration_error_before=before)
    (options.output / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    left_over.unlink(missing_ok=True)  # it is ours, and what it led to is complete
    return written


def _check_output(folder: Path) -> None:
    """Refuse what would be written over: a finished model, or whatever else lies in the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written ({error.strerror}): name another --output") from None
    if MANIFEST in inside:
        raise ConfigurationError(f"{folder} has a finished model: name another --output, or take it away")
    if inside - {checkpoint.NAME, files.beside(folder / checkpoint.NAME).name}:
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


def export_again(model: Path, manifest: Manifest, dataset: Dataset, output: Path, reporter: Reporter) -> Manifest:
    """Write a model folder anew, with an 8-bit network from a dataset.

    Args:
        model: a model folder.
        manifest: its manifest.
        dataset: training photos for the ranges, calibration photos to judge.
        output: the folder to write, which may be the same.
        reporter: is told how far it is.
    """
    fitted: nn.Module = network.load(model, manifest)
    seen = manifest.input
    converted = features.convert(fitted, seen.mean, seen.std, seen.size)
    run = features.on_openvino(converted)
    logits = features.answers(run, dataset.calibration, seen.preprocessing, track=reporter.tracker("comparing"))
    reporter.say("exporting the model folder")
    return export.export(
        output, fitted, converted, manifest, dataset.training, dataset.calibration, logits, report.card(manifest)
    )


def _named(options: Options, dataset: Dataset, part: str) -> str:
    if part == "calibration" and options.calibration is not None:
        return (
            f"{options.calibration.name}, {len(dataset.calibration)} photos; temperature and thresholds come from them"
        )
    return f"the {part} part of {options.data.name} ({dataset.layout})"


def _write_tables(
    folder: Path, epochs: Sequence[Epoch], test: Sequence[Sample], tested: Floats, classes: Sequence[Class]
) -> None:
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(epochs[0])))
        writer.writeheader()
        writer.writerows(asdict(epoch) for epoch in epochs)
    evaluate.write_answers(folder / "predictions.csv", test, tested, classes)
