"""The model that classifies, and what depends on it."""

from dataclasses import dataclass
from typing import Self

from sorter.classifier.engine import Engine
from sorter.classifier.manifest import Manifest
from sorter.history.store import Run


@dataclass(frozen=True, slots=True)
class ModelInUse:
    """A model that has answered once, with all that is replaced together with it.

    Attributes:
        engine: classifies; used by several threads.
        manifest: of the model.
        min_confidence: photos below it go to `unsure/`: as set, or as the model's table has it for an error rate.
        run: names the model in the history and the log; another model has another run.
    """

    engine: Engine
    manifest: Manifest
    min_confidence: float
    run: Run

    @classmethod
    def in_new_run(cls, engine: Engine, manifest: Manifest, min_confidence: float) -> Self:
        """The model with a run of its own."""
        return cls(engine, manifest, min_confidence, Run.new(manifest.name))
