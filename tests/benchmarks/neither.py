"""How many photos of neither `--catch-neither` catches, by kind, and how many cats and dogs it loses.

    python tests/benchmarks/neither.py --others DIR [--model DIR] [--test DATA] [--origin CSV]

`--others` has photos that show none of the classes, whose names begin with what they show and an underscore
(`vehicle_00012.jpg`); `--origin` is a table with their `file` and `repo`, of which only those of `--repo NAME` are
taken. `--test` has labelled photos. The table is in Markdown.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sorter.classifier import manifest
from sorter.classifier.engine import open_engine
from sorter.settings import SHIPPED_MODEL
from trainer.data.labelled import dataset_photos
from trainer.data.layouts import Sample
from trainer.data.others import find
from trainer.packaging import metrics
from trainer.packaging.outliers import distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=Path, required=True)
    parser.add_argument("--origin", type=Path)
    parser.add_argument("--repo", action="append", default=[])
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--test", type=Path)
    options = parser.parse_args()
    model = manifest.read(options.model)
    engine = open_engine(options.model, model, "openvino", "cpu", 32, catch_neither=True)

    def caught(paths: Sequence[Path]) -> np.ndarray:
        return distances(engine, [Sample(path, 0) for path in paths], model.input) > 0

    paths = find(options.others)
    if options.origin is not None:
        with options.origin.open(newline="") as table:
            wanted = {row["file"] for row in csv.DictReader(table) if not options.repo or row["repo"] in options.repo}
        paths = [path for path in paths if path.name in wanted]
    all_caught, kinds = caught(paths), defaultdict(list)
    for path, is_caught in zip(paths, all_caught.tolist(), strict=True):
        kinds[path.name.partition("_")[0]].append(is_caught)
    print("| photos of | number | caught |\n|---|---|---|")
    for kind, found in sorted(kinds.items()):
        print(f"| {kind} | {len(found)} | {np.mean(found):.0%} |")
    print(f"| all | {len(paths)} | {all_caught.mean():.1%} |")
    if options.test is not None:
        name, samples = dataset_photos(options.test, model.classes, Path.home() / ".cache" / "sorter" / "datasets")
        lost = int(caught([sample.path for sample in samples]).sum())
        low, high = metrics.wilson(lost, len(samples))
        print(f"\nlost: {lost} of {len(samples)}, {name} ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
