"""One stage of a fit, on networks that take milliseconds."""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tree, plain
from torch import nn

from sorter.decoding.images import Preprocessing
from sorter.errors import ConfigurationError
from trainer.data.layouts import Sample
from trainer.fitting import checkpoint, loop, schedule
from trainer.fitting.loop import Hooks, Machine, Plan
from trainer.fitting.parallel import Group
from trainer.fitting.recipes import RECIPES, Stage
from trainer.fitting.sources import Batch, FeatureSource, PhotoSource
from trainer.progress import Epoch, StepProgress


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks as small as these are slower on several threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


HEAD = replace(RECIPES["head"].stages[0], epochs=5, batch_size=32)


def features(seed: int = 1, photos: int = 200) -> FeatureSource:
    """Two clouds of points."""
    draw = np.random.default_rng(9)
    labels = np.arange(photos) % 2
    points = draw.normal(size=(2, photos, 16)).astype(np.float32) + labels[None, :, None].astype(np.float32)
    return FeatureSource(points, labels, points[0], labels, 32, seed)


def head(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def run(
    network: nn.Module,
    source: Any,
    stage: Stage = HEAD,
    *,
    frozen_statistics: bool = False,
    budget_seconds: float = math.inf,
    keep: Callable[[dict[str, Any]], None] = lambda saved: None,
    saved: dict[str, Any] | None = None,
) -> list[Epoch]:
    epochs: list[Epoch] = []
    plan = Plan(stage, 0, 3, frozen_statistics, budget_seconds)
    machine, hooks = Machine(torch.device("cpu")), Hooks(epochs.append, on_checkpoint=keep)
    loop.fit_stage(network, source, plan, machine, hooks, saved)
    return epochs


def losses(epochs: list[Epoch]) -> list[tuple[float, float]]:
    return [(epoch.training_loss, epoch.validation_loss) for epoch in epochs]


def test_the_same_seed_gives_the_same_losses_to_the_last_digit() -> None:
    assert losses(run(head(), features(1))) == losses(run(head(), features(1)))
    assert losses(run(head(), features(1))) != losses(run(head(), features(2)))


def test_a_stage_lowers_the_validation_loss() -> None:
    epochs = run(head(), features(), replace(HEAD, epochs=20, lr=0.01))
    assert epochs[-1].validation_accuracy > 0.9
    assert epochs[-1].validation_loss < epochs[0].validation_loss


class StoppedError(Exception):
    """In place of a kill."""


class StopsAt(FeatureSource):
    """Raises in the middle of an epoch."""

    stop_at = (3, 4)

    def training(self, epoch: int, first_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(super().training(epoch, first_step), first_step):
            if (epoch, step) == self.stop_at:
                raise StoppedError
            yield batch


def test_a_stage_resumed_within_an_epoch_ends_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    uninterrupted = head()
    expected = run(uninterrupted, features())
    stopping = features()
    stopping.__class__ = StopsAt
    path = tmp_path / checkpoint.NAME
    with pytest.raises(StoppedError):
        run(head(), stopping, keep=lambda saved: checkpoint.write(path, "options", saved))
    saved = checkpoint.read(path, "options")
    assert (saved["position"]["epoch"], saved["position"]["step"]) == (3, 4)
    resumed = head(seed=77)  # everything comes from the checkpoint
    assert losses(run(resumed, features(), saved=saved)) == losses(expected)[2:]
    weights, expected_weights = resumed.state_dict(), uninterrupted.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


def test_a_stage_that_never_improves_changes_nothing() -> None:
    network = head()
    run(network, features(), replace(HEAD, epochs=20, lr=0.01))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(network, features(), replace(HEAD, lr=1e3, average=False, patience=2))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_stage_without_improvement_ends_after_its_patience() -> None:
    assert len(run(head(), features(), replace(HEAD, epochs=50, lr=1e-12, average=False, patience=3))) < 10


def test_a_time_budget_shortens_the_schedule_and_the_rate_still_falls_to_zero() -> None:
    slow = features()
    plain_training = slow.training

    def training(epoch: int, first_step: int) -> Iterator[Batch]:
        for batch in plain_training(epoch, first_step):
            torch.randn(300, 300) @ torch.randn(300, 300)
            yield batch

    slow.training = training  # type: ignore[method-assign]
    epochs = run(head(), slow, replace(HEAD, epochs=100000, patience=None), budget_seconds=1)
    assert 0 < len(epochs) < 100000
    assert epochs[-1].lr < HEAD.lr / 20


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_running_averages_do_not_move(frozen: bool) -> None:
    network = head()
    before = network[1].running_mean.clone()  # type: ignore[index]
    run(network, features(), frozen_statistics=frozen)
    assert torch.equal(network[1].running_mean, before) == frozen  # type: ignore[index]


def test_frozen_layers_and_their_running_averages_stay_the_same_to_the_last_bit() -> None:
    network = head()
    for parameter in network[:3].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(network, features(), replace(HEAD, lr=0.1))
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("3."))
    assert not torch.equal(after["3.weight"], before["3.weight"])


def test_learning_rates_grow_from_the_first_layer_to_the_head_and_biases_do_not_decay() -> None:
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    optimizer = schedule.optimizer_of(network, replace(HEAD, lowest_rate=0.1, weight_decay=0.05))
    share = {id(p): group["share"] for group in optimizer.param_groups for p in group["params"]}
    shares = [share[id(layer.weight)] for layer in network]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.1)
    assert share[id(network[-1].bias)] == pytest.approx(1.0)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert (decay[id(network[0].weight)], decay[id(network[0].bias)]) == (0.05, 0.0)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    optimizer = schedule.optimizer_of(nn.Linear(4, 4), HEAD)
    shares = []
    for step in range(101):
        schedule.set_rates(optimizer, HEAD, step / 100)
        shares.append(optimizer.param_groups[-1]["lr"] / HEAD.lr)
    top = shares.index(max(shares))
    assert shares[top] == pytest.approx(1.0)
    assert top == 10
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert shares[-1] == pytest.approx(0.0)


def test_the_notebook_recipe_is_the_published_baseline() -> None:
    recipe = RECIPES["notebook"]
    (stage,) = recipe.stages
    assert (stage.trains, stage.optimizer, stage.lr, stage.batch_size, stage.epochs) == ("head", "adam", 3e-3, 100, 10)
    assert (stage.anneal, stage.average, stage.label_smoothing, stage.weight_decay) == (False, False, 0.0, 0.0)
    assert recipe.crop == "center"
    crop, mirror = recipe.augmentation(224).transforms  # type: ignore[misc]
    assert (type(crop).__name__, crop.size, mirror.p) == ("RandomResizedCrop", (224, 224), 0.5)


def photos(tmp_path: Path, count: int = 10) -> list[Sample]:
    make_tree(tmp_path, {f"{n}.jpg": plain((n * 20, 255 - n * 20, 90), n) for n in range(count)})
    return [Sample(tmp_path / f"{n}.jpg", n % 2) for n in range(count)]


def source(samples: list[Sample], group: Group, batch_size: int = 4, workers: int = 0) -> PhotoSource:
    augmentation = RECIPES["finetune"].augmentation
    preprocessing = Preprocessing(16)
    return PhotoSource(samples, samples, preprocessing, augmentation, batch_size, 5, workers, group, pinned=False)


def test_workers_that_could_not_be_reached_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = photos(tmp_path)
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    source(samples, Group())
    with pytest.raises(ConfigurationError, match="set TMPDIR to a shorter one, or use --num-workers 0"):
        source(samples, Group(), workers=1)


def test_photos_are_augmented_afresh_in_each_epoch_and_the_same_after_a_resume(tmp_path: Path) -> None:
    samples = photos(tmp_path)
    alone = source(samples, Group())
    first, second = list(alone.training(1, 0)), list(alone.training(2, 0))
    assert [tuple(inputs.shape) for inputs, _ in first] == [(4, 16, 16, 3), (4, 16, 16, 3), (2, 16, 16, 3)]
    assert not torch.equal(first[0][0], second[0][0])
    torch.manual_seed(12345)
    again = list(source(samples, Group()).training(2, 1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(second[1:], again, strict=True))
    assert torch.initial_seed() == 12345


def test_two_processes_share_each_batch_and_validate_each_photo_once(tmp_path: Path) -> None:
    samples = photos(tmp_path, 9)
    one = [labels for _, labels in source(samples, Group()).training(1, 0)]
    parts = [source(samples, Group(rank, 2)) for rank in (0, 1)]
    halves = [[labels for _, labels in part.training(1, 0)] for part in parts]
    assert [len(labels) for labels in one] == [4, 4]
    assert [[len(labels) for labels in half] for half in halves] == [[2, 2], [2, 2]]
    for batch, left, right in zip(one, *halves, strict=False):
        assert sorted(batch.tolist()) == sorted([*left.tolist(), *right.tolist()])
    validated = [len(labels) for part in parts for _, labels in part.validation()]
    assert sum(validated) == 9


def test_a_damaged_checkpoint_or_one_of_other_options_is_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    checkpoint.write(path, "these", {"stage": 1})
    assert checkpoint.read(path, "these") == {"stage": 1}
    with pytest.raises(ConfigurationError, match="other options"):
        checkpoint.read(path, "those")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigurationError, match="cannot read the checkpoint"):
        checkpoint.read(path, "these")
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.NAME], "nothing is left beside it"


def test_each_step_reports_how_far_the_epoch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_REPORTS", 0.0)
    steps: list[StepProgress] = []
    plan = Plan(replace(HEAD, epochs=2, patience=None), 0, 3, frozen_statistics=False)
    loop.fit_stage(head(), features(), plan, Machine(torch.device("cpu")), Hooks(on_step=steps.append))
    assert [(s.epoch, s.step, s.steps) for s in steps] == [(e, n, 7) for e in (1, 2) for n in range(1, 8)]
    assert all(s.images_per_second > 0 and s.seconds_left >= 0 and 0 <= s.accuracy <= 1 for s in steps)
