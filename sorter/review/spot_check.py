"""`sorter review --check`: how many sorted photos are right, measured on some of them at random.

In: a random sample of the sorted photos, and what a person says of each without seeing the model's label. Out: the
share that is right, with its interval, beside what the model claims. Only a random sample tells: whoever looks at the
least sure first sees the worst photos.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sorter.history.reader import Entry

_Z = 1.959963984540054  # of the normal distribution, for 95 %


def wilson(right: int, photos: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    share, spread = right / photos, _Z**2 / photos
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
