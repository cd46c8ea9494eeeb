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
        device = os.stat(folder).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                    return fields[fields.index("-") + 1]
    except OSError:  # no /proc, or the folder does not exist
        pass
    return ""


def is_network(folder: Path) -> bool:
    """True if a folder is on one of the `NETWORK` file systems."""
    return kind(folder).startswith(NETWORK)
