"""Photos that show neither a cat nor a dog: the detector, its threshold, the engines, and where the photos go."""

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
from conftest import RUN, SHARED, make_tree, plain, small_manifest
from pictures import encoded, smooth
from PIL import Image, ImageDraw
from pydantic import ValidationError

from sorter.classifier import manifest as manifests
from sorter.classifier import network, outliers
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import MANIFEST, NEITHER, Manifest, Neither
from sorter.classifier.openvino_engine import OpenVinoEngine
from sorter.classifier.openvino_graph import layer_output
from sorter.classifier.outliers import Layer, MahalanobisDetector
from sorter.cli import preflight
from sorter.decisions import decide
from sorter.decoding.decoded import Decoded
from sorter.errors import ConfigurationError, ModelError
from sorter.files.photo import Identity, Photo
from sorter.settings import SHIPPED_MODEL, Settings
from trainer.data.labelled import labelled_photos
from trainer.data.pixels import read
from trainer.fitting import features
from trainer.packaging.outliers import describe, learned, mahalanobis

pytestmark = pytest.mark.usefixtures("own_cache")

Floats = npt.NDArray[np.float32]


def rows(seed: int, count: int, active: slice) -> Floats:
    """Values that a hidden layer might have for photos, (N, 8): some units are active, the others hardly."""
    draw = np.random.default_rng(seed)
    found = draw.random((count, 8)) * 0.1
    found[:, active] += 1 + draw.random((count, len(range(8)[active])))
    return found.astype(np.float32)


def test_photos_that_activate_other_units_are_far_away() -> None:
    detector = mahalanobis(rows(0, 400, slice(0, 3)))
    assert detector is not None
    near, far = detector(rows(1, 200, slice(0, 3))), detector(rows(2, 200, slice(3, 6)))
    assert far.min() > 3 * near.max()
    assert (near.shape, near.dtype.name) == ((200,), "float32")


def test_the_scale_of_the_activations_does_not_matter_and_zeros_are_no_error() -> None:
    detector = mahalanobis(rows(0, 400, slice(0, 3)))
    assert detector is not None
    some = rows(1, 10, slice(0, 3))
    assert detector(some * 50) == pytest.approx(detector(some), rel=1e-3)
    assert np.isfinite(detector(np.zeros((2, 8), np.float32))).all()


def test_units_that_are_never_active_do_not_make_everything_far() -> None:
    inactive = rows(0, 400, slice(0, 3))
    inactive[:, 7] = 0
    detector = mahalanobis(inactive)
    assert detector is not None
    little = inactive.copy()
    little[:, 7] = 1e-3
    assert detector(little) == pytest.approx(detector(inactive), abs=0.2)


def test_a_layer_that_is_the_same_for_every_photo_gives_no_detector() -> None:
    assert mahalanobis(np.ones((50, 8), np.float32)) is None


SOME_DETECTOR = MahalanobisDetector(np.zeros(1, np.float32), np.zeros((1, 1), np.float32))
DESCRIBED = Neither(threshold=100.0, photos=500, caught=0.01)


def test_a_learned_detector_tells_other_photos_from_those_of_the_classes() -> None:
    classes, others = rows(0, 400, slice(0, 3)), rows(1, 100, slice(2, 5))
    detector = learned(classes, others)
    near, far = detector(rows(2, 200, slice(0, 3))), detector(rows(3, 200, slice(2, 5)))
    assert near.max() < 0 < far.min()
    assert (near.shape, near.dtype.name) == ((200,), "float32")
    again = learned(classes, others)
    assert (again.weight == detector.weight).all(), "the same photos give the same detector"
    scaled = learned(classes * 100, others * 100)
    assert scaled(classes * 100) == pytest.approx(detector(classes), abs=0.05), "the features' scale does not matter"


def test_more_others_do_not_count_for_more() -> None:
    classes, others = rows(0, 400, slice(0, 3)), rows(1, 100, slice(2, 5))
    once, often = learned(classes, others), learned(classes, np.tile(others, (5, 1)))
    assert often(others) == pytest.approx(once(others), abs=0.3)


def test_a_learned_detector_is_read_back_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    detector = learned(rows(0, 400, slice(0, 3)), rows(1, 100, slice(2, 5)))
    described = small_manifest().model_copy(
        update={"neither": Neither(score="learned", threshold=-1, photos=9, caught=0)}
    )
    (tmp_path / NEITHER).write_bytes(detector.as_file())
    again = outliers.read(tmp_path, described)
    some = rows(1, 10, slice(0, 3))
    assert (again(some) == detector(some)).all()
    (tmp_path / NEITHER).write_bytes(SOME_DETECTOR.as_file())
    with pytest.raises(ModelError, match="not a learned detector"):
        outliers.read(tmp_path, described)
    with pytest.raises(ModelError, match="8 units, and the network's has 9"):
        outliers.check_width(tmp_path, detector, 9)


def test_the_threshold_catches_one_calibration_photo_in_a_hundred_and_no_more() -> None:
    for count in (100, 199, 500, 1234):
        distances = np.random.default_rng(0).gamma(4, size=count).astype(np.float32)
        described = describe(SOME_DETECTOR, distances, distances[:0], 0.01)
        assert int((distances > described.threshold).sum()) == count // 100
        assert (described.photos, described.caught) == (count, round(count // 100 / count, 4))


def test_a_detector_is_read_back_from_its_file(tmp_path: Path) -> None:
    detector = mahalanobis(rows(0, 400, slice(0, 3)))
    assert detector is not None
    (tmp_path / NEITHER).write_bytes(detector.as_file())
    again = outliers.read(tmp_path, small_manifest().model_copy(update={"head_hidden": (8, 4), "neither": DESCRIBED}))
    some = rows(1, 10, slice(0, 3))
    assert (again(some) == detector(some)).all()


def test_a_detector_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    described = small_manifest().model_copy(update={"head_hidden": (8, 4), "neither": DESCRIBED})
    eye = np.eye(8, dtype=np.float32)
    contents = {
        "wrong mean": MahalanobisDetector(np.zeros(7, np.float32), np.eye(7, dtype=np.float32)).as_file(),
        "wrong whitening": MahalanobisDetector(np.zeros(8, np.float32), eye[:, :7]).as_file(),
        "not a number": MahalanobisDetector(np.full(8, np.nan, np.float32), eye).as_file(),
        "not tensors": b"nonsense",
    }
    sentences = {}
    for name, content in contents.items():
        (tmp_path / NEITHER).write_bytes(content)
        with pytest.raises(ModelError, match=NEITHER) as caught:
            outliers.read(tmp_path, described)
        sentences[name] = str(caught.value)
    assert "8 hidden" in sentences["wrong mean"]
    assert "8 hidden" in sentences["wrong whitening"]
    assert "finite" in sentences["not a number"]


def test_a_manifest_without_the_detector_s_file_is_refused(tmp_path: Path) -> None:
    described = small_manifest().model_copy(update={"head_hidden": (8,), "neither": DESCRIBED})
    manifests.write(tmp_path, described, {manifests.WEIGHTS: b"weights"}, "card")
    with pytest.raises(ModelError, match=NEITHER):
        manifests.read(tmp_path)


def test_a_head_without_a_hidden_layer_cannot_have_a_detector() -> None:
    content = small_manifest().model_dump()
    with pytest.raises(ValidationError, match="hidden layer"):
        Manifest.model_validate(content | {"neither": DESCRIBED.model_dump()})


def test_the_shipped_model_has_a_detector(shipped: Manifest) -> None:
    assert shipped.neither is not None
    assert shipped.neither.caught <= 0.01
    assert (SHIPPED_MODEL / NEITHER).stat().st_size < 1_000_000


def drawn() -> list[Image.Image]:
    """Outliers: boxes, text, a gradient. Not yellow stripes, which look like a cat's."""
    boxes, text = Image.new("RGB", (300, 200), "navy"), Image.new("RGB", (300, 400), "white")
    for number in range(6):
        x = 40 * number
        ImageDraw.Draw(boxes).rectangle((x, x // 2, x + 60, x // 2 + 50), fill=(40 * number, 200, 90))
    for line in range(20, 380, 14):
        ImageDraw.Draw(text).text((20, line), "a line of text that says nothing " * 2, fill="black")
    gradient = Image.linear_gradient("L").convert("RGB")
    return [boxes, text, gradient]


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    pictures = [*drawn(), *(smooth(seed, (144, 144)) for seed in range(16))]
    return np.stack([np.asarray(picture.resize((144, 144))) for picture in pictures])


def test_an_engine_that_catches_outliers_classifies_at_full_size_and_finds_drawings_far_away(
    shipped: Manifest, pixels: npt.NDArray[np.uint8]
) -> None:
    assert shipped.neither is not None
    engine = open_engine(SHIPPED_MODEL, shipped, "openvino", "cpu", 32, catch_neither=True)
    probabilities, distances = engine.classify_with_distance(pixels)
    full = OpenVinoEngine(SHIPPED_MODEL, shipped, min_confidence=1.0).classify(pixels)
    assert np.abs(probabilities - full).max() < 0.02
    assert np.abs(engine.classify(pixels) - full).max() < 0.02
    assert (distances.shape, distances.dtype.name) == ((19,), "float32")
    assert (distances[: len(drawn())] > 0).all()


@pytest.mark.long
def test_torch_measures_the_distances_that_openvino_does(shipped: Manifest, pixels: npt.NDArray[np.uint8]) -> None:
    int8 = OpenVinoEngine(SHIPPED_MODEL, shipped, 1.0, outliers.read(SHIPPED_MODEL, shipped))
    full = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 8, catch_neither=True)
    (_, expected), (answers, distances) = int8.classify_with_distance(pixels), full.classify_with_distance(pixels)
    assert np.corrcoef(expected, distances)[0, 1] > 0.9
    plain_answers = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 8).classify(pixels)
    assert np.abs(answers - plain_answers).max() < 0.02
    assert (distances[: len(drawn())] > 0).all()


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photos in ../shared")
def test_the_threshold_catches_the_share_in_the_manifest_and_little_more_on_torch(shipped: Manifest) -> None:
    assert shipped.neither is not None
    samples = labelled_photos(SHARED / "photos", shipped.classes)
    cats_and_dogs = np.stack([read(sample.path, shipped.input.preprocessing) for sample in samples])
    _, with_cascade = open_engine(
        SHIPPED_MODEL, shipped, "openvino", "cpu", 50, catch_neither=True
    ).classify_with_distance(cats_and_dogs)
    # CPUs round 8-bit sums in different ways, which moves a few photos over the threshold.
    assert abs((with_cascade > 0).mean() - shipped.neither.caught) <= 0.01
    int8 = OpenVinoEngine(SHIPPED_MODEL, shipped, 1.0, outliers.read(SHIPPED_MODEL, shipped))
    _, distances = int8.classify_with_distance(cats_and_dogs)
    assert abs((distances > 0).mean() - shipped.neither.caught) <= 0.01
    full = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 50, catch_neither=True)
    _, on_torch = full.classify_with_distance(cats_and_dogs)
    assert (on_torch > 0).mean() <= 0.02
    assert np.corrcoef(distances, on_torch)[0, 1] > 0.9


@pytest.mark.filterwarnings("default")  # torch warns about itself
@pytest.mark.parametrize(
    "architecture",
    [
        "squeezenet1_1",
        pytest.param("resnet18", marks=pytest.mark.long),
        pytest.param("mobilenet_v2", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize(("layer", "hidden"), [("hidden", (6, 4)), ("features", (6, 4)), ("features", ())])
def test_the_detector_s_layer_is_found_in_every_kind_of_network(
    architecture: str, layer: Layer, hidden: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    net = network.build(architecture, hidden, 3).eval()
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    model = features.convert(net, mean, std, 64)
    model.add_outputs([layer_output(model, layer, len(hidden))])
    seen = np.stack([np.asarray(smooth(seed, (64, 64))) for seed in range(4)])
    (found,) = features.on_openvino(type(model)([model.output(1)], model.get_parameters()))([seen])
    place = network.head_layers_name(architecture)
    network.replace(net, place, network.WithLayer(net.get_submodule(place), layer))
    with torch.inference_mode():
        both = network.Classifier(net, mean, std)(torch.from_numpy(seen)).numpy()
    head = net.get_submodule(place)
    assert isinstance(head, network.WithLayer)
    if layer == "hidden":
        assert both.shape == (4, 3 + 6)
    assert np.abs(both[:, 3:]).max() > 0
    assert found == pytest.approx(both[:, 3:], abs=0.05 * float(np.abs(both[:, 3:]).max()))


def test_only_distances_above_the_threshold_make_a_photo_unsure(tmp_path: Path) -> None:
    described = small_manifest().model_copy(update={"neither": DESCRIBED})
    decoded = Decoded(Photo(tmp_path, "a.jpg", Identity(0, 0, 0, 0, 0), 0.0), "pixels")
    far = decide(decoded, [0.1, 0.9], described, 0.0, 1, 0.1, run=RUN)
    assert (far.kind, far.folder, far.label) == ("unsure", "unsure", "dog")
    assert far.detail == "looks like neither cat nor dog"
    assert decide(decoded, [0.1, 0.9], described, 0.0, 1, 0.0, run=RUN).kind == "sorted"
    assert decide(decoded, [0.1, 0.9], described, 0.0, 1, run=RUN).kind == "sorted"


def sort(inbox: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sorter", "run", "--once", "--inbox", str(inbox), "--device", "cpu", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


DETAIL = "looks like neither cat nor dog"


def history(inbox: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "sorter", "history", "--inbox", str(inbox), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def inbox_of_outliers(folder: Path) -> Path:
    return make_tree(folder, {f"{n}.png": encoded(picture, "PNG") for n, picture in enumerate(drawn())})


def test_outliers_go_to_unsure_and_log_and_history_give_the_reason(tmp_path: Path) -> None:
    inbox = inbox_of_outliers(tmp_path)
    done = sort(inbox, "--catch-neither")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (inbox / "unsure").iterdir()) == ["0.png", "1.png", "2.png"]
    events = [line for line in lines(done.stderr) if line["event"] == "photo.unsure"]
    assert [event["detail"] for event in events] == [DETAIL] * 3
    entry = lines(history(inbox, "--json"))[0]
    assert (entry["kind"], entry["detail"]) == ("unsure", DETAIL)
    assert entry["label"] in ("cat", "dog")


@pytest.mark.long
def test_dry_runs_and_the_history_s_table_say_what_outliers_are(tmp_path: Path) -> None:
    inbox = inbox_of_outliers(tmp_path)
    planned = sort(inbox, "--catch-neither", "--dry-run", "--json")
    assert {(d["kind"], d["detail"]) for d in lines(planned.stdout)} == {("unsure", DETAIL)}
    assert {d["kind"] for d in lines(sort(inbox, "--dry-run", "--json").stdout)} == {"sorted"}
    assert sort(inbox, "--catch-neither").returncode == 0
    assert history(inbox).count(DETAIL) == 3


@pytest.mark.long
def test_a_model_without_a_detector_is_refused_with_catch_neither_and_sorts_without_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED_MODEL, folder)
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del content["neither"], content["files"][NEITHER]
    (folder / NEITHER).unlink()
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    inbox = make_tree(tmp_path / "inbox", {"a.jpg": plain((200, 40, 40))})
    refused = sort(inbox, "--model", str(folder), "--catch-neither")
    assert refused.returncode == 2
    assert "--catch-neither" in refused.stderr
    assert (inbox / "a.jpg").exists()
    assert sort(inbox, "--model", str(folder)).returncode == 0


def test_the_refusal_comes_before_the_engine_is_opened(manifest: Manifest) -> None:
    with pytest.raises(ConfigurationError, match="--catch-neither"):
        preflight.decided(Settings(catch_neither=True), manifest)
    assert preflight.decided(Settings(), manifest).min_confidence == 0.0
