"""A dataset to a fitted network, in the stages of a recipe.

In: options and a dataset. Out: the network, and what each epoch measured. A checkpoint in the output folder lets a
killed run be resumed with `--resume`.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sorter.classifier import network
from sorter.classifier.manifest import digest_of
from sorter.classifier.torch_engine import choose_device, multiplies_bf16
from sorter.processors import available_cpus
from trainer.data.layouts import Sample, labels_of
from trainer.data.split import Dataset
from trainer.fitting import checkpoint, features, weights
from trainer.fitting.loop import Hooks, Machine, Plan, fit_stage
from trainer.fitting.options import Options
from trainer.fitting.parallel import Group
from trainer.fitting.recipes import Stage
from trainer.fitting.sources import FeatureSource, PhotoSource
from trainer.progress import Epoch, Reporter


def fit(
    options: Options, dataset: Dataset, device: str, group: Group, reporter: Reporter
) -> tuple[nn.Module, list[Epoch]]:
    """Fit a network.

    Args:
        options: of `trainer fit`.
        dataset: its training and validation parts are used.
        device: this process's.
        group: the processes that fit it together.
        reporter: shows progress.

    Returns:
        The network, in evaluation mode on the CPU, from normalised float (N, 3, S, S) to logits (N, C); and its epochs.

    Raises:
        ConfigurationError: weights, device or checkpoint cannot be used.
    """
    machine = _machine(device, group, compiled=options.compile)
    identity = _identity(options, dataset)
    saved = _saved(options, identity, reporter)
    torch.manual_seed(options.seed)
    classes = len(dataset.classes)
    model = group.first_then_others(
        lambda: weights.start(options.architecture, options.weights, options.head_hidden, classes)
    ).eval()
    if saved["network"] is not None:
        model.load_state_dict(saved["network"])
    stages = _Stages(options, dataset, machine, reporter, model, identity, [Epoch(**e) for e in saved["epochs"]])
    for number in range(saved["stage"], len(options.recipe.stages)):
        stages.fit(number, saved["position"] if number == saved["stage"] else None)
    return model.eval(), stages.epochs


def _machine(device: str, group: Group, *, compiled: bool) -> Machine:
    chosen = choose_device(device)
    precision = None
    if chosen.type == "cuda":
        precision = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    elif chosen.type == "cpu":
        precision = torch.bfloat16 if multiplies_bf16() else None
        torch.set_num_threads(max(1, available_cpus() // group.size))
    return Machine(chosen, precision, compiled, group)


def _identity(options: Options, dataset: Dataset) -> str:
    """What must match for a checkpoint to be resumable."""
    weights_file = Path(options.weights)
    parts = {
        "data": dataset.fingerprint,
        "architecture": options.architecture,
        "weights": digest_of(weights_file) if weights_file.is_file() else options.weights,
        "head": options.head_hidden,
        "input": options.input.model_dump(),
        "stages": [asdict(stage) for stage in options.recipe.stages],
        "seed": options.seed,
    }
    return json.dumps(parts)


def _saved(options: Options, identity: str, reporter: Reporter) -> dict[str, Any]:
    """The checkpoint to resume from, or the state of a run that has not begun."""
    path = options.output / checkpoint.NAME
    if path.exists():
        saved = checkpoint.read(path, identity)
        reporter.say(f"resuming from {path} ({len(saved['epochs'])} epochs done)")
        return saved
    if options.resume:
        reporter.say(f"there is no checkpoint {path} yet: starting from the beginning")
    return {"stage": 0, "position": None, "network": None, "epochs": []}


class _Stages:
    """The stages of one fit, each of which changes the model in place."""

    def __init__(
        self,
        options: Options,
        dataset: Dataset,
        machine: Machine,
        reporter: Reporter,
        model: nn.Module,
        identity: str,
        epochs: list[Epoch],
    ) -> None:
        self._options, self._dataset, self._machine, self._reporter = options, dataset, machine, reporter
        self._model, self._identity, self.epochs = model, identity, epochs

    def fit(self, number: int, position: dict[str, Any] | None) -> None:
        """Fit one stage; `position` is where a checkpoint was within it."""
        stage, is_first = self._options.recipe.stages[number], self._machine.group.is_first
        if stage.inputs == "photos":
            self._fit_on_photos(stage, number, position)
        elif is_first:  # the others get its head from the first step on photos
            self._fit_on_features(stage, number)
        if is_first:
            self._write_checkpoint(number + 1, None)

    def _fit_on_photos(self, stage: Stage, number: int, position: dict[str, Any] | None) -> None:
        """Fit the head or everything on photos that are augmented afresh in each epoch."""
        options, described = self._options, self._options.input
        head = network.head_name(options.architecture) + "."
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(stage.trains == "everything" or name.startswith(head))
        source = PhotoSource(
            self._dataset.training,
            self._dataset.validation,
            described.preprocessing,
            options.recipe.augmentation,
            stage.batch_size,
            options.seed,
            options.workers // self._machine.group.size,
            self._machine.group,
            pinned=self._machine.device.type == "cuda",
        )
        budget = math.inf if options.budget_minutes is None else options.budget_minutes * 60
        is_pretrained = options.weights != "none"
        plan = Plan(stage, number, options.seed, frozen_statistics=is_pretrained, budget_seconds=budget)
        hooks = self._hooks(on_checkpoint=lambda saved: self._write_checkpoint(number, saved))
        classifier = network.Classifier(self._model, described.mean, described.std)
        fit_stage(classifier, source, plan, self._machine, hooks, position)

    def _fit_on_features(self, stage: Stage, number: int) -> None:
        """Compute features once, then fit the head, which takes seconds; so there is no checkpoint within."""
        options, described = self._options, self._options.input
        place = network.head_layers_name(options.architecture)
        head = self._model.get_submodule(place)
        network.replace(self._model, place, nn.Identity())
        run = features.runner(self._model, described.mean, described.std, described.size, self._machine.device)

        def features_of(samples: tuple[Sample, ...], title: str, *, mirrored: bool = False) -> features.Floats:
            track = self._reporter.tracker(title)
            return features.answers(run, samples, described.preprocessing, mirrored=mirrored, track=track)

        training, validation = self._dataset.training, self._dataset.validation
        source = FeatureSource(
            np.stack(
                [
                    features_of(training, "features"),
                    features_of(training, "features of mirror images", mirrored=True),
                ]
            ),
            labels_of(training),
            features_of(validation, "features for validation"),
            labels_of(validation),
            stage.batch_size,
            options.seed,
        )
        plan = Plan(stage, number, options.seed, frozen_statistics=False)
        fit_stage(head, source, plan, Machine(torch.device("cpu")), self._hooks())
        network.replace(self._model.cpu(), place, head)

    def _hooks(self, on_checkpoint: Any = lambda saved: None) -> Hooks:
        return Hooks(self._add_epoch, self._reporter.step, on_checkpoint)

    def _add_epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        if self._machine.group.is_first:
            self._reporter.epoch(epoch)

    def _write_checkpoint(self, number: int, position: dict[str, Any] | None) -> None:
        """Write where the fit is. Within a stage its position holds the network; between two, nothing else counts."""
        state = {
            "stage": number,
            "position": position,
            "network": self._model.state_dict() if position is None else None,
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }
        checkpoint.write(self._options.output / checkpoint.NAME, self._identity, state)
