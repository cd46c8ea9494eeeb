"""Whether a folder on a node is the one that the command sees under the same path: a disk may not be mounted there.

In: the folder, on the command's machine. Out: a `SharedFolder`, which the node checks. Nothing is written.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sorter.errors import ConfigurationError
from sorter.files import file_systems

# Each machine, or each mount, may number their files in its own way.
_OWN_NUMBERS = ("fuse", "cifs", "smb", "9p", "afs", "virtiofs", "vboxsf")


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """A folder that all machines have under one path.

    Attributes:
        path: absolute.
        inode: its number, which NFS, Ceph and Lustre have from their server, for all machines and on the server itself;
            None where the numbers of two machines cannot be compared.
    """

    path: Path
    inode: int | None

    @classmethod
    def of(cls, path: Path) -> Self:
        """The folder as this machine sees it.

        Raises:
            OSError: there is none.
        """
        return cls(path.absolute(), _inode(path))

    def check(self) -> None:
        """Make sure, on a node, that this machine has the same folder.

        Raises:
            ConfigurationError: it has none, or another one.
        """
        host = os.uname().nodename
        try:
            inode = _inode(self.path)
        except OSError as error:
            raise ConfigurationError(
                f"the node {host} cannot open the folder {self.path} ({error.strerror}): mount the shared disk there"
            ) from None
        if None not in (inode, self.inode) and inode != self.inode:
            raise ConfigurationError(
                f"the node {host} has another folder in {self.path} than this machine: mount the shared disk there"
            )


def _inode(folder: Path) -> int | None:
    number = os.stat(folder).st_ino
    return None if file_systems.kind(folder).startswith(_OWN_NUMBERS) else number
