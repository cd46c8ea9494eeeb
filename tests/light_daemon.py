"""The daemon with an engine that needs no torch, so that it starts at once: everything else is the real thing.

Takes the settings as a JSON object, and besides them:
check_seconds: how often the watcher looks at the folder, and how often it polls (1 s here).
fail_on: a file; as long as it exists, the handler of events raises.
retry_seconds: how often inotify watches are asked for again.
storage_seconds: how long the mover waits before it first tries again where storage refuses (0.1 s here).
stock: watch with watchdog's stock emitter instead of ours.
"""

import json
import os
import sys

from conftest import RedGreenEngine, pipeline_to, small_manifest
from watchdog.observers import Observer

from sorter import logs
from sorter.cli import preflight
from sorter.files.lock import Lock
from sorter.inbox import listener, watcher
from sorter.moving import batch_mover
from sorter.moving.mover import Mover
from sorter.service.loop import Service
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings


class _FailingWatcher(watcher.Watcher):
    fail_on: str | None = None

    def notice(self, name: str) -> None:
        if self.fail_on is not None and os.path.exists(self.fail_on):
            raise RuntimeError("the handler failed")
        super().notice(name)


def main() -> None:
    values = json.loads(sys.argv[1])
    _FailingWatcher.fail_on = values.pop("fail_on", None)
    watcher.CHECK_SECONDS = watcher.POLL_SECONDS = values.pop("check_seconds", 1.0)
    if values.pop("stock", False):
        listener.open_observer = lambda inbox: Observer()
    batch_mover._FIRST_DELAY_SECONDS = values.pop("storage_seconds", 0.1)
    watcher.RETRY_SECONDS = values.pop("retry_seconds", watcher.RETRY_SECONDS)
    settings, manifest = Settings(**values), small_manifest()
    logs.configure("json", "info")
    shutdown = Shutdown(idle_code=0)
    shutdown.listen()
    inbox = preflight.watched(settings, manifest)
    lock = Lock(inbox.root)
    lock.take()
    mover = Mover(settings.output_folder)
    shutdown.move_lock = mover.lock
    pipeline = pipeline_to(settings.output_folder, RedGreenEngine(), manifest, settings)
    Service(settings, inbox, pipeline, shutdown, lock, log_fields={}).run(_FailingWatcher(inbox))


main()
