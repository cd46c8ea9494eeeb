"""Prometheus metrics on 127.0.0.1: `--metrics-port`.

In: the counts that the daemon keeps anyway, read at each scrape, and the duration of each step. Out: GET /metrics. The
server sleeps between requests; prometheus_client's own would wake up twice a second.
"""

import socketserver
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from prometheus_client import CollectorRegistry, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from sorter.errors import ConfigurationError
from sorter.files import FAILED, UNSURE
from sorter.inbox.watcher import Watcher
from sorter.pipeline.measures import Measures
from sorter.pipeline.stages import Stages
from sorter.service.counters import Counters

HOST = "127.0.0.1"
_POLL_SECONDS = 86400.0  # how often the server looks whether it is to end: it never is
_CLIENT_SECONDS = 10  # how long a client may stay silent
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_PHOTOS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics(Measures):
    """What is measured while the daemon runs, and the server that publishes it.

    Args:
        port: on 127.0.0.1; served from now on.
        info: `version`, `model` and `engine`.

    Raises:
        ConfigurationError: the port is taken, or this user may not open it.
    """

    def __init__(self, port: int, info: dict[str, str]) -> None:
        self._registry = CollectorRegistry()
        self._info = Info("sorter", "Version, model and engine.", registry=self._registry)
        self.describe(info)
        seconds = Histogram(
            "sorter_stage_seconds",
            "Time in a stage: decode for each photo, classify and move for each batch.",
            ["stage"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._decode, self._classify, self._move = map(seconds.labels, ("decode", "classify", "move"))
        self._batch = Histogram(
            "sorter_batch_size_photos", "Photos classified together.", registry=self._registry, buckets=_PHOTOS
        )
        self._success = Gauge(
            "sorter_last_success_timestamp_seconds",
            "When the last batch was moved; 0 if none was.",
            registry=self._registry,
        )
        try:
            self._server = _Server((HOST, port), self._registry)
        except OSError as error:
            raise ConfigurationError(
                f"--metrics-port {port} cannot be used ({error.strerror}): "
                "choose another port; config/README.md says how to allow one for a service"
            ) from None
        # It ends with the process; ending it earlier would cost regular wake-ups.
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(_POLL_SECONDS,), name="metrics", daemon=True).start()

    def describe(self, info: dict[str, str]) -> None:
        """Publish this `version`, `model` and `engine` from now on."""
        self._info.info(info)

    def watch(self, counters: Counters, pipeline: Stages, watcher: Watcher) -> None:
        """Publish their counts too from now on."""
        self._registry.register(_Counts(counters, pipeline, watcher))

    def decoded(self, seconds: float) -> None:
        """One photo was decoded."""
        self._decode.observe(seconds)

    def classified(self, photos: int, seconds: float) -> None:
        """One batch was classified."""
        self._classify.observe(seconds)
        self._batch.observe(photos)

    def moved(self, photos: int, seconds: float) -> None:
        """One batch was moved; `photos` of it left the inbox."""
        self._move.observe(seconds)
        if photos:
            self._success.set(time.time())


class _Counts(Collector):
    """Counts that the daemon keeps anyway, read at each scrape."""

    def __init__(self, counters: Counters, pipeline: Stages, watcher: Watcher) -> None:
        self._counters, self._pipeline, self._watcher = counters, pipeline, watcher

    def collect(self) -> Iterator[Metric]:
        photos = CounterMetricFamily(
            "sorter_photos", "Photos by result and destination folder.", labels=["result", "folder"]
        )
        folders = {FAILED: 0, **dict(self._counters.folders)}
        for folder, count in sorted(folders.items()):
            photos.add_metric([folder if folder in (FAILED, UNSURE) else "sorted", folder], count)
        photos.add_metric(["skipped", ""], self._counters.skipped)
        yield photos
        yield GaugeMetricFamily(
            "sorter_left_photos",
            "Photos that stay in the inbox because they cannot be read or moved.",
            value=self._counters.left,
        )
        waiting = GaugeMetricFamily("sorter_queue_photos", "Photos in a stage or waiting for it.", labels=["stage"])
        for stage, count in self._pipeline.waiting().items():
            waiting.add_metric([stage], count)
        yield waiting
        yield CounterMetricFamily(
            "sorter_watcher_restarts", "How often watching the inbox was restarted.", value=self._watcher.restarts
        )


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry) -> None:
        super().__init__(address, _Handler)
        self.registry = registry

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Answer with the metrics."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, "The metrics are at /metrics")
            return
        content = generate_latest(self.server.registry)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: standard error belongs to the log."""
