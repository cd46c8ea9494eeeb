"""From a dataset to a fitted network, in the stages that the recipe says.

In: options and a dataset. Out: the network, and what each epoch measured. A checkpoint in the output folder lets a run
that was killed go on with `--resume`.
"""

import json
import math
from dataclasses import asdict, dataclass
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
from trainer.fitting import checkpoint, features, loop, weights
from trainer.fitting.loop import Epoch, Hooks, Machine
from trainer.fitting.options import Options
from trainer.fitting.parallel import Group
from trainer.fitting.recipes import Stage
from trainer.fitting.sources import FeatureSource, PhotoSource
from trainer.progress import Reporter


def fit(
    options: Options, dataset: Dataset, device: str, group: Group, reporter: Reporter
) -> tuple[nn.Module, list[Epoch]]:
    """Fit a network.

    Args:
        options: what was asked for.
        dataset: its training and validation parts.
        device: of this process.
        group: the processes that fit it together.
        reporter: is told what happens.

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
    whole = group.first_then_others(
        lambda: weights.start(options.architecture, options.weights, options.head_hidden, classes)
    ).eval()
    if saved["network"] is not None:
        whole.load_state_dict(saved["network"])
    epochs = [Epoch(**entry) for entry in saved["epochs"]]

    def keep(stage: int, position: dict[str, Any] | None) -> None:
        """Within a stage its position has everything; between two of them the network is all there is."""
        state = {
            "stage": stage,
            "position": position,
            "network": whole.state_dict() if position is None else None,
            "epochs": [asdict(epoch) for epoch in epochs],
        }
        checkpoint.write(options.output / checkpoint.NAME, identity, state)

    def tell(epoch: Epoch) -> None:
        epochs.append(epoch)
        if group.is_first:
            reporter.epoch(epoch)

    run = _Run(options, dataset, machine, reporter)
    for number in range(saved["stage"], len(options.recipe.stages)):
        stage = options.recipe.stages[number]
        if stage.inputs == "photos":
            hooks = Hooks(tell, reporter.progress, lambda position, number=number: keep(number, position))  # type: ignore[misc]
            run.fit_on_photos(whole, stage, number, hooks, saved["position"] if number == saved["stage"] else None)
        elif group.is_first:
            run.fit_on_features(whole, stage, number, Hooks(tell, reporter.progress))
        if group.is_first:
            keep(number + 1, None)
    return whole.eval(), epochs


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
    """What has to be the same for a checkpoint to be gone on from."""
    what = {
        "data": dataset.fingerprint,
        "architecture": options.architecture,
        "weights": digest_of(Path(options.weights)) if Path(options.weights).is_file() else options.weights,
        "head": options.head_hidden,
        "input": options.input.model_dump(),
        "stages": [asdict(stage) for stage in options.recipe.stages],
        "seed": options.seed,
    }
    return json.dumps(what)


def _saved(options: Options, identity: str, reporter: Reporter) -> dict[str, Any]:
    """The checkpoint to go on from, or a beginning."""
    path = options.output / checkpoint.NAME
    if path.exists():
        state = checkpoint.read(path, identity)
        reporter.say(f"going on from {path}, {len(state['epochs'])} epochs done")
        return state
    if options.resume:
        reporter.say(f"there is no {path} yet: starting from the beginning")
    return {"stage": 0, "position": None, "network": None, "epochs": []}


@dataclass(frozen=True, slots=True)
class _Run:
    """What every stage of one run has in common."""

    options: Options
    dataset: Dataset
    machine: Machine
    reporter: Reporter

    def fit_on_photos(
        self, whole: nn.Module, stage: Stage, number: int, hooks: Hooks, position: dict[str, Any] | None
    ) -> None:
        """Fit the head alone or everything; photos are varied anew in each epoch."""
        options, seen = self.options, self.options.input
        head = network.head_name(options.architecture) + "."
        for name, parameter in whole.named_parameters():
            parameter.requires_grad_(stage.trains == "everything" or name.startswith(head))
        source = PhotoSource(
            self.dataset.training,
            self.dataset.validation,
            seen.preprocessing,
            options.recipe.augmentation,
            stage.batch_size,
            options.seed,
            options.workers // self.machine.group.size,
            self.machine.group,
            pinned=self.machine.device.type == "cuda",
        )
        loop.fit_stage(
            network.Classifier(whole, seen.mean, seen.std),
            source,
            stage,
            number,
            options.seed,
            self.machine,
            hooks,
            frozen_statistics=options.weights != "none",
            budget_seconds=math.inf if options.budget_minutes is None else options.budget_minutes * 60,
            state=position,
        )

    def fit_on_features(self, whole: nn.Module, stage: Stage, number: int, hooks: Hooks) -> None:
        """Features once, then the head; it takes seconds, so there is no checkpoint within."""
        options, seen = self.options, self.options.input
        place = network.head_layers_name(options.architecture)
        head = whole.get_submodule(place)
        network.replace(whole, place, nn.Identity())
        run = features.runner(whole, seen.mean, seen.std, seen.size, self.machine.device)

        def of(samples: tuple[Sample, ...], what: str, *, mirrored: bool = False) -> features.Floats:
            track = self.reporter.tracker(what)
            return features.answers(run, samples, seen.preprocessing, mirrored=mirrored, track=track)

        training = self.dataset.training
        source = FeatureSource(
            np.stack([of(training, "features"), of(training, "features, mirrored", mirrored=True)]),
            labels_of(training),
            of(self.dataset.validation, "features for validation"),
            labels_of(self.dataset.validation),
            stage.batch_size,
            options.seed,
        )
        at_home = Machine(torch.device("cpu"))
        loop.fit_stage(head, source, stage, number, options.seed, at_home, hooks, frozen_statistics=False)
        network.replace(whole.cpu(), place, head)
