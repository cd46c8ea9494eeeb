"""How many photos of neither a learned `--catch-neither` catches on sources that it was not learned from, by kind.

    python tests/benchmarks/unseen_sources.py --classes DIR --others DIR --origin CSV --calibration DIR [--model DIR]

Each source of the photos in `--others` is left out in turn: the detector is learned from the other sources and the
photos of the classes, on the model's features, its threshold is chosen on the calibration photos, and what it catches
of that source is counted. `--origin` is a table with the `file` and `repo` of each photo; names of photos begin with
what they show and an underscore (`vehicle_00012.jpg`). The tables are in Markdown.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino

from sorter.classifier import manifest
from sorter.classifier.openvino_graph import layer_output
from sorter.settings import SHIPPED_MODEL
from trainer.data.labelled import labelled_photos
from trainer.data.layouts import Sample
from trainer.data.others import find
from trainer.fitting import features
from trainer.fitting.features import Floats
from trainer.packaging import outliers

LOST = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("classes", "others", "origin", "calibration"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    options = parser.parse_args()
    model = manifest.read(options.model)
    network = openvino.Core().read_model(options.model / "openvino.xml")
    output = layer_output(network, "features", len(model.head_hidden))
    run = features.on_openvino(openvino.Model([output], network.get_parameters()))

    def answers(samples: Sequence[Sample]) -> Floats:
        return features.answers(run, samples, model.input.preprocessing)

    with options.origin.open(newline="") as table:
        sources = {row["file"]: row["repo"] for row in csv.DictReader(table)}
    paths = [path for path in find(options.others) if path.name in sources]
    source = np.array([sources[path.name] for path in paths])
    kind = np.array([path.name.partition("_")[0] for path in paths])
    classes, calibration = (
        answers(labelled_photos(folder, model.classes)) for folder in (options.classes, options.calibration)
    )
    others = answers([Sample(path, 0) for path in paths])
    caught = np.zeros(len(paths), bool)
    for left_out in sorted(set(source)):
        detector = outliers.learned(classes, others[source != left_out])
        threshold = outliers.describe(detector, detector(calibration), others[:0, 0], LOST).threshold
        caught[source == left_out] = detector(others[source == left_out]) > threshold
    for column, title in ((kind, "photos of"), (source, "source left out")):
        print(f"| {title} | number | caught |\n|---|---|---|")
        for value in sorted(set(column)):
            print(f"| {value} | {(column == value).sum()} | {caught[column == value].mean():.1%} |")
        print(f"| all | {len(paths)} | {caught.mean():.1%} |\n")


if __name__ == "__main__":
    main()
