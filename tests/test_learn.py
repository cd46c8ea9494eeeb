"""`trainer fit --corrections`: a small network knows red cats and green dogs, and a person says what blue ones are."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GREEN, RED, make_tree, read_tree, small_manifest
from pictures import Color, tinted
from reviewing import Sorted, sort_as
from test_verdicts import say

from sorter.classifier import manifest as manifest_module
from sorter.classifier import network
from sorter.classifier.manifest import NEITHER, OPENVINO_FP16, WEIGHTS, Int8, Neither
from trainer.cli import main
from trainer.data.layouts import Sample
from trainer.fitting import features
from trainer.fitting.loop import Hooks, Machine, Plan, fit_stage
from trainer.fitting.recipes import RECIPES
from trainer.fitting.sources import FeatureSource
from trainer.packaging import backbone, export, guard, outliers, rehead
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
    samples = [Sample(root / name, ("red", "green").index(name.partition("/")[0])) for name in photos]
    known = guard.measure(start.model, start.manifest, samples, reporter)
    views = np.stack([known.features[32]] * 2)
    source = FeatureSource(views, known.labels, known.features[32], known.labels, 32, 0)
    (stage,) = RECIPES["head"].stages
    fit_stage(start.head, source, Plan(stage, 0, 0, frozen_statistics=False), Machine(torch.device("cpu")), Hooks())
    start = replace(start, guard=known)
    described = rehead.described(start, "colours", known, int8)
    with torch.inference_mode():
        hidden = start.head[:2](torch.from_numpy(known.features[32])).numpy()  # type: ignore[index]
    detector = outliers.mahalanobis(hidden)
    assert detector is not None
    neither = Neither(threshold=float(detector(hidden).max()), photos=len(hidden), caught=0)
    files = rehead.files(start) | {guard.FILE: known.as_file(), NEITHER: detector.as_file()}
    manifest_module.write(root / "model", described.model_copy(update={"neither": neither}), files, card="")
    return rehead.read(root / "model")


COLORS = (("red", RED, 0), ("green", GREEN, 1000))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """60 red cats and 60 green dogs, sorted confidently; and 90 blue photos, which the model takes for dogs."""
    known = {f"{label}{n}.jpg": (tinted(color, 2000 + n), SURE[label]) for label, color in SEEN for n in range(60)}
    sort_as(tmp_path / "out", known | {f"blue{n}.jpg": (tinted(BLUE, 3000 + n), UNSURE_DOG) for n in range(90)})
    return tmp_path / "out"


SEEN = (("cat", RED), ("dog", GREEN))


def learn(output: Path, base: Base, model: Path, *options: str) -> int:
    return main(["fit", "--corrections", str(output), "--base", str(base.folder), "--output", str(model), *options])


def right(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> float:
    """The share of the photos in folders of their classes that a model has right."""
    capsys.readouterr()
    assert main(["evaluate", "--data", str(photos), "--model", str(model), "--json"]) == 0
    return float(json.loads(capsys.readouterr().out)["accuracy"])


def test_what_a_person_says_of_some_photos_is_learned_for_others(
    base: Base, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(output, {f"blue{n}.jpg": "cat" for n in range(80)})
    say(output, {f"blue{n}.jpg": None for n in range(80, 85)})
    before = read_tree(output)
    assert learn(output, base, tmp_path / "better") == 0
    printed = capsys.readouterr().out
    assert f"use it: sorter run --model {tmp_path / 'better'} --inbox DIR" in printed
    assert "of 5 photos that you called neither" in printed
    assert read_tree(output) == before
    new_blue = {f"cats/{n}.jpg": tinted(BLUE, 5000 + n) for n in range(30)}
    new = make_tree(tmp_path / "new", new_blue | {f"dogs/{n}.jpg": tinted(GREEN, 6000 + n) for n in range(30)})
    assert right(base.folder, new, capsys) < 0.7
    assert right(tmp_path / "better", new, capsys) > 0.95


def test_the_new_model_has_another_head_and_the_rest_of_the_old_one(
    base: Base, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(output, {f"blue{n}.jpg": "cat" for n in range(80)})
    assert learn(output, base, tmp_path / "better") == 0
    new = rehead.read(tmp_path / "better")
    for name in (guard.FILE, NEITHER):
        assert new.manifest.files[name] == base.manifest.files[name]
    assert new.manifest.neither == base.manifest.neither
    assert new.manifest.name == "better"
    assert [(e.role, e.photos) for e in new.manifest.evaluations] == [("calibration", 120)]
    assert new.manifest.rates_of("openvino", catch_neither=False) is not None
    before, after = base.fitted.state_dict(), new.fitted.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The first layer is what this outlier detector looks at.
    assert changed == {"fc.2.weight", "fc.2.bias"}
    samples = [Sample(p, 0) for p in sorted((output / "cats").iterdir())[:20]]
    rows = [backbone.features_at(m.model, m.manifest, 32, samples, Reporter()) for m in (base, new)]
    assert np.array_equal(rows[0], rows[1])
    assert "wrong before" in (tmp_path / "better/README.md").read_text()


def test_where_half_of_the_corrections_are_false_nothing_is_written(
    base: Base, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(output, {f"blue{n}.jpg": "cat" for n in range(45)} | {f"cat{n}.jpg": "dog" for n in range(45)})
    old = read_tree(base.folder)
    assert learn(output, base, tmp_path / "worse") == 3
    printed = capsys.readouterr().out
    assert printed.startswith("wrong")
    assert "not better: it " in printed
    assert f"{tmp_path / 'worse'} was not written: go on with {base.folder}" in printed
    assert not (tmp_path / "worse").exists()
    assert read_tree(base.folder) == old


def test_a_model_that_learned_nothing_is_not_written(
    base: Base, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(output, {f"{label}{n}.jpg": label for label, _ in SEEN for n in range(40)}, "confirmed")
    assert learn(output, base, tmp_path / "same") == 3
    assert "not better: it has no fewer of the held-out verdicts wrong" in capsys.readouterr().out
    assert not (tmp_path / "same").exists()


def test_without_a_guard_set_confidently_sorted_photos_stand_in(
    base: Base, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: (base.folder / name).read_bytes() for name in base.manifest.files if name != guard.FILE}
    manifest_module.write(tmp_path / "older", base.manifest, files, card="")
    older = rehead.read(tmp_path / "older")
    say(output, {f"blue{n}.jpg": "cat" for n in range(80)})
    assert learn(output, older, tmp_path / "model") == 2
    assert "and only" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    more = {f"more{label}{n}.jpg": (tinted(color, 8000 + n), SURE[label]) for label, color in SEEN for n in range(200)}
    sort_as(output, more)
    assert learn(output, older, tmp_path / "model") == 0
    assert "confidently sorted photos, by the old model" in capsys.readouterr().out
    new = manifest_module.read(tmp_path / "model")
    assert (new.temperature, new.error_rates, new.evaluations) == (base.manifest.temperature, (), ())
    assert guard.FILE not in new.files


def test_with_a_dataset_its_photos_are_rehearsed(
    base: Base, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(
        tmp_path / "data",
        {f"{label}s/{n}.jpg": tinted(color, 9000 + n) for label, color in SEEN for n in range(60)},
    )
    say(output, {f"blue{n}.jpg": "cat" for n in range(80)})
    assert learn(output, base, tmp_path / "model", "--data", str(tmp_path / "data")) == 0
    # A tenth each is kept for the parts that this dataset lacks; test and calibration part are not learned from.
    assert "96 photos of data against forgetting" in (tmp_path / "model/README.md").read_text()


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
