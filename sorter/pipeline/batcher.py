"""Groups decoded photos into batches for the engine.

In: `Decoded` photos, in the order in which the decoders finish them. Out: a batch for each engine thread that asks.

A batch is dispatched when it is full, or as soon as no further photo is on its way:

- While a backlog is listed there is always another photo on its way, so batches are filled, however long that takes.
- Otherwise the photos on their way are those in the decoders. The daemon waits for them for at most `max_wait_seconds`
  after the first photo of the batch, so that one slow photo does not hold up the others.
"""

import queue
import threading
import time

from sorter.deadlines import Deadline
from sorter.decoding.decoded import Decoded

_LOOK_SECONDS = 0.005  # how often to ask whether photos are still on their way


class Batcher:
    """The queue between the decoders and the engine.

    Args:
        batch_size: the largest number of photos to classify together.
        max_wait_seconds: how long a photo waits for others that are being decoded.
        decode_seconds: how long decoding one photo may take.
        stopping: set when nothing more is worth waiting for.

    Attributes:
        backlog: True while more photos are about to be submitted.
        decoding: the photos on their way from `expect` to `put`.
    """

    def __init__(
        self, *, batch_size: int, max_wait_seconds: float, decode_seconds: float, stopping: threading.Event
    ) -> None:
        self.backlog = False
        self.decoding = Deadline()
        self._batch_size, self._max_wait_seconds = batch_size, max_wait_seconds
        self._decode_seconds, self._stopping = decode_seconds, stopping
        self._queue: queue.SimpleQueue[Decoded | None] = queue.SimpleQueue()
        self._forming = threading.Lock()  # held by the engine thread that forms the next batch

    def expect(self) -> None:
        """Announce a photo that is about to be handed to the decoders."""
        self.decoding.begin(self._decode_seconds)

    def cancel(self) -> None:
        """Take back an `expect`, because the decoders could not take the photo yet."""
        self.decoding.cancel()

    def put(self, decoded: Decoded) -> None:
        """Add a photo that was expected."""
        self._queue.put(decoded)
        self.decoding.finish()

    def close(self) -> None:
        """End `next_batch` for all threads, once they have taken what is there."""
        self._queue.put(None)

    @property
    def waiting(self) -> int:
        """Photos that are decoded and not in a batch yet."""
        return self._queue.qsize()

    def next_batch(self) -> list[Decoded] | None:
        """Wait for the next batch; None once the batcher is closed.

        Photos without pixels travel along and do not count towards `batch_size`.
        """
        with self._forming:
            first = self._queue.get()
            if first is None:
                self._queue.put(None)  # for the other threads
                return None
            batch, pictures = [first], int(first.verdict == "pixels")
            wait_until = time.monotonic() + self._max_wait_seconds
            while pictures < self._batch_size and len(batch) < 4 * self._batch_size:
                # Asked before the look into the queue: what arrives in between is no longer on its way.
                more = self.backlog or (self.decoding.in_hand > 0 and time.monotonic() < wait_until)
                try:
                    decoded = self._queue.get(timeout=_LOOK_SECONDS if more else 0)
                except queue.Empty:
                    if more and not self._stopping.is_set():
                        continue
                    break
                if decoded is None:
                    self._queue.put(None)
                    break
                batch.append(decoded)
                pictures += decoded.verdict == "pixels"
            return batch
