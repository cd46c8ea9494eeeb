"""How surely pictures of neither cat nor dog are called one of them, what catches them, and what else might.

    python tests/benchmarks/neither.py --photos DIR [--root /usr] [--test DATA] [--training DATA] [--imagenet FILE]

`--photos` has cats and dogs, labelled, that each threshold is set on: at it, 1 in 100 of them is caught by mistake.
`--test` says how many of others are. `--training` compares scores, those that need fitting fitted on 2,000 photos of
it; `--imagenet` adds a state dict's classifier of 1,000 classes. Tables are in Markdown.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino
from neither_pictures import gather

from sorter.classifier import manifest
from sorter.classifier import outliers as neither
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import Manifest
from sorter.classifier.openvino_engine import hidden, network_files
from sorter.settings import SHIPPED_MODEL
from trainer.data.layouts import Sample, labels_of
from trainer.fitting import features
from trainer.packaging import evaluate

Floats = npt.NDArray[np.float32]
Score = Callable[["Inside"], Floats]
"""The lower, the less like a cat or a dog; (N,)."""

CAUGHT = 0.01
TRAINING_PHOTOS = 2000
# ImageNet's classes of dogs and cats that are kept in houses.
DOGS_AND_CATS = [*range(151, 269), *range(281, 286)]


class Inside:
    """What the 8-bit network makes of photos: logits (N, C), hidden (N, H), features (N, W)."""

    def __init__(self, rows: Floats, classes: int, wide: int) -> None:
        self.logits, self.hidden = rows[:, :classes], rows[:, classes : classes + wide]
        self.features = rows[:, classes + wide :]


class Network:
    """The model's network with its inside turned out."""

    def __init__(self, folder: Path, described: Manifest) -> None:
        files = network_files(described)
        assert files is not None, "a model with a network for processors"
        model = openvino.Core().read_model(folder / files[0])
        first = hidden(model, len(described.head_hidden))
        node = first.get_node()
        while node.get_type_name() not in ("ReduceMean", "AvgPool"):
            node = node.input_value(0).get_node()
        model.add_outputs([first, node.output(0)])
        self._described = described
        self._compiled = openvino.Core().compile_model(model, "CPU")

    def __call__(self, paths: Sequence[Path]) -> Inside:
        """Photos through the sorter's decoder and the network."""
        described, rows = self._described, []
        for pixels in features.batches([Sample(path, 0) for path in paths], described.input.preprocessing):
            found = self._compiled([pixels])
            rows.append(np.concatenate([found[n].reshape(len(pixels), -1) for n in range(3)], 1))
        return Inside(np.concatenate(rows), len(described.classes), described.head_hidden[0])


def softened(logits: Floats, temperature: float = 1.0) -> Floats:
    """The logarithm of the sum of powers, (N,)."""
    scaled = logits / temperature
    most = scaled.max(1)
    found: Floats = most + np.log(np.exp(scaled - most[:, None]).sum(1))
    return found


def roots(rows: Floats) -> Floats:
    """Directions of square roots, so that a few loud features do not decide alone."""
    return neither.directions(np.sqrt(rows.clip(0)))


def scores(
    model: Path, described: Manifest, training: Inside, labels: npt.NDArray[np.intp], imagenet: Path | None
) -> Iterator[tuple[str, Score]]:
    """Everything that is compared."""
    yield (
        "largest probability",
        lambda seen: evaluate.softmax(seen.logits, described.temperature).astype(np.float64).max(1),
    )
    yield "largest logit", lambda seen: seen.logits.max(1)
    yield "energy", lambda seen: softened(seen.logits, described.temperature)
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
    distance = neither.read(model, described)
    yield f"{len(distance.mean)} hidden units, Mahalanobis (the sorter)", lambda seen: -distance(seen.hidden)
    if imagenet is not None:
        import safetensors.numpy

        state = safetensors.numpy.load_file(imagenet)
        weight, bias = state["fc.weight"].astype(np.float32), state["fc.bias"].astype(np.float32)
        inside = np.isin(np.arange(len(bias)), DOGS_AND_CATS)

        def odds(seen: Inside) -> Floats:
            logits = seen.features @ weight.T + bias
            return softened(logits[:, inside]) - softened(logits[:, ~inside])

        yield "ImageNet's classifier, cats and dogs against the rest", odds


def threshold(known: Floats) -> float:
    """Below it is 1 in 100 of the known photos."""
    return float(np.sort(known)[int(CAUGHT * len(known))])


def auroc(known: Floats, others: Floats) -> float:
    """How often a known photo has a higher score than another picture."""
    return float((known[:, None] > others).mean() + (known[:, None] == others).mean() / 2)


def how_sure(model: Path, described: Manifest, groups: dict[str, list[Path]]) -> None:
    """Print how surely the sorter calls each group cats and dogs, and what of it each setting sorts all the same."""
    rate = next(entry for entry in described.risk_coverage if entry.error_rate == 0.01)
    assert described.neither is not None, "a model that tells photos of neither"
    usual = open_engine(model, described, "openvino", "cpu", evaluate.BATCH)
    careful = open_engine(model, described, "openvino", "cpu", evaluate.BATCH, rate.threshold)
    catching = open_engine(model, described, "openvino", "cpu", evaluate.BATCH, catch_neither=True)
    print("| | pictures | median | above 0.9 | above 0.99 | caught: error rate 0.01 | caught: neither | both |")
    print("|---|---|---|---|---|---|---|---|")
    for name, paths in groups.items():
        batches = list(features.batches([Sample(path, 0) for path in paths], described.input.preprocessing))
        sure = np.concatenate([usual.classify(pixels).max(1) for pixels in batches])
        unsure = np.concatenate([careful.classify(pixels).max(1) < rate.threshold for pixels in batches])
        judged = [catching.classify_with_distance(pixels) for pixels in batches]
        caught = np.concatenate([distances > described.neither.threshold for _, distances in judged])
        shares = [(sure > 0.9), (sure > 0.99), unsure, caught, unsure | caught]
        print(f"| {name} | {len(paths)} | {np.median(sure):.3f} |", *(f"{share.mean():.0%} |" for share in shares))


def compare(
    network: Network,
    ways: Sequence[tuple[str, Score]],
    photos: Sequence[Path],
    groups: dict[str, list[Path]],
) -> None:
    """Print what each score catches at its threshold, and its AUROC."""
    known, others = network(photos), {name: network(paths) for name, paths in groups.items() if paths}
    print("\n| score | " + " | ".join(f"{name}: caught | AUROC" for name in others) + " |")
    print("|---|" + "---|---|" * len(others))
    for name, score in ways:
        sure = score(known)
        least = threshold(sure)
        found = [score(inside) for inside in others.values()]
        print(f"| {name} |", *(f"{(f < least).mean():.0%} | {auroc(sure, f):.3f} |" for f in found))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure photos of neither.")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("/usr"))
    parser.add_argument("--test", type=Path)
    parser.add_argument("--training", type=Path)
    parser.add_argument("--imagenet", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    options = parser.parse_args()
    described = manifest.read(options.model)
    photos = [sample.path for sample in evaluate.labelled_photos(options.photos, described.classes)]
    with tempfile.TemporaryDirectory() as scratch:
        groups = gather(options.root, Path(scratch))
        known = {"cats and dogs, calibration": photos}
        if options.test is not None:
            known["cats and dogs, test"] = [
                sample.path for sample in evaluate.labelled_photos(options.test, described.classes)
            ]
        missing = [name for name, paths in groups.items() if not paths]
        print("".join(f"no {name} here: see neither_pictures.py for the packages\n" for name in missing), end="")
        how_sure(options.model, described, {name: paths for name, paths in (groups | known).items() if paths})
        if options.training is not None:
            found = evaluate.labelled_photos(options.training, described.classes)
            some = random.Random(0).sample(found, min(len(found), TRAINING_PHOTOS))
            network = Network(options.model, described)
            seen, labels = network([sample.path for sample in some]), labels_of(some)
            compare(network, list(scores(options.model, described, seen, labels, options.imagenet)), photos, groups)


if __name__ == "__main__":
    main()
