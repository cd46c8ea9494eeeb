"""The trainer's commands."""

import argparse
import importlib.util
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from sorter import extras
from sorter.classifier import manifest
from sorter.errors import ConfigurationError, ExitCode, SorterError
from sorter.settings import SHIPPED_MODEL
from trainer.arguments import build_parser, without_corrections

if TYPE_CHECKING:
    from sorter.classifier.manifest import Evaluation
    from trainer.data.layouts import Sample
    from trainer.fitting.options import Options, Source
    from trainer.fitting.recipes import Recipe
    from trainer.packaging.metrics import Floats

_EXTRAS = {"tensorboard": "tensorboard", "onnx": "onnx", "onnxscript": "onnx"}
"""Modules that come with another extra than `train`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; an error is one sentence on standard error."""
    options = build_parser().parse_args(arguments)
    options.command_line = shlex.join(["trainer", *(sys.argv[1:] if arguments is None else arguments)])
    warnings.simplefilter("ignore")  # libraries warn about each other, and a user can do nothing about it
    try:
        if importlib.util.find_spec("torch") is None:
            raise ModuleNotFoundError(name="torch")
        return int(_ACTIONS[options.command](options))
    except ModuleNotFoundError as error:
        module = str(error.name).split(".")[0]
        extra = _EXTRAS.get(module, "train")
        needs = extras.hint(f"trainer {options.command}", extra)
        sys.stderr.write(f"trainer: the Python package {module} is not installed; {needs}\n")
        return int(ExitCode.USAGE)
    except SorterError as error:
        sys.stderr.write(f"trainer: {error}\n")
        return int(error.exit_code)
    except OSError as error:
        where = error.filename or "the output"
        sys.stderr.write(f"trainer: {where}: {error.strerror}; free some space or check its permissions\n")
        return int(ExitCode.STOPPED)
    except KeyboardInterrupt:
        resumable = options.command == "fit" and options.corrections is None
        hint = "; run the same command with --resume to continue" if resumable else ""
        sys.stderr.write(f"trainer: interrupted{hint}\n")
        return int(ExitCode.INCOMPLETE)


def _fit(options: argparse.Namespace) -> ExitCode:
    if options.corrections is not None:
        return _learn(options)
    if options.data is None:
        raise ConfigurationError(
            "there is nothing to fit on: give a dataset with --data, or the output of sorter with --corrections"
        )
    if options.state_dir is not None or options.base != SHIPPED_MODEL:
        raise ConfigurationError("--base and --state-dir go with --corrections: give it, or drop them")
    from trainer import build
    from trainer.progress import open_reporter

    is_first = os.environ.get("RANK", "0") == "0"  # only the first of torchrun's processes writes
    reporter = open_reporter(options.tensorboard if is_first else None)
    written = build.build(_fit_options(options), reporter)
    if written is None:
        return ExitCode.DONE
    test = written.evaluations[1]
    low, high = test.accuracy_interval_95
    print(f"{test.right} of {test.photos} test photos right: {test.accuracy:.2%} ({low:.2%} to {high:.2%})")
    print(f"log-loss {test.log_loss:.4f}, temperature {written.temperature}")
    rates = written.rates_of("openvino", catch_neither=False) or ()
    _print_coverage(rates, written.evaluations[0].photos)
    print(f"model folder {options.output}, report {options.output / 'report.html'}")
    print(f"try it: sorter run --once --model {shlex.quote(str(options.output))} --inbox DIR")
    return ExitCode.DONE


def _learn(options: argparse.Namespace) -> ExitCode:
    if unused := without_corrections(options):
        raise ConfigurationError(
            f"{unused[0]} is of no use with --corrections, which keeps the network of --base: drop it"
        )
    from sorter.processors import available_cpus
    from trainer import learn
    from trainer.progress import open_reporter

    learned = learn.learn(
        learn.Options(
            corrections=options.corrections,
            state_dir=options.state_dir,
            base=options.base,
            data=options.data,
            output=options.output,
            seed=options.seed,
            workers=options.num_workers or available_cpus(),
            cache=_cache(),
            command=options.command_line,
        ),
        open_reporter(options.tensorboard),
    )
    for line in learned.comparison.table():
        print(line)
    if learned.neither and learned.caught is not None:
        print(f"--catch-neither catches {learned.caught} of {learned.neither} photos that you called neither")
    if learned.manifest is None:
        for reason in learned.comparison.reasons_against():
            print(f"not better: {reason}")
        print(f"{options.output} was not written: go on with {options.base}")
        return ExitCode.INCOMPLETE
    print(f"model folder {options.output}")
    print(f"use it: sorter run --model {shlex.quote(str(options.output))} --inbox DIR")
    return ExitCode.DONE


def _fit_options(options: argparse.Namespace) -> "Options":
    from sorter.processors import available_cpus
    from trainer.fitting.options import MLP_HEAD, Options

    return Options(
        source=_source(options, options.seed),
        output=options.output,
        architecture=options.arch,
        weights=options.weights,
        head_hidden=MLP_HEAD if options.head == "mlp" else (),
        image_size=options.image_size,
        crop=options.crop,
        recipe=_recipe(options),
        max_lost=options.max_lost,
        device=options.device,
        compile=options.compile,
        workers=available_cpus() if options.num_workers is None else options.num_workers,
        budget_minutes=options.budget_minutes,
        resume=options.resume,
        cache=_cache(),
        command=options.command_line,
    )


def _source(options: argparse.Namespace, seed: int) -> "Source":
    from trainer.fitting.options import Source

    return Source(options.data, options.calibration, options.others, seed)


def _recipe(options: argparse.Namespace) -> "Recipe":
    """The recipe, its last stage changed by the flags."""
    from trainer.fitting import recipes

    recipe = recipes.RECIPES[options.recipe]
    flags = {"epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}
    last = replace(recipe.stages[-1], **{name: value for name, value in flags.items() if value is not None})
    return replace(recipe, stages=(*recipe.stages[:-1], last))


def _cache() -> Path:
    """The folder for unpacked zips and inspected files, in the sorter's cache."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "sorter" / "datasets"


def _evaluate(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    from sorter.classifier.engine import choose
    from trainer.data.labelled import dataset_photos
    from trainer.data.layouts import labels_of
    from trainer.packaging import cascade, evaluate, metrics

    data, samples = dataset_photos(options.data, model.classes, _cache())
    engine = choose(options.model, model, "auto", options.device)
    passes = model.cascade if engine == "openvino" else ()
    lowest, *higher = cascade.levels(passes)
    readable, answers = _classify(options, model, samples, lowest)
    by_level = [answers, *(_classify(options, model, readable, each)[1] for each in higher)]
    labels = labels_of(readable)
    result = metrics.evaluation(answers, labels, data=data, role="test")
    # Of the full-size pass, because the low-resolution pass has a temperature of its own.
    full = by_level[-1]
    untempered = metrics.softmax(metrics.log(full), 1 / model.temperature_of(engine))
    before, after = (metrics.calibration_error(each, labels) for each in (untempered, full))
    coverage = metrics.risk_coverage(partial(cascade.at, by_level, passes), labels)
    if options.csv is not None:
        evaluate.write_answers(options.csv, readable, answers, model.classes)
    if options.json:
        entries = [entry.model_dump() for entry in coverage]
        errors = {"calibration_error_full_size": after, "calibration_error_without_temperature": before}
        extra = {**errors, "risk_coverage": entries}
        print(json.dumps({**result.model_dump(), **extra}))
        return ExitCode.DONE
    _print_evaluation(result, model)
    print(f"calibration error {result.calibration_error:.4f}")
    print(f"  of the full-size pass alone: {before:.4f} without its temperature, {after:.4f} with it")
    _print_coverage(coverage, result.photos)
    for sample, called, confidence in list(metrics.mistakes(answers, readable))[:10]:
        path = str(sample.path).encode(errors="backslashreplace").decode()
        print(f"  classified as {model.classes[called].label} with {confidence:.1%} confidence: {path}")
    return ExitCode.DONE


def _print_evaluation(result: "Evaluation", model: manifest.Manifest) -> None:
    low, high = result.accuracy_interval_95
    print(f"{result.data}: {result.right} of {result.photos} right: {result.accuracy:.2%} ({low:.2%} to {high:.2%})")
    print(f"log-loss {result.log_loss:.4f}")
    for true, row in zip(model.classes, result.confusion, strict=True):
        called = ", ".join(f"{count} as {c.label}" for c, count in zip(model.classes, row, strict=True))
        print(f"  {sum(row)} photos of {true.label}: {called}")


def _print_coverage(coverage: Sequence[manifest.Coverage], photos: int) -> None:
    from trainer.packaging import metrics

    for entry in coverage:
        share = f"{entry.coverage:.0%} of the photos can be sorted"
        print(f"at an error rate of {entry.error_rate:.1%}, {share} (--min-confidence {entry.threshold:g})")
    for sentence in metrics.not_shown(coverage, photos):
        print(sentence)


def _predict(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    from trainer.data.labelled import unlabelled_photos
    from trainer.packaging import evaluate

    if len(model.classes) != 2:
        raise ConfigurationError(
            f"{options.model} has {len(model.classes)} classes and a submission needs two: give another --model"
        )
    photos = unlabelled_photos(options.data)
    # Kaggle scores log-loss, which rewards the better-calibrated full-size pass.
    samples, answers = _classify(options, model, photos, min_confidence=1.0)
    evaluate.write_submission(options.output, samples, answers, options.clip)
    print(f"wrote {len(samples)} rows to {options.output}")
    return ExitCode.DONE if len(samples) == len(photos) else ExitCode.INCOMPLETE


def _export(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    return _export_onnx(options, model) if options.format == "onnx" else _export_folder(options, model)


def _export_onnx(options: argparse.Namespace, model: manifest.Manifest) -> ExitCode:
    import onnxscript  # noqa: F401  torch would report its absence later, and at length

    from sorter.classifier import network
    from trainer.packaging import export

    difference = export.export_onnx(options.output, network.load(options.model, model), model)
    print(f"{options.output}: pixels, uint8 (N, {model.input.size}, {model.input.size}, 3), to probabilities")
    print(f"its probabilities differ from PyTorch's by at most {difference:.1e}")
    return ExitCode.DONE


def _export_folder(options: argparse.Namespace, model: manifest.Manifest) -> ExitCode:
    if options.data is None:
        raise ConfigurationError("the 8-bit network is made from photos: give the model's dataset with --data")
    if options.others is None and model.neither is not None and model.neither.score == "learned":
        raise ConfigurationError(
            f"{options.model} has learned what shows none of its classes: give the photos for that with --others"
        )
    from sorter.classifier import network
    from sorter.processors import available_cpus
    from trainer import build
    from trainer.packaging import package
    from trainer.progress import open_reporter

    reporter = open_reporter(None)
    seed = int(model.training.get("seed", 0))  # divides the dataset as it was for fitting
    source = _source(options, seed)
    dataset = build.load(source, available_cpus(), _cache(), reporter)
    if dataset.classes != model.classes:
        raise ConfigurationError(
            f"{options.data} has other classes than {options.model}: give the model's dataset with --data"
        )
    describe = partial(build.describe_part, source, dataset)
    fitted = network.load(options.model, model)
    written = package.write(options.output, fitted, model, dataset, describe, options.max_lost, reporter).manifest
    if written.int8 is not None:
        agreement = f"{written.int8.agreement:.1%} of {written.int8.photos} calibration photos"
        print(f"{options.output}: the 8-bit network agrees with the 32-bit one on {agreement}")
    return ExitCode.DONE


def _classify(
    options: argparse.Namespace, model: manifest.Manifest, samples: "Sequence[Sample]", min_confidence: float = 0.0
) -> "tuple[Sequence[Sample], Floats]":
    """Classify photos with a progress bar; unreadable ones are reported and left out."""
    from sorter.classifier.engine import open_engine
    from trainer.packaging import evaluate

    engine = open_engine(options.model, model, "auto", options.device, evaluate.BATCH, min_confidence)
    batches = evaluate.classify(engine, samples, model.input.preprocessing)
    total, console = len(samples) / evaluate.BATCH, Console(stderr=True)
    classified = list(track(batches, "classifying", total=total, console=console, transient=True))
    for batch in classified:
        for reason in batch.unreadable:
            sys.stderr.write(f"left out, unreadable: {reason}\n")
    return evaluate.joined(classified)


_ACTIONS = {"fit": _fit, "evaluate": _evaluate, "predict": _predict, "export": _export}
