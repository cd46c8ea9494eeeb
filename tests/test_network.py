"""The torch networks and the engine that runs them, on the model that ships."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from pictures import smooth
from torch import nn

from sorter.classifier import network
from sorter.classifier.engine import Engine, open_engine
from sorter.classifier.manifest import WEIGHTS, Manifest
from sorter.classifier.torch_engine import choose_device
from sorter.errors import ConfigurationError, ModelError
from sorter.settings import SHIPPED_MODEL

NOISE = 0.02
"""How far bf16 alone, with its 8 bits of precision, may move a probability."""


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(SHIPPED_MODEL / WEIGHTS)


@pytest.fixture(scope="module")
def loaded(shipped: Manifest) -> nn.Module:
    return network.load(SHIPPED_MODEL, shipped)


@pytest.fixture(scope="module")
def engine(shipped: Manifest) -> Engine:
    return open_engine(SHIPPED_MODEL, shipped, "torch", "cpu", 32)


def photos(count: int, size: int) -> npt.NDArray[np.uint8]:
    """Different pictures, uint8 (N, S, S, 3)."""
    return np.stack([np.asarray(smooth(seed, (size, size))) for seed in range(count)])


def refusal(folder: Path, model: Manifest, weights: Mapping[str, torch.Tensor]) -> str:
    """The one-line message with which weights are refused."""
    (folder / WEIGHTS).write_bytes(network.half(weights))
    with pytest.raises(ModelError) as caught:
        network.load(folder, model)
    (folder / WEIGHTS).unlink()  # 47 MB that pytest would keep
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_without_hidden_layers_the_head_is_linear() -> None:
    with torch.device("meta"):
        weights = network.build("resnet50", (), 3).state_dict()
    assert {name: tuple(v.shape) for name, v in weights.items() if name.startswith("fc.")} == {
        "fc.weight": (3, 2048),
        "fc.bias": (3,),
    }


def test_hidden_head_sizes_appear_in_the_state_dict() -> None:
    with torch.device("meta"):
        weights = network.build("resnet50", (16, 8), 3).state_dict()
    assert {name: tuple(v.shape) for name, v in weights.items() if name.startswith("fc.") and "weight" in name} == {
        "fc.0.weight": (16, 2048),
        "fc.2.weight": (8, 16),
        "fc.4.weight": (3, 8),
    }


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"unknown architecture perceptron: this sorter knows .*resnet50"):
        network.build("perceptron", (), 2)


def test_half_keeps_every_number_to_the_precision_of_fp16() -> None:
    weights = {"weight": torch.tensor([[1.0, -0.1], [3e-5, 60000.0]]), "batches": torch.tensor(2**40)}
    back = safetensors.torch.load(network.half(weights))
    assert back["weight"].dtype is torch.float16
    assert torch.equal(back["weight"], weights["weight"].half())
    assert torch.equal(back["batches"], weights["batches"])


def test_half_accepts_weights_that_are_not_contiguous() -> None:
    turned = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(safetensors.torch.load(network.half({"weight": turned}))["weight"].float(), turned)


@pytest.mark.long
def test_the_shipped_weights_survive_being_written_again(tmp_path: Path, shipped: Manifest) -> None:
    loaded = network.load(SHIPPED_MODEL, shipped).state_dict()
    (tmp_path / WEIGHTS).write_bytes(network.half(loaded))
    again = network.load(tmp_path, shipped).state_dict()
    (tmp_path / WEIGHTS).unlink()
    assert [name for name in loaded if not torch.equal(loaded[name], again[name])] == []


def test_a_loaded_network_is_fp32_and_in_evaluation_mode(loaded: nn.Module) -> None:
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, shipped: Manifest, state: dict[str, torch.Tensor], value: float
) -> None:
    broken = state["fc.4.bias"].clone()
    broken[1] = value
    sentence = refusal(tmp_path, shipped, {**state, "fc.4.bias": broken})
    assert "not finite" in sentence
    assert "fc.4.bias" in sentence


def test_weights_for_another_number_of_classes_are_refused(
    tmp_path: Path, shipped: Manifest, state: dict[str, torch.Tensor]
) -> None:
    three = {**state, "fc.4.weight": torch.zeros(3, 90), "fc.4.bias": torch.zeros(3)}
    assert "do not fit resnet50" in refusal(tmp_path, shipped, three)


def test_incomplete_weights_are_refused(tmp_path: Path, shipped: Manifest, state: dict[str, torch.Tensor]) -> None:
    assert "do not fit resnet50" in refusal(tmp_path, shipped, {"fc.4.bias": state["fc.4.bias"]})


def test_weights_for_another_head_are_refused(
    tmp_path: Path, shipped: Manifest, state: dict[str, torch.Tensor]
) -> None:
    hidden = shipped.model_copy(update={"head_hidden": (8,)})
    assert "do not fit resnet50" in refusal(tmp_path, hidden, {"fc.4.bias": state["fc.4.bias"]})


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_without_weights_is_refused(tmp_path: Path, shipped: Manifest, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match="do not fit"):
        network.load(tmp_path, shipped)


@pytest.mark.long
def test_folding_does_not_change_the_outputs(loaded: nn.Module) -> None:
    images = torch.from_numpy(photos(2, 96)).permute(0, 3, 1, 2).float() / 128 - 1
    with torch.inference_mode():
        before = loaded(images)
        after = network.fold_batch_norm(loaded)(images)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_folding_leaves_no_batch_norm() -> None:
    folded = network.fold_batch_norm(network.build("resnet18", (), 2).eval())
    assert [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)] == []


@pytest.mark.long  # the same with a small network: test_torch_engine.py
def test_the_engine_gives_the_probabilities_of_the_network(
    engine: Engine, loaded: nn.Module, shipped: Manifest
) -> None:
    pixels = photos(4, shipped.input.size)
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (shipped.input.mean, shipped.input.std))
    with torch.inference_mode():
        wanted = (loaded((scaled - mean) / std) / shipped.temperature).softmax(1).numpy()
    answers = engine.classify(pixels)
    assert (answers.dtype, answers.shape) == (np.dtype(np.float32), (4, len(shipped.classes)))
    assert answers.sum(1) == pytest.approx(1, abs=1e-6)
    assert np.abs(answers - wanted).max() < NOISE


@pytest.mark.long
def test_an_answer_does_not_depend_on_the_other_photos_in_the_batch(engine: Engine, shipped: Manifest) -> None:
    pixels = photos(6, shipped.input.size)
    together = engine.classify(pixels)
    alone = np.concatenate([engine.classify(pixels[i : i + 1]) for i in range(6)])
    assert np.abs(together - alone).max() < NOISE
    assert np.ptp(alone[:, 0]) > 5 * NOISE, "the answers differ by more than the tolerance"


@pytest.mark.long
def test_the_same_photos_get_the_same_answer_again(engine: Engine, shipped: Manifest) -> None:
    pixels = photos(3, shipped.input.size)
    assert np.array_equal(engine.classify(pixels), engine.classify(pixels))


def test_a_model_whose_answers_are_not_finite_is_refused(tmp_path: Path, shipped: Manifest) -> None:
    seen = shipped.input.model_copy(update={"std": (0.0, 0.0, 0.0)})
    zero = shipped.model_copy(update={"architecture": "squeezenet1_1", "head_hidden": (), "input": seen})
    weights = network.build("squeezenet1_1", (), len(shipped.classes)).state_dict()
    (tmp_path / WEIGHTS).write_bytes(network.half(weights))
    with pytest.raises(ModelError, match="does not answer with probabilities"):
        open_engine(tmp_path, zero, "torch", "cpu", 4)


@pytest.mark.parametrize("name", ["cuda:99", "cuda:128", "cuda:255", "cuda:999", "cuda:00", "toaster"])
def test_a_device_that_does_not_exist_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^--device {name}: [^\n]+$"):
        choose_device(name)


def test_without_an_apple_gpu_mps_is_refused() -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has an Apple GPU")
    with pytest.raises(ConfigurationError, match=r"^--device mps: "):
        choose_device("mps")


def test_without_a_cuda_gpu_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    with pytest.raises(ConfigurationError, match=r"^--device cuda: "):
        choose_device("cuda")


def test_auto_finds_a_device_on_every_machine() -> None:
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (choose_device("auto").type == "cpu") is not has_gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cuda_gpu_gives_the_answers_of_the_cpu(engine: Engine, shipped: Manifest) -> None:
    pixels = photos(6, shipped.input.size)
    gpu = open_engine(SHIPPED_MODEL, shipped, "auto", "cuda", 32)
    assert gpu.precision == "fp16"
    assert np.abs(gpu.classify(pixels) - engine.classify(pixels)).max() < NOISE
