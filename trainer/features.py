"""Photos to a network's answers, once, through the fastest engine there is on a CPU: OpenVINO.

In: a torch network and photos. Out: what comes out of it, float32 (N, W), W the features' width or the classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import numpy.typing as npt
import openvino
import torch
from torch import nn

from sorter.images import Preprocessing
from sorter.network import Classifier
from trainer.data import Sample
from trainer.pixels import decoded

_BATCH = 32

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def convert(network: nn.Module, mean: Sequence[float], std: Sequence[float], size: int) -> openvino.Model:
    """A torch network as an OpenVINO model from uint8 (N, S, S, 3), with normalisation in the graph."""
    example = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    any_number = {0: torch.export.Dim("photos", max=4096)}
    program = torch.export.export(
        Classifier(network.eval(), mean, std).eval(), (example,), dynamic_shapes=(any_number,)
    )
    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({"pixels"})
    model.outputs[0].get_tensor().set_names({"logits"})
    return model


def batches(samples: Sequence[Sample], preprocessing: Preprocessing) -> Iterator[Pixels]:
    """Decode photos in parallel, uint8 (up to 32, S, S, 3) at a time, with few decoded ahead."""
    with ThreadPoolExecutor() as pool:
        waiting = iter(range(0, len(samples), _BATCH))

        def submit(start: int) -> list[object]:
            return [pool.submit(decoded, sample.path, preprocessing) for sample in samples[start : start + _BATCH]]

        ahead = [submit(start) for start in islice(waiting, 4)]
        while ahead:
            batch = ahead.pop(0)
            ahead += [submit(start) for start in islice(waiting, 1)]
            yield np.stack([future.result() for future in batch])  # type: ignore[attr-defined]


def answers(
    model: openvino.Model,
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    *,
    mirrored: bool,
    track: Callable[[Iterable[Pixels], int], Iterable[Pixels]],
) -> Floats:
    """Run every photo through a model.

    Args:
        model: from uint8 (N, S, S, 3) to float32 (N, W).
        samples: the photos.
        preprocessing: what the model wants.
        mirrored: run the mirror image of each instead.
        track: given the batches and their number, passes them on; for a progress bar.

    Returns:
        float32 (N, W), in the order of the samples.
    """
    compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    results: dict[int, Floats] = {}
    requests = openvino.AsyncInferQueue(compiled)

    def keep(request: openvino.InferRequest, index: int) -> None:
        results[index] = request.get_output_tensor().data.copy()

    requests.set_callback(keep)
    total = -(-len(samples) // _BATCH)
    for index, pixels in enumerate(track(batches(samples, preprocessing), total)):
        requests.start_async(np.ascontiguousarray(pixels[:, :, ::-1]) if mirrored else pixels, index)
    requests.wait_all()
    return np.concatenate([results[index] for index in range(len(results))])
