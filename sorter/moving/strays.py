"""Finds files in the folders of an output that the history does not expect there.

In: the recorded places of all photos, and listings of the folders. Out: `Stray`s, and the photos that they may be.

Folders are listed without looking at each file: a listing has names and inode numbers, and only strays are looked at.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sorter.files import inodes
from sorter.files.photo import opened_folder
from sorter.history.places_reader import PlacesReader

_AT_ONCE = 10_000  # files of a folder
_MOST_OF_A_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Stray:
    """A file that the history does not expect at its place.

    Attributes:
        is_unrecorded: False if the history expects another file there.
    """

    place: str
    status: os.stat_result
    is_unrecorded: bool

    @property
    def base(self) -> str:
        """Its name without folders."""
        return os.path.basename(self.place)


class KnownPlaces:
    """Where the history has every file: hashes of paths, so that a million take 40 MB.

    Two paths with the same hash, of 64 bits, would hide a photo that was moved, and lead to no other mistake.

    Args:
        reader: of the history.
    """

    def __init__(self, reader: PlacesReader) -> None:
        pages: list[npt.NDArray[np.int64]] = []
        last = 0
        while page := reader.places(last):
            last = page[-1].id
            pages.append(
                np.array([(hash(p.path), p.id, p.device, p.inode, p.size, p.is_photo) for p in page], np.int64)
            )
        rows = np.concatenate(pages) if pages else np.empty((0, 6), np.int64)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # (N, 6); the newest of a path is the last
        self._hashes, self._ids, self._devices, self._inodes, self._sizes, is_photo = rows.T
        self._is_photo = is_photo.astype(bool)
        self._common: frozenset[int] | None = None
        self.newest = last
        """The `id` of the last move."""

    def strays(self, output: Path, folder: str) -> Iterator[Stray]:
        """The files in a folder of the output, and in those inside it, that the history does not expect there."""
        for inner, device, files in _listed(output, folder):
            paths = [os.fsencode(f"{inner}/{name}") for name, _ in files]
            for number, is_unrecorded in self._unexpected(paths, [inode for _, inode in files], device):
                place = os.fsdecode(paths[number])
                try:
                    status = os.lstat(output / place)
                except OSError:  # moved on meanwhile
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield Stray(place, status, is_unrecorded)

    def _unexpected(self, paths: Sequence[bytes], numbers: Sequence[int], device: int) -> Iterator[tuple[int, bool]]:
        """The files that are not expected at their paths, by index, and whether no other file is expected there.

        Args:
            paths: inside the output.
            numbers: of the files' inodes, as their folder lists them.
            device: of the folder.
        """
        wanted = np.fromiter(map(hash, paths), np.int64, len(paths))
        at = np.searchsorted(self._hashes, wanted, side="right") - 1
        is_recorded = (at >= 0) & (self._hashes[at] == wanted) if len(self._hashes) else np.zeros(len(paths), bool)
        found = at[is_recorded]
        expected = is_recorded.copy()
        if inodes.are_known_to_be_real(device):
            listed = np.fromiter(numbers, np.uint64, len(paths))[is_recorded].astype(np.int64)
            is_another = (self._devices[found] == _signed(device)) & (self._inodes[found] != listed)
            expected[is_recorded] = ~is_another
        for index in np.flatnonzero(~expected):
            yield int(index), not is_recorded[index]

    def candidates(self, strays: Sequence[Stray]) -> dict[int, tuple[int, int]]:
        """The photos that may be one of these files, or as good as one: devices and inodes by `id`, the oldest first.

        Those of the same size; of a common one only those with the same inode number.
        """
        sizes = np.array([stray.status.st_size for stray in strays], np.int64)
        rare = np.array([size for size in map(int, sizes) if not self.is_common(size)], np.int64)
        numbers = np.array([stray.status.st_ino for stray in strays], np.uint64).astype(np.int64)
        has_inode = np.isin(self._inodes, numbers) & np.isin(self._sizes, sizes)
        found = np.flatnonzero(self._is_photo & (np.isin(self._sizes, rare) | has_inode))
        found = found[np.argsort(self._ids[found])]
        return {int(self._ids[n]): (_unsigned(self._devices[n]), _unsigned(self._inodes[n])) for n in found}

    def is_common(self, size: int) -> bool:
        """Whether so many photos have this size that it tells nothing."""
        if self._common is None:
            each, counts = np.unique(self._sizes[self._is_photo], return_counts=True)
            self._common = frozenset(map(int, each[counts > _MOST_OF_A_SIZE]))
        return size in self._common


def _listed(output: Path, folder: str) -> Iterator[tuple[str, int, list[tuple[str, int]]]]:
    """A folder and those inside it, with their device, and the names and inode numbers of some files at a time."""
    folders = [folder]
    while folders:
        inner = folders.pop()
        try:
            with opened_folder(output, inner) as descriptor, os.scandir(descriptor) as entries:
                device = os.fstat(descriptor).st_dev
                files: list[tuple[str, int]] = []
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{inner}/{entry.name}")
                    else:
                        files.append((entry.name, entry.inode()))
                    if len(files) == _AT_ONCE:
                        yield inner, device, files
                        files = []
                yield inner, device, files
        except OSError:  # gone, or not for us
            continue


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _unsigned(number: np.int64) -> int:
    return int(number) & ((1 << 64) - 1)
