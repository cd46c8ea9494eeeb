"""Where a photo is after its move was cut short, and the way back to exactly one name.

In: a `Plan`. Out: whether the photo arrived. What is found decides, nothing that a process remembered: the mover asks
after an error, and `recover` at start-up after a crash, for each intent of the history without its done.

The names that exist say how far a move came; what is partial is a copy, or a link on the same file system:

    rename   source | destination
    else     source | source, partial | source, destination | hidden source, destination | destination

A hidden name and a partial one hold the plan's token, 64 random bits. What is partial is ours; what is hidden was taken
away for a look at it, in the destination too where a move is undone, and may be somebody else's.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sorter.files.atomic import ChangedError, away_name, give_back, partial_name, same_contents, sync_folder, take_away
from sorter.files.photo import Identity, Photo, opened_folder
from sorter.history.store import History, Move

COARSE_NS = 2_000_000_000  # some file systems keep times to two seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """What a move is about to do, so that it can be written down before.

    Attributes:
        folder: inside the output.
        name: inside the folder; the move takes this one or none.
        token: in the hidden names that it uses on the way.
    """

    photo: Photo
    folder: str
    name: str
    token: str


def resolve(output: Path, plan: Plan) -> bool:
    """Bring a photo whose move was cut short to exactly one name, and tell whether it is the new one.

    Raises:
        OSError: it cannot be told now; nothing was taken away that does not exist elsewhere.
    """
    folder, _, base = plan.photo.name.rpartition("/")
    with _perhaps(plan.photo.root, folder) as source, _perhaps(output, plan.folder) as target:
        partial = _status(target, partial_name(plan.token))
        away = _status(target, away_name(plan.token))
        there = _status(target, plan.name)
        if source is None and (there or partial or away) and not os.path.isdir(plan.photo.root):
            # A disk that is not plugged in may still have the photo: then the copy is not its only name.
            raise FileNotFoundError(errno.ENOENT, "its inbox is away")
        original = _original(source, base, plan)
        if target is not None and partial is not None:
            os.unlink(partial_name(plan.token), dir_fd=target)
        if target is not None and away is not None:
            _put_back(source, original, target, plan)
            there = _status(target, plan.name)
        mine = _status(source, base)
        if target is not None and there is not None and original is None and mine and os.path.samestat(mine, there):
            # Two names of one file, which has changed since it was judged: it keeps the old one, and is judged anew.
            take_away(target, plan.name, Identity.of(there), plan.token)
            there = None
        if original is None or source is None:
            arrived = there is not None and _is_it(there, plan.photo.identity)
        else:
            arrived = (
                target is not None
                and there is not None
                and same_contents(source, original, target, plan.name)
                and _took_away(source, original, target, there, plan)
            )
            if not arrived and original != base and _status(source, original) is not None:
                give_back(source, original, source, base)
        for touched in (target, source):
            if touched is not None:
                sync_folder(touched)
        return arrived


def _put_back(source: int | None, original: str | None, target: int, plan: Plan) -> None:
    """End the undoing of a move: what the destination had goes if it is the photo's copy, and back if it is not."""
    hidden = away_name(plan.token)
    if source is not None and original is not None and same_contents(source, original, target, hidden):
        os.unlink(hidden, dir_fd=target)
    else:
        give_back(target, hidden, target, plan.name)


def _original(source: int | None, base: str, plan: Plan) -> str | None:
    """The name that the photo has in its old folder, its own or the hidden one; somebody else's file is put back."""
    hidden = away_name(plan.token)
    mine, away = _status(source, base), _status(source, hidden)
    is_mine = mine is not None and _is_version(mine, plan.photo.identity)
    if source is not None and away is not None:
        if mine is not None and os.path.samestat(mine, away):  # put back by a link, but not unlinked yet
            os.unlink(hidden, dir_fd=source)
        elif _is_version(away, plan.photo.identity):
            return hidden
        else:
            give_back(source, hidden, source, base)
    return base if is_mine else None


def _took_away(source: int, original: str, target: int, there: os.stat_result, plan: Plan) -> bool:
    """Take the old name away; where that is refused, take back the new one, so that none has two for good."""
    sync_folder(target)
    hidden, base = away_name(plan.token), os.path.basename(plan.photo.name)
    try:
        if original == hidden:
            os.unlink(hidden, dir_fd=source)
        else:
            # The version whose contents were compared, not whatever has the name by now.
            compared = plan.photo.identity._replace(device=os.fstat(source).st_dev)
            take_away(source, base, compared, plan.token)
    except ChangedError:  # another photo now has the old name
        return True
    except OSError:
        if original == hidden:
            give_back(source, hidden, source, base)
        take_away(target, plan.name, Identity.of(there), plan.token)
        return False
    return True


def _is_version(status: os.stat_result, identity: Identity) -> bool:
    # Devices get other numbers when the machine starts again.
    return stat.S_ISREG(status.st_mode) and Identity.of(status)[1:4] == identity[1:4]


def _is_it(status: os.stat_result, identity: Identity) -> bool:
    """Tell whether a file under the planned name is the photo: the same inode, or what a copy of it looks like."""
    alike = status.st_size == identity.size and abs(status.st_mtime_ns - identity.mtime_ns) <= COARSE_NS
    return stat.S_ISREG(status.st_mode) and (alike or status.st_ino == identity.inode)


def _status(folder: int | None, name: str) -> os.stat_result | None:
    if folder is None:
        return None
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise
        return None


@contextlib.contextmanager
def _perhaps(root: Path, relative: str) -> Iterator[int | None]:
    """An open folder, or None where it is gone or was replaced by something else."""
    with contextlib.ExitStack() as stack:
        try:
            folder: int | None = stack.enter_context(opened_folder(root, relative))
        except (FileNotFoundError, NotADirectoryError):
            folder = None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            folder = None
        yield folder


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of the moves that a crash left unfinished.

    Attributes:
        moved: arrived; `stayed` did not.
        waiting: cannot be told yet: paths, and why.
    """

    moved: int
    stayed: int
    waiting: tuple[tuple[str, str], ...]


def recover(history: History, output: Path, *, sorting: bool = True, undoing: bool = True) -> Recovered:
    """Finish or withdraw what a crash left unfinished, and record which.

    Args:
        history: of the output.
        output: the folder that has `cats/` and the others.
        sorting: take the moves into the output; its lock is held.
        undoing: take those back out of it; the lock of undo is held.

    Raises:
        StorageError: the history cannot be written.
    """
    done: list[Move] = []
    withdrawn: list[Move] = []
    waiting: list[tuple[str, str]] = []
    for move in history.unfinished():
        if not (sorting if move.target is None else undoing):
            continue
        photo = Photo(move.root, move.source, move.identity, 0.0)
        into, plan = output, Plan(photo, move.folder, move.name, move.token)
        if move.target is not None:
            folder, base = os.path.split(move.name)
            into, plan = move.target, Plan(photo, folder, base, move.token)
        try:
            arrived = resolve(into, plan)
        except OSError as error:
            waiting.append((photo.path, error.strerror or str(error)))
            continue
        (done if arrived else withdrawn).append(move)
    if done or withdrawn:
        history.settle(done, withdrawn)
    return Recovered(len(done), len(withdrawn), tuple(waiting))
