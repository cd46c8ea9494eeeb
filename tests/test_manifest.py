"""The model folder: `read` accepts what `write` writes, and refuses what is damaged or foreign with one sentence."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sorter.classifier.manifest import FORMAT_VERSION, MANIFEST, WEIGHTS, Evaluation, Manifest, read, write
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
    """The one-line message with which `read` refuses a folder."""
    with pytest.raises(ModelError) as caught:
        read(folder)
    sentence = str(caught.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


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


TWO_FILES = {WEIGHTS: b"other weights", "openvino.bin": b"other network"}


def test_a_write_that_fails_leaves_the_older_model(folder: Path, manifest: Manifest) -> None:
    before = read(folder)
    (folder / ".openvino.bin.part").mkdir()  # the second file cannot be written
    with pytest.raises(OSError, match="Is a directory"):
        write(folder, manifest.model_copy(update={"name": "second"}), TWO_FILES, "card")
    assert read(folder) == before


def test_a_write_that_is_killed_leaves_the_older_model_the_new_one_or_a_folder_that_is_refused(
    tmp_path: Path, manifest: Manifest
) -> None:
    def write_until_killed(folder: Path, renames: int) -> None:
        replace = Path.replace

        def counted(part: Path, target: Path) -> Path:
            nonlocal renames
            renames -= 1
            if renames < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(part, target)

        if (child := os.fork()) == 0:
            Path.replace = counted  # type: ignore[assignment,method-assign]
            write(folder, manifest.model_copy(update={"name": "second"}), TWO_FILES, "card")
            os._exit(0)
        os.waitpid(child, 0)

    found = []
    for renames in range(5):
        folder = tmp_path / str(renames)
        write(folder, manifest.model_copy(update={"name": "first"}), {WEIGHTS: b"first weights"}, "card")
        write_until_killed(folder, renames)
        try:
            found.append(read(folder).name)
        except ModelError as error:
            found.append("refused" if "is damaged" in str(error) else str(error))
    assert found == ["first", "first", "refused", "refused", "second"]


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


def test_damaged_weights_are_refused(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    flipped = content[:100] + bytes([content[100] ^ 1]) + content[101:]
    for damaged in (flipped, content[:-1], b""):
        (folder / WEIGHTS).write_bytes(damaged)
        assert "is damaged" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in refusal(folder)


def test_a_path_without_a_manifest_is_refused_by_its_name(folder: Path) -> None:
    missing, file = folder / "missing", folder / WEIGHTS
    (folder / MANIFEST).unlink()
    for path in (missing, file, folder):
        assert f"there is no model in {path} " in refusal(path)


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "00012", str(10**400)])
def test_a_newer_format_is_refused_with_the_advice_to_upgrade(folder: Path, version: str) -> None:
    (folder / MANIFEST).write_text(f'{{"format_version": {version}, "something": ["else"]}}', encoding="utf-8")
    sentence = refusal(folder)
    assert f"has format {version.lstrip('0')[:9]}," in sentence
    assert "upgrade sorter" in sentence


def test_a_manifest_that_is_not_a_json_object_is_refused(folder: Path) -> None:
    for content in (b"", b"{", b"[]", b"null", b'{"name": "\xff"}', b"\0" * 100):
        (folder / MANIFEST).write_bytes(content)
        assert "not a valid manifest" in refusal(folder)


def without(field: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(field)


def first_class(**changes: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["classes"][0].update(changes)


def file_named(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["files"].update({name: "sha256:0"})


REFUSED_FIELDS: dict[str, list[Callable[[dict[str, Any]], object]]] = {
    "flavour": [lambda content: content.update(flavour="vanilla")],
    "input.flavour": [lambda content: content["input"].update(flavour="vanilla")],
    f"names no {WEIGHTS}": [lambda content: content["files"].clear()],
    "more.bin": [file_named("more.bin")],
    "outside itself": [file_named(name) for name in ("../secret", "/etc/hostname", "sub/weights", "..", ".hidden")],
    "model": [file_named(name) for name in ("", "a\0b")],
    "not a plain name": [
        first_class(folder=name) for name in ("", ".", "..", ".cats", "../cats", "/cats", "cats/", "a/b", "a\0b")
    ],
    "reserved": [first_class(folder=name) for name in ("unsure", "failed")],
    "same label or folder": [first_class(folder="dogs"), first_class(label="dog")],
    "classes": [without("classes"), lambda content: content["classes"].pop()],
    "center crop": [lambda content: content["input"].update(crop="center", size=64, resize=32)],
    "temperature": [without("temperature"), *(lambda content, t=t: content.update(temperature=t) for t in (0, -1))],
    **{field: [without(field)] for field in ("format_version", "name", "architecture", "input", "files")},
}


@pytest.mark.parametrize("mentioned", REFUSED_FIELDS)
def test_a_wrong_field_is_refused_by_name(folder: Path, mentioned: str) -> None:
    original = (folder / MANIFEST).read_bytes()
    for edit in REFUSED_FIELDS[mentioned]:
        (folder / MANIFEST).write_bytes(original)
        change(folder, edit)
        assert mentioned in refusal(folder)


def test_the_shipped_model_sorts_into_cats_and_dogs_and_its_accuracy_was_measured_on_a_test_set() -> None:
    shipped = read(SHIPPED_MODEL)
    assert [(c.label, c.folder) for c in shipped.classes] == [("cat", "cats"), ("dog", "dogs")]
    assert [e.role for e in shipped.evaluations].count("test") == 1
    for evaluation in shipped.evaluations:
        low, high = evaluation.accuracy_interval_95
        assert evaluation.accuracy == pytest.approx(evaluation.right / evaluation.photos, abs=5e-5)
        assert low < evaluation.accuracy < high
