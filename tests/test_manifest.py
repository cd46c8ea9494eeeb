"""The model folder: what `write` makes, `read` accepts; what is damaged or foreign, it refuses in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sorter.classifier.manifest import MANIFEST, WEIGHTS, Evaluation, Manifest, digest_of, read, write
from sorter.decoding.images import Preprocessing
from sorter.errors import ModelError
from sorter.settings import SHIPPED_MODEL


@pytest.fixture
def folder(tmp_path: Path, manifest: Manifest) -> Path:
    """A model folder that `read` accepts."""
    write(tmp_path / "model", manifest, {WEIGHTS: bytes(range(256))}, "# A model\n")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_bytes())
    edit(content)
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")


def refusal(folder: Path) -> str:
    """The one sentence that `read` refuses a folder with."""
    with pytest.raises(ModelError) as caught:
        read(folder)
    sentence = str(caught.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


# --- write, then read ---


def test_what_was_written_is_what_is_read(tmp_path: Path, manifest: Manifest) -> None:
    evaluation = Evaluation(
        data="d", role="test", photos=4, right=3, accuracy=0.75, accuracy_interval_95=(0.3, 0.95), log_loss=0.5
    )
    full = manifest.model_copy(
        update={"head_hidden": (8,), "evaluations": (evaluation,), "training": {"epochs": 3, "by": "hand"}}
    )
    written = write(tmp_path, full, {WEIGHTS: b"weights"}, "card")
    assert read(tmp_path) == written == full.model_copy(update={"files": written.files})


def test_a_model_folder_holds_the_manifest_the_weights_and_the_card(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", MANIFEST, WEIGHTS]
    assert (folder / WEIGHTS).read_bytes() == bytes(range(256))
    assert (folder / "README.md").read_text(encoding="utf-8") == "# A model\n"


def test_a_second_model_replaces_the_first(folder: Path, manifest: Manifest) -> None:
    write(folder, manifest.model_copy(update={"name": "second"}), {WEIGHTS: b"other weights"}, "card")
    assert read(folder).name == "second"
    assert (folder / WEIGHTS).read_bytes() == b"other weights"


def test_the_manifest_says_how_a_photo_is_prepared(manifest: Manifest) -> None:
    cropped = manifest.input.model_copy(update={"size": 24, "crop": "center", "resize": 32})
    assert cropped.preprocessing == Preprocessing(24, "center", 32)


def test_the_accuracy_is_the_one_of_the_test_set(manifest: Manifest) -> None:
    figures: dict[str, Any] = {"data": "d", "photos": 10, "accuracy_interval_95": (0.0, 1.0), "log_loss": 0.1}
    calibration = Evaluation(role="calibration", right=9, accuracy=0.9, **figures)
    test = Evaluation(role="test", right=8, accuracy=0.8, **figures)
    assert manifest.model_copy(update={"evaluations": (calibration, test)}).accuracy == 0.8


def test_a_model_that_was_never_tested_has_no_accuracy(manifest: Manifest) -> None:
    assert manifest.accuracy is None


# --- what is refused ---


def test_a_flipped_byte_in_the_weights_is_refused(folder: Path) -> None:
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[100] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    assert "damaged" in refusal(folder)


def test_a_truncated_weights_file_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    assert "damaged" in refusal(folder)


def test_a_missing_folder_is_refused_by_its_path(tmp_path: Path) -> None:
    assert f"there is no model in {tmp_path / 'missing'}" in refusal(tmp_path / "missing")


def test_a_folder_without_a_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert f"there is no model in {folder}" in refusal(folder)


def test_a_file_in_the_place_of_the_folder_is_refused(folder: Path) -> None:
    assert "there is no model" in refusal(folder / WEIGHTS)


def test_missing_weights_are_refused_by_name(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in refusal(folder)


def test_a_manifest_that_names_no_weights_is_refused(folder: Path) -> None:
    change(folder, lambda content: content["files"].clear())
    assert f"does not list {WEIGHTS}" in refusal(folder)


def test_a_second_file_that_is_missing_is_refused_by_name(folder: Path) -> None:
    change(folder, lambda content: content["files"].update({"more.bin": "sha256:0"}))
    assert "more.bin" in refusal(folder)


def test_a_newer_format_is_refused_with_the_advice_to_upgrade(folder: Path) -> None:
    change(folder, lambda content: content.update(format_version=2))
    sentence = refusal(folder)
    assert "has format 2" in sentence
    assert "upgrade" in sentence


def test_a_newer_format_is_told_apart_from_a_broken_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format_version": 7, "something": ["else"]}', encoding="utf-8")
    assert "upgrade" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"name": "\xff"}', b"\0" * 100])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert "not a valid manifest" in refusal(folder)


def test_an_unknown_field_is_refused_by_name(folder: Path) -> None:
    change(folder, lambda content: content.update(flavour="vanilla"))
    assert "flavour" in refusal(folder)


def test_an_unknown_field_within_a_part_is_refused_by_its_path(folder: Path) -> None:
    change(folder, lambda content: content["input"].update(flavour="vanilla"))
    assert "input.flavour" in refusal(folder)


@pytest.mark.parametrize(
    "field", ["format_version", "name", "architecture", "classes", "input", "temperature", "files"]
)
def test_a_missing_field_is_refused_by_name(folder: Path, field: str) -> None:
    change(folder, lambda content: content.pop(field))
    assert field in refusal(folder)


@pytest.mark.parametrize("name", ["", ".", "..", ".cats", "../cats", "/cats", "cats/", "a/b", "a\0b"])
def test_a_folder_that_is_not_a_plain_name_is_refused(folder: Path, name: str) -> None:
    change(folder, lambda content: content["classes"][0].update(folder=name))
    assert "not a plain name" in refusal(folder)


@pytest.mark.parametrize("name", ["unsure", "failed"])
def test_a_folder_that_the_sorter_needs_itself_is_refused(folder: Path, name: str) -> None:
    change(folder, lambda content: content["classes"][0].update(folder=name))
    assert "reserved" in refusal(folder)


@pytest.mark.parametrize("field", ["folder", "label"])
def test_two_classes_of_the_same_name_are_refused(folder: Path, field: str) -> None:
    change(folder, lambda content: content["classes"][0].update({field: content["classes"][1][field]}))
    assert "same label or folder" in refusal(folder)


def test_a_single_class_is_refused(folder: Path) -> None:
    change(folder, lambda content: content["classes"].pop())
    assert "classes" in refusal(folder)


def test_a_center_crop_of_more_than_there_is_is_refused(folder: Path) -> None:
    change(folder, lambda content: content["input"].update(crop="center", size=64, resize=32))
    assert "center crop" in refusal(folder)


@pytest.mark.parametrize("temperature", [0, -1])
def test_a_temperature_that_is_not_positive_is_refused(folder: Path, temperature: float) -> None:
    change(folder, lambda content: content.update(temperature=temperature))
    assert "temperature" in refusal(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/weights", "..", ".hidden"])
def test_a_file_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    change(folder, lambda content: content["files"].update({name: digest_of(folder.parent / "secret")}))
    assert "outside the folder" in refusal(folder)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_file_that_cannot_have_that_name_is_refused(folder: Path, name: str) -> None:
    change(folder, lambda content: content["files"].update({name: "sha256:0"}))
    assert "model" in refusal(folder)


# --- the model that ships ---


def test_the_shipped_model_reads_and_sorts_into_cats_and_dogs() -> None:
    assert [(c.label, c.folder) for c in read(SHIPPED_MODEL).classes] == [("cat", "cats"), ("dog", "dogs")]


def test_the_shipped_models_accuracy_was_measured_on_a_test_set() -> None:
    assert [e.role for e in read(SHIPPED_MODEL).evaluations].count("test") == 1


def test_the_shipped_models_accuracy_is_the_share_that_was_right() -> None:
    for evaluation in read(SHIPPED_MODEL).evaluations:
        assert evaluation.accuracy == pytest.approx(evaluation.right / evaluation.photos, abs=5e-5)


def test_the_shipped_models_accuracy_lies_within_its_interval() -> None:
    for evaluation in read(SHIPPED_MODEL).evaluations:
        low, high = evaluation.accuracy_interval_95
        assert low < evaluation.accuracy < high
