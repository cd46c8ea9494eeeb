"""Recipes: in which stages a network is fitted, and how photos are varied on the way.

`head` fits a new head on features that are computed once. `default` goes on from there with the whole network.
`notebook` is the published baseline for these photos, to compare with.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sorter.classifier.network import torchvision_models


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of fitting.

    Attributes:
        inputs: `features` of the frozen backbone, computed once, or `photos`, varied anew in each epoch.
        trains: the head alone, or everything.
        epochs: at most.
        lr: the highest learning rate.
        lowest_rate: the share of it that the network's first layer gets; it grows towards the head.
        anneal: warm up and fall to zero as half a cosine; otherwise the rate is constant.
        dropout: share of the features that are hidden from the head, drawn anew each time; for `features`.
        average: judge, and in the end take, an exponential moving average of the weights.
        patience: epochs without a better validation log-loss before the stage ends, which then gives its best epoch;
            None runs all of them and gives the last.
    """

    inputs: Literal["features", "photos"]
    trains: Literal["head", "everything"]
    epochs: int
    batch_size: int
    lr: float
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = 0.05
    lowest_rate: float = 1.0
    label_smoothing: float = 0.05
    dropout: float = 0.0
    anneal: bool = True
    warmup_share: float = 0.1
    average: bool = True
    patience: int | None = None


Augmentation = Callable[[int], nn.Module]
"""From the side S to what turns a picture, uint8 (3, H, W), into a varied one, (3, S, S)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Its name, stages, the crop that the network is judged and used with, and how photos are varied for training."""

    name: str
    stages: tuple[Stage, ...]
    crop: Literal["squash", "center"]
    augmentation: Augmentation


_GREY = (124, 116, 104)
"""ImageNet's mean colour, around pictures that were turned or shifted."""


def _transforms() -> Any:
    torchvision_models()  # declares what a torchvision of another build lacks
    return importlib.import_module("torchvision.transforms.v2")


def _vary(size: int) -> nn.Module:
    """Scale and crop, mirror, and one of rotation, shear, shift or colour (TrivialAugment, arXiv:2103.10158)."""
    v2 = _transforms()
    varied: nn.Module = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR, fill=_GREY),
        ]
    )
    return varied


def _vary_as_the_notebook(size: int) -> nn.Module:
    v2 = _transforms()
    varied: nn.Module = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return varied


_HEAD = Stage(inputs="features", trains="head", epochs=30, batch_size=256, lr=1e-3, dropout=0.2, patience=8)
_EVERYTHING = Stage(inputs="photos", trains="everything", epochs=6, batch_size=64, lr=2e-4, lowest_rate=0.1, patience=3)
_NOTEBOOK = Stage(
    inputs="photos",
    trains="head",
    epochs=10,
    batch_size=100,
    lr=3e-3,
    optimizer="adam",
    weight_decay=0.0,
    label_smoothing=0.0,
    anneal=False,
    average=False,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("default", (_HEAD, _EVERYTHING), "squash", _vary),
        Recipe("head", (_HEAD,), "squash", _vary),
        Recipe("notebook", (_NOTEBOOK,), "center", _vary_as_the_notebook),
    )
}
