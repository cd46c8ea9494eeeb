"""Photos to a network's outputs, through the fastest engine of the machine: OpenVINO on a CPU, torch on a GPU.

In: a torch network and photos. Out: float32 (N, W), where W is the width of the features or the number of classes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import openvino
import torch
from torch import nn

from sorter.classifier.network import Classifier
from sorter.classifier.request_pool import RequestPool
from sorter.decoding.images import Preprocessing
from trainer.data.layouts import Sample
from trainer.data.pixels import decoded

BATCH = 32

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Item = TypeVar("Item")
Runner = Callable[[Iterable[Pixels]], list[Floats]]
"""Batches uint8 (N, S, S, 3) to outputs float32 (N, W)."""


def convert(network: nn.Module, mean: Sequence[float], std: Sequence[float], size: int) -> openvino.Model:
    """Convert a torch network to an OpenVINO model from uint8 (N, S, S, 3), with normalisation in the graph."""
    example = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    any_batch = {0: torch.export.Dim("photos", max=4096)}
    program = torch.export.export(Classifier(network.eval(), mean, std).eval(), (example,), dynamic_shapes=(any_batch,))
    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({"pixels"})
    model.outputs[0].get_tensor().set_names({"logits"})
    return model


def runner(network: nn.Module, mean: Sequence[float], std: Sequence[float], size: int, device: torch.device) -> Runner:
    """The fastest way to run a network on a device."""
    if device.type != "cpu":
        return on_torch(network, mean, std, device)
    return on_openvino(convert(network, mean, std, size))


def on_openvino(model: openvino.Model, *, exactly: bool = False) -> Runner:
    """Several batches at a time, each on some of the cores.

    Args:
        model: from uint8 (N, S, S, 3).
        exactly: compute in 32 bits also on a CPU where OpenVINO would choose bf16.
    """
    settings = {"PERFORMANCE_HINT": "THROUGHPUT"} | ({"INFERENCE_PRECISION_HINT": "f32"} if exactly else {})
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    count = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
    requests = RequestPool(compiled, count)

    def run(batches: Iterable[Pixels]) -> list[Floats]:
        with ThreadPoolExecutor(count) as pool:
            return list(_ahead(pool, requests.infer, batches, count))

    return run


def on_torch(network: nn.Module, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Runner:
    """One batch after another, in half precision on a GPU."""
    classifier = Classifier(network.eval(), mean, std).eval().to(device).to(memory_format=torch.channels_last)

    def run(batches: Iterable[Pixels]) -> list[Floats]:
        half = torch.autocast(device.type, torch.float16, enabled=device.type != "cpu")
        with torch.inference_mode(), half:
            return [classifier(torch.from_numpy(pixels).to(device)).cpu().numpy() for pixels in batches]

    return run


def batches(samples: Sequence[Sample], preprocessing: Preprocessing) -> Iterator[Pixels]:
    """Decode photos in parallel, uint8 (up to 32, S, S, 3) at a time, only a few batches ahead."""

    def pixels(sample: Sample) -> Pixels:
        return decoded(sample.path, preprocessing) if sample.pixels is None else sample.pixels

    def batch(start: int) -> Pixels:
        return np.stack([pixels(sample) for sample in samples[start : start + BATCH]])

    with ThreadPoolExecutor() as pool:
        yield from _ahead(pool, batch, range(0, len(samples), BATCH), 4)


def _ahead(
    pool: ThreadPoolExecutor, action: Callable[[Item], Pixels | Floats], items: Iterable[Item], count: int
) -> Iterator[Any]:
    """`pool.map` that takes at most `count` items more than it has yielded, so that memory stays bounded."""
    waiting: deque[Future[Pixels | Floats]] = deque()
    for item in items:
        waiting.append(pool.submit(action, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def answers(
    run: Runner,
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    *,
    mirrored: bool = False,
    track: Callable[[Iterable[Pixels], int], Iterable[Pixels]] = lambda batches, _: batches,
) -> Floats:
    """Run every photo through a network.

    Args:
        run: the network.
        samples: the photos.
        preprocessing: the network's.
        mirrored: run the mirror image of each photo instead.
        track: given the batches and their number, passes them on; for a progress bar.

    Returns:
        float32 (N, W), in the order of the samples.
    """
    pixels = track(batches(samples, preprocessing), -(-len(samples) // BATCH))
    return np.concatenate(run(np.ascontiguousarray(p[:, :, ::-1]) if mirrored else p for p in pixels))
