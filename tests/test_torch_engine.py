"""The torch engine's batches: shapes, threads, memory that runs out. What only a GPU can show skips without one."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import structlog
import torch
from pictures import smooth
from torch import nn

from sorter.classifier import manifest, network, torch_engine
from sorter.classifier.manifest import WEIGHTS, Class, Input, Manifest
from sorter.classifier.torch_engine import TorchEngine, choose_device, shapes

NOISE = 0.02
"""How far probabilities may move from half precision alone."""
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A ResNet18 whose answers differ from picture to picture."""
    torch.manual_seed(0)
    net = network.build("resnet18", (), 3).eval()
    with torch.no_grad():
        net.get_submodule("fc").weight.mul_(8)  # type: ignore[operator]
    described = Manifest(
        format_version=1,
        name="small",
        architecture="resnet18",
        classes=tuple(Class(label=name, folder=name) for name in "abc"),
        input=Input(size=32, crop="squash", mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3)),
        temperature=1.5,
        files={},
    )
    folder = tmp_path_factory.mktemp("model")
    return folder, manifest.write(folder, described, {WEIGHTS: network.half(net.state_dict())}, "card")


def photos(count: int) -> npt.NDArray[np.uint8]:
    """Different pictures, uint8 (N, 32, 32, 3)."""
    return np.stack([np.asarray(smooth(seed, (32, 32))) for seed in range(count)])


def plainly(model: tuple[Path, Manifest], pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What the network answers without any of the engine's devices."""
    folder, described = model
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (described.input.mean, described.input.std))
    with torch.inference_mode():
        normalised = (torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 255 - mean) / std
        logits = network.load(folder, described)(normalised)
        answers: npt.NDArray[np.float32] = (logits / described.temperature).softmax(1).numpy()
    return answers


def watched(engine: TorchEngine, before: Callable[[int], None]) -> None:
    """Do something before the network computes a batch of so many."""
    inner = engine._classifier

    class Watching(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            before(len(batch))
            answer: torch.Tensor = inner(batch)
            return answer

    engine._classifier = Watching()  # type: ignore[assignment]


@pytest.mark.parametrize("count", range(1, 17))
def test_answers_are_those_of_the_network_whatever_the_count(model: tuple[Path, Manifest], count: int) -> None:
    pixels = photos(count)
    found = TorchEngine(*model, CPU, 8).classify(pixels)
    assert (found.shape, found.dtype.name) == ((count, 3), "float32")
    assert found.sum(1) == pytest.approx(np.ones(count), abs=1e-5)
    expected = plainly(model, pixels)
    assert np.abs(found - expected).max() < NOISE
    assert count < 8 or np.ptp(expected[:, 0]) > 5 * NOISE  # they differ by more than what is tolerated


def test_an_answer_does_not_depend_on_what_stood_there_before(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, CPU, 8)
    fresh = engine.classify(photos(3))
    engine.classify(photos(8)[::-1])  # leaves other pixels behind the next three
    assert np.array_equal(engine.classify(photos(3)), fresh)


def test_views_that_may_not_be_written_are_taken(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, CPU, 8)
    pixels = photos(6)
    pixels.flags.writeable = False
    assert np.abs(engine.classify(pixels[::-2]) - engine.classify(pixels)[::-2]).max() < NOISE


@pytest.mark.parametrize(("batch_size", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_the_network_meets_few_shapes(model: tuple[Path, Manifest], batch_size: int, expected: list[int]) -> None:
    engine = TorchEngine(*model, CPU, batch_size)
    met: set[int] = set()
    watched(engine, met.add)
    for count in range(1, 2 * batch_size + 1):
        engine.classify(photos(count))
    assert sorted(met) == expected == shapes(batch_size)


def test_a_batch_without_memory_is_halved_from_then_on_and_said_once(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, CPU, 16)
    met: list[int] = []

    def refuse(count: int) -> None:
        met.append(count)
        if count > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    watched(engine, refuse)
    with structlog.testing.capture_logs() as logs:
        first = engine.classify(photos(16))
        assert met == [16, 8, 4, 4, 4, 4]
        engine.classify(photos(16))
    assert met[6:] == [4, 4, 4, 4]
    assert [(line["event"], line["batch_size"]) for line in logs] == [
        ("engine.smaller_batches", 8),
        ("engine.smaller_batches", 4),
    ]
    assert np.abs(first - plainly(model, photos(16))).max() < NOISE


def test_a_photo_without_memory_is_an_error(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, CPU, 4)

    def refuse(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    watched(engine, refuse)
    with pytest.raises(torch.OutOfMemoryError):
        engine.classify(photos(4))


def in_two_threads(engine: TorchEngine, rounds: int) -> list[str]:
    """Classify different photos in two threads; what went wrong."""
    pixels = photos(12)
    expected = engine.classify(pixels)
    wrong: list[str] = []

    def work(first: int) -> None:
        for round_ in range(rounds):
            order = np.roll(np.arange(12), first + round_)[: 5 + round_ % 8]
            if np.abs(engine.classify(pixels[order]) - expected[order]).max() > NOISE:
                wrong.append(f"thread {first}, round {round_}")

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_threads_get_their_own_answers(model: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(*model, CPU, 8)
    engine._slots.put(torch_engine._Slot(8, 32, 3, CPU))  # as on a GPU
    assert in_two_threads(engine, 60) == []


# --- on a GPU ---


@needs_cuda
def test_a_gpu_answers_what_the_processor_does(model: tuple[Path, Manifest]) -> None:
    gpu = TorchEngine(*model, choose_device("cuda"), 8)
    assert (gpu.precision, gpu.concurrency) == ("fp16", 2)
    assert np.abs(gpu.classify(photos(16)) - plainly(model, photos(16))).max() < NOISE


@needs_cuda
def test_two_threads_on_a_gpu_get_their_own_answers(model: tuple[Path, Manifest]) -> None:
    assert in_two_threads(TorchEngine(*model, choose_device("cuda"), 8), 300) == []


@needs_cuda
def test_memory_on_a_gpu_does_not_grow(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, choose_device("cuda"), 8)
    for count in range(1, 9):
        engine.classify(photos(count))
    before = torch.cuda.memory_reserved()
    for count in range(50):
        engine.classify(photos(1 + count % 8))
    assert torch.cuda.memory_reserved() == before


@needs_cuda
def test_a_gpu_whose_memory_is_taken_classifies_smaller_batches(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, choose_device("cuda"), 1024)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200e6) / total)
    try:
        found = engine.classify(np.tile(photos(8), (128, 1, 1, 1)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine._most < 1024
    assert np.abs(found - np.tile(plainly(model, photos(8)), (128, 1))).max() < NOISE
