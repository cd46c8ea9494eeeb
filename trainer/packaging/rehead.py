"""A model folder with another head: what has to be chosen again, and what stays as it was.

In: a model folder, and its network with a head that was fitted further. Out: a manifest and files. The backbone is the
old one bit for bit, in each of its forms, and so the outlier detector, which looks at what comes before the head, stays
with its thresholds. Temperatures, the cascade and the thresholds for error rates are chosen again on the guard set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import openvino
from torch import nn

from sorter.classifier import manifest as manifest_module
from sorter.classifier import network, outliers
from sorter.classifier.manifest import (
    FORMAT_VERSION,
    NEITHER,
    WEIGHTS,
    ErrorRates,
    Int8,
    LowResolutionPass,
    Manifest,
)
from sorter.classifier.openvino_engine import network_files
from trainer.data.layouts import Sample, labels_of
from trainer.fitting import features
from trainer.packaging import backbone, cascade, export, guard, metrics
from trainer.packaging.cascade import Candidate
from trainer.packaging.guard import Guard
from trainer.packaging.metrics import Floats
from trainer.progress import Reporter


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A model folder to start from.

    Attributes:
        model: the network that OpenVINO runs.
        fitted: the same in torch, with 32 bits, whose head may be fitted further.
        guard: None if the folder has no guard set.
    """

    folder: Path
    manifest: Manifest
    model: openvino.Model
    fitted: nn.Module
    guard: Guard | None

    @property
    def head(self) -> nn.Module:
        """From features (N, F) to logits (N, C)."""
        return self.fitted.get_submodule(network.head_layers_name(self.manifest.architecture))


def read(folder: Path) -> Base:
    """Read a model folder.

    Raises:
        ModelError: it cannot be used.
        ConfigurationError: it has no OpenVINO network.
    """
    described = manifest_module.read(folder)
    return Base(
        folder,
        described,
        backbone.read(folder, described),
        network.load(folder, described),
        guard.read(folder, described),
    )


def described(base: Base, name: str, photos: Guard, int8: Int8) -> Manifest:
    """The manifest of the model whose head was fitted further.

    Args:
        base: the model, with that head.
        name: of the new model.
        photos: the guard set, or where there is none features of photos whose labels are only the old model's: these
            tell which labels change between passes, and not how sure to be.
        int8: how far 8 bits are from 32.
    """
    old, logits = base.manifest, guard.logits_of(base.head, photos.features)
    has_labels = base.guard is not None
    temperature = metrics.fit_temperature(logits[old.input.size], photos.labels) if has_labels else old.temperature
    # Both networks have the same head, and the difference between their backbones is what it was.
    torch_temperature = round(old.temperature_of("torch") * temperature / old.temperature, 4)
    draft = old.model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "name": name,
            "temperature": temperature,
            "torch_temperature": torch_temperature,
            "int8": int8,
            "cascade": _cascade(old, logits, photos, has_labels=has_labels),
            "evaluations": (),
            "error_rates": (),
        }
    )
    if not has_labels:
        return draft
    answers = guard.answers(logits, draft)
    data = f"the guard set of {old.name}"
    evaluation = metrics.evaluation(answers, photos.labels, data=data, role="calibration")
    return draft.model_copy(update={"evaluations": (evaluation,), "error_rates": _error_rates(base, draft, photos)})


def _cascade(
    old: Manifest, logits: dict[int, Floats], photos: Guard, *, has_labels: bool
) -> tuple[LowResolutionPass, ...]:
    """The cheapest of the old passes, with thresholds for the new head."""
    if len(photos.labels) < cascade.MIN_PHOTOS:
        return ()
    full = logits[old.input.size].argmax(1)
    candidates = []
    for each in old.cascade:
        own = logits[each.size]
        temperature = metrics.fit_temperature(own, photos.labels) if has_labels else each.temperature
        confidence = metrics.softmax(own, temperature).max(1)
        candidates.append(Candidate(each.size, temperature, confidence, own.argmax(1) != full))
    farthest = {each.size: each.neither_threshold for each in old.cascade}
    return tuple(
        each.model_copy(update={"neither_threshold": farthest[each.size]})
        for each in cascade.cheapest(candidates, old.input.size)
    )


def _error_rates(base: Base, draft: Manifest, photos: Guard) -> tuple[ErrorRates, ...]:
    """The tables of OpenVINO's engine. PyTorch's features differ from those of the guard set: it gets none."""
    logits = guard.logits_of(base.head, photos.features)
    tables = []
    for catch_neither in (False, True) if draft.neither is not None else (False,):
        distances = None
        if catch_neither:
            detector = outliers.read(base.folder, base.manifest)
            distances = guard.distances_of(detector, base.head, photos.features)
        by_level = [guard.answers(logits, draft, lowest, distances) for lowest in cascade.levels(draft.cascade)]
        rates = metrics.risk_coverage(partial(cascade.at, by_level, draft.cascade), photos.labels)
        tables.append(ErrorRates(engine="openvino", catch_neither=catch_neither, rates=rates))
    return tuple(tables)


def int8(base: Base, samples: Sequence[Sample], reporter: Reporter) -> Int8:
    """How far the network that OpenVINO runs is from the one with 32 bits, both with the new head, on some photos."""
    seen = base.manifest.input
    exact = features.convert(base.fitted, seen.mean, seen.std, seen.size)
    track = reporter.tracker("comparing 8 bits with 32")
    found, expected = (
        features.answers(features.on_openvino(model, exactly=exactly), samples, seen.preprocessing, track=track)
        for model, exactly in ((with_new_head(base), False), (exact, True))
    )
    return export.compare(found, expected, labels_of(samples))


def with_new_head(base: Base) -> openvino.Model:
    """The network that OpenVINO runs, with the head as it is now."""
    return backbone.with_head(base.model, base.head, base.manifest)


def files(base: Base) -> dict[str, bytes]:
    """The files of the model whose head was fitted further; the guard set and the detector are the old ones."""
    names = network_files(base.manifest)
    assert names is not None, "its network was read"
    kept = [name for name in (NEITHER, guard.FILE) if name in base.manifest.files]
    return {
        WEIGHTS: network.half(base.fitted.state_dict()),
        **export.saved(with_new_head(base), names),
        **{name: (base.folder / name).read_bytes() for name in kept},
    }
