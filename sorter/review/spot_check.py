"""`sorter review --check`: how many sorted photos are right, measured on some of them at random.

In: a random sample of the sorted photos, and what a person says of each without seeing the model's label. Out: the
share that is right, with its interval, beside what the model claims. Only a random sample tells: whoever looks at the
least sure first sees the worst photos.
"""

import math

from sorter.review.deck import Card, Deck

_Z = 1.959963984540054  # of the normal distribution, for 95 %


def wilson(right: int, photos: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    share, spread = right / photos, _Z**2 / photos
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


class SpotCheck:
    """A sample that is drawn once, and what is known of it so far.

    A photo of the sample that a person has decided before counts as decided, and is not shown again: to leave such
    photos out would make the sample one of the photos that nobody doubted.

    Args:
        deck: of the output.
        wanted: how many photos to draw; if there are fewer, all of them.
    """

    def __init__(self, deck: Deck, wanted: int) -> None:
        self._deck = deck
        self._drawn = deck.sample(wanted)

    @property
    def drawn(self) -> int:
        """How many photos the sample has."""
        return len(self._drawn)

    def cards(self) -> list[Card]:
        """The photos that nobody has decided yet."""
        decided = self._deck.verdicts([entry.id for entry in self._drawn])
        cards = (self._deck.card(entry.id) for entry in self._drawn if entry.id not in decided)
        return [card for card in cards if card is not None]

    def sentence(self) -> str:
        """How many are right so far, and what the model claims for the same photos."""
        labels = self._deck.verdicts([entry.id for entry in self._drawn])
        judged = [entry for entry in self._drawn if entry.id in labels]
        if not judged:
            return "No photo was checked."
        right = sum(labels[entry.id] == entry.label for entry in judged)
        low, high = wilson(right, len(judged))
        claimed = sum(entry.confidence or 0.0 for entry in judged) / len(judged)
        return (
            f"{right} of {len(judged)} photos drawn at random are right: {right / len(judged):.1%} "
            f"(95% interval {low:.1%} to {high:.1%}). The model claims {claimed:.1%}."
        )
