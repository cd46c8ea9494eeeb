"""`trainer fit --corrections` on a small network: what stays as it is, and what is refused."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GREEN, RED, make_tree, small_manifest
from pictures import Color, tinted
from reviewing import Sorted, sort_as
from test_verdicts import say

from sorter.classifier import manifest as manifest_module
from sorter.classifier import network
from sorter.classifier.manifest import NEITHER, OPENVINO_FP16, WEIGHTS, Int8, Neither
from sorter.classifier.outliers import LearnedDetector
from trainer import learn as learning
from trainer.cli import main
from trainer.data import verdicts
from trainer.data.layouts import Sample, labels_of
from trainer.fitting import features
from trainer.fitting.loop import Hooks, Machine, Plan, fit_stage
from trainer.fitting.recipes import RECIPES
from trainer.fitting.sources import FeatureSource
from trainer.packaging import backbone, export, guard, rehead
from trainer.packaging.rehead import Base
from trainer.progress import Reporter

pytestmark = pytest.mark.filterwarnings("default")  # torch and NNCF warn about themselves

BLUE: Color = (30, 30, 220)
SURE = {"cat": Sorted("cat", 0.995), "dog": Sorted("dog", 0.995)}
UNSURE_DOG = Sorted("dog", 0.7)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Base:
    """A model folder with an outlier detector, a guard set, and 16 bits, because that is quicker made than 8."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # several spin while they wait for each other, also where other tests need the cores
    root = tmp_path_factory.mktemp("base")
    fitted = network.build("resnet18", (16,), 2).eval()
    seen = small_manifest().input
    int8 = Int8(photos=1, agreement=1, log_loss_increase=0)
    described = small_manifest().model_copy(
        update={"name": "colours", "architecture": "resnet18", "head_hidden": (16,), "int8": int8}
    )
    converted = features.convert(fitted, seen.mean, seen.std, seen.size)
    files = {WEIGHTS: network.half(fitted.state_dict()), **export.saved(converted, OPENVINO_FP16)}
    manifest_module.write(root / "random", described, files, card="")

    start, reporter = rehead.read(root / "random"), Reporter()
    photos = {f"{name}/{n}.jpg": tinted(color, seed + n) for name, color, seed in COLORS for n in range(60)}
    make_tree(root, photos)
    # Red is a cat, and green and blue are dogs.
    samples = [Sample(root / name, 0 if name.startswith("red") else 1) for name in photos]
    known = guard.measure(start.model, start.manifest, [s for s in samples if s.path.parent.name != "blue"], reporter)
    rows = backbone.features_at(start.model, start.manifest, 32, samples, reporter)
    source = FeatureSource(np.stack([rows, rows]), labels_of(samples), rows, labels_of(samples), 16, 0)
    stage = replace(RECIPES["head"].stages[0], patience=None)
    fit_stage(start.head, source, Plan(stage, 0, 0, frozen_statistics=False), Machine(torch.device("cpu")), Hooks())
    start = replace(start, guard=known)
    described = rehead.described(start, "colours", known, int8)
    detector = LearnedDetector(np.zeros(512, np.float32), np.zeros(1, np.float32))
    neither = Neither(score="learned", threshold=1, photos=len(known.labels), caught=0)
    files = rehead.files(start) | {guard.FILE: known.as_file(), NEITHER: detector.as_file()}
    manifest_module.write(root / "model", described.model_copy(update={"neither": neither}), files, card="")
    return rehead.read(root / "model")


COLORS = (("red", RED, 0), ("green", GREEN, 1000), ("blue", BLUE, 500))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """60 red cats and 60 green dogs, sorted confidently; and 90 blue photos, which the model takes for dogs."""
    known = {f"{label}{n}.jpg": (tinted(color, 2000 + n), SURE[label]) for label, color in SEEN for n in range(60)}
    sort_as(tmp_path / "out", known | {f"blue{n}.jpg": (tinted(BLUE, 3000 + n), UNSURE_DOG) for n in range(90)})
    return tmp_path / "out"


SEEN = (("cat", RED), ("dog", GREEN))


def learn(output: Path, base: Base, model: Path, *options: str) -> int:
    return main(["fit", "--corrections", str(output), "--base", str(base.folder), "--output", str(model), *options])


def test_the_layer_that_a_detector_looks_at_stays_as_it_is(base: Base, output: Path, tmp_path: Path) -> None:
    say(output, {f"blue{n}.jpg": "cat" for n in range(80)})
    old = base.manifest.neither
    assert old is not None
    described = base.manifest.model_copy(update={"neither": old.model_copy(update={"score": "mahalanobis"})})
    of_hidden_units = replace(base, manifest=described, fitted=copy.deepcopy(base.fitted))
    found = verdicts.read(output, None, described.classes, 0, tmp_path, 1, Reporter())
    learning._fit(of_hidden_units, found, found.confident.training, 0, Reporter())
    before, after = (each.head.state_dict() for each in (base, of_hidden_units))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"2.weight", "2.bias"}


def test_it_is_not_begun_without_enough_verdicts_or_with_options_that_mean_nothing(
    base: Base, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(output, {"blue1.jpg": "cat"})
    for options, sentence in (
        ((), "has 1 usable verdicts that name a class"),
        (("--image-size", "96"), "--image-size is of no use with --corrections"),
    ):
        assert learn(output, base, tmp_path / "model", *options) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "model").exists()
    for command, sentence in (((), "there is nothing to fit on"), (("--state-dir", "x", "--data", "y"), "go with")):
        assert main(["fit", "--output", str(tmp_path / "model"), *command]) == 2
        assert sentence in capsys.readouterr().err
