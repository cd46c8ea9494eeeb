"""One stage of fitting, on networks that take milliseconds."""

from collections.abc import Iterator
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
from trainer.fitting import checkpoint, loop, recipes
from trainer.fitting.loop import Epoch, Hooks, Machine
from trainer.fitting.parallel import Group
from trainer.fitting.recipes import RECIPES, Stage
from trainer.fitting.sources import Batch, FeatureSource, PhotoSource

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
    network: nn.Module, source: Any, stage: Stage = HEAD, *, frozen_statistics: bool = False, **options: Any
) -> list[Epoch]:
    epochs: list[Epoch] = []
    hooks = Hooks(epochs.append, on_checkpoint=options.pop("keep", lambda state: None))
    machine = Machine(torch.device("cpu"))
    loop.fit_stage(network, source, stage, 0, 3, machine, hooks, frozen_statistics=frozen_statistics, **options)
    return epochs


def losses(epochs: list[Epoch]) -> list[tuple[float, float]]:
    return [(epoch.training_loss, epoch.validation_loss) for epoch in epochs]


def test_the_same_seed_gives_the_same_losses_to_the_last_digit() -> None:
    assert losses(run(head(), features(1))) == losses(run(head(), features(1)))
    assert losses(run(head(), features(1))) != losses(run(head(), features(2)))


def test_it_learns() -> None:
    epochs = run(head(), features(), replace(HEAD, epochs=20, lr=0.01))
    assert epochs[-1].validation_accuracy > 0.9
    assert epochs[-1].validation_loss < epochs[0].validation_loss


class StoppedError(Exception):
    """Stands for a kill."""


class StopsAt(FeatureSource):
    """Stops in the middle of an epoch."""

    stop_at = (3, 4)

    def training(self, epoch: int, first_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(super().training(epoch, first_step), first_step):
            if (epoch, step) == self.stop_at:
                raise StoppedError
            yield batch


def test_a_run_that_goes_on_from_a_checkpoint_within_an_epoch_ends_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole = head()
    expected = run(whole, features())
    stopping = features()
    stopping.__class__ = StopsAt
    path = tmp_path / checkpoint.NAME
    with pytest.raises(StoppedError):
        run(head(), stopping, keep=lambda state: checkpoint.write(path, "options", state))
    state = checkpoint.read(path, "options")
    assert (state["position"]["epoch"], state["position"]["step"]) == (3, 4)
    other = head(seed=77)  # everything comes from the checkpoint
    assert losses(run(other, features(), state=state)) == losses(expected)[2:]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_stage_that_only_makes_it_worse_changes_nothing() -> None:
    network = head()
    run(network, features(), replace(HEAD, epochs=20, lr=0.01))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(network, features(), replace(HEAD, lr=1e3, average=False, patience=2))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_patience_ends_a_stage_early() -> None:
    assert len(run(head(), features(), replace(HEAD, epochs=50, lr=1e-12, average=False, patience=3))) < 10


def test_a_budget_shortens_the_schedule_and_the_rate_still_falls_to_zero() -> None:
    slow = features()
    plain_training = slow.training

    def training(epoch: int, first_step: int) -> Iterator[Batch]:
        for batch in plain_training(epoch, first_step):
            torch.randn(300, 300) @ torch.randn(300, 300)
            yield batch

    slow.training = training  # type: ignore[method-assign]
    epochs = run(head(), slow, replace(HEAD, epochs=100000, patience=None), budget_seconds=3)
    assert 0 < len(epochs) < 100000
    assert epochs[-1].lr < HEAD.lr / 20


@pytest.mark.parametrize("frozen", [True, False])
def test_running_averages_stay_where_they_are_frozen(frozen: bool) -> None:
    network = head()
    before = network[1].running_mean.clone()  # type: ignore[index]
    run(network, features(), frozen_statistics=frozen)
    assert torch.equal(network[1].running_mean, before) == frozen  # type: ignore[index]


def test_what_requires_no_gradient_stays_to_the_last_bit_and_so_do_its_averages() -> None:
    network = head()
    for parameter in network[:3].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(network, features(), replace(HEAD, lr=0.1))
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("3."))
    assert not torch.equal(after["3.weight"], before["3.weight"])


def test_rates_grow_from_the_first_layer_to_the_head_and_biases_do_not_decay() -> None:
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    optimizer = loop._optimizer(network, replace(HEAD, lowest_rate=0.1, weight_decay=0.05))
    share = {id(p): group["share"] for group in optimizer.param_groups for p in group["params"]}
    shares = [share[id(layer.weight)] for layer in network]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.1)
    assert share[id(network[-1].bias)] == pytest.approx(1.0)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert (decay[id(network[0].weight)], decay[id(network[0].bias)]) == (0.05, 0.0)


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    shares = [loop._share_of_lr(step / 100, HEAD) for step in range(101)]
    top = shares.index(max(shares))
    assert shares[top] == pytest.approx(1.0)
    assert top == 10
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert shares[-1] == pytest.approx(0.0)


def test_the_notebook_is_the_published_baseline() -> None:
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
    augmentation = recipes.RECIPES["default"].augmentation
    preprocessing = Preprocessing(16)
    return PhotoSource(samples, samples, preprocessing, augmentation, batch_size, 5, workers, group, pinned=False)


def test_photos_are_varied_anew_in_each_epoch_and_the_same_when_gone_back_to(tmp_path: Path) -> None:
    samples = photos(tmp_path)
    whole = source(samples, Group())
    first, second = list(whole.training(1, 0)), list(whole.training(2, 0))
    assert [tuple(inputs.shape) for inputs, _ in first] == [(4, 16, 16, 3), (4, 16, 16, 3), (2, 16, 16, 3)]
    assert not torch.equal(first[0][0], second[0][0])
    torch.manual_seed(12345)
    again = list(source(samples, Group()).training(2, 1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(second[1:], again, strict=True))
    assert torch.initial_seed() == 12345


def test_two_processes_share_each_batch_and_each_photo_is_judged_once(tmp_path: Path) -> None:
    samples = photos(tmp_path, 9)
    one = [labels for _, labels in source(samples, Group()).training(1, 0)]
    parts = [source(samples, Group(rank, 2)) for rank in (0, 1)]
    halves = [[labels for _, labels in part.training(1, 0)] for part in parts]
    assert [len(labels) for labels in one] == [4, 4]
    assert [[len(labels) for labels in half] for half in halves] == [[2, 2], [2, 2]]
    for whole, left, right in zip(one, *halves, strict=False):
        assert sorted(whole.tolist()) == sorted([*left.tolist(), *right.tolist()])
    judged = [len(labels) for part in parts for _, labels in part.validation()]
    assert sum(judged) == 9


def test_a_checkpoint_of_other_options_or_no_checkpoint_at_all_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    checkpoint.write(path, "these", {"stage": 1})
    assert checkpoint.read(path, "these") == {"stage": 1}
    with pytest.raises(ConfigurationError, match="other options"):
        checkpoint.read(path, "those")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        checkpoint.read(path, "these")
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.NAME], "nothing is left beside it"
