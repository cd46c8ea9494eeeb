"""A phone uploads over a slow link: every photo is sorted once and intact, whatever the link does."""

import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import LONG_AGO, Running, make_tree, photo, read_tree

AT_A_TIME = 8


def upload(inbox: Path, contents: dict[str, bytes], stalled: int, stall_seconds: float) -> None:
    """Write files under their final names, several in turn, some chunks late, some dated back as phones do."""
    choose = random.Random(5)
    waiting = list(contents)
    stalls = set(choose.sample(waiting, stalled))
    under_way: list[tuple[str, int, float]] = []  # name, bytes written, when it may go on
    while waiting or under_way:
        while waiting and len(under_way) < AT_A_TIME:
            (inbox / waiting[0]).touch()
            under_way.append((waiting.pop(0), 0, 0.0))
        name, written, due = under_way.pop(0)
        if time.monotonic() < due:
            under_way.append((name, written, due))
            time.sleep(0.001)
            continue
        content = contents[name]
        chunk = content[written : written + max(1, len(content) // 4)]
        with (inbox / name).open("ab") as file:
            file.write(chunk)
        written += len(chunk)
        if written < len(content):
            # A stalled upload looks complete for longer than files have to be unchanged.
            under_way.append((name, written, time.monotonic() + (stall_seconds if name in stalls else 0.01)))
        elif choose.random() < 0.5:
            os.utime(inbox / name, (LONG_AGO, LONG_AGO))


@pytest.mark.timeout(110)
@pytest.mark.parametrize(
    ("photos", "stalled", "settle_seconds"), [(40, 2, 0.1), pytest.param(500, 10, 0.4, marks=pytest.mark.long)]
)
def test_photos_over_a_slow_link_are_each_sorted_once_and_intact(
    photos: int, stalled: int, settle_seconds: float, tmp_path: Path
) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    contents = {f"IMG_{n:04}.jpg": photo(n) for n in range(photos)}
    values = {"inbox": str(inbox), "settle_seconds": settle_seconds, "rescan_seconds": 3.0}
    command = [sys.executable, str(Path(__file__).with_name("light_daemon.py")), json.dumps(values)]
    running = Running(command, tmp_path / "log", {})
    try:
        make_tree(inbox, {"first.jpg": photo(photos)})
        running.wait_for_event("photo.sorted")  # it is watching now
        upload(inbox, contents, stalled, 3 * settle_seconds)
        running.wait_for(lambda: not any(inbox.glob("*.jpg")), seconds=90)
    finally:
        running.process.terminate()
        running.finish()
    contents["first.jpg"] = photo(photos)
    sorted_ = Counter(Path(event["path"]).name for event in running.events("photo.sorted"))
    assert running.events("photo.failed") == []
    assert sorted_ == Counter(dict.fromkeys(contents, 1))
    assert {Path(name).parts[0] for name in read_tree(inbox)} <= {"cats", "dogs"}
    assert {Path(name).name: content for name, content in read_tree(inbox).items()} == contents
