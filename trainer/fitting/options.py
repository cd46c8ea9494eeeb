"""The options of `trainer fit`."""

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
class Source:
    """Where the photos come from, and how they are divided.

    Attributes:
        data: a folder or a zip.
        calibration: a folder or CSV of photos; None draws them from the training part.
        others: a folder of photos that show none of the classes; None for none.
        seed: of the draw.
    """

    data: Path
    calibration: Path | None
    others: Path | None
    seed: int


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `trainer fit`.

    Attributes:
        weights: `imagenet`, `none`, or a file.
        head_hidden: widths of the head's hidden layers.
        image_size: side of the network's input, pixels.
        crop: None for the recipe's.
        max_lost: the share of the calibration photos that the outlier detector may catch by mistake.
        workers: processes that inspect and augment photos.
        budget_minutes: the schedule is shortened to end within this time; None for the full schedule.
        cache: folder for results that depend on the photos alone.
        command: the command line, for the manifest.
    """

    source: Source
    output: Path
    architecture: str
    weights: str
    head_hidden: tuple[int, ...]
    image_size: int
    crop: Literal["squash", "center"] | None
    recipe: Recipe
    max_lost: float
    device: str
    compile: bool
    workers: int
    budget_minutes: float | None
    resume: bool
    cache: Path
    command: str

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return self.source.seed

    @property
    def input(self) -> Input:
        """How a photo becomes the network's input."""
        crop = self.crop or self.recipe.crop
        short_side = round(self.image_size * _CENTER_MARGIN) if crop == "center" else 0
        return Input(size=self.image_size, crop=crop, resize=short_side, mean=IMAGENET_MEAN, std=IMAGENET_STD)
