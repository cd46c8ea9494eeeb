"""Which of the listed objects belong together: a photo and its sidecars, by their names, as in a folder.

In: objects in the order of their keys. Out: families, each in that order, by their first members.
"""

import os
from collections import defaultdict
from collections.abc import Sequence

from sorter.cluster.stores import StoredObject
from sorter.inbox.sidecars import SidecarNames


def families(rows: Sequence[StoredObject], sidecars: SidecarNames) -> list[list[StoredObject]]:
    """Sort objects into families; most consist of one photo alone.

    A sidecar that several photos could own is with all of them.
    """
    owners: dict[str, list[int]] = defaultdict(list)  # by a folder and a photo's name or stem, in small letters
    for position, row in enumerate(rows):
        folder, name = _split(row.key)
        for owner in dict.fromkeys((name, os.path.splitext(name)[0])):
            owners[f"{folder}{owner.casefold()}"].append(position)
    first = list(range(len(rows)))  # of each row's family: a forest of disjoint sets

    def family(position: int) -> int:
        while first[position] != position:
            first[position] = first[first[position]]
            position = first[position]
        return position

    for position, row in enumerate(rows):
        folder, name = _split(row.key)
        for owner, _ in sidecars.owners(name):
            for other in owners.get(f"{folder}{owner.casefold()}", ()):
                if sidecars.rank(name, _split(rows[other].key)[1]) is not None:
                    low, high = sorted((family(position), family(other)))
                    first[high] = low
    found: dict[int, list[StoredObject]] = {}
    for position, row in enumerate(rows):
        found.setdefault(family(position), []).append(row)
    return list(found.values())


def _split(key: str) -> tuple[str, str]:
    folder, slash, name = key.rpartition("/")
    return folder + slash, name
