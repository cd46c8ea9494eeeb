"""Learning rates: which each layer gets, and how they change over a stage.

In: a network, a stage, and the share of the stage that is done. Out: an optimizer with its current rates.
"""

import math

import torch
from torch import nn

from trainer.fitting.recipes import Stage

_DEPTHS = 8
"""Learning rates are rounded to this many depths, so that the optimizer has few parameter groups."""


def optimizer_of(network: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """Make a stage's optimizer for the parameters that require gradients.

    Each parameter group's `share` is its part of the stage's learning rate: `stage.lowest_rate` in the first layer,
    growing to 1 in the head. Biases and norms have no weight decay.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for place, parameter in enumerate(trained):
        depth = round((_DEPTHS - 1) * place / max(1, len(trained) - 1))
        groups.setdefault((depth, parameter.ndim > 1), []).append(parameter)
    options = [
        {
            "params": parameters,
            "share": stage.lowest_rate ** (1 - depth / (_DEPTHS - 1)),
            "weight_decay": stage.weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in groups.items()
    ]
    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    return kind(options, lr=stage.lr, fused=trained[0].device.type != "mps")


def set_rates(optimizer: torch.optim.Optimizer, stage: Stage, done: float) -> None:
    """Set every group's learning rate for the share of the stage that is done, 0 to 1."""
    rate = stage.lr * (annealed(done, stage.warmup_share) if stage.anneal else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def annealed(done: float, warmup_share: float) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Args:
        done: share of the stage that is done, 0 to 1.
        warmup_share: share of the stage that the warm-up takes.

    Returns:
        The share of the highest learning rate, 0 to 1.
    """
    if done < warmup_share:
        return max(0.01, done / warmup_share)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup_share) / (1 - warmup_share)))
