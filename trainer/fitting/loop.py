"""One stage of a fit, from its first step, or from a checkpoint, to its best weights.

In: a network, batches, a stage. Out: the network with the lowest log-loss on the validation part (or after the last
epoch, where the stage has no patience), and what each epoch measured.

Everything that comes next follows from the seed, the epoch and the step, so a killed run resumes from its checkpoint
and ends with the same numbers.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from trainer.fitting.parallel import Group
from trainer.fitting.recipes import Stage
from trainer.fitting.schedule import set_rates
from trainer.fitting.sources import Source, mixed
from trainer.fitting.state import StageState
from trainer.progress import Epoch, StepProgress

CHECKPOINT_SECONDS = 180.0
_SECONDS_BETWEEN_REPORTS = 0.25


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a network is fitted.

    Attributes:
        device: the network's.
        precision: what autocast computes in; None computes in fp32.
        compile: compile kernels with `torch.compile` first.
        group: the processes that fit it together.
    """

    device: torch.device
    precision: torch.dtype | None = None
    compile: bool = False
    group: Group = field(default_factory=Group)

    def autocast(self) -> torch.autocast:
        """A context that computes in `precision`."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one stage of a recipe is fitted.

    Attributes:
        number: the stage's index in its recipe; different stages get different random numbers.
        seed: on a CPU, the same seed gives the same losses to the last digit.
        frozen_statistics: keep the batch norms' running averages, which a pretrained backbone has from more photos.
        budget_seconds: the schedule is shortened to end within this time.
    """

    stage: Stage
    number: int
    seed: int
    frozen_statistics: bool
    budget_seconds: float = math.inf


@dataclass(slots=True)
class Hooks:
    """What is called as a stage goes on; `on_checkpoint` gets what `fit_stage` takes as `saved`."""

    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_step: Callable[[StepProgress], None] = lambda progress: None
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda saved: None


def fit_stage(
    network: nn.Module,
    source: Source,
    plan: Plan,
    machine: Machine,
    hooks: Hooks,
    saved: dict[str, Any] | None = None,
) -> None:
    """Fit a network for one stage, in place; it ends in evaluation mode on the CPU.

    Args:
        network: from a source's inputs to logits (N, C). Parameters that require no gradient are not changed.
        source: its batches.
        plan: how.
        machine: where.
        hooks: called as the stage goes on.
        saved: a checkpoint's content, to continue from.
    """
    network.to(machine.device).to(memory_format=torch.channels_last)
    fit = _StageFit(network, source, plan, machine, hooks)
    fit.start(saved)
    while not fit.state.position.is_over:
        training = fit.train_epoch()
        validation = validate(fit.state.validated, source, machine)
        fit.finish_epoch(training, validation)
    network.load_state_dict(fit.state.best)
    network.eval().cpu()


class Measured(NamedTuple):
    """Mean log-loss in natural units, and accuracy from 0 to 1."""

    loss: float
    accuracy: float


class _StageFit:
    """The parts of `fit_stage`, around the state that they change."""

    def __init__(self, network: nn.Module, source: Source, plan: Plan, machine: Machine, hooks: Hooks) -> None:
        self._source, self._plan, self._stage = source, plan, plan.stage
        self._machine, self._group, self._hooks = machine, machine.group, hooks
        self._forward: Callable[[torch.Tensor], torch.Tensor] = machine.group.wrap(network, machine.device)
        if machine.compile:
            self._forward = torch.compile(self._forward)
        scaled = machine.precision == torch.float16
        self.state = StageState(network, plan.stage, source.steps, machine.device, scaled=scaled)
        self._started = self._last_checkpoint = self._last_report = self._images_per_second = 0.0

    def start(self, saved: dict[str, Any] | None) -> None:
        """Continue from a checkpoint, or measure what the stage has to improve on."""
        if saved is not None:
            self.state.load(saved)
        elif self._stage.patience is not None:
            self.state.position.best_loss, _ = validate(self.state.validated, self._source, self._machine)
        now = time.monotonic()
        self._started = now - self.state.position.seconds
        self._last_checkpoint = self._last_report = now

    def train_epoch(self) -> Measured:
        """Take the epoch's remaining steps, or as many as the time budget allows."""
        position = self.state.position
        set_training_mode(self.state.network, frozen_statistics=self._plan.frozen_statistics)
        started, photos_before, self._images_per_second = time.monotonic(), self._photos_seen(), 0.0
        for inputs, labels in self._source.training(position.epoch, position.step):
            done = self._share_done()
            if done >= 1:
                break
            set_rates(self.state.optimizer, self._stage, done)
            self._step(inputs, labels)
            position.step += 1
            elapsed = max(1e-9, time.monotonic() - started)
            self._images_per_second = (self._photos_seen() - photos_before) / elapsed
            self._report_step(done)
            if time.monotonic() - self._last_checkpoint >= CHECKPOINT_SECONDS:
                self._checkpoint()
        return self._measured_in_training()

    def finish_epoch(self, training: Measured, validation: Measured) -> None:
        """Keep the weights if they are the best, report, decide whether to go on, and write a checkpoint."""
        stage, position = self._stage, self.state.position
        if validation.loss < position.best_loss or stage.patience is None:
            self.state.keep_best(validation.loss)
        rate = float(self.state.optimizer.param_groups[-1]["lr"])
        self._hooks.on_epoch(Epoch(stage.trains, position.epoch, rate, *training, *validation, self._images_per_second))
        is_stale = stage.patience is not None and position.epoch - position.best_epoch >= stage.patience
        position.is_over = is_stale or self._budget_used() >= 1 or position.epoch == stage.epochs
        self.state.next_epoch()
        self._checkpoint()

    def _step(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        """One step of the optimizer on this process's part of a batch."""
        stage, state, device = self._stage, self.state, self._machine.device
        epoch, step = state.position.epoch, state.position.step
        torch.manual_seed(mixed(self._plan.seed, self._plan.number, epoch, step, self._group.rank))  # for dropout

        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with self._machine.autocast():
            kept = functional.dropout(inputs, stage.dropout) if stage.dropout else inputs
            logits = self._forward(kept).float()  # (B, C)
        loss = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=stage.label_smoothing)
        state.optimizer.zero_grad()
        # Gradients are averaged over the processes; times their number it is the mean over the whole batch.
        batch_size = min(stage.batch_size, self._source.photos - step * stage.batch_size)
        state.scaler.scale(loss * self._group.size / batch_size).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.averaged.update_parameters(state.network)

        right = (logits.detach().argmax(1) == labels).sum()
        state.totals += self._group.add_up(torch.stack([loss.detach(), right.to(loss.dtype)]))

    def _photos_seen(self) -> int:
        """Photos of this epoch so far, in all processes together."""
        return min(self.state.position.step * self._stage.batch_size, self._source.photos)

    def _measured_in_training(self) -> Measured:
        loss, accuracy = (self.state.totals / max(1, self._photos_seen())).tolist()
        return Measured(loss, accuracy)

    def _share_done(self) -> float:
        """Share of the stage that is done, by its steps or by its time budget, whichever is further."""
        position, steps = self.state.position, self._source.steps
        by_steps = ((position.epoch - 1) * steps + position.step) / (self._stage.epochs * steps)
        return max(by_steps, self._budget_used())

    def _budget_used(self) -> float:
        """Share of the time budget that is used up, 0 without one."""
        if self._plan.budget_seconds == math.inf:
            return 0.0
        used = (time.monotonic() - self._started) / self._plan.budget_seconds
        # The first process decides: if one ended the epoch earlier, the others would wait for its gradients for ever.
        return self._group.agree(used, self._machine.device)

    def _report_step(self, done: float) -> None:
        if not self._group.is_first or time.monotonic() - self._last_report < _SECONDS_BETWEEN_REPORTS:
            return
        self._last_report = time.monotonic()
        stage, position, steps = self._stage, self.state.position, self._source.steps
        seconds = stage.epochs * steps * stage.batch_size / self._images_per_second
        seconds_left = (1 - done) * min(seconds, self._plan.budget_seconds)
        figures = (*self._measured_in_training(), self._images_per_second, seconds_left)
        self._hooks.on_step(StepProgress(stage.trains, position.epoch, position.step, steps, *figures))

    def _checkpoint(self) -> None:
        self.state.position.seconds = time.monotonic() - self._started
        if self._group.is_first:
            self._hooks.on_checkpoint(self.state.save())
        self._last_checkpoint = time.monotonic()


def set_training_mode(network: nn.Module, *, frozen_statistics: bool) -> None:
    """Training mode, except for batch norms whose running averages must not move."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            is_frozen = module.weight is not None and not module.weight.requires_grad
            module.train(not (is_frozen or frozen_statistics))


@torch.inference_mode()
def validate(network: nn.Module, source: Source, machine: Machine) -> Measured:
    """Measure a network on the validation part, each photo once, over all processes."""
    network.eval()
    # MPS has no float64.
    sums = torch.zeros(3, dtype=torch.float64 if machine.device.type != "mps" else torch.float32, device=machine.device)
    for inputs, labels in source.validation():
        inputs, labels = inputs.to(machine.device), labels.to(machine.device)
        with machine.autocast():
            logits = network(inputs).float()  # (B, C)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(1) == labels).sum().to(loss.dtype), loss.new_tensor(len(labels))])
    loss_sum, right, photos = machine.group.add_up(sums).tolist()
    return Measured(loss_sum / photos, right / photos)
