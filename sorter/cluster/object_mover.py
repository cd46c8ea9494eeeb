"""Move objects inside a store: copy to a free name, then delete exactly what was copied.

In: listed objects and the keys that they should have. Out: a `Moved` for each. Whoever dies in between leaves the
object under both names, and the next attempt, in any process, recognises its copy by the mark and finishes.
"""

from dataclasses import dataclass
from typing import Literal

from sorter.cluster.stores import Mode, Store, StoredObject


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of an object.

    Attributes:
        kind: `moved`: it is at `key`, and no more where it was. `changed`: it is gone, or was replaced before it could
            be moved. `left`: it is where it was.
        key: where it is now; None unless it was moved.
        etag: of what is there now; None unless it was moved.
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
    """

    def __init__(self, store: Store, mode: Mode, source: Store | None = None) -> None:
        self._store, self._mode, self._source = store, mode, source or store

    def move(self, item: StoredObject, key: str, *, numbered: bool = True) -> Moved:
        """Move exactly this version of an object; call it again after any failure, with the same arguments.

        The way back is the same, with the stores exchanged: of what `head` says of the new key, to the old one, without
        a number.

        Args:
            item: as it was listed when its work was planned: every attempt has to name the same key, ETag and time.
            key: where to, if that is free.
            numbered: use `name-1.jpg`, `name-2.jpg` … if another object has the key. Otherwise it is left, as a sidecar
                is that cannot have its photo's name, and a photo whose old key is taken at an undo.

        Raises:
            StoreError: the store does not answer or refuses everything. The object is under one name, or both.
        """
        raise NotImplementedError
