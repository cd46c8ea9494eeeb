"""Links to photos that stay where they are (`--link`), and what it takes to remove one of them again.

In: open folders and names. Out: a second name for the photo's file, or that name's removal. Nothing here changes or
removes the photo itself.

A link may have become the only copy: its photo may have been deleted or replaced since. So it is removed only while the
photo is at its place with the same contents, which both names of one file always have.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

from sorter.files.atomic import UNSUPPORTED, ChangedError, StayedError, same_contents, take_away
from sorter.files.photo import Identity, file_of, opened_folder
from sorter.history.reader import Entry
from sorter.history.store import SIDECAR

# What a hard link is refused with where there are none, or no more.
_NO_LINKS = (*UNSUPPORTED, errno.EPERM, errno.EMLINK)

_GONE = "the photo itself is gone, so this may be the only copy"
_ANOTHER = "the original has changed since, so this may be the only copy"


Place = tuple[int, str]
"""An open folder, and a name in it."""


def hard_link(source: int, base: str, target: int, partial: str, identity: Identity) -> os.stat_result | None:
    """Link a photo to a hidden name in another folder.

    Returns:
        The file's status; None if there can be no hard link, or no more.

    Raises:
        ChangedError: another file has the photo's name now.
    """
    try:
        os.link(base, partial, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return None
        raise
    linked = os.stat(partial, dir_fd=target, follow_symlinks=False)
    if not Identity.of(linked).is_same_file(identity):
        os.unlink(partial, dir_fd=target)  # a second name, the file keeps its first
        raise ChangedError("changed while it was moved")
    return linked


def remove(link: Place, identity: Identity, photo: Place, token: str) -> None:
    """Remove a link or a copy, if the photo is still there with the same contents.

    Args:
        link: where the link is.
        identity: of the link.
        photo: where the photo is.
        token: of the move, for a hidden name.

    Raises:
        StayedError: the link stays, because it is another file now, or because the photo is.
    """
    before = _check_same(link, photo)

    def may_be_the_only_one() -> bool:
        try:
            return not before.is_same_file(_identity(photo))
        except StayedError:
            return True

    take_away(*link, identity, token, may_be_the_only_one)


def check(entry: Entry, link: str, photo: str) -> Identity:
    """Check that a link or a copy can be removed; changes nothing.

    Args:
        entry: of the photo.
        link: where the link is.
        photo: where the photo is.

    Returns:
        The identity that the link has now.

    Raises:
        StayedError: it cannot be removed; the message says why.
    """
    try:
        status = os.lstat(link)
    except OSError:
        raise StayedError("it is gone") from None
    # Whoever edits one name of a file edits the other. A sidecar changes whenever its owner edits the photo.
    is_ours = entry.has_version(status) or entry.kind == SIDECAR or file_of(photo) == file_of(link)
    if not stat.S_ISREG(status.st_mode) or not is_ours:
        raise StayedError("it was changed or replaced since it was sorted")
    with contextlib.ExitStack() as stack:
        try:
            places = [
                (stack.enter_context(opened_folder(Path(path).parent, "")), os.path.basename(path))
                for path in (link, photo)
            ]
        except OSError:
            raise StayedError(_GONE) from None
        _check_same(*places)
    return Identity.of(status)


def identity_of(photo: str) -> Identity:
    """The identity of a photo that was linked.

    Raises:
        StayedError: it is gone.
    """
    try:
        return Identity.of(os.lstat(photo))
    except OSError:
        raise StayedError(_GONE) from None


def _check_same(link: Place, photo: Place) -> Identity:
    """Check that a link has the contents of its photo, and return the photo's identity from before that."""
    found = _identity(photo)
    try:
        same = same_contents(*link, *photo)
    except OSError as error:
        raise StayedError(f"it cannot be compared with the photo itself ({error.strerror})") from None
    if not same:
        raise StayedError(_ANOTHER)
    return found


def _identity(photo: Place) -> Identity:
    folder, base = photo
    try:
        return Identity.of(os.stat(base, dir_fd=folder, follow_symlinks=False))
    except OSError:
        raise StayedError(_GONE) from None
