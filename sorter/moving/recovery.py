"""Brings a photo whose move was interrupted back to exactly one name.

In: a `Plan`. Out: whether the photo arrived. The mover calls `resolve` after an error; `recover` does at start-up, for
each intent that a crash left in the history. Only what is on the disk decides, never what a process remembers.

The names that exist show how far the move got. `old` is the photo in its old folder, `new` is the planned name. The
partial and the hidden name contain the plan's token, 64 random bits, so nobody else uses them. The partial one is
always ours: an unfinished copy, or the first hard link. The hidden one is a file that `take_away` renamed so as to look
at it before removing it: in the old folder, or in the new one when a copy is taken back. It may turn out to be somebody
else's file.

    where the move was interrupted                      names that exist            what `resolve` does
    ------------------------------                      ---------------             -------------------
    before it, or its owner took the photo back         old                         nothing
    during the copy, or at the first link               old, partial                removes the partial one
    after the copy or link got its name                 old, new: same contents     removes the old one
    while the old name was being removed                hidden old, new             removes the hidden one
    after a rename, or after the old name was removed   new                         nothing
    while a copy was being taken back                   old, hidden new             removes the hidden one
    before it, and somebody took the name               old, new: other contents    nothing
    after a link, and the owner edited the photo        one edited file, two names  removes the new name
    after the new name was reserved                     old, new: a reservation     removes the new one

A hidden file that is not removed gets its own name back. The photo has arrived if only `new` remains.

With `--link` the photo stays and `old` is never touched: see `_resolve_link`, and `_resolve_unlink` for its undo.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sorter.files import inodes
from sorter.files.atomic import (
    ChangedError,
    away_name,
    drop_reservation,
    give_back,
    partial_name,
    same_contents,
    sync_folder,
    take_away,
)
from sorter.files.photo import COARSE_NS, Identity, Photo, opened_folder
from sorter.history.store import History, Move

# Nothing has this name, or nothing can have it here: not all file systems take names that are not UTF-8, or long ones.
_NO_SUCH_NAME = (errno.ENOENT, errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a move is about to do; written to the history before the photo is touched.

    Attributes:
        photo: where it is, and which version of the file was classified.
        folder: inside the output, `cats` or `cats/2019`.
        name: inside the folder; the move takes this name or none.
        token: part of the hidden names that the move uses on the way.
        action: `link` leaves the photo where it is, and gives the name to a link or a copy. `unlink` is the undo of
            that: `photo` is the link, which goes away, and `name` is the photo's, which stays.
    """

    photo: Photo
    folder: str
    name: str
    token: str
    action: Literal["move", "link", "unlink"] = "move"


@dataclass(frozen=True, slots=True)
class _File:
    """A name in an open folder, and the status of the file that has it."""

    folder: int
    name: str
    status: os.stat_result


def resolve(output: Path, plan: Plan) -> bool:
    """Bring a photo whose move was interrupted to exactly one name, and tell whether it is the new one.

    Raises:
        OSError: it cannot be determined now; nothing was removed that has no other name.
    """
    folder, _, base = plan.photo.name.rpartition("/")
    with _opened_if_there(plan.photo.root, folder) as source, _opened_if_there(output, plan.folder) as target:
        if plan.action == "link":
            return _resolve_link(source, base, target, plan)
        if plan.action == "unlink":
            return _resolve_unlink(source, base, target, plan)
        partial = _look(target, partial_name(plan.token))
        hidden = _look(target, away_name(plan.token))
        new = _look(target, plan.name)
        if source is None and (new or partial or hidden) and not os.path.isdir(plan.photo.root):
            # The inbox may be on a disk that is not plugged in and still has the photo. To decide now could leave two.
            raise FileNotFoundError(errno.ENOENT, "its inbox is not there")
        old = _find_old(source, base, plan)
        if partial is not None:
            os.unlink(partial.name, dir_fd=partial.folder)
        if hidden is not None:
            _finish_taking_back(old, hidden, plan)
            new = _look(target, plan.name)
        if new is not None and _may_be_reservation(new, plan):
            drop_reservation(new.folder, new.name)
            new = _look(target, plan.name)
        arrived = _leave_one(old, new, _look(source, base), plan)
        if not arrived and old is not None and old.name != base and _look(source, old.name) is not None:
            give_back(old.folder, old.name, old.folder, base)
        for touched in (target, source):
            if touched is not None:
                sync_folder(touched)
        return arrived


def _resolve_link(source: int | None, base: str, target: int | None, plan: Plan) -> bool:
    """Leave a complete link or copy, or nothing, and tell which; the photo itself is only looked at.

    A link or copy is complete as soon as it has its name. Before that it has the partial one, and goes.
    """
    partial = _look(target, partial_name(plan.token))
    if partial is not None:
        os.unlink(partial.name, dir_fd=partial.folder)
    new = _look(target, plan.name)
    if new is None:
        return False
    if new.status.st_size != plan.photo.identity.size and not inodes.are_real(new.folder):
        drop_reservation(new.folder, new.name)
    old, new = _look(source, base), _look(target, plan.name)
    if new is None:
        return False
    sync_folder(new.folder)
    if old is not None and _is_version(old.status, plan.photo.identity):
        return same_contents(old.folder, old.name, new.folder, new.name)
    return _looks_like_photo(new.status, plan.photo.identity)


def _resolve_unlink(source: int | None, base: str, target: int | None, plan: Plan) -> bool:
    """Give a link that was being removed its name back, and tell whether it had been removed.

    To give it back is always safe, and costs another undo.
    """
    hidden = _look(source, away_name(plan.token))
    if hidden is not None:
        named = _look(source, base)
        if named is not None and os.path.samestat(named.status, hidden.status) and inodes.are_real(hidden.folder):
            os.unlink(hidden.name, dir_fd=hidden.folder)  # killed between the link and the unlink that give it back
        else:
            give_back(hidden.folder, hidden.name, hidden.folder, base)
        sync_folder(hidden.folder)
        return False
    there = _look(source, base)
    is_removed = there is None or not _looks_like_photo(there.status, plan.photo.identity)
    return is_removed and _look(target, plan.name) is not None


def _may_be_reservation(new: _File, plan: Plan) -> bool:
    """Whether to look for the text of a reservation; one without it was made only where there are no hard links."""
    if new.status.st_size == plan.photo.identity.size:
        return False
    return new.status.st_size > 0 or not inodes.are_real(new.folder)


def _find_old(source: int | None, base: str, plan: Plan) -> _File | None:
    """The photo in its old folder, under its own or the hidden name; another hidden file gets its own name back."""
    named, hidden = _look(source, base), _look(source, away_name(plan.token))
    if hidden is not None:
        if named is not None and os.path.samestat(named.status, hidden.status):
            os.unlink(hidden.name, dir_fd=hidden.folder)  # killed between the link and the unlink that give it back
        elif _is_version(hidden.status, plan.photo.identity):
            return hidden
        else:
            give_back(hidden.folder, hidden.name, hidden.folder, base)
    return named if named is not None and _is_version(named.status, plan.photo.identity) else None


def _finish_taking_back(old: _File | None, hidden: _File, plan: Plan) -> None:
    """Remove a hidden file in the new folder if it is a copy of the photo; give it its name back if not."""
    if old is not None and same_contents(old.folder, old.name, hidden.folder, hidden.name):
        os.unlink(hidden.name, dir_fd=hidden.folder)
    else:
        give_back(hidden.folder, hidden.name, hidden.folder, plan.name)


def _leave_one(old: _File | None, new: _File | None, under_old_name: _File | None, plan: Plan) -> bool:
    """Leave one of the photo's two names, and tell whether it is the new one.

    Args:
        old: the photo in its old folder; None if it is not there or has changed.
        new: the file with the planned name.
        under_old_name: the file with the old name, whether it is the photo or not.
        plan: of the move.
    """
    match old, new:
        case _, None:
            return False
        case None, _File() if under_old_name is not None and os.path.samestat(under_old_name.status, new.status):
            # Its owner edited it since it was classified: it keeps its old name and is classified again.
            take_away(new.folder, new.name, Identity.of(new.status), plan.token)
            return False
        case None, _File():
            return _looks_like_photo(new.status, plan.photo.identity)
        case _File(), _File():
            # With other contents, it is somebody else's file that has the planned name.
            return same_contents(old.folder, old.name, new.folder, new.name) and _remove_old(old, new, plan)


def _remove_old(old: _File, new: _File, plan: Plan) -> bool:
    """Remove the old name; if that is refused, remove the new one, so that no photo keeps two names."""
    sync_folder(new.folder)
    base = os.path.basename(plan.photo.name)
    is_hidden = old.name != base
    try:
        if is_hidden:
            os.unlink(old.name, dir_fd=old.folder)
        else:
            # The version whose contents were compared, not whatever has the name by now.
            compared = plan.photo.identity._replace(device=os.fstat(old.folder).st_dev)
            take_away(old.folder, base, compared, plan.token)
    except ChangedError:  # another photo has the old name now
        return True
    except OSError:
        if is_hidden:
            give_back(old.folder, old.name, old.folder, base)
        take_away(new.folder, new.name, Identity.of(new.status), plan.token)
        return False
    return True


def _is_version(status: os.stat_result, identity: Identity) -> bool:
    """Tell whether a file is the version that was classified."""
    # Not by its device, which may have another number after a reboot.
    return stat.S_ISREG(status.st_mode) and Identity.of(status)._replace(device=identity.device).is_same_file(identity)


def _looks_like_photo(status: os.stat_result, identity: Identity) -> bool:
    """Tell whether a file may be the photo: it has the inode, or the size and time, which a copy keeps.

    Where inode numbers are made up the size has to do: times change there too, as files are uploaded.
    """
    same_time = abs(status.st_mtime_ns - identity.mtime_ns) <= COARSE_NS or identity.inode == 0
    alike = status.st_size == identity.size and same_time
    return stat.S_ISREG(status.st_mode) and (alike or inodes.number(status) == identity.inode != 0)


def _look(folder: int | None, name: str) -> _File | None:
    if folder is None:
        return None
    try:
        return _File(folder, name, os.stat(name, dir_fd=folder, follow_symlinks=False))
    except OSError as error:
        if error.errno not in _NO_SUCH_NAME:
            raise
        return None


@contextlib.contextmanager
def _opened_if_there(root: Path, relative: str) -> Iterator[int | None]:
    """An open folder; None if it is gone, or if something else has its name."""
    with contextlib.ExitStack() as stack:
        try:
            folder: int | None = stack.enter_context(opened_folder(root, relative))
        except (FileNotFoundError, NotADirectoryError):
            folder = None
        except OSError as error:
            if error.errno not in (errno.ELOOP, *_NO_SUCH_NAME):
                raise
            folder = None
        yield folder


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of the moves that a crash left unfinished.

    Attributes:
        moved: how many photos arrived.
        stayed: how many did not.
        waiting: the paths of photos that cannot be examined yet, and why.
    """

    moved: int
    stayed: int
    waiting: tuple[tuple[str, str], ...]


def recover(history: History, output: Path, *, sorting: bool = True, undoing: bool = True) -> Recovered:
    """Finish or withdraw the moves that a crash left unfinished, and record which.

    Args:
        history: of the output.
        output: the folder that has `cats/` and the others.
        sorting: include the moves into the output; the caller holds its lock.
        undoing: include the moves of an undo and of corrections; the caller holds the lock of undo.

    Raises:
        StorageError: the history cannot be written.
    """
    done: list[Move] = []
    withdrawn: list[Move] = []
    waiting: list[tuple[str, str]] = []
    unfinished = history.unfinished()
    inodes.look({output, *(move.root for move in unfinished), *(move.target for move in unfinished if move.target)})
    for move in (_here(move, output) for move in unfinished):
        if not (sorting if move.target is None else undoing):
            continue
        plan = _plan_of(move)
        try:
            arrived = resolve(move.target or output, plan)
        except OSError as error:
            waiting.append((plan.photo.path, error.strerror or str(error)))
            continue
        (done if arrived else withdrawn).append(move)
    if done or withdrawn:
        history.settle(done, withdrawn)
    return Recovered(len(done), len(withdrawn), tuple(waiting))


def _here(move: Move, output: Path) -> Move:
    """A move inside the output, which is where it is now and may have been renamed since."""
    return replace(move, root=output, target=output) if move.target == move.root else move


def _plan_of(move: Move) -> Plan:
    folder, base = os.path.split(os.path.join(move.folder, move.name))
    photo = Photo(move.root, move.source, move.identity, 0.0)
    if not move.linked:
        return Plan(photo, folder, base, move.token, "move")
    return Plan(photo, folder, base, move.token, "link" if move.target is None else "unlink")
