"""The statement behind `--max-error-rate`, drawn many times: how often does a chosen threshold break its rate?"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from trainer.packaging import metrics

Floats = npt.NDArray[np.float64]
Risk = Callable[[Floats], Floats]
"""From confidences (N,) to the probability that a photo with this confidence is wrong, (N,)."""

DRAWS = 400
ALLOWED = 0.05 + 3 * (0.05 * 0.95 / DRAWS) ** 0.5
"""5 % of the draws, and three standard errors of a simulation of this many."""


def drawn(random: np.random.Generator, photos: int) -> Floats:
    """Confidences between 0.5 and 1, most of them high, as a good model has them."""
    confidences: Floats = 1 - 0.5 * 10.0 ** -random.uniform(0, 4, photos)
    return confidences


def chosen(confidence: Floats, is_wrong: npt.NDArray[np.bool_], rate: float) -> float | None:
    answers = np.stack([confidence, 1 - confidence], 1).astype(np.float32)
    table = metrics.risk_coverage(metrics.always(answers), is_wrong.astype(np.intp))
    return next((entry.threshold for entry in table if entry.error_rate == rate), None)


def broken_share(rate: float, photos: int, risk: Risk) -> float:
    """The share of the draws in which photos above the chosen threshold are wrong more often than the rate says."""
    random = np.random.default_rng(round(rate * 1000))
    many = drawn(random, 200_000)
    true_risk = risk(many)
    broken = 0
    for _ in range(DRAWS):
        confidence = drawn(random, photos)
        threshold = chosen(confidence, random.random(photos) < risk(confidence), rate)
        broken += threshold is not None and true_risk[many >= threshold].mean() > rate
    return broken / DRAWS


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05])
def test_a_risk_just_above_the_rate_at_every_confidence_passes_in_at_most_one_draw_of_twenty(rate: float) -> None:
    def flat(confidence: Floats) -> Floats:
        return np.full(len(confidence), 1.001 * rate)

    assert broken_share(rate, 500, flat) <= ALLOWED


def test_a_risk_that_rises_as_the_confidence_falls_breaks_the_rate_in_at_most_one_draw_of_twenty() -> None:
    def rising(confidence: Floats) -> Floats:
        return np.minimum(0.5, 2 * (1 - confidence) + 0.01)

    assert broken_share(0.05, 500, rising) <= ALLOWED
