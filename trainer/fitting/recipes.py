"""Recipes: the stages in which a network is fitted, and how photos are augmented.

`head` fits a new head on features that are computed once. `finetune` continues from there with all layers. `notebook`
is the published baseline for these photos, for comparison.
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
        inputs: `features` of the frozen backbone, computed once, or `photos`, augmented afresh in each epoch.
        trains: the head alone, or everything.
        epochs: the most that are run.
        lr: the highest learning rate.
        lowest_rate: the share of `lr` that the first layer gets; it grows towards the head.
        anneal: warm up, then fall to zero as half a cosine; otherwise the rate is constant.
        dropout: share of the features that is dropped in each step; for `features`.
        average: validate, and at the end keep, an exponential moving average of the weights.
        patience: epochs without a better validation log-loss after which the stage ends and its best epoch is kept;
            None runs all epochs and keeps the last.
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
"""Given the side S, makes a module from a picture, uint8 (3, H, W), to an augmented one, (3, S, S)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Stages, the crop that the network is validated and used with, and how training photos are augmented."""

    name: str
    stages: tuple[Stage, ...]
    crop: Literal["squash", "center"]
    augmentation: Augmentation


_GREY = (124, 116, 104)
"""ImageNet's mean colour, which fills the corners of rotated and shifted pictures."""


def _transforms() -> Any:
    torchvision_models()  # declares the operators that a torchvision of another build lacks
    return importlib.import_module("torchvision.transforms.v2")


def _augment(size: int) -> nn.Module:
    """Random crop and mirroring, then one of rotation, shear, shift or colour (TrivialAugment, arXiv:2103.10158)."""
    v2 = _transforms()
    augmentation: nn.Module = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR, fill=_GREY),
        ]
    )
    return augmentation


def _augment_as_the_notebook(size: int) -> nn.Module:
    v2 = _transforms()
    augmentation: nn.Module = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return augmentation


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
VERDICTS = Stage(inputs="features", trains="head", epochs=20, batch_size=256, lr=1e-3, dropout=0.2)
"""Fits a model's head further, on verdicts and on photos against forgetting. It has no patience: the photos that are
held out are there to judge, and not to choose an epoch by."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("finetune", (_HEAD, _EVERYTHING), "squash", _augment),
        Recipe("head", (_HEAD,), "squash", _augment),
        Recipe("notebook", (_NOTEBOOK,), "center", _augment_as_the_notebook),
    )
}
