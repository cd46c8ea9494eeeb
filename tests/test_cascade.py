"""A first look at the photo made smaller: what the engine makes of it, and how the trainer chooses one."""

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
from sorter.classifier.manifest import FirstLook, Input, Manifest
from sorter.classifier.openvino_engine import OpenVinoEngine
from sorter.settings import SHIPPED_MODEL
from trainer.cli import main
from trainer.data.layouts import Sample
from trainer.fitting import features
from trainer.packaging import cascade as first_look
from trainer.progress import Reporter

Floats = npt.NDArray[np.float32]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> "object":
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# --- the engine ---


@pytest.fixture(scope="module")
def shipped() -> Manifest:
    return manifests.read(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(smooth(seed, (144, 144))) for seed in range(24)])


def with_threshold(shipped: Manifest, threshold: float) -> Manifest:
    assert shipped.first_look is not None
    look = shipped.first_look.model_copy(update={"threshold": threshold})
    return shipped.model_copy(update={"first_look": look})


def test_the_model_that_ships_has_a_first_look(shipped: Manifest) -> None:
    assert shipped.first_look is not None
    assert shipped.first_look.agreement >= 0.998


def test_what_the_first_look_is_not_sure_of_gets_the_whole_look(
    shipped: Manifest, pixels: npt.NDArray[np.uint8]
) -> None:
    first = OpenVinoEngine(SHIPPED_MODEL, with_threshold(shipped, 0.0)).classify(pixels)
    whole = OpenVinoEngine(SHIPPED_MODEL, shipped, min_confidence=1.0).classify(pixels)
    assert np.abs(first - whole).max() > 0.01, "the looks differ, so that the test can fail"
    threshold = float(np.median(first.max(1)))
    mixed = OpenVinoEngine(SHIPPED_MODEL, with_threshold(shipped, threshold)).classify(pixels)
    sure = first.max(1) >= threshold
    assert 0 < sure.sum() < len(pixels)
    assert np.allclose(mixed, np.where(sure[:, None], first, whole), atol=1e-4)


def test_above_its_threshold_there_is_no_first_look(shipped: Manifest, pixels: npt.NDArray[np.uint8]) -> None:
    quick = with_threshold(shipped, 0.4)
    whole = OpenVinoEngine(SHIPPED_MODEL, shipped, min_confidence=1.0).classify(pixels)
    assert np.allclose(OpenVinoEngine(SHIPPED_MODEL, quick, min_confidence=0.41).classify(pixels), whole, atol=1e-4)
    assert not np.allclose(OpenVinoEngine(SHIPPED_MODEL, quick, min_confidence=0.4).classify(pixels), whole, atol=1e-2)


def test_a_first_look_that_is_not_smaller_is_refused(shipped: Manifest) -> None:
    content = shipped.model_dump()
    content["first_look"]["size"] = content["input"]["size"]
    with pytest.raises(ValidationError, match="the first look is not smaller than the input"):
        Manifest.model_validate(content)


# --- choosing one ---


class _Redness(nn.Module):
    """Says how much redder than green a picture is, at any size; sure of it, but for a narrow band of colours."""

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


def test_a_smaller_look_that_says_the_same_is_chosen(tmp_path: Path) -> None:
    model, photos = features.convert(_Redness(), SEEN.mean, SEEN.std, SEEN.size), samples(tmp_path, 300)
    before = model.input().partial_shape
    whole = features.answers(features.on_openvino(model), photos, SEEN.preprocessing)
    look = first_look.choose(model, whole, photos, SEEN, Reporter())
    assert look is not None
    assert (look.size, look.photos, look.enough, look.agreement) == (16, 300, 1.0, 1.0)
    assert model.input().partial_shape == before, "the model itself stays as it is"


def test_a_smaller_look_that_says_something_else_is_not(tmp_path: Path) -> None:
    model, photos = features.convert(_Redness(), SEEN.mean, SEEN.std, SEEN.size), samples(tmp_path, 300)
    whole = features.answers(features.on_openvino(model), photos, SEEN.preprocessing)
    assert first_look.choose(model, whole[:, ::-1], photos, SEEN, Reporter()) is None


def test_too_few_photos_choose_nothing(tmp_path: Path) -> None:
    model, photos = features.convert(_Redness(), SEEN.mean, SEEN.std, SEEN.size), samples(tmp_path, 299)
    whole = features.answers(features.on_openvino(model), photos, SEEN.preprocessing)
    assert first_look.choose(model, whole, photos, SEEN, Reporter()) is None


@pytest.mark.parametrize(
    ("changed_at", "count", "expected"),
    [
        ([], 500, 0.9),
        ([0.95], 500, 0.9),  # one of 500 may change
        ([0.95], 499, 0.9501),
        ([0.99, 0.97, 0.93], 500, 0.9701),
        ([1.0, 1.0], 500, 1.0),
        ([0.5, 0.6, 0.7], 500, 0.9),
    ],
)
def test_the_threshold_is_the_lowest_that_changes_few_enough(
    changed_at: list[float], count: int, expected: float
) -> None:
    confidence = np.full(count, 0.96, np.float32)
    confidence[: len(changed_at)] = changed_at
    changed = np.arange(count) < len(changed_at)
    threshold = first_look._threshold(confidence, changed)
    assert threshold == pytest.approx(expected, abs=1e-4)
    if expected < 1:
        assert (changed & (confidence >= threshold)).sum() <= 0.002 * count


def sure(confidence: float, count: int, wrong: int) -> Floats:
    """Answers for photos of class 0."""
    answers = np.tile(np.array([confidence, 1 - confidence], np.float32), (count, 1))
    answers[:wrong] = answers[:wrong, ::-1]
    return answers


def test_above_the_first_look_s_threshold_the_whole_looks_count() -> None:
    labels = np.zeros(2000, np.intp)
    look = FirstLook(size=96, temperature=1.0, threshold=0.97, photos=2000, enough=0.5, agreement=1.0)
    # With first looks 1 % of the sure ones are wrong, with whole looks none of those that are surer still.
    quick = np.concatenate([sure(0.98, 1000, 10), sure(0.6, 1000, 100)])
    whole = np.concatenate([sure(0.999, 1500, 0), sure(0.6, 500, 110)])
    table = {entry.error_rate: entry for entry in first_look.risk_coverage(quick, whole, labels, look)}
    assert set(table) == {0.005, 0.01, 0.02, 0.05}
    assert (table[0.01].threshold, table[0.01].coverage) == (0.999, 0.75)
    assert all(entry.threshold > 0.97 for rate, entry in table.items() if rate <= 0.02)
    assert table[0.05].threshold == pytest.approx(0.6)


def test_a_threshold_of_whole_looks_is_never_one_at_which_there_are_first_looks() -> None:
    labels = np.zeros(2000, np.intp)
    look = FirstLook(size=96, temperature=1.0, threshold=0.97, photos=2000, enough=0.5, agreement=1.0)
    whole = sure(0.95, 2000, 0)
    whole[:500] = sure(0.99, 500, 0)
    (first, *_) = first_look.risk_coverage(sure(0.99, 2000, 200), whole, labels, look)
    assert (first.threshold, first.coverage) == (0.9701, 0.25)


# --- a whole fit ---


@pytest.mark.filterwarnings("default")  # torch and NNCF warn of themselves
def test_a_fit_with_enough_calibration_photos_ends_in_a_model_with_a_first_look(tmp_path: Path) -> None:
    for part, count in (("data", 60), ("calibration", 150)):
        for folder, color in (("cats", RED), ("dogs", GREEN)):
            shift = 1000 * (part == "data") + 5000 * (folder == "dogs")
            make_tree(tmp_path / part / folder, {f"{n}.jpg": tinted(color, shift + n) for n in range(count)})
    given = ["--data", str(tmp_path / "data"), "--calibration", str(tmp_path / "calibration"), "--lr", "0.01"]
    given += ["--weights", "none", "--arch", "resnet18", "--image-size", "64", "--recipe", "head"]
    assert main(["fit", *given, "--num-workers", "0", "--output", str(tmp_path / "model")]) == 0
    look = manifests.read(tmp_path / "model").first_look
    assert look is not None
    assert look.size in (32, 48)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"A first look at {look.size} px is enough for" in card
