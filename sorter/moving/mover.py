"""The only code that changes the user's files.

In: a `Plan`, which photo gets which name. Out: where it is now, or why it stayed.

Promise: at every instant, and after `kill -9` at any instant, the photo exists intact under at least one of its two
names, and nothing that was there before is overwritten or deleted.

- One file system: `renameat2(RENAME_NOREPLACE)`, then a look at what arrived; another file's arrival is undone.
- A file system without it: hard link, then the old name is removed. One that has no hard links either: a small file
  reserves the name, and the photo is renamed onto that.
- With `--link` the old name is never touched: a hard link, or else a copy, gets the new one.
- Another file system: copy to a hidden partial name with mode, times and extended attributes, fsync, make sure that
  nobody has the photo open for writing, publish without replacing, fsync the folder, then the old name is removed.

`shutil.move` and `os.rename` overwrite or half-copy, so they have no place here.
"""

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sorter.errors import StorageError
from sorter.files import FOLDER, HISTORY, inodes
from sorter.files.atomic import (
    UNSUPPORTED,
    ChangedError,
    StayedError,
    TakenError,
    check_removable,
    give_back,
    make_folder,
    make_inner_folder,
    new_token,
    numbered,
    partial_name,
    publish,
    rename_noreplace,
    rename_onto_reservation,
    status_after_rename,
    sync_folder,
    take_away,
)
from sorter.files.lease import Lease
from sorter.files.lock import SORTING
from sorter.files.photo import Identity, Photo, open_file, opened_folder
from sorter.inbox.sidecars import FolderListing, SidecarNames, exists
from sorter.moving import copies, linker
from sorter.moving.copies import Copies
from sorter.moving.recovery import Plan, resolve

_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
# Nothing can be moved until somebody frees space or repairs the disk.
_STORAGE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)


# What system calls take, without the NUL at the end: nobody could open a file with a longer path by that.
_LONGEST_PATH_BYTES = 4095
# So many folders of the output are remembered; photos come a folder at a time.
_MAX_LISTINGS = 64


class Mover:
    """Moves photos from the inbox into the folders in `output`, such as `cats` and `cats/2019`.

    Args:
        output: the folder that has `cats/` and the others; folders are made when first needed.
        sidecars: says which files in the output belong to others' photos.
        settle_seconds: how long a copied photo must stay unchanged before the original is removed, where it cannot be
            known otherwise that nobody writes to it.
        link: leave photos where they are, and put links or copies into the folders.
    """

    def __init__(
        self, output: Path, sidecars: SidecarNames | None = None, *, settle_seconds: float = 2.0, link: bool = False
    ) -> None:
        self.output, self.settle_seconds = output.absolute(), settle_seconds
        self._link_only = link
        self._sidecars = sidecars or SidecarNames()
        self._listings: dict[str, FolderListing] = {}  # of the output's folders
        self.lock = threading.Lock()
        """Held while one photo moves: whoever holds it can end the process with nothing half moved."""
        self._touched: dict[tuple[Path, str], bool] = {}  # folders to sync; True if a photo has arrived there
        self._next_number: dict[tuple[str, str], int] = {}
        self._linked: set[tuple[int, int]] = set()  # device and inode of moved files that have other names too
        self._unresolved: set[str] = set()  # tokens of the plans of which nobody could tell how far they came
        self._begun: set[str] = set()  # tokens of the plans that may have left something behind
        self._promised: set[tuple[str, str]] = set()  # folders and names of the plans that are not forgotten yet
        self._folder: tuple[int, int] | None = None  # the output's own device and inode, once it was used
        self._copies = Copies(settle_seconds)

    def plan(self, photo: Photo, folder: str, name: str = "") -> Plan:
        """Promise a name, or else the first free of `name.jpg`, `name-1.jpg`, `name-2.jpg` …; changes no file."""
        if not name:
            name = next(filter(partial(self._is_free, folder), self._names(os.path.basename(photo.name), folder)))
        self._promised.add((folder, name))
        if self._sidecars.is_sidecar(name):
            self.listing(folder).add(name)
        return Plan(photo, folder, name, new_token(), "link" if self._link_only else "move")

    def _is_free(self, folder: str, name: str) -> bool:
        # Beside somebody else's sidecar it would be taken for that one's photo.
        if (folder, name) in self._promised:
            return False
        return not exists(os.path.join(self.output, folder, name)) and not self.listing(folder).sidecars(name)

    def listing(self, folder: str) -> FolderListing:
        """The sidecars in a folder of the output, and the photos beside them."""
        if folder not in self._listings and len(self._listings) >= _MAX_LISTINGS:
            del self._listings[next(iter(self._listings))]
        return self._listings.setdefault(folder, FolderListing(self.output, folder, self._sidecars))

    def forget(self, plan: Plan) -> None:
        """Take a plan's promise back, once it is carried out or given up."""
        self._promised.discard((plan.folder, plan.name))
        self._begun.discard(plan.token)

    def path(self, plan: Plan) -> str:
        """Where a plan puts its photo."""
        return os.path.join(self.output, plan.folder, plan.name)

    def is_unresolved(self, plan: Plan) -> bool:
        """Tell whether a move failed in a way that only another try, or the next start, can clear up."""
        return plan.token in self._unresolved

    def move(self, plan: Plan) -> None:
        """Move one photo, or link or unlink it; `settle` makes a batch durable. Called again after an error it goes on.

        Raises:
            StayedError: this photo stays where it is; `ChangedError` if it is not the one any more that was classified,
                or its planned name was taken meanwhile.
            StorageError: no photo can be moved now.
        """
        self.copy_ahead(plan)
        # Not under the lock: nothing is half moved yet, and somebody may want to end the process.
        self._copies.wait(plan)
        source_folder, _, base = plan.photo.name.rpartition("/")
        with self.lock:
            try:
                with self._opened(plan) as (source, target):
                    self._place(plan, source, target, base)
            except (OSError, StayedError, StorageError) as error:
                # A name that was taken before we ever used it is somebody else's, whatever is in that file.
                ours = plan.token in self._begun and (
                    not isinstance(error, FileExistsError) or self.is_unresolved(plan)
                )
                if not (ours and self._arrived(plan)):
                    raise self._told(error, plan.folder) from error
            finally:
                self._copies.forget(plan)
            self._touched.setdefault((plan.photo.root, source_folder), False)
            self._touched[self.output, plan.folder] = True

    def copy_ahead(self, plan: Plan) -> None:
        """Copy a photo that must be seen unchanged again after that, before `move` removes the original.

        Called for a whole batch, so that the photos wait together. It skips those that need not wait, and those that
        cannot be copied, for `move` to tell.
        """
        # By the devices that are known: nothing is opened for a photo that will only be renamed. Where a folder of the
        # output is a mount of its own, `move` copies, and waits for one photo after the other.
        stays_on_disk = self._folder is not None and plan.photo.identity.device == self._folder[0]
        is_safe = plan.action != "move" or not self._copies.may_have_to_wait(plan.photo.identity.mtime_ns / 1e9)
        if stays_on_disk or is_safe or plan in self._copies:
            return
        with contextlib.suppress(OSError, StayedError, StorageError), self.lock, self._opened(plan) as (source, target):
            if os.fstat(source).st_dev == os.fstat(target).st_dev:
                return
            original = open_file(plan.photo)
            try:
                if not copies.lease(original).is_certain:
                    self._copies.make(plan, original, target)
            finally:
                os.close(original)

    def withdraw_copy(self, plan: Plan) -> None:
        """Remove the copy of a photo that will not be moved now."""
        try:
            self._copies.withdraw(plan, self.output)
        except OSError:
            self._unresolved.add(plan.token)  # its intent stays in the history, for the next start to find the copy

    @contextlib.contextmanager
    def _opened(self, plan: Plan) -> Iterator[tuple[int, int]]:
        """The descriptors of a photo's folder and of its destination, once it is known that it may be moved."""
        source_folder, _, base = plan.photo.name.rpartition("/")
        with opened_folder(plan.photo.root, source_folder) as source:
            self._check(source, base, plan.photo.identity)
            if plan.action != "link":
                check_removable(source, base)
            if _is_inside(source, source_folder.count("/") + 1, self.output / plan.folder.partition("/")[0]):
                raise StayedError("is in its folder already: the output is a part of the inbox under another path")
            with self._target(plan) as target:
                self._begun.add(plan.token)
                yield source, target

    def _arrived(self, plan: Plan) -> bool:
        """Find out where a photo is after a failure, and finish or withdraw its move."""
        self._unresolved.add(plan.token)
        try:
            arrived = resolve(self.output, plan)
        except OSError as error:
            raise StorageError(
                f"{plan.photo.path} or its destination cannot be read ({error.strerror}): check the disk"
            ) from error
        self._unresolved.discard(plan.token)
        return arrived

    def _told(self, error: Exception, folder: str) -> StayedError | StorageError:
        """What an error means for the photo, or for all of them."""
        if not isinstance(error, OSError):
            assert isinstance(error, StayedError | StorageError)
            return error
        if error.errno == errno.EEXIST:
            return TakenError("its name in the output was taken meanwhile")
        place = self.output / folder
        # A subfolder that refuses concerns the photos from one folder only.
        output_refuses = (
            error.errno == errno.EACCES and "/" not in folder and place.exists() and not os.access(place, os.W_OK)
        )
        if error.errno in _STORAGE or output_refuses:
            return self._refused(folder, error)
        if isinstance(error, PermissionError):
            return StayedError("may not be moved: its folder or its owner forbids it")
        if error.errno in _GONE:
            return ChangedError("is gone")
        if error.errno == errno.EILSEQ:
            return StayedError("has a name that the output's file system refuses: rename it")
        return StayedError(f"cannot be moved: {error.strerror}")

    def check_output(self, inbox: Path) -> None:
        """Make sure that the output is there; it is made at first, or where it lies in the inbox.

        Raises:
            StorageError: it is gone, or what is there now is not the folder that it was.
        """
        try:
            comes_with_inbox = self.output.is_relative_to(inbox)
            if self._folder is None or (comes_with_inbox and inbox.is_dir()):
                make_folder(self.output)
            status = self.output.stat()
            folder = status.st_dev, status.st_ino
            # A disk that was unmounted leaves an empty folder: nothing belongs there. One that comes back has the
            # history or the lock, and perhaps another number.
            was_sorted_into = any((self.output / FOLDER / name).is_file() for name in (HISTORY, SORTING))
            known = self._folder in (None, folder) or comes_with_inbox or was_sorted_into
            if not known:
                raise OSError(errno.ENODEV, "it is no longer the folder that it was at the start")
            self._folder = folder
        except OSError as error:
            raise StorageError(
                f"{self.output} accepts no photos ({error.strerror}): mount or recreate it, or restart sorter"
            ) from error

    @contextlib.contextmanager
    def _target(self, plan: Plan) -> Iterator[int]:
        """The descriptor of a destination folder, which is created if it is missing."""
        self.check_output(plan.photo.root)
        if len(os.fsencode(self.path(plan))) > _LONGEST_PATH_BYTES:
            raise StayedError("would have too long a path in the output: shorten the names of its folders")
        try:
            descriptor = make_inner_folder(self.output, plan.folder)
        except OSError as error:
            top, _, inner = plan.folder.partition("/")
            if not inner or error.errno in _STORAGE or not _is_folder(self.output / top):
                raise self._refused(plan.folder, error) from error
            raise StayedError(
                f"its folder {self.output / plan.folder} cannot be used ({error.strerror}): move away what is in its "
                "place, or check its permissions"
            ) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _refused(self, folder: str, error: OSError) -> StorageError:
        return StorageError(
            f"{self.output / folder} accepts no photos ({error.strerror}): free some space or check its permissions, "
            "then restart sorter"
        )

    def settle(self) -> None:
        """Make the moves since the last call durable: one fsync a folder, the destinations' first.

        Raises:
            StorageError: the disk refused.
        """
        for root, folder in sorted(self._touched, key=lambda place: not self._touched[place]):
            try:
                with opened_folder(root, folder) as descriptor:
                    sync_folder(descriptor)
            except OSError as error:
                # A folder that was removed since holds nothing that could be lost by not syncing it, and a rename is
                # durable with its new folder: one that may not be read any more holds up nobody else.
                if error.errno not in _GONE and not (root != self.output and isinstance(error, PermissionError)):
                    raise StorageError(
                        f"{root / folder} cannot be synced ({error.strerror}): check its disk"
                    ) from error
            del self._touched[root, folder]

    def _place(self, plan: Plan, source: int, target: int, base: str) -> None:
        """Put the file under its planned name, or raise FileExistsError."""
        if plan.action == "link":
            self._link(plan, source, target, base)
            return
        if plan.action == "unlink":
            self._unlink(plan, source, target, base)
            return
        if plan in self._copies or os.fstat(source).st_dev != os.fstat(target).st_dev:
            self._copy_across(plan, source, target, base)
            return
        try:
            self._rename(plan, source, target, base)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # Two bind mounts of one file system, or two disks that are shown as one.
            self._copy_across(plan, source, target, base)

    def _rename(self, plan: Plan, source: int, target: int, base: str) -> None:
        began = time.time_ns()
        try:
            rename_noreplace(source, base, target, plan.name)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            if inodes.are_real(source) and self._link_across(plan, source, target, base):
                return
            rename_onto_reservation(source, base, target, plan.name)
        arrived = status_after_rename(target, plan.name, plan.photo.identity, began)
        if not Identity.of(arrived).is_same_file(plan.photo.identity):
            # Somebody put another file under the name between the look and the rename: it goes back.
            give_back(target, plan.name, source, base)
            raise ChangedError("changed while it was moved")
        self._note_links(arrived)

    def _link_across(self, plan: Plan, source: int, target: int, base: str) -> bool:
        """Move with a hard link; False if there can be none, or no more."""
        linked = linker.hard_link(source, base, target, partial_name(plan.token), plan.photo.identity)
        if linked is None:
            return False
        self._publish(plan, target)
        self._note_links(linked)
        if not self._finish(plan, source, base, target):
            self._check_only(plan, target, os.stat(plan.name, dir_fd=target, follow_symlinks=False), own_names=1)
        return True

    def _link(self, plan: Plan, source: int, target: int, base: str) -> None:
        """Give the photo a second name, or a copy where it can have none; its first name is not touched."""
        linked = None
        try:
            if inodes.are_real(target):
                linked = linker.hard_link(source, base, target, partial_name(plan.token), plan.photo.identity)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        if linked is None:
            original = open_file(plan.photo)
            try:
                copies.lease(original)
                self._copies.make(plan, original, target)
            finally:
                os.close(original)
            self._copies.forget(plan)
            self._check(source, base, plan.photo.identity)  # or the copy may be half old and half new
        self._publish(plan, target)
        if linked is not None:
            self._note_links(linked, own_names=2)

    def _unlink(self, plan: Plan, source: int, target: int, base: str) -> None:
        """Remove a link or a copy, if the photo itself is still there."""
        status = os.stat(base, dir_fd=source, follow_symlinks=False)
        try:
            linker.remove((source, base), plan.photo.identity, (target, plan.name), plan.token)
        except StayedError:
            self._begun.discard(plan.token)  # it has its own name
            raise
        self._note_links(status, own_names=2)

    def _copy_across(self, plan: Plan, source: int, target: int, base: str) -> None:
        original = open_file(plan.photo)
        try:
            lease = copies.lease(original)
            status = os.fstat(original)
            if plan not in self._copies:
                self._copies.make(plan, original, target)
                if not lease.is_certain and self._copies.may_have_to_wait(status.st_mtime):
                    self._copies.wait(plan)
            self._check(source, base, plan.photo.identity)
            self._publish(plan, target)
            self._note_links(status)
            if not self._finish(plan, source, base, target, lease):
                self._check_only(plan, target, os.fstat(original), own_names=0)
        finally:
            os.close(original)

    def _publish(self, plan: Plan, target: int) -> None:
        """Give what has the hidden name the planned one, if that is free."""
        partial = partial_name(plan.token)
        try:
            publish(target, partial, target, [plan.name])
        except FileExistsError:
            # Somebody else's file, whatever is in it: nothing may take it for ours.
            os.unlink(partial, dir_fd=target)
            raise

    def _finish(self, plan: Plan, source: int, base: str, target: int, lease: Lease | None = None) -> bool:
        """Make the new name durable, then take the old one away.

        Returns:
            False if that was not the photo's any more, or if its lease says that somebody wants to write to it.
        """
        sync_folder(target)
        try:
            is_wanted = (lambda: False) if lease is None else (lambda: lease.is_broken)
            return take_away(source, base, plan.photo.identity, plan.token, is_wanted)
        except ChangedError:
            return False
        except OSError as error:
            raise StayedError(f"may not be taken out of its folder ({error.strerror})") from error

    def _check_only(self, plan: Plan, target: int, status: os.stat_result, *, own_names: int) -> None:
        """Give up the new name if the photo, or what became of it, still has another one that nobody took away.

        A version that its owner overwrote or deleted meanwhile is kept.
        """
        is_whole = own_names or Identity.of(status).is_same_file(plan.photo.identity)
        if status.st_nlink > own_names and is_whole:
            copy = Identity.of(os.stat(plan.name, dir_fd=target, follow_symlinks=False))
            take_away(target, plan.name, copy, plan.token)
            raise ChangedError("was renamed or changed while it was moved")

    def _note_links(self, status: os.stat_result, *, own_names: int = 1) -> None:
        """Remember a file that has other names: moving one of them changes the status of all."""
        if status.st_nlink > own_names:
            self._linked.add((status.st_dev, status.st_ino))

    def _check(self, folder: int, base: str, identity: Identity) -> None:
        """Make sure that a name still is the file that was classified."""
        try:
            status = os.stat(base, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            raise ChangedError("is gone") from None
        found = Identity.of(status)
        # The status of a file with several names changes when one of them moves.
        by_us = found.is_same_file(identity) and (found.device, found.inode) in self._linked
        if found.inode != identity.inode and not inodes.are_real(folder):
            found = Identity.of(status)  # without the number, which has just been found to be made up
        if not stat.S_ISREG(status.st_mode) or not (found.is_same_version(identity) or by_us):
            raise ChangedError("changed after it was classified")

    def _names(self, base: str, folder: str) -> Iterator[str]:
        """`name.jpg`, `name-1.jpg` … without end, going on where the last photo of that name found room."""
        yield base
        while True:
            number = self._next_number[folder, base] = self._next_number.get((folder, base), 0) + 1
            yield numbered(base, number)


def _is_inside(folder: int, levels: int, other: Path) -> bool:
    """Whether an open folder is another one or lies in it, by whatever path; looks at so many levels."""
    if not other.exists():
        return False
    status = other.stat()
    return any(os.path.samestat(status, os.stat("../" * up or ".", dir_fd=folder)) for up in range(levels))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
