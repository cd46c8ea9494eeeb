"""The type of file system that a folder is on, in the kernel's names, and how it says that it is full."""

import errno
import os
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What creating or writing a file fails with while its file system is full."""
NETWORK = ("nfs", "cifs", "smb", "9p", "fuse", "afs", "ceph", "glusterfs", "lustre", "virtiofs", "vboxsf")
"""Prefixes of the types whose files other machines may change too, or that pass requests on to another program."""


def kind(folder: Path) -> str:
    """The file system's type, such as `ext4` or `nfs4`; empty if it cannot be determined."""
    try:
        return kind_of_device(os.stat(folder).st_dev)
    except OSError:  # the folder does not exist
        return ""


def kind_of_device(device: int) -> str:
    """The type of a mounted file system, by the device number of its files; empty if it cannot be determined."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                    return fields[fields.index("-") + 1]
    except OSError:  # no /proc
        pass
    return ""


def is_network_device(device: int) -> bool:
    """True if a mounted file system is one of the `NETWORK` file systems, by the device number of its files."""
    return kind_of_device(device).startswith(NETWORK)


def is_network(folder: Path) -> bool:
    """True if a folder is on one of the `NETWORK` file systems."""
    return kind(folder).startswith(NETWORK)
