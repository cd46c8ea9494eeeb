"""Types for command-line arguments: what argparse calls to convert and check a value."""

import argparse
import re
import time
from datetime import datetime

WHEN = "a time (2026-11-24, 2026-11-24T18:00) or an age (30m, 2h, 7d)"

_MAX_COUNT = 1_000_000_000
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def positive(text: str) -> int:
    """An integer from 1 to a billion."""
    # The slice keeps int() from being slow, or refusing, on thousands of digits.
    if not text.isdecimal() or not 1 <= int(text[:20]) <= _MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1 to {_MAX_COUNT:,}")
    return int(text)


def port(text: str) -> int:
    """A port that any user may open."""
    if not text.isdecimal() or not 1024 <= int(text[:20]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a port from 1024 to 65535")
    return int(text)


def point_in_time(text: str) -> float:
    """A date, a time, or an age, as seconds since the epoch."""
    if age := re.fullmatch(r"(\d{1,6})([smhdw])", text):
        return time.time() - int(age[1]) * _UNIT_SECONDS[age[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {WHEN}") from None


def path(text: str) -> str:
    """A path as it was typed."""
    if not text:  # os.path takes it for the current folder: an unset shell variable must not restore what is in it
        raise argparse.ArgumentTypeError("a PATH must not be empty")
    return text
