"""Which file systems number their files for good, found out by trying.

In: an open folder. Out: whether its file system's inode numbers say which file this is.

A file system with hard links stores a number with each file. The others make numbers up as files are looked at: FAT and
exFAT, most network file systems in user space (sshfs, rclone), and those that show several folders as one (mergerfs,
unionfs). Their numbers change when a file is opened, renamed, or not looked at for a while, so here they count as 0,
which is the same file as any number. What is left to tell versions of a file apart is size and times.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from sorter.files import FOLDER

_SUFFIX = ".sorter-probe"

_real: dict[int, bool] = {}  # by device


def number(status: os.stat_result) -> int:
    """The inode number in a stat result; 0 if its file system is known to make numbers up."""
    return status.st_ino if _real.get(status.st_dev, True) else 0


def are_real(folder: int) -> bool:
    """Tell whether a folder's file system has real inode numbers, and with them hard links.

    The first call for a file system makes a hidden file in the folder, links it, and removes both.
    """
    device = os.fstat(folder).st_dev
    if device not in _real:
        try:
            _real[device] = _try(folder)
        except OSError:  # full, or read-only: nothing is known, and nothing can be moved either
            return True
    return _real[device]


def look(folders: Iterable[Path]) -> None:
    """Find out about the file systems of some folders, where there is a `.sorter` to try in."""
    for folder in folders:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                are_real(descriptor)
            finally:
                os.close(descriptor)


def are_known_to_be_real(device: int) -> bool:
    """Whether `are_real` was found to be so for a file system."""
    return _real.get(device, False)


def distrust(device: int) -> None:
    """Remember that the numbers of a file system changed while its files did not."""
    _real[device] = False


def _try(folder: int) -> bool:
    name = f".{secrets.token_hex(8)}{_SUFFIX}"
    second = f"{name}-2"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            seen = [os.fstat(descriptor)]
        finally:
            os.close(descriptor)  # before it is removed: some would write it once more at the end
        try:
            os.link(name, second, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        seen += [os.stat(each, dir_fd=folder, follow_symlinks=False) for each in (name, second)]
        return len({status.st_ino for status in seen}) == 1
    finally:
        for made in (name, second):
            with contextlib.suppress(OSError):
                os.unlink(made, dir_fd=folder)
