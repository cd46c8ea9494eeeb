"""Finds files in the folders of an output that the history does not expect there.

In: the recorded places of all photos, and listings of the folders. Out: `Stray`s, and the photos that they may be.

Folders are listed without looking at each file: a listing has names and inode numbers, and only strays are looked at.
"""

import os
import stat
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sorter.files import inodes
from sorter.files.photo import COARSE_NS, opened_folder
from sorter.history.places_reader import PlacesReader

_AT_ONCE = 10_000  # files of a folder
_MOST_ALIKE = 1000
_APART_SECONDS = COARSE_NS // 1_000_000_000 + 1  # in whole seconds


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
        columns = [array(code) for code in "qqqqiib"]
        devices: dict[int, int] = {}
        last = 0
        while page := reader.places(last):
            last = page[-1].id
            ids, paths, device_of, *others, seconds, is_photo = zip(*page, strict=True)
            numbers = [devices.setdefault(_unsigned(device), len(devices)) for device in device_of]
            for column, values in zip(
                columns, (map(hash, paths), ids, *others, numbers, seconds, is_photo), strict=True
            ):
                column.extend(values)
        self._hashes, self._ids, self._inodes, self._sizes, self._device_numbers, self._seconds, self._is_photo = map(
            np.asarray, columns
        )
        self._order = np.argsort(self._hashes, kind="stable")  # (N,), the newest of a path is the last
        self._devices = [*devices]
        self.newest = last
        """The `id` of the last move."""

    def strays(self, output: Path, folder: str, takes: Callable[[str], bool]) -> Iterator[Stray]:
        """The files in a folder of the output, and in those inside it, that the history does not expect there.

        Args:
            output: of the history.
            folder: such as `cats`.
            takes: whether a file may be a photo, by its name. One that has the size of no photo is none either.
        """
        sizes = np.unique(self._sizes[self._is_photo != 0])
        for inner, device, files in _listed(output, folder, takes):
            paths = [os.fsencode(f"{inner}/{name}") for name, _ in files]
            for number, is_unrecorded in self._unexpected(paths, [inode for _, inode in files], device):
                place = os.fsdecode(paths[number])
                try:
                    status = os.lstat(output / place)
                except OSError:  # moved on meanwhile
                    continue
                at = int(np.searchsorted(sizes, status.st_size))
                if stat.S_ISREG(status.st_mode) and at < len(sizes) and sizes[at] == status.st_size:
                    yield Stray(place, status, is_unrecorded)

    def _unexpected(self, paths: Sequence[bytes], numbers: Sequence[int], device: int) -> Iterator[tuple[int, bool]]:
        """The files that are not expected at their paths, by index, and whether no other file is expected there.

        Args:
            paths: inside the output.
            numbers: of the files' inodes, as their folder lists them.
            device: of the folder.
        """
        wanted = np.fromiter(map(hash, paths), np.int64, len(paths))
        at = np.searchsorted(self._hashes, wanted, side="right", sorter=self._order) - 1
        at = self._order[at] if len(self._order) else at  # -1 is some place, with another hash
        is_recorded = self._hashes[at] == wanted if len(self._order) else np.zeros(len(paths), bool)
        found = at[is_recorded]
        expected = is_recorded.copy()
        if inodes.are_known_to_be_real(device):
            listed = np.fromiter(numbers, np.uint64, len(paths))[is_recorded].astype(np.int64)
            number = self._devices.index(device) if device in self._devices else -1
            is_another = (self._device_numbers[found] == number) & (self._inodes[found] != listed)
            expected[is_recorded] = ~is_another
        for index in np.flatnonzero(~expected):
            yield int(index), not is_recorded[index]

    def candidates(self, strays: Sequence[Stray]) -> tuple[dict[int, tuple[int, int]], set[int]]:
        """The photos that may be one of these files, or as good as one: same size, about the same time.

        Args:
            strays: with all strays of their sizes.

        Returns:
            The devices and inodes of these photos by `id`, the oldest first; and the sizes of which there are too many
            to compare, and so only those with the inode number of a file.
        """
        times: dict[int, list[int]] = {}
        for stray in strays:
            times.setdefault(stray.status.st_size, []).append(_seconds(stray.status.st_mtime_ns))
        for of_size in times.values():
            of_size.sort()
        numbers = np.array([_signed(stray.status.st_ino) for stray in strays], np.int64)
        is_possible = (self._is_photo != 0) & np.isin(self._sizes, [*times])
        has_inode = is_possible & np.isin(self._inodes, numbers)
        counts = Counter[int]()
        alike: list[int] = []
        for n in map(int, np.flatnonzero(is_possible)):
            size, seconds = int(self._sizes[n]), int(self._seconds[n])
            at = bisect_left(times[size], seconds - _APART_SECONDS)
            if at < len(times[size]) and times[size][at] <= seconds + _APART_SECONDS:
                counts[size] += 1
                if counts[size] <= _MOST_ALIKE or has_inode[n]:
                    alike.append(n)
        common = {size for size, count in counts.items() if count > _MOST_ALIKE}
        wanted = [n for n in alike if int(self._sizes[n]) not in common or has_inode[n]]
        rows = sorted((int(self._ids[n]), int(self._device_numbers[n]), int(self._inodes[n])) for n in wanted)
        return {id_: (self._devices[number], _unsigned(inode)) for id_, number, inode in rows}, common


def _listed(
    output: Path, folder: str, takes: Callable[[str], bool]
) -> Iterator[tuple[str, int, list[tuple[str, int]]]]:
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
                    elif takes(entry.name):
                        files.append((entry.name, entry.inode()))
                    if len(files) == _AT_ONCE:
                        yield inner, device, files
                        files = []
                yield inner, device, files
        except OSError:  # gone, or not for us
            continue


def _seconds(time_ns: int) -> int:
    """A time as in `Place.seconds`."""
    return max(-(1 << 31), min(int(time_ns / 1e9), (1 << 31) - 1))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _unsigned(number: int) -> int:
    return number & ((1 << 64) - 1)
