"""One log line and one count for every file: what was sorted, skipped or left.

In: outcomes, and the files that the loop decides not to submit. Out: `Counters` and log events.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import structlog

from sorter.decisions import Decision, Outcome
from sorter.files import UNSURE
from sorter.files.photo import Identity, Photo, opened_folder
from sorter.history.store import SIDECAR, Run
from sorter.service.counters import Counters

_UNKNOWN = Identity(0, 0, 0, 0, 0)
NAMED_FOLDERS = 5
"""How many of the folders that sorting emptied are named."""

log = structlog.get_logger()


class Ignored:
    """Versions of files that need nothing more: they are neither opened nor logged again.

    Memory follows the inbox, not the years: a rescan forgets what it did not meet.
    """

    def __init__(self) -> None:
        self._versions: set[int] = set()  # hashes, because there may be a million
        self._met: set[int] = set()  # by the rescan in progress

    def add(self, photo: Photo) -> None:
        """Ignore this version of a file."""
        self._versions.add(_version(photo))
        self._met.add(_version(photo))

    def discard(self, photo: Photo) -> None:
        """No longer ignore it."""
        self._versions.discard(_version(photo))

    def meet(self, photo: Photo) -> bool:
        """Whether this version is ignored; if so, the rescan in progress has met it."""
        version = _version(photo)
        if version not in self._versions:
            return False
        self._met.add(version)
        return True

    def begin_rescan(self) -> None:
        """Note from now on which versions are met."""
        self._met = set()

    def end_rescan(self) -> None:
        """Forget the versions that were not met."""
        self._versions = self._met


class Accounting:
    """Counts and logs what becomes of each file.

    Args:
        log_fields: in every log line about a moved file, beside its run and its model.
        once: the inbox is listed only once, so nothing has to be remembered for the next time.
        dry_run: photos stay where they are, and are not reported again.
        on_outcome: called after each outcome, for a progress bar.
        on_decision: called with the outcome of each photo that was decided on.

    Attributes:
        counters: what happened so far.
        ignored: files that were skipped, or are done with but still there.
    """

    def __init__(
        self,
        log_fields: dict[str, Any],
        *,
        once: bool,
        dry_run: bool,
        on_outcome: Callable[[Counters], None],
        on_decision: Callable[[Outcome], None],
    ) -> None:
        self.counters, self.ignored = Counters(), Ignored()
        self._log_fields, self._once, self._dry_run = log_fields, once, dry_run
        self._on_outcome, self._on_decision = on_outcome, on_decision
        self._left: dict[str, Photo] = {}  # what could not be read or moved; tried again at each rescan
        self._blocked: str | None = None
        self._moved_from: set[tuple[Path, str]] = set()  # inbox and subfolder, with `once`

    def record(self, outcome: Outcome) -> None:
        """Account for what came out of the pipeline."""
        photo, decision = outcome.photo, outcome.decision
        if outcome.kind == "again":
            log.info("photo.again", path=photo.path, reason=outcome.detail)
        elif outcome.kind == "skipped":
            self.counters.skipped += 1
            self._ignore(photo)
            log.info("photo.skipped", path=photo.path, reason=outcome.detail)
        elif outcome.kind == "kept" and decision is not None:
            self._record_kept(outcome, decision)
        elif outcome.kind == "left" or decision is None:
            self.leave(photo, outcome.detail)
        else:
            self._left.pop(photo.name, None)
            self.counters.left = len(self._left)
            if self._once and not self._dry_run:
                self._moved_from.add((photo.root, os.path.dirname(photo.name)))
            if outcome.kind == SIDECAR:
                self.counters.sidecars += 1
                fields = self._fields(decision.run)
                log.info("sidecar.moved", path=photo.path, destination=outcome.destination, **fields)
            else:
                self._record_photo(outcome)
        self._on_outcome(self.counters)

    def _record_kept(self, outcome: Outcome, decision: Decision) -> None:
        self._left.pop(outcome.photo.name, None)
        self.counters.left = len(self._left)
        self.counters.kept[decision.folder] += 1
        self._on_decision(outcome)
        self._ignore(outcome.photo)
        reason = decision.decoded.reason or decision.detail or f"{decision.label} {decision.confidence:.1%}"
        log.info("photo.kept", path=outcome.photo.path, reason=str(reason), **self._fields(decision.run))

    def _record_photo(self, outcome: Outcome) -> None:
        photo, decision = outcome.photo, outcome.decision
        assert decision is not None
        self.counters.folders[decision.folder] += 1
        self._on_decision(outcome)
        if self._dry_run:
            self._ignore(photo)
        fields = {"path": photo.path, "destination": outcome.destination, **self._fields(decision.run)}
        if decision.kind == "failed":
            decoded = decision.decoded
            log.warning("photo.failed", **fields, reason=str(decoded.reason), detail=decoded.detail)
            return
        log.info(
            f"photo.{decision.kind}",
            **fields,
            label=decision.label,
            confidence=round(decision.confidence or 0.0, 4),
            bytes=photo.identity.size,
            decode_ms=round(decision.decoded.milliseconds, 1),
            batch_size=decision.batch_size,
            **({"detail": decision.detail} if decision.detail else {}),
        )

    def skip_put_back(self, photo: Photo) -> None:
        """Account for a photo that `sorter undo` restored."""
        self.counters.put_back += 1
        self._ignore(photo)
        log.info("photo.skipped", path=photo.path, reason="sorter undo put it back; --include-undone sorts it")

    def keep_neither(self, photo: Photo, run: Run) -> None:
        """Account for a photo in `unsure/` of which a person said that it shows none of the classes."""
        self.counters.kept[UNSURE] += 1
        self._ignore(photo)
        log.info("photo.kept", path=photo.path, reason="a person sees none of the classes", **self._fields(run))

    def skip_linked(self, photo: Photo) -> None:
        """Account for a photo that an earlier run linked."""
        self.counters.linked_before += 1
        self._ignore(photo)
        log.info("photo.skipped", path=photo.path, reason="it was linked before, and has not changed")

    def leave(self, photo: Photo, reason: str) -> None:
        """Account for a photo that stays; reported once for each version of it."""
        before = self._left.get(photo.name)
        self._left[photo.name] = photo
        self.counters.left = len(self._left)
        if before is None or before.identity != photo.identity:
            log.warning("photo.left", path=photo.path, reason=reason)

    def leave_name(self, root: Path, name: str, reason: str) -> None:
        """Account for a file or folder that stays, and that could not be looked at."""
        self.leave(Photo(root, name, _UNKNOWN, 0.0), reason)

    def begin_rescan(self) -> None:
        """Note from now on what is still there."""
        self.ignored.begin_rescan()

    def end_rescan(self, unlisted: Iterable[str]) -> None:
        """Forget what is no longer in the inbox.

        Args:
            unlisted: folders that the rescan could not list.
        """
        self.ignored.end_rescan()
        still_unlisted = set(unlisted)
        self._left = {
            name: photo
            for name, photo in self._left.items()
            if os.path.lexists(photo.path) and (photo.identity != _UNKNOWN or name in still_unlisted)
        }
        self.counters.left = len(self._left)

    def storage(self, blocked: str | None) -> None:
        """Log when nothing can be moved any more, and when photos move again.

        Args:
            blocked: why nothing can be moved at present; None if photos can be.
        """
        # Another reason, as the disk fills up, is the same wait.
        if (blocked is None) != (self._blocked is None):
            if blocked is None:
                log.info("storage.ready")
            else:
                log.error("storage.waiting", detail=blocked)
        self._blocked = blocked

    def wait(self, names: Iterable[str], root: Path, seconds: float) -> None:
        """Log that only files are left that may still be written, and for how long they are waited for at most."""
        first, *others = sorted(names)
        log.info(
            "inbox.waiting",
            path=os.path.join(root, first),
            files=1 + len(others),
            seconds=round(seconds, 1),
            reason="still changing, or cut short and new: may still be written",
        )

    def finish(self, run: Run) -> None:
        """Log what the process did, however it ended.

        Args:
            run: the last one, where the model was replaced.
        """
        counters, fields = self.counters, self._fields(run)
        counters.seconds = time.monotonic() - counters.started
        emptied = sorted(place for place in self._moved_from if place[1] and _is_empty(*place))
        counters.emptied = [folder for _, folder in emptied]
        if emptied:
            first = [os.path.join(*place) for place in emptied[:NAMED_FOLDERS]]
            log.info("inbox.emptied", **fields, folders=len(emptied), first=first)
        log.info(
            "run.finished",
            **fields,
            folders=dict(counters.folders),
            kept=counters.kept.total(),
            sidecars=counters.sidecars,
            skipped=counters.skipped,
            put_back=counters.put_back,
            linked_before=counters.linked_before,
            left=counters.left,
            seconds=round(counters.seconds, 3),
            waited=round(counters.waited, 3),
            photos_per_second=round(counters.photos_per_second, 1),
        )

    def _fields(self, run: Run) -> dict[str, Any]:
        return {"run": run.id, "model": run.model, **self._log_fields}

    def _ignore(self, photo: Photo) -> None:
        if not self._once:
            self.ignored.add(photo)


def _is_empty(root: Path, folder: str) -> bool:
    try:
        with opened_folder(root, folder) as descriptor, os.scandir(descriptor) as entries:
            return next(entries, None) is None
    except OSError:  # gone, or not readable
        return False


def _version(photo: Photo) -> int:
    return hash((photo.name, photo.identity))
