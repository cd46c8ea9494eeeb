"""A fitted network to a model folder, measured through the engine that will run it.

In: a network and a dataset. Out: a folder that `sorter run --model` takes.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import openvino
from torch import nn

from sorter.classifier import manifest as manifest_module
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import FORMAT_VERSION, NEITHER, EngineName, ErrorRates, Manifest
from trainer.data.layouts import Sample, labels_of
from trainer.data.split import Dataset
from trainer.fitting import features
from trainer.packaging import cascade, export, guard, metrics, outliers, report
from trainer.packaging.metrics import Floats
from trainer.packaging.outliers import Distances
from trainer.progress import Reporter

_ENGINES: tuple[EngineName, ...] = ("openvino", "torch")

Describe = Callable[[Literal["calibration", "test"]], str]
"""Describes the photos of a part to the manifest's reader."""


@dataclass(frozen=True, slots=True)
class Package:
    """A model folder as written.

    Attributes:
        manifest: as written.
        tested: probabilities of the test part, float32 (N, C).
        calibration_errors: of the full-size pass on the calibration part, without and with its temperature.
        distances: of the outlier detector; None if there is none.
    """

    manifest: Manifest
    tested: Floats
    calibration_errors: tuple[float, float]
    distances: Distances | None


def write(
    folder: Path,
    fitted: nn.Module,
    described: Manifest,
    dataset: Dataset,
    describe: Describe,
    max_lost: float,
    reporter: Reporter,
) -> Package:
    """Calibrate, quantise, measure and write a model.

    Args:
        folder: created if it does not exist.
        fitted: from normalised float (N, 3, S, S) to logits (N, C).
        described: the manifest, without anything that is measured here.
        dataset: its training, calibration and test parts are used.
        describe: describes the photos of a part.
        max_lost: the share of the calibration photos that the outlier detector may catch by mistake.
        reporter: shows progress.
    """
    labels = labels_of(dataset.calibration)
    model = features.convert(fitted, described.input.mean, described.input.std, described.input.size)
    logits = _calibration_logits(model, described, dataset, reporter)
    reporter.say("quantising the network for CPUs")
    networks = export.networks(fitted, model, described.input, dataset.training, dataset.calibration, logits)
    passes = cascade.choose(networks.best, networks.logits, dataset.calibration, described.input, reporter)
    temperature = metrics.fit_temperature(networks.logits, labels)
    draft = described.model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "temperature": temperature,
            "torch_temperature": metrics.fit_temperature(logits, labels),
            "int8": networks.int8,
            "cascade": passes,
            "neither": None,
            "error_rates": (),
        }
    )
    draft, files, caught = _with_detector(networks, draft, dataset, max_lost, reporter)
    files |= {guard.FILE: guard.measure(networks.best, draft, dataset.calibration, reporter).as_file()}
    complete, tested = _measured(draft, files, dataset, describe, reporter)
    reporter.say("writing the model folder")
    written = manifest_module.write(folder, complete, files, report.card(complete))
    before, after = (metrics.calibration_error(metrics.softmax(networks.logits, t), labels) for t in (1.0, temperature))
    return Package(written, tested, (before, after), caught)


def _calibration_logits(model: openvino.Model, described: Manifest, dataset: Dataset, reporter: Reporter) -> Floats:
    """The 32-bit network's logits for the calibration part, (N, C)."""
    run, track = features.on_openvino(model, exactly=True), reporter.tracker("calibrating")
    return features.answers(run, dataset.calibration, described.input.preprocessing, track=track)


def _with_detector(
    networks: export.Networks, draft: Manifest, dataset: Dataset, max_lost: float, reporter: Reporter
) -> tuple[Manifest, dict[str, bytes], Distances | None]:
    """The manifest with the outlier detector's thresholds, and the files with its own.

    Unchanged if there are not enough calibration photos to set a threshold, or if no detector can be fitted.
    """
    if len(dataset.calibration) < outliers.MIN_PHOTOS:
        return draft, networks.files, None
    others = dataset.others
    detector = outliers.fit(networks.best, draft, dataset.training, others.fitting, reporter)
    if detector is None:
        return draft, networks.files, None
    files = networks.files | {NEITHER: detector.as_file()}
    nothing = np.zeros(1, np.float32)
    # Distances are measured from the threshold, which is not known yet, and at full size.
    provisional = draft.model_copy(
        update={"cascade": (), "neither": outliers.describe(detector, nothing, nothing[:0], max_lost)}
    )
    with tempfile.TemporaryDirectory() as scratch:
        provisional = manifest_module.write(Path(scratch), provisional, files, card="")
        engine = open_engine(Path(scratch), provisional, "openvino", "cpu", features.BATCH, catch_neither=True)
        found = Distances(
            outliers.distances(engine, dataset.calibration, draft.input),
            outliers.distances(engine, others.held_out, draft.input),
        )
    neither = outliers.describe(detector, found.calibration, found.others, max_lost)
    draft = draft.model_copy(update={"neither": neither})
    passes = outliers.with_thresholds(networks.best, detector, draft, others.held_out, found.others, reporter)
    return draft.model_copy(update={"cascade": passes}), files, found


def _measured(
    draft: Manifest, files: dict[str, bytes], dataset: Dataset, describe: Describe, reporter: Reporter
) -> tuple[Manifest, Floats]:
    """Measure the model in a folder of its own, through the engine that `sorter` will use.

    Returns:
        The manifest with its figures; and the probabilities of the test part, (N, C).
    """
    calibration = dataset.calibration
    with tempfile.TemporaryDirectory() as scratch:
        draft = manifest_module.write(Path(scratch), draft, files, card="")
        tables, calibrated = _error_rates(Path(scratch), draft, calibration, reporter)
        # The test part is used once, here, after everything has been chosen.
        tested = answers(Path(scratch), draft, dataset.test, "testing", reporter)
    evaluations = (
        metrics.evaluation(calibrated, labels_of(calibration), data=describe("calibration"), role="calibration"),
        metrics.evaluation(tested, labels_of(dataset.test), data=describe("test"), role="test"),
    )
    return draft.model_copy(update={"error_rates": tables, "evaluations": evaluations}), tested


def _error_rates(
    folder: Path, draft: Manifest, calibration: tuple[Sample, ...], reporter: Reporter
) -> tuple[tuple[ErrorRates, ...], Floats]:
    """A table of error rates for each way of running the model, and what it answers the way it runs by default.

    Args:
        folder: of the model.
        draft: its manifest so far.
        calibration: the photos.
        reporter: shows progress.
    """
    labels, tables, calibrated = labels_of(calibration), [], []
    for catch_neither in (False, True) if draft.neither is not None else (False,):
        for name in _ENGINES:
            passes = draft.cascade if name == "openvino" else ()
            title = f"measuring {name}" + (" with --catch-neither" if catch_neither else "")
            by_level = [
                answers(folder, draft, calibration, title, reporter, lowest, name, catch_neither=catch_neither)
                for lowest in cascade.levels(passes)
            ]
            calibrated.append(by_level[0])
            rates = metrics.risk_coverage(partial(cascade.at, by_level, passes), labels)
            tables.append(ErrorRates(engine=name, catch_neither=catch_neither, rates=rates))
    return tuple(tables), calibrated[0]


def answers(
    folder: Path,
    draft: Manifest,
    samples: tuple[Sample, ...],
    title: str,
    reporter: Reporter,
    min_confidence: float = 0.0,
    engine: EngineName = "openvino",
    *,
    catch_neither: bool = False,
) -> Floats:
    """The probabilities of samples that decode, (N, C); those of photos that are caught are -1."""
    opened = open_engine(folder, draft, engine, "auto", features.BATCH, min_confidence, catch_neither=catch_neither)
    batches = reporter.tracker(title)(
        features.batches(samples, draft.input.preprocessing), -(-len(samples) // features.BATCH)
    )
    found = []
    for pixels in batches:
        if not catch_neither:
            found.append(opened.classify(pixels))
            continue
        probabilities, distances = opened.classify_with_distance(pixels)
        found.append(np.where(distances[:, None] > 0, np.float32(-1), probabilities))
    return np.concatenate(found)
