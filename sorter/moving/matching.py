"""Says which file is which photo, where a person may have moved photos by hand; pure but for looks at files.

In: photos of the history, and files that it does not expect. Out: pairs. A photo has been moved only if its place does
not have it, and exactly one file is the photo:

1. by its inode, size and time, which a move on one file system keeps; or
2. if its place is empty, by size and time, which a copy to another file system keeps, together with its digest where a
   verdict has recorded that, or else with its name, or a time that is more exact than a second.

Neither is certain where there are two photos of one size and time: a file system gives the inode number of a file
that is gone to the next new file, which may be the copy of the other photo. Then names have to decide as well. A copy
beside the photo, a photo that was edited, and one that came from elsewhere match nothing.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from sorter.files import inodes
from sorter.files.photo import COARSE_NS
from sorter.history.reader import Entry
from sorter.moving.strays import Stray

_SECOND_NS, _EXFAT_NS, _NTFS_NS = 1_000_000_000, 10_000_000, 100  # to which times are exact


@dataclass(frozen=True, slots=True)
class Row:
    """A photo of the history.

    Attributes:
        device, inode: of the file that was sorted.
        digests: SHA-256 of its bytes, as far as known.
    """

    entry: Entry
    device: int
    inode: int
    digests: frozenset[bytes]

    @property
    def base(self) -> str:
        """Its name without folders."""
        return os.path.basename(self.entry.place)

    @property
    def is_there(self) -> bool:
        """Whether it is where the history has it."""
        try:
            status = os.lstat(self.entry.destination)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and self.entry.has_version(status)


def match(
    rows: Sequence[Row],
    strays: Sequence[Stray],
    digest_of: Callable[[Stray], bytes],
    common: Collection[int],
) -> Iterator[tuple[Row, Stray]]:
    """Pair photos with the files that they are, each at most once.

    Args:
        rows: all photos of the output with the size and about the time of one of the files, the oldest first.
        strays: files that the history does not expect.
        digest_of: SHA-256 of a file; raises OSError.
        common: sizes of which `rows` has not all photos, but only those with the inode number of a file.
    """
    settled: set[int] = set()
    taken: set[str] = set()
    of_size = defaultdict[int, list[Row]](list)
    for row in rows:
        of_size[row.entry.size].append(row)
    for same, files in _by_file(rows, strays):
        newest, size = same[-1], same[-1].entry.size
        has_rivals = size in common or any(row not in same and _is_alike(row, files[0]) for row in of_size[size])
        if has_rivals and newest.base != files[0].base:
            continue
        settled |= {row.entry.id for row in same}
        taken |= {file.place for file in files}
        # A photo that went back to the inbox and was sorted again is what its last move made of it. Several links to
        # one photo are all as old.
        is_clear = len(files) == 1 and (len(same) == 1 or not any(row.entry.linked for row in same))
        if is_clear and not newest.is_there and _may_be(newest, files[0], digest_of):
            yield newest, files[0]
    rest = [row for row in rows if row.entry.id not in settled]
    copies = [
        stray
        for stray in strays
        if stray.is_unrecorded and stray.place not in taken and stray.status.st_size not in common
    ]
    for alike, files in _components(rest, copies):
        missing = [row for row in alike if not os.path.lexists(row.entry.destination)]
        others = {row.base for row in alike if row not in missing}
        for row, file in _one_to_one(missing, files, digest_of):
            # It could as well be a copy of one of the others.
            if not others or (row.base == file.base and row.base not in others):
                yield row, file


def _by_file(rows: Sequence[Row], strays: Sequence[Stray]) -> Iterator[tuple[list[Row], list[Stray]]]:
    """Photos and files that are one file of one file system."""
    by_file = defaultdict[tuple[int, int], tuple[list[Row], list[Stray]]](lambda: ([], []))
    for stray in strays:
        if inode := inodes.number(stray.status):
            by_file[stray.status.st_dev, inode][1].append(stray)
    for row in rows:
        found = by_file.get((row.device, row.inode))
        if found and _version(row.entry) == (found[1][0].status.st_size, found[1][0].status.st_mtime_ns):
            found[0].append(row)
    yield from (found for found in by_file.values() if found[0])


def _may_be(row: Row, file: Stray, digest_of: Callable[[Stray], bytes]) -> bool:
    """Whether a file has the digest of a photo, as far as that is known."""
    try:
        return not row.digests or digest_of(file) in row.digests
    except OSError:  # gone, or written to, meanwhile
        return False


def _version(entry: Entry) -> tuple[int, int]:
    return entry.size, entry.mtime_ns


def _one_to_one(
    rows: Sequence[Row], files: Sequence[Stray], digest_of: Callable[[Stray], bytes]
) -> Iterator[tuple[Row, Stray]]:
    """Pair photos with files that are alike, if there is but one way to do so."""
    if any(row.digests for row in rows):
        yield from _by_digest(rows, files, digest_of)
        return
    if len(rows) == len(files) == 1:
        (row,), (file,) = rows, files
        is_exact = file.status.st_mtime_ns % _SECOND_NS != 0
        if is_exact or row.base == file.base:
            yield row, file
        return
    by_name = {file.base: file for file in files}
    if len(rows) == len(files) == len(by_name) and {row.base for row in rows} == by_name.keys():
        yield from ((row, by_name[row.base]) for row in rows)


def _by_digest(
    rows: Sequence[Row], files: Sequence[Stray], digest_of: Callable[[Stray], bytes]
) -> Iterator[tuple[Row, Stray]]:
    """Those pairs whose digest is known and that no other photo or file has; the others stay unknown."""
    found: dict[str, bytes] = {}
    for file in files:
        try:
            found[file.place] = digest_of(file)
        except OSError:  # gone, or written to, meanwhile
            continue
    for row in rows:
        same = [file for file in files if found.get(file.place) in row.digests]
        rivals = [other for other in rows if other.digests & row.digests]
        if len(same) == 1 and rivals == [row]:
            yield row, same[0]


def _components(rows: Sequence[Row], files: Sequence[Stray]) -> Iterator[tuple[list[Row], list[Stray]]]:
    """Photos and files that are alike, directly or by way of others."""
    rows_left = defaultdict[int, list[Row]](list)
    files_left = defaultdict[int, list[Stray]](list)
    for row in rows:
        rows_left[row.entry.size].append(row)
    for file in files:
        files_left[file.status.st_size].append(file)
    for size, of_size in files_left.items():
        while of_size:
            found: tuple[list[Row], list[Stray]] = ([], [])
            new: list[Stray] = [of_size.pop()]
            while new:
                found[1].extend(new)
                alike = [row for row in rows_left[size] if any(_is_alike(row, file) for file in new)]
                found[0].extend(alike)
                rows_left[size] = [row for row in rows_left[size] if row not in alike]
                new = [file for file in of_size if any(_is_alike(row, file) for row in alike)]
                of_size[:] = [file for file in of_size if file not in new]
            if found[0]:
                yield found


def _is_alike(row: Row, file: Stray) -> bool:
    """Whether a file could be a photo by its size and time, which its file system may store less exactly."""
    time_ns = file.status.st_mtime_ns
    if time_ns % _SECOND_NS == 0:
        exact_to_ns = COARSE_NS
    elif time_ns % _EXFAT_NS == 0:
        exact_to_ns = _EXFAT_NS
    else:
        exact_to_ns = _NTFS_NS
    return file.status.st_size == row.entry.size and abs(time_ns - row.entry.mtime_ns) <= exact_to_ns
