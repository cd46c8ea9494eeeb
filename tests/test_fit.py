"""From a dataset to a model folder that sorts."""

import contextlib
import csv
import importlib
import io
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
from typing import Any
from unittest import mock

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
from sorter.classifier.network import Classifier
from sorter.errors import ConfigurationError
from sorter.inbox.scan import Inbox
from sorter.settings import Settings
from trainer import arguments
from trainer.cli import main
from trainer.data.layouts import labels_of
from trainer.data.pixels import read
from trainer.fitting import fit, recipes, sources, weights
from trainer.packaging import export, metrics

pytestmark = pytest.mark.filterwarnings("default")  # torch and NNCF warn about themselves

SMALL = ("--arch", "resnet18", "--image-size", "32", "--lr", "0.01")


def red_and_green(root: Path, count: int, first: int = 0) -> Path:
    """`count` red cats and `count` green dogs, which any network can tell apart."""
    for folder, color, seed in (("cats", RED, first), ("dogs", GREEN, first + 1000)):
        make_tree(root, {f"{folder}/{n}.jpg": tinted(color, seed + n) for n in range(count)})
    return root


def new_photos(inbox: Path) -> Path:
    return make_tree(inbox, {"red.jpg": tinted(RED, 7777), "green.jpg": tinted(GREEN, 8888)})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return red_and_green(tmp_path_factory.mktemp("data"), 60)


@pytest.fixture(autouse=True, scope="module")
def _one_thread(own_cache: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # torch's threads spin while they wait for each other: with several, tests side by side take many times as long.
        patch.setattr(fit, "available_cpus", lambda: 1)
        yield


def fit_model(dataset: Path, output: Path, *options: str) -> int:
    return main(["fit", "--data", str(dataset), "--output", str(output), "--weights", "none", "--num-workers", "0",
                 *options])  # fmt: skip


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


class Fitted:
    """A model that was fitted once for many tests, and everything that the fit wrote."""

    def __init__(self, root: Path) -> None:
        self.data, self.model, self.events = root / "data", root / "colours", root / "events"
        red_and_green(self.data, 60)
        (self.data / "cats/dangling.jpg").symlink_to("nowhere.jpg")
        (self.data / "cats" / os.fsdecode(b"caf\xe9\n.jpg")).write_bytes(b"no photo")
        make_tree(self.data, {"unsure/1.jpg": tinted(RED, 3333), "failed/2.jpg": b"no photo"})
        self.model.mkdir()
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            contextlib.chdir(self.model),
            mock.patch.object(export, "networks", self._networks),
        ):
            code = fit_model(self.data, Path(), *SMALL, "--tensorboard", str(self.events))
        assert code == 0, err.getvalue()
        self.out = out.getvalue()
        self.log = [json.loads(line) for line in err.getvalue().splitlines()]

    def _networks(self, network: nn.Module, *arguments: Any) -> export.Networks:
        """Keep what the 8-bit network was made of and compared with."""
        described, calibration, logits = arguments[1], arguments[3], arguments[4]
        pixels = np.stack([read(sample.path, described.preprocessing) for sample in calibration])
        with torch.inference_mode():
            classifier = Classifier(network, described.mean, described.std)
            self.exact_logits = classifier(torch.from_numpy(pixels)).numpy()
        self.logits, self.labels = logits, labels_of(calibration)
        self.networks = _make_networks(network, *arguments)
        return self.networks


_make_networks = export.networks


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return Fitted(tmp_path_factory.mktemp("fitted"))


def test_a_fitted_model_sorts_new_photos(fitted: Fitted, tmp_path: Path) -> None:
    assert set(sort(fitted.model, new_photos(tmp_path))) == {"cats/red.jpg", "dogs/green.jpg"}


def test_a_model_in_the_current_folder_is_named_after_it(fitted: Fitted) -> None:
    assert manifest_module.read(fitted.model).name == "colours"


def test_the_sorter_s_own_folders_are_no_classes_and_are_skipped_with_a_sentence(fitted: Fitted) -> None:
    assert [c.folder for c in manifest_module.read(fitted.model).classes] == ["cats", "dogs"]
    said = [line["text"] for line in fitted.log if line["event"] == "note"]
    for name in ("unsure", "failed"):
        assert f"left out, the folder {name}: sorter keeps that name for photos of no class" in said


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("ca\nts", "dogs"), "cannot be a class"),
        (("x" * 201, "dogs"), "cannot be a class"),
        (("Birds", "birds"), "two classes have the same label or folder"),
    ],
)
def test_classes_that_no_model_can_have_are_refused_before_anything_is_fitted(
    names: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("something was fitted")

    monkeypatch.setattr(fit, "fit", never)
    shift = {name: 1000 * i for i, name in enumerate(names)}
    make_tree(tmp_path / "data", {f"{name}/{n}.jpg": tinted(RED, shift[name] + n) for name in names for n in range(40)})
    assert fit_model(tmp_path / "data", tmp_path / "model", *SMALL) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("trainer: ")
    assert sentence in last


def test_a_fit_prints_and_writes_how_good_the_model_is(fitted: Fitted) -> None:
    assert "12 of 12 test photos right" in fitted.out
    assert "log-loss" in fitted.out
    written = manifest_module.read(fitted.model)
    assert [e.role for e in written.evaluations] == ["calibration", "test"]
    assert written.evaluations[1].accuracy_interval_95 == (0.7575, 1.0)
    assert written.int8 is not None
    assert (fitted.model / "openvino.xml").exists() == (written.int8.agreement >= 0.99)
    with (fitted.model / "metrics.csv").open() as rows:
        assert len(list(csv.DictReader(rows))) == sum(line["event"] == "epoch" for line in fitted.log) > 0
    with (fitted.model / "predictions.csv").open() as rows:
        assert len(list(csv.DictReader(rows))) == 12
    card = (fitted.model / "README.md").read_text()
    assert "Classifies photos as cat or dog." in card
    assert ("The 8-bit network is used" in card) == (fitted.model / "openvino.xml").exists()


def test_each_engine_has_the_temperature_of_the_network_that_it_runs(fitted: Fitted) -> None:
    written = manifest_module.read(fitted.model)
    assert written.temperature == metrics.fit_temperature(fitted.networks.logits, fitted.labels)
    assert written.torch_temperature == metrics.fit_temperature(fitted.logits, fitted.labels)
    assert np.abs(fitted.networks.logits - fitted.logits).max() > 0.001, "two networks, so that the test can fail"


def test_the_8_bit_network_is_compared_with_one_of_32_bits_on_any_processor(fitted: Fitted) -> None:
    assert np.abs(fitted.exact_logits - fitted.logits).max() < 1e-3


def test_each_engine_is_measured_and_the_rates_that_few_photos_cannot_show_are_named(fitted: Fitted) -> None:
    written = manifest_module.read(fitted.model)
    assert [(e.engine, e.catch_neither, e.rates) for e in written.error_rates] == [
        ("openvino", False, ()),
        ("torch", False, ()),
    ]
    sentence = "no threshold for an error rate of 1.0% can be shown with 12 photos: at least 299 are needed"
    assert sentence in fitted.out
    assert sentence in (fitted.model / "report.html").read_text()


def test_the_model_card_names_all_that_the_calibration_photos_were_used_for(fitted: Fitted) -> None:
    card = (fitted.model / "README.md").read_text()
    assert "| temperatures, 8 or 16 bits, thresholds for error rates |" in card
    assert "| nothing was tuned on them |" in card


def test_the_report_is_one_file_that_needs_no_other(fitted: Fitted) -> None:
    report = (fitted.model / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:|#)', report) == []
    assert "Confusion" in report


def test_unreadable_files_are_left_out_and_listed_whatever_their_names(fitted: Fitted) -> None:
    notes = [line["text"] for line in fitted.log if line["event"] == "note"]
    assert notes[0].startswith("layout classes: ")
    assert sum("unreadable" in note for note in notes) == 2
    report = (fitted.model / "report.html").read_text()
    assert "dangling.jpg" in report
    assert "caf\\udce9" in report


@pytest.mark.long
@pytest.mark.parametrize("architecture", network.ARCHITECTURES)
def test_every_architecture_fits_exports_and_sorts(architecture: str, dataset: Path, tmp_path: Path) -> None:
    size = "80" if architecture == "inception_v3" else "64"
    options = ("--arch", architecture, "--image-size", size, "--epochs", "2")
    assert fit_model(dataset, tmp_path / "model", *options) == 0
    assert {Path(name).name for name in sort(tmp_path / "model", new_photos(tmp_path / "in"))} == {
        "red.jpg",
        "green.jpg",
    }


def test_the_command_line_knows_every_architecture_and_recipe() -> None:
    assert arguments.ARCHITECTURES == network.ARCHITECTURES
    assert set(arguments.RECIPES) == set(recipes.RECIPES)


def test_weights_from_a_file_fit_any_head(tmp_path: Path) -> None:
    donor = network.build("resnet18", (), 1000)
    torch.save(donor.state_dict(), tmp_path / "resnet18.pth")
    built = weights.start("resnet18", str(tmp_path / "resnet18.pth"), (270, 90), 2)
    assert torch.equal(built.conv1.weight, donor.conv1.weight)  # type: ignore[union-attr, arg-type]
    (tmp_path / "w.safetensors").write_bytes(network.half(donor.state_dict()))
    assert weights.start("resnet18", str(tmp_path / "w.safetensors"), (), 2)


def test_unusable_weights_are_refused_with_a_sentence(tmp_path: Path) -> None:
    torch.save(network.build("resnet18", (), 2).state_dict(), tmp_path / "18.pth")
    with pytest.raises(ConfigurationError, match="does not fit resnet34"):
        weights.start("resnet34", str(tmp_path / "18.pth"), (), 2)
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(ConfigurationError, match="more than tensors"):
        weights.start("resnet18", str(tmp_path / "code.pth"), (), 2)
    with pytest.raises(ConfigurationError, match="check --weights"):
        weights.start("resnet18", str(tmp_path / "missing.pth"), (), 2)


COMMANDS = {
    "fit": ["fit", "--data", "data", "--output", "model"],
    "evaluate": ["evaluate", "--data", "data"],
    "predict": ["predict", "--data", "data", "--output", "submission.csv"],
    "export": ["export", "--model", "model", "--output", "copy", "--data", "data"],
    "export onnx": ["export", "--model", "model", "--output", "model.onnx", "--format", "onnx"],
}


def run_without(module: str, commands: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """The exit code and standard error of each command, in one process that cannot import a module."""
    script = (
        f"import contextlib, io, json, sys; sys.modules[{module!r}] = None\n"
        "from trainer.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    error = io.StringIO()\n"
        "    with contextlib.redirect_stderr(error):\n"
        "        code = main(command)\n"
        "    print(json.dumps([code, error.getvalue()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_without_pytorch_every_command_says_what_to_install(tmp_path: Path) -> None:
    for name, (code, error) in zip(COMMANDS, run_without("torch", list(COMMANDS.values()), tmp_path), strict=True):
        assert code == 2, name
        needs = f"trainer {name.split()[0]} needs the extra 'train': run pip install '.[train]' in sorter's folder"
        assert error == f"trainer: the Python package torch is not installed; {needs}\n", name


def test_the_help_needs_no_pytorch(tmp_path: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from trainer.cli import main; main(['fit', '--help'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--recipe {head,finetune,notebook}" in done.stdout


def test_without_another_package_of_the_extra_a_fit_says_what_to_install(tmp_path: Path) -> None:
    ((code, error),) = run_without("imagehash", [COMMANDS["fit"]], tmp_path)
    assert (code, error.splitlines()[-1]) == (
        2,
        "trainer: the Python package imagehash is not installed; "
        "trainer fit needs the extra 'train': run pip install '.[train]' in sorter's folder",
    )


def test_predictions_for_the_competition_are_clipped_and_in_order(tmp_path: Path) -> None:
    make_tree(tmp_path / "test1", {f"{n}.jpg": plain(RED, n) for n in (10, 2, 1)})
    assert main(["predict", "--data", str(tmp_path / "test1"), "--output", str(tmp_path / "s.csv")]) == 0
    with (tmp_path / "s.csv").open() as rows:
        table = list(csv.DictReader(rows))
    assert [row["id"] for row in table] == ["1", "2", "10"]
    assert all(0.005 <= float(row["label"]) <= 0.995 for row in table)


def test_a_submission_leaves_out_unreadable_photos_and_needs_distinct_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "test1", {"1.jpg": plain(RED), "2.jpg": b"no photo"})
    command = ["predict", "--data", str(tmp_path / "test1"), "--output", str(tmp_path / "s.csv")]
    assert main(command) == 3
    assert "2.jpg" in capsys.readouterr().err
    make_tree(tmp_path / "test1/more", {"1.jpg": plain(RED)})
    before = (tmp_path / "s.csv").read_bytes()
    assert main(command) == 2
    assert "two photos with the same number" in capsys.readouterr().err
    assert (tmp_path / "s.csv").read_bytes() == before
    for wrong in ("0.9", "nan", "-1"):
        with pytest.raises(SystemExit):
            main([*command, f"--clip={wrong}"])


def as_zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in sorted(read_tree(folder).items()):
            archive.writestr(f"{folder.name}/{name}", content)
    return path


def cat_and_dog(dataset: Path, root: Path) -> Path:
    """The same photos in the layout of Kaggle's tongpython/cat-and-dog."""
    for folder in ("cats", "dogs"):
        photos = {path.name: path.read_bytes() for path in sorted((dataset / folder).iterdir())}
        for part, names in (("training_set", sorted(photos)[:45]), ("test_set", sorted(photos)[45:])):
            make_tree(root / part / part / folder, {name: photos[name] for name in names})
    return root


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
    """The same photos in Microsoft's layout, with the kinds of broken files that it has."""
    for label in ("cat", "dog"):
        folder = {path.name: path.read_bytes() for path in sorted((dataset / f"{label}s").iterdir())}
        make_tree(root / "PetImages" / label.capitalize(), {**folder, "Thumbs.db": b"\xd0\xcf\x11\xe0", "666.jpg": b""})
    make_tree(root / "PetImages" / "Dog", {"11702.jpg": plain(GREEN)[:200], "9500.jpg": b"<html>not found</html>"})
    return root


def zipped(dataset: Path, root: Path) -> Path:
    root.mkdir()
    return as_zip(dataset, root / "classes.zip")


LAYOUTS = {
    "classes": (zipped, 0),
    "dogs-vs-cats": (competition, 0),
    "pet-images": (pet_images, 4),
    "cat-and-dog": (cat_and_dog, 0),
}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_a_model_that_sorts(
    layout: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, unreadable = LAYOUTS[layout]
    model = tmp_path / "model"
    assert fit_model(make(dataset, tmp_path / "given"), model, *SMALL) == 0
    said = capsys.readouterr()
    notes = [json.loads(line)["text"] for line in said.err.splitlines() if '"note"' in line]
    assert notes[0].startswith(f"layout {layout}")
    assert sum("unreadable" in note for note in notes) == unreadable
    assert "log-loss" in said.out
    assert set(sort(model, new_photos(tmp_path / "in"))) == {"cats/red.jpg", "dogs/green.jpg"}


@pytest.mark.long
def test_the_notebook_recipe_keeps_the_backbone_and_crops_the_center(dataset: Path, tmp_path: Path) -> None:
    donor = network.build("resnet18", (), 1000)
    (tmp_path / "w.safetensors").write_bytes(network.half(donor.state_dict()))
    options = ("--arch", "resnet18", "--image-size", "56", "--recipe", "notebook", "--epochs", "2")
    assert fit_model(dataset, tmp_path / "model", *options, "--weights", str(tmp_path / "w.safetensors")) == 0
    manifest = manifest_module.read(tmp_path / "model")
    assert (manifest.input.crop, manifest.input.size, manifest.input.resize) == ("center", 56, 64)
    fitted = network.load(tmp_path / "model", manifest).state_dict()
    kept = {name: value.half() for name, value in donor.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(fitted[name].half(), value) for name, value in kept.items() if "num_batches" not in name)


def test_an_unfinished_run_is_not_overwritten(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path, {"model/checkpoint.pt": b"hours of work"})
    assert fit_model(dataset, tmp_path / "model", *SMALL) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "model/checkpoint.pt").read_bytes() == b"hours of work"
    assert fit_model(dataset, tmp_path / "model", *SMALL, "--resume") == 2
    assert "cannot read the checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_is_not_empty_is_not_written_into(
    dataset: Path, fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "project", {"README.md": b"mine"})
    assert fit_model(dataset, tmp_path / "project", *SMALL) == 2
    assert "not empty" in capsys.readouterr().err
    assert read_tree(tmp_path / "project") == {"README.md": b"mine"}
    assert fit_model(dataset, fitted.model, *SMALL, "--resume") == 2
    assert "finished model" in capsys.readouterr().err


def test_a_checkpoint_is_not_resumed_with_other_photos(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = ("--arch", "resnet18", "--image-size", "32", "--recipe", "finetune", "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(sources.PhotoSource, "training", stop)
        assert fit_model(dataset, tmp_path / "model", *options) == 3
    assert "--resume" in capsys.readouterr().err
    other = red_and_green(tmp_path / "other", 60, first=5000)
    assert fit_model(other, tmp_path / "model", *options, "--resume") == 2
    assert "other options, weights or photos" in capsys.readouterr().err


def test_a_folder_is_not_exported_without_its_dataset(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", str(fitted.model), "--output", str(tmp_path / "m")]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.long
def test_an_export_rebuilds_the_folder_with_an_8_bit_network(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", "--model", str(fitted.model), "--output", str(tmp_path / "m")]
    assert main([*export, "--data", str(fitted.data)]) == 0
    assert "agrees with the 32-bit one on" in capsys.readouterr().out
    before, after = manifest_module.read(fitted.model), manifest_module.read(tmp_path / "m")
    assert after.int8 is not None
    assert before.int8 is not None
    assert after.int8.agreement == before.int8.agreement
    assert after.error_rates == before.error_rates
    assert after.files["weights.safetensors"] == before.files["weights.safetensors"]


@pytest.mark.long
def test_an_onnx_file_gives_the_model_s_answers(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    assert main(["export", "--model", str(fitted.model), "--format", "onnx", "--output", str(path)]) == 0
    assert float(capsys.readouterr().out.split()[-1]) < 1e-4
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    compiled = openvino.Core().compile_model(path, "CPU")
    for count in (1, 3):
        red = np.full((count, 32, 32, 3), RED, np.uint8)
        assert compiled(red)[0].argmax(1).tolist() == [0] * count


def test_evaluate_takes_any_layout_and_writes_json_and_a_table(
    fitted: Fitted, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pets = pet_images(dataset, tmp_path / "pets")
    for data in (as_zip(dataset, tmp_path / "d.zip"), pets, dataset):
        command = ["evaluate", "--model", str(fitted.model), "--data", str(data), "--json"]
        assert main([*command, "--csv", str(tmp_path / "answers.csv")]) == 0
        said = capsys.readouterr()
        result = json.loads(said.out)
        assert result["photos"] == 120
        assert result["right"] == sum(row[i] for i, row in enumerate(result["confusion"]))
        assert result["calibration_error_without_temperature"] >= 0
        assert said.err.count("left out") == (4 if data == pets else 0)
        with (tmp_path / "answers.csv").open() as rows:
            assert len(list(csv.DictReader(rows))) == 120


def test_tensorboard_shows_what_each_epoch_measured(fitted: Fitted) -> None:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(fitted.events))
    events.Reload()
    with (fitted.model / "metrics.csv").open() as rows:
        expected = [float(row["validation_loss"]) for row in csv.DictReader(rows)]
    assert [event.value for event in events.Scalars("validation/loss")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_a_browser_shows_the_report(fitted: Fitted, tmp_path: Path) -> None:
    browser = next((b for name in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}")
    page = (fitted.model / "report.html").as_uri()
    shown = subprocess.run(
        [browser, *flags, "--virtual-time-budget=5000", "--dump-dom", page], capture_output=True, text=True, check=False
    ).stdout
    assert shown.count("<svg") == 3
    assert shown.count("data:image/jpeg;base64,") >= 12
    assert "12 of 12 test photos are classified correctly" in shown
    picture = tmp_path / "shot.png"
    subprocess.run(
        [browser, *flags, "--window-size=1100,3000", f"--screenshot={picture}", page], capture_output=True, check=True
    )
    with Image.open(picture) as shot:
        colours = shot.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 100, "more than an empty page"
