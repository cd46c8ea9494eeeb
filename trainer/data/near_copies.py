"""Near copies by their perceptual hashes: re-encodings of one photo, and many of the shots of a burst.

In: hashes of 64 bits, uint64 (N,). Out: distances, or the group that each photo belongs to.
"""

import numpy as np
import numpy.typing as npt

MAX_BITS = 4
"""Photos whose 64-bit perceptual hashes differ in at most this many bits count as the same photo."""

Hashes = npt.NDArray[np.uint64]


def distances(hashes: Hashes, own: np.uint64) -> npt.NDArray[np.intp]:
    """In how many bits each hash differs from one of them, (N,)."""
    different = (hashes ^ own).view(np.uint8).reshape(-1, 8)
    bits: npt.NDArray[np.intp] = np.unpackbits(different, axis=1).sum(1, dtype=np.intp)
    return bits


def groups(hashes: Hashes) -> npt.NDArray[np.intp]:
    """The number of each photo's group, (N,). Near copies are in one group, and so are their near copies."""
    unique, positions = np.unique(hashes, return_inverse=True)
    parents = list(range(len(unique)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    # Of MAX_BITS + 1 bands, near hashes have at least one in common; so only those in one band are compared.
    width = -(-64 // (MAX_BITS + 1))
    for shift in range(0, 64, width):
        bands = (unique >> np.uint64(shift)) & np.uint64(2**width - 1)
        order = np.argsort(bands, kind="stable")
        for same_band in np.split(order, np.flatnonzero(np.diff(bands[order])) + 1):
            for start, number in enumerate(same_band[:-1]):
                others = same_band[start + 1 :]
                for other in others[distances(unique[others], unique[number]) <= MAX_BITS]:
                    parents[root(int(other))] = root(int(number))
    return np.array([root(number) for number in range(len(unique))], np.intp)[positions]
