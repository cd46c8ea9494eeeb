"""Carries out what a person says of sorted photos: records it, and moves a photo into the folder where it belongs.

In: `Verdict`s on photos of one output. Out: an `Outcome` for each. A correction promises what sorting does: the intent
is durable before the photo is touched, nothing is ever replaced, and after a crash and the next start each photo has
exactly one name. It works beside a running sorter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sorter.classifier.manifest import Class
from sorter.inbox.sidecars import SidecarNames


@dataclass(frozen=True, slots=True)
class Version:
    """Which version of a file the person has seen."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a person says of a photo.

    Attributes:
        photo: the id of its sorting move in the history, as in `Entry.id`.
        version: of the file that was shown.
        label: the class that the person sees; None for none of them: the photo goes to `unsure/`.
        how: `corrected` moves the photo to the folder of its label, and so does `checked`, for a photo that was chosen
            at random. `confirmed` moves nothing: the photo has to be in that folder.
    """

    photo: int
    version: Version
    label: str | None
    how: Literal["corrected", "confirmed", "checked"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a photo.

    Attributes:
        photo: as in the verdict.
        path: where it is now, absolute; empty if the history does not have it.
        error: what is wrong, as a sentence; empty if the verdict is recorded and the photo where it belongs.
        is_changed: the photo is not the one any more, or not where, the person has seen it: it was not moved.
    """

    photo: int
    path: str
    error: str = ""
    is_changed: bool = False


class Corrections:
    """The verdicts on one output; used by one thread at a time.

    A reader of the history in the same process is opened with `beside_writer=True`.

    Args:
        output: the folder that has `cats/` and the others.
        classes: of the model, `manifest.classes`: which label has which folder.
        state_dir: where the history is, if not in the output.
        sidecars: says which files belong to a photo, and go with it.

    Raises:
        ConfigurationError: the output has no history, or it cannot be used.
        StorageError: the disk is full or fails.
    """

    def __init__(
        self,
        output: Path,
        classes: Sequence[Class],
        state_dir: Path | None = None,
        sidecars: SidecarNames | None = None,
    ) -> None:
        raise NotImplementedError

    def decide(self, verdicts: Sequence[Verdict]) -> list[Outcome]:
        """Record verdicts and move the photos that are in another folder; durable when it returns.

        Returns:
            What became of each, in the order of the verdicts.

        Raises:
            NotNowError: an undo, or another review, is moving photos of this output.
            StorageError: the history cannot be written, or a folder cannot be synced.
            ConfigurationError: the history cannot be read.
        """
        raise NotImplementedError

    def take_back(self, photo: int) -> Outcome:
        """Delete the newest verdict on a photo, and move the photo back to where it was before.

        Raises:
            NotNowError, StorageError, ConfigurationError: as `decide`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Record that the review has ended, and close the history; idempotent."""
        raise NotImplementedError
