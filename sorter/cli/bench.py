"""`sorter bench`: its options, and its report on standard output. `sorter.bench` does the measuring."""

import argparse
import signal
import sys
from pathlib import Path

from sorter.cli import options
from sorter.errors import ExitCode
from sorter.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter bench`."""
    group = parser.add_argument_group("what to measure")
    group.add_argument("--photos", metavar="DIR", type=Path, help="sort copies of these (default: generated photos)")
    group.add_argument(
        "--count",
        metavar="N",
        type=options.positive,
        default=500,
        help="number of copies; photos are repeated as needed (default: 500)",
    )
    group.add_argument(
        "--runs", metavar="N", type=options.positive, default=3, help="number of runs to take medians of (default: 3)"
    )
    group.add_argument("--json", dest="as_json", action="store_true", help="print a line of JSON")


def bench(settings: Settings, *, photos: Path | None, count: int, runs: int, as_json: bool) -> ExitCode:
    """Measure how fast this machine sorts.

    Raises:
        SorterError: the model, the photos or a setting cannot be used.
    """
    from sorter.bench import report  # imports the pipeline, which takes a while

    for number in (signal.SIGINT, signal.SIGTERM):  # the copies are removed in both cases
        signal.signal(number, signal.default_int_handler)
    try:
        measured = report.measure(settings, photos, count, runs, lambda text: print(text, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        sys.stderr.write("sorter: interrupted before anything was measured; the copies have been removed\n")
        return ExitCode.INCOMPLETE
    print(report.as_json(measured) if as_json else report.as_text(measured))
    return ExitCode.DONE
