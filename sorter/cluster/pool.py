"""A fixed number of nodes, each an actor of Ray's with the model resident, and the tasks that they have in hand.

In: tasks. Out: a `Finished` for each, with its result or the fact that its node died. Ray itself would repeat a task
that kills its node for ever; here whoever hands out the tasks decides. Used by one thread.
"""

import collections
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sorter.cluster.node import Description, Node, Progress, Setup
from sorter.cluster.ray_cluster import Shape
from sorter.errors import SorterError, StorageError

TASKS_PER_NODE = 2
"""A node decides on one while it fetches, or moves, another."""

NO_PROGRESS_SECONDS = 600.0
"""For so long the nodes may neither decide on nor move a single photo."""

_PROGRESS_SECONDS = 2.0
_CLOSING_SECONDS = 5.0
_MAX_FAILED_STARTS = 3  # of each node, in a row, before any has started


@dataclass(frozen=True, slots=True)
class Task:
    """Something for a node to do.

    Attributes:
        method: of the node.
        arguments: of the method.
        tag: whatever tells whose task it is.
        alone: give the node nothing else meanwhile, so that its death is known to be this task's.
    """

    method: str
    arguments: tuple[Any, ...]
    tag: Any
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a task.

    Attributes:
        result: what the method returned.
        died: the node died, or was lost, with this task in hand; it may have done all of it, some or nothing.
    """

    task: Task
    result: Any = None
    died: bool = False


@dataclass(eq=False)
class _Actor:
    handle: Any
    starting: Any  # the reference to what `begin` returns; None once it has
    tasks: dict[Any, Task] = field(default_factory=dict)  # by reference
    asked: Any = None  # the reference to what `progress` returns
    progress: Progress = field(default_factory=Progress)


class Pool:
    """The nodes.

    Args:
        ray: the connected module.
        shape: how many nodes, and what each may use.
        setup: of each of them.
        kind: `Node`, or a class of it.

    Attributes:
        description: of the first node that has started; None until then.
        progressed: when something was last finished, decided on or moved, a monotonic time.
        deaths: nodes that died.
    """

    def __init__(self, ray: Any, shape: Shape, setup: Setup, kind: type[Node] = Node) -> None:
        self._ray, self._setup = ray, setup
        # `progress` answers beside the tasks.
        self._remote = ray.remote(
            num_cpus=shape.cpus,
            num_gpus=shape.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=TASKS_PER_NODE + 1,
            scheduling_strategy="SPREAD",
        )(kind)
        self._queue: collections.deque[Task] = collections.deque()
        self.size = shape.nodes
        self.description: Description | None = None
        self.progressed = time.monotonic()
        self.deaths = self._failed_starts = self._photos_of_dead = 0
        self._polled = 0.0
        self._actors = [self._new_actor() for _ in range(shape.nodes)]

    @property
    def in_hand(self) -> int:
        """Tasks that are not finished."""
        return len(self._queue) + sum(len(actor.tasks) for actor in self._actors)

    @property
    def wants_more(self) -> bool:
        """Whether a node would soon be idle."""
        return self.in_hand < self.size * (TASKS_PER_NODE + 1)

    @property
    def photos(self) -> int:
        """Photos that the nodes have come through, as far as they have told."""
        return self._photos_of_dead + sum(actor.progress.photos for actor in self._actors)

    def submit(self, task: Task) -> None:
        """Queue a task; one that is to be alone goes first."""
        if task.alone:
            self._queue.appendleft(task)
        else:
            self._queue.append(task)
        self._assign()

    def drop_waiting(self) -> None:
        """Forget the tasks that no node has begun."""
        self._queue.clear()

    def wait(self, timeout_seconds: float) -> Iterator[Finished]:
        """The tasks that have ended, waiting for the first.

        Raises:
            SorterError: a node refused: its machine is set up wrongly, or the storage fails.
        """
        references = [reference for actor in self._actors for reference in self._references(actor)]
        ready, _ = self._ray.wait(references, num_returns=1, timeout=timeout_seconds)
        if ready:
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            actor = next((a for a in self._actors if reference in self._references(a)), None)
            if actor is not None:  # otherwise it died with another of its tasks
                yield from self._settle(actor, reference)
        self._poll()
        self._assign()

    def check_progress(self) -> None:
        """Make sure that something happens.

        Raises:
            StorageError: nothing did for `NO_PROGRESS_SECONDS`.
        """
        if time.monotonic() > self.progressed + NO_PROGRESS_SECONDS:
            raise StorageError(
                f"no node has decided on or moved a photo for {NO_PROGRESS_SECONDS / 60:.0f} minutes: look at "
                "the cluster, and run the command again, which goes on from here"
            )

    def await_first(self) -> Description:
        """Wait until a node is ready.

        Raises:
            SorterError: a node refused, or none became ready.
        """
        while self.description is None:
            for _ in self.wait(1.0):
                pass
            self.check_progress()
        return self.description

    def close(self) -> None:
        """End the nodes, however far they are."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors = []

    def finish(self) -> None:
        """Have the nodes clear up, and end them."""
        closing = [actor.handle.close.remote() for actor in self._actors if actor.starting is None]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSING_SECONDS)
        self.close()

    def _references(self, actor: _Actor) -> list[Any]:
        others = [reference for reference in (actor.starting, actor.asked) if reference is not None]
        return [*actor.tasks, *others]

    def _new_actor(self) -> _Actor:
        handle = self._remote.remote()
        return _Actor(handle, handle.begin.remote(self._setup))

    def _settle(self, actor: _Actor, reference: Any) -> Iterator[Finished]:
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (
                cause
                if isinstance(cause, SorterError)
                else StorageError(f"a node failed ({type(cause).__name__}: {cause}): run the command again")
            ) from error
        except self._ray.exceptions.RayError:
            yield from self._replace(actor)
            return
        if reference == actor.starting:  # through ray:// equal ones are not the same
            actor.starting, self._failed_starts, self.progressed = None, 0, time.monotonic()
            self.description = self.description or result
        elif reference == actor.asked:
            actor.asked = None
            if result != actor.progress:
                actor.progress, self.progressed = result, time.monotonic()
        else:
            self.progressed = time.monotonic()
            yield Finished(actor.tasks.pop(reference), result)

    def _replace(self, actor: _Actor) -> Iterator[Finished]:
        """Put another node in the place of one that is lost."""
        self.deaths += 1
        if actor.starting is not None:
            self._failed_starts += 1
            if self._failed_starts > _MAX_FAILED_STARTS * self.size:
                raise StorageError("the nodes die before the model is loaded: give them more memory")
        self._photos_of_dead += actor.progress.photos
        # One that is only unreachable goes on for a while; what it does then is safe, but not wanted.
        self._ray.kill(actor.handle)
        self._actors[self._actors.index(actor)] = self._new_actor()
        for task in actor.tasks.values():
            yield Finished(task, died=True)

    def _assign(self) -> None:
        for actor in sorted(self._actors, key=lambda actor: len(actor.tasks)):
            while self._queue and actor.starting is None and self._has_room(actor, self._queue[0]):
                task = self._queue.popleft()
                actor.tasks[getattr(actor.handle, task.method).remote(*task.arguments)] = task

    @staticmethod
    def _has_room(actor: _Actor, task: Task) -> bool:
        if task.alone or any(other.alone for other in actor.tasks.values()):
            return not actor.tasks
        return len(actor.tasks) < TASKS_PER_NODE

    def _poll(self) -> None:
        """Ask the nodes that are at work how far they are."""
        if time.monotonic() < self._polled + _PROGRESS_SECONDS:
            return
        self._polled = time.monotonic()
        for actor in self._actors:
            if actor.tasks and actor.asked is None:
                actor.asked = actor.handle.progress.remote()
