"""Fitting a network for one stage: a training script that reads from top to bottom.

In: a network, batches, a stage. Out: the network with the least log-loss on the validation part (or after the last
epoch, as the stage says), and what each epoch measured.

Everything that comes next follows from the seed, the epoch and the step, so a run that was killed goes on from its
checkpoint and ends with the same numbers.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.fitting.parallel import Group
from trainer.fitting.recipes import Stage
from trainer.fitting.sources import Source, mixed

CHECKPOINT_SECONDS = 180.0
_SECONDS_BETWEEN_FIGURES = 0.25
_RATES = 8
"""Into so many groups the layers' learning rates are rounded."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch measured; losses in natural units, accuracies from 0 to 1; `stage` is what it trains."""

    stage: str
    epoch: int
    lr: float
    training_loss: float
    training_accuracy: float
    validation_loss: float
    validation_accuracy: float
    images_per_second: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a stage is, for a person to look at; figures of the current epoch so far."""

    stage: str
    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What fits.

    Attributes:
        device: where the network lives.
        precision: what autocast computes in; None computes in fp32.
        compile: let `torch.compile` make kernels first.
    """

    device: torch.device
    precision: torch.dtype | None = None
    compile: bool = False
    group: Group = field(default_factory=Group)


@dataclass(slots=True)
class Hooks:
    """What a fitting tells the outside."""

    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda state: None


@dataclass(slots=True)
class _Position:
    """Where in a stage a fitting is, as plain numbers."""

    epoch: int = 1
    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_epoch: int = 0
    is_over: bool = False


def fit_stage(
    network: nn.Module,
    source: Source,
    stage: Stage,
    number: int,
    seed: int,
    machine: Machine,
    hooks: Hooks,
    *,
    frozen_statistics: bool,
    budget_seconds: float = math.inf,
    state: dict[str, Any] | None = None,
) -> None:
    """Fit a network for one stage.

    Args:
        network: from a source's inputs to logits (N, C). Parameters that require no gradient stay as they are.
        source: its batches.
        stage: how.
        number: of the stage, for the seeds.
        seed: two runs with the same one on a CPU give the same losses to the last digit.
        machine: where.
        hooks: who is told.
        frozen_statistics: keep the batch-norms' running averages, which a good start has from more photos than ours.
        budget_seconds: the schedule is shortened to end in that time.
        state: what a checkpoint had, to go on from.

    The network is fitted in place and is in evaluation mode on the CPU afterwards.
    """
    group, device = machine.group, machine.device
    network.to(device).to(memory_format=torch.channels_last)
    forward: Callable[[torch.Tensor], torch.Tensor] = group.wrap(network, device)
    if machine.compile:
        forward = torch.compile(forward)
    optimizer = _optimizer(network, stage)
    scaler = torch.amp.GradScaler(device.type, enabled=machine.precision == torch.float16)
    # The average reaches back an epoch, however few steps that is.
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(math.exp(-1 / source.steps)), use_buffers=True)
    judged = averaged.module if stage.average else network
    at, totals = _Position(), torch.zeros(2, device=device)  # sums of loss and of right answers in this epoch
    best = copy.deepcopy(judged.state_dict())
    if state is not None:
        network.load_state_dict(state["network"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        best, at, totals = state["best"], _Position(**state["position"]), state["totals"].to(device)
    elif stage.patience is not None:
        at.best_loss, _ = _measure(judged, source, machine)  # a stage may not make it worse

    def checkpoint() -> None:
        if group.is_first:
            tensors = {"network": network.state_dict(), "averaged": averaged.state_dict(), "best": best}
            others = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "totals": totals}
            hooks.on_checkpoint({**tensors, **others, "position": asdict(at)})

    total_steps = stage.epochs * source.steps
    last_checkpoint = last_said = epoch_started = tick = time.monotonic()
    while not at.is_over:
        _set_mode(network, frozen_statistics=frozen_statistics)
        seen_before = seen = at.step * stage.batch_size
        for inputs, labels in source.training(at.epoch, at.step):
            size = min(stage.batch_size, source.photos - at.step * stage.batch_size)  # of all processes together
            done = ((at.epoch - 1) * source.steps + at.step) / total_steps
            if budget_seconds < math.inf:
                done = group.agree(max(done, at.seconds / budget_seconds), device)
            if done >= 1:
                break
            share = _share_of_lr(done, stage) if stage.anneal else 1.0
            for parameters in optimizer.param_groups:
                parameters["lr"] = stage.lr * share * parameters["share"]
            torch.manual_seed(mixed(seed, number, at.epoch, at.step, group.rank))  # for dropout

            inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with torch.autocast(device.type, machine.precision, enabled=machine.precision is not None):
                hidden = functional.dropout(inputs, stage.dropout) if stage.dropout else inputs
                logits = forward(hidden).float()  # (B, C)
            loss = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=stage.label_smoothing)
            optimizer.zero_grad()
            # Gradients are averaged over processes; times their number it is the mean over the whole batch.
            scaler.scale(loss * group.size / size).backward()
            scaler.step(optimizer)
            scaler.update()
            averaged.update_parameters(network)

            right = (logits.detach().argmax(1) == labels).sum()
            totals += group.add_up(torch.stack([loss.detach(), right.to(loss.dtype)]))
            at.step, seen = at.step + 1, seen + size
            at.seconds, tick = at.seconds + time.monotonic() - tick, time.monotonic()
            if group.is_first and tick - last_said >= _SECONDS_BETWEEN_FIGURES:
                last_said = tick
                rate = (seen - seen_before) / max(1e-9, tick - epoch_started)
                left = (1 - done) * min(total_steps * stage.batch_size / rate, budget_seconds)
                loss_so_far, right_so_far = (totals / seen).tolist()
                hooks.on_progress(
                    Progress(stage.trains, at.epoch, at.step, source.steps, loss_so_far, right_so_far, rate, left)
                )
            if tick - last_checkpoint >= CHECKPOINT_SECONDS:
                checkpoint()
                last_checkpoint = time.monotonic()

        photos_per_second = (seen - seen_before) / max(1e-9, time.monotonic() - epoch_started)
        validation_loss, validation_accuracy = _measure(judged, source, machine)
        training_loss, training_accuracy = (totals / max(1, seen)).tolist()
        if validation_loss < at.best_loss or stage.patience is None:
            best, at.best_loss, at.best_epoch = copy.deepcopy(judged.state_dict()), validation_loss, at.epoch
        rate_now = float(optimizer.param_groups[-1]["lr"])
        measured = (training_loss, training_accuracy, validation_loss, validation_accuracy, photos_per_second)
        hooks.on_epoch(Epoch(stage.trains, at.epoch, rate_now, *measured))
        is_stale = stage.patience is not None and at.epoch - at.best_epoch >= stage.patience
        at.seconds, tick = at.seconds + time.monotonic() - tick, time.monotonic()
        is_late = budget_seconds < math.inf and group.agree(at.seconds / budget_seconds, device) >= 1
        at.is_over = is_stale or is_late or at.epoch == stage.epochs
        at.epoch, at.step = at.epoch + 1, 0
        totals.zero_()
        checkpoint()
        last_checkpoint = epoch_started = tick = time.monotonic()
    network.load_state_dict(best)
    network.eval().cpu()


def _optimizer(network: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """Rates that grow from the first layer to the head, and no decay of biases and norms."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for place, parameter in enumerate(trained):
        depth = round((_RATES - 1) * place / max(1, len(trained) - 1))
        groups.setdefault((depth, parameter.ndim > 1), []).append(parameter)
    options = [
        {
            "params": parameters,
            "share": stage.lowest_rate ** (1 - depth / (_RATES - 1)),
            "weight_decay": stage.weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in groups.items()
    ]
    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    return kind(options, lr=stage.lr, fused=trained[0].device.type != "mps")


def _set_mode(network: nn.Module, *, frozen_statistics: bool) -> None:
    """Training mode; running averages that should stay are not touched by it."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            is_frozen = module.weight is not None and not module.weight.requires_grad
            module.train(not (is_frozen or frozen_statistics))


def _share_of_lr(done: float, stage: Stage) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017, arXiv:1608.03983); `done` from 0 to 1."""
    if done < stage.warmup_share:
        return max(0.01, done / stage.warmup_share)
    return 0.5 * (1 + math.cos(math.pi * (done - stage.warmup_share) / (1 - stage.warmup_share)))


@torch.inference_mode()
def _measure(network: nn.Module, source: Source, machine: Machine) -> tuple[float, float]:
    """Log-loss and accuracy on the validation part, each photo once, over all processes."""
    network.eval()
    sums = torch.zeros(3, dtype=torch.float64 if machine.device.type != "mps" else torch.float32, device=machine.device)
    for inputs, labels in source.validation():
        inputs, labels = inputs.to(machine.device), labels.to(machine.device)
        with torch.autocast(machine.device.type, machine.precision, enabled=machine.precision is not None):
            logits = network(inputs).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(1) == labels).sum().to(loss.dtype), loss.new_tensor(len(labels))])
    loss_sum, right, photos = machine.group.add_up(sums).tolist()
    return loss_sum / photos, right / photos
