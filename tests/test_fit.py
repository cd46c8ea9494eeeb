"""From a dataset to a model folder that sorts."""

import csv
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GREEN, LONG_AGO, RED, make_tree, plain, read_tree
from PIL import Image
from torch import nn

from sorter import manifest as manifest_module
from sorter import network
from sorter.engines import open_engine
from sorter.errors import ConfigurationError
from sorter.inbox import Inbox
from sorter.mover import Mover
from sorter.pipeline import Pipeline
from sorter.settings import Settings
from trainer import fit, weights
from trainer.cli import main

pytestmark = pytest.mark.filterwarnings("default")  # torch and NNCF warn of themselves


def tinted(color: tuple[int, int, int], seed: int) -> bytes:
    """A pattern of its own for each seed, in shades of one colour."""
    noise = np.random.default_rng(seed).random((6, 6, 1)) * np.array(color)
    buffer = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red cats and green dogs: any network can tell them apart."""
    root = tmp_path_factory.mktemp("data")
    for folder, color, first in (("cats", RED, 0), ("dogs", GREEN, 1000)):
        make_tree(root, {f"{folder}/{n}.jpg": tinted(color, first + n) for n in range(60)})
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fit_model(dataset: Path, output: Path, *options: str) -> int:
    given = ["fit", "--data", str(dataset), "--output", str(output), "--weights", "none", *options]
    return main([*given, "--num-workers", "1"])


def sort(model: Path, inbox: Path) -> dict[str, bytes]:
    """Sort an inbox with a model, in this process."""
    manifest = manifest_module.read(model)
    settings = Settings(inbox=inbox, once=True, model=model)
    engine = open_engine(model, manifest, "cpu")
    pipeline = Pipeline(engine, manifest, Mover(inbox), settings, workers=1)
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


def test_the_same_seed_gives_the_same_losses_to_the_last_digit() -> None:
    def run(seed: int) -> list[float]:
        draw = torch.Generator().manual_seed(9)
        labels = torch.arange(200) % 2
        part = fit.Part(torch.randn(2, 200, 16, generator=draw) + labels[None, :, None], labels)
        head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        losses: list[float] = []
        recipe = fit.Recipe(epochs=5, batch_size=32)
        fit.fit_head(head, part, part, recipe, seed, lambda e: losses.extend([e.training_loss, e.validation_loss]))
        return losses

    assert run(1) == run(1)
    assert run(1) != run(2)


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
