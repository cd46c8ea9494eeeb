"""From a dataset to a model folder with its report, step by step.

In: the options of `trainer fit`. Out: a folder that `sorter run --model` takes, and in it `report.html`, `metrics.csv`
and `predictions.csv`.
"""

import csv
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sorter import network
from sorter.images import Preprocessing
from sorter.manifest import FORMAT_VERSION, Class, Input, Manifest
from trainer import data, evaluate, export, features, fit, inspection, report, weights
from trainer.data import Dataset, Sample
from trainer.features import Floats

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MLP_HEAD = (270, 90)


@dataclass(frozen=True, slots=True)
class Options:
    """What `trainer fit` was asked for.

    Attributes:
        weights: `imagenet`, `none`, or a file.
        head_hidden: widths of the head's hidden layers.
        calibration: a folder or CSV of photos; None draws them from the training part.
        cache: keeps what takes long and does not depend on the options.
    """

    data: Path
    output: Path
    architecture: str
    weights: str
    head_hidden: tuple[int, ...]
    image_size: int
    calibration: Path | None
    recipe: fit.Recipe
    seed: int
    workers: int
    cache: Path
    command: str


class Reporter:
    """Says what happens; the command line shows bars on a terminal and JSON lines elsewhere."""

    def say(self, text: str) -> None:
        """Say one sentence."""

    def epoch(self, epoch: fit.Epoch) -> None:
        """Say what an epoch measured."""

    def track(self, items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        """Show progress over items."""
        return items


def build(options: Options, reporter: Reporter) -> Manifest:
    """Fit, calibrate, judge and export.

    Raises:
        ConfigurationError: the data or the weights cannot be used.
    """
    started = time.monotonic()
    dataset = _dataset(options, reporter)
    fitted, epochs = _fit(options, dataset, reporter)
    seen = Input(size=options.image_size, crop="squash", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    model = features.convert(fitted, seen.mean, seen.std, seen.size)

    def answers(samples: Sequence[Sample], what: str) -> Floats:
        track = _tracker(reporter, what)
        return features.answers(model, samples, seen.preprocessing, mirrored=False, track=track)

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
            "epochs": len(epochs),
            "seed": options.seed,
            "seconds": round(time.monotonic() - started),
        },
        files={},
    )
    card = report.card(manifest)
    reporter.say("exporting the model folder")
    written = export.export(
        options.output, fitted, manifest, dataset.training, dataset.calibration, calibration_logits, card
    )
    _write_tables(options.output, epochs, dataset.test, tested, dataset.classes)
    before = evaluate.calibration_error(evaluate.softmax(calibration_logits, 1.0), calibration_labels)
    page = report.page(written, dataset, epochs, tested, calibrated, calibration_error_before=before)
    (options.output / "report.html").write_text(page, encoding="utf-8")
    return written


def _dataset(options: Options, reporter: Reporter) -> Dataset:
    found = data.find(options.data, options.cache)
    named = [] if options.calibration is None else evaluate.labelled_photos(options.calibration, found.classes)
    paths = [sample.path for sample in (*found.samples, *named)]
    inspected = inspection.inspect_all(
        paths, options.cache, options.workers, lambda results, total: reporter.track(results, total, "inspecting")
    )
    dataset = data.divide(found, inspected, named, options.seed)
    reporter.say(data.describe(dataset))
    for path, reason in dataset.unreadable:
        reporter.say(f"left out, unreadable: {path} ({reason})")
    for duplicate in dataset.duplicates:
        reporter.say(f"left out of training, {duplicate.kind} copy of {duplicate.of}: {duplicate.path}")
    for one, other in dataset.contradictions:
        reporter.say(f"left out, one content under two labels: {one} and {other}")
    return dataset


def _fit(options: Options, dataset: Dataset, reporter: Reporter) -> tuple[nn.Module, list[fit.Epoch]]:
    """Features once, then the head; return the whole network and what each epoch measured."""
    torch.manual_seed(options.seed)
    whole = weights.start(options.architecture, options.weights, options.head_hidden, len(dataset.classes)).eval()
    name = network.head_name(options.architecture)
    place = f"{name}.2" if options.architecture == "squeezenet1_1" else name
    head = whole.get_submodule(place)
    network.replace(whole, place, nn.Identity())
    model = features.convert(whole, IMAGENET_MEAN, IMAGENET_STD, options.image_size)
    preprocessing = Preprocessing(options.image_size)

    def part(samples: Sequence[Sample], what: str, *, both: bool) -> fit.Part:
        plain = features.answers(model, samples, preprocessing, mirrored=False, track=_tracker(reporter, what))
        mirrored = plain
        if both:
            track = _tracker(reporter, f"{what}, mirrored")
            mirrored = features.answers(model, samples, preprocessing, mirrored=True, track=track)
        return fit.Part.of(plain, mirrored, evaluate.labels_of(samples))

    training = part(dataset.training, "features", both=True)
    validation = part(dataset.validation, "features for validation", both=False)
    epochs: list[fit.Epoch] = []

    def on_epoch(epoch: fit.Epoch) -> None:
        epochs.append(epoch)
        reporter.epoch(epoch)

    fitted = fit.fit_head(head, training, validation, options.recipe, options.seed, on_epoch)
    network.replace(whole, place, fitted)
    return whole.eval(), epochs


def _tracker(reporter: Reporter, what: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    return lambda items, total: reporter.track(items, total, what)


def _named(options: Options, dataset: Dataset, part: str) -> str:
    if part == "calibration" and options.calibration is not None:
        return (
            f"{options.calibration.name}, {len(dataset.calibration)} photos; temperature and thresholds come from them"
        )
    return f"the {part} part of {options.data.name} ({dataset.layout})"


def _write_tables(
    folder: Path, epochs: Sequence[fit.Epoch], test: Sequence[Sample], tested: Floats, classes: Sequence[Class]
) -> None:
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(epochs[0])))
        writer.writeheader()
        writer.writerows(asdict(epoch) for epoch in epochs)
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", *(f"probability of {c.label}" for c in classes)])
        for sample, row in zip(test, tested.tolist(), strict=True):
            table.writerow([sample.path, classes[sample.label].label, *(round(p, 6) for p in row)])
