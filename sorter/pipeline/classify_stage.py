"""Batches become decisions.

In: batches from the `Batcher`. Out: a `Decision` for each photo that is to be moved and an `Outcome` for the others,
handed to the `MoveStage`.
"""

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sorter.deadlines import Deadline
from sorter.decisions import Decided, decide, decide_unclassified, kept, unanswered
from sorter.decoding.decoded import Decoded
from sorter.pipeline.batcher import Batcher
from sorter.pipeline.measures import Measures
from sorter.pipeline.model_in_use import ModelInUse
from sorter.pipeline.move_stage import MoveStage


class ClassifyStage:
    """What one engine thread does; there are `engine.concurrency` of them.

    Args:
        model: classifies, until another one replaces it.
        catch_neither: ask it also for the distance from the photos of its classes.
        pixels: the decoders' shared memory, uint8 (rows, S, S, 3).
        release: gives a row of it back.
        stopping: when set, batches are no longer classified.
        sorted_again: the folder that is the inbox, where that is `unsure` or `failed`; what belongs there stays.
    """

    def __init__(
        self,
        model: ModelInUse,
        *,
        catch_neither: bool,
        pixels: npt.NDArray[np.uint8],
        release: Callable[[int], None],
        batcher: Batcher,
        moving: MoveStage,
        measures: Measures,
        stopping: threading.Event,
        sorted_again: str | None = None,
    ) -> None:
        self._model, self._catch_neither = model, catch_neither
        self._using = threading.Lock()  # the model; held while it decides on a batch
        self._pixels, self._release = pixels, release
        self._batcher, self._moving = batcher, moving
        self._measures, self._stopping, self._sorted_again = measures, stopping, sorted_again
        self.deadline = Deadline()

    def run(self) -> None:
        """Classify until the batcher is closed."""
        while (batch := self._batcher.next_batch()) is not None:
            for decoded in batch:
                if decoded.milliseconds:
                    self._measures.decoded(decoded.milliseconds / 1000)
            now = time.time()
            ready = [decoded for decoded in batch if decoded.verdict == "pixels"]
            with self._using:
                run = self._model.run
                decided = [decide_unclassified(decoded, now, run) for decoded in batch if decoded.verdict != "pixels"]
                if ready and not self._stopping.is_set():
                    decided += self._classify(ready, self._model)
            for decoded in ready:
                self._release(decoded.row)
            self._moving.put([kept(item, self._sorted_again) for item in decided])

    def replace_model(self, model: ModelInUse) -> None:
        """Decide on the next batches with another model; returns once this stage no longer uses the one before."""
        with self._using:
            self._model = model

    def _classify(self, ready: list[Decoded], model: ModelInUse) -> list[Decided]:
        rows = [decoded.row for decoded in ready]
        self.deadline.begin(own_seconds=len(ready))
        started = time.monotonic()
        distances: list[float | None] = [None] * len(ready)
        numbers = np.ones(len(ready), bool)
        if self._catch_neither:
            probabilities, found = model.engine.classify_with_distance(self._pixels[rows])  # (N, C), (N,)
            distances, numbers = found.tolist(), np.isfinite(found)
        else:
            probabilities = model.engine.classify(self._pixels[rows])  # (N, C)
        self._measures.classified(len(ready), time.monotonic() - started)
        self.deadline.finish()
        numbers &= np.isfinite(probabilities).all(1)
        return [
            decide(decoded, row, model.manifest, model.min_confidence, len(ready), distance, run=model.run)
            if is_number
            else unanswered(decoded)
            for decoded, row, distance, is_number in zip(ready, probabilities.tolist(), distances, numbers, strict=True)
        ]
