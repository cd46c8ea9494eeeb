"""What kind of file system a folder is on, as the kernel names it."""

import os
from pathlib import Path

NETWORK = ("nfs", "cifs", "smb", "9p", "fuse", "afs", "ceph", "glusterfs", "lustre", "virtiofs", "vboxsf")
"""Beginnings of the names of those whose files other machines change too, or that only hand requests on."""


def kind(folder: Path) -> str:
    """The file system's type, `ext4`, `nfs4`; empty where the system does not say."""
    try:
        device = os.stat(folder).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                    return fields[fields.index("-") + 1]
    except OSError:  # no such file on this system, or no such folder
        pass
    return ""


def is_network(folder: Path) -> bool:
    """Tell whether a folder is on one of `NETWORK`."""
    return kind(folder).startswith(NETWORK)
