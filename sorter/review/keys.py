"""Which key gives which label: the first letter of the label that is free, else a number."""

from collections.abc import Sequence

TAKEN = "ufgxjk"
"""Letters that do something else on the page: neither, full size, grid, select, and back and forth."""


def assign(labels: Sequence[str]) -> dict[str, str]:
    """A key for each label, as far as there are keys.

    Args:
        labels: in the order of the model's classes.
    """
    free = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in TAKEN]
    numbers = [*"123456789"]
    keys: dict[str, str] = {}
    for label in labels:
        key = next((letter for letter in label.lower() if letter in free), None)
        if key is not None:
            free.remove(key)
        elif numbers:
            key = numbers.pop(0)
        if key is not None:
            keys[label] = key
    return keys
