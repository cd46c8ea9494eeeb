"""`report.html`, one file with curves, tables and photos; and the model card.

In: a manifest, a dataset, and its test part's probabilities. Out: HTML and Markdown as text.
"""

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sorter.classifier.manifest import Manifest, Neither
from sorter.decoding.images import Limits, Preprocessing, decode
from trainer.data.layouts import Sample, labels_of
from trainer.data.split import Dataset
from trainer.packaging import metrics
from trainer.packaging.metrics import Floats, Labels
from trainer.packaging.outliers import Distances
from trainer.progress import Epoch

GALLERY_PHOTOS = 24
_THUMBNAIL = Preprocessing(150)


def card(manifest: Manifest) -> str:
    """The model card, Markdown."""
    return _template("card.md").render(
        manifest=manifest, uses=_uses(manifest), rates=any(table.rates for table in manifest.error_rates)
    )


def _uses(manifest: Manifest) -> dict[str, str]:
    """What the photos of each evaluation were used for, by its role."""
    chosen = ["temperatures", "8 or 16 bits"]
    if manifest.cascade:
        chosen.append("the cascade's sizes, temperatures and thresholds")
    if manifest.neither is not None:
        chosen.append("the outlier detector's threshold")
    chosen.append("thresholds for error rates")
    return {"calibration": ", ".join(chosen), "test": "nothing was tuned on them"}


def page(
    manifest: Manifest,
    dataset: Dataset,
    epochs: Sequence[Epoch],
    tested: Floats,
    *,
    calibration_errors: tuple[float, float],
    distances: Distances | None,
) -> str:
    """The report.

    Args:
        manifest: as written.
        dataset: its parts, and what was left out of it.
        epochs: of all stages.
        tested: probabilities of the test part, (N, C).
        calibration_errors: of the full-size pass on the calibration part, without and with its temperature.
        distances: of the outlier detector; None if there is none.
    """
    labels = labels_of(dataset.test)
    wrong = list(metrics.mistakes(tested, dataset.test))[:GALLERY_PHOTOS]
    least_confident = [int(i) for i in np.argsort(tested.max(1))[:GALLERY_PHOTOS]]
    names = [c.label for c in manifest.classes]
    rates = manifest.rates_of("openvino", catch_neither=False) or ()
    return _template("report.html").render(
        manifest=manifest,
        dataset=dataset,
        names=names,
        curves=_svg(_curves(epochs)),
        reliability=_svg(_reliability(tested, labels)),
        coverage=_svg(_coverage(tested, labels)),
        calibration_errors=calibration_errors,
        rates=rates,
        not_shown=metrics.not_shown(rates, len(dataset.calibration)),
        mistakes=[_photo(sample, _called(names[called], confidence)) for sample, called, confidence in wrong],
        least_confident=[
            _photo(dataset.test[i], _called(names[int(tested[i].argmax())], tested[i].max())) for i in least_confident
        ],
        **_outliers(manifest, dataset, distances),
    )


def _outliers(manifest: Manifest, dataset: Dataset, distances: Distances | None) -> dict[str, Any]:
    """The curve and the photos of the outlier detector, for the template."""
    if manifest.neither is None or distances is None:
        return {"caught_and_lost": "", "nearest": [], "farthest": []}
    others = dataset.others.held_out
    nearest = np.argsort(distances.others, kind="stable")[:GALLERY_PHOTOS]
    farthest = np.argsort(-distances.calibration, kind="stable")[:GALLERY_PHOTOS]
    return {
        "caught_and_lost": _svg(_caught_and_lost(distances, manifest.neither)) if others else "",
        "nearest": [_photo(others[i], f"distance {distances.others[i]:.2f}") for i in nearest],
        "farthest": [_photo(dataset.calibration[i], f"distance {distances.calibration[i]:.2f}") for i in farthest],
    }


def _caught_and_lost(distances: Distances, neither: Neither) -> Figure:
    """The share of other photos that are caught, by the share of the classes' photos that is lost."""
    figure, axes = plt.subplots(figsize=(4, 3.6))
    thresholds = np.unique(np.concatenate([distances.calibration, distances.others]))
    lost, caught = (
        1 - np.searchsorted(np.sort(each), thresholds, side="right") / len(each)
        for each in (distances.calibration, distances.others)
    )
    axes.plot(lost, caught)
    axes.plot([neither.caught], [neither.others_caught], marker="o")
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_xlabel("share of the classes' photos lost")
    axes.set_ylabel("share of other photos caught")
    return figure


def _called(label: str, confidence: float) -> str:
    return f"classified as {label}, confidence {confidence:.1%}"


def _template(name: str) -> jinja2.Template:
    text = (files("trainer.packaging") / "templates" / name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(text)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _curves(epochs: Sequence[Epoch]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    numbers = range(1, len(epochs) + 1)  # over all stages
    for axes, figure_name in ((left, "loss"), (right, "accuracy")):
        axes.plot(numbers, [getattr(epoch, f"training_{figure_name}") for epoch in epochs], label="training")
        axes.plot(numbers, [getattr(epoch, f"validation_{figure_name}") for epoch in epochs], label="validation")
        axes.set_xlabel("epoch")
        axes.set_title(figure_name)
        axes.legend()
    return figure


def _reliability(probabilities: Floats, labels: Labels) -> Figure:
    """Accuracy by confidence; a calibrated model is on the diagonal."""
    figure, axes = plt.subplots(figsize=(4, 3.6))
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    edges = np.linspace(1 / probabilities.shape[1], 1, 11)
    bins = np.clip(np.digitize(confidence, edges) - 1, 0, 9)
    points = [(confidence[bins == b].mean(), right[bins == b].mean()) for b in range(10) if (bins == b).any()]
    axes.plot([edges[0], 1], [edges[0], 1], color="grey", linestyle="--")
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    return figure


def _coverage(probabilities: Floats, labels: Labels) -> Figure:
    """The error rate among the most confident photos, by the share of photos that are sorted."""
    figure, axes = plt.subplots(figsize=(4, 3.6))
    order = np.argsort(-probabilities.max(1), kind="stable")
    wrong = (probabilities.argmax(1) != labels)[order].cumsum()
    taken = np.arange(1, len(labels) + 1)
    axes.plot(taken / len(labels), wrong / taken)
    axes.set_xlabel("share of photos sorted")
    axes.set_ylabel("error rate")
    return figure


def _photo(sample: Sample, caption: str) -> dict[str, str]:
    with sample.path.open("rb") as file:
        picture: Image.Image = decode(file.fileno(), _THUMBNAIL, Limits())
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    name = sample.path.name.encode(errors="backslashreplace").decode()
    return {
        "name": name,
        "caption": caption,
        "source": f"data:image/jpeg;base64,{encoded}",
    }
