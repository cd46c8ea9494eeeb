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
from sorter.classifier.manifest import FORMAT_VERSION, NEITHER, EngineName, ErrorRates, Manifest, Neither
from sorter.classifier.outliers import OutlierDetector
from trainer.data.layouts import Sample, labels_of
from trainer.data.split import Dataset
from trainer.fitting import features
from trainer.packaging import cascade, evaluate, export, metrics, outliers, report
from trainer.packaging.metrics import Floats
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
    """

    manifest: Manifest
    tested: Floats
    calibration_errors: tuple[float, float]


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
    temperature = metrics.fit_temperature(networks.logits, labels)
    draft = described.model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "temperature": temperature,
            "torch_temperature": metrics.fit_temperature(logits, labels),
            "int8": networks.int8,
            "first_look": low,
            "neither": None,
            "error_rates": (),
        }
    )
    detector = _detector(networks.best, draft, dataset, reporter)
    files = networks.files if detector is None else networks.files | {NEITHER: detector.as_file()}
    complete, tested = _measured(draft, files, dataset, describe, reporter, has_detector=detector is not None)
    reporter.say("writing the model folder")
    written = manifest_module.write(folder, complete, files, report.card(complete))
    before, after = (metrics.calibration_error(metrics.softmax(networks.logits, t), labels) for t in (1.0, temperature))
    return Package(written, tested, (before, after))


def _calibration_logits(model: openvino.Model, described: Manifest, dataset: Dataset, reporter: Reporter) -> Floats:
    """The 32-bit network's logits for the calibration part, (N, C)."""
    run, track = features.on_openvino(model, exactly=True), reporter.tracker("calibrating")
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
    calibration = dataset.calibration
    with tempfile.TemporaryDirectory() as scratch:
        draft = manifest_module.write(Path(scratch), draft, files, card="")
        calibrated = _probabilities(Path(scratch), draft, calibration, "measuring", reporter)
        neither, error_rates = _error_rates(Path(scratch), draft, calibrated, calibration, reporter, has_detector)
        # The test part is used once, here, after everything has been chosen.
        tested = _probabilities(Path(scratch), draft, dataset.test, "testing", reporter)
    evaluations = (
        metrics.evaluation(calibrated, calibration, data=describe("calibration"), role="calibration"),
        metrics.evaluation(tested, dataset.test, data=describe("test"), role="test"),
    )
    figures = {"neither": neither, "error_rates": error_rates, "evaluations": evaluations}
    return draft.model_copy(update=figures), tested


def _error_rates(
    folder: Path,
    draft: Manifest,
    calibrated: Floats,
    calibration: tuple[Sample, ...],
    reporter: Reporter,
    has_detector: bool,
) -> tuple[Neither | None, tuple[ErrorRates, ...]]:
    """The outlier detector's threshold, and a table of error rates for each way of running the model.

    Args:
        folder: of the model.
        draft: its manifest so far.
        calibrated: probabilities of the calibration part on OpenVINO, with the cascade, (N, C).
        calibration: the photos.
        reporter: shows progress.
        has_detector: whether the folder has an outlier detector.
    """
    labels, full = labels_of(calibration), calibrated
    if draft.first_look is not None:
        full = _probabilities(folder, draft, calibration, "measuring", reporter, min_confidence=1.0)
    rates = cascade.risk_coverage(calibrated, full, labels, draft.first_look)
    tables = [ErrorRates(engine="openvino", catch_neither=False, rates=rates)]
    on_torch = _probabilities(folder, draft, calibration, "measuring on PyTorch", reporter, engine="torch")
    rates = metrics.risk_coverage(metrics.always(on_torch), labels)
    tables.append(ErrorRates(engine="torch", catch_neither=False, rates=rates))
    neither = None
    for name in _ENGINES if has_detector else ():
        engine = open_engine(folder, draft, name, "auto", evaluate.BATCH, catch_neither=True)
        answers, distances = outliers.classified(engine, calibration, draft.input)
        neither = neither or outliers.describe(distances)  # OpenVINO's, which comes first
        rates = metrics.risk_coverage(metrics.always(answers), labels, distances <= neither.threshold)
        tables.append(ErrorRates(engine=name, catch_neither=True, rates=rates))
    return neither, tuple(tables)


def _probabilities(
    folder: Path,
    draft: Manifest,
    samples: tuple[Sample, ...],
    title: str,
    reporter: Reporter,
    min_confidence: float = 0.0,
    engine: EngineName = "openvino",
) -> Floats:
    """Classify samples that decode, (N, C); with a minimum confidence of 1 there is no low-resolution pass."""
    opened = open_engine(folder, draft, engine, "auto", evaluate.BATCH, min_confidence)
    batches = evaluate.classify(opened, samples, draft.input.preprocessing)
    return evaluate.joined(list(reporter.track(batches, -(-len(samples) // evaluate.BATCH), title)))[1]
