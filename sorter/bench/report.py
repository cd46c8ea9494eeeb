"""Measures everything in turn, and reports the medians as JSON or as text."""

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sorter import extras
from sorter.bench import parts, photos, programs
from sorter.bench.programs import Sorted
from sorter.classifier import manifest as manifests
from sorter.classifier.engine import Engine, open_engine
from sorter.classifier.manifest import Manifest
from sorter.decoding.decoders import default_workers
from sorter.processors import available_cpus
from sorter.settings import Settings

_MAX_COMPARED = _MAX_IN_MEMORY = 500


@dataclass(frozen=True, slots=True)
class Report:
    """Medians, in photos per second unless the name says otherwise.

    Attributes:
        distinct: photos that are not copies of another.
        of_what_the_parts_allow: `sorter` as a share of 1 / (1 / classify + 1 / decode), the most that CPU cores doing
            both can reach; None on a GPU.
        loader_loop: a plain loop whose photos are decoded by a data loader, in one process for each CPU core.
        plain_loop: the same loop in a single process.
        loader_ratio, plain_ratio: how many times as fast the sorter is. These and the loops are None if PyTorch is not
            installed; `compared` and `differing` are 0 then.
        differing: of the compared photos, those that the plain loop sorted into another folder.
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
    loader_loop: float | None
    loader_ratio: float | None
    plain_loop: float | None
    plain_ratio: float | None
    compared: int
    differing: int
    start_seconds: float
    peak_mb: float
    sorter_runs: tuple[float, ...]
    loader_loop_runs: tuple[float, ...]
    plain_loop_runs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Setup:
    """What every run measures with.

    Attributes:
        work: a temporary folder; `all` in it has `count` copies, `some` has those that the plain loops sort.
        pixels: decoded photos, uint8 (N, S, S, 3).
        compared: the number of photos in `some`; 0 without the plain loops.
    """

    settings: Settings
    model: Manifest
    engine: Engine
    work: Path
    count: int
    distinct: int
    pixels: npt.NDArray[np.uint8]
    compared: int


@dataclass(frozen=True, slots=True)
class _Run:
    """What one run measured, in photos per second; the loops are None without PyTorch."""

    sorted: Sorted
    decode: float
    classify: float
    move: float
    loader_loop: float | None
    plain_loop: float | None
    differing: int


def measure(
    settings: Settings, source: Path | None, count: int, runs: int, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Measure with copies of the photos in a folder, or with generated photos.

    Args:
        settings: the model, engine, device and batch size.
        source: the folder; None to generate photos.
        count: how many copies to sort.
        runs: how often to measure.
        say: called with each step.

    Raises:
        SorterError: the model, the photos or a setting cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="sorter-bench-") as name:
        setup = _prepare(settings, source, count, Path(name), say)
        found = []
        for number in range(1, runs + 1):
            say(f"run {number} of {runs}")
            found.append(_measure_once(setup))
    return _report(setup, found)


def _prepare(settings: Settings, source: Path | None, count: int, work: Path, say: Callable[[str], None]) -> _Setup:
    model = manifests.read(settings.model)
    say("copying photos" if source else "generating photos")
    originals = photos.find(source) if source else photos.generate(work / "generated")
    photos.copy(originals, work / "all", count)
    pixels = parts.pixels(originals[: min(count, _MAX_IN_MEMORY)], model)
    compared = 0
    if programs.has_torch():
        compared = min(len(originals), _MAX_COMPARED, count)
        photos.copy(originals[:compared], work / "some", compared)
    else:
        say(f"skipping: {extras.hint('the plain loop', 'gpu')}")
    engine = open_engine(settings.model, model, settings.engine, settings.device, settings.batch_size)
    return _Setup(settings, model, engine, work, count, min(count, len(originals)), pixels, compared)


def _measure_once(setup: _Setup) -> _Run:
    """Measure each part and program once; afterwards the copies are where they were."""
    settings, work = setup.settings, setup.work
    loader_loop = plain_loop = None
    expected: dict[str, str] = {}
    if setup.compared:
        loader_loop, _ = _sort_plainly(setup, workers=available_cpus())
        plain_loop, expected = _sort_plainly(setup, workers=0)
    flags = ["--model", str(settings.model.absolute()), "--engine", settings.engine, "--device", settings.device]
    flags += ["--batch-size", str(settings.batch_size)]
    result = programs.sort(work / "all", flags, work / "log")
    found = programs.folders(work / "all")
    photos.gather(work / "all", work / "back")
    decode = parts.decode(work / "back", setup.model, default_workers())
    classify = parts.classify(setup.engine, setup.pixels, settings.batch_size)
    move = parts.move(work / "back", work / "moved", setup.model, settings.batch_size)
    photos.gather(work / "moved", work / "all")
    (work / "back").rmdir()
    differing = sum(found.get(photo) != folder for photo, folder in expected.items())
    return _Run(result, decode, classify, move, loader_loop, plain_loop, differing)


def _sort_plainly(setup: _Setup, workers: int) -> tuple[float, dict[str, str]]:
    """A plain loop's photos per second, and the folder that it chose for each photo."""
    some, back = setup.work / "some", setup.work / "back"
    rate = programs.plain_loop(setup.settings.model.absolute(), some, setup.settings.batch_size, workers)
    chosen = programs.folders(some)
    photos.gather(some, back)
    back.rename(some)
    return rate, chosen


def _report(setup: _Setup, runs: Sequence[_Run]) -> Report:
    sorter, classify, decode, move = (
        statistics.median(rates)
        for rates in zip(*((run.sorted.rate, run.classify, run.decode, run.move) for run in runs), strict=True)
    )
    plain_loop_runs = tuple(run.plain_loop for run in runs if run.plain_loop is not None)
    loader_loop_runs = tuple(run.loader_loop for run in runs if run.loader_loop is not None)
    plain_loop = statistics.median(plain_loop_runs) if plain_loop_runs else None
    loader_loop = statistics.median(loader_loop_runs) if loader_loop_runs else None
    engine = setup.engine
    return Report(
        photos=setup.count,
        distinct=setup.distinct,
        runs=len(runs),
        processors=available_cpus(),
        model=setup.model.name,
        image_size=setup.model.input.size,
        engine=f"{engine.name} on {engine.device}, {engine.precision}",
        decode=decode,
        classify=classify,
        move=move,
        sorter=sorter,
        of_what_the_parts_allow=sorter * (1 / classify + 1 / decode) if engine.device == "cpu" else None,
        loader_loop=loader_loop,
        loader_ratio=None if loader_loop is None else sorter / loader_loop,
        plain_loop=plain_loop,
        plain_ratio=None if plain_loop is None else sorter / plain_loop,
        compared=setup.compared,
        differing=runs[-1].differing,
        start_seconds=statistics.median(run.sorted.start_seconds for run in runs),
        peak_mb=max(run.sorted.peak_mb for run in runs),
        sorter_runs=tuple(run.sorted.rate for run in runs),
        loader_loop_runs=loader_loop_runs,
        plain_loop_runs=plain_loop_runs,
    )


def as_json(report: Report) -> str:
    """A report as one line of JSON."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(report).items()}
    for runs in ("sorter_runs", "loader_loop_runs", "plain_loop_runs"):
        rounded[runs] = [round(value, 3) for value in getattr(report, runs)]
    return json.dumps(rounded)


def as_text(report: Report) -> str:
    """A report as a few lines for a person."""
    share = report.of_what_the_parts_allow
    rows = [
        ("decoder alone", _rate(report.decode)),
        ("engine alone", f"{_rate(report.classify)}   {report.engine}"),
        ("mover alone", _rate(report.move)),
        ("sorter", _rate(report.sorter) + (f"   {share:.0%} of what decoder and engine allow" if share else "")),
    ]
    if report.loader_loop is None or report.plain_loop is None:
        rows.append(("plain loops", f"not measured: {extras.hint('it', 'gpu')}"))
    else:
        loops = (
            ("data loader", report.loader_loop, report.loader_ratio, f"with {report.processors} workers"),
            ("plain loop", report.plain_loop, report.plain_ratio, "in one process"),
        )
        for name, rate, ratio, how in loops:
            rows.append((name, f"{_rate(rate)}   a plain loop {how}: sorter is {ratio:.1f} times as fast"))
        rows.append(("other labels", f"{report.differing:8} of {report.compared}"))
    rows += [
        ("peak memory", f"{report.peak_mb:8.0f} MB"),
        ("start", f"{report.start_seconds:8.1f} s until the first photo is sorted"),
    ]
    head = f"{report.photos} photos ({report.distinct} distinct), {report.model} at {report.image_size} px, "
    head += f"{report.processors} CPU cores, medians of {report.runs} runs"
    return "\n".join([head, *(f"  {name:<15} {value}" for name, value in rows)])


def _rate(photos_per_second: float) -> str:
    return f"{photos_per_second:8.1f} photos/s"
