"""Several processes that fit one network together.

`torchrun` starts them and describes them in the environment; without it there is one process, and all of this does
nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(hours=12)
"""The others wait while the first process inspects files and fits the head."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Group:
    """This process among the others."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports and writes files."""
        return self.rank == 0

    def first_then_others(self, action: Callable[[], Result]) -> Result:
        """Run an action in the first process and then, with what that has cached, in the others."""
        if not self.is_first:
            self._wait()
        result = action()
        if self.is_first:
            self._wait()
        return result

    def _wait(self) -> None:
        if self.size > 1:
            distributed.barrier()

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in each of them."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def agree(self, value: float, device: torch.device) -> float:
        """The first process's value, in each of them."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float32, device=device)
        distributed.broadcast(shared, 0)
        return float(shared.item())

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """A network whose gradients are the mean over all processes, with the first one's weights."""
        if self.size == 1:
            return network
        return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)


@contextmanager
def joined(device: str) -> Iterator[tuple[Group, str]]:
    """Join the processes that `torchrun` started, if any; yield the group and this process's device.

    Args:
        device: as given to `--device`; with several GPUs each process takes its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(), device
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    try:
        yield Group(distributed.get_rank(), size), device
    finally:
        distributed.destroy_process_group()
