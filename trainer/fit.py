"""Fitting a head on features: a training script that reads from top to bottom.

In: features and labels of the training and validation parts. Out: the head with the least log-loss on the validation
part, and what each epoch measured.

The features are computed once (`features.py`), so an epoch takes a second: every photo is seen as it is or mirrored, by
chance. AdamW with warm-up and cosine, label smoothing, an exponential moving average of the weights, and an early stop.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.features import Floats


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a head is fitted.

    Attributes:
        lr: the highest learning rate, after the warm-up.
        dropout: share of the features that are hidden from the head, drawn anew each time.
        patience: epochs without a better validation log-loss before it ends.
    """

    epochs: int = 30
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    dropout: float = 0.2
    warmup_share: float = 0.1
    patience: int = 8


@dataclass(frozen=True, slots=True)
class Part:
    """Features of one part, as they are and mirrored, float32 (2, N, W), and labels, int64 (N,)."""

    features: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, plain: Floats, mirrored: Floats, labels: "np.typing.NDArray[np.intp]") -> "Part":
        """Wrap arrays."""
        return cls(torch.from_numpy(np.stack([plain, mirrored])), torch.from_numpy(labels.astype(np.int64)))


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch measured; losses in natural units, accuracies from 0 to 1."""

    epoch: int
    lr: float
    training_loss: float
    training_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


def fit_head(
    head: nn.Module, training: Part, validation: Part, recipe: Recipe, seed: int, on_epoch: Callable[[Epoch], None]
) -> nn.Module:
    """Fit a head.

    Args:
        head: from features (N, W) to logits (N, C), new.
        training: what it is fitted on.
        validation: what decides when to stop.
        recipe: how.
        seed: two runs with the same one on a CPU give the same losses to the last digit.
        on_epoch: called with each epoch's figures.

    Returns:
        The averaged head of the epoch with the least validation log-loss.
    """
    torch.manual_seed(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    photos = len(training.labels)
    steps_an_epoch = math.ceil(photos / recipe.batch_size)
    # The average reaches back an epoch, however few steps that is.
    averaged = AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(math.exp(-1 / steps_an_epoch)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _share_of_lr(step, recipe.epochs * steps_an_epoch, recipe.warmup_share)
    )
    best, best_loss, best_epoch = copy.deepcopy(head), math.inf, 0

    for epoch in range(1, recipe.epochs + 1):
        started, loss_sum, right = time.perf_counter(), 0.0, 0
        head.train()
        for rows in torch.randperm(photos, generator=draw).split(recipe.batch_size):
            view = torch.randint(0, 2, (len(rows),), generator=draw)  # as it is, or mirrored
            features = functional.dropout(training.features[view, rows], recipe.dropout)  # (B, W)
            logits = head(features)  # (B, C)
            loss = functional.cross_entropy(logits, training.labels[rows], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(head)
            loss_sum += loss.item() * len(rows)
            right += int((logits.argmax(1) == training.labels[rows]).sum())
        validation_loss, validation_accuracy = _measure(averaged.module, validation)
        on_epoch(
            Epoch(
                epoch=epoch,
                lr=float(schedule.get_last_lr()[0]),
                training_loss=loss_sum / photos,
                training_accuracy=right / photos,
                validation_loss=validation_loss,
                validation_accuracy=validation_accuracy,
                seconds=time.perf_counter() - started,
            )
        )
        if validation_loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(averaged.module), validation_loss, epoch
        elif epoch - best_epoch >= recipe.patience:
            break
    return best.eval()


def _share_of_lr(step: int, steps: int, warmup_share: float) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


@torch.inference_mode()
def _measure(head: nn.Module, part: Part) -> tuple[float, float]:
    """Log-loss and accuracy on photos as they are."""
    head.eval()
    logits = head(part.features[0])  # (N, C)
    loss = functional.cross_entropy(logits, part.labels).item()
    return loss, float((logits.argmax(1) == part.labels).float().mean())
