"""`trainer fit --corrections` on a small network: what stays as it is, and what is refused."""

import copy
import re
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
from sorter.errors import ConfigurationError
from trainer import learn as learning
from trainer.cli import main
from trainer.data import verdicts
from trainer.data.layouts import Sample, labels_of
from trainer.data.pixels import decoded
from trainer.fitting import features
from trainer.fitting.loop import Hooks, Machine, Plan, fit_stage
from trainer.fitting.recipes import RECIPES
from trainer.fitting.sources import FeatureSource
from trainer.packaging import backbone, export, guard, rehead
from trainer.packaging.rehead import Base
from trainer.progress import Reporter, Tracker

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
    of_hidden_units = replace(base, manifest=described)
    as_it_was = copy.deepcopy(base.head.state_dict())
    found = verdicts.read(output, None, described.classes, 0, tmp_path, 1, Reporter())
    fitted = learning._fit(of_hidden_units, found, found.confident.training, 0, Reporter())
    before, after = (each.head.state_dict() for each in (base, fitted))
    assert all(torch.equal(before[name], as_it_was[name]) for name in before)
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


class Meanwhile(Reporter):
    """Moves a photo with a verdict while the trainer is about to do something."""

    def __init__(self, title: str, path: Path) -> None:
        super().__init__()
        self._title, self._path = title, path

    def tracker(self, title: str) -> Tracker:
        if title == self._title and self._path.exists():
            self._path.rename(self._path.with_name("renamed.jpg"))
        return super().tracker(title)


def learn_while(reporter: Reporter, output: Path, base: Base, tmp_path: Path) -> learning.Learned:
    options = learning.Options(output, None, base.folder, None, tmp_path / "model", 0, 1, tmp_path / "cache", "")
    return learning.learn(options, reporter)


def test_photos_that_are_moved_while_it_fits_are_learned_from_all_the_same(
    base: Base, output: Path, tmp_path: Path
) -> None:
    say(output, {f"blue{n}.jpg": "cat" for n in range(80)})
    moved = output / "cats/blue1.jpg"
    learned = learn_while(Meanwhile("features at 32 px", moved), output, base, tmp_path)
    assert not moved.exists()
    assert learned.comparison.held_out.photos >= verdicts.MIN_HELD_OUT


def test_what_is_kept_of_a_photo_is_what_the_network_sees(base: Base, output: Path, tmp_path: Path) -> None:
    say(output, {f"blue{n}.jpg": "cat" for n in range(70)} | {"blue80.jpg": None})
    found = verdicts.read(output, None, base.manifest.classes, 0, tmp_path, 1, Reporter())
    kept = learning._in_memory(found, base, Reporter())
    assert kept == found  # but for the pixels
    photos = [
        kept.judged.training,
        kept.judged.held_out,
        kept.confident.training,
        kept.confident.held_out,
        kept.neither,
    ]
    for sample in (sample for part in photos for sample in part):
        np.testing.assert_array_equal(sample.pixels, decoded(sample.path, base.manifest.input.preprocessing))


def test_a_photo_that_is_moved_before_it_is_decoded_ends_it_with_what_to_do(
    base: Base, output: Path, tmp_path: Path
) -> None:
    say(output, {f"blue{n}.jpg": "cat" for n in range(80)})
    moved = output / "cats/blue1.jpg"
    sentence = f"{moved} was moved or removed meanwhile: run this again, without reviewing, undoing or moving photos"
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        learn_while(Meanwhile("decoding photos", moved), output, base, tmp_path)
    assert not (tmp_path / "model").exists()
