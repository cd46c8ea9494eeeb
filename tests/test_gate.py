"""When a model that learned from verdicts counts as better."""

import numpy as np
import numpy.typing as npt
import pytest

from sorter.classifier.manifest import Int8
from trainer.packaging import gate
from trainer.packaging.gate import Comparison, Paired

GOOD = Int8(photos=100, agreement=1.0, log_loss_increase=0.0)
EQUAL = Paired(photos=500, before=7, after=7, newly_wrong=0, newly_right=0)
BETTER = Paired(photos=90, before=40, after=5, newly_wrong=1, newly_right=36)


def answers(*classes: int) -> npt.NDArray[np.float32]:
    return np.eye(2, dtype=np.float32)[list(classes)]


def test_two_models_are_compared_photo_by_photo() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    assert gate.paired(answers(0, 1, 1, 1, 0), answers(1, 0, 0, 1, 0), labels) == Paired(
        photos=5, before=3, after=2, newly_wrong=1, newly_right=2
    )


@pytest.mark.parametrize(
    ("newly_wrong", "newly_right", "chance"),
    [(0, 0, 1.0), (0, 5, 1.0), (1, 1, 0.75), (4, 0, 0.0625), (5, 0, 0.03125), (8, 2, 56 / 1024)],
)
def test_the_chance_is_mcnemars_exact_one(newly_wrong: int, newly_right: int, chance: float) -> None:
    after = 50 + newly_wrong - newly_right
    assert Paired(500, 50, after, newly_wrong, newly_right).chance_of_worse == pytest.approx(chance)


def test_a_model_that_is_better_on_verdicts_and_equal_on_the_guard_is_better() -> None:
    assert Comparison(EQUAL, None, BETTER, GOOD).reasons_against() == []


@pytest.mark.parametrize(
    ("comparison", "reason"),
    [
        (Comparison(Paired(500, 7, 12, 5, 0), None, BETTER, GOOD), "significantly worse on the guard"),
        (Comparison(Paired(500, 7, 10, 3, 0), None, BETTER, GOOD), "at most 2 more"),
        (Comparison(None, Paired(500, 0, 6, 6, 0), BETTER, GOOD), "6 of 500 confidently sorted photos another label"),
        (Comparison(EQUAL, None, Paired(90, 5, 5, 2, 2), GOOD), "no fewer of the held-out verdicts"),
        (Comparison(EQUAL, None, Paired(90, 90, 31, 0, 59), GOOD), "more than a third of the held-out verdicts"),
        (Comparison(EQUAL, None, BETTER, Int8(photos=100, agreement=0.98, log_loss_increase=0)), "only 98.0%"),
    ],
)
def test_each_condition_alone_refuses_a_model(comparison: Comparison, reason: str) -> None:
    (sentence,) = comparison.reasons_against()
    assert reason in sentence


@pytest.mark.parametrize(
    "comparison",
    [
        Comparison(Paired(500, 7, 9, 2, 0), None, BETTER, GOOD),
        Comparison(None, Paired(500, 0, 5, 5, 0), BETTER, GOOD),
        Comparison(EQUAL, None, Paired(90, 90, 30, 0, 60), GOOD),
        Comparison(EQUAL, None, Paired(90, 6, 5, 0, 1), GOOD),
    ],
)
def test_what_is_just_good_enough_is_not_refused(comparison: Comparison) -> None:
    assert comparison.reasons_against() == []


def test_the_table_has_both_models_side_by_side() -> None:
    lines = list(Comparison(Paired(500, 7, 9, 3, 1), None, BETTER, GOOD).table())
    assert [line.split() for line in lines[:4]] == [
        ["wrong", "before", "after"],
        ["guard", "photos:", "500", "7", "9"],
        ["3", "newly", "wrong,", "1", "newly", "right"],
        ["held-out", "photos", "with", "a", "verdict:", "90", "40", "5"],
    ]
    assert "31.2%" in lines[5]
