"""What `trainer fit` was asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sorter.classifier.manifest import Input
from trainer.fitting.recipes import Recipe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MLP_HEAD = (270, 90)
_CENTER_MARGIN = 256 / 224
"""The short side before a center crop, as a multiple of the crop's side."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `trainer fit` was asked for.

    Attributes:
        weights: `imagenet`, `none`, or a file.
        head_hidden: widths of the head's hidden layers.
        crop: how the network sees a photo; None as the recipe says.
        calibration: a folder or CSV of photos; None draws them from the training part.
        workers: processes that inspect and vary photos.
        budget_minutes: the schedule is shortened to end in that time; None for the whole.
        cache: keeps what takes long and does not depend on the options.
    """

    data: Path
    output: Path
    architecture: str
    weights: str
    head_hidden: tuple[int, ...]
    image_size: int
    crop: Literal["squash", "center"] | None
    calibration: Path | None
    recipe: Recipe
    seed: int
    device: str
    compile: bool
    workers: int
    budget_minutes: float | None
    resume: bool
    cache: Path
    command: str

    @property
    def input(self) -> Input:
        """How the network sees a photo."""
        crop = self.crop or self.recipe.crop
        short_side = round(self.image_size * _CENTER_MARGIN) if crop == "center" else 0
        return Input(size=self.image_size, crop=crop, resize=short_side, mean=IMAGENET_MEAN, std=IMAGENET_STD)
