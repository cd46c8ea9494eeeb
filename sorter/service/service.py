"""The loop around the pipeline: a backlog that ends, or a daemon that watches until it is told to stop.

In: settings, an open pipeline. Out: a log line and a count for every photo. `--once` and the daemon feed the same
pipeline: one stops when the backlog is empty and nothing is changing any more, the other when a signal says so.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from sorter.decisions import Decision, Outcome
from sorter.decoding.decoded import Decoded
from sorter.errors import InboxGoneError
from sorter.files.lock import Lock
from sorter.files.photo import Identity, Photo
from sorter.history.reader import Entry
from sorter.history.store import SIDECAR
from sorter.inbox.scan import Inbox
from sorter.inbox.sidecars import LATE_SECONDS, beside, has_photo, is_sidecar, photos, renamed
from sorter.inbox.watcher import Watcher
from sorter.pipeline.pipeline import Pipeline
from sorter.service.counters import Counters
from sorter.service.notify import Notifier
from sorter.service.stop import Stop
from sorter.settings import Settings

AGAIN_SECONDS = 0.5
"""How soon a photo that changed while it was sorted is looked at again."""

_MOST_FOLLOWING = 100
_UNKNOWN = Identity(0, 0, 0, 0, 0)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Retry:
    """A version of a file that wants another look, no sooner than `due` (seconds since the epoch)."""

    identity: Identity
    seen: float
    due: float


class Service:
    """Feeds settled photos to the pipeline and accounts for what comes out.

    Args:
        stop: says when to end.
        lock: of the inbox, held already; a daemon takes it anew where the inbox is another folder. None for a dry run.
        on_outcome: called after each photo, for a progress bar.
        on_waiting: called with the number of files that are being waited for.
        on_decision: called with what became of each photo that was decided on.
        put_back: tells whether a photo was brought back, and is to be left alone.
        last_sorted: finds the last photo with one of these names below this folder that was sorted since then.
    """

    def __init__(
        self,
        settings: Settings,
        inbox: Inbox,
        pipeline: Pipeline,
        stop: Stop,
        lock: Lock | None,
        *,
        log_fields: dict[str, Any],
        on_outcome: Callable[[Counters], None] = lambda _: None,
        on_waiting: Callable[[int], None] = lambda _: None,
        on_decision: Callable[[Outcome], None] = lambda _: None,
        put_back: Callable[[Photo], bool] = lambda _: False,
        last_sorted: Callable[[Path, Sequence[str], float], Entry | None] = lambda *_: None,
    ) -> None:
        self._settings, self._inbox, self._pipeline, self._stop = settings, inbox, pipeline, stop
        self._lock = lock
        self._log_fields, self._on_outcome, self._on_waiting = log_fields, on_outcome, on_waiting
        self._on_decision, self._put_back, self._last_sorted = on_decision, put_back, last_sorted
        self.counters = Counters()
        self._submitted: set[str] = set()  # names whose outcome is still to come
        self._following: list[Decision] = []  # sidecars that are about to be moved
        self._retry: dict[str, _Retry] = {}  # names that want another look
        self._left: dict[str, Photo] = {}  # what could not be read or moved; tried again at each rescan
        self._skipped: set[int] = set()  # hashes of the versions of files that need nothing more
        self._met: set[int] = set()  # those of them that the rescan in progress has met
        self._blocked: str | None = None
        self._notifier = Notifier()

    # --- the two ways to run -------------------------------------------------------------------------------------

    def run_once(self) -> Counters:
        """Sort what is there, wait for what is still changing, and end.

        Raises:
            SorterError: it could not go on, because the disk is full or the inbox vanished.
        """
        try:
            self._backlog()
            moved, deadline = -1, 0.0
            while not self._stop.requested and (self._inbox.changing or self._submitted or self._retry):
                if self.counters.folders.total() != moved:  # only waiting counts, not working
                    moved = self.counters.folders.total()
                    deadline = time.monotonic() + self._settings.settle_timeout_seconds
                self._feed(self._inbox.look_again(time.time()))
                self._feed(self._due())
                self._account(timeout_seconds=0.1)
                if not self._submitted:
                    if time.monotonic() >= deadline:
                        break
                    if waiting := {*self._inbox.changing, *self._retry}:
                        self._on_waiting(len(waiting))
                    time.sleep(0.1)
            self.counters.interrupted = self._stop.requested
            for name in {*self._inbox.changing, *self._retry}:
                self._leave(Photo(self._inbox.root, name, _UNKNOWN, 0.0), "is still changing")
            self._inbox.check()
        finally:
            self._finish()
        return self.counters

    def run(self, watcher: Watcher) -> Counters:
        """Sort the backlog, then what is dropped, until SIGTERM or SIGINT.

        Raises:
            SorterError: it could not go on.
        """
        self._stop.wake = watcher.wake
        watcher.start(time.monotonic())
        # What died in the middle of a move has been put right by now, and the model has answered once.
        self._notifier.ready()
        try:
            rescanned = float("-inf")
            while not self._stop.requested:
                self._tell(watcher.trouble)
                watcher.supervise(time.monotonic())
                # Asked at each turn, since the watcher may begin or cease to poll meanwhile.
                next_rescan = rescanned + min(self._settings.rescan_seconds, watcher.poll_seconds)
                if watcher.take_rescan() or time.monotonic() >= next_rescan:
                    self._rescan()
                    rescanned = time.monotonic()
                    next_rescan = rescanned + min(self._settings.rescan_seconds, watcher.poll_seconds)
                now = time.time()
                self._feed(filter(None, (self._inbox.look(name, now) for name in watcher.take_names())))
                self._feed(self._inbox.look_again(now))
                self._feed(self._due())
                self._account()
                self._report_blocked()
                if self._pipeline.in_flight or self._following:
                    self._account(timeout_seconds=0.2)
                else:
                    watcher.wait(self._idle_seconds(min(next_rescan, watcher.next_check)))
            log.info("service.stopping")
        finally:
            self._notifier.stopping()
            watcher.stop()
            self._finish()
        return self.counters

    # --- feeding -------------------------------------------------------------------------------------------------

    def _backlog(self) -> None:
        self._pipeline.backlog = True
        try:
            self._feed(self._inbox.scan(time.time()))
        finally:
            self._pipeline.backlog = False
        for folder in self._inbox.unlisted:
            self._leave(Photo(self._inbox.root, folder, _UNKNOWN, 0.0), "this folder cannot be listed")

    def _rescan(self) -> None:
        self._met = set()
        if self._lock is not None:
            self._lock.take()
        try:
            self._backlog()
        except InboxGoneError:
            return  # the watcher says so, and waits for it
        # What was not met any more is forgotten, so that memory follows the inbox and not the years.
        self._skipped = self._met
        unlisted = set(self._inbox.unlisted)
        self._left = {
            name: photo
            for name, photo in self._left.items()
            if os.path.lexists(photo.path) and (photo.identity != _UNKNOWN or name in unlisted)
        }
        self.counters.left = len(self._left)

    def _feed(self, photos: Iterable[Photo]) -> None:
        for photo in photos:
            if self._stop.requested:
                return
            self._tell()
            if photo.name in self._submitted or self._is_skipped(photo) or self._is_beside_photo(photo):
                continue
            retry = self._retry.get(photo.name)
            if retry is not None and retry.identity == photo.identity:
                if time.time() < retry.due:
                    continue
                photo = replace(photo, seen=retry.seen)
            if self._put_back(photo):
                self.counters.put_back += 1
                self._ignore(photo)
                log.info("photo.skipped", path=photo.path, reason="sorter undo put it back; --include-undone sorts it")
                continue
            if is_sidecar(photo.name) and (entry := self._photo_of(photo)) is not None:
                self._follow(photo, entry.name, entry.destination)
                self._account()
                continue
            while not self._pipeline.submit(photo):
                self._account()
                self._report_blocked()
                self._tell()
                if self._stop.requested:
                    return
            self._submitted.add(photo.name)
            self._account()

    def _due(self) -> Iterator[Photo]:
        """Look at what wanted another look by now."""
        now = time.time()
        for name in [name for name, retry in self._retry.items() if retry.due <= now and name not in self._submitted]:
            photo = self._inbox.look(name, now)
            if photo is not None:
                yield photo
            elif name not in self._inbox.changing:
                del self._retry[name]

    def _idle_seconds(self, wanted: float) -> float:
        waits = [self._notifier.alive_seconds, wanted - time.monotonic()]
        now = time.time()
        waits.append(self._inbox.next_look(now) - now)
        if self._retry:
            waits.append(min(retry.due for retry in self._retry.values()) - now)
        return max(0.05, min(waits))

    # --- sidecars ----------------------------------------------------------------------------------------------

    def _is_beside_photo(self, sidecar: Photo) -> bool:
        """Tell whether a file is one that will follow a photo which is still there."""
        if not is_sidecar(sidecar.name):
            return False
        folder, _, base = sidecar.name.rpartition("/")
        in_hand = any(os.path.join(folder, name) in self._submitted for name in photos(base))
        return in_hand or has_photo(sidecar)

    def _photo_of(self, sidecar: Photo) -> Entry | None:
        """The sorted photo that a sidecar which came later belongs to."""
        folder, _, base = sidecar.name.rpartition("/")
        names = [os.path.join(folder, name) for name in photos(base)]
        return self._last_sorted(sidecar.root, names, time.time() - LATE_SECONDS)

    def _send_after(self, photo: Photo, destination: str) -> None:
        """Have the sidecars follow that were beside a photo; one that another photo shares waits for that."""
        for name in beside(photo):
            sidecar = self._inbox.look(name, time.time())
            if sidecar is not None and name not in self._submitted and not self._is_beside_photo(sidecar):
                self._skipped.discard(_version(sidecar))  # it may have come before its photo
                self._follow(sidecar, photo.name, destination)

    def _follow(self, sidecar: Photo, photo: str, destination: str) -> None:
        place, new = os.path.split(destination)
        name = renamed(os.path.basename(sidecar.name), os.path.basename(photo), new)
        if os.path.lexists(os.path.join(place, name)):
            self._leave(sidecar, f"cannot follow its photo: {os.path.join(place, name)} exists")
            return
        decoded = Decoded(sidecar, "skipped")
        self._following.append(Decision(decoded, SIDECAR, os.path.basename(place), name=name, follows=new))
        self._submitted.add(sidecar.name)

    # --- accounting ----------------------------------------------------------------------------------------------

    def _account(self, *, timeout_seconds: float = 0.0) -> None:
        for outcome in self._pipeline.outcomes(timeout_seconds=timeout_seconds):
            self._submitted.discard(outcome.photo.name)
            self._record(outcome)
            self._on_outcome(self.counters)
            is_photo = outcome.decision is not None and outcome.kind != SIDECAR
            if outcome.destination is not None and is_photo and not self._settings.dry_run:
                self._send_after(outcome.photo, outcome.destination)
        some = self._following[:_MOST_FOLLOWING]
        if some and self._pipeline.follow(some):
            del self._following[: len(some)]

    def _record(self, outcome: Outcome) -> None:
        photo, decision = outcome.photo, outcome.decision
        self._retry.pop(photo.name, None)
        if outcome.kind == "again":
            log.debug("photo.again", path=photo.path, reason=outcome.detail)
            due = max(outcome.look_again, time.time() + AGAIN_SECONDS)
            self._retry[photo.name] = _Retry(photo.identity, photo.seen, due)
            return
        if outcome.kind == "skipped":
            self.counters.skipped += 1
            self._ignore(photo)
            log.info("photo.skipped", path=photo.path, reason=outcome.detail)
            return
        if outcome.kind == "left" or decision is None:
            self._leave(photo, outcome.detail)
            return
        self._left.pop(photo.name, None)
        self.counters.left = len(self._left)
        if outcome.kind == SIDECAR:
            self.counters.sidecars += 1
            log.info("sidecar.moved", path=photo.path, destination=outcome.destination, **self._log_fields)
            return
        self.counters.folders[decision.folder] += 1
        self._on_decision(outcome)
        if self._settings.dry_run:
            self._ignore(photo)  # it is still there, and said once is enough
        fields = {"path": photo.path, "destination": outcome.destination, **self._log_fields}
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

    def _leave(self, photo: Photo, reason: str) -> None:
        """Account for a photo that stays; said once for each version of it."""
        before = self._left.get(photo.name)
        self._left[photo.name] = photo
        self.counters.left = len(self._left)
        if before is None or before.identity != photo.identity:
            log.warning("photo.left", path=photo.path, reason=reason)

    def _ignore(self, photo: Photo) -> None:
        if self._settings.once:  # it lists the inbox once
            return
        self._skipped.add(_version(photo))
        self._met.add(_version(photo))

    def _is_skipped(self, photo: Photo) -> bool:
        """Tell whether this version of the file was dealt with and is still there: it is neither opened nor logged."""
        version = _version(photo)
        if version not in self._skipped:
            return False
        self._met.add(version)
        return True

    def _report_blocked(self) -> None:
        blocked = self._pipeline.blocked
        # Another reason, as the disk fills up, is the same wait.
        if (blocked is None) != (self._blocked is None):
            if blocked is None:
                log.info("storage.ready")
            else:
                log.error("storage.waiting", detail=blocked)
        self._blocked = blocked

    def _tell(self, trouble: str | None = None) -> None:
        """Tell the service manager what goes on, and that the loop lives, unless the pipeline does not."""
        # A sign of life after the manager's SIGTERM would wind its watchdog up again, which nobody feeds at the end.
        if not self._pipeline.hung and not self._stop.requested:
            self._notifier.alive()
        self._notifier.status(lambda: self._situation(trouble))

    def _situation(self, trouble: str | None) -> str:
        counters = self.counters
        folders = ", ".join(f"{count} in {folder}/" for folder, count in sorted(counters.folders.items()))
        waiting = len({*self._submitted, *self._inbox.changing, *self._retry})
        counts = f"{waiting} waiting; {folders or 'none sorted yet'}; {counters.left} left"
        if (why := self._pipeline.blocked or trouble) is not None:
            return f"Waiting: {why}; {counts}"
        return counts

    def _finish(self) -> None:
        """End the stages, account for what they still did, and say what the run did, however it ended."""
        try:
            self._pipeline.stop()
            while self._following or not self._pipeline.idle:  # no photo's sidecar is left behind by a stop
                self._account(timeout_seconds=0.1)
            self._pipeline.close()
            self._account()
        finally:
            self._pipeline.close()
            self.counters.seconds = time.monotonic() - self.counters.started
            log.info(
                "run.finished",
                **self._log_fields,
                folders=dict(self.counters.folders),
                sidecars=self.counters.sidecars,
                skipped=self.counters.skipped,
                put_back=self.counters.put_back,
                left=self.counters.left,
                seconds=round(self.counters.seconds, 3),
                photos_per_second=round(self.counters.photos_per_second, 1),
            )


def _version(photo: Photo) -> int:
    return hash((photo.name, photo.identity))
