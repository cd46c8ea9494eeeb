"""Which files of the inbox may be photos, and which subfolders may contain some, by their names alone.

In: the settings about names. Out: a yes or no for a path inside the inbox.
"""

import re
from collections.abc import Iterable
from fnmatch import translate

from pathspec import GitIgnoreSpec

from sorter.inbox.sidecars import SidecarNames
from sorter.names import IGNORED_FOLDERS, SIDECAR_SUFFIXES, TEMPORARY_NAMES


class Selection:
    """The user's choice of files and folders.

    Args:
        include: patterns as in .gitignore; without any, every file is included.
        exclude: patterns as in .gitignore, of files and folders.
        ignored_folders: names of folders that are never entered, with `*`, in any case.
        temporary_names: names of incomplete files, with `*`, in any case.
        sidecar_suffixes: of files that follow their photo, which alone has to be included.
    """

    def __init__(
        self,
        *,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        ignored_folders: Iterable[str] = IGNORED_FOLDERS,
        temporary_names: Iterable[str] = TEMPORARY_NAMES,
        sidecar_suffixes: Iterable[str] = SIDECAR_SUFFIXES,
    ) -> None:
        self._include, self._exclude = _spec(include), _spec(exclude)
        self.sidecars = SidecarNames(sidecar_suffixes)
        self._ignored, self._temporary = _any_of(ignored_folders), _any_of(temporary_names)

    def takes(self, name: str) -> bool:
        """Whether a file may be a photo or a sidecar, as far as its own name says."""
        base = name.rpartition("/")[2]
        if self.is_temporary(base) or (self._exclude is not None and self._exclude.match_file(name)):
            return False
        return self.includes(name) or self.sidecars.is_sidecar(base)

    def includes(self, name: str) -> bool:
        """Whether a file is sorted if it is a photo; a sidecar may follow its photo anyhow."""
        return self._include is None or self._include.match_file(name)

    def is_temporary(self, base: str) -> bool:
        """Whether a name without folders is that of a hidden or incomplete file."""
        return base.startswith(".") or self._temporary.match(base.lower()) is not None

    def enters(self, folder: str) -> bool:
        """Whether a subfolder, and each that it is in, may contain photos."""
        parts = folder.split("/")
        if any(part.startswith(".") or self._ignored.match(part.lower()) for part in parts):
            return False
        return self._exclude is None or not self._exclude.match_file(f"{folder}/")


def _spec(patterns: Iterable[str]) -> GitIgnoreSpec | None:
    lines = [*patterns]
    return GitIgnoreSpec.from_lines(lines) if lines else None


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(translate(name.lower()) for name in names) or r"(?!)")
