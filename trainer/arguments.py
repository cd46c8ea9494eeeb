"""The options of the trainer's commands. Imports no PyTorch, so that `--help` works without it."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from sorter.settings import SHIPPED_MODEL

RECIPES = ("head", "finetune", "notebook")
ARCHITECTURES = (
    "alexnet",
    "vgg16",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "squeezenet1_1",
    "densenet121",
    "inception_v3",
    "googlenet",
    "shufflenet_v2_x1_0",
    "mobilenet_v2",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mnasnet1_0",
)
"""`network.ARCHITECTURES`, whose module imports PyTorch; `RECIPES` likewise."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the full command line."""
    parser = argparse.ArgumentParser(
        prog="trainer", description="Makes and measures the models that sorter runs, from folders of labelled photos."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    _add_fit(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_export(commands)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=30, width=min(98, shutil.get_terminal_size((98, 24)).columns))


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="make a model folder from a dataset, or a better one from corrections",
        description="Make a model folder, including report.html, from a dataset of labelled photos. Or, with "
        "--corrections, fit the head of a model further on what was said in sorter review.",
        formatter_class=_formatter,
    )
    data = fit.add_argument_group("data")
    _add_dataset(data)
    data.add_argument("--output", type=Path, required=True, metavar="DIR", help="model folder to write")
    data.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    _add_corrections(fit.add_argument_group("corrections"))
    _add_network(fit.add_argument_group("network"))
    _add_fitting(fit.add_argument_group("fitting"))
    _add_machine(fit.add_argument_group("machine"))


def _add_corrections(group: Any) -> None:
    group.add_argument(
        "--corrections",
        type=Path,
        metavar="DIR",
        help="output folder of sorter, with the history of its photos and of the verdicts on them",
    )
    group.add_argument(
        "--base",
        type=Path,
        default=SHIPPED_MODEL,
        metavar="DIR",
        help="model folder whose head is fitted further (default: the shipped one)",
    )
    group.add_argument("--state-dir", type=Path, metavar="DIR", help="where the history is, if sorter has --state-dir")


def without_corrections(options: argparse.Namespace) -> list[str]:
    """The given flags that fit a new model, and mean nothing where one is fitted further on corrections."""
    defaults = build_parser().parse_args(["fit", "--output", "model"])
    known = {"command", "output", "data", "corrections", "base", "state_dir", "seed", "num_workers", "tensorboard"}
    return [
        "--" + name.replace("_", "-")
        for name, default in vars(defaults).items()
        if name not in known and getattr(options, name) != default
    ]


def _add_network(network: Any) -> None:
    network.add_argument(
        "--arch", default="resnet50", choices=ARCHITECTURES, metavar="NAME", help=", ".join(ARCHITECTURES)
    )
    network.add_argument(
        "--weights", default="imagenet", metavar="W", help="imagenet (default), none, or a file with a state dict"
    )
    network.add_argument(
        "--head", default="mlp", choices=("mlp", "linear"), help="mlp (default: 270 and 90 hidden units) or linear"
    )
    network.add_argument("--image-size", type=_side, default=224, metavar="PX", help="side of the input (default: 224)")
    network.add_argument(
        "--crop", choices=("squash", "center"), help="squash the full photo, or crop its center (default: the recipe's)"
    )


def _add_fitting(fitting: Any) -> None:
    fitting.add_argument(
        "--recipe",
        default="head",
        choices=RECIPES,
        help="head (default): the head alone, in minutes; finetune: then all layers; notebook: the published baseline",
    )
    fitting.add_argument(
        "--epochs", type=_count, metavar="N", help="maximum epochs in the last stage (default: the recipe's)"
    )
    fitting.add_argument(
        "--batch-size", type=_count, metavar="N", help="photos per step in the last stage (default: the recipe's)"
    )
    fitting.add_argument(
        "--lr", type=_rate, metavar="RATE", help="highest learning rate of the last stage (default: the recipe's)"
    )
    fitting.add_argument(
        "--budget-minutes", type=_rate, metavar="M", help="shorten the stage on photos to end within this time"
    )
    fitting.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="the same seed gives the same model (default: 0)"
    )


def _add_machine(machine: Any) -> None:
    machine.add_argument("--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda or mps")
    machine.add_argument("--compile", action="store_true", help="compile kernels with torch.compile first")
    machine.add_argument(
        "--num-workers",
        type=_natural,
        metavar="N",
        help="processes that inspect and augment photos (default: one per core)",
    )
    machine.add_argument("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard event files there")


def _add_dataset(group: Any) -> None:
    group.add_argument("--data", type=Path, metavar="DIR|ZIP", help="dataset, in any layout of trainer/README.md")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR|CSV",
        help="labelled photos for temperature and thresholds (default: a tenth of the training part)",
    )
    _add_others(group)


def _add_others(group: Any) -> None:
    group.add_argument(
        "--others",
        type=Path,
        metavar="DIR",
        help="photos that show none of the classes, from which --catch-neither learns what to catch",
    )
    group.add_argument(
        "--max-lost",
        type=_margin,
        default=0.01,
        metavar="SHARE",
        help="share of the calibration photos that --catch-neither may take for others (default: 0.01)",
    )


def _count(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, not {value}")
    return value


def _side(text: str) -> int:
    value = int(text)
    if not 16 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"must be from 16 to 1024, not {value}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**32 - 1}, not {value}")
    return value


def _margin(text: str) -> float:
    value = float(text)
    if not 0 <= value < 0.5:
        raise argparse.ArgumentTypeError(f"must be from 0 to less than 0.5, not {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, not {text}")
    return value


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a model on labelled photos",
        description="Measure a model on labelled photos, through the sorter's own decoder and engine.",
        formatter_class=_formatter,
    )
    evaluate.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR|ZIP|CSV",
        help="dataset, of which the test part is used; folder with cats/ and dogs/, or with labels.csv",
    )
    _add_model(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--csv", type=Path, metavar="FILE", help="write the probabilities of each photo")


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="write the Kaggle competition's submission.csv",
        description="Classify photos and write id,label rows; label is the second class's probability (dog).",
        formatter_class=_formatter,
    )
    predict.add_argument("--data", type=Path, required=True, metavar="DIR", help="photos named 1.jpg, 2.jpg …")
    predict.add_argument("--output", type=Path, required=True, metavar="CSV", help="file to write")
    _add_model(predict)
    predict.add_argument(
        "--clip", type=_margin, default=0.005, metavar="P", help="clip probabilities to P and 1 - P (default: 0.005)"
    )


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="rebuild a model folder, or write it as ONNX",
        description="Rebuild a model folder, its 8-bit network made from a dataset; or write a model as one ONNX file.",
        formatter_class=_formatter,
    )
    export.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder to read")
    export.add_argument("--output", type=Path, required=True, metavar="PATH", help="folder, or file.onnx, to write")
    export.add_argument("--format", default="folder", choices=("folder", "onnx"), help="folder (default) or onnx")
    export.add_argument(
        "--data", type=Path, metavar="DIR|ZIP", help="for folder: the dataset that the model was fitted on"
    )
    export.add_argument("--calibration", type=Path, metavar="DIR|CSV", help="as in trainer fit")
    _add_others(export)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, metavar="DIR", help="model folder (default: the shipped one)"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda or mps")
