"""The files that belong to a photo and travel with it: what is written about it, and the film of a Live Photo.

In: the name of a photo, or of a sidecar. Out: the names of the others that there may be. Programs pair them by name
alone, so a sidecar keeps the pairing wherever its photo goes: `IMG_1.jpg` that becomes `IMG_1-1.jpg` has
`IMG_1-1.xmp`. One that several photos could own goes with the last of them.
"""

import os
from collections.abc import Iterable, Iterator

from sorter.decoding import formats, raw
from sorter.files.photo import Photo, opened_folder

LATE_SECONDS = 86_400.0
"""A sidecar that arrives so long after its photo still follows it: phones send the film of a Live Photo last."""

# IMG_1.xmp of editors, IMG_1.aae of Apple's edits, IMG_1.json of exports, IMG_1.mov of Live Photos.
_OF_STEMS = (".xmp", ".aae", ".json", ".mov")
# IMG_1.jpg.xmp of darktable and digiKam, IMG_1.jpg.json of Google Takeout.
_OF_NAMES = (".xmp", ".json")
_PHOTOS = (".jpg", ".heic", ".jpeg", *sorted((formats.EXTENSIONS | raw.EXTENSIONS) - {".jpg", ".heic", ".jpeg"}))


def is_sidecar(name: str) -> bool:
    """Tell whether a file with this name is one where there is a photo beside it."""
    return os.path.splitext(name)[1].lower() in _OF_STEMS


def sidecars(photo: str) -> Iterator[str]:
    """The names that a photo's sidecars may have."""
    stem, _ = os.path.splitext(photo)
    for extension in _spelled(_OF_STEMS):
        yield stem + extension
    for extension in _spelled(_OF_NAMES):
        yield photo + extension


def photos(sidecar: str) -> Iterator[str]:
    """The names that a sidecar's photo may have."""
    stem, extension = os.path.splitext(sidecar)
    if extension.lower() in _OF_NAMES and os.path.splitext(stem)[1].lower() in _PHOTOS:
        yield stem
    for of_photo in _spelled(_PHOTOS):
        yield stem + of_photo


def _spelled(extensions: Iterable[str]) -> Iterator[str]:
    """As programs and cameras write them: `.jpg`, `.JPG`, `.Jpg`."""
    for extension in extensions:
        yield from (extension, extension.upper(), extension.title())


def renamed(sidecar: str, photo: str, new: str) -> str:
    """What a sidecar is called where its photo is called `new` and no more `photo`; all without folders."""
    if sidecar.startswith(photo):
        return new + sidecar[len(photo) :]
    return os.path.splitext(new)[0] + sidecar[len(os.path.splitext(photo)[0]) :]


def beside(photo: Photo) -> list[str]:
    """The sidecars that are where a photo is, or was: paths inside the inbox."""
    folder, _, base = photo.name.rpartition("/")
    return [os.path.join(folder, name) for name in _existing(photo, folder, sidecars(base))]


def has_photo(sidecar: Photo) -> bool:
    """Tell whether there is a photo beside a sidecar."""
    folder, _, base = sidecar.name.rpartition("/")
    return next(_existing(sidecar, folder, photos(base)), None) is not None


def exists(path: str, folder: int | None = None) -> bool:
    """Tell whether a name is taken, by whatever; asked a dozen times for each photo, and so without exceptions."""
    return os.access(path, os.F_OK, dir_fd=folder, follow_symlinks=False)


def _existing(at: Photo, folder: str, names: Iterator[str]) -> Iterator[str]:
    try:
        with opened_folder(at.root, folder) as descriptor:
            yield from (name for name in names if exists(name, descriptor))
    except OSError:  # the folder is gone
        return
