"""The owner of the photos, who does what people and programs do to a folder, and knows what that means for each photo.

A photo is a text here: its letters say which folder it belongs to, and no two have the same.
"""

import contextlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

LONG_AGO = 1_600_000_000


@dataclass
class Effect:
    """What an action did.

    Attributes:
        made: contents that exist from now on.
        gone: contents that were overwritten or deleted; a copy that the sorter had made by then may stay.
        moved: contents whose file has another path now; a copy that the sorter had made by then may stay as well, if
            the sorter was killed before it could look.
        placed: files put into the output, by path; nobody may touch them.
    """

    made: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    placed: dict[str, str] = field(default_factory=dict)


class Owner:
    """Acts on real files.

    Args:
        inbox: where photos are dropped; `deep` in it is at times a link that leads outside.
        output: where they are sorted into.
        outside: where the owner keeps what nobody may touch; on the inbox's file system.
    """

    def __init__(self, inbox: Path, output: Path, outside: Path) -> None:
        self.inbox, self.output, self.outside = inbox, output, outside

    def act(self, action: str, *arguments: str) -> Effect:
        """Do one thing by its name; what is impossible at the moment has no effect.

        Raises:
            BlockingIOError: the sorter holds a lease on the file, so that the owner has to wait for it.
        """
        effect = Effect()
        with contextlib.suppress(FileNotFoundError):
            getattr(self, f"_{action}")(effect, *arguments)
        return effect

    def _drop(self, effect: Effect, name: str, content: str) -> None:
        """Put a complete file under a name, and replace what was there."""
        if (self.inbox / "deep").is_symlink() and name.startswith("deep/"):
            return
        (self.inbox / name).parent.mkdir(exist_ok=True)
        new = self.outside / "new"
        new.write_text(content)
        if len(content) % 2:  # as a copy that keeps the times
            os.utime(new, (LONG_AGO, LONG_AGO))
        effect.gone += self._there(name)
        new.replace(self.inbox / name)
        effect.made.append(content)

    def _append(self, effect: Effect, name: str) -> None:
        for content in self._there(name):
            with open(self.inbox / name, "a", opener=_at_once) as file:
                file.write("+")
            effect.gone.append(content)
            effect.made.append(content + "+")

    def _rename(self, effect: Effect, name: str, other: str) -> None:
        if self._there(name) and not os.path.lexists(self.inbox / other) and (self.inbox / other).parent.is_dir():
            effect.moved += self._there(name)
            (self.inbox / name).rename(self.inbox / other)

    def _delete(self, effect: Effect, name: str) -> None:
        effect.gone += self._there(name)
        if self._there(name):
            (self.inbox / name).unlink()

    def _chmod(self, _: Effect, name: str) -> None:
        if self._there(name):
            (self.inbox / name).chmod(0o600)

    def _link(self, effect: Effect, name: str) -> None:
        """Keep the photo elsewhere, and have a link under its name that leads out."""
        if self._there(name):
            effect.moved += self._there(name)
            (self.inbox / name).rename(self._kept())
            (self.inbox / name).symlink_to(self.outside / "trap/a.jpg")

    def _fifo(self, effect: Effect, name: str) -> None:
        if self._there(name):
            effect.moved += self._there(name)
            (self.inbox / name).rename(self._kept())
            os.mkfifo(self.inbox / name)

    def _swap(self, effect: Effect) -> None:
        """Put a link that leads out in the folder's place, or the folder back in the link's."""
        folder, kept = self.inbox / "deep", self.outside / "deep"
        if folder.is_symlink():
            folder.unlink()
            kept.rename(folder)
        elif folder.is_dir():
            effect.moved += [content for path in folder.iterdir() for content in self._there(f"deep/{path.name}")]
            folder.rename(kept)
            folder.symlink_to(self.outside / "trap")

    def _place(self, effect: Effect, name: str, content: str) -> None:
        """Put a file into the output under a name that is free, which may be the one a photo was about to get."""
        path = self.output / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(content)
            effect.made.append(content)
            effect.placed[name] = content

    def _there(self, name: str) -> list[str]:
        path = self.inbox / name
        if path.is_symlink() or not path.is_file() or path.parent.is_symlink():
            return []
        return [path.read_text()]

    def _kept(self) -> Path:
        return next(path for n in itertools.count() if not (path := self.outside / f"kept-{n}").exists())


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
