"""A fitted network to a model folder, measured through the engine that will run it.

In: a network and a dataset. Out: a folder that `sorter run --model` takes.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import openvino
from torch import nn

from sorter.classifier import manifest as manifest_module
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import NEITHER, Manifest
from sorter.classifier.outliers import OutlierDetector
from trainer.data.layouts import Sample, labels_of
from trainer.data.split import Dataset
from trainer.fitting import features
from trainer.packaging import cascade, evaluate, export, metrics, outliers, report
from trainer.packaging.metrics import Floats
from trainer.progress import Reporter

Describe = Callable[[Literal["calibration", "test"]], str]
"""Describes the photos of a part to the manifest's reader."""


@dataclass(frozen=True, slots=True)
class Package:
    """A model folder as written.

    Attributes:
        manifest: as written.
        tested: probabilities of the test part, float32 (N, C).
        calibration_error_before: of the calibration part, without the temperature.
    """

    manifest: Manifest
    tested: Floats
    calibration_error_before: float


def write(
    folder: Path, fitted: nn.Module, described: Manifest, dataset: Dataset, describe: Describe, reporter: Reporter
) -> Package:
    """Calibrate, quantise, measure and write a model.

    Args:
        folder: created if it does not exist.
        fitted: from normalised float (N, 3, S, S) to logits (N, C).
        described: the manifest, without anything that is measured here.
        dataset: its training, calibration and test parts are used.
        describe: describes the photos of a part.
        reporter: shows progress.
    """
    labels = labels_of(dataset.calibration)
    model = features.convert(fitted, described.input.mean, described.input.std, described.input.size)
    logits = _calibration_logits(model, described, dataset, reporter)
    reporter.say("quantising the network for CPUs")
    networks = export.networks(fitted, model, described.input, dataset.training, dataset.calibration, logits)
    low = cascade.choose(networks.best, networks.logits, dataset.calibration, described.input, reporter)
    temperature = metrics.fit_temperature(logits, labels)
    draft = described.model_copy(
        update={"temperature": temperature, "int8": networks.int8, "first_look": low, "neither": None}
    )
    detector = _detector(networks.best, draft, dataset, reporter)
    files = networks.files if detector is None else networks.files | {NEITHER: detector.as_file()}
    complete, tested = _measured(draft, files, dataset, describe, reporter, has_detector=detector is not None)
    reporter.say("writing the model folder")
    written = manifest_module.write(folder, complete, files, report.card(complete))
    before = metrics.calibration_error(metrics.softmax(logits, 1.0), labels)
    return Package(written, tested, before)


def _calibration_logits(model: openvino.Model, described: Manifest, dataset: Dataset, reporter: Reporter) -> Floats:
    """The unquantised network's logits for the calibration part, (N, C)."""
    run, track = features.on_openvino(model), reporter.tracker("calibrating")
    return features.answers(run, dataset.calibration, described.input.preprocessing, track=track)


def _detector(
    model: openvino.Model, described: Manifest, dataset: Dataset, reporter: Reporter
) -> OutlierDetector | None:
    """The outlier detector, if there are enough calibration photos to set its threshold."""
    if len(dataset.calibration) < outliers.MIN_PHOTOS:
        return None
    hidden_layers = len(described.head_hidden)
    return outliers.fit_detector(model, hidden_layers, dataset.training, described.input, reporter)


def _measured(
    draft: Manifest,
    files: dict[str, bytes],
    dataset: Dataset,
    describe: Describe,
    reporter: Reporter,
    *,
    has_detector: bool,
) -> tuple[Manifest, Floats]:
    """Measure the model in a folder of its own, through the engine that `sorter` will use.

    Returns:
        The manifest with its figures; and the probabilities of the test part, (N, C).
    """
    calibration, labels = dataset.calibration, labels_of(dataset.calibration)
    with tempfile.TemporaryDirectory() as scratch:
        draft = manifest_module.write(Path(scratch), draft, files, card="")
        calibrated = full = _probabilities(Path(scratch), draft, calibration, "measuring", reporter)
        if draft.first_look is not None:
            full = _probabilities(Path(scratch), draft, calibration, "measuring", reporter, min_confidence=1.0)
        neither = None
        if has_detector:
            engine = open_engine(Path(scratch), draft, "openvino", "cpu", evaluate.BATCH, catch_neither=True)
            neither = outliers.describe(outliers.distances(engine, calibration, draft.input))
        # The test part is used once, here, after everything has been chosen.
        tested = _probabilities(Path(scratch), draft, dataset.test, "testing", reporter)
    evaluations = (
        metrics.evaluation(calibrated, calibration, data=describe("calibration"), role="calibration"),
        metrics.evaluation(tested, dataset.test, data=describe("test"), role="test"),
    )
    coverage = cascade.risk_coverage(calibrated, full, labels, draft.first_look)
    figures = {"neither": neither, "risk_coverage": coverage, "evaluations": evaluations}
    return draft.model_copy(update=figures), tested


def _probabilities(
    folder: Path,
    draft: Manifest,
    samples: tuple[Sample, ...],
    title: str,
    reporter: Reporter,
    min_confidence: float = 0.0,
) -> Floats:
    """Classify samples that decode, (N, C); with a minimum confidence of 1 there is no low-resolution pass."""
    engine = open_engine(folder, draft, "openvino", "cpu", evaluate.BATCH, min_confidence)
    batches = evaluate.classify(engine, samples, draft.input.preprocessing)
    return evaluate.joined(list(reporter.track(batches, -(-len(samples) // evaluate.BATCH), title)))[1]
