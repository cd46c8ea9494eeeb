"""The loop around the pipeline: over a backlog that ends, or as a daemon until it is told to stop.

In: settled photos of the inbox. Out: every one of them submitted to the pipeline, and its outcome accounted for.
`--once` and the daemon feed the same pipeline: one ends when the backlog is empty and nothing is changing any more, the
other at a signal.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import structlog

from sorter.decisions import Outcome
from sorter.errors import InboxGoneError
from sorter.files.lock import Lock
from sorter.files.photo import Photo, file_of
from sorter.history.reader import HistoryReader
from sorter.history.store import SIDECAR
from sorter.inbox.scan import Inbox
from sorter.inbox.watcher import Watcher
from sorter.pipeline.stages import Stages
from sorter.service.accounting import Accounting
from sorter.service.counters import Counters
from sorter.service.notify import Notifier
from sorter.service.retries import Retries
from sorter.service.shutdown import Shutdown
from sorter.service.sidecar_follower import SidecarFollower
from sorter.settings import Settings

log = structlog.get_logger()

QUIET_SECONDS = 5.0
"""With `--once`, how long a wait for files that may still be written goes unmentioned: most are short."""


class Service:
    """Feeds settled photos to the pipeline and accounts for what comes out.

    Args:
        shutdown: says when to end.
        lock: of the inbox, already held; where the inbox is replaced, the daemon takes the new one's before it sorts a
            photo. None for a dry run.
        log_fields: in every log line about a moved file, beside its run and its model.
        history: what was sorted and undone before; None if there is none yet.
        on_outcome: called after each photo, for a progress bar.
        on_waiting: called with the number of files that are being waited for.
        on_decision: called with the outcome of each photo that was decided on.

    Attributes:
        counters: what happened so far.
    """

    def __init__(
        self,
        settings: Settings,
        inbox: Inbox,
        pipeline: Stages,
        shutdown: Shutdown,
        lock: Lock | None,
        *,
        log_fields: dict[str, Any],
        history: HistoryReader | None = None,
        on_outcome: Callable[[Counters], None] = lambda _: None,
        on_waiting: Callable[[int], None] = lambda _: None,
        on_decision: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self._settings, self._inbox, self._pipeline = settings, inbox, pipeline
        self._shutdown, self._lock, self._history = shutdown, lock, history
        self._on_waiting = on_waiting
        self._in_hand: set[str] = set()  # names whose outcome is still to come
        self._replaced: set[str] = set()  # those of them that were found meanwhile, perhaps with another file
        self._look_at_once: set[str] = set()  # those whose outcome has come since
        self._accounting = Accounting(
            log_fields, once=settings.once, dry_run=settings.dry_run, on_outcome=on_outcome, on_decision=on_decision
        )
        self._retries = Retries()
        self._sidecars = SidecarFollower(
            inbox, settings.output_folder, self._in_hand, self._accounting, history, link=settings.link
        )
        self._notifier = Notifier()
        self.counters = self._accounting.counters

    def run_once(self) -> Counters:
        """Sort what is there, wait for what is still changing, and end.

        Raises:
            SorterError: it could not go on, because the disk is full or the inbox vanished.
        """
        try:
            self._feed_backlog()
            self._feed_what_settles()
            self.counters.interrupted = self._shutdown.requested
            for name in self._unsettled:
                reason = self._retries.waiting.get(name, "is still changing")
                self._accounting.leave_name(self._inbox.root, name, reason)
            self._inbox.check()
        finally:
            self._finish()
        return self.counters

    def run(self, watcher: Watcher) -> Counters:
        """Sort the backlog, then what is dropped, until a signal asks for the end.

        Raises:
            SorterError: it could not go on.
        """
        self._shutdown.wake = watcher.wake
        watcher.start(time.monotonic())
        # By now the model has answered once, and moves that a crash interrupted have been recovered.
        self._notifier.ready()
        rescanned = float("-inf")
        try:
            while not self._shutdown.requested:
                self._notify(watcher.trouble)
                watcher.supervise(time.monotonic())
                if watcher.take_rescan() or time.monotonic() >= rescanned + self._rescan_seconds(watcher):
                    self._rescan()
                    rescanned = time.monotonic()
                self._feed_named(watcher.take_names())
                self._feed_due()
                self._account()
                self._accounting.storage(self._pipeline.blocked)
                if self._pipeline.in_flight or self._sidecars.is_pending:
                    self._account(timeout_seconds=0.2)
                else:
                    # Asked at each turn, because the watcher may start or stop polling meanwhile.
                    next_rescan = rescanned + self._rescan_seconds(watcher)
                    watcher.wait(self._idle_seconds(min(next_rescan, watcher.next_check)))
            log.info("service.stopping")
        finally:
            self._notifier.stopping()
            watcher.stop()
            self._finish()
        return self.counters

    @property
    def _unsettled(self) -> set[str]:
        """Files that are still changing, or need another look."""
        return {*self._inbox.changing, *self._retries.waiting}

    def _feed_what_settles(self) -> None:
        """Sort files as they settle, until none is left or `settle_timeout_seconds` passed with nothing sorted."""
        sorted_before, deadline, told = -1, 0.0, False
        while not self._shutdown.requested and (self._in_hand or self._unsettled or self._look_at_once):
            if self.counters.folders.total() != sorted_before:
                sorted_before = self.counters.folders.total()
                deadline = time.monotonic() + self._settings.settle_timeout_seconds
            self._feed_due()
            self._account(timeout_seconds=0.1 if self._in_hand else 0.0)
            if self._in_hand:
                continue
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0:
                return
            if unsettled := self._unsettled:
                self._on_waiting(len(unsettled))
                if not told and self._settings.settle_timeout_seconds - left_seconds >= QUIET_SECONDS:
                    self._accounting.wait(unsettled, self._inbox.root, left_seconds)
                    told = True
            self.counters.waited += _sleep(0.1)

    def _feed_backlog(self) -> None:
        self._pipeline.backlog = True
        try:
            self._feed(self._inbox.scan(time.time()))
        finally:
            self._pipeline.backlog = False
        for folder, reason in self._inbox.unlisted.items():
            self._accounting.leave_name(self._inbox.root, folder, reason)

    def _rescan(self) -> None:
        self._accounting.begin_rescan()
        if self._lock is not None:
            self._lock.take(create=False)  # this may be an empty mount point, into which nothing is to be written
        try:
            self._feed_backlog()
        except InboxGoneError:
            return  # the watcher reports that, and waits for the inbox
        self._accounting.end_rescan(self._inbox.unlisted)

    def _feed_named(self, names: Iterable[str]) -> None:
        now = time.time()
        self._feed(photo for name in names if (photo := self._inbox.look(name, now)) is not None)

    def _feed_due(self) -> None:
        """Feed the files that have settled, and those whose next look is due."""
        now = time.time()
        replaced, self._look_at_once = self._look_at_once, set()
        self._feed_named(replaced)
        self._feed(self._inbox.look_again(now))
        for name in self._retries.due(now):
            if name in self._in_hand:
                continue
            if (photo := self._inbox.look(name, now)) is not None:
                self._feed([photo])
            elif name in self._inbox.changing:
                self._retries.settle(name)
            else:
                self._retries.forget(name)

    def _feed(self, photos: Iterable[Photo]) -> None:
        for found in photos:
            if self._shutdown.requested:
                return
            self._notify()
            if (photo := self._triage(found)) is not None:
                self._submit(photo)
                self._account()

    def _triage(self, found: Photo) -> Photo | None:
        """The photo to submit; None if the file is to be left alone, waits, or follows a photo."""
        if found.name in self._in_hand:
            self._replaced.add(found.name)
            return None
        photo = self._retries.admit(found, time.time())
        if photo is None:
            return None
        if self._accounting.ignored.meet(photo) or self._sidecars.must_wait(photo):
            pass
        elif self._was_linked(photo):
            self._accounting.skip_linked(photo)
        elif self._history is not None and self._history.is_neither(photo):
            self._accounting.keep_neither(photo, self._pipeline.run)
        elif self._was_restored(photo):
            self._accounting.skip_put_back(photo)
        elif self._sidecars.follow_sorted(photo, self._pipeline.run):
            self._account()
        elif not self._inbox.selection.includes(photo.name):  # a sidecar without a photo
            self._accounting.ignored.add(photo)
        else:
            return photo
        self._retries.forget(photo.name)
        return None

    def _was_restored(self, photo: Photo) -> bool:
        if self._history is None or self._settings.include_undone:
            return False
        return self._history.was_restored(photo)

    def _was_linked(self, photo: Photo) -> bool:
        """Whether an earlier run linked this version of a photo, or a link to the file is still there."""
        if self._history is None or not self._settings.link:
            return False
        link = self._history.last_link(photo)
        if link is None:
            return False
        is_same_version = (link.size, link.mtime_ns) == (photo.identity.size, photo.identity.mtime_ns)
        # Edited in place, a photo is changed under both names of a hard link: another one would add nothing.
        return is_same_version or file_of(link.destination) == photo.identity[:2]

    def _submit(self, photo: Photo) -> None:
        """Wait until the pipeline has space for a photo, or the end is asked for."""
        if self._lock is not None and not self._lock.is_held:
            self._lock.take()
        while not self._pipeline.submit(photo):
            self._account()
            self._accounting.storage(self._pipeline.blocked)
            self._notify()
            if self._shutdown.requested:
                return
        self._in_hand.add(photo.name)

    def _account(self, *, timeout_seconds: float = 0.0) -> None:
        """Account for what the pipeline has finished, and have sidecars follow."""
        for outcome in self._pipeline.outcomes(timeout_seconds=timeout_seconds):
            photo, decision, destination = outcome.photo, outcome.decision, outcome.destination
            self._in_hand.discard(photo.name)
            if outcome.kind == "again" or (outcome.kind == "left" and not self._settings.once):
                self._retries.add(outcome, time.time())
            else:
                self._retries.forget(photo.name)
            if photo.name in self._replaced:
                self._replaced.discard(photo.name)
                self._look_at_once.add(photo.name)
            self._accounting.record(outcome)
            if decision is None or destination is None:
                continue
            if outcome.kind != SIDECAR and not self._settings.dry_run:
                self._sidecars.follow(photo, destination, decision.run)
            if self._settings.link and not self._settings.once:
                self._ignore_linked(photo)
        self._sidecars.hand_over(self._pipeline)

    def _ignore_linked(self, photo: Photo) -> None:
        """Leave a photo alone that was just linked: it is still there, and its inode's status has changed by that."""
        there = self._inbox.look(photo.name, time.time())
        if there is not None and there.identity.is_same_file(photo.identity):
            self._accounting.ignored.add(there)

    def _rescan_seconds(self, watcher: Watcher) -> float:
        return min(self._settings.rescan_seconds, watcher.poll_seconds)

    def _idle_seconds(self, wake_at: float) -> float:
        """How long the loop may sleep if nothing happens.

        Args:
            wake_at: the latest end of it, a monotonic time.
        """
        if self._look_at_once:
            return 0.0
        now = time.time()
        next_look = min(self._inbox.next_look(now), self._retries.next_due) - now
        return max(0.05, min(self._notifier.alive_seconds, wake_at - time.monotonic(), next_look))

    def _notify(self, trouble: str | None = None) -> None:
        """Tell the service manager what is going on, and that the loop is alive, unless the pipeline hangs."""
        # After SIGTERM a ping would restart the manager's watchdog, which is not fed while the pipeline ends.
        if not self._pipeline.hung and not self._shutdown.requested:
            self._notifier.alive()
        self._notifier.status(lambda: self._status(trouble))

    def _status(self, trouble: str | None) -> str:
        counters = self.counters
        folders = ", ".join(f"{count} in {folder}/" for folder, count in sorted(counters.folders.items()))
        waiting = len(self._in_hand | self._unsettled)
        counts = f"{waiting} waiting; {folders or 'none sorted yet'}; {counters.left} left"
        problem = self._pipeline.blocked or trouble
        return counts if problem is None else f"Waiting: {problem}; {counts}"

    def _finish(self) -> None:
        """End the stages and account for what they still did, however the run ended."""
        try:
            self._pipeline.stop()
            while self._sidecars.is_pending or not self._pipeline.idle:  # no stop parts a photo from its sidecars
                self._account(timeout_seconds=0.1)
            self._pipeline.close()
            self._account()
        finally:
            self._pipeline.close()
            self._accounting.finish(self._pipeline.run)


def _sleep(seconds: float) -> float:
    """Sleep, and return how long that took."""
    started = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - started
