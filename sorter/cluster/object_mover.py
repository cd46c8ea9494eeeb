"""Move objects inside a store: copy to a free name, then delete exactly what was copied.

In: listed objects and the keys that they should have. Out: a `Moved` for each. Whoever dies in between leaves the
object under both names, and the next attempt, in any process, recognises its copy by the mark and finishes.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from sorter.cluster.probe import confirm
from sorter.cluster.stores import ATTEMPTS, MARK, Mode, Store, StoredObject, pause
from sorter.errors import FailingObjectError, ObjectError, StoreError

KEY_BYTES = 1_024
NUMBERS = 1_000
"""So many names are tried for an object whose key is taken."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of an object.

    Attributes:
        kind: `moved`: it is at `key`, and no more where it was. `changed`: it is gone, or was replaced before it could
            be moved. `left`: it is where it was.
        key: where it was moved to, or where a copy of what was left is; None if there is nothing of it elsewhere.
        etag: of what is at `key`.
        reason: why it was not moved, for a person.
    """

    kind: Literal["moved", "changed", "left"]
    key: str | None = None
    etag: str | None = None
    reason: str | None = None


class ObjectMover:
    """Moves objects into a bucket. Any number of threads and processes may move the same objects at once.

    Args:
        store: the bucket that objects go to.
        mode: what `probe` found for it.
        source: the bucket that objects come from, if that is another one.
        prefix, source_prefix: of keys, below which the sorter may write in these buckets.
    """

    def __init__(
        self, store: Store, mode: Mode, source: Store | None = None, *, prefix: str = "", source_prefix: str = ""
    ) -> None:
        self._store, self._mode, self._source = store, mode, source or store
        self._prefix, self._source_prefix = prefix, source_prefix

    def move(self, item: StoredObject, key: str, *, numbered: bool = True) -> Moved:
        """Move exactly this version of an object; call it again after any failure, with the same arguments.

        Args:
            item: as it was listed when its work was planned: every attempt has to name the same key, ETag and time.
            key: where to, if that is free.
            numbered: use `name-1.jpg`, `name-2.jpg` … if another object has the key. Otherwise it is left, as a sidecar
                is that cannot have its photo's name.

        Raises:
            StoreError: the store does not answer or refuses everything. The object is under one name, or both.
        """
        token = move_token(self._source.bucket, item)
        return self._move(_Way(item, self._source, self._store, token), key, numbered)

    def move_back(self, item: StoredObject, moved: Moved) -> Moved:
        """Undo a move, if what it made is still there and as it was; call it again after any failure.

        Args:
            item: what was given to `move`.
            moved: what `move` said.

        Returns:
            `moved` with the old key, where another object may have taken it meanwhile: `left`.

        Raises:
            StoreError: as `move` does.
        """
        key = moved.key
        assert key is not None, "only what was moved can come back"
        token = move_token(self._source.bucket, item)
        back = hashlib.sha256(f"back\n{token}".encode()).hexdigest()
        try:
            there = self.insist(lambda: self._store.head(key))
            if there is not None and _is_copy(there, moved, token):
                # A deletion of the original that is still under way somewhere must not hit what comes back.
                way = _Way(there, self._store, self._source, back, unlike=item.etag)
                return self._move(way, item.key, numbered=False)
            restored = self.insist(lambda: self._source.head(item.key))
        except ObjectError as error:
            return Moved("left", reason=str(error))
        if restored is not None and _mark(restored) == back:  # by an earlier attempt
            return Moved("moved", item.key, restored.etag)
        return Moved("changed", reason="it was changed, moved or deleted since it was sorted")

    def move_back_copied(self, item: StoredObject, copied: Moved) -> Moved:
        """Undo a move that could not delete the original; call it again after any failure.

        The original's deletion is tried again while the copy is as it was, and if it succeeds now, the photo comes back
        as any other. Otherwise both stay: a deletion that a node sends late would hit the original.

        Args:
            item: what was given to `move`.
            copied: where the copy is, and its ETag.

        Returns:
            As `move_back`; also `moved` if somebody has deleted the copy.

        Raises:
            StoreError: as `move` does.
        """
        key = copied.key
        assert key is not None, "only what has a copy can lose it"
        twice = ""
        try:
            there = self.insist(lambda: self._store.head(key))
            if _is_copy(there, copied, move_token(self._source.bucket, item)):
                twice = ": it is there twice"
                self.insist(lambda: self._source.delete_exact(item))
            original = self.insist(lambda: self._source.head(item.key))
        except ObjectError as error:
            return Moved("left", reason=f"{error}{twice}")
        if original is None or original.etag != item.etag:
            return self.move_back(item, copied)
        if there is None:
            return Moved("moved", item.key, original.etag)
        if not twice:
            return Moved("left", reason="its copy was changed since: the original is where it was")
        return Moved("left", reason=f"the store refuses to delete the original{twice}")

    def insist(self, request: Callable[[], _Answer]) -> _Answer:
        """What a request for one object answers, or whose fault it is if the store fails at it.

        The second attempt is for a store that has recovered since the first one ended.

        Raises:
            ObjectError: it fails again, at this object alone.
            StoreError: the store fails at others as well.
        """
        try:
            return request()
        except FailingObjectError:
            confirm(self._store, self._prefix, self._source, self._source_prefix, self._mode)
        try:
            return request()
        except FailingObjectError as error:
            raise ObjectError(str(error)) from error

    def _move(self, way: "_Way", key: str, numbered: bool) -> Moved:
        if (way.source.bucket, way.item.key) == (way.target.bucket, key):
            return Moved("left", reason="it is where it should be")
        if self._mode == "upload" and way.item.is_in_parts and way.unlike is None:
            return Moved("left", reason="it was uploaded in parts, which this store does not delete on a condition")
        try:
            arrived = self.insist(lambda: self._copy(way, key, numbered))
        except ObjectError as error:
            return Moved("left", reason=str(error))
        reason = None if arrived.kind != "moved" else self._delete(way, arrived.etag)
        return arrived if reason is None else Moved("left", arrived.key, arrived.etag, f"{reason}: it is there twice")

    def _delete(self, way: "_Way", copied: str | None) -> str | None:
        """Delete what was copied; why that is not possible, or None.

        Args:
            way: of the object.
            copied: the copy's ETag.
        """
        if copied == way.unlike and way.item.size > 0:
            return "its ETag cannot be told from the old one"
        try:
            # What has replaced the object since it was copied is another photo, and stays: both are kept.
            if self.insist(lambda: way.source.delete_exact(way.item)) == "changed":
                original = self.insist(lambda: way.source.head(way.item.key))
                if original is not None and original.etag == way.item.etag:
                    return "the store refuses to delete it"
        except ObjectError as error:
            return str(error)
        return None

    def _copy(self, way: "_Way", key: str, numbered: bool) -> Moved:
        """Make sure that there is a copy with this token, and say where."""
        for name in _names(key) if numbered else (key,):
            if len(name.encode()) > KEY_BYTES:
                return Moved("left", reason=f"its new key would be longer than {KEY_BYTES} bytes")
            for attempt in range(ATTEMPTS):
                failure: FailingObjectError | None = None
                try:
                    etag = way.target.copy_new(way.item, way.source, name, way.token, self._mode, unlike=way.unlike)
                    if etag is not None:
                        return Moved("moved", name, etag)
                except FailingObjectError as error:  # the copy may be there all the same
                    failure = error
                there = way.target.head(name)
                if there is not None and _mark(there) == way.token:  # by an earlier attempt, or one beside this one
                    return Moved("moved", name, there.etag)
                if failure is not None:
                    raise failure
                original = way.source.head(way.item.key)
                is_gone = original is None or original.etag != way.item.etag
                if is_gone and (there is None or not numbered):
                    return Moved("changed", reason="it was replaced or deleted after it was listed")
                if there is not None:
                    break
                pause(attempt)
            else:
                url = way.target.url
                raise StoreError(f"{url} refuses the free key {name!r} {ATTEMPTS} times: check it and start again")
        return Moved(
            "left",
            reason=f"another object has the key {key!r}, and each one with a number that was tried"
            if numbered
            else f"another object has the key {key!r}",
        )


@dataclass(frozen=True, slots=True)
class _Way:
    """What is moved, from which bucket into which, the token of its copy, and the ETag that this must not have."""

    item: StoredObject
    source: Store
    target: Store
    token: str
    unlike: str | None = None


def move_token(bucket: str, item: StoredObject) -> str:
    """What marks the copies of one version of an object: the same in every attempt, and for no other version.

    The time is part of it because the same bytes uploaded once more are another photo with the same ETag.
    """
    version = "\n".join((bucket, item.key, item.etag, item.modified.isoformat(timespec="seconds")))
    return hashlib.sha256(version.encode()).hexdigest()


def _mark(item: StoredObject) -> str | None:
    return (item.metadata or {}).get(MARK)


def _is_copy(there: StoredObject | None, moved: Moved, token: str) -> bool:
    """Whether what is there is what a move made, as it was."""
    return there is not None and there.etag == moved.etag and _mark(there) == token


def _names(key: str) -> Iterator[str]:
    """The key itself, then those with a number, as in a folder."""
    yield key
    stem, extension = os.path.splitext(key)
    for number in range(1, NUMBERS):
        yield f"{stem}-{number}{extension}"
