"""The command line of the trainer."""

import argparse
import json
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from sorter import manifest
from sorter.errors import ConfigurationError, ExitCode, SorterError
from sorter.network import ARCHITECTURES
from sorter.settings import SHIPPED_MODEL

if TYPE_CHECKING:
    from trainer.data import Sample
    from trainer.evaluate import Floats
    from trainer.fit import Epoch


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="trainer", description="Makes and measures the models that sorter runs, from folders of labelled photos."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    _add_fit(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=30, width=min(98, shutil.get_terminal_size((98, 24)).columns))


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="make a model folder from a dataset",
        description="Make a model folder, with report.html in it, from a dataset of labelled photos.",
        formatter_class=_formatter,
    )
    fit.set_defaults(action=_fit)
    data = fit.add_argument_group("data")
    data.add_argument("--data", type=Path, required=True, metavar="DIR|ZIP", help="dataset; its layout is recognised")
    data.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR|CSV",
        help="photos for temperature and thresholds (default: a tenth of the training part)",
    )
    data.add_argument("--output", type=Path, required=True, metavar="DIR", help="model folder to write")
    network = fit.add_argument_group("network")
    network.add_argument(
        "--arch", default="resnet50", choices=ARCHITECTURES, metavar="NAME", help=", ".join(ARCHITECTURES)
    )
    network.add_argument(
        "--weights", default="imagenet", metavar="W", help="imagenet (default), none, or a state dict's file"
    )
    network.add_argument(
        "--head", default="mlp", choices=("mlp", "linear"), help="mlp (default: 270 and 90 hidden units) or linear"
    )
    network.add_argument("--image-size", type=int, default=224, metavar="PX", help="side of the input (default: 224)")
    fitting = fit.add_argument_group("fitting")
    fitting.add_argument("--epochs", type=int, metavar="N", help="at most (default: 30)")
    fitting.add_argument("--batch-size", type=int, metavar="N", help="photos a step (default: 256)")
    fitting.add_argument("--lr", type=float, metavar="RATE", help="highest learning rate (default: 0.001)")
    fitting.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same model (default: 0)"
    )
    fitting.add_argument(
        "--num-workers", type=int, metavar="N", help="processes that inspect files (default: all cores)"
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a model on labelled photos",
        description="Measure a model on labelled photos, through the sorter's own decoder and engine.",
        formatter_class=_formatter,
    )
    evaluate.set_defaults(action=_evaluate)
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR", help="has cats/ and dogs/, or labels.csv")
    _add_model(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="write the Kaggle competition's submission.csv",
        description="Classify unlabelled photos and write id,label, the probability of the second class (dog).",
        formatter_class=_formatter,
    )
    predict.set_defaults(action=_predict)
    predict.add_argument("--data", type=Path, required=True, metavar="DIR", help="photos named 1.jpg, 2.jpg …")
    predict.add_argument("--output", type=Path, required=True, metavar="CSV", help="file to write")
    _add_model(predict)
    predict.add_argument(
        "--clip", type=float, default=0.005, metavar="P", help="keep away from 0 and 1 by this much (default: 0.005)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL, metavar="DIR", help="default: the shipped one")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda or mps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; errors are sentences on standard error."""
    options = build_parser().parse_args(arguments)
    options.command_line = shlex.join(["trainer", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        return int(options.action(options))
    except ModuleNotFoundError as error:
        sys.stderr.write(f"trainer: {error.name} is missing: install the extra, pip install 'catdog-sorter[train]'\n")
        return int(ExitCode.USAGE)
    except SorterError as error:
        sys.stderr.write(f"trainer: {error}\n")
        return int(error.exit_code)


def _fit(options: argparse.Namespace) -> ExitCode:
    warnings.simplefilter("ignore")  # of libraries about libraries; a person can do nothing about them
    from sorter.engines.torch_engine import available_cpus
    from trainer import build, fit

    recipe_flags = {"epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}
    for flag, value in {**recipe_flags, "image_size": options.image_size}.items():
        if value is not None and value <= 0:
            raise ConfigurationError(f"--{flag.replace('_', '-')}: should be greater than 0, not {value}")
    chosen = build.Options(
        data=options.data,
        output=options.output,
        architecture=options.arch,
        weights=options.weights,
        head_hidden=build.MLP_HEAD if options.head == "mlp" else (),
        image_size=options.image_size,
        calibration=options.calibration,
        recipe=fit.Recipe(**{flag: value for flag, value in recipe_flags.items() if value is not None}),
        seed=options.seed,
        workers=options.num_workers or available_cpus(),
        cache=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "catdog-sorter",
        command=options.command_line,
    )
    written = build.build(chosen, _reporter())
    test = written.evaluations[1]
    low, high = test.accuracy_interval_95
    print(f"{test.right} of {test.photos} test photos right: {test.accuracy:.2%} ({low:.2%} to {high:.2%})")
    print(f"log-loss {test.log_loss:.4f}, temperature {written.temperature}")
    for entry in written.risk_coverage:
        share = f"{entry.coverage:.0%} of the photos are sorted"
        print(f"at {entry.error_rate:.1%} errors {share} with --min-confidence {entry.threshold}")
    print(f"model folder {options.output}, report {options.output / 'report.html'}")
    print(f"try it: sorter run --once --model {shlex.quote(str(options.output))} --inbox DIR")
    return ExitCode.DONE


def _reporter() -> Any:
    from trainer.build import Reporter

    console = Console(stderr=True)

    class Terminal(Reporter):
        """Bars and lines for a person."""

        def say(self, text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        def epoch(self, epoch: "Epoch") -> None:
            console.print(
                f"epoch {epoch.epoch:>3}  loss {epoch.training_loss:.4f}  accuracy {epoch.training_accuracy:.4f}  "
                f"validation loss {epoch.validation_loss:.4f}  accuracy {epoch.validation_accuracy:.4f}",
                highlight=False,
            )

        def track(self, items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
            return track(items, what, total=total, console=console, transient=True)

    class Lines(Reporter):
        """One JSON object a line for a program."""

        def say(self, text: str) -> None:
            print(json.dumps({"event": "note", "text": text}), file=sys.stderr, flush=True)

        def epoch(self, epoch: "Epoch") -> None:
            from dataclasses import asdict

            print(json.dumps({"event": "epoch", **asdict(epoch)}), file=sys.stderr, flush=True)

    return Terminal() if console.is_terminal else Lines()


def _evaluate(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    from trainer import evaluate

    samples = evaluate.labelled_photos(options.data, model.classes)
    answers = _classify(options, model, samples)
    result = evaluate.judge(answers, samples, data=str(options.data), role="test")
    if options.json:
        print(json.dumps(result.model_dump()))
        return ExitCode.DONE
    low, high = result.accuracy_interval_95
    print(f"{result.right} of {result.photos} right: {result.accuracy:.2%} ({low:.2%} to {high:.2%})")
    print(f"log-loss {result.log_loss:.4f}, calibration error {result.calibration_error:.4f}")
    for sample, called, confidence in list(evaluate.mistakes(answers, samples))[:10]:
        print(f"  called {model.classes[called].label} with {confidence:.1%}: {sample.path}")
    return ExitCode.DONE


def _predict(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    from trainer import evaluate

    samples = evaluate.unlabelled_photos(options.data)
    answers = _classify(options, model, samples)
    evaluate.write_submission(options.output, samples, answers, options.clip)
    print(f"{len(samples)} photos in {options.output}")
    return ExitCode.DONE


def _classify(options: argparse.Namespace, model: manifest.Manifest, samples: "Sequence[Sample]") -> "Floats":
    """Open the model and classify photos, with a progress bar."""
    from sorter.engines import open_engine
    from trainer import evaluate

    engine = open_engine(options.model, model, options.device)
    batches = evaluate.probabilities(engine, samples, model.input.preprocessing)
    total, console = len(samples) / evaluate.BATCH, Console(stderr=True)
    return evaluate.joined(track(batches, "classifying", total=total, console=console, transient=True))
