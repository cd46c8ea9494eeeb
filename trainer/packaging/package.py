"""From a fitted network to a model folder, its figures measured through the very engine that will run it.

In: a network and a dataset. Out: a folder that `sorter run --model` takes.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from sorter.classifier import manifest as manifest_module
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import NEITHER, Evaluation, Manifest
from trainer.data.layouts import Sample, labels_of
from trainer.data.split import Dataset
from trainer.fitting import features
from trainer.fitting.features import Floats
from trainer.packaging import cascade as first_look
from trainer.packaging import evaluate, export, report
from trainer.packaging import outliers as neither
from trainer.progress import Reporter


@dataclass(frozen=True, slots=True)
class Package:
    """A model folder as written.

    Attributes:
        manifest: as written.
        calibrated: probabilities of the calibration part, float32 (N, C).
        tested: those of the test part.
        calibration_error_before: of the calibration part, without the temperature.
    """

    manifest: Manifest
    calibrated: Floats
    tested: Floats
    calibration_error_before: float


def write(
    folder: Path,
    fitted: nn.Module,
    described: Manifest,
    dataset: Dataset,
    name_of: Callable[[Literal["calibration", "test"]], str],
    reporter: Reporter,
) -> Package:
    """Calibrate, judge and write a model.

    Args:
        folder: made where it is missing.
        fitted: from normalised float (N, 3, S, S) to logits (N, C).
        described: the manifest; what is measured here is filled in.
        dataset: its training, calibration and test parts.
        name_of: what the figures of a part are said to be of.
        reporter: is told how far it is.
    """
    seen, labels = described.input, labels_of(dataset.calibration)
    converted = features.convert(fitted, seen.mean, seen.std, seen.size)
    run, track = features.on_openvino(converted), reporter.tracker("calibrating")
    logits = features.answers(run, dataset.calibration, seen.preprocessing, track=track)
    temperature = evaluate.fit_temperature(logits, labels)
    reporter.say("making the networks for processors")
    networks = export.networks(fitted, converted, seen, dataset.training, dataset.calibration, logits)
    look = first_look.choose(networks.best, networks.logits, dataset.calibration, seen, reporter)
    contents, distance = networks.files, None
    if len(labels) >= neither.LEAST_PHOTOS:
        distance = neither.choose(networks.best, len(described.head_hidden), dataset.training, seen, reporter)
    if distance is not None:
        contents = contents | {NEITHER: distance.as_file()}
    update = {"temperature": temperature, "int8": networks.int8, "first_look": look, "neither": None}
    draft = described.model_copy(update=update)
    with tempfile.TemporaryDirectory() as scratch:
        draft = manifest_module.write(Path(scratch), draft, contents, card="")

        def answers(samples: tuple[Sample, ...], what: str, min_confidence: float = 0.0) -> Floats:
            engine = open_engine(Path(scratch), draft, "openvino", "cpu", evaluate.BATCH, min_confidence)
            batches = evaluate.probabilities(engine, samples, seen.preprocessing)
            tracked = reporter.track(batches, -(-len(samples) // evaluate.BATCH), what)
            return evaluate.joined(list(tracked))[1]

        calibrated = answers(dataset.calibration, "judging")
        whole = answers(dataset.calibration, "judging", min_confidence=1.0) if look else calibrated
        if distance is not None:
            engine = open_engine(Path(scratch), draft, "openvino", "cpu", evaluate.BATCH, catch_neither=True)
            told = neither.describe(neither.distances(engine, dataset.calibration, seen))
            draft = draft.model_copy(update={"neither": told})
        # The test part is looked at once, here, after everything was chosen.
        tested = answers(dataset.test, "testing")

    def judged(part: Literal["calibration", "test"], found: Floats) -> Evaluation:
        return evaluate.judge(found, getattr(dataset, part), data=name_of(part), role=part)

    update = {
        "evaluations": (judged("calibration", calibrated), judged("test", tested)),
        "risk_coverage": first_look.risk_coverage(calibrated, whole, labels, look),
    }
    complete = draft.model_copy(update=update)
    reporter.say("writing the model folder")
    written = manifest_module.write(folder, complete, contents, report.card(complete))
    before = evaluate.calibration_error(evaluate.softmax(logits, 1.0), labels)
    return Package(written, calibrated, tested, before)
