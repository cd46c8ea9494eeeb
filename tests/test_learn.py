"""`trainer fit --corrections` on real photos: a model that was weakened on purpose, and what a person says of its work.

A model is fitted on photos of which the dark cats are filed as dogs. It sorts 3,000 photos, a person corrects 300 of
its mistakes, and it learns from that. It is judged on 500 photos that nobody corrected.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from sorter.classifier import manifest as manifest_module
from sorter.cli.main import main as sorter
from sorter.history.reader import Entry, HistoryReader
from sorter.review.corrections import Corrections, Outcome, Verdict, Version
from sorter.settings import SHIPPED_MODEL
from trainer.cli import main as trainer

pytestmark = [
    pytest.mark.long,
    pytest.mark.shared,
    pytest.mark.timeout(900),
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
    root = tmp_path_factory.mktemp("weak")
    photos = {name: sorted((SHARED / "kaggle-180/training_set/training_set" / name).iterdir()) for name in CLASSES}
    dark = sorted(map(brightness, photos["cats"][:600]))[210]
    for name in CLASSES:
        for path in photos[name][:600]:
            taken_for = "dogs" if name == "cats" and brightness(path) < dark else name
            link(path, root / "data" / taken_for / path.name)
        for path in photos[name][600:750]:
            link(path, root / "calibration" / name / path.name)
        for path in photos[name][750:2250]:
            link(path, root / "sorted" / path.name)
    # The shipped backbone has seen the photos of the training set, without the labels that are false here.
    backbone = str(SHIPPED_MODEL / "weights.safetensors")
    model = root / "weak-model"
    fit = ["fit", "--data", root / "data", "--calibration", root / "calibration", "--output", model]
    assert trainer([*map(str, fit), "--weights", backbone, "--image-size", "144", "--num-workers", "2"]) == 0
    output = root / "sorted"
    assert sorter(["run", "--once", "--model", str(model), "--inbox", str(output), "--settle-seconds", "0"]) == 0
    truth = {path.name: name.removesuffix("s") for name in CLASSES for path in photos[name][750:2250]}
    return Weak(model, output, truth)


def link(path: Path, place: Path) -> None:
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


def test_300_corrections_take_away_a_third_of_the_mistakes_on_photos_that_nobody_corrected(
    weak: Weak, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], proved: Callable[[str], None]
) -> None:
    mistakes = [e for e in weak.entries(output) if weak.truth[e.name] != e.label]
    assert len(mistakes) >= 300
    outcomes = decide(output, {e.id: weak.truth[e.name] for e in mistakes[:: len(mistakes) // 300][:300]})
    assert [outcome.error for outcome in outcomes] == [""] * 300
    better = tmp_path / "better"
    fit = ["fit", "--corrections", output, "--base", weak.model, "--output", better]
    code = trainer([*map(str, fit)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert f"use it: sorter run --model {better} --inbox DIR" in printed
    before, after = (wrong(model, SHARED / "photos", capsys) for model in (weak.model, better))
    assert after <= before * 2 / 3
    proved(f"a weakened model, 300 corrections: {before} of 500 other photos wrong before, {after} after\n{printed}")
    with capsys.disabled():
        print(printed, before, after)
