"""The cascade, a low-resolution pass before the full-size one: how it runs, and how the trainer chooses it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import GREEN, RED, make_tree, plain
from pictures import smooth, tinted
from pydantic import ValidationError
from torch import nn

from sorter.classifier import manifest as manifests
from sorter.classifier.manifest import Coverage, Input, LowResolutionPass, Manifest
from sorter.classifier.openvino_engine import OpenVinoEngine
from sorter.settings import SHIPPED_MODEL
from trainer.cli import main
from trainer.data.layouts import Sample
from trainer.fitting import features
from trainer.packaging import cascade, metrics
from trainer.packaging.cascade import Candidate
from trainer.progress import Reporter

pytestmark = pytest.mark.usefixtures("own_cache")

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(smooth(seed, (144, 144))) for seed in range(24)])


def with_threshold(shipped: Manifest, threshold: float) -> Manifest:
    low = shipped.cascade[0].model_copy(update={"threshold": threshold})
    return shipped.model_copy(update={"cascade": (low,)})


def test_the_shipped_model_has_a_cascade(shipped: Manifest) -> None:
    assert shipped.cascade
    assert shipped.cascade[-1].agreement >= 0.998


def test_photos_with_low_confidence_get_the_full_size_pass(shipped: Manifest, pixels: npt.NDArray[np.uint8]) -> None:
    first = OpenVinoEngine(SHIPPED_MODEL, with_threshold(shipped, 0.0)).classify(pixels)
    full = OpenVinoEngine(SHIPPED_MODEL, shipped, min_confidence=1.0).classify(pixels)
    assert np.abs(first - full).max() > 0.01, "the passes differ, so that the test can fail"
    threshold = float(np.median(first.max(1)))
    mixed = OpenVinoEngine(SHIPPED_MODEL, with_threshold(shipped, threshold)).classify(pixels)
    sure = first.max(1) >= threshold
    assert 0 < sure.sum() < len(pixels)
    assert np.allclose(mixed, np.where(sure[:, None], first, full), atol=1e-4)


def test_a_minimum_confidence_above_the_threshold_skips_the_low_resolution_pass(
    shipped: Manifest, pixels: npt.NDArray[np.uint8]
) -> None:
    quick = with_threshold(shipped, 0.4)
    full = OpenVinoEngine(SHIPPED_MODEL, shipped, min_confidence=1.0).classify(pixels)
    assert np.allclose(OpenVinoEngine(SHIPPED_MODEL, quick, min_confidence=0.41).classify(pixels), full, atol=1e-4)
    assert not np.allclose(OpenVinoEngine(SHIPPED_MODEL, quick, min_confidence=0.4).classify(pixels), full, atol=1e-2)


def test_a_low_resolution_pass_that_is_not_smaller_is_refused(shipped: Manifest) -> None:
    content = shipped.model_dump()
    content["cascade"][0]["size"] = content["input"]["size"]
    with pytest.raises(ValidationError, match="not smaller than the next"):
        Manifest.model_validate(content)


class _Redness(nn.Module):
    """How much redder than green a picture is, at any size; confident except in a narrow band of colours."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(40.0))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised float (N, 3, S, S) to logits (N, 2)."""
        mean = pixels.mean((2, 3))
        redder = self.scale * (mean[:, 0] - mean[:, 1])
        return torch.stack([redder, -redder], 1)


SEEN = Input(size=32, crop="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def samples(folder: Path, count: int) -> list[Sample]:
    files = {f"{n}.jpg": plain(RED if n % 2 else GREEN, n) for n in range(count)}
    make_tree(folder, files)
    return [Sample(folder / name, 0 if n % 2 else 1) for n, name in enumerate(files)]


def test_a_low_resolution_pass_that_gives_the_same_labels_is_chosen(tmp_path: Path) -> None:
    model, photos = features.convert(_Redness(), SEEN.mean, SEEN.std, SEEN.size), samples(tmp_path, 300)
    before = model.input().partial_shape
    full = features.answers(features.on_openvino(model), photos, SEEN.preprocessing)
    (look,) = cascade.choose(model, full, photos, SEEN, Reporter())
    assert (look.size, look.photos, look.enough, look.agreement) == (16, 300, 1.0, 1.0)
    assert model.input().partial_shape == before, "the model itself is not changed"


def test_a_low_resolution_pass_that_gives_other_labels_is_not_chosen(tmp_path: Path) -> None:
    model, photos = features.convert(_Redness(), SEEN.mean, SEEN.std, SEEN.size), samples(tmp_path, 300)
    full = features.answers(features.on_openvino(model), photos, SEEN.preprocessing)
    assert cascade.choose(model, full[:, ::-1], photos, SEEN, Reporter()) == ()


def test_with_too_few_photos_there_is_no_cascade(tmp_path: Path) -> None:
    model, photos = features.convert(_Redness(), SEEN.mean, SEEN.std, SEEN.size), samples(tmp_path, 299)
    full = features.answers(features.on_openvino(model), photos, SEEN.preprocessing)
    assert cascade.choose(model, full, photos, SEEN, Reporter()) == ()


def test_the_threshold_is_the_lowest_that_changes_few_enough_labels() -> None:
    cases: list[tuple[list[float], int, float]] = [
        ([], 500, 0.9),
        ([0.95], 500, 0.9),  # one of 500 may change
        ([0.95], 499, 0.9501),
        ([0.99, 0.97, 0.93], 500, 0.9701),
        ([1.0, 1.0], 500, 1.0),
        ([0.5, 0.6, 0.7], 500, 0.9),
    ]
    for changed_at, count, expected in cases:
        confidence = np.full(count, 0.96, np.float32)
        confidence[: len(changed_at)] = changed_at
        changed = np.arange(count) < len(changed_at)
        threshold = cascade.lowest_threshold(confidence, changed, int(cascade.MAX_CHANGED * count))
        assert threshold == pytest.approx(expected, abs=1e-4), changed_at
        if expected < 1:
            assert (changed & (confidence >= threshold)).sum() <= 0.002 * count, changed_at


def answers_of(confidence: float, count: int, wrong: int) -> Floats:
    """Answers for photos of class 0."""
    answers = np.tile(np.array([confidence, 1 - confidence], np.float32), (count, 1))
    answers[:wrong] = answers[:wrong, ::-1]
    return answers


def passes(*thresholds: float) -> tuple[LowResolutionPass, ...]:
    return tuple(
        LowResolutionPass(size=64 + 16 * n, temperature=1.0, threshold=each, photos=2000, enough=0.5, agreement=1.0)
        for n, each in enumerate(thresholds)
    )


def coverage(quick: Floats, full: Floats, labels: npt.NDArray[np.intp]) -> tuple[Coverage, ...]:
    """With one pass, whose threshold is 0.97."""
    by_level = [quick, full]
    return metrics.risk_coverage(lambda threshold: by_level[cascade.level(passes(0.97), threshold)], labels)


def test_a_threshold_above_a_pass_s_leaves_that_pass_out() -> None:
    two = passes(0.95, 0.98)
    lowest = cascade.levels(two)
    assert [round(each, 6) for each in lowest] == [0.0, 0.95, 0.98]
    for threshold, expected in ((0.0, 0), (0.95, 0), (0.950001, 1), (0.98, 1), (0.99, 2), (1.0, 2)):
        assert cascade.level(two, threshold) == expected, threshold
        # As the engine decides, for each of the thresholds of a level.
        kept = [each for each in two if lowest[expected] <= each.threshold]
        assert kept == [each for each in two if threshold <= each.threshold], threshold


def test_thresholds_above_the_cascade_s_are_measured_on_the_full_size_pass() -> None:
    labels = np.zeros(2000, np.intp)
    # At low resolution 1 % of the confident answers are wrong; at full size none of the most confident are.
    quick = np.concatenate([answers_of(0.98, 1000, 10), answers_of(0.6, 1000, 60)])
    full = np.concatenate([answers_of(0.999, 1500, 0), answers_of(0.6, 500, 110)])
    table = {entry.error_rate: entry for entry in coverage(quick, full, labels)}
    assert set(table) == {0.005, 0.01, 0.02, 0.05}
    assert table[0.01].threshold > 0.97
    assert table[0.01].coverage == 0.75
    assert all(entry.threshold > 0.97 for rate, entry in table.items() if rate <= 0.02)
    assert table[0.05].threshold <= 0.97
    assert table[0.05].coverage == 1.0


def test_a_threshold_of_the_full_size_pass_is_above_the_cascade_s() -> None:
    labels = np.zeros(2000, np.intp)
    full = answers_of(0.95, 2000, 0)
    full[:500] = answers_of(0.99, 500, 0)
    (first, *_) = coverage(answers_of(0.99, 2000, 200), full, labels)
    assert 0.97 < first.threshold <= 0.99
    assert first.coverage == 0.25


def candidate(size: int, confident: int, changed: list[int], photos: int = 1000) -> Candidate:
    """A size that is confident of so many photos; those that it changes it is most confident of."""
    confidence = np.full(photos, 0.5, np.float32)
    confidence[:confident] = np.linspace(0.99, 0.95, confident)
    is_changed = np.zeros(photos, bool)
    is_changed[changed] = True
    return Candidate(size, 1.0, confidence, is_changed)


def test_a_second_pass_is_chosen_where_it_saves_something() -> None:
    both = cascade.cheapest([candidate(64, 700, []), candidate(96, 900, [])], 144)
    assert [(each.size, each.enough) for each in both] == [(64, 0.7), (96, 0.2)]
    one = cascade.cheapest([candidate(64, 500, []), candidate(128, 510, [])], 144)
    assert [each.size for each in one] == [64]
    assert cascade.cheapest([candidate(128, 300, [])], 144) == ()
    assert cascade.cheapest([], 144) == ()
    first, second = both
    assert cascade.cost(both, 144) < min(cascade.cost((first,), 144), cascade.cost((second,), 144))


def test_two_passes_share_the_labels_that_may_change() -> None:
    # Two of 1,000 may change: either pass alone would keep that, at the lowest threshold.
    quick, slow = candidate(64, 500, [0, 1]), candidate(96, 900, [898, 899])
    for passes in cascade._with_thresholds([quick, slow]):
        open_, changed = np.ones(1000, bool), 0
        for each, answers in zip(passes, (quick, slow), strict=True):
            final = open_ & (answers.confidence >= each.threshold)
            changed += int((answers.changed & final).sum())
            open_ &= ~final
        assert changed <= 2
        assert passes[-1].agreement == round(1 - changed / 1000, 4)


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch and NNCF warn about themselves
def test_a_fit_with_enough_calibration_photos_gives_a_model_with_a_cascade_and_an_outlier_detector(
    tmp_path: Path,
) -> None:
    for part, count in (("data", 60), ("calibration", 150)):
        for folder, color in (("cats", RED), ("dogs", GREEN)):
            shift = 1000 * (part == "data") + 5000 * (folder == "dogs")
            make_tree(tmp_path / part / folder, {f"{n}.jpg": tinted(color, shift + n) for n in range(count)})
    given = ["--data", str(tmp_path / "data"), "--calibration", str(tmp_path / "calibration"), "--lr", "0.01"]
    given += ["--weights", "none", "--arch", "resnet18", "--image-size", "64", "--recipe", "head"]
    assert main(["fit", *given, "--num-workers", "0", "--output", str(tmp_path / "model")]) == 0
    written = manifests.read(tmp_path / "model")
    assert written.neither is not None
    ways = [(table.engine, table.catch_neither) for table in written.error_rates]
    assert ways == [("openvino", False), ("torch", False), ("openvino", True), ("torch", True)]
    assert all(table.rates for table in written.error_rates)
    look = written.cascade[0]
    assert look.size in (32, 48)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"A low-resolution pass at {look.size} px is confident enough for" in card
    assert "**Outliers.**" in card
    assert "The 8-bit network is" in card
