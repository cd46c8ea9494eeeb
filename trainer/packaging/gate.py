"""Decides whether a model that learned from verdicts is better than the one that it came from.

In: what both answer on the same labelled photos. Out: the reasons against the new one; none if it is better. Nothing is
fitted here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from sorter.classifier.manifest import Int8
from trainer.packaging import export
from trainer.packaging.metrics import Floats, Labels

MAX_WORSE = 2
"""How many more guard photos the new model may have wrong."""
_ALPHA = 0.05
MIN_AGREEMENT = 0.99
"""The share of the confidently sorted photos whose label may not change, where there is no guard set."""
MAX_WRONG = 1 / 3
"""The share of the held-out verdicts that the new model may contradict. Verdicts that are right are mostly learned:
measured, it contradicts 2 to 25 % of them then, and 48 to 66 % where half of them are false."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same photos.

    Attributes:
        before, after: how many each has wrong.
        newly_wrong: those that only the new model has wrong; the other way round, `newly_right`.
    """

    photos: int
    before: int
    after: int
    newly_wrong: int
    newly_right: int

    @property
    def chance_of_worse(self) -> float:
        """How likely so many would be newly wrong by chance: McNemar's exact test, one-sided, 0 to 1."""
        changed = self.newly_wrong + self.newly_right
        return float(binomtest(self.newly_wrong, changed, alternative="greater").pvalue) if changed else 1.0


def paired(before: Floats, after: Floats, labels: Labels) -> Paired:
    """Compare the probabilities of two models, (N, C), by the labels of the photos, (N,)."""
    was_wrong, is_wrong = (np.asarray(each.argmax(1) != labels) for each in (before, after))
    return Paired(
        photos=len(labels),
        before=int(was_wrong.sum()),
        after=int(is_wrong.sum()),
        newly_wrong=int((is_wrong & ~was_wrong).sum()),
        newly_right=int((was_wrong & ~is_wrong).sum()),
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """What speaks for and against a new model.

    Attributes:
        guard: on the guard set; None where the old model has none.
        confident: on photos that were sorted confidently, by what the old model calls them; None where there is a guard
            set.
        held_out: on photos with verdicts that the new model did not learn from.
        int8: the new network with 8 bits against the one with 32.
    """

    guard: Paired | None
    confident: Paired | None
    held_out: Paired
    int8: Int8

    def table(self) -> Iterator[str]:
        """The figures of both models, line by line."""
        yield f"{'wrong':<46}{'before':>8}{'after':>8}"
        rows = (
            ("guard photos", self.guard),
            ("confidently sorted photos, by the old model", self.confident),
            ("held-out photos with a verdict", self.held_out),
        )
        for title, pair in rows:
            if pair is not None:
                yield f"{f'{title}: {pair.photos}':<46}{pair.before:>8}{pair.after:>8}"
                yield f"  {pair.newly_wrong} newly wrong, {pair.newly_right} newly right"
        if self.guard is not None:
            yield f"chance that an equal model does as badly on the guard photos: {self.guard.chance_of_worse:.1%}"
        yield f"8 bits agree with 32 bits on {self.int8.agreement:.1%} of {self.int8.photos} photos"

    def reasons_against(self) -> Sequence[str]:
        """A sentence for each condition that the new model does not fulfil."""
        return [*self._against_the_guard(), *self._against_the_verdicts(), *self._against_8_bits()]

    def _against_the_guard(self) -> list[str]:
        if self.guard is not None:
            if self.guard.chance_of_worse < _ALPHA:
                return ["it is significantly worse on the guard photos (McNemar's exact test, 5 %)"]
            if self.guard.after - self.guard.before > MAX_WORSE:
                return [f"it has more guard photos wrong: at most {MAX_WORSE} more are allowed"]
        elif self.confident is not None and self.confident.after > (1 - MIN_AGREEMENT) * self.confident.photos:
            return [
                f"it gives {self.confident.after} of {self.confident.photos} confidently sorted photos another label, "
                f"and at most {1 - MIN_AGREEMENT:.0%} are allowed"
            ]
        return []

    def _against_the_verdicts(self) -> list[str]:
        if self.held_out.after >= self.held_out.before:
            return ["it has no fewer of the held-out verdicts wrong"]
        if self.held_out.after > MAX_WRONG * self.held_out.photos:
            return [
                "it contradicts more than a third of the held-out verdicts: either some verdicts are false (sorter "
                "history --verdicts lists them), or this network cannot tell such photos apart"
            ]
        return []

    def _against_8_bits(self) -> list[str]:
        if export.is_good_enough(self.int8):
            return []
        return [f"with 8 bits it agrees with itself at 32 bits on only {self.int8.agreement:.1%} of the photos"]
