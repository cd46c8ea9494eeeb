"""The files that belong to a photo and travel with it: what is written about it, its film, its voice memo.

In: names of photos and sidecars, folders. Out: which belong together. Programs pair them by name alone, so a sidecar
keeps the pairing wherever its photo goes: `IMG_1.jpg` that becomes `IMG_1-1.jpg` has `IMG_1-1.xmp`. One that several
photos could own equally well goes with the last of them.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from sorter.decoding import formats, raw
from sorter.files.photo import opened_folder
from sorter.names import SIDECAR_SUFFIXES

LATE_SECONDS = 86_400.0
"""A sidecar that arrives so long after its photo still follows it: phones send the film of a Live Photo last."""

PHOTO_EXTENSIONS = (
    ".jpg",
    ".heic",
    ".jpeg",
    *sorted((formats.EXTENSIONS | raw.EXTENSIONS) - {".jpg", ".heic", ".jpeg"}),
)
# Google's motion photos: the film of `PXL_1.MP.jpg` is `PXL_1.MP`, that of its edited copy `PXL_1.MP~2`.
_GOOGLE_FILM = re.compile(r"\.(?:mp|mv)(?:~\d+)?$", re.IGNORECASE)
# Google Takeout cuts what stands before `.json` to 46 characters, and puts a counter last: `a(1).jpg` has
# `a.jpg.supplemental-metadata(1).json`. github.com/ente-io/ente/pull/4956 collects examples.
_TAKEOUT = re.compile(r"(?P<cut>(?P<photo>.+?)(?:\.(?P<word>[a-z-]*))?)(?P<counter>\(\d+\))?", re.IGNORECASE)
_TAKEOUT_WORD, _TAKEOUT_LENGTH = "supplemental-metadata", 46

# For photos a folder is listed at most once a second; for both kinds it may take a twentieth of the time.
_LISTED_SECONDS, _LISTED_SHARE = 1.0, 20


class SidecarNames:
    """Says by their names which sidecar belongs to which photo. All names are without folders.

    Args:
        suffixes: what sidecars have in place of their photo's extension (`IMG_1.xmp`), or after it (`IMG_1.jpg.xmp`).
    """

    def __init__(self, suffixes: Iterable[str] = SIDECAR_SUFFIXES) -> None:
        self._suffixes = tuple(sorted({suffix.lower() for suffix in suffixes}, key=len, reverse=True))

    def is_sidecar(self, name: str) -> bool:
        """Whether a file with this name is a sidecar where there is a photo beside it."""
        return bool(self._suffix(name))

    def owners(self, sidecar: str) -> list[tuple[str, bool]]:
        """What a sidecar's photo may be called, best first: a name, or what stands before its extension (False)."""
        suffix = self._suffix(sidecar)
        if not suffix:
            return []
        before = sidecar[: -len(suffix)]
        found = [(sidecar, False)] if _GOOGLE_FILM.search(sidecar) else []
        found += [(before, True), (before, False)]
        takeout = _TAKEOUT.fullmatch(before) if suffix.lower() == ".json" else None
        if takeout is None:
            return found
        counter = takeout["counter"] or ""
        if len(takeout["cut"]) == _TAKEOUT_LENGTH:  # perhaps in the middle of the photo's extension
            found.append((os.path.splitext(takeout["cut"])[0] + counter, False))
        is_cut = takeout["word"] is not None and _TAKEOUT_WORD.startswith(takeout["word"].lower())
        stem, extension = os.path.splitext(takeout["photo"] if is_cut else takeout["cut"])
        return [(f"{stem}{counter}{extension}", True), *found] if is_cut or counter else found

    def rank(self, sidecar: str, photo: str) -> int | None:
        """How well a sidecar's name fits a photo's, 0 best; None if they do not belong together."""
        for position, (owner, is_name) in enumerate(self.owners(sidecar)):
            fitting = photo if is_name else os.path.splitext(photo)[0]
            if fitting.casefold() == owner.casefold():
                return 2 * position + (fitting != owner)
        return None

    def fits_as_well(self, sidecar: str, other: str, photo: str) -> bool:
        """Whether a sidecar's name fits another photo at least as well as it fits this one."""
        ranks = self.rank(sidecar, other), self.rank(sidecar, photo)
        return ranks[0] is not None and ranks[1] is not None and ranks[0] <= ranks[1]

    def photos(self, sidecar: str) -> Iterator[list[str]]:
        """The names that a sidecar's photo may have, as programs and cameras write them; the best ones first."""
        for owner, is_name in self.owners(sidecar):
            if not is_name:
                yield [
                    owner + spelled
                    for ending in PHOTO_EXTENSIONS
                    for spelled in (ending, ending.upper(), ending.title())
                ]
            elif is_photo(owner):
                yield [owner]

    def renamed(self, sidecar: str, photo: str, new: str) -> str:
        """What a sidecar is called where its photo is called `new` and no more `photo`."""
        if new == photo:
            return sidecar
        stem, new_stem = os.path.splitext(photo)[0], os.path.splitext(new)[0]
        suffix = self._suffix(sidecar)
        for before, renamed in ((photo, new), (stem, new_stem)):
            if sidecar.casefold() == (before + suffix).casefold():
                return renamed + suffix
        # Google's ways to name them: what fits a name with a number in it is simpler.
        return new_stem + suffix if _GOOGLE_FILM.search(sidecar) else new + suffix

    def _suffix(self, name: str) -> str:
        film = _GOOGLE_FILM.search(name) if "~" in name else None
        if film is not None and film[0].lower().partition("~")[0] in self._suffixes:
            return film[0]
        if not name.lower().endswith(self._suffixes):  # quicker than the loop, for the many that have none
            return ""
        for suffix in self._suffixes:
            if len(name) > len(suffix) and name[-len(suffix) :].lower() == suffix:
                return name[-len(suffix) :]
        return ""


def is_photo(name: str) -> bool:
    """Whether a name has a photo's extension."""
    return os.path.splitext(name)[1].lower() in PHOTO_EXTENSIONS


class FolderListing:
    """The sidecars in one folder and the photos beside them, found in a listing that is renewed every now and then.

    What is found is there, in its own spelling. What arrived since the last listing may be missing, unless `add` said
    so. The photos of a folder without sidecars are not remembered: memory stays small for the largest of folders.
    """

    def __init__(self, root: Path, folder: str, names: SidecarNames) -> None:
        self._root, self._folder, self._names = root, folder, names
        self._listed, self._cost = float("-inf"), 0.0
        self._sidecars: dict[str, list[str]] = {}  # by what may be their photo's name or stem
        self._photos: dict[str, list[str]] | None = None  # by name and by stem, once they are asked for

    def add(self, name: str) -> None:
        """Note a sidecar that was seen in the folder."""
        for owner, _ in self._names.owners(name):
            _note(self._sidecars, owner, name)

    def sidecars(self, photo: str) -> list[str]:
        """The sidecars that may belong to a photo, which need not be there any more."""
        self._renew(_LISTED_SECONDS)
        found = [name for key in _keys(photo) for name in self._sidecars.get(key.casefold(), ())]
        return self._there(name for name in dict.fromkeys(found) if self._names.rank(name, photo) is not None)

    def photos(self, sidecar: str) -> list[str]:
        """The photos that a sidecar may belong to."""
        self._renew(0.0)
        if self._photos is None:
            self._photos = {}
            for name in filter(is_photo, self._list()):
                for key in _keys(name):
                    _note(self._photos, key, name)
        keys = [owner.casefold() for owner, _ in self._names.owners(sidecar)]
        found = [name for key in keys for name in self._photos.get(key, ())]
        return self._there(name for name in dict.fromkeys(found) if self._names.rank(sidecar, name) is not None)

    def _renew(self, seconds: float) -> None:
        """List the folder again if the last listing is older than that, and not too expensive to repeat."""
        started = time.monotonic()
        if started - self._listed <= max(seconds, _LISTED_SHARE * self._cost):
            return
        self._sidecars, self._photos = {}, None
        for name in filter(self._names.is_sidecar, self._list()):
            self.add(name)
        self._listed = time.monotonic()
        self._cost = self._listed - started

    def _list(self) -> Iterator[str]:
        try:
            with opened_folder(self._root, self._folder) as descriptor, os.scandir(descriptor) as entries:
                yield from (entry.name for entry in entries)
        except OSError:  # not there, or not readable
            return

    def _there(self, names: Iterable[str]) -> list[str]:
        wanted = [*names]
        if not wanted:
            return []
        try:
            with opened_folder(self._root, self._folder) as descriptor:
                return [name for name in wanted if exists(name, descriptor)]
        except OSError:  # the folder is gone
            return []


def _keys(photo: str) -> tuple[str, str]:
    return photo, os.path.splitext(photo)[0]


def _note(index: dict[str, list[str]], key: str, name: str) -> None:
    names = index.setdefault(key.casefold(), [])
    if name not in names:
        names.append(name)


def exists(path: str, folder: int | None = None) -> bool:
    """Tell whether a name is taken, by whatever; asked for each photo, and so without exceptions."""
    return os.access(path, os.F_OK, dir_fd=folder, follow_symlinks=False)
