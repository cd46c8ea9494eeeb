"""The inputs of a stage: features in memory, or photos that are decoded and augmented afresh in each epoch.

In: samples. Out: batches, the same for the same seed, epoch and step, however many processes make them, so that a
killed run resumes with the batch it was at.
"""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from sorter.decoding.images import Preprocessing
from sorter.errors import ConfigurationError
from trainer.data.layouts import Sample
from trainer.data.pixels import decoded
from trainer.fitting.features import Floats, batches
from trainer.fitting.parallel import Group
from trainer.fitting.recipes import Augmentation

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs (B, …) and labels, int64 (B,)."""

# Where multiprocessing makes its sockets. If their path is longer than one may be (107 bytes), a loader waits for ever.
_LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")


class Source(Protocol):
    """Batches for a stage; of each global batch, this process's part.

    Attributes:
        photos: of the training part, in all processes together.
        steps: of one epoch.
    """

    photos: int
    steps: int

    def training(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """The batches of an epoch from a step on."""

    def validation(self) -> Iterator[Batch]:
        """This process's photos of the validation part, each once."""


def mixed(*numbers: int) -> int:
    """One seed made of several numbers; similar numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def _order(photos: int, batch_size: int, seed: int, epoch: int) -> tuple[torch.Tensor, ...]:
    """The rows of each step of an epoch."""
    draw = torch.Generator().manual_seed(mixed(seed, epoch))
    rows: tuple[torch.Tensor, ...] = torch.randperm(photos, generator=draw).split(batch_size)
    return rows


class FeatureSource:
    """Features in memory; each step draws at random whether a photo is mirrored.

    Args:
        training: float32 (2, N, W), of the photos and of their mirror images.
        training_labels: (N,).
        validation: float32 (M, W).
        validation_labels: (M,).
    """

    def __init__(
        self,
        training: Floats,
        training_labels: "np.typing.NDArray[np.intp]",
        validation: Floats,
        validation_labels: "np.typing.NDArray[np.intp]",
        batch_size: int,
        seed: int,
    ) -> None:
        self._features, self._labels = torch.from_numpy(training), torch.from_numpy(training_labels).long()
        self._held_out = torch.from_numpy(validation), torch.from_numpy(validation_labels).long()
        self._batch_size, self._seed = batch_size, seed
        self.photos, self.steps = len(training_labels), math.ceil(len(training_labels) / batch_size)

    def training(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """`Source.training`, in this process alone."""
        draw = torch.Generator().manual_seed(mixed(self._seed, epoch, 1))
        views = torch.randint(0, 2, (self.photos,), generator=draw)
        for rows in _order(self.photos, self._batch_size, self._seed, epoch)[first_step:]:
            yield self._features[views[rows], rows], self._labels[rows]

    def validation(self) -> Iterator[Batch]:
        """`Source.validation`, as one batch."""
        yield self._held_out


class PhotoSource:
    """Photos through the sorter's decoder, then augmented; validation photos as the sorter sees them.

    Args:
        training, validation: the samples.
        preprocessing: the sorter's.
        augmentation: of training photos.
        workers: processes that decode and augment; 0 does it in this one.
        pinned: copy batches to pinned memory, for CUDA.

    Raises:
        ConfigurationError: the worker processes could not be reached.
    """

    def __init__(
        self,
        training: Sequence[Sample],
        validation: Sequence[Sample],
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        workers: int,
        group: Group,
        *,
        pinned: bool,
    ) -> None:
        folder = tempfile.gettempdir()
        if workers and len(os.fsencode(folder)) > _LONGEST_FOLDER:
            raise ConfigurationError(
                f"{folder} is too long a path for the sockets of worker processes: set TMPDIR to a shorter one, or use "
                "--num-workers 0"
            )
        self._held_out = validation[group.rank :: group.size]
        self._preprocessing = preprocessing
        self._plan = _Plan(len(training), batch_size, seed, group)
        self._loader = DataLoader(
            _Augmented(training, preprocessing.size, augmentation, seed),
            batch_sampler=self._plan,
            num_workers=workers,
            pin_memory=pinned,
            persistent_workers=workers > 0,
            # A fork of a process that has OpenVINO's threads may hang.
            multiprocessing_context="spawn" if workers else None,
        )
        self.photos, self.steps = len(training), len(self._plan)

    def training(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """`Source.training`, decoded in the worker processes."""
        self._plan.epoch, self._plan.first_step = epoch, first_step
        yield from self._loader

    def validation(self) -> Iterator[Batch]:
        """`Source.validation`, decoded in threads."""
        start = 0
        for pixels in batches(self._held_out, self._preprocessing):
            labels = [sample.label for sample in self._held_out[start : start + len(pixels)]]
            start += len(pixels)
            yield torch.from_numpy(pixels), torch.tensor(labels)


class _Plan(Sampler[list[tuple[int, int]]]):
    """The photos of each step as (epoch, index): of each global batch every `group.size`-th."""

    def __init__(self, photos: int, batch_size: int, seed: int, group: Group) -> None:
        self._photos, self._batch_size, self._seed, self._group = photos, batch_size, seed, group
        self.epoch, self.first_step = 1, 0

    def __len__(self) -> int:
        # Batch norm needs two photos in each process; a smaller last batch is skipped in this epoch.
        full, rest = divmod(self._photos, self._batch_size)
        return full + (rest >= 2 * self._group.size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in _order(self._photos, self._batch_size, self._seed, self.epoch)[self.first_step : len(self)]:
            yield [(self.epoch, row) for row in rows.tolist()[self._group.rank :: self._group.size]]


class _Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Photos decoded and augmented, uint8 (S, S, 3); the same for the same epoch and index."""

    def __init__(self, samples: Sequence[Sample], size: int, augmentation: Augmentation, seed: int) -> None:
        self._samples, self._size, self._augmentation, self._seed = samples, size, augmentation, seed
        self._augment: nn.Module | None = None

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        if self._augment is None:  # made in the worker process
            self._augment = self._augmentation(self._size)
        epoch, index = key
        # Twice the side leaves a crop something to cut from.
        picture = decoded(self._samples[index].path, Preprocessing(self._size, "none", 2 * self._size))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed(self._seed, epoch, index))
            augmented: torch.Tensor = self._augment(torch.from_numpy(picture.copy()).permute(2, 0, 1))  # (3, S, S)
        return augmented.permute(1, 2, 0), self._samples[index].label
