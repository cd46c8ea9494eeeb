"""A person's verdicts on sorted photos to a better head of the model that sorted them, or to the reasons why not.

In: a model folder, and an output with its history. Out: another model folder, if the model in it is better. Only the
head is fitted: the backbone stays bit for bit as it is, and with it whatever was measured on its features.
"""

import contextlib
import copy
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sorter.classifier import manifest as manifest_module
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import Manifest
from sorter.errors import ConfigurationError
from trainer import build
from trainer.data import inspection, verdicts
from trainer.data.layouts import Sample, labels_of, spread
from trainer.data.split import without_copies
from trainer.data.verdicts import Photos, Verdicts
from trainer.fitting import features, recipes
from trainer.fitting.loop import Hooks, Machine, Plan, fit_stage
from trainer.fitting.options import Source
from trainer.fitting.sources import FeatureSource
from trainer.packaging import backbone, gate, guard, outliers, package, rehead, report
from trainer.packaging.gate import Comparison, Paired
from trainer.packaging.rehead import Base
from trainer.progress import Reporter

MAX_WEIGHT = 4
"""How often a photo with a verdict is learned from in each epoch, at most."""
MAX_SHARE = 0.2
"""Of all that is learned from, what photos with a verdict may be by counting more than once."""
COMPARED_PHOTOS = 500
"""For the comparison of 8 bits with 32 bits, and with the old model where it has no guard set."""
STEPS = 8
"""In each epoch, at least: few photos are learned from in smaller batches."""
MIN_CONFIDENT = 100
"""Confidently sorted photos that can stand in for a guard set."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `trainer fit --corrections`.

    Attributes:
        corrections: the output whose photos were reviewed.
        state_dir: where its history is, if not in it.
        base: the model folder to start from.
        data: the dataset that it was fitted on; None to rehearse on confidently sorted photos.
        output: the folder to write.
        seed: of everything that is drawn.
        workers: processes that inspect photos.
        cache: folder for results that depend on the photos alone.
        command: the command line, for the manifest.
    """

    corrections: Path
    state_dir: Path | None
    base: Path
    data: Path | None
    output: Path
    seed: int
    workers: int
    cache: Path
    command: str


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of it.

    Attributes:
        comparison: of the new model with the old one.
        neither: how many photos were said to show none of the classes.
        caught: how many of these the outlier detector catches; None if there is no detector.
        manifest: as written; None if the new model is not better, and so was not written.
    """

    comparison: Comparison
    neither: int
    caught: int | None
    manifest: Manifest | None


def learn(options: Options, reporter: Reporter) -> Learned:
    """Fit the head further, compare, and write the model if it is better.

    Raises:
        ConfigurationError: the history, the verdicts, the dataset or the output folder cannot be used.
        ModelError: the model to start from cannot be used.
    """
    started = time.monotonic()
    with _claimed(options.output):
        name = build.name_of(options.output)
        base = rehead.read(options.base)
        found = _in_memory(_read(options, base, reporter), base, reporter)
        rehearsal = _rehearsal(options, base, found, reporter)
        data = _data(options, found, rehearsal)
        reporter.say(data)
        fitted = _fit(base, found, rehearsal, options.seed, reporter)

        judged, sure = found.judged, found.confident
        compared = spread((*judged.training, *judged.held_out, *sure.training, *sure.held_out), COMPARED_PHOTOS)
        confident = spread(sure.held_out, COMPARED_PHOTOS)
        photos = base.guard or guard.measure(base.model, base.manifest, confident, reporter)
        draft = rehead.described(fitted, name, photos, rehead.int8(fitted, compared, reporter))
        files = rehead.files(fitted)
        with tempfile.TemporaryDirectory() as scratch:
            new = manifest_module.write(Path(scratch), draft, files, card="")
            comparison = _compared(base, fitted.head, (Path(scratch), new), found, reporter)
            caught = _caught(Path(scratch), new, found.neither)
        if comparison.reasons_against():
            return Learned(comparison, len(found.neither), caught, None)
        reporter.say("writing the model folder")
        held_out = comparison.held_out
        training = {
            "command": options.command,
            "data": data,
            "weights": base.manifest.name,
            "recipe": "verdicts",
            "seed": options.seed,
            "epochs": recipes.VERDICTS.epochs,
            "seconds": round(time.monotonic() - started),
            "held_out": f"{held_out.before} of {held_out.photos} wrong before, {held_out.after} after",
        }
        draft = draft.model_copy(update={"training": training})
        written = manifest_module.write(options.output, draft, files, report.card(draft))
        return Learned(comparison, len(found.neither), caught, written)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """A folder that can be written to, and that is gone again if nothing was written to it."""
    existed = folder.exists()
    build.check_output(folder, resume=False)
    try:
        yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _read(options: Options, base: Base, reporter: Reporter) -> Verdicts:
    found = verdicts.read(
        options.corrections,
        options.state_dir,
        base.manifest.classes,
        options.seed,
        options.cache,
        options.workers,
        reporter,
    )
    for path, reason in found.left_out:
        reporter.say(f"left out: {path} ({reason})")
    sure = len(found.confident.held_out)
    if base.guard is None and sure < MIN_CONFIDENT:
        raise ConfigurationError(
            f"{options.base} has no {guard.FILE}, and only {sure} confidently sorted photos would be held out to "
            f"compare on instead, where {MIN_CONFIDENT} are needed: sort more photos, or give a --base that this "
            "trainer has fitted"
        )
    return found


def _in_memory(found: Verdicts, base: Base, reporter: Reporter) -> Verdicts:
    """The same photos with their pixels: later, a review, an undo or a sorter may have moved the files.

    Raises:
        ConfigurationError: one of them is gone already.
    """
    judged, sure = found.judged, found.confident
    parts = (judged.training, judged.held_out, sure.training, sure.held_out, found.neither)
    samples = [sample for part in parts for sample in part]
    batches = features.batches(samples, base.manifest.input.preprocessing)
    tracked = reporter.tracker("decoding photos")(batches, -(-len(samples) // features.BATCH))
    pixels = (photo for batch in tracked for photo in batch)
    kept = [tuple(replace(sample, pixels=next(pixels)) for sample in part) for part in parts]
    return replace(found, judged=Photos(*kept[:2]), confident=Photos(*kept[2:4]), neither=kept[4])


def _rehearsal(options: Options, base: Base, found: Verdicts, reporter: Reporter) -> tuple[Sample, ...]:
    """Photos that keep the head from forgetting: the dataset, or else those that were sorted confidently.

    Raises:
        ConfigurationError: the dataset cannot be used.
    """
    if options.data is None:
        return found.confident.training
    source = Source(options.data, None, None, options.seed)
    dataset = build.load(source, options.workers, options.cache, reporter)
    if dataset.classes != base.manifest.classes:
        raise ConfigurationError(
            f"{options.data} has other classes than {options.base}: give the dataset that it was fitted on"
        )
    samples = (*dataset.training, *dataset.validation)
    paths = [sample.path for sample in samples]
    inspected = inspection.inspect_all(paths, options.cache, options.workers, reporter.tracker("inspecting photos"))
    kept, _ = without_copies(samples, found.judged.held_out, found.inspected | inspected)
    return tuple(kept)


def _data(options: Options, found: Verdicts, rehearsal: Sequence[Sample]) -> str:
    """What is learned from, for a person."""
    of = "confidently sorted photos" if options.data is None else f"photos of {options.data.resolve().name}"
    judged = found.judged
    return (
        f"verdicts on photos of {options.corrections.resolve().name}, {len(judged.training)} to learn from and "
        f"{len(judged.held_out)} held out; {len(rehearsal)} {of} against forgetting"
    )


def _fit(base: Base, found: Verdicts, rehearsal: Sequence[Sample], seed: int, reporter: Reporter) -> Base:
    """The model with its head fitted further; the one given stays as it is."""
    fitted = replace(base, fitted=copy.deepcopy(base.fitted))
    judged = found.judged.training
    # Photos with a verdict are few: each is there several times.
    may_count = MAX_SHARE / (1 - MAX_SHARE) * len(rehearsal) / max(1, len(judged))
    weight = max(1, min(MAX_WEIGHT, int(may_count)))
    samples = (*rehearsal, *judged)
    rows = np.concatenate([np.arange(len(rehearsal)), *[np.arange(len(rehearsal), len(samples))] * weight])

    def features_of(photos: Sequence[Sample], *, mirrored: bool = False) -> features.Floats:
        size = base.manifest.input.size
        return backbone.features_at(base.model, base.manifest, size, photos, reporter, mirrored=mirrored)

    stage = recipes.VERDICTS
    stage = replace(stage, batch_size=min(stage.batch_size, math.ceil(len(rows) / STEPS)))
    source = FeatureSource(
        np.stack([features_of(samples, mirrored=mirrored)[rows] for mirrored in (False, True)]),
        labels_of(samples)[rows],
        features_of(found.judged.held_out),
        labels_of(found.judged.held_out),
        stage.batch_size,
        seed,
    )
    if base.manifest.neither is not None and base.manifest.neither.score == "mahalanobis":
        # This detector looks at the first hidden layer, which has to stay as it is.
        assert isinstance(fitted.head, nn.Sequential), "it has a hidden layer"
        fitted.head[0].requires_grad_(False)
    plan = Plan(stage, 0, seed, frozen_statistics=False)
    fit_stage(fitted.head, source, plan, Machine(torch.device("cpu")), Hooks(reporter.epoch, reporter.step))
    reporter.close()
    return fitted


def _compared(
    base: Base, new_head: nn.Module, new: tuple[Path, Manifest], found: Verdicts, reporter: Reporter
) -> Comparison:
    """Compare the new model, in a folder, with the old one, each as the sorter will run it."""

    def on_photos(samples: tuple[Sample, ...], *, as_before: bool) -> Paired:
        before, after = (
            package.answers(folder, described, samples, "comparing", reporter)
            for folder, described in ((base.folder, base.manifest), new)
        )
        return gate.paired(before, after, before.argmax(1) if as_before else labels_of(samples))

    on_guard = None
    if base.guard is not None:
        before, after = (
            guard.answers(guard.logits_of(head, base.guard.features), described)
            for head, described in ((base.head, base.manifest), (new_head, new[1]))
        )
        on_guard = gate.paired(before, after, base.guard.labels)
    assert new[1].int8 is not None, "measured before"
    return Comparison(
        guard=on_guard,
        confident=on_photos(spread(found.confident.held_out, COMPARED_PHOTOS), as_before=True)
        if on_guard is None
        else None,
        held_out=on_photos(found.judged.held_out, as_before=False),
        int8=new[1].int8,
    )


def _caught(folder: Path, described: Manifest, neither: Sequence[Sample]) -> int | None:
    """How many photos the outlier detector catches; None if the model has none."""
    if described.neither is None:
        return None
    engine = open_engine(folder, described, "openvino", "cpu", features.BATCH, catch_neither=True)
    return int((outliers.distances(engine, neither, described.input) > 0).sum())
