"""Moves a batch of photos and records it: intents, moves, syncs, done.

In: `Decision`s. Out: an `Outcome` for each. The safety is in the order: the intents are durable before the first photo
is touched, and nothing is recorded as done before the folders are synced.
"""

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from sorter.deadlines import Deadline
from sorter.decisions import Decision, Outcome
from sorter.errors import StorageError
from sorter.files.atomic import ChangedError, StayedError
from sorter.history.store import History, Move
from sorter.moving.mover import Mover
from sorter.moving.recovery import Plan

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 1.0, 60.0

Result = TypeVar("Result")


class GivenUpError(StorageError):
    """The storage still failed when the daemon was told to stop."""


class BatchMover:
    """Uses the mover and the history in the right order; used by one thread only.

    Args:
        history: None for a dry run, which determines destinations and changes nothing.
        patient: if the storage fails, wait and try again, as a daemon does, instead of raising.
        stopping: ends the waiting.
        flat: put photos from subfolders directly into `cats/`, instead of into the same subfolders there.
    """

    def __init__(
        self,
        mover: Mover,
        history: History | None,
        *,
        patient: bool,
        stopping: threading.Event,
        flat: bool = False,
    ) -> None:
        self._mover, self._history = mover, history
        self._patient, self._stopping, self._flat = patient, stopping, flat
        self._storage_failed = False  # since the last copy that was made ahead
        self.blocked: str | None = None
        """Why nothing can be moved at present, while that is so."""
        self.deadline = Deadline()
        """Of the step in hand; waiting for space on the disk is none."""

    def move(self, batch: list[Decision], tell: Callable[[Outcome], None]) -> None:
        """Move a batch. `tell` gets the outcome of each photo that was tried, once, even if the others fail.

        Raises:
            StorageError: nothing more can be moved; no photo is lost, and the next start finds any that is half moved.
        """
        plans = [self._plan(decision) for decision in batch]
        if self._history is None:
            for decision, plan in zip(batch, plans, strict=True):
                tell(Outcome(plan.photo, decision.kind, decision, self._mover.path(plan)))
            return
        try:
            self._move(self._history, batch, plans, tell)
        except GivenUpError as error:
            self.blocked = str(error)  # told to stop, which is no failure: the photos that are left stay in the inbox
        finally:
            # Planning reserved these names, so that no two photos of a batch get the same one.
            for plan in plans:
                self._mover.forget(plan)

    def _plan(self, decision: Decision) -> Plan:
        photo = decision.decoded.photo
        if decision.name:
            folder, name = os.path.split(os.path.join(decision.folder, decision.name))
            return self._mover.plan(photo, folder, name)
        kept = "" if self._flat else os.path.dirname(photo.name)
        return self._mover.plan(photo, f"{decision.folder}/{kept}".rstrip("/"))

    def _move(
        self, history: History, batch: list[Decision], plans: list[Plan], tell: Callable[[Outcome], None]
    ) -> None:
        moves = [self._intent(decision, plan) for decision, plan in zip(batch, plans, strict=True)]
        outcomes: list[Outcome] = []
        try:
            # First, because the history must not be created in the empty mount point of an output that is away.
            self._patiently(lambda: self._mover.check_output(plans[0].photo.root))
            for run in dict.fromkeys(decision.run for decision in batch):
                self._patiently(partial(history.begin, run))
            self._patiently(lambda: history.intend(moves))
            self._copy_ahead(plans)
            for number, (decision, plan) in enumerate(zip(batch, plans, strict=True), 1):
                outcomes.append(self._move_one(decision, plan))
                if self._storage_failed:  # then there was no space for the copies of the others either
                    self._copy_ahead(plans[number:])
        finally:
            for plan in plans:
                self._mover.withdraw_copy(plan)
            # If one photo cannot be moved, and the error is on its way to the caller, those before it have been moved
            # all the same: they must be recorded as done. Those that were not reached must not remain as intents. An
            # unresolved one may have two names now: its intent stays, for recovery at the next start.
            done = [move for move, outcome in zip(moves, outcomes, strict=False) if outcome.destination is not None]
            kept = {move.token for move in done}
            kept |= {plan.token for plan in plans if self._mover.is_unresolved(plan)}
            withdrawn = [move for move in moves if move.token not in kept]
            try:
                self._patiently(self._mover.settle)
                if done or withdrawn:
                    self._patiently(lambda: self._settle(history, plans[0].photo.root, done, withdrawn))
            finally:
                # Moved is moved, even if it could not be recorded: then its intent is left, and recovery records it.
                for outcome in outcomes:
                    tell(outcome)

    def _copy_ahead(self, plans: list[Plan]) -> None:
        self._storage_failed = False
        for plan in plans:
            self._patiently(partial(self._mover.copy_ahead, plan), own_seconds=_seconds(plan))

    def _settle(self, history: History, inbox: Path, done: list[Move], withdrawn: list[Move]) -> None:
        self._mover.check_output(inbox)
        history.settle(done, withdrawn)

    def _move_one(self, decision: Decision, plan: Plan) -> Outcome:
        try:
            self._patiently(lambda: self._mover.move(plan), own_seconds=_seconds(plan) + self._mover.settle_seconds)
        except ChangedError as error:
            return Outcome(plan.photo, "again", decision, detail=str(error))
        except StayedError as error:
            return Outcome(plan.photo, "left", decision, detail=str(error))
        return Outcome(plan.photo, decision.kind, decision, self._mover.path(plan))

    def _patiently(self, step: Callable[[], Result], *, own_seconds: float = 0.0) -> Result:
        """Do one step; if the storage fails, a daemon tries again until it is told to stop.

        Meanwhile the queues before this stage fill up, and sorting stops.

        Args:
            step: raises a StorageError if nothing can be moved now.
            own_seconds: what the step may take in addition to `STEP_SECONDS`.

        Raises:
            GivenUpError: the storage still failed when the daemon was told to stop.
            StorageError: the storage failed, and this is not a daemon.
        """
        delay_seconds = _FIRST_DELAY_SECONDS
        while True:
            try:
                self.deadline.begin(own_seconds)
                try:
                    result = step()
                finally:
                    self.deadline.finish()
            except StorageError as error:
                if not self._patient:
                    raise
                self.blocked, self._storage_failed = str(error), True
                if self._stopping.wait(delay_seconds):
                    raise GivenUpError(str(error)) from error
                delay_seconds = min(_LONGEST_DELAY_SECONDS, 2 * delay_seconds)
            else:
                self.blocked = None
                return result

    def _intent(self, decision: Decision, plan: Plan) -> Move:
        decoded = decision.decoded
        return Move(
            token=plan.token,
            run=decision.run.id,
            # Resolved, so that it is found later under whatever path the inbox is named then.
            root=Path(os.path.realpath(plan.photo.root)),
            source=plan.photo.name,
            folder=decision.folder,
            name=f"{plan.folder}/{plan.name}".removeprefix(f"{decision.folder}/"),
            identity=plan.photo.identity,
            kind=decision.kind,
            label=decision.label,
            confidence=decision.confidence,
            reason=None if decoded.reason is None else str(decoded.reason),
            detail=decision.detail or decoded.detail or None,
            follows=decision.follows,
            linked=plan.action == "link",
        )


def _seconds(plan: Plan) -> float:
    """How long a slow disk may take to copy a photo."""
    return plan.photo.identity.size / 1e6
