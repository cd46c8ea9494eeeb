"""Measures everything in turn and says what came out."""

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sorter.bench import parts, photos, whole
from sorter.classifier import manifest as manifests
from sorter.classifier.engine import open_engine
from sorter.decoding.decoders import default_workers
from sorter.processors import available_cpus
from sorter.settings import Settings

_MOST_COMPARED, _MOST_IN_MEMORY = 500, 500


@dataclass(frozen=True, slots=True)
class Report:
    """Medians; photos a second where nothing else is said.

    Attributes:
        of_what_the_parts_allow: `sorter` as a share of 1 / (1 / engine + 1 / decode), which is what processors can do
            that have to do both; None on a GPU.
        plain_loop, ratio, compared, differing: None or 0 where the plain loop is not there, as in an installation
            without the sources.
        differing: photos, of those compared, that the plain loop sorted into another folder.
    """

    photos: int
    distinct: int
    runs: int
    processors: int
    model: str
    image_size: int
    engine: str
    decode: float
    classify: float
    move: float
    sorter: float
    of_what_the_parts_allow: float | None
    plain_loop: float | None
    ratio: float | None
    compared: int
    differing: int
    start_seconds: float
    peak_mb: float
    sorter_runs: tuple[float, ...]
    plain_loop_runs: tuple[float, ...]


def measure(
    chosen: Settings, source: Path | None, count: int, runs: int, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Measure with copies of the photos in `source`, or with generated ones.

    Raises:
        SorterError: the model, the photos or a setting cannot be used.
    """
    model = manifests.read(chosen.model)
    flags = ["--model", str(chosen.model.absolute()), "--engine", chosen.engine, "--device", chosen.device]
    flags += ["--batch-size", str(chosen.batch_size)]
    with tempfile.TemporaryDirectory(prefix="sorter-bench-") as name:
        work = Path(name)
        say("copying photos" if source else "generating photos")
        originals = photos.find(source) if source else photos.generate(work / "generated")
        photos.copy(originals, work / "all", count)
        pixels = parts.pixels(originals[: min(count, _MOST_IN_MEMORY)], model)
        compared = originals[:_MOST_COMPARED] if whole.PLAIN_LOOP.exists() else []
        photos.copy(compared, work / "some", min(len(compared), count))
        decode, classify, move, plain, sorts = [], [], [], [], []
        differing = 0
        for run in range(1, runs + 1):
            say(f"run {run} of {runs}")
            if compared:
                plain.append(whole.plain_loop(chosen.model.absolute(), work / "some", chosen.batch_size))
                expected = whole.folders(work / "some")
                photos.gather(work / "some", work / "back")
                (work / "back").rename(work / "some")
            sorts.append(whole.sort(work / "all", flags, work / "log"))
            got = whole.folders(work / "all")
            differing = sum(got.get(photo) != folder for photo, folder in expected.items()) if compared else 0
            photos.gather(work / "all", work / "back")
            decode.append(parts.decode(work / "back", model, default_workers()))
            engine = open_engine(chosen.model, model, chosen.engine, chosen.device, chosen.batch_size)
            classify.append(parts.classify(engine, pixels, chosen.batch_size))
            move.append(parts.move(work / "back", work / "moved", model, chosen.batch_size))
            photos.gather(work / "moved", work / "all")
            (work / "back").rmdir()
    sorter, alone = statistics.median(s.rate for s in sorts), statistics.median(classify)
    allowed = 1 / (1 / alone + 1 / statistics.median(decode))
    return Report(
        photos=count,
        distinct=min(count, len(originals)),
        runs=runs,
        processors=available_cpus(),
        model=model.name,
        image_size=model.input.size,
        engine=f"{engine.name} on {engine.device}, {engine.precision}",
        decode=statistics.median(decode),
        classify=alone,
        move=statistics.median(move),
        sorter=sorter,
        of_what_the_parts_allow=sorter / allowed if engine.device == "cpu" else None,
        plain_loop=statistics.median(plain) if plain else None,
        ratio=sorter / statistics.median(plain) if plain else None,
        compared=min(len(compared), count),
        differing=differing,
        start_seconds=statistics.median(s.start_seconds for s in sorts),
        peak_mb=max(s.peak_mb for s in sorts),
        sorter_runs=tuple(s.rate for s in sorts),
        plain_loop_runs=tuple(plain),
    )


def as_json(report: Report) -> str:
    """One line."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(report).items()}
    for runs in ("sorter_runs", "plain_loop_runs"):
        rounded[runs] = [round(value, 3) for value in getattr(report, runs)]
    return json.dumps(rounded)


def as_text(report: Report) -> str:
    """A few lines for a person."""
    rows = [
        ("decode alone", f"{report.decode:8.1f} photos/s"),
        ("engine alone", f"{report.classify:8.1f} photos/s   {report.engine}"),
        ("move alone", f"{report.move:8.1f} photos/s"),
        ("the sorter", f"{report.sorter:8.1f} photos/s"),
    ]
    if report.of_what_the_parts_allow is not None:
        rows[-1] = (
            rows[-1][0],
            f"{rows[-1][1]}   {report.of_what_the_parts_allow:.0%} of what decoder and engine allow",
        )
    if report.plain_loop is None:
        rows.append(("the plain loop", "it comes with the sources, and they are not here"))
    else:
        rows.append(
            ("the plain loop", f"{report.plain_loop:8.1f} photos/s   the sorter is {report.ratio:.1f} times as fast")
        )
        rows.append(("other labels", f"{report.differing:8} of {report.compared}"))
    rows += [
        ("memory", f"{report.peak_mb:8.0f} MB at most"),
        ("start", f"{report.start_seconds:8.1f} s to the first photo"),
    ]
    head = f"{report.photos} photos ({report.distinct} different), {report.model} at {report.image_size} px, "
    head += f"{report.processors} processors, medians of {report.runs} runs"
    return "\n".join([head, *(f"  {name:<15} {value}" for name, value in rows)])
