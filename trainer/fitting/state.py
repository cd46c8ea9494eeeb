"""Everything that changes while a stage is fitted, and so everything that its checkpoints hold."""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.fitting.recipes import Stage
from trainer.fitting.schedule import optimizer_of


@dataclass(slots=True)
class Position:
    """How far a stage is.

    Attributes:
        epoch: the current one, counted from 1.
        step: of the epoch; how many are done.
        seconds: spent so far, in this process and in those that were killed before it.
        best_loss: the lowest validation log-loss so far, and `best_epoch` the epoch that reached it.
    """

    epoch: int = 1
    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_epoch: int = 0
    is_over: bool = False


class StageState:
    """A network being fitted, with its optimizer, its moving average and its best weights so far.

    Args:
        network: on the device where it is fitted.
        stage: the recipe's.
        steps: of one epoch.
        scaled: scale the loss, which fp16 needs.

    Attributes:
        validated: what is measured on the validation part: the average or the network, as the stage says.
        totals: sums of loss and of right answers in this epoch, over all processes; float32 (2,).
    """

    def __init__(self, network: nn.Module, stage: Stage, steps: int, device: torch.device, *, scaled: bool) -> None:
        self.network = network
        self.optimizer = optimizer_of(network, stage)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        # The average reaches back one epoch, however many steps that is.
        decay = math.exp(-1 / steps)
        self.averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.validated = self.averaged.module if stage.average else network
        self.best = copy.deepcopy(self.validated.state_dict())
        self.position = Position()
        self.totals = torch.zeros(2, device=device)

    def keep_best(self, loss: float) -> None:
        """Remember the weights of this epoch, whose validation log-loss is given."""
        self.best = copy.deepcopy(self.validated.state_dict())
        self.position.best_loss, self.position.best_epoch = loss, self.position.epoch

    def next_epoch(self) -> None:
        """Go to the first step of the next epoch."""
        self.position.epoch, self.position.step = self.position.epoch + 1, 0
        self.totals.zero_()

    def save(self) -> dict[str, Any]:
        """Tensors and plain values, which `load` takes."""
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "totals": self.totals,
            "position": asdict(self.position),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Continue from what `save` returned."""
        self.network.load_state_dict(saved["network"])
        self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.best = saved["best"]
        self.position = Position(**saved["position"])
        self.totals = saved["totals"].to(self.totals.device)
