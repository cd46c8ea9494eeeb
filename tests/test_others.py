"""Photos that show none of the classes: found, divided, and learned from."""

from pathlib import Path

import pytest
from conftest import GREEN, RED, make_tree, photo
from pictures import encoded, smooth, tinted

from sorter.classifier import manifest as manifests
from sorter.classifier.engine import open_engine
from sorter.errors import ConfigurationError
from trainer.cli import main
from trainer.data import others
from trainer.data.inspection import inspect
from trainer.data.layouts import Sample
from trainer.packaging.outliers import distances

BLUE = (40, 60, 200)


def test_others_are_found_at_any_depth_and_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"", "deep/er/b.PNG": b"", "notes.txt": b""})
    assert [path.name for path in others.find(tmp_path)] == ["a.jpg", "b.PNG"]
    with pytest.raises(ConfigurationError, match="has no photos"):
        others.find(make_tree(tmp_path / "empty", {}))


def test_what_does_not_decode_or_is_a_photo_of_the_classes_is_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path, {"cats/1.jpg": photo(1), "others/copy.jpg": photo(1), "others/bad.jpg": b"\xff\xd8 no"})
    make_tree(tmp_path / "others", {"fine.jpg": photo(2)})
    paths, cat = others.find(tmp_path / "others"), tmp_path / "cats/1.jpg"
    divided = others.divide(paths, {path: inspect(path) for path in (*paths, cat)}, [cat])
    assert {path.name for path, _ in divided.left_out} == {"copy.jpg", "bad.jpg"}
    assert [sample.path.name for sample in (*divided.fitting, *divided.held_out)] == ["fine.jpg"]


def test_a_fifth_is_held_out_near_copies_together_and_the_same_each_time(tmp_path: Path) -> None:
    pictures = {f"{n}.jpg": encoded_scene(n) for n in range(120)}
    make_tree(tmp_path, pictures | {f"{n}-again.png": encoded_scene(n, "PNG") for n in range(120)})
    paths = others.find(tmp_path)
    inspected = {path: inspect(path) for path in paths}
    divided = others.divide(paths, inspected, [])
    assert 0.1 < len(divided.held_out) / len(paths) < 0.35
    held_out = {sample.path.stem.partition("-")[0] for sample in divided.held_out}
    assert held_out.isdisjoint(sample.path.stem.partition("-")[0] for sample in divided.fitting)
    assert others.divide(paths, inspected, []) == divided


def encoded_scene(number: int, kind: str = "JPEG") -> bytes:
    return encoded(smooth(number, (96, 96)), kind)


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch and NNCF warn about themselves
def test_a_fit_with_others_learns_to_catch_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("data", 60), ("calibration", 150)):
        for folder, color in (("cats", RED), ("dogs", GREEN)):
            shift = 1000 * (part == "data") + 5000 * (folder == "dogs")
            make_tree(tmp_path / part / folder, {f"{n}.jpg": tinted(color, shift + n) for n in range(count)})
    make_tree(tmp_path / "others", {f"deep/{n}.jpg": tinted(BLUE, 9000 + n) for n in range(120)})
    given = ["--data", str(tmp_path / "data"), "--calibration", str(tmp_path / "calibration"), "--lr", "0.01"]
    given += ["--others", str(tmp_path / "others"), "--weights", "none", "--arch", "resnet18", "--image-size", "64"]
    assert main(["fit", *given, "--num-workers", "0", "--output", str(tmp_path / "model")]) == 0
    written = manifests.read(tmp_path / "model")
    neither = written.neither
    assert neither is not None
    assert (neither.score, neither.photos) == ("learned", 300)
    assert neither.caught <= 0.01
    assert neither.others > 0
    assert neither.others_caught > 0.9
    assert all(low.neither_threshold is not None for low in written.cascade)
    ways = [(table.engine, table.catch_neither) for table in written.error_rates]
    assert ways == [("openvino", False), ("torch", False), ("openvino", True), ("torch", True)]
    report = (tmp_path / "model" / "report.html").read_text(encoding="utf-8")
    assert "Photos that show none of the classes" in report
    assert "Other photos that look most like the classes" in report
    make_tree(tmp_path / "new", {"red.jpg": tinted(RED, 88_888), "blue.jpg": tinted(BLUE, 99_999)})
    photos = [Sample(tmp_path / "new" / name, 0) for name in ("red.jpg", "blue.jpg")]
    for name in ("openvino", "torch"):
        engine = open_engine(tmp_path / "model", written, name, "cpu", 8, catch_neither=True)
        red, blue = distances(engine, photos, written.input)
        assert red <= 0 < blue, name
    export = ["export", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    capsys.readouterr()
    assert main([*export, "--output", str(tmp_path / "again")]) == 2
    assert "--others" in capsys.readouterr().err
