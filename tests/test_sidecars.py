"""What belongs to a photo goes where the photo goes, keeps the pairing, and comes back with it."""

import itertools
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import GREEN, LONG_AGO, RED, RedGreenEngine, Running, make_tree, photo, pipeline_to, plain, read_tree
from test_undo import described, sort, undo

from sorter.classifier.manifest import Manifest
from sorter.decisions import Decision
from sorter.decoding.decoded import Decoded
from sorter.history.reader import HistoryReader
from sorter.inbox import sidecars as sidecars
from sorter.inbox.scan import Inbox
from sorter.service.counters import Counters
from sorter.service.loop import Service
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings

Start = Callable[..., Running]


def of_a_phone(number: int, color: tuple[int, int, int]) -> dict[str, bytes]:
    """A Live Photo with edits, as an iPhone writes it."""
    name = f"IMG_{number:04}"
    return {
        f"{name}.HEIC": plain(color, number, "HEIF"),
        f"{name}.MOV": b"\0\0\0\x14ftypqt  film %d" % number,
        f"{name}.AAE": b"<plist>edits %d</plist>" % number,
    }


def sort_here(inbox: Path, manifest: Manifest, **values: Any) -> Counters:
    """Sort a backlog in this process."""
    settings = Settings(inbox=inbox, once=True, settle_seconds=0.2, **values)
    folders = frozenset(str(inbox / folder) for folder in ("cats", "dogs", "unsure", "failed"))
    watched = Inbox(inbox, recursive=settings.recursive, excluded=folders, settle_seconds=0.2)
    pipeline = pipeline_to(inbox, RedGreenEngine(), manifest, settings)
    past = None if settings.dry_run else HistoryReader(inbox)
    try:
        return Service(settings, watched, pipeline, Shutdown(0), None, log_fields={}, history=past).run_once()
    finally:
        if past is not None:
            past.close()


def test_live_photos_and_what_is_written_about_photos_go_along(tmp_path: Path, manifest: Manifest) -> None:
    inbox = tmp_path / "in"
    files = {
        **of_a_phone(1, RED),
        **of_a_phone(2, GREEN),
        "a.jpg": plain(RED, 3),
        "a.xmp": b"a's",
        "a.jpg.xmp": b"a's of darktable",
        "b.JPG": plain(GREEN, 4),
        "b.JPG.json": b"b's of Takeout",
        "b.json": b"b's",
        "broken.jpg": plain(RED, 5)[:200],
        "broken.xmp": b"broken's",
        "film.mov": b"nobody's film",
        "notes.json": b"{}",
    }
    make_tree(inbox, files)
    counters = sort_here(inbox, manifest)
    expected = {}
    for name, content in files.items():
        stem = name.split(".")[0]
        places = {"IMG_0001": "cats/", "a": "cats/", "IMG_0002": "dogs/", "b": "dogs/", "broken": "failed/"}
        expected[places.get(stem, "") + name] = content
    assert read_tree(inbox) == expected
    assert (counters.photos, counters.sidecars, counters.skipped, counters.left) == (4, 9, 2, 0)


def test_the_pairing_is_kept_where_the_name_was_taken(tmp_path: Path, manifest: Manifest) -> None:
    inbox = tmp_path / "in"
    taken = {"cats/a.jpg": b"another photo", "dogs/b.xmp": b"of a photo that went elsewhere"}
    make_tree(inbox, taken)
    make_tree(inbox, {"a.jpg": plain(RED), "a.xmp": b"1", "a.jpg.xmp": b"2", "b.jpg": plain(GREEN), "b.xmp": b"3"})
    sort_here(inbox, manifest)
    assert read_tree(inbox) == {
        **taken,
        "cats/a-1.jpg": plain(RED),
        "cats/a-1.xmp": b"1",
        "cats/a-1.jpg.xmp": b"2",
        "dogs/b-1.jpg": plain(GREEN),
        "dogs/b-1.xmp": b"3",
    }


def test_one_that_two_photos_share_goes_with_the_last_of_them(tmp_path: Path, manifest: Manifest) -> None:
    inbox = tmp_path / "in"
    make_tree(inbox, {"a.jpg": plain(RED), "a.nef": b"II*\0 a raw file", "a.xmp": b"the raw file's, perhaps"})
    counters = sort_here(inbox, manifest)
    assert sorted(read_tree(inbox)) == ["a.nef", "a.xmp", "cats/a.jpg"]
    assert (counters.sidecars, counters.left) == (0, 0)
    (inbox / "a.nef").unlink()
    sort_here(inbox, manifest)
    assert sorted(read_tree(inbox)) == ["cats/a.jpg", "cats/a.xmp"]


def test_a_sidecar_that_was_left_behind_by_a_kill_follows_at_the_next_start(tmp_path: Path, manifest: Manifest) -> None:
    inbox = tmp_path / "in"
    make_tree(inbox, {"deep/a.jpg": plain(RED), "deep/b.jpg": plain(GREEN)})
    sort_here(inbox, manifest, recursive=True)
    make_tree(inbox, {"deep/a.xmp": b"1", "deep/b.jpg.xmp": b"2", "deep/c.xmp": b"3"})
    counters = sort_here(inbox, manifest, recursive=True)
    assert sorted(read_tree(inbox)) == ["cats/a.jpg", "cats/a.xmp", "deep/c.xmp", "dogs/b.jpg", "dogs/b.jpg.xmp"]
    assert (counters.sidecars, counters.skipped) == (2, 1)


def test_it_follows_for_a_day_and_only_to_a_photo_that_is_there(tmp_path: Path, manifest: Manifest) -> None:
    inbox = tmp_path / "in"
    make_tree(inbox, {"a.jpg": plain(RED), "b.jpg": plain(RED, 1)})
    sort_here(inbox, manifest)
    (inbox / "cats/b.jpg").rename(inbox / "cats/bella.jpg")
    with sqlite3.connect(inbox / ".sorter/history.sqlite3") as history:
        history.execute("UPDATE moves SET done = ? WHERE name = ?", (time.time() - 2 * 86400, b"a.jpg"))
    make_tree(inbox, {"a.xmp": b"1", "b.xmp": b"2"})
    sort_here(inbox, manifest)
    assert sorted(read_tree(inbox)) == ["a.xmp", "b.xmp", "cats/a.jpg", "cats/bella.jpg"]


def test_it_replaces_nothing(tmp_path: Path, manifest: Manifest) -> None:
    inbox = tmp_path / "in"
    make_tree(inbox, {"a.jpg": plain(RED), "a.xmp": b"first"})
    sort_here(inbox, manifest)
    make_tree(inbox, {"a.xmp": b"second"})
    counters = sort_here(inbox, manifest)
    assert read_tree(inbox) == {"cats/a.jpg": plain(RED), "cats/a.xmp": b"first", "a.xmp": b"second"}
    assert counters.left == 1


def test_a_dry_run_leaves_it(tmp_path: Path, manifest: Manifest) -> None:
    inbox = tmp_path / "in"
    files = {"a.jpg": plain(RED), "a.xmp": b"a's"}
    make_tree(inbox, files)
    counters = sort_here(inbox, manifest, dry_run=True)
    assert read_tree(inbox) == files
    assert (counters.photos, counters.sidecars, counters.skipped) == (1, 0, 0)


@pytest.mark.long
def test_a_film_that_arrives_long_after_its_photo_follows_in_the_daemon(tmp_path: Path, start: Start) -> None:
    inbox = tmp_path / "in"
    make_tree(inbox, {"early.aae": b"came before its photo"})
    running = start("run", "--inbox", inbox, "--log-format", "json", "--settle-seconds", "0.3")
    running.wait_for_event("photo.skipped")
    for name, content in of_a_phone(7, RED).items():
        if not name.endswith("MOV"):
            (inbox / name).write_bytes(content)
    (inbox / "early.jpg").write_bytes(plain(GREEN))
    running.wait_for_event("sidecar.moved", 2)
    film = of_a_phone(7, RED)["IMG_0007.MOV"] * 1000
    with (inbox / "IMG_0007.MOV").open("wb") as file:
        for at in range(0, len(film), 4000):
            file.write(film[at : at + 4000])
            file.flush()
            time.sleep(0.1)
    running.wait_for_event("sidecar.moved", 3)
    found = {name.lower(): content for name, content in read_tree(inbox).items()}
    places = {os.path.splitext(name)[0]: os.path.dirname(name) for name in found}
    assert all(places.values()), found.keys()
    assert len(found) == 5
    assert next(content for name, content in found.items() if name.endswith(".mov")) == film
    assert len({os.path.dirname(name) for name in found if "img_0007" in name}) == 1


@pytest.mark.long
def test_a_tree_of_a_phone_is_sorted_and_undone_to_what_it_was(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    for number in range(1, 21):
        make_tree(inbox, of_a_phone(number, RED if number % 2 else GREEN), modified=LONG_AGO + number)
    before = described(inbox)
    sort(inbox)
    assert {name.split("/")[0] for name in read_tree(inbox)} <= {"cats", "dogs"}
    output = undo(inbox, "--last")
    assert described(inbox) == before
    assert "Restored 20 photos and 40 sidecars" in output


@pytest.mark.long
def test_one_photo_goes_back_with_what_follows_it_as_that_is_now(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    make_tree(inbox, {**of_a_phone(1, RED), **of_a_phone(2, RED)})
    sort(inbox)
    (place,) = {path.parent for path in inbox.rglob("IMG_0001.*")}
    (place / "IMG_0001.AAE").write_bytes(b"edited since")
    undo(inbox, place / "IMG_0001.HEIC")
    assert (inbox / "IMG_0001.AAE").read_bytes() == b"edited since"
    assert len(list(inbox.glob("IMG_0001.*"))) == 3
    assert len(list(inbox.glob("*/IMG_0002.*"))) == 3


@pytest.mark.long
def test_it_stays_with_a_photo_that_cannot_go_back(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    make_tree(inbox, of_a_phone(1, RED))
    sort(inbox)
    (inbox / "IMG_0001.HEIC").write_bytes(b"somebody else's")
    output = undo(inbox, "--last", "--json", code=3)
    assert output.count("its photo stays too") == 2
    assert len(list(inbox.glob("*/IMG_0001.*"))) == 3


@pytest.mark.parametrize(
    ("sidecar", "photo", "new", "expected"),
    [
        ("a.xmp", "a.jpg", "a-1.jpg", "a-1.xmp"),
        ("a.jpg.xmp", "a.jpg", "a-1.jpg", "a-1.jpg.xmp"),
        ("a.b.MOV", "a.b.heic", "a.b-12.heic", "a.b-12.MOV"),
        ("a.jpg.json", "a.jpg", "a.jpg", "a.jpg.json"),
    ],
)
def test_its_name_in_the_new_place(sidecar: str, photo: str, new: str, expected: str) -> None:
    assert sidecars.renamed(sidecar, photo, new) == expected


def test_photos_and_sidecars_name_each_other() -> None:
    for of in ("a.jpg", "IMG_1.HEIC", "x.y.png"):
        for name in sidecars.sidecars(of):
            assert sidecars.is_sidecar(name)
            assert of in sidecars.photos(name)
    assert not any(map(sidecars.is_sidecar, itertools.chain(sidecars.photos("a.xmp"), ["a.txt", "xmp"])))


def test_a_name_that_is_too_long_in_the_new_place_is_left_and_holds_up_nothing(
    tmp_path: Path, manifest: Manifest
) -> None:
    inbox, long = tmp_path / "in", "a" * 247 + ".jpg"
    make_tree(inbox, {"b.jpg": plain(RED), "b.xmp": b"b's"})
    pipeline = pipeline_to(inbox, RedGreenEngine(), manifest, Settings(inbox=inbox, once=True))
    sidecar = Inbox(inbox, recursive=False, excluded=frozenset(), settle_seconds=0).look("b.xmp", time.time())
    assert sidecar is not None
    pipeline.follow([Decision(Decoded(sidecar, "skipped"), "sidecar", "cats", name=f"{long}-12.xmp")])
    (outcome,) = pipeline.outcomes(timeout_seconds=10)
    pipeline.close()
    assert (outcome.kind, outcome.detail) == ("left", "cannot be moved: File name too long")


@pytest.mark.long
def test_a_stop_parts_no_photo_from_its_sidecars(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(200)})
    make_tree(inbox, {f"{n}.xmp": b"%d" % n for n in range(200)})
    running = start("run", "--once", "--inbox", inbox)
    running.wait_for_event("photo.sorted", 1)
    running.process.send_signal(signal.SIGTERM)
    assert running.finish()[0] == 3
    found = read_tree(inbox)
    moved = {Path(name) for name in found if name.startswith(("cats/", "dogs/")) and name.endswith(".jpg")}
    assert 0 < len(moved) < 200
    assert all(str(name.with_suffix(".xmp")) in found for name in moved)
    assert all(f"{Path(name).stem}.xmp" in found for name in found if "/" not in name)
