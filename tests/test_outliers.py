"""Photos of neither cat nor dog: the distance, its threshold, the engines that measure it, and what becomes of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import SHARED, make_tree, plain, small_manifest
from pictures import encoded, smooth
from PIL import Image, ImageDraw
from pydantic import ValidationError

from sorter.classifier import manifest as manifests
from sorter.classifier import network
from sorter.classifier import outliers as neither
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import MANIFEST, NEITHER, Manifest, Neither
from sorter.classifier.openvino_engine import OpenVinoEngine, hidden
from sorter.classifier.outliers import OutlierDetector
from sorter.cli import preflight
from sorter.decisions import decide
from sorter.decoding.decoded import Decoded
from sorter.errors import ConfigurationError, ModelError
from sorter.files.photo import Identity, Photo
from sorter.settings import SHIPPED_MODEL, Settings
from trainer.data.pixels import read
from trainer.fitting import features
from trainer.packaging import evaluate
from trainer.packaging import outliers as fitting

Floats = npt.NDArray[np.float32]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> "object":
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shipped() -> Manifest:
    return manifests.read(SHIPPED_MODEL)


def rows(seed: int, count: int, loud: slice) -> Floats:
    """What a hidden layer might make of photos, (N, 8): some units stir, the others hardly."""
    draw = np.random.default_rng(seed)
    found = draw.random((count, 8)) * 0.1
    found[:, loud] += 1 + draw.random((count, len(range(8)[loud])))
    return found.astype(np.float32)


# --- the distance ---


def test_what_stirs_other_units_is_far_away() -> None:
    distance = fitting.fit(rows(0, 400, slice(0, 3)))
    assert distance is not None
    near, far = distance(rows(1, 200, slice(0, 3))), distance(rows(2, 200, slice(3, 6)))
    assert far.min() > 3 * near.max()
    assert (near.shape, near.dtype.name) == ((200,), "float32")


def test_how_loudly_does_not_matter_and_silence_is_no_error() -> None:
    distance = fitting.fit(rows(0, 400, slice(0, 3)))
    assert distance is not None
    some = rows(1, 10, slice(0, 3))
    assert distance(some * 50) == pytest.approx(distance(some), rel=1e-3)
    assert np.isfinite(distance(np.zeros((2, 8), np.float32))).all()


def test_units_that_never_stir_do_not_make_everything_far() -> None:
    silent = rows(0, 400, slice(0, 3))
    silent[:, 7] = 0
    distance = fitting.fit(silent)
    assert distance is not None
    little = silent.copy()
    little[:, 7] = 1e-3
    assert distance(little) == pytest.approx(distance(silent), abs=0.2)


def test_a_layer_that_says_the_same_of_every_photo_tells_nothing() -> None:
    assert fitting.fit(np.ones((50, 8), np.float32)) is None


@pytest.mark.parametrize("count", [100, 199, 500, 1234])
def test_the_threshold_catches_one_in_a_hundred_calibration_photos_and_no_more(count: int) -> None:
    distances = np.random.default_rng(0).gamma(4, size=count).astype(np.float32)
    told = fitting.describe(distances)
    assert int((distances > told.threshold).sum()) == count // 100
    assert (told.photos, told.caught) == (count, round(count // 100 / count, 4))


def test_a_distance_comes_back_from_its_file(tmp_path: Path) -> None:
    distance = fitting.fit(rows(0, 400, slice(0, 3)))
    assert distance is not None
    (tmp_path / NEITHER).write_bytes(distance.as_file())
    again = neither.read(tmp_path, small_manifest().model_copy(update={"head_hidden": (8, 4)}))
    some = rows(1, 10, slice(0, 3))
    assert (again(some) == distance(some)).all()


@pytest.mark.parametrize(
    ("distance", "said"),
    [
        (
            OutlierDetector(np.zeros(7, np.float32), np.eye(7, dtype=np.float32)),
            "does not fit a head of 8 hidden",
        ),
        (
            OutlierDetector(np.zeros(8, np.float32), np.eye(8, 7, dtype=np.float32)),
            "does not fit a head of 8 hidden",
        ),
        (OutlierDetector(np.full(8, np.nan, np.float32), np.eye(8, dtype=np.float32)), "more than finite numbers"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, distance: OutlierDetector | None, said: str) -> None:
    (tmp_path / NEITHER).write_bytes(b"nonsense" if distance is None else distance.as_file())
    with pytest.raises(ModelError, match=said):
        neither.read(tmp_path, small_manifest().model_copy(update={"head_hidden": (8, 4)}))


# --- the manifest ---

TOLD = Neither(threshold=100.0, photos=500, caught=0.01)


def test_a_manifest_that_names_no_file_for_it_is_refused(tmp_path: Path) -> None:
    described = small_manifest().model_copy(update={"head_hidden": (8,), "neither": TOLD})
    manifests.write(tmp_path, described, {manifests.WEIGHTS: b"weights"}, "card")
    with pytest.raises(ModelError, match=f"names no {NEITHER}: export the model again"):
        manifests.read(tmp_path)


def test_a_head_without_a_hidden_layer_cannot_have_it() -> None:
    content = small_manifest().model_dump()
    with pytest.raises(ValidationError, match="neither needs a head with a hidden layer"):
        Manifest.model_validate(content | {"neither": TOLD.model_dump()})


def test_the_model_that_ships_has_it(shipped: Manifest) -> None:
    assert shipped.neither is not None
    assert shipped.neither.caught <= 0.01
    assert (SHIPPED_MODEL / NEITHER).stat().st_size < 1_000_000


# --- the engines ---


def drawn() -> list[Image.Image]:
    """Pictures of neither: stripes, boxes, text, a gradient."""
    boxes, text = Image.new("RGB", (300, 200), "navy"), Image.new("RGB", (300, 400), "white")
    for number in range(6):
        at = 40 * number
        ImageDraw.Draw(boxes).rectangle((at, at // 2, at + 60, at // 2 + 50), fill=(40 * number, 200, 90))
    for line in range(20, 380, 14):
        ImageDraw.Draw(text).text((20, line), "a line of text that says nothing " * 2, fill="black")
    stripes = np.zeros((200, 300, 3), np.uint8)
    stripes[:, ::20] = stripes[:, 1::20] = (250, 220, 40)
    gradient = Image.linear_gradient("L").convert("RGB")
    return [boxes, text, Image.fromarray(stripes), gradient]


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    pictures = [*drawn(), *(smooth(seed, (144, 144)) for seed in range(16))]
    return np.stack([np.asarray(picture.resize((144, 144))) for picture in pictures])


def test_judging_classifies_as_whole_looks_do(shipped: Manifest, pixels: npt.NDArray[np.uint8]) -> None:
    engine = open_engine(SHIPPED_MODEL, shipped, "openvino", "cpu", 32, catch_neither=True)
    probabilities, distances = engine.classify_with_distance(pixels)
    whole = OpenVinoEngine(SHIPPED_MODEL, shipped, min_confidence=1.0).classify(pixels)
    assert np.abs(probabilities - whole).max() < 0.02
    assert np.abs(engine.classify(pixels) - whole).max() < 0.02
    assert (distances.shape, distances.dtype.name) == ((20,), "float32")


def test_torch_measures_what_openvino_does(shipped: Manifest, pixels: npt.NDArray[np.uint8]) -> None:
    eight = open_engine(SHIPPED_MODEL, shipped, "openvino", "cpu", 32, catch_neither=True)
    other = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 8, catch_neither=True)
    (_, ours), (answers, theirs) = eight.classify_with_distance(pixels), other.classify_with_distance(pixels)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.8
    assert np.abs(ours / theirs - 1).mean() < 0.15
    plain_answers = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 8).classify(pixels)
    assert np.abs(answers - plain_answers).max() < 0.02


def test_drawn_pictures_are_far_on_both_engines(shipped: Manifest, pixels: npt.NDArray[np.uint8]) -> None:
    assert shipped.neither is not None
    for name in ("openvino", "torch"):
        engine = open_engine(SHIPPED_MODEL, shipped, name, "cpu", 32, catch_neither=True)
        assert (engine.classify_with_distance(pixels[:4])[1] > shipped.neither.threshold).all(), name


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photos in ../shared")
def test_the_threshold_catches_what_the_manifest_says_and_little_more_on_torch(shipped: Manifest) -> None:
    assert shipped.neither is not None
    samples = evaluate.labelled_photos(SHARED / "photos", shipped.classes)
    cats_and_dogs = np.stack([read(sample.path, shipped.input.preprocessing) for sample in samples])
    eight = open_engine(SHIPPED_MODEL, shipped, "openvino", "cpu", 50, catch_neither=True).classify_with_distance(
        cats_and_dogs
    )[1]
    # Processors round 8-bit sums in different ways, which moves a photo or two over the threshold.
    assert abs((eight > shipped.neither.threshold).mean() - shipped.neither.caught) <= 0.004
    other = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 50, catch_neither=True).classify_with_distance(
        cats_and_dogs
    )[1]
    assert (other > shipped.neither.threshold).mean() <= 0.02
    assert np.corrcoef(eight, other)[0, 1] > 0.9


@pytest.mark.filterwarnings("default")  # torch warns of itself
@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_1", "mobilenet_v2"])
def test_the_first_hidden_layer_is_found_in_either_kind_of_network(architecture: str) -> None:
    torch.manual_seed(0)
    net = network.build(architecture, (6, 4), 3).eval()
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    model = features.convert(net, mean, std, 64)
    model.add_outputs([hidden(model, 2)])
    seen = np.stack([np.asarray(smooth(seed, (64, 64))) for seed in range(4)])
    (found,) = features.on_openvino(type(model)([model.output(1)], model.get_parameters()))([seen])
    place = network.head_layers_name(architecture)
    network.replace(net, place, network.WithHidden(net.get_submodule(place)))
    with torch.inference_mode():
        both = network.Classifier(net, mean, std)(torch.from_numpy(seen)).numpy()
    assert both.shape == (4, 3 + 6)
    assert np.abs(both[:, 3:]).max() > 0
    assert found == pytest.approx(both[:, 3:], abs=0.05 * float(np.abs(both[:, 3:]).max()))


# --- what becomes of them ---


def test_a_photo_is_of_neither_above_the_threshold_and_only_if_asked(tmp_path: Path) -> None:
    described = small_manifest().model_copy(update={"neither": TOLD})
    decoded = Decoded(Photo(tmp_path, "a.jpg", Identity(0, 0, 0, 0, 0), 0.0), "pixels")
    far = decide(decoded, [0.1, 0.9], described, 0.0, 1, 100.1)
    assert (far.kind, far.folder, far.label, far.detail) == (
        "unsure",
        "unsure",
        "dog",
        "looks like neither cat nor dog",
    )
    assert decide(decoded, [0.1, 0.9], described, 0.0, 1, 100.0).kind == "sorted"
    assert decide(decoded, [0.1, 0.9], described, 0.0, 1).kind == "sorted"


def sort(inbox: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sorter", "run", "--once", "--inbox", str(inbox), "--device", "cpu", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_they_go_to_unsure_and_log_and_history_say_why(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path, {f"{n}.png": encoded(picture, "PNG") for n, picture in enumerate(drawn())})
    would = sort(inbox, "--catch-neither", "--dry-run", "--json")
    assert {(d["kind"], d["detail"]) for d in lines(would.stdout)} == {("unsure", "looks like neither cat nor dog")}
    assert {d["kind"] for d in lines(sort(inbox, "--dry-run", "--json").stdout)} == {"sorted"}

    done = sort(inbox, "--catch-neither")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (inbox / "unsure").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    events = [line for line in lines(done.stderr) if line["event"] == "photo.unsure"]
    assert [event["detail"] for event in events] == ["looks like neither cat nor dog"] * 4
    command = [sys.executable, "-m", "sorter", "history", "--inbox", str(inbox)]
    shown = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
    entry = lines(shown)[0]
    assert (entry["kind"], entry["detail"]) == ("unsure", "looks like neither cat nor dog")
    assert entry["label"] in ("cat", "dog")
    table = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert table.count("looks like neither cat nor dog") == 4


def test_a_model_that_cannot_tell_them_is_refused_and_sorts_without(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED_MODEL, folder)
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del content["neither"], content["files"][NEITHER]
    (folder / NEITHER).unlink()
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    inbox = make_tree(tmp_path / "inbox", {"a.jpg": plain((200, 40, 40))})
    refused = sort(inbox, "--model", str(folder), "--catch-neither")
    assert refused.returncode == 2
    assert "the model catdog-resnet50 cannot tell photos of neither: leave out --catch-neither" in refused.stderr
    assert (inbox / "a.jpg").exists()
    assert sort(inbox, "--model", str(folder)).returncode == 0


def test_the_refusal_comes_before_anything_is_opened(manifest: Manifest) -> None:
    with pytest.raises(ConfigurationError, match="leave out --catch-neither, or make its folder anew"):
        preflight.decided(Settings(catch_neither=True), manifest)
    assert preflight.decided(Settings(), manifest).min_confidence == 0.0
