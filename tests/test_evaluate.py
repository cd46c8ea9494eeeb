"""`trainer evaluate` on a handful of pictures, its labels, and its figures against values worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, smooth

from sorter.classifier import manifest
from sorter.classifier.manifest import Class
from sorter.classifier.openvino_engine import OpenVinoEngine
from sorter.errors import ConfigurationError
from sorter.settings import SHIPPED_MODEL
from trainer.cli import main
from trainer.data.labelled import labelled_photos
from trainer.data.layouts import Sample, labels_of
from trainer.data.pixels import read
from trainer.packaging import export
from trainer.packaging.metrics import (
    THRESHOLDS,
    always,
    calibration_error,
    evaluation,
    fit_temperature,
    mistakes,
    not_shown,
    risk_coverage,
    softmax,
    wilson,
)

CLASSES = (Class(label="cat", folder="cats"), Class(label="dog", folder="dogs"))
NOWHERE = Path("photo.jpg")


def found(data: Path) -> dict[str, int]:
    """Which label each photo got, by its path in the folder."""
    return {str(s.path.relative_to(data)): s.label for s in labelled_photos(data, CLASSES)}


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures, four of them said to be cats."""
    for i in range(7):
        path = tmp_path / ("cats" if i < 4 else "dogs") / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(smooth(i), "JPEG"))
    return tmp_path


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    expected = {
        (952, 1000): (0.9369, 0.9636),
        (484, 500): (0.9487, 0.9802),
        (5, 10): (0.2366, 0.7634),
        (0, 10): (0.0, 0.2775),
        (10, 10): (0.7225, 1.0),
        (1, 1): (0.2065, 1.0),
    }
    assert {counts: wilson(*counts) for counts in expected} == expected


def test_the_shipped_model_s_intervals_are_wilsons() -> None:
    for shipped in manifest.read(SHIPPED_MODEL).evaluations:
        assert shipped.accuracy_interval_95 == wilson(shipped.right, shipped.photos)


def test_the_folder_of_a_photo_is_its_label(tmp_path: Path) -> None:
    touch(tmp_path, "cats/a.jpg", "dogs/b.png")
    assert found(tmp_path) == {"cats/a.jpg": 0, "dogs/b.png": 1}


def test_a_folder_may_have_the_name_of_a_label_or_folder_in_any_case_at_any_depth(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "Cat", "CATS", "test_set/test_set/cats")):
        root = touch(tmp_path / str(number), f"{name}/a.jpg")
        assert found(root) == {f"{name}/a.jpg": 0}


def test_files_that_are_no_photos_or_in_no_class_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "cats/a.jpg", "cats/_DS_Store", "cats/notes.txt", "birds/b.jpg", "loose.jpg")
    assert found(tmp_path) == {"cats/a.jpg": 0}


def test_labels_csv_labels_loose_photos(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "unlabelled.jpg")
    (tmp_path / "labels.csv").write_text("name,label\nb.jpg,cat\na.jpg,Dog\n", encoding="utf-8")
    assert found(tmp_path) == {"b.jpg": 0, "a.jpg": 1}


def test_a_folder_without_labelled_photos_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "birds/a.jpg")
    with pytest.raises(
        ConfigurationError, match=r"has no labelled photos: give a folder that contains cats/ and dogs/"
    ):
        labelled_photos(tmp_path, CLASSES)


def test_labels_csv_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("name,label\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="has no labelled photos"):
        labelled_photos(tmp_path, CLASSES)


def test_labels_csv_with_other_columns_or_labels_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    for table in ("name,label\na.jpg,bird\n", "file,class\na.jpg,cat\n", "name,label\na.jpg\n"):
        (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
        with pytest.raises(ConfigurationError, match=r"labels\.csv"):
            labelled_photos(tmp_path, CLASSES)


ANSWERS = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]], np.float32)
SAMPLES = [Sample(Path(f"{i}.jpg"), label) for i, label in enumerate([0, 1, 1, 0])]


def test_the_accuracy_is_the_share_whose_likeliest_class_is_right_with_its_interval() -> None:
    result = evaluation(ANSWERS, labels_of(SAMPLES), data="by hand", role="test")
    assert (result.photos, result.right, result.accuracy) == (4, 2, 0.5)
    assert result.accuracy_interval_95 == wilson(2, 4)


def test_the_log_loss_is_the_mean_negative_logarithm_at_the_labels() -> None:
    expected = -sum(math.log(p) for p in (0.9, 0.8, 0.4, 0.3)) / 4
    assert evaluation(ANSWERS, labels_of(SAMPLES), data="by hand", role="test").log_loss == pytest.approx(
        expected, abs=5e-5
    )


def test_a_mistake_at_full_confidence_costs_a_finite_amount() -> None:
    result = evaluation(np.array([[1, 0]], np.float32), np.array([1]), data="by hand", role="test")
    assert result.log_loss == pytest.approx(-math.log(1e-7), abs=1e-3)


def test_the_most_confident_mistake_comes_first() -> None:
    found = [(sample.path.name, called, round(p, 4)) for sample, called, p in mistakes(ANSWERS, SAMPLES)]
    assert found == [("3.jpg", 1 - SAMPLES[3].label, 0.7), ("2.jpg", 1 - SAMPLES[2].label, 0.6)]


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy() -> None:
    # 0.62 is wrong, 1.0 is right; 0.82 and 0.84 share a bin, in which one of two is right.
    confidence, is_right = np.array([0.62, 0.82, 0.84, 1.0], np.float32), np.array([0, 1, 0, 1])
    gap = 0.62 + 2 * abs((0.82 + 0.84) / 2 - 1 / 2) + 0.0
    answers = np.stack([confidence, 1 - confidence], 1)
    assert calibration_error(answers, 1 - is_right) == pytest.approx(gap / 4, abs=5e-5)


def test_the_calibration_error_is_torchmetrics_s() -> None:
    # Its multiclass_calibration_error, n_bins=15, gave these for the same numbers.
    found = []
    for seed, photos, classes in ((0, 500, 2), (1, 1000, 2), (2, 300, 3), (3, 7, 2)):
        draw = np.random.default_rng(seed)
        answers = softmax((draw.normal(size=(photos, classes)) * 6).astype(np.float32), 1.0)
        found.append(calibration_error(answers, draw.integers(0, classes, photos)))
    assert found == [0.4374, 0.4309, 0.5766, 0.1787]


def uncertain(count: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels drawn from them: calibrated after division by the sharpness."""
    draw = np.random.default_rng(0)
    true = draw.normal(0, 3, count)
    labels = (draw.random(count) < 1 / (1 + np.exp(-true))).astype(np.intp)
    return np.stack([np.zeros(count), true * sharpness], 1).astype(np.float32), labels


def test_the_temperature_corrects_a_network_that_is_over_or_underconfident() -> None:
    for sharpness in (0.4, 1.0, 3.0):
        logits, labels = uncertain(20_000, sharpness)
        assert fit_temperature(logits, labels) == pytest.approx(sharpness, rel=0.05)


def test_a_few_photos_that_are_all_right_do_not_make_every_answer_certain() -> None:
    labels = np.arange(80) % 2
    logits = np.random.default_rng(0).normal(3, 1, 80).clip(0.5).astype(np.float32)
    temperature = fit_temperature(np.stack([np.zeros(80), np.where(labels == 1, logits, -logits)], 1), labels)
    assert 0.6 < temperature < 1


def test_a_threshold_that_is_tried_is_the_one_that_is_written() -> None:
    logits, labels = uncertain(5000, 1.0)
    answers = softmax(logits, 1.0)
    table = risk_coverage(always(answers), labels)
    assert table
    for entry in table:
        assert entry.threshold in THRESHOLDS
        taken = answers.max(1).astype(np.float64) >= entry.threshold
        assert taken.mean() == pytest.approx(entry.coverage, abs=1e-4)


def test_photos_that_the_outlier_detector_catches_are_not_counted() -> None:
    labels = np.zeros(1000, np.intp)
    answers = np.tile(np.array([0.99, 0.01], np.float32), (1000, 1))
    answers[:100] = answers[:100, ::-1]
    assert risk_coverage(always(answers), labels) == ()
    answers[:100] = -1
    table = risk_coverage(always(answers), labels)
    assert {entry.coverage for entry in table} == {0.9}
    assert len(table) == 4


def test_too_few_photos_for_an_error_rate_are_told_how_many_are_needed() -> None:
    assert not_shown((), 80)[1] == (
        "no threshold for an error rate of 1.0% can be shown with 80 photos: at least 299 are needed, with no mistake "
        "among them"
    )
    assert "too many of the confident answers are wrong" in not_shown((), 600)[0]


def test_the_8_bit_network_is_refused_for_its_labels_and_for_its_confidences() -> None:
    logits, labels = uncertain(500, 1.0)
    same = export.compare(logits, logits, labels)
    assert (same.agreement, same.log_loss_increase) == (1.0, 0.0)
    assert export.is_good_enough(same)
    other_labels = logits.copy()
    other_labels[:10] = other_labels[:10, ::-1]
    assert not export.is_good_enough(export.compare(other_labels, logits, labels))
    blurred = np.stack([np.zeros(500), np.sign(logits[:, 1])], 1).astype(np.float32)  # each label, but no confidence
    other_confidences = export.compare(blurred, logits, labels)
    assert other_confidences.agreement == 1.0
    assert not export.is_good_enough(other_confidences)


def test_the_thresholds_keep_their_error_rates_on_new_photos() -> None:
    logits, labels = uncertain(40_000, 1.0)
    answers = softmax(logits, 1.0)
    table = risk_coverage(always(answers[:20_000]), labels[:20_000])
    assert {entry.error_rate for entry in table} >= {0.01, 0.02, 0.05}
    fresh, theirs = answers[20_000:], labels[20_000:]
    for entry in table:
        taken = fresh.max(1) >= entry.threshold
        assert (fresh.argmax(1) != theirs)[taken].mean() <= entry.error_rate
        assert taken.mean() == pytest.approx(entry.coverage, abs=0.02)
    coverages = [entry.coverage for entry in table]
    assert coverages == sorted(coverages)


def test_error_rates_that_the_photos_cannot_support_are_left_out() -> None:
    logits, labels = uncertain(100, 1.0)
    sure = np.stack([np.zeros(100), np.where(labels == 1, 9.0, -9.0)], 1).astype(np.float32)
    assert [entry.error_rate for entry in risk_coverage(always(softmax(sure, 1.0)), labels)] == [0.05]
    assert risk_coverage(always(softmax(logits[:20], 1.0)), labels[:20]) == ()


def test_evaluate_json_prints_one_json_object(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", str(pictures), "--device", "cpu", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert (result["photos"], result["data"], result["role"]) == (7, f"all of {pictures.name} (classes)", "test")
    assert result["accuracy"] == pytest.approx(result["right"] / 7, abs=5e-5)


def test_evaluate_compares_one_network_with_and_without_its_temperature(
    pictures: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped, samples = manifest.read(SHIPPED_MODEL), labelled_photos(pictures, CLASSES)
    assert shipped.cascade
    # In this copy of the shipped model the low-resolution pass is final for every photo.
    quick = tmp_path_factory.mktemp("quick")
    for file in SHIPPED_MODEL.iterdir():
        (quick / file.name).symlink_to(file)
    (quick / manifest.MANIFEST).unlink()
    low = shipped.cascade[0].model_copy(update={"threshold": 0.0})
    (quick / manifest.MANIFEST).write_text(shipped.model_copy(update={"cascade": (low,)}).model_dump_json())
    assert main(["evaluate", "--model", str(quick), "--data", str(pictures), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    pixels = np.stack([read(sample.path, shipped.input.preprocessing) for sample in samples])
    for temperature, name in ((1.0, "without_temperature"), (shipped.temperature, "full_size")):
        engine = OpenVinoEngine(SHIPPED_MODEL, shipped.model_copy(update={"temperature": temperature}), 1.0)
        expected = calibration_error(engine.classify(pixels), labels_of(samples))
        assert result[f"calibration_error_{name}"] == pytest.approx(expected, abs=2e-3)


def test_evaluate_says_how_many_were_right(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", str(pictures), "--device", "cpu"]) == 0
    assert " of 7 right: " in capsys.readouterr().out


def test_evaluate_says_in_one_sentence_what_is_wrong(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pictures)
    for arguments in (["missing"], [".", "--model", "missing"], [".", "--device", "toaster"]):
        assert main(["evaluate", "--data", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err.startswith("trainer: ")) == ("", 1, True)


def test_evaluate_names_the_photo_that_cannot_be_read_and_measures_the_others(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cats" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["evaluate", "--data", str(pictures), "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["photos"] == 7
    (line,) = err.strip().splitlines()
    assert "broken.jpg (truncated: " in line
