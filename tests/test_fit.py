"""From a dataset to a model folder that sorts."""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from conftest import GREEN, LONG_AGO, RED, make_tree, pipeline_to, plain, read_tree
from pictures import tinted
from PIL import Image
from torch import nn

from sorter.classifier import manifest as manifest_module
from sorter.classifier import network
from sorter.classifier.engine import open_engine
from sorter.errors import ConfigurationError
from sorter.inbox.scan import Inbox
from sorter.settings import Settings
from trainer.cli import main
from trainer.fitting import sources, weights

pytestmark = pytest.mark.filterwarnings("default")  # torch and NNCF warn of themselves


def red_and_green(root: Path, count: int, first: int = 0) -> Path:
    """Red cats and green dogs, so many of each: any network can tell them apart."""
    for folder, color, seed in (("cats", RED, first), ("dogs", GREEN, first + 1000)):
        make_tree(root, {f"{folder}/{n}.jpg": tinted(color, seed + n) for n in range(count)})
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return red_and_green(tmp_path_factory.mktemp("data"), 60)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def fit_model(dataset: Path, output: Path, *options: str) -> int:
    given = ["fit", "--data", str(dataset), "--output", str(output), "--weights", "none", "--num-workers", "0"]
    recipe = [] if "--recipe" in options else ["--recipe", "head"]
    return main([*given, *recipe, *options])


def sort(model: Path, inbox: Path) -> dict[str, bytes]:
    """Sort an inbox with a model, in this process."""
    manifest = manifest_module.read(model)
    settings = Settings(inbox=inbox, once=True, model=model)
    engine = open_engine(model, manifest, "auto", "cpu", 32)
    pipeline = pipeline_to(inbox, engine, manifest, settings)
    box = Inbox(inbox, recursive=False, excluded=frozenset(), settle_seconds=0)
    submitted = [pipeline.submit(photo, timeout_seconds=30) for photo in box.scan(LONG_AGO + 10)]
    deadline = time.monotonic() + 60
    while pipeline.in_flight:
        list(pipeline.outcomes(timeout_seconds=0.1))
        assert time.monotonic() < deadline
    pipeline.close()
    assert all(submitted)
    return read_tree(inbox)


SMALL = ("resnet18", "squeezenet1_1", "mnasnet1_0")


@pytest.mark.parametrize(
    "architecture", [a if a in SMALL else pytest.param(a, marks=pytest.mark.long) for a in network.ARCHITECTURES]
)
def test_every_architecture_fits_exports_and_sorts(architecture: str, dataset: Path, tmp_path: Path) -> None:
    size = "80" if architecture == "inception_v3" else "64"
    options = ("--arch", architecture, "--image-size", size, "--epochs", "2")
    assert fit_model(dataset, tmp_path / "model", *options) == 0
    inbox = make_tree(tmp_path / "in", {"red.jpg": tinted(RED, 7777), "green.jpg": tinted(GREEN, 8888)})
    assert {Path(name).name for name in sort(tmp_path / "model", inbox)} == {"red.jpg", "green.jpg"}


def test_a_fitted_model_tells_red_from_green_and_its_folder_says_how_well(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "colours"
    assert fit_model(dataset, model, "--arch", "resnet18", "--image-size", "32", "--lr", "0.01") == 0
    said = capsys.readouterr()
    assert "12 of 12 test photos right" in said.out
    epochs = [json.loads(line) for line in said.err.splitlines() if '"epoch"' in line]
    inbox = make_tree(tmp_path / "in", {"red.jpg": tinted(RED, 7777), "green.jpg": tinted(GREEN, 8888)})
    assert set(sort(model, inbox)) == {"cats/red.jpg", "dogs/green.jpg"}
    written = manifest_module.read(model)
    assert [e.role for e in written.evaluations] == ["calibration", "test"]
    assert written.int8 is not None
    assert (model / "openvino.xml").exists() == (written.int8.agreement >= 0.99)
    with (model / "metrics.csv").open() as rows:
        assert len(list(csv.DictReader(rows))) == len(epochs) > 0
    with (model / "predictions.csv").open() as rows:
        assert len(list(csv.DictReader(rows))) == 12
    report = (model / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:|#)', report) == [], "the report is one file"
    assert "Confusion" in report
    assert "{int8}" not in (model / "README.md").read_text()


def test_a_file_of_weights_fits_whatever_its_head(tmp_path: Path) -> None:
    donor = network.build("resnet18", (), 1000)
    torch.save(donor.state_dict(), tmp_path / "resnet18.pth")
    built = weights.start("resnet18", str(tmp_path / "resnet18.pth"), (270, 90), 2)
    assert torch.equal(built.conv1.weight, donor.conv1.weight)  # type: ignore[union-attr, arg-type]
    (tmp_path / "w.safetensors").write_bytes(network.half(donor.state_dict()))
    assert weights.start("resnet18", str(tmp_path / "w.safetensors"), (), 2)


def test_weights_that_cannot_be_used_are_refused_in_a_sentence(tmp_path: Path) -> None:
    torch.save(network.build("resnet18", (), 2).state_dict(), tmp_path / "18.pth")
    with pytest.raises(ConfigurationError, match="does not fit resnet34"):
        weights.start("resnet34", str(tmp_path / "18.pth"), (), 2)
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(ConfigurationError, match="more than tensors"):
        weights.start("resnet18", str(tmp_path / "code.pth"), (), 2)
    with pytest.raises(ConfigurationError, match="check --weights"):
        weights.start("resnet18", str(tmp_path / "missing.pth"), (), 2)


def test_without_the_extra_the_trainer_says_what_to_install(tmp_path: Path, dataset: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from trainer.cli import main\n"
        f"sys.exit(main(['fit', '--data', {str(dataset)!r}, '--output', {str(tmp_path / 'm')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "catdog-sorter[train]" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_predictions_for_the_competition_are_clipped_and_in_order(tmp_path: Path) -> None:
    make_tree(tmp_path / "test1", {f"{n}.jpg": plain(RED, n) for n in (10, 2, 1)})
    assert main(["predict", "--data", str(tmp_path / "test1"), "--output", str(tmp_path / "s.csv")]) == 0
    with (tmp_path / "s.csv").open() as rows:
        table = list(csv.DictReader(rows))
    assert [row["id"] for row in table] == ["1", "2", "10"]
    assert all(0.005 <= float(row["label"]) <= 0.995 for row in table)


def as_zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in sorted(read_tree(folder).items()):
            archive.writestr(f"{folder.name}/{name}", content)
    return path


def competition(dataset: Path, root: Path) -> Path:
    """The same photos as Kaggle's competition packs them: flat, in a zip of their own, with an unlabelled part."""
    for label in ("cat", "dog"):
        for path in sorted((dataset / f"{label}s").iterdir()):
            make_tree(root, {f"train/{label}.{path.name}": path.read_bytes()})
    as_zip(root / "train", root / "train.zip")
    shutil.rmtree(root / "train")
    make_tree(root, {"test1/1.jpg": plain(RED)})
    return root


def pet_images(dataset: Path, root: Path) -> Path:
    """The same photos in Microsoft's layout, with the kinds of files that are broken there."""
    for label in ("cat", "dog"):
        folder = {path.name: path.read_bytes() for path in sorted((dataset / f"{label}s").iterdir())}
        make_tree(root / "PetImages" / label.capitalize(), {**folder, "Thumbs.db": b"\xd0\xcf\x11\xe0", "666.jpg": b""})
    make_tree(root / "PetImages" / "Dog", {"11702.jpg": plain(GREEN)[:200], "9500.jpg": b"<html>not found</html>"})
    return root


@pytest.mark.parametrize(
    ("layout", "unreadable"), [("zip", 0), ("dogs-vs-cats", 0), ("pet-images", 4), ("cat-and-dog", 0)]
)
def test_each_layout_leads_to_a_model_that_tells_red_from_green(
    layout: str, unreadable: int, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "given"
    if layout == "zip":
        data = as_zip(dataset, tmp_path / "classes.zip")
    elif layout == "cat-and-dog":
        for folder in ("cats", "dogs"):
            photos = {path.name: path.read_bytes() for path in sorted((dataset / folder).iterdir())}
            for part, names in (("training_set", sorted(photos)[:45]), ("test_set", sorted(photos)[45:])):
                make_tree(root / part / part / folder, {name: photos[name] for name in names})
        data = root
    else:
        data = {"dogs-vs-cats": competition, "pet-images": pet_images}[layout](dataset, root)
    model = tmp_path / "model"
    assert fit_model(data, model, "--arch", "resnet18", "--image-size", "32", "--lr", "0.01") == 0
    said = capsys.readouterr()
    notes = [json.loads(line)["text"] for line in said.err.splitlines() if '"note"' in line]
    assert notes[0].startswith(f"layout {'classes' if layout == 'zip' else layout}")
    assert sum("unreadable" in note for note in notes) == unreadable
    assert "log-loss" in said.out
    inbox = make_tree(tmp_path / "in", {"red.jpg": tinted(RED, 7777), "green.jpg": tinted(GREEN, 8888)})
    assert set(sort(model, inbox)) == {"cats/red.jpg", "dogs/green.jpg"}


def test_the_notebook_s_recipe_keeps_the_backbone_and_judges_as_it_did(dataset: Path, tmp_path: Path) -> None:
    donor = network.build("resnet18", (), 1000)
    (tmp_path / "w.safetensors").write_bytes(network.half(donor.state_dict()))
    given = ("--arch", "resnet18", "--image-size", "56", "--recipe", "notebook", "--epochs", "2")
    assert fit_model(dataset, tmp_path / "model", *given, "--weights", str(tmp_path / "w.safetensors")) == 0
    manifest = manifest_module.read(tmp_path / "model")
    assert (manifest.input.crop, manifest.input.size, manifest.input.resize) == ("center", 56, 64)
    fitted = network.load(tmp_path / "model", manifest).state_dict()
    kept = {name: value.half() for name, value in donor.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(fitted[name].half(), value) for name, value in kept.items() if "num_batches" not in name)


def test_a_run_that_did_not_end_is_not_written_over(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path, {"model/checkpoint.pt": b"hours of work"})
    assert fit_model(dataset, tmp_path / "model", "--arch", "resnet18") == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "model/checkpoint.pt").read_bytes() == b"hours of work"
    assert fit_model(dataset, tmp_path / "model", "--arch", "resnet18", "--resume") == 2
    assert "cannot be read" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def fitted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of colours, and TensorBoard's files beside it."""
    root = tmp_path_factory.mktemp("fitted")
    given = ("--arch", "resnet18", "--image-size", "32", "--lr", "0.01", "--tensorboard", str(root / "events"))
    assert fit_model(dataset, root / "model", *given) == 0
    return root


def test_an_export_writes_the_folder_anew_with_an_8_bit_network(
    fitted: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", str(fitted / "model"), "--output", str(tmp_path / "m")]) == 2
    assert "--data" in capsys.readouterr().err
    given = ["--data", str(dataset), "--output", str(tmp_path / "m")]
    assert main(["export", "--model", str(fitted / "model"), *given]) == 0
    assert "agrees with the 32-bit one on" in capsys.readouterr().out
    before, after = manifest_module.read(fitted / "model"), manifest_module.read(tmp_path / "m")
    assert after.int8 == before.int8
    assert after.files["weights.safetensors"] == before.files["weights.safetensors"]


def test_an_onnx_file_says_what_the_model_says(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    assert main(["export", "--model", str(fitted / "model"), "--format", "onnx", "--output", str(path)]) == 0
    assert float(capsys.readouterr().out.split()[-1]) < 1e-4
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    compiled = openvino.Core().compile_model(path, "CPU")
    for count in (1, 3):
        red = np.full((count, 32, 32, 3), RED, np.uint8)
        assert compiled(red)[0].argmax(1).tolist() == [0] * count


def test_evaluate_takes_any_layout_and_gives_json_and_a_table(
    fitted: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pets = pet_images(dataset, tmp_path / "pets")
    for data in (as_zip(dataset, tmp_path / "d.zip"), pets, dataset):
        given = ["evaluate", "--model", str(fitted / "model"), "--data", str(data), "--json"]
        assert main([*given, "--csv", str(tmp_path / "answers.csv")]) == 0
        said = capsys.readouterr()
        result = json.loads(said.out)
        assert result["photos"] == 120
        assert result["right"] == sum(row[i] for i, row in enumerate(result["confusion"]))
        assert result["calibration_error_without_temperature"] >= 0
        assert said.err.count("left out") == (4 if data == pets else 0)
        with (tmp_path / "answers.csv").open() as rows:
            assert len(list(csv.DictReader(rows))) == 120


def test_tensorboard_reads_what_each_epoch_measured(fitted: Path) -> None:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(fitted / "events"))
    events.Reload()
    with (fitted / "model" / "metrics.csv").open() as rows:
        expected = [float(row["validation_loss"]) for row in csv.DictReader(rows)]
    assert [event.value for event in events.Scalars("validation/loss")] == pytest.approx(expected, rel=1e-5)


def test_a_browser_shows_the_report(fitted: Path, tmp_path: Path) -> None:
    browser = next((b for name in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}")
    page = (fitted / "model" / "report.html").as_uri()
    shown = subprocess.run(
        [browser, *flags, "--virtual-time-budget=5000", "--dump-dom", page], capture_output=True, text=True, check=False
    ).stdout
    assert shown.count("<svg") == 3
    assert shown.count("data:image/jpeg;base64,") >= 12
    assert "12 of 12 test photos right" in shown
    picture = tmp_path / "shot.png"
    subprocess.run(
        [browser, *flags, "--window-size=1100,3000", f"--screenshot={picture}", page], capture_output=True, check=True
    )
    with Image.open(picture) as shot:
        colours = shot.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 100, "more than an empty page"


def test_a_folder_with_anything_in_it_is_not_written_into(
    dataset: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "project", {"README.md": b"mine"})
    assert fit_model(dataset, tmp_path / "project", "--arch", "resnet18") == 2
    assert "not empty" in capsys.readouterr().err
    assert read_tree(tmp_path / "project") == {"README.md": b"mine"}
    assert fit_model(dataset, fitted / "model", "--arch", "resnet18", "--resume") == 2
    assert "finished model" in capsys.readouterr().err


def test_other_photos_are_not_gone_on_with(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    given = ("--arch", "resnet18", "--image-size", "32", "--recipe", "default", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(sources.PhotoSource, "training", stop)
        assert fit_model(dataset, tmp_path / "model", *given) == 3
    assert "--resume" in capsys.readouterr().err
    other = red_and_green(tmp_path / "other", 60, first=5000)
    assert fit_model(other, tmp_path / "model", *given, "--resume") == 2
    assert "other options, weights or photos" in capsys.readouterr().err


def test_what_is_no_photo_is_left_out_whatever_its_name(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data/cats/nowhere.jpg").symlink_to("gone.jpg")
    (tmp_path / "data/cats" / os.fsdecode(b"caf\xe9\n.jpg")).write_bytes(b"no photo")
    assert fit_model(tmp_path / "data", tmp_path / "model", "--arch", "resnet18", "--image-size", "32") == 0
    report = (tmp_path / "model/report.html").read_text()
    assert "nowhere.jpg" in report
    assert "caf\\udce9" in report


def test_a_submission_is_about_two_classes_and_complete(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "test1", {"1.jpg": plain(RED), "2.jpg": b"no photo"})
    given = ["predict", "--data", str(tmp_path / "test1"), "--output", str(tmp_path / "s.csv")]
    assert main(given) == 3
    assert "2.jpg" in capsys.readouterr().err
    make_tree(tmp_path / "test1/more", {"1.jpg": plain(RED)})
    before = (tmp_path / "s.csv").read_bytes()
    assert main(given) == 2
    assert "two photos of one number" in capsys.readouterr().err
    assert (tmp_path / "s.csv").read_bytes() == before
    for wrong in ("0.9", "nan", "-1"):
        with pytest.raises(SystemExit):
            main([*given, f"--clip={wrong}"])
