"""The command line of the trainer."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from sorter import manifest
from sorter.errors import ExitCode, SorterError
from sorter.settings import SHIPPED_MODEL


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="trainer", description="Measures the models that sorter runs.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a model on labelled photos",
        description="Measure a model on labelled photos, through the sorter's own decoder and engine.",
    )
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR", help="has cats/ and dogs/, or labels.csv")
    evaluate.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, metavar="DIR", help="the shipped one if not given"
    )
    evaluate.add_argument("--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda or mps")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; errors are sentences on standard error."""
    options = build_parser().parse_args(arguments)
    try:
        return _evaluate(options)
    except SorterError as error:
        sys.stderr.write(f"trainer: {error}\n")
        return int(error.exit_code)


def _evaluate(options: argparse.Namespace) -> ExitCode:
    model = manifest.read(options.model)
    from sorter.engines import open_engine
    from trainer import evaluate

    samples = evaluate.labelled_photos(options.data, model.classes)
    engine = open_engine(options.model, model, options.device)
    batches = evaluate.probabilities(engine, samples, model.input.preprocessing)
    console = Console(stderr=True)
    shown = track(batches, "classifying", total=len(samples) / evaluate.BATCH, console=console, transient=True)
    answers = evaluate.joined(shown)
    result = evaluate.judge(answers, samples, data=str(options.data), role="test")
    if options.json:
        print(json.dumps(result.model_dump()))
        return ExitCode.DONE
    low, high = result.accuracy_interval_95
    print(f"{result.right} of {result.photos} right: {result.accuracy:.2%} ({low:.2%} to {high:.2%})")
    print(f"log-loss {result.log_loss:.4f}")
    for sample, called, confidence in list(evaluate.mistakes(answers, samples))[:10]:
        print(f"  called {model.classes[called].label} with {confidence:.1%}: {sample.path}")
    return ExitCode.DONE
