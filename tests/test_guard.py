"""The guard set: features of the calibration photos, on which another head is compared and calibrated."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import torch
from conftest import SHARED, small_manifest
from torch import nn

from sorter.classifier import outliers
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import LowResolutionPass, Manifest, Neither
from sorter.errors import ModelError
from sorter.settings import SHIPPED_MODEL
from trainer.data.labelled import labelled_photos
from trainer.data.layouts import labels_of
from trainer.fitting import features
from trainer.packaging import backbone, guard, metrics, rehead
from trainer.packaging.guard import Guard
from trainer.packaging.rehead import Base
from trainer.progress import Reporter

pytestmark = pytest.mark.filterwarnings("default")  # torch and NNCF warn about themselves


@pytest.fixture(scope="module")
def base() -> Base:
    return rehead.read(SHIPPED_MODEL)


def test_the_guard_set_of_the_shipped_model_gives_its_figures(base: Base) -> None:
    assert base.guard is not None
    answers = guard.answers(guard.logits_of(base.head, base.guard.features), base.manifest)
    measured = base.manifest.evaluations[0]
    assert (measured.role, measured.photos) == ("calibration", len(base.guard.labels))
    # On a processor without 8-bit instructions the features were a little different.
    assert int((answers.argmax(1) == base.guard.labels).sum()) == pytest.approx(measured.right, abs=1)
    assert metrics.log_loss(answers, base.guard.labels) == pytest.approx(measured.log_loss, abs=0.005)


def test_the_same_head_gets_the_temperatures_the_cascade_and_the_thresholds_that_the_model_has(base: Base) -> None:
    assert base.guard is not None
    assert base.manifest.int8 is not None
    found = rehead.described(base, "again", base.guard, base.manifest.int8)
    assert found.temperature == pytest.approx(base.manifest.temperature, rel=0.05)
    assert found.torch_temperature == pytest.approx(base.manifest.temperature_of("torch"), rel=0.05)
    assert [each.size for each in found.cascade] == [each.size for each in base.manifest.cascade]
    for mine, theirs in zip(found.cascade, base.manifest.cascade, strict=True):
        assert mine.temperature == pytest.approx(theirs.temperature, rel=0.05)
        assert mine.threshold == pytest.approx(theirs.threshold, abs=0.02)
        assert mine.neither_threshold == theirs.neither_threshold
    for catch_neither in (False, True):
        rates, expected = (each.rates_of("openvino", catch_neither=catch_neither) for each in (found, base.manifest))
        assert rates is not None
        assert expected is not None
        assert [rate.error_rate for rate in rates] == [rate.error_rate for rate in expected]
        assert [r.coverage for r in rates] == pytest.approx([r.coverage for r in expected], abs=0.02)
        assert found.rates_of("torch", catch_neither=catch_neither) is None


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photos in ../shared")
@pytest.mark.parametrize("min_confidence", [0.0, 0.99])
def test_answers_from_features_are_those_of_the_engine(base: Base, min_confidence: float) -> None:
    samples = labelled_photos(SHARED / "photos", base.manifest.classes)[::5]
    found = guard.measure(base.model, base.manifest, samples, Reporter())
    logits = guard.logits_of(base.head, found.features)
    seen = base.manifest.input.preprocessing
    engine = open_engine(SHIPPED_MODEL, base.manifest, "openvino", "cpu", 32, min_confidence, catch_neither=True)
    pixels = list(features.batches(samples, seen))
    expected = np.concatenate([engine.classify(each) for each in pixels])
    answers = guard.answers(logits, base.manifest, min_confidence)
    assert (answers.argmax(1) == expected.argmax(1)).all()
    assert np.abs(answers - expected).max() < 0.05
    distances = guard.distances_of(outliers.read(SHIPPED_MODEL, base.manifest), base.head, found.features)
    caught = guard.answers(logits, base.manifest, min_confidence, distances).max(1) < 0
    is_caught = np.concatenate([engine.classify_with_distance(each)[1] for each in pixels]) > 0
    assert (caught != is_caught).sum() <= 1
    assert (labels_of(samples) == found.labels).all()


def test_what_the_cascade_is_sure_of_is_final_and_what_is_caught_at_full_size_is_not_sorted() -> None:
    low = LowResolutionPass(
        size=16, temperature=1, threshold=0.9, neither_threshold=0.0, photos=4, enough=0.5, agreement=1
    )
    neither = Neither(threshold=1, photos=4, caught=0)
    described = small_manifest().model_copy(update={"cascade": (low,), "neither": neither})
    sure, doubtful, other = (9.0, 0.0), (0.1, 0.0), (0.0, 9.0)
    logits = {
        16: np.array([sure, doubtful, sure, doubtful], np.float32),
        32: np.array([other, other, other, other], np.float32),
    }
    assert guard.answers(logits, described).argmax(1).tolist() == [0, 1, 0, 1]
    assert guard.answers(logits, described, min_confidence=0.95).argmax(1).tolist() == [1, 1, 1, 1]
    distances = {16: np.array([-1, -1, 2, 2], np.float32), 32: np.array([2, 0, 0, 2], np.float32)}
    answers = guard.answers(logits, described, distances=distances)
    assert answers[:3].argmax(1).tolist() == [0, 1, 1]
    assert answers[3].tolist() == [-1, -1]


def manifest_with(folder: Path, tensors: dict[str, npt.NDArray[Any]]) -> Manifest:
    (folder / guard.FILE).write_bytes(safetensors.numpy.save(tensors))
    return small_manifest().model_copy(update={"files": {guard.FILE: "sha256:"}})


def test_a_guard_set_is_read_back_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    assert guard.read(tmp_path, small_manifest()) is None
    known = Guard({32: np.eye(4, 8, dtype=np.float32)}, np.array([0, 1, 1, 0]))
    described = small_manifest().model_copy(update={"files": {guard.FILE: "sha256:"}})
    (tmp_path / guard.FILE).write_bytes(known.as_file())
    found = guard.read(tmp_path, described)
    assert found is not None
    assert np.array_equal(found.features[32], known.features[32])
    assert found.labels.tolist() == [0, 1, 1, 0]
    halves = np.ones((4, 8), np.float16)
    unfit: list[dict[str, npt.NDArray[Any]]] = [
        {"32": halves, "labels": np.array([0, 1], np.int32)},
        {"32": halves, "labels": np.array([0, 1, 2, 0], np.int32)},
        {"16": halves, "labels": np.array([0, 1, 1, 0], np.int32)},
    ]
    for tensors in unfit:
        with pytest.raises(ModelError, match="does not fit the model"):
            guard.read(tmp_path, manifest_with(tmp_path, tensors))
    with pytest.raises(ModelError, match="cannot be read"):
        guard.read(tmp_path, manifest_with(tmp_path, {"32": halves}))


def test_a_network_answers_with_the_head_that_was_put_on(base: Base) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 144, 144, 3), np.uint8)
    contrary = copy.deepcopy(base.head)
    assert isinstance(contrary, nn.Sequential)
    with torch.no_grad():
        contrary[-1].weight.neg_()  # type: ignore[operator]
        contrary[-1].bias.neg_()  # type: ignore[operator]
    models = base.model, rehead.with_new_head(base), backbone.with_head(base.model, contrary, base.manifest)
    before, same, opposite = (np.concatenate(features.on_openvino(model, exactly=True)([pixels])) for model in models)
    # The head that the folder has is one of 8 bits, and those that are put on have 32.
    assert np.abs(before - same).max() < 0.1
    assert np.abs(same + opposite).max() < 1e-3
    assert np.abs(same).min() > 0.5


def test_a_head_of_one_layer_is_put_on_too(base: Base) -> None:
    head = nn.Linear(2048, 3)
    joined = backbone.with_head(base.model, head, base.manifest)
    (row,) = features.on_openvino(joined)([np.full((1, 144, 144, 3), 99, np.uint8)])
    assert row.shape == (1, 3)
