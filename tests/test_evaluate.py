"""How good a model is: figures worked out by hand, and the command on a handful of pictures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, smooth

from sorter.classifier import manifest
from sorter.classifier.manifest import Class
from sorter.errors import ConfigurationError
from sorter.settings import SHIPPED_MODEL
from trainer.cli import main
from trainer.data.layouts import Sample
from trainer.packaging.evaluate import fit_temperature, judge, labelled_photos, mistakes, risk_coverage, softmax, wilson

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


# --- the interval ---


@pytest.mark.parametrize(
    ("right", "of", "interval"),
    [
        (952, 1000, (0.9369, 0.9636)),
        (484, 500, (0.9487, 0.9802)),
        (5, 10, (0.2366, 0.7634)),
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (1, 1, (0.2065, 1.0)),
    ],
)
def test_the_interval_is_wilsons(right: int, of: int, interval: tuple[float, float]) -> None:
    assert wilson(right, of) == interval


def test_the_shipped_models_intervals_are_wilsons() -> None:
    for evaluation in manifest.read(SHIPPED_MODEL).evaluations:
        assert evaluation.accuracy_interval_95 == wilson(evaluation.right, evaluation.photos)


# --- labels ---


def test_the_folder_of_a_photo_is_its_label(tmp_path: Path) -> None:
    touch(tmp_path, "cats/a.jpg", "dogs/b.png")
    assert found(tmp_path) == {"cats/a.jpg": 0, "dogs/b.png": 1}


@pytest.mark.parametrize("name", ["cat", "Cat", "CATS", "test_set/test_set/cats"])
def test_a_folder_may_be_called_by_label_or_folder_in_any_case_and_depth(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}/a.jpg")
    assert found(tmp_path) == {f"{name}/a.jpg": 0}


def test_what_is_no_photo_or_in_no_class_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "cats/a.jpg", "cats/_DS_Store", "cats/notes.txt", "birds/b.jpg", "loose.jpg")
    assert found(tmp_path) == {"cats/a.jpg": 0}


def test_labels_csv_labels_loose_photos(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "unlabelled.jpg")
    (tmp_path / "labels.csv").write_text("name,label\nb.jpg,cat\na.jpg,Dog\n", encoding="utf-8")
    assert found(tmp_path) == {"b.jpg": 0, "a.jpg": 1}


def test_a_folder_without_labelled_photos_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "birds/a.jpg")
    with pytest.raises(ConfigurationError, match=r"has no labelled photos: give a folder with cats/ and dogs/ in it"):
        labelled_photos(tmp_path, CLASSES)


def test_labels_csv_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("name,label\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="has no labelled photos"):
        labelled_photos(tmp_path, CLASSES)


@pytest.mark.parametrize("table", ["name,label\na.jpg,bird\n", "file,class\na.jpg,cat\n", "name,label\na.jpg\n"])
def test_labels_csv_that_makes_no_sense_is_refused(tmp_path: Path, table: str) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"labels\.csv"):
        labelled_photos(tmp_path, CLASSES)


# --- figures ---

ANSWERS = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]], np.float32)
SAMPLES = [Sample(Path(f"{i}.jpg"), label) for i, label in enumerate([0, 1, 1, 0])]


def test_the_accuracy_is_the_share_whose_likeliest_class_is_right() -> None:
    result = judge(ANSWERS, SAMPLES, data="by hand", role="test")
    assert (result.photos, result.right, result.accuracy) == (4, 2, 0.5)


def test_the_accuracy_comes_with_its_interval() -> None:
    assert judge(ANSWERS, SAMPLES, data="by hand", role="test").accuracy_interval_95 == wilson(2, 4)


def test_the_log_loss_is_the_mean_surprise_at_the_labels() -> None:
    surprise = -sum(math.log(p) for p in (0.9, 0.8, 0.4, 0.3)) / 4
    assert judge(ANSWERS, SAMPLES, data="by hand", role="test").log_loss == pytest.approx(surprise, abs=5e-5)


def test_a_certain_mistake_costs_much_but_not_everything() -> None:
    result = judge(np.array([[1, 0]], np.float32), [Sample(NOWHERE, 1)], data="by hand", role="test")
    assert result.log_loss == pytest.approx(-math.log(1e-7), abs=1e-3)


def test_the_most_confident_mistake_comes_first() -> None:
    found = [(sample.path.name, called, round(p, 4)) for sample, called, p in mistakes(ANSWERS, SAMPLES)]
    assert found == [("3.jpg", 1 - SAMPLES[3].label, 0.7), ("2.jpg", 1 - SAMPLES[2].label, 0.6)]


# --- calibration and thresholds ---


def uncertain(count: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels drawn from them: calibrated after division by the sharpness."""
    draw = np.random.default_rng(0)
    true = draw.normal(0, 3, count)
    labels = (draw.random(count) < 1 / (1 + np.exp(-true))).astype(np.intp)
    return np.stack([np.zeros(count), true * sharpness], 1).astype(np.float32), labels


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_a_network_that_is_too_sure_or_too_modest(sharpness: float) -> None:
    logits, labels = uncertain(20_000, sharpness)
    assert fit_temperature(logits, labels) == pytest.approx(sharpness, rel=0.05)


def test_the_thresholds_keep_their_rates_on_photos_they_were_not_chosen_on() -> None:
    logits, labels = uncertain(40_000, 1.0)
    answers = softmax(logits, 1.0)
    table = risk_coverage(answers[:20_000], labels[:20_000])
    assert {entry.error_rate for entry in table} >= {0.01, 0.02, 0.05}
    fresh, theirs = answers[20_000:], labels[20_000:]
    for entry in table:
        taken = fresh.max(1) >= entry.threshold
        assert (fresh.argmax(1) != theirs)[taken].mean() <= entry.error_rate
        assert taken.mean() == pytest.approx(entry.coverage, abs=0.02)
    coverages = [entry.coverage for entry in table]
    assert coverages == sorted(coverages)


def test_rates_that_the_photos_cannot_support_are_absent() -> None:
    logits, labels = uncertain(100, 1.0)
    sure = np.stack([np.zeros(100), np.where(labels == 1, 9.0, -9.0)], 1).astype(np.float32)
    assert [entry.error_rate for entry in risk_coverage(softmax(sure, 1.0), labels)] == [0.05]
    assert risk_coverage(softmax(logits[:20], 1.0), labels[:20]) == ()


# --- the command ---


def test_evaluate_json_prints_one_json_object(pictures: Path) -> None:
    command = [sys.executable, "-m", "trainer", "evaluate", "--data", str(pictures), "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert (result["photos"], result["data"], result["role"]) == (7, f"all of {pictures.name} (classes)", "test")
    assert result["accuracy"] == pytest.approx(result["right"] / 7, abs=5e-5)


def test_evaluate_says_how_many_were_right(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", str(pictures), "--device", "cpu"]) == 0
    assert " of 7 right: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--data", "missing"], ["--data", ".", "--model", "missing"], ["--data", ".", "--device", "toaster"]],
    ids=["data", "model", "device"],
)
def test_evaluate_says_in_one_sentence_what_is_wrong(
    pictures: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pictures)
    assert main(["evaluate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("trainer: ")) == ("", 1, True)


def test_evaluate_names_the_photo_that_cannot_be_read_and_judges_the_others(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cats" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["evaluate", "--data", str(pictures), "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["photos"] == 7
    (line,) = err.strip().splitlines()
    assert "broken.jpg (truncated: the header cannot be read)" in line
