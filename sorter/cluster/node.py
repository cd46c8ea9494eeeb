"""What one node of a cluster does, in a process that Ray starts: decide on photos that it reads from a shared disk.

In: paths and sizes. Out: decisions. It moves nothing. `object_node.py` adds what a node does with an object store.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sorter
from sorter.classifier import engine, manifest
from sorter.cluster.deciding import Decider
from sorter.cluster.shared_folder import SharedFolder
from sorter.cluster.stores import Mode
from sorter.decisions import Outcome
from sorter.decoding.decoders import default_workers
from sorter.errors import ConfigurationError, ModelError
from sorter.files.photo import Identity, Photo
from sorter.settings import SHIPPED_MODEL, Settings

MAX_DEATHS = 3
"""So many nodes that work on a shard or a chunk may die before it is halved, or before a single photo is blamed."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a node has to know before it can begin.

    Attributes:
        version: of the sorter that the command is.
        settings: its settings, by field name, with the threshold that `max_error_rate` stands for. `model` is None for
            the model that ships with the sorter, which may be elsewhere on the node.
        model_digest: of the model's manifest, and so of the whole model.
        engine: which one the threshold was measured with; empty if that does not matter.
        workers: decoder processes, if the machine has so many CPUs.
        place: for an object store, where the job's objects are.
        folder: for a shared disk, the inbox.
    """

    version: str
    settings: dict[str, Any]
    model_digest: str
    engine: str
    workers: int
    place: "Place | None" = None
    folder: SharedFolder | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job's objects and files are.

    Attributes:
        inbox, output: URLs of buckets.
        inbox_prefix, output_prefix: of keys; empty, or with a slash at the end.
        folder: prefix of the job's own files in the output's bucket.
        mode: what the output's bucket was found to do.
        decide_only: move nothing.
    """

    inbox: str
    inbox_prefix: str
    output: str
    output_prefix: str
    folder: str
    mode: Mode
    decide_only: bool = False


def setup(
    settings: Settings, engine_name: str, workers: int, place: Place | None = None, folder: SharedFolder | None = None
) -> Setup:
    """What the nodes are told."""
    values = settings.model_dump()
    if settings.model == SHIPPED_MODEL:
        values["model"] = None
    else:
        values["model"] = settings.model.absolute()
    return Setup(sorter.__version__, values, model_digest(settings.model), engine_name, workers, place, folder)


def model_digest(model: Path) -> str:
    """The digest of a model's manifest, which has the digests of all its other files."""
    return manifest.digest_of(model / manifest.MANIFEST)


@dataclass(frozen=True, slots=True)
class Description:
    """What a node computes with; the names are those of `Engine`."""

    name: str
    device: str
    precision: str
    unused_gpu: str


@dataclass(frozen=True, slots=True)
class Judged:
    """What a node says of one photo of a shared disk.

    Attributes:
        size, mtime_ns: of the file that was decoded.
        kind: as in `Outcome`, before the move.
    """

    name: str
    size: int
    mtime_ns: int
    kind: Literal["sorted", "unsure", "failed", "sidecar", "kept", "skipped", "left", "again"]
    folder: str = ""
    label: str | None = None
    confidence: float | None = None
    batch_size: int = 0
    reason: str | None = None
    detail: str = ""
    milliseconds: float = 0.0
    look_again: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a node is since its start; whatever changes in it is a sign of life.

    Attributes:
        decided: photos that it has decided on.
        moved: objects that it has moved, or found that they stay.
    """

    decided: int = 0
    moved: int = 0

    @property
    def photos(self) -> int:
        """Photos it has come through: moves by what an earlier command decided count, each photo once."""
        return max(self.decided, self.moved)


class Node:
    """One node. Ray calls its methods from several threads; `begin` comes first."""

    _decider: Decider
    _settings: Settings
    _folder: SharedFolder | None

    def begin(self, given: Setup) -> Description:
        """Load the model.

        Raises:
            ConfigurationError, ModelError: this machine is not set up as the one that the command runs on.
        """
        host = os.uname().nodename
        if given.version != sorter.__version__:
            raise ConfigurationError(
                f"the node {host} has sorter {sorter.__version__}, and this is {given.version}: install the same"
            )
        self._folder = given.folder
        self._check_folder()
        values = dict(given.settings)
        values["model"] = values["model"] or SHIPPED_MODEL
        settings = Settings(**values)
        model = manifest.read(settings.model)
        if model_digest(settings.model) != given.model_digest:
            raise ModelError(f"the node {host} has another model in {settings.model}: copy the model folder there")
        opened = engine.open_engine(
            settings.model,
            model,
            settings.engine,
            settings.device,
            settings.batch_size,
            settings.min_confidence,
            catch_neither=settings.catch_neither,
        )
        if given.engine and opened.name != given.engine:
            raise ConfigurationError(
                f"the node {host} runs the model with {opened.name}, and --max-error-rate was measured with "
                f"{given.engine}: set --engine and --device"
            )
        self._settings = settings
        self._decider = Decider(opened, model, settings, min(given.workers, default_workers()))
        return Description(opened.name, opened.device, opened.precision, opened.unused_gpu)

    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self._decider.decided)

    def decide(self, root: Path, names: Sequence[str]) -> list[Judged]:
        """Decide on photos in a folder that this machine has under the same path as the command's.

        Raises:
            ConfigurationError: photos are missing, because this machine no longer has that folder.
        """
        judged: list[Judged] = []
        photos: list[Photo] = []
        for name in names:
            try:
                status = os.stat(root / name, follow_symlinks=False)
            except OSError as error:
                self._check_folder()
                detail = f"is gone on the node {os.uname().nodename} ({error.strerror})"
                judged.append(Judged(name, -1, -1, "again", detail=detail))
            else:
                photos.append(Photo(root, name, Identity.of(status), time.time()))
        self._decider.decide(photos, lambda outcome: judged.append(_judged(outcome)))
        return judged

    def _check_folder(self) -> None:
        if self._folder is not None:
            self._folder.check()

    def close(self) -> None:
        """End the decoders."""
        self._decider.close()


def _judged(outcome: Outcome) -> Judged:
    photo, decision = outcome.photo, outcome.decision
    if decision is None:
        return Judged(
            photo.name,
            photo.identity.size,
            photo.identity.mtime_ns,
            outcome.kind,
            detail=outcome.detail,
            look_again=outcome.look_again,
        )
    decoded = decision.decoded
    return Judged(
        photo.name,
        photo.identity.size,
        photo.identity.mtime_ns,
        decision.kind,
        folder=decision.folder,
        label=decision.label,
        confidence=decision.confidence,
        batch_size=decision.batch_size,
        reason=None if decoded.reason is None else str(decoded.reason),
        detail=decision.detail or decoded.detail,
        milliseconds=decoded.milliseconds,
    )
