"""A new model without a stop, on SIGHUP.

In: requests from the signal's handler, and the model folder. Out: a pipeline that goes on with the model that is in the
folder now, or with the one that it has, and a log line that says which. The new model is opened beside the one in use,
which works on meanwhile, in a thread of its own: whatever is wrong with it, no photo waits for it.
"""

import threading
from collections.abc import Callable

import structlog

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Manifest
from sorter.errors import ModelError, NotNowError, SorterError
from sorter.pipeline.model_in_use import ModelInUse
from sorter.pipeline.pipeline import Pipeline
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

_OPEN_SECONDS = 30.0  # how long the end of the process waits for a model that is being opened

log = structlog.get_logger()


class Reloader:
    """Replaces the model of a pipeline at each SIGHUP; a thread of its own, from now until `close`.

    Requests that come while a model is being opened are one more request: the folder is read again afterwards.

    Args:
        pipeline: whose model is replaced.
        shutdown: has the requests; once the end is asked for, nothing is replaced any more.
        read: reads and verifies the model folder again, and resolves the settings that depend on the model.
        open_engine: loads the model that was read, and has it answer once.
        on_reloaded: called with each new model, in this thread.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        shutdown: Shutdown,
        read: Callable[[], tuple[Settings, Manifest]],
        open_engine: Callable[[Settings, Manifest], Engine],
        on_reloaded: Callable[[ModelInUse], None],
    ) -> None:
        self._pipeline, self._shutdown = pipeline, shutdown
        self._read, self._open_engine, self._on_reloaded = read, open_engine, on_reloaded
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="reload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after the model that is being opened; idempotent."""
        self._closing = True
        self._shutdown.reloads.put(False)
        self._thread.join(_OPEN_SECONDS)

    def _run(self) -> None:
        requests = self._shutdown.reloads
        while requests.get():
            while not requests.empty():
                if not requests.get():
                    return
            if self._shutdown.requested:
                return
            before = self._pipeline.model
            try:
                opened = self._open_beside(before)
            except SorterError as error:
                _refuse(before, str(error))
            except Exception as error:  # whatever a driver may fail with: the model in use is none the worse for it
                _refuse(before, f"it cannot be opened ({type(error).__name__}: {error}): export it again")
            else:
                if opened is not None:
                    self._replace(before, *opened)

    def _open_beside(self, before: ModelInUse) -> tuple[ModelInUse, str] | None:
        """The model that is in the folder now and the folder's path; None if it is the one in use."""
        settings, manifest = self._read()
        path = str(settings.model.absolute())
        if manifest == before.manifest:
            log.info("model.unchanged", model=manifest.name, path=path)
            return None
        check_fits(manifest, before.manifest)
        engine = self._open_engine(settings, manifest)
        used = before.engine.device
        if used not in ("cpu", engine.device):  # it has no memory for both, or its driver fails
            engine.close()
            raise NotNowError(engine.unused_gpu or f"it would run on {engine.device}, not on {used}: restart sorter")
        return ModelInUse.in_new_run(engine, manifest, settings.min_confidence), path

    def _replace(self, before: ModelInUse, model: ModelInUse, path: str) -> None:
        if self._shutdown.requested or self._closing:
            model.engine.close()
            return
        self._pipeline.replace_model(model)
        self._on_reloaded(model)
        log.info(
            "model.reloaded",
            run=model.run.id,
            model=model.manifest.name,
            before=before.manifest.name,
            path=path,
            engine=model.engine.name,
            device=model.engine.device,
            precision=model.engine.precision,
            accuracy=model.manifest.accuracy,
        )


def _refuse(used: ModelInUse, reason: str) -> None:
    log.error("model.refused", model=used.manifest.name, reason=reason)


def check_fits(new: Manifest, used: Manifest) -> None:
    """Make sure that a model can take the place of another one in a running process.

    The folders of the classes are not scanned for photos, and the decoders' memory has rows of the input's size.

    Raises:
        ModelError: its classes are others, or it sees photos in another size or crop.
    """
    if set(new.classes) != set(used.classes):
        raise ModelError(
            f"the model {new.name} has other classes ({_classes(new)}) than {used.name} ({_classes(used)}): restart "
            "sorter to use it"
        )
    if new.input.preprocessing != used.input.preprocessing:
        raise ModelError(
            f"the model {new.name} sees photos in another size or crop ({_input(new)}) than {used.name} "
            f"({_input(used)}): restart sorter to use it"
        )


def _classes(manifest: Manifest) -> str:
    return ", ".join(f"{known.label} in {known.folder}/" for known in manifest.classes[:10])


def _input(manifest: Manifest) -> str:
    seen = manifest.input
    return f"{seen.size} px, {seen.crop}" + (f" of {seen.resize} px" if seen.resize else "")
