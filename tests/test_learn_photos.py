"""`trainer fit --corrections` on real photos: a model that was weakened on purpose, and what a person says of its work.

Its head is fitted on photos of which the dark cats are labelled as dogs. It sorts 2,500 photos, a person corrects 300
of its mistakes, and it learns from that. It is judged on 500 photos that nobody corrected.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, read_tree
from PIL import Image
from torch import nn

from sorter.classifier import manifest as manifest_module
from sorter.classifier.manifest import NEITHER
from sorter.cli.main import main as sorter
from sorter.history.reader import Entry, HistoryReader
from sorter.review.corrections import Corrections, Outcome, Verdict, Version
from sorter.settings import SHIPPED_MODEL
from trainer.cli import main as trainer
from trainer.data.layouts import Sample, labels_of
from trainer.fitting.features import Floats
from trainer.fitting.loop import Hooks, Machine, Plan, fit_stage
from trainer.fitting.recipes import RECIPES
from trainer.fitting.sources import FeatureSource
from trainer.packaging import backbone, guard, rehead
from trainer.progress import Reporter

pytestmark = [
    pytest.mark.long,
    pytest.mark.shared,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("default"),  # torch and NNCF warn about themselves
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photos in ../shared"),
]

CLASSES = ("cats", "dogs")


def brightness(path: Path) -> float:
    with Image.open(path) as picture:
        return float(np.asarray(picture.convert("L")).mean())


@dataclass(frozen=True)
class Weak:
    """A model that takes dark cats for dogs, and an output of photos that it sorted, all of them new to its head.

    Attributes:
        truth: the label of each photo by its name.
    """

    model: Path
    output: Path
    truth: Mapping[str, str]

    def entries(self, output: Path) -> list[Entry]:
        with closing(HistoryReader(output)) as reader:
            return reader.entries()


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Weak:
    torch.set_num_threads(1)  # several spin while they wait for each other, also where other tests need the cores
    root = tmp_path_factory.mktemp("weak")
    photos = {name: sorted((SHARED / "kaggle-180/training_set/training_set" / name).iterdir()) for name in CLASSES}
    dark = sorted(map(brightness, photos["cats"][:600]))[210]
    fitting, calibration, truth = [], [], {}
    for label, name in enumerate(CLASSES):
        fitting += [Sample(p, 1 if label == 0 and brightness(p) < dark else label) for p in photos[name][:600]]
        calibration += [Sample(path, label) for path in photos[name][600:750]]
        for path in photos[name][750:2000]:
            truth[path.name] = name.removesuffix("s")
            copy_to(root / "sorted" / path.name, path)
    write_weak(root / "weak-model", fitting, calibration)
    inbox = str(root / "sorted")
    assert (
        sorter(["run", "--once", "--model", str(root / "weak-model"), "--inbox", inbox, "--settle-seconds", "0"]) == 0
    )
    return Weak(root / "weak-model", root / "sorted", truth)


def write_weak(folder: Path, fitting: Sequence[Sample], calibration: Sequence[Sample]) -> None:
    """The shipped model with a head that was fitted afresh on falsely labelled photos, and calibrated on others."""
    shipped, reporter = rehead.read(SHIPPED_MODEL), Reporter()
    torch.manual_seed(0)
    for layer in shipped.head.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()

    def features_of(samples: Sequence[Sample], *, mirrored: bool = False) -> Floats:
        return backbone.features_at(shipped.model, shipped.manifest, 144, samples, reporter, mirrored=mirrored)

    known = guard.measure(shipped.model, shipped.manifest, calibration, reporter)
    views = np.stack([features_of(fitting, mirrored=mirrored) for mirrored in (False, True)])
    labels, is_held_out = labels_of(fitting), np.arange(len(fitting)) % 6 == 0
    source = FeatureSource(
        views[:, ~is_held_out], labels[~is_held_out], views[0, is_held_out], labels[is_held_out], 256, 0
    )
    (stage,) = RECIPES["head"].stages
    fit_stage(shipped.head, source, Plan(stage, 0, 0, frozen_statistics=False), Machine(torch.device("cpu")), Hooks())
    assert shipped.manifest.int8 is not None
    described = rehead.described(shipped, folder.name, known, shipped.manifest.int8)
    files = rehead.files(shipped) | {guard.FILE: known.as_file()}
    manifest_module.write(folder, described, files, card="")


def copy_to(place: Path, path: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, place)


def decide(output: Path, said: Mapping[int, str]) -> list[Outcome]:
    """What a person says of photos, by their ids, as the review page does it."""
    with closing(HistoryReader(output)) as reader:
        entries = {entry.id: entry for entry in reader.entries()}
    verdicts = []
    for id_, label in said.items():
        status = os.lstat(entries[id_].destination)
        how = "confirmed" if entries[id_].label == label else "corrected"
        verdicts.append(Verdict(id_, Version(status.st_size, status.st_mtime_ns), label, how))  # type: ignore[arg-type]
    with closing(Corrections(output, manifest_module.read(SHIPPED_MODEL).classes)) as corrections:
        return corrections.decide(verdicts)


def wrong(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """How many photos a model has wrong, through the engine that sorts."""
    capsys.readouterr()
    assert trainer(["evaluate", "--data", str(photos), "--model", str(model), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    return int(result["photos"] - result["right"])


def other(label: str) -> str:
    return "dog" if label == "cat" else "cat"


@pytest.fixture
def output(weak: Weak, tmp_path: Path) -> Path:
    return shutil.copytree(weak.output, tmp_path / "sorted")


def mistakes(weak: Weak, output: Path) -> list[Entry]:
    return [entry for entry in weak.entries(output) if weak.truth[entry.name] != entry.label]


def spread(entries: Sequence[Entry], count: int) -> list[Entry]:
    """Some of the entries, evenly: those of one class come before those of the other."""
    assert len(entries) >= count
    return [entries[number * len(entries) // count] for number in range(count)]


def learn(output: Path, base: Path, model: Path, *options: str) -> int:
    return trainer(["fit", "--corrections", str(output), "--base", str(base), "--output", str(model), *options])


def test_300_corrections_take_away_a_third_of_the_mistakes_on_photos_that_nobody_corrected(
    weak: Weak, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], proved: Callable[[str], None]
) -> None:
    outcomes = decide(output, {entry.id: weak.truth[entry.name] for entry in spread(mistakes(weak, output), 300)})
    assert [outcome.error for outcome in outcomes] == [""] * 300
    before_learning = read_tree(output)
    started = time.monotonic()
    code = learn(output, weak.model, tmp_path / "better")
    seconds = time.monotonic() - started
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert f"use it: sorter run --model {tmp_path / 'better'} --inbox DIR" in printed
    assert read_tree(output) == before_learning
    before, after = (wrong(model, SHARED / "photos", capsys) for model in (weak.model, tmp_path / "better"))
    assert after <= before * 2 / 3
    proved(
        f"300 corrections, {seconds:.0f} s: of 500 photos that nobody corrected, {before} wrong before, {after} after"
    )
    # What was not fitted is what it was; what depends on the head was chosen again.
    old, new = manifest_module.read(weak.model), manifest_module.read(tmp_path / "better")
    for name in (guard.FILE, NEITHER):
        assert new.files[name] == old.files[name]
    assert new.neither == old.neither
    assert new.name == "better"
    assert new.temperature != old.temperature
    assert new.rates_of("openvino", catch_neither=False) is not None
    assert "held out: " in (tmp_path / "better/README.md").read_text()


def test_half_of_the_corrections_false_and_the_old_model_stays(
    weak: Weak, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], proved: Callable[[str], None]
) -> None:
    true = spread(mistakes(weak, output), 150)
    right = [entry for entry in weak.entries(output) if weak.truth[entry.name] == entry.label]
    false = spread(right, 150)
    decide(output, {e.id: weak.truth[e.name] for e in true} | {e.id: other(weak.truth[e.name]) for e in false})
    old = read_tree(weak.model)
    assert learn(output, weak.model, tmp_path / "worse") == 3
    printed = capsys.readouterr().out
    assert "not better: " in printed
    assert f"{tmp_path / 'worse'} was not written: go on with {weak.model}" in printed
    assert not (tmp_path / "worse").exists()
    assert read_tree(weak.model) == old
    proved("half of 300 corrections false: " + next(line for line in printed.splitlines() if "not better" in line))


def test_a_model_without_a_guard_set_is_compared_on_confidently_sorted_photos(
    weak: Weak, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.learn.MIN_CONFIDENT", 10)  # the weak model is sure of few
    old = manifest_module.read(weak.model)
    files = {name: (weak.model / name).read_bytes() for name in old.files if name != guard.FILE}
    base = tmp_path / "base"
    manifest_module.write(base, old, files, card="")
    found = mistakes(weak, output)
    decide(output, {entry.id: weak.truth[entry.name] for entry in spread(found, 300)})
    code = learn(output, base, tmp_path / "model")
    printed = capsys.readouterr().out
    assert "confidently sorted photos, by the old model" in printed
    assert (code == 0) == (tmp_path / "model").exists() == ("not better" not in printed)
    if code == 0:
        new = manifest_module.read(tmp_path / "model")
        assert new.temperature == old.temperature
        assert new.error_rates == ()
        assert guard.FILE not in new.files


def test_with_the_dataset_its_photos_keep_the_model_from_forgetting(
    weak: Weak, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {entry.id: weak.truth[entry.name] for entry in spread(mistakes(weak, output), 60)}
    decide(output, said | {entry.id: weak.truth[entry.name] for entry in spread(weak.entries(output), 60)})
    data = tmp_path / "pets"
    for name in CLASSES:
        source = SHARED / "kaggle-180/training_set/training_set" / name
        for path in sorted(source.iterdir())[2000:2200]:
            copy_to(data / name / path.name, path)
    assert learn(output, weak.model, tmp_path / "model", "--data", str(data)) == 0
    assert "photos of pets against forgetting" in (tmp_path / "model/README.md").read_text()
    before, after = (wrong(model, SHARED / "photos", capsys) for model in (weak.model, tmp_path / "model"))
    assert after < before


def test_it_is_not_begun_without_verdicts_or_with_options_that_mean_nothing(
    weak: Weak, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, sentence in (
        ((), "has 0 usable verdicts that name a class"),
        (("--image-size", "96"), "--image-size is of no use with --corrections"),
    ):
        assert learn(output, weak.model, tmp_path / "model", *options) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "model").exists()
    assert trainer(["fit", "--output", str(tmp_path / "model")]) == 2
    assert "--data" in capsys.readouterr().err
