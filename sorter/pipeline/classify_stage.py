"""Batches become decisions.

In: batches from the `Batcher`. Out: a `Decision` for each photo that is to be moved and an `Outcome` for the others,
handed to the `MoveStage`.
"""

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Manifest
from sorter.deadlines import Deadline
from sorter.decisions import Decided, decide, decide_unclassified, kept, unanswered
from sorter.decoding.decoded import Decoded
from sorter.pipeline.batcher import Batcher
from sorter.pipeline.measures import Measures
from sorter.pipeline.move_stage import MoveStage
from sorter.settings import Settings


class ClassifyStage:
    """What one engine thread does; there are `engine.concurrency` of them.

    Args:
        pixels: the decoders' shared memory, uint8 (rows, S, S, 3).
        release: gives a row of it back.
        stopping: when set, batches are no longer classified.
        sorted_again: the folder that is the inbox, where that is `unsure` or `failed`; what belongs there stays.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        settings: Settings,
        *,
        pixels: npt.NDArray[np.uint8],
        release: Callable[[int], None],
        batcher: Batcher,
        moving: MoveStage,
        measures: Measures,
        stopping: threading.Event,
        sorted_again: str | None = None,
    ) -> None:
        self._engine, self._manifest, self._settings = engine, manifest, settings
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
            decided = [decide_unclassified(decoded, now) for decoded in batch if decoded.verdict != "pixels"]
            ready = [decoded for decoded in batch if decoded.verdict == "pixels"]
            if ready and not self._stopping.is_set():
                decided += self._classify(ready)
            for decoded in ready:
                self._release(decoded.row)
            self._moving.put([kept(item, self._sorted_again) for item in decided])

    def _classify(self, ready: list[Decoded]) -> list[Decided]:
        rows = [decoded.row for decoded in ready]
        self.deadline.begin(own_seconds=len(ready))
        started = time.monotonic()
        distances: list[float | None] = [None] * len(ready)
        numbers = np.ones(len(ready), bool)
        if self._settings.catch_neither:
            probabilities, found = self._engine.classify_with_distance(self._pixels[rows])  # (N, C), (N,)
            distances, numbers = found.tolist(), np.isfinite(found)
        else:
            probabilities = self._engine.classify(self._pixels[rows])  # (N, C)
        self._measures.classified(len(ready), time.monotonic() - started)
        self.deadline.finish()
        numbers &= np.isfinite(probabilities).all(1)
        return [
            decide(decoded, row, self._manifest, self._settings.min_confidence, len(ready), distance)
            if is_number
            else unanswered(decoded)
            for decoded, row, distance, is_number in zip(ready, probabilities.tolist(), distances, numbers, strict=True)
        ]
