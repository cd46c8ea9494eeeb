"""Inference requests of one compiled OpenVINO network, shared by the threads that call it."""

import queue

import numpy as np
import numpy.typing as npt
import openvino


class RequestPool:
    """A fixed number of inference requests, each used by one thread at a time.

    This is not OpenVINO's `AsyncInferQueue`, whose callbacks run Python in OpenVINO's own threads: it hangs if the
    network is destroyed while one of them waits for the interpreter.

    Args:
        compiled: the network.
        requests: how many threads may run it at the same time; more of them wait.
    """

    def __init__(self, compiled: openvino.CompiledModel, requests: int) -> None:
        self._outputs = len(compiled.outputs)
        self._idle: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(requests):
            self._idle.put(compiled.create_infer_request())

    def infer(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Run the network on uint8 (N, S, S, 3); its outputs side by side, float32 (N, W)."""
        request = self._idle.get()
        try:
            results = request.infer([pixels], share_inputs=True)
            # Copied: a request reuses its output buffers.
            outputs = [results[number].astype(np.float32) for number in range(self._outputs)]  # (N, W) each
            return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, 1)
        finally:
            self._idle.put(request)
