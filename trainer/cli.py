"""The command line of the trainer."""

import argparse
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

from sorter.classifier import manifest
from sorter.errors import ConfigurationError, ExitCode, SorterError
from trainer.arguments import build_parser

if TYPE_CHECKING:
    from sorter.classifier.manifest import Evaluation
    from trainer.data.layouts import Sample
    from trainer.fitting.recipes import Recipe
    from trainer.packaging.evaluate import Floats

_EXTRAS = {"tensorboard": "tensorboard", "onnx": "onnx", "onnxscript": "onnx"}
"""Modules that another extra than `train` brings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; errors are sentences on standard error."""
    options = build_parser().parse_args(arguments)
    options.command_line = shlex.join(["trainer", *(sys.argv[1:] if arguments is None else arguments)])
    warnings.simplefilter("ignore")  # of libraries about libraries; a person can do nothing about them
    try:
        return int(_ACTIONS[options.command](options))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).split(".")[0], "train")
        sys.stderr.write(f"trainer: {error.name} is missing: install the extra, pip install 'catdog-sorter[{extra}]'\n")
        return int(ExitCode.USAGE)
    except SorterError as error:
        sys.stderr.write(f"trainer: {error}\n")
        return int(error.exit_code)
    except OSError as error:
        sys.stderr.write(f"trainer: {error.filename or 'the output'}: {error.strerror}; make room or mend it\n")
        return int(ExitCode.STOPPED)
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on" if options.command == "fit" else ""
        sys.stderr.write(f"trainer: interrupted{hint}\n")
        return int(ExitCode.INCOMPLETE)


def _fit(options: argparse.Namespace) -> ExitCode:
    from sorter.processors import available_cpus
    from trainer import build
    from trainer.fitting.options import MLP_HEAD, Options
    from trainer.progress import open_reporter

    chosen = Options(
        data=options.data,
        output=options.output,
        architecture=options.arch,
        weights=options.weights,
        head_hidden=MLP_HEAD if options.head == "mlp" else (),
        image_size=options.image_size,
        crop=options.crop,
        calibration=options.calibration,
        recipe=_recipe(options),
        seed=options.seed,
        device=options.device,
        compile=options.compile,
        workers=available_cpus() if options.num_workers is None else options.num_workers,
        budget_minutes=options.budget_minutes,
        resume=options.resume,
        cache=_cache(),
        command=options.command_line,
    )
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one writes
    written = build.build(chosen, open_reporter(options.tensorboard if is_first else None))
    if written is None:
        return ExitCode.DONE
    test = written.evaluations[1]
    low, high = test.accuracy_interval_95
    print(f"{test.right} of {test.photos} test photos right: {test.accuracy:.2%} ({low:.2%} to {high:.2%})")
    print(f"log-loss {test.log_loss:.4f}, temperature {written.temperature}")
    _print_coverage(written.risk_coverage)
    print(f"model folder {options.output}, report {options.output / 'report.html'}")
    print(f"try it: sorter run --once --model {shlex.quote(str(options.output))} --inbox DIR")
    return ExitCode.DONE


def _recipe(options: argparse.Namespace) -> "Recipe":
    """The recipe, its last stage as the flags say."""
    from trainer.fitting import recipes

    recipe = recipes.RECIPES[options.recipe]
    given = {"epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}
    last = replace(recipe.stages[-1], **{name: value for name, value in given.items() if value is not None})
    return replace(recipe, stages=(*recipe.stages[:-1], last))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "catdog-sorter"


def _evaluate(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    from trainer.data.layouts import labels_of
    from trainer.packaging import cascade as first_look
    from trainer.packaging import evaluate

    what, samples = evaluate.dataset_photos(options.data, model.classes, _cache())
    readable, answers = _classify(options, model, samples)
    result = evaluate.judge(answers, readable, data=what, role="test")
    labels = labels_of(readable)
    untempered = evaluate.softmax(evaluate.log(answers), 1 / model.temperature)
    before = evaluate.calibration_error(untempered, labels)
    whole = _classify(options, model, readable, min_confidence=1.0)[1] if model.first_look else answers
    coverage = first_look.risk_coverage(answers, whole, labels, model.first_look)
    if options.csv is not None:
        evaluate.write_answers(options.csv, readable, answers, model.classes)
    if options.json:
        entries = [entry.model_dump() for entry in coverage]
        extra = {"calibration_error_without_temperature": before, "risk_coverage": entries}
        print(json.dumps({**result.model_dump(), **extra}))
        return ExitCode.DONE
    _print_evaluation(result, model)
    print(f"calibration error {before:.4f} without the temperature, {result.calibration_error:.4f} with it")
    _print_coverage(coverage)
    for sample, called, confidence in list(evaluate.mistakes(answers, readable))[:10]:
        path = str(sample.path).encode(errors="backslashreplace").decode()
        print(f"  called {model.classes[called].label} with {confidence:.1%}: {path}")
    return ExitCode.DONE


def _print_evaluation(result: "Evaluation", model: manifest.Manifest) -> None:
    low, high = result.accuracy_interval_95
    print(f"{result.data}: {result.right} of {result.photos} right: {result.accuracy:.2%} ({low:.2%} to {high:.2%})")
    print(f"log-loss {result.log_loss:.4f}")
    for label, row in zip(model.classes, result.confusion, strict=True):
        called = ", ".join(f"{count} called {c.label}" for c, count in zip(model.classes, row, strict=True))
        print(f"  of {sum(row)} photos of {label.label}: {called}")


def _print_coverage(coverage: Sequence[manifest.Coverage]) -> None:
    for entry in coverage:
        share = f"{entry.coverage:.0%} of the photos are sorted"
        print(f"at {entry.error_rate:.1%} errors {share} with --min-confidence {entry.threshold}")


def _predict(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    from trainer.packaging import evaluate

    if len(model.classes) != 2:
        raise ConfigurationError(f"{options.model} has {len(model.classes)} classes: a submission is about two")
    photos = evaluate.unlabelled_photos(options.data)
    # It is judged by the log-loss, which thanks for the confidence of whole looks.
    samples, answers = _classify(options, model, photos, min_confidence=1.0)
    evaluate.write_submission(options.output, samples, answers, options.clip)
    print(f"{len(samples)} photos in {options.output}")
    return ExitCode.DONE if len(samples) == len(photos) else ExitCode.INCOMPLETE


def _export(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    from sorter.classifier import network

    if options.format == "onnx":
        import onnxscript  # noqa: F401  torch asks for it late and at length

        from trainer.packaging import export

        difference = export.export_onnx(options.output, network.load(options.model, model), model)
        print(f"{options.output}: pixels, uint8 (N, {model.input.size}, {model.input.size}, 3), to probabilities")
        print(f"OpenVINO's probabilities differ from PyTorch's by at most {difference:.1e}")
        return ExitCode.DONE
    if options.data is None:
        raise ConfigurationError("the 8-bit network is made from photos: name the model's dataset with --data")
    from sorter.processors import available_cpus
    from trainer import build
    from trainer.packaging import package
    from trainer.progress import open_reporter

    reporter = open_reporter(None)
    seed = int(model.training.get("seed", 0))  # the parts as they were when it was fitted
    dataset = build.load(options.data, options.calibration, seed, available_cpus(), _cache(), reporter)
    if dataset.classes != model.classes:
        raise ConfigurationError(f"{options.data} has other classes than {options.model}: name the model's dataset")
    named = partial(build.name_of, options.data, options.calibration, dataset)
    fitted = network.load(options.model, model)
    written = package.write(options.output, fitted, model, dataset, named, reporter).manifest
    if written.int8 is not None:
        agreement = f"{written.int8.agreement:.1%} of {written.int8.photos} calibration photos"
        print(f"{options.output}: the 8-bit network agrees with the 32-bit one on {agreement}")
    return ExitCode.DONE


def _classify(
    options: argparse.Namespace, model: manifest.Manifest, samples: "Sequence[Sample]", min_confidence: float = 0.0
) -> "tuple[Sequence[Sample], Floats]":
    """Open the model and classify photos, with a progress bar; those that cannot be read are named and left out."""
    from sorter.classifier.engine import open_engine
    from trainer.packaging import evaluate

    engine = open_engine(options.model, model, "auto", options.device, evaluate.BATCH, min_confidence)
    batches = evaluate.probabilities(engine, samples, model.input.preprocessing)
    total, console = len(samples) / evaluate.BATCH, Console(stderr=True)
    found = list(track(batches, "classifying", total=total, console=console, transient=True))
    for _, _, unreadable in found:
        for reason in unreadable:
            sys.stderr.write(f"left out, unreadable: {reason}\n")
    return evaluate.joined(found)


_ACTIONS = {"fit": _fit, "evaluate": _evaluate, "predict": _predict, "export": _export}
