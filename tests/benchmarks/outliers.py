"""How confidently pictures that show neither a cat nor a dog are classified, what catches them, and what else might.

    python tests/benchmarks/outliers.py --photos DIR [--root /usr] [--test DATA] [--training DATA] [--imagenet FILE]

`--photos` has labelled cats and dogs, on which each threshold is set to catch 1 in 100 of them by mistake. `--test`
measures how many of other cats and dogs are caught. `--training` compares scores; those that are fitted are fitted on
2,000 of its photos. `--imagenet` adds the classifier of 1,000 classes in a state dict. The tables are in Markdown.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino
from outliers_pictures import gather

from sorter.classifier import manifest, outliers
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import Manifest
from sorter.classifier.openvino_engine import network_files
from sorter.classifier.openvino_graph import hidden_output
from sorter.settings import SHIPPED_MODEL
from trainer.data.labelled import labelled_photos
from trainer.data.layouts import Sample, labels_of
from trainer.fitting import features
from trainer.packaging import evaluate, metrics

Floats = npt.NDArray[np.float32]
Score = Callable[["Activations"], Floats]
"""The lower, the less like a cat or a dog; (N,)."""

CAUGHT = 0.01
TRAINING_PHOTOS = 2000
# ImageNet's classes of dogs and domestic cats.
DOGS_AND_CATS = [*range(151, 269), *range(281, 286)]


class Activations:
    """Of the 8-bit network, for photos: logits (N, C), hidden (N, H), features (N, W)."""

    def __init__(self, rows: Floats, classes: int, hidden_units: int) -> None:
        self.logits, self.hidden = rows[:, :classes], rows[:, classes : classes + hidden_units]
        self.features = rows[:, classes + hidden_units :]


class Network:
    """The model's network, with its hidden layers as outputs."""

    def __init__(self, folder: Path, described: Manifest) -> None:
        files = network_files(described)
        assert files is not None, "the model has no network for OpenVINO"
        model = openvino.Core().read_model(folder / files[0])
        first = hidden_output(model, len(described.head_hidden))
        node = first.get_node()
        while node.get_type_name() not in ("ReduceMean", "AvgPool"):
            node = node.input_value(0).get_node()
        model.add_outputs([first, node.output(0)])
        self._described = described
        self._compiled = openvino.Core().compile_model(model, "CPU")

    def __call__(self, paths: Sequence[Path]) -> Activations:
        """Run photos through the sorter's decoder and the network."""
        described, rows = self._described, []
        for pixels in features.batches([Sample(path, 0) for path in paths], described.input.preprocessing):
            found = self._compiled([pixels])
            rows.append(np.concatenate([found[n].reshape(len(pixels), -1) for n in range(3)], 1))
        return Activations(np.concatenate(rows), len(described.classes), described.head_hidden[0])


def log_sum_exp(logits: Floats, temperature: float = 1.0) -> Floats:
    """The logarithm of the sum of exponentials, (N,)."""
    scaled = logits / temperature
    most = scaled.max(1)
    found: Floats = most + np.log(np.exp(scaled - most[:, None]).sum(1))
    return found


def roots(rows: Floats) -> Floats:
    """Directions of square roots, so that a few large features do not decide alone."""
    return outliers.directions(np.sqrt(rows.clip(0)))


def scores(
    model: Path, described: Manifest, training: Activations, labels: npt.NDArray[np.intp], imagenet: Path | None
) -> Iterator[tuple[str, Score]]:
    """Every score that is compared, with its name."""
    yield (
        "largest probability",
        lambda seen: metrics.softmax(seen.logits, described.temperature).astype(np.float64).max(1),
    )
    yield "largest logit", lambda seen: seen.logits.max(1)
    yield "energy", lambda seen: log_sum_exp(seen.logits, described.temperature)
    means = np.stack([training.features[labels == label].mean(0) for label in range(len(described.classes))])
    yield (
        "2,048 features, nearest class's mean",
        lambda seen: -np.linalg.norm(seen.features[:, None] - means, axis=2).min(1),
    )
    plain = np.linalg.eigh(np.cov(training.features - means[labels], rowvar=False))
    white = plain[1] / np.sqrt(plain[0].clip(0) + 0.01 * plain[0].mean())
    yield (
        "… Mahalanobis",
        lambda seen: -np.linalg.norm((seen.features[:, None] - means) @ white, axis=2).min(1),
    )
    known = roots(training.features)
    yield (
        f"… fifth nearest of {len(known):,} photos, square roots",
        lambda seen: np.sort(roots(seen.features) @ known.T, 1)[:, -5],
    )
    distance = outliers.read(model, described)
    yield f"{len(distance.mean)} hidden units, Mahalanobis (the sorter)", lambda seen: -distance(seen.hidden)
    if imagenet is not None:
        import safetensors.numpy

        state = safetensors.numpy.load_file(imagenet)
        weight, bias = state["fc.weight"].astype(np.float32), state["fc.bias"].astype(np.float32)
        inside = np.isin(np.arange(len(bias)), DOGS_AND_CATS)

        def odds(seen: Activations) -> Floats:
            logits = seen.features @ weight.T + bias
            return log_sum_exp(logits[:, inside]) - log_sum_exp(logits[:, ~inside])

        yield "ImageNet's classifier, cats and dogs against the rest", odds


def threshold(known: Floats) -> float:
    """The score below which 1 in 100 of the known photos lies."""
    return float(np.sort(known)[int(CAUGHT * len(known))])


def auroc(known: Floats, others: Floats) -> float:
    """The share of pairs in which the known photo has a higher score than the outlier."""
    return float((known[:, None] > others).mean() + (known[:, None] == others).mean() / 2)


def print_confidence(model: Path, described: Manifest, groups: dict[str, list[Path]]) -> None:
    """Print how confidently the sorter classifies each group, and the share that each setting catches."""
    rates = described.rates_of("openvino", catch_neither=False) or ()
    rate = next(entry for entry in rates if entry.error_rate == 0.01)
    assert described.neither is not None, "the model has no outlier detector"
    usual = open_engine(model, described, "openvino", "cpu", evaluate.BATCH)
    careful = open_engine(model, described, "openvino", "cpu", evaluate.BATCH, rate.threshold)
    catching = open_engine(model, described, "openvino", "cpu", evaluate.BATCH, catch_neither=True)
    print(
        "| | pictures | median | above 0.9 | above 0.99 | caught: error rate 0.01 | caught: outlier detector | both |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, paths in groups.items():
        batches = list(features.batches([Sample(path, 0) for path in paths], described.input.preprocessing))
        confidence = np.concatenate([usual.classify(pixels).max(1) for pixels in batches])
        unsure = np.concatenate([careful.classify(pixels).max(1) < rate.threshold for pixels in batches])
        distances = np.concatenate([catching.classify_with_distance(pixels)[1] for pixels in batches])
        caught = distances > described.neither.threshold
        shares = [(confidence > 0.9), (confidence > 0.99), unsure, caught, unsure | caught]
        print(
            f"| {name} | {len(paths)} | {np.median(confidence):.3f} |", *(f"{share.mean():.0%} |" for share in shares)
        )


def compare(
    network: Network,
    scores: Sequence[tuple[str, Score]],
    photos: Sequence[Path],
    groups: dict[str, list[Path]],
) -> None:
    """Print the share that each score catches at its threshold, and its AUROC."""
    known, others = network(photos), {name: network(paths) for name, paths in groups.items() if paths}
    print("\n| score | " + " | ".join(f"{name}: caught | AUROC" for name in others) + " |")
    print("|---|" + "---|---|" * len(others))
    for name, score in scores:
        known_scores = score(known)
        lowest = threshold(known_scores)
        found = [score(activations) for activations in others.values()]
        print(f"| {name} |", *(f"{(f < lowest).mean():.0%} | {auroc(known_scores, f):.3f} |" for f in found))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how outliers are classified and caught.")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("/usr"))
    parser.add_argument("--test", type=Path)
    parser.add_argument("--training", type=Path)
    parser.add_argument("--imagenet", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    options = parser.parse_args()
    described = manifest.read(options.model)
    photos = [sample.path for sample in labelled_photos(options.photos, described.classes)]
    with tempfile.TemporaryDirectory() as scratch:
        groups = gather(options.root, Path(scratch))
        known = {"cats and dogs, calibration": photos}
        if options.test is not None:
            known["cats and dogs, test"] = [sample.path for sample in labelled_photos(options.test, described.classes)]
        missing = [name for name, paths in groups.items() if not paths]
        print(
            "".join(f"no {name} found: outliers_pictures.py names the packages that have them\n" for name in missing),
            end="",
        )
        print_confidence(options.model, described, {name: paths for name, paths in (groups | known).items() if paths})
        if options.training is not None:
            found = labelled_photos(options.training, described.classes)
            fitted_on = random.Random(0).sample(found, min(len(found), TRAINING_PHOTOS))
            network = Network(options.model, described)
            seen, labels = network([sample.path for sample in fitted_on]), labels_of(fitted_on)
            compare(network, list(scores(options.model, described, seen, labels, options.imagenet)), photos, groups)


if __name__ == "__main__":
    main()
