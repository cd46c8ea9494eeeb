"""OpenVINO's engine and its cache, on the model that ships."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import LONG_AGO, SHARED, make_tree
from pictures import encoded, smooth
from PIL import Image

from sorter.classifier import manifest
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import OPENVINO_INT8, Manifest
from sorter.classifier.openvino_engine import OpenVinoEngine
from sorter.errors import ConfigurationError, ModelError
from sorter.settings import SHIPPED_MODEL


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sorter"


@pytest.fixture(scope="module")
def shipped() -> Manifest:
    return manifest.read(SHIPPED_MODEL)


def whole_looks(shipped: Manifest) -> OpenVinoEngine:
    """The engine without a first look."""
    return OpenVinoEngine(SHIPPED_MODEL, shipped, min_confidence=1.0)


@pytest.fixture(scope="module")
def engine(shipped: Manifest) -> OpenVinoEngine:
    return OpenVinoEngine(SHIPPED_MODEL, shipped)


def photos(count: int, size: int = 144) -> npt.NDArray[np.uint8]:
    """Different pictures, uint8 (N, S, S, 3)."""
    return np.stack([np.asarray(smooth(seed, (size, size))) for seed in range(count)])


# --- answers ---


def test_it_answers_what_torch_does(shipped: Manifest) -> None:
    engine, pixels = whole_looks(shipped), photos(20)
    torch = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 32)
    ours, theirs = engine.classify(pixels)[:, 0], torch.classify(pixels)[:, 0]
    # Pictures of nothing, about which 8 bits and 16 may differ: by little, and never in kind.
    assert np.abs(ours - theirs).mean() < 0.08
    assert np.corrcoef(ours, theirs)[0, 1] > 0.95


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photos in ../shared")
def test_real_photos_get_the_labels_that_torch_gives_them(engine: OpenVinoEngine, shipped: Manifest) -> None:
    paths = sorted((SHARED / "photos").glob("*.jpg"))[:100]
    pixels = np.stack([np.asarray(Image.open(p).convert("RGB").resize((144, 144))) for p in paths])
    torch = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 32)
    assert (engine.classify(pixels).argmax(1) != torch.classify(pixels).argmax(1)).sum() <= 1


@pytest.mark.parametrize("count", [1, 3, 4, 5, 33])
def test_answers_are_probabilities_in_the_order_of_the_photos(engine: OpenVinoEngine, count: int) -> None:
    pixels = photos(count)
    together = engine.classify(pixels)
    assert together.dtype == np.float32
    assert together.shape == (count, 2)
    assert together.sum(1) == pytest.approx(np.ones(count), abs=1e-5)
    alone = np.concatenate([engine.classify(pixels[i : i + 1]) for i in range(count)])
    assert np.abs(together - alone).max() < 1e-4


def test_threads_get_their_own_answers(engine: OpenVinoEngine) -> None:
    pixels = photos(12)
    expected = engine.classify(pixels)
    wrong: list[int] = []

    def work(first: int) -> None:
        order = np.roll(np.arange(12), first)
        for _ in range(10):
            if np.abs(engine.classify(pixels[order]) - expected[order]).max() > 1e-4:
                wrong.append(first)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- which engine ---


def test_a_processor_gets_openvino_and_its_8_bits(shipped: Manifest) -> None:
    opened = open_engine(SHIPPED_MODEL, shipped, "auto", "cpu", 32)
    assert (opened.name, opened.device, opened.precision) == ("openvino", "cpu", "int8")


def test_a_model_without_a_network_for_it_runs_on_torch(shipped: Manifest) -> None:
    bare = shipped.model_copy(update={"files": {"weights.safetensors": shipped.files["weights.safetensors"]}})
    assert open_engine(SHIPPED_MODEL, bare, "auto", "cpu", 32).name == "torch"
    with pytest.raises(ConfigurationError, match="no network for OpenVINO"):
        open_engine(SHIPPED_MODEL, bare, "openvino", "cpu", 32)


def test_it_runs_on_no_gpu(shipped: Manifest) -> None:
    with pytest.raises(ConfigurationError, match="--engine openvino runs on the processor"):
        open_engine(SHIPPED_MODEL, shipped, "openvino", "cuda", 32)


@pytest.mark.parametrize("part", OPENVINO_INT8)
def test_a_network_that_is_none_is_refused(part: str, tmp_path: Path, shipped: Manifest, cache: Path) -> None:
    for name in OPENVINO_INT8:
        (tmp_path / name).write_bytes(b"nonsense" if name == part else (SHIPPED_MODEL / name).read_bytes())
    with pytest.raises(ModelError, match=r"cannot be used \(.+\): export the model again$"):
        OpenVinoEngine(tmp_path, shipped)


def test_a_network_with_other_classes_is_refused(shipped: Manifest) -> None:
    third = shipped.classes[0].model_copy(update={"label": "bird", "folder": "birds"})
    more = shipped.model_copy(update={"classes": (*shipped.classes, third)})
    with pytest.raises(ModelError, match="something else than probabilities"):
        open_engine(SHIPPED_MODEL, more, "openvino", "cpu", 32)


# --- cache ---


def test_what_was_compiled_is_kept_and_answers_the_same(shipped: Manifest, cache: Path) -> None:
    first = whole_looks(shipped).classify(photos(3))
    (stored,) = cache.iterdir()
    before = stored.stat().st_mtime_ns
    assert np.array_equal(whole_looks(shipped).classify(photos(3)), first)
    assert stored.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["empty", "half", "one byte", "other"])
def test_a_damaged_cache_is_not_believed(damage: str, shipped: Manifest, cache: Path) -> None:
    expected = whole_looks(shipped).classify(photos(3))
    (stored,) = cache.iterdir()
    content = stored.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    stored.write_bytes({"empty": b"", "half": content[:middle], "one byte": flipped, "other": b"x" * 99}[damage])
    damaged = stored.read_bytes()
    assert np.array_equal(whole_looks(shipped).classify(photos(3)), expected)
    assert stored.read_bytes() != damaged  # made anew


def test_without_a_place_for_the_cache_it_does_without(
    shipped: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(whole_looks(shipped).classify(photos(3))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- a whole sort ---


def test_a_sort_imports_no_torch_and_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": encoded(smooth(1), "JPEG")}, modified=LONG_AGO)
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import json, sys\n"
        "from sorter.cli.main import main\n"
        f"code = main(['run', '--once', '--device', 'cpu', '--inbox', {str(tmp_path / 'in')!r}])\n"
        "unwanted = ('torch', 'torchvision', 'trainer', 'openvino_telemetry')\n"
        "loaded = [name for name in unwanted if sys.modules.get(name)]\n"
        "print(json.dumps([code, loaded]))\n"
    )
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    assert list(home.rglob("*")) == []
