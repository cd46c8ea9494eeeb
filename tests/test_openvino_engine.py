"""OpenVINO's engine and its cache, on the model that ships."""

import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import SHARED
from pictures import smooth
from PIL import Image

from sorter.classifier import compiled_cache
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import OPENVINO_INT8, Manifest
from sorter.classifier.openvino_engine import OpenVinoEngine
from sorter.errors import ConfigurationError, ModelError
from sorter.settings import SHIPPED_MODEL


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sorter"


def full_size_only(shipped: Manifest) -> OpenVinoEngine:
    """The engine without the low-resolution pass."""
    return OpenVinoEngine(SHIPPED_MODEL, shipped, min_confidence=1.0)


@pytest.fixture(scope="module")
def engine(shipped: Manifest) -> OpenVinoEngine:
    return OpenVinoEngine(SHIPPED_MODEL, shipped)


def photos(count: int, size: int = 144) -> npt.NDArray[np.uint8]:
    """Different pictures, uint8 (N, S, S, 3)."""
    return np.stack([np.asarray(smooth(seed, (size, size))) for seed in range(count)])


@pytest.mark.long
def test_answers_agree_with_torch(shipped: Manifest) -> None:
    engine, pixels = full_size_only(shipped), photos(20)
    torch = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 32)
    ours, theirs = engine.classify(pixels)[:, 0], torch.classify(pixels)[:, 0]
    # These pictures show nothing, so 8 and 16 bits may disagree a little, but the answers must correlate.
    assert np.abs(ours - theirs).mean() < 0.25
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photos in ../shared")
def test_real_photos_get_the_same_labels_as_from_torch(engine: OpenVinoEngine, shipped: Manifest) -> None:
    paths = sorted((SHARED / "photos").glob("*.jpg"))[:100]
    pixels = np.stack([np.asarray(Image.open(p).convert("RGB").resize((144, 144))) for p in paths])
    torch = open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 32)
    assert (engine.classify(pixels).argmax(1) != torch.classify(pixels).argmax(1)).sum() <= 1


def test_answers_are_probabilities_in_the_order_of_the_photos(engine: OpenVinoEngine) -> None:
    pixels = photos(33)
    alone = np.concatenate([engine.classify(pixels[i : i + 1]) for i in range(33)])
    for count in (1, 3, 4, 5, 33):
        together = engine.classify(pixels[:count])
        assert together.dtype == np.float32
        assert together.shape == (count, 2)
        assert together.sum(1) == pytest.approx(np.ones(count), abs=1e-5)
        assert np.abs(together - alone[:count]).max() < 1e-4


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.long)])
def test_each_thread_gets_its_own_answers(engine: OpenVinoEngine, rounds: int) -> None:
    pixels = photos(12)
    expected = engine.classify(pixels)
    wrong: list[int] = []

    def work(first: int) -> None:
        order = np.roll(np.arange(12), first)
        for _ in range(rounds):
            if np.abs(engine.classify(pixels[order]) - expected[order]).max() > 1e-4:
                wrong.append(first)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_cpu_gets_openvino_with_8_bits(shipped: Manifest) -> None:
    opened = open_engine(SHIPPED_MODEL, shipped, "auto", "cpu", 32)
    assert (opened.name, opened.device, opened.precision) == ("openvino", "cpu", "int8")


@pytest.mark.long
def test_a_model_without_an_openvino_network_runs_on_torch(shipped: Manifest) -> None:
    weights_only = shipped.model_copy(update={"files": {"weights.safetensors": shipped.files["weights.safetensors"]}})
    assert open_engine(SHIPPED_MODEL, weights_only, "auto", "cpu", 32).name == "torch"


def test_openvino_on_a_gpu_is_refused(shipped: Manifest) -> None:
    with pytest.raises(ConfigurationError, match="--engine openvino runs on the CPU only: drop --device cuda"):
        open_engine(SHIPPED_MODEL, shipped, "openvino", "cuda", 32)


@pytest.mark.parametrize("part", OPENVINO_INT8)
def test_a_damaged_network_file_is_refused(part: str, tmp_path: Path, shipped: Manifest, cache: Path) -> None:
    for name in OPENVINO_INT8:
        (tmp_path / name).write_bytes(b"nonsense" if name == part else (SHIPPED_MODEL / name).read_bytes())
    with pytest.raises(ModelError, match=r"cannot be used \(.+\): export the model again$"):
        OpenVinoEngine(tmp_path, shipped)


def test_a_network_with_other_classes_is_refused(shipped: Manifest) -> None:
    third = shipped.classes[0].model_copy(update={"label": "bird", "folder": "birds"})
    more = shipped.model_copy(update={"classes": (*shipped.classes, third)})
    with pytest.raises(ModelError, match="does not answer with probabilities"):
        open_engine(SHIPPED_MODEL, more, "openvino", "cpu", 32)


def test_a_compiled_network_is_cached_and_answers_the_same(shipped: Manifest, cache: Path) -> None:
    first = full_size_only(shipped).classify(photos(3))
    (stored,) = cache.iterdir()
    before = stored.stat().st_ino  # a new entry would be a new file
    assert np.array_equal(full_size_only(shipped).classify(photos(3)), first)
    assert stored.stat().st_ino == before


@pytest.mark.parametrize(
    "damage", ["one byte", *(pytest.param(name, marks=pytest.mark.long) for name in ("empty", "half", "other"))]
)
def test_a_damaged_cache_entry_is_compiled_again(damage: str, shipped: Manifest, cache: Path) -> None:
    expected = full_size_only(shipped).classify(photos(3))
    (stored,) = cache.iterdir()
    content = stored.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    stored.write_bytes({"empty": b"", "half": content[:middle], "one byte": flipped, "other": b"x" * 99}[damage])
    damaged = stored.read_bytes()
    assert np.array_equal(full_size_only(shipped).classify(photos(3)), expected)
    assert stored.read_bytes() != damaged


def test_a_cache_entry_that_openvino_refuses_is_compiled_again(shipped: Manifest, cache: Path) -> None:
    expected = full_size_only(shipped).classify(photos(3))
    (stored,) = cache.iterdir()
    compiled_cache.store(stored.stem, b"intact, but no network")
    assert np.array_equal(full_size_only(shipped).classify(photos(3)), expected)
    assert b"intact, but no network" not in stored.read_bytes()


def test_the_cache_keeps_the_entries_that_were_used_last(cache: Path) -> None:
    for number in range(12):
        compiled_cache.store(str(number), b"compiled")
        os.utime(cache / f"{number}.blob", (number, number))
    (cache / "mine.txt").write_text("not ours")
    assert compiled_cache.load("4") == b"compiled"
    compiled_cache.store("last", b"compiled")
    assert {path.stem for path in cache.iterdir()} == {"4", "6", "7", "8", "9", "10", "11", "last", "mine"}


def test_a_cache_folder_that_cannot_be_created_is_ignored(
    shipped: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(full_size_only(shipped).classify(photos(3))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
