"""What a person said of sorted photos, as photos to learn from and photos to judge by.

In: the history of an output, which is only read, and its photos. Out: `Verdicts`. A photo is held out by its digest, so
that it never changes sides: not when it is moved, and not in a later fit with more verdicts.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sorter.classifier.manifest import Class
from sorter.errors import ConfigurationError
from sorter.history.verdicts_reader import VerdictsReader
from trainer.data import inspection
from trainer.data.inspection import Inspection
from trainer.data.layouts import Sample
from trainer.data.split import without_copies
from trainer.progress import Reporter

MIN_VERDICTS, MIN_HELD_OUT, MIN_TRAINING = 50, 15, 15
CONFIDENT = 0.99
"""A photo that was sorted with this confidence, and that nobody has corrected, counts as sorted rightly."""
CONFIDENT_PHOTOS = 2000
_HELD_OUT_BYTES = 77
"""A photo is held out if the first byte of its digest is smaller: 30 % of them."""


@dataclass(frozen=True, slots=True)
class Photos:
    """Photos in two parts.

    Attributes:
        training: to learn from; no near copy of a photo with a verdict that is held out is among them.
        held_out: to judge by.
    """

    training: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The photos of one output, by what is known of them.

    Attributes:
        judged: with a verdict, which is their label.
        confident: without one, sorted confidently: the model's label is theirs. As many of each class as there are, up
            to an equal share of `CONFIDENT_PHOTOS`.
        neither: those that show none of the classes; their labels mean nothing.
        left_out: files that cannot be used, each with the reason.
        inspected: of all these.
    """

    judged: Photos
    confident: Photos
    neither: tuple[Sample, ...]
    left_out: tuple[tuple[str, str], ...]
    inspected: dict[Path, Inspection] = field(repr=False)


@dataclass(slots=True)
class _Found:
    """Photos in the history, before any is opened: those judged have the digest of what the person saw."""

    judged: list[tuple[Sample, str]] = field(default_factory=list)
    confident: list[Sample] = field(default_factory=list)
    neither: list[tuple[Sample, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def read(
    output: Path,
    state_dir: Path | None,
    classes: Sequence[Class],
    seed: int,
    cache: Path,
    workers: int,
    reporter: Reporter,
) -> Verdicts:
    """Find the photos with verdicts, and those that were sorted confidently, where they are now.

    Args:
        output: the folder that has `cats/` and the others.
        state_dir: where the history is, if not in the output.
        classes: of the model.
        seed: of the draw of confident photos.
        cache: for inspected photos.
        workers: processes that inspect photos.
        reporter: shows progress.

    Raises:
        ConfigurationError: there is no history, or there are too few verdicts.
    """
    found = _find(output, state_dir, classes, seed)
    paths = [sample.path for sample in (*(one for one, _ in (*found.judged, *found.neither)), *found.confident)]
    inspected = inspection.inspect_all(paths, cache, workers, reporter.tracker("inspecting photos"))

    def usable(given: Sequence[tuple[Sample, str]]) -> list[Sample]:
        for sample, digest in given:
            one = inspected[sample.path]
            if one.reason is not None:
                found.left_out.append((str(sample.path), one.reason))
            elif one.digest != digest:
                found.left_out.append((str(sample.path), "it is not the photo that the verdict is on"))
        return [s for s, digest in given if inspected[s.path].reason is None and inspected[s.path].digest == digest]

    with_verdict, neither = usable(found.judged), usable(found.neither)
    divided = _divided(with_verdict, inspected)
    training, copies = without_copies(divided.training, divided.held_out, inspected)
    found.left_out += [(str(copy.path), f"it is a near copy of {copy.of}, which is held out") for copy in copies]
    judged = Photos(tuple(training), divided.held_out)
    _check_numbers(output, judged, len(copies))
    known = {inspected[sample.path].digest for sample in (*with_verdict, *neither)}
    confident = _divided(
        [s for s in found.confident if inspected[s.path].reason is None and inspected[s.path].digest not in known],
        inspected,
    )
    rehearsal, _ = without_copies(confident.training, judged.held_out, inspected)
    return Verdicts(
        judged=judged,
        confident=Photos(tuple(rehearsal), confident.held_out),
        neither=tuple(neither),
        left_out=tuple(found.left_out),
        inspected=inspected,
    )


def _find(output: Path, state_dir: Path | None, classes: Sequence[Class], seed: int) -> _Found:
    """The photos that the history names and that are where it says."""
    reader = VerdictsReader(output, state_dir)
    found = _Found()
    index = {known.label: number for number, known in enumerate(classes)}
    try:
        for verdict in reader.verdicts():
            path = Path(verdict.path)
            if not _is_file(path):
                found.left_out.append((verdict.path, "it is not there any more"))
            elif verdict.label is None:
                found.neither.append((Sample(path, 0), verdict.digest.hex()))
            elif verdict.label in index:
                found.judged.append((Sample(path, index[verdict.label]), verdict.digest.hex()))
            else:
                found.left_out.append((verdict.path, f"{verdict.label} is no class of the model"))
        wanted = CONFIDENT_PHOTOS // len(classes)
        for label, number in index.items():
            # Twice as many as are wanted, because some may be gone or changed.
            entries = reader.confident(label, CONFIDENT, seed, 2 * wanted)
            unchanged = [e for e in entries if _is_file(Path(e.destination)) and e.has_version(os.lstat(e.destination))]
            found.confident += [Sample(Path(entry.destination), number) for entry in unchanged[:wanted]]
    finally:
        reader.close()
    return found


def _is_file(path: Path) -> bool:
    """Whether a path is a regular file, and no link or FIFO: opening that could lead elsewhere, or wait for ever."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _divided(samples: Sequence[Sample], inspected: dict[Path, Inspection]) -> Photos:
    is_held_out = [bytes.fromhex(inspected[sample.path].digest)[0] < _HELD_OUT_BYTES for sample in samples]
    training = tuple(sample for sample, held in zip(samples, is_held_out, strict=True) if not held)
    return Photos(training, tuple(sample for sample, held in zip(samples, is_held_out, strict=True) if held))


def _check_numbers(output: Path, judged: Photos, copies: int) -> None:
    training, held_out = len(judged.training), len(judged.held_out)
    if training + held_out >= MIN_VERDICTS and held_out >= MIN_HELD_OUT and training >= MIN_TRAINING:
        return
    without = f", without {copies} near copies of these" if copies else ""
    raise ConfigurationError(
        f"{output} has {training + held_out} usable verdicts that name a class, and {held_out} of them would be held "
        f"out{without}: at least {MIN_VERDICTS} and {MIN_HELD_OUT} are needed, and {MIN_TRAINING} to learn from; look "
        "at more photos with sorter review; photos moved by hand count once it has been started since"
    )
