"""The torch engine's batches: shapes, threads, running out of memory. Tests that need a GPU skip without one."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import structlog
import torch
from pictures import smooth
from torch import nn

from sorter.classifier import engine as engines
from sorter.classifier import manifest, network, torch_engine
from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import WEIGHTS, Class, Input, Manifest
from sorter.classifier.torch_engine import TorchEngine, choose_device, shapes
from sorter.errors import ModelError, NotNowError
from sorter.settings import SHIPPED_MODEL

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


def reference(model: tuple[Path, Manifest], pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The network's answers, computed without the engine."""
    folder, described = model
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (described.input.mean, described.input.std))
    with torch.inference_mode():
        normalised = (torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 255 - mean) / std
        logits = network.load(folder, described)(normalised)
        answers: npt.NDArray[np.float32] = (logits / described.temperature).softmax(1).numpy()
    return answers


def before_each_batch(engine: TorchEngine, before: Callable[[int], None]) -> None:
    """Call something with the size of each batch before the network computes it."""
    inner = engine._classifier

    class Watching(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            before(len(batch))
            answer: torch.Tensor = inner(batch)
            return answer

    engine._classifier = Watching()  # type: ignore[assignment]


def test_answers_are_those_of_the_network_for_any_number_of_photos(model: tuple[Path, Manifest]) -> None:
    engine, pixels = TorchEngine(*model, CPU, 8), photos(16)
    expected = reference(model, pixels)
    assert np.ptp(expected[:, 0]) > 5 * NOISE, "the answers differ by more than the tolerance"
    for count in (1, 2, 3, 5, 8, 9, 16):
        answers = engine.classify(pixels[:count])
        assert (answers.shape, answers.dtype.name) == ((count, 3), "float32")
        assert answers.sum(1) == pytest.approx(np.ones(count), abs=1e-5)
        assert np.abs(answers - expected[:count]).max() < NOISE


def test_an_answer_does_not_depend_on_the_batch_before_it(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, CPU, 8)
    fresh = engine.classify(photos(3))
    engine.classify(photos(8)[::-1])  # the reused buffer still holds other pixels after the next three
    assert np.array_equal(engine.classify(photos(3)), fresh)


def test_read_only_and_strided_pixels_are_accepted(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, CPU, 8)
    pixels = photos(6)
    pixels.flags.writeable = False
    assert np.abs(engine.classify(pixels[::-2]) - engine.classify(pixels)[::-2]).max() < NOISE


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (6, [1, 2, 4, 6]),
        *(pytest.param(n, sizes, marks=pytest.mark.long) for n, sizes in ((1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]))),
    ],
)
def test_the_network_computes_few_batch_sizes(
    model: tuple[Path, Manifest], batch_size: int, expected: list[int]
) -> None:
    engine = TorchEngine(*model, CPU, batch_size)
    computed: set[int] = set()
    before_each_batch(engine, computed.add)
    for count in (*range(1, batch_size + 1), 2 * batch_size):
        engine.classify(photos(count))
    assert sorted(computed) == expected == shapes(batch_size)


def test_a_batch_that_does_not_fit_into_memory_is_halved_for_good_and_logged_once(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, CPU, 16)
    computed: list[int] = []

    def refuse(count: int) -> None:
        computed.append(count)
        if count > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    before_each_batch(engine, refuse)
    with structlog.testing.capture_logs() as logs:
        first = engine.classify(photos(16))
        assert computed == [16, 8, 4, 4, 4, 4]
        engine.classify(photos(16))
    assert computed[6:] == [4, 4, 4, 4]
    assert [(line["event"], line["batch_size"]) for line in logs] == [
        ("engine.smaller_batches", 8),
        ("engine.smaller_batches", 4),
    ]
    assert np.abs(first - reference(model, photos(16))).max() < NOISE


def test_a_single_photo_that_does_not_fit_into_memory_is_an_error(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, CPU, 4)

    def refuse(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before_each_batch(engine, refuse)
    with pytest.raises(torch.OutOfMemoryError):
        engine.classify(photos(4))


def in_two_threads(engine: TorchEngine, rounds: int) -> list[str]:
    """Classify different photos in two threads, and return what went wrong."""
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


@pytest.mark.parametrize("rounds", [8, pytest.param(60, marks=pytest.mark.long)])
def test_each_thread_gets_its_own_answers(model: tuple[Path, Manifest], rounds: int) -> None:
    engine = TorchEngine(*model, CPU, 8)
    engine._slots.put(torch_engine._Slot(8, 32, 3, CPU))  # as on a GPU
    assert in_two_threads(engine, rounds) == []


def test_a_device_without_streams_is_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(wanted: torch.cuda.Stream | None) -> None:
        raise AttributeError("module 'torch.mps' has no attribute 'current_device'")  # as on a Mac

    monkeypatch.setattr(torch.cuda, "stream", stream)
    slot = torch_engine._Slot(4, 32, 3, torch.device("meta"))
    assert slot.copied_in(photos(3), 4).shape == (4, 32, 32, 3)


@pytest.fixture
def broken_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """A GPU that PyTorch finds, and that fails at the first use."""

    def break_with(error: Exception) -> None:
        class Broken(TorchEngine):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                raise error

        monkeypatch.setattr(engines, "_may_have_gpu", lambda: True)
        monkeypatch.setattr(torch_engine, "choose_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(torch_engine, "TorchEngine", Broken)

    return break_with


@pytest.mark.parametrize(
    "error", [AttributeError("no current_device"), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("")]
)
def test_auto_runs_on_the_cpu_where_the_gpu_cannot_be_used(
    error: Exception, broken_gpu: Callable[[Exception], None], shipped: Manifest
) -> None:
    broken_gpu(error)
    opened = open_engine(SHIPPED_MODEL, shipped, "auto", "auto", 4)
    assert (opened.name, opened.device) == ("openvino", "cpu")
    said = str(error) or "RuntimeError"
    assert opened.unused_gpu == f"cuda cannot be used ({said}): check its driver, or use --device cpu"


def test_a_gpu_that_was_asked_for_by_name_and_fails_is_an_error(
    broken_gpu: Callable[[Exception], None], shipped: Manifest
) -> None:
    broken_gpu(AttributeError("no current_device"))
    with pytest.raises(ModelError, match=r"cannot run on cuda \(no current_device\): use another --device"):
        open_engine(SHIPPED_MODEL, shipped, "auto", "cuda", 4)


def test_a_gpu_whose_memory_is_taken_may_be_free_later(
    broken_gpu: Callable[[Exception], None], shipped: Manifest
) -> None:
    broken_gpu(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"))
    with pytest.raises(NotNowError, match="cuda has no room for the model"):
        open_engine(SHIPPED_MODEL, shipped, "auto", "cuda", 4)


@needs_cuda
def test_a_gpu_gives_the_answers_of_the_cpu(model: tuple[Path, Manifest]) -> None:
    gpu = TorchEngine(*model, choose_device("cuda"), 8)
    assert (gpu.precision, gpu.concurrency) == ("fp16", 2)
    assert np.abs(gpu.classify(photos(16)) - reference(model, photos(16))).max() < NOISE


@needs_cuda
def test_each_thread_gets_its_own_answers_from_a_gpu(model: tuple[Path, Manifest]) -> None:
    assert in_two_threads(TorchEngine(*model, choose_device("cuda"), 8), 300) == []


@needs_cuda
def test_gpu_memory_does_not_grow(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, choose_device("cuda"), 8)
    for count in range(1, 9):
        engine.classify(photos(count))
    before = torch.cuda.memory_reserved()
    for count in range(50):
        engine.classify(photos(1 + count % 8))
    assert torch.cuda.memory_reserved() == before


@needs_cuda
def test_a_gpu_that_is_short_of_memory_classifies_smaller_batches(model: tuple[Path, Manifest]) -> None:
    engine = TorchEngine(*model, choose_device("cuda"), 1024)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200e6) / total)
    try:
        found = engine.classify(np.tile(photos(8), (128, 1, 1, 1)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine._max_batch < 1024
    assert np.abs(found - np.tile(reference(model, photos(8)), (128, 1))).max() < NOISE
