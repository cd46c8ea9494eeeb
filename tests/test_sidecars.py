"""What belongs to a photo goes where the photo goes, keeps the pairing, and comes back with it."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import GREEN, LONG_AGO, RED, RUN, RedGreenEngine, Running, make_tree, photo, pipeline_to, plain, read_tree
from test_undo import described, sort, undo

from sorter.classifier.manifest import Manifest
from sorter.decisions import Decision
from sorter.decoding.decoded import Decoded
from sorter.history.reader import HistoryReader
from sorter.inbox.scan import Inbox
from sorter.inbox.selection import Selection
from sorter.inbox.sidecars import FolderListing, SidecarNames
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
    selection = Selection(include=settings.include, sidecar_suffixes=settings.sidecar_suffixes)
    watched = Inbox(inbox, recursive=settings.recursive, excluded=folders, settle_seconds=0.2, selection=selection)
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
    followed = ["cats/deep/a.jpg", "cats/deep/a.xmp", "dogs/deep/b.jpg", "dogs/deep/b.jpg.xmp"]
    assert sorted(read_tree(inbox)) == [*followed[:2], "deep/c.xmp", *followed[2:]]
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


NAMES = SidecarNames()
LONG = "x" * 43 + ".jpg"  # Takeout cuts its sidecar's name in the middle of the extension


@pytest.mark.parametrize(
    ("sidecar", "photo", "new", "expected"),
    [
        ("a.xmp", "a.jpg", "a-1.jpg", "a-1.xmp"),
        ("a.jpg.xmp", "a.jpg", "a-1.jpg", "a-1.jpg.xmp"),
        ("a.b.MOV", "a.b.heic", "a.b-12.heic", "a.b-12.MOV"),
        ("a.jpg.json", "a.jpg", "a.jpg", "a.jpg.json"),
        ("A.XMP", "a.jpg", "a-1.jpg", "a-1.XMP"),
        ("a_HEVC.MOV", "a.HEIC", "a-1.HEIC", "a-1_HEVC.MOV"),
        ("a.CR2.pp3", "a.CR2", "a-1.CR2", "a-1.CR2.pp3"),
        ("a.MP", "a.MP.jpg", "a.MP-1.jpg", "a.MP-1.MP"),
        ("a.MP~2", "a.MP~2.jpg", "a.MP~2-1.jpg", "a.MP~2-1.MP~2"),
        ("a.jpg.supplemental-metadata(1).json", "a(1).jpg", "a(1).jpg", "a.jpg.supplemental-metadata(1).json"),
        ("a.jpg.supplemental-metadata(1).json", "a(1).jpg", "a(1)-1.jpg", "a(1)-1.jpg.json"),
        ("a.jpg.suppl.json", "a.jpg", "a-1.jpg", "a-1.jpg.json"),
        (f"{LONG[:46]}.json", LONG, f"{LONG[:-4]}-1.jpg", f"{LONG[:-4]}-1.jpg.json"),
    ],
)
def test_its_name_in_the_new_place_keeps_the_pairing(sidecar: str, photo: str, new: str, expected: str) -> None:
    assert NAMES.rank(sidecar, photo) is not None
    assert NAMES.renamed(sidecar, photo, new) == expected
    assert NAMES.rank(expected, new) is not None


@pytest.mark.parametrize(
    ("sidecar", "photo"),
    [
        ("IMG_1.JPG.supplemental-metadata.json", "IMG_1.JPG"),
        ("IMG_1.JPG.supplemental-me.json", "IMG_1.JPG"),
        ("IMG_1.JPG.s.json", "IMG_1.JPG"),
        ("IMG_1.JPG..json", "IMG_1.JPG"),
        ("IMG_1.JPG.json", "IMG_1.JPG"),
        ("IMG_1.JPG(1).json", "IMG_1(1).JPG"),
        ("IMG_1.JPG.supplemental-metadata(12).json", "IMG_1(12).JPG"),
        ("IMG_1.JPG.SUPPL.JSON", "IMG_1.JPG"),
        (f"{LONG[:46]}.json", LONG),
        (f"{LONG[:46]}(1).json", f"{LONG[:43]}(1).jpg"),
        ("PXL_1.MP", "PXL_1.MP.jpg"),
        ("PXL_1.MP~3", "PXL_1.MP~3.jpg"),
        ("PXL_1.MP", "PXL_1.jpg"),
        ("PXL_1.MP4", "PXL_1.jpg"),
        ("IMG_1_HEVC.MOV", "IMG_1.HEIC"),
        ("IMG_1.CR2.dop", "IMG_1.CR2"),
        ("IMG_1.WAV", "IMG_1.NEF"),
        ("IMG_1.thm", "IMG_1.CRW"),
    ],
)
def test_what_cameras_editors_and_exports_write_belongs_to_its_photo(sidecar: str, photo: str) -> None:
    assert NAMES.is_sidecar(sidecar)
    assert NAMES.rank(sidecar, photo) is not None
    assert any(photo in names for names in NAMES.photos(sidecar))


@pytest.mark.parametrize(
    ("sidecar", "photo"),
    [
        ("IMG_1.JPG.supplemental-metadata(1).json", "IMG_1.JPG"),
        ("IMG_1.JPG.supplemental-metadata.json", "IMG_1(1).JPG"),
        ("IMG_1.JPG.supplemental-metadata.json", "IMG_1.PNG"),
        ("IMG_1.JPG.supplemental-metadata.json", "IMG_1-edited.JPG"),
        ("IMG_1.JPG.other.json", "IMG_1.JPG"),
        ("IMG_1.s.json", "IMG_1.JPG"),
        (f"{'x' * 46}.json", f"{'x' * 50}.jpg"),  # several photos could be called that
        ("PXL_1.MP~2", "PXL_1.MP.jpg"),
        ("IMG_1.MOV", "IMG_10.HEIC"),
        ("IMG_1.txt", "IMG_1.JPG"),
        (".xmp", ".jpg"),
    ],
)
def test_what_may_be_another_photos_belongs_to_none(sidecar: str, photo: str) -> None:
    assert NAMES.rank(sidecar, photo) is None
    assert not any(photo in names for names in NAMES.photos(sidecar))


TAKEOUT = {
    "IMG_1.JPG": plain(RED, 1),
    "IMG_1.JPG.supplemental-metadata.json": b"1",
    "IMG_1(1).JPG": plain(GREEN, 2),
    "IMG_1.JPG.supplemental-metadata(1).json": b"2",
    "IMG_1.HEIC": plain(GREEN, 3, "HEIF"),
    "IMG_1.HEIC.supplem.json": b"3",
    "PXL_1.jpg": plain(RED, 4),
    "PXL_1.MP.jpg": plain(GREEN, 5),
    "PXL_1.MP": b"film of 5",
    "PXL_1.MP.jpg.supplemental-meta.json": b"5",
    "IMG_1-edited.JPG": plain(GREEN, 6),
    "VID_1.MP4": b"nobody's film",
}


@pytest.mark.parametrize("order", [1, -1])
def test_an_export_of_google_photos_keeps_its_pairs_whichever_photo_is_sorted_first(
    order: int, tmp_path: Path, manifest: Manifest
) -> None:
    for name, content in [*TAKEOUT.items()][::order]:
        make_tree(tmp_path, {name: content})
    sort_here(tmp_path, manifest, batch_size=1)
    cats = ("IMG_1.JPG", "IMG_1.JPG.supplemental-metadata.json", "PXL_1.jpg")
    places = {name: f"cats/{name}" if name in cats else f"dogs/{name}" for name in TAKEOUT} | {"VID_1.MP4": "VID_1.MP4"}
    assert read_tree(tmp_path) == {places[name]: content for name, content in TAKEOUT.items()}


def test_capitals_decide_between_two_photos_and_else_make_no_difference(tmp_path: Path, manifest: Manifest) -> None:
    make_tree(
        tmp_path, {"A.JPG": plain(RED), "a.jpg": plain(GREEN), "a.XMP": b"a's", "b.JPG": plain(RED, 1), "B.Xmp": b"b's"}
    )
    sort_here(tmp_path, manifest)
    assert sorted(read_tree(tmp_path)) == ["cats/A.JPG", "cats/B.Xmp", "cats/b.JPG", "dogs/a.XMP", "dogs/a.jpg"]


def test_the_suffixes_are_a_setting(tmp_path: Path, manifest: Manifest) -> None:
    make_tree(tmp_path, {"a.jpg": plain(RED), "a.xmp": b"1", "a.note": b"2"})
    sort_here(tmp_path, manifest, sidecar_suffixes=(".note",))
    assert sorted(read_tree(tmp_path)) == ["a.xmp", "cats/a.jpg", "cats/a.note"]


def test_the_sidecars_of_included_photos_need_not_be_included(tmp_path: Path, manifest: Manifest) -> None:
    make_tree(
        tmp_path, {"a.jpg": plain(RED), "a.xmp": b"1", "b.png": plain(RED, 1, "PNG"), "b.xmp": b"2", "c.xmp": b"3"}
    )
    counters = sort_here(tmp_path, manifest, include=("*.jpg",))
    assert sorted(read_tree(tmp_path)) == ["b.png", "b.xmp", "c.xmp", "cats/a.jpg", "cats/a.xmp"]
    assert (counters.photos, counters.skipped, counters.left) == (1, 0, 0)
    make_tree(tmp_path, {"a.aae": b"4"})
    sort_here(tmp_path, manifest, include=("*.jpg",))
    assert "cats/a.aae" in read_tree(tmp_path)


def test_a_listing_finds_what_is_there_in_its_own_spelling(tmp_path: Path) -> None:
    make_tree(tmp_path, {"s/IMG.HEIC": b"x", "s/IMG.XMP": b"x", "s/IMG.heic.Xmp": b"x", "s/other.xmp": b"x"})
    listing = FolderListing(tmp_path, "s", NAMES)
    assert sorted(listing.sidecars("IMG.HEIC")) == ["IMG.XMP", "IMG.heic.Xmp"]
    assert listing.photos("IMG.XMP") == ["IMG.HEIC"]
    assert listing.photos("other.xmp") == []
    (tmp_path / "s/IMG.XMP").unlink()
    assert listing.sidecars("IMG.HEIC") == ["IMG.heic.Xmp"]
    make_tree(tmp_path, {"s/IMG.AAE": b"x"})
    listing.add("IMG.AAE")
    assert sorted(listing.sidecars("IMG.HEIC")) == ["IMG.AAE", "IMG.heic.Xmp"]
    assert FolderListing(tmp_path, "gone", NAMES).sidecars("IMG.HEIC") == []


@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_photos_without_sidecars_cost_one_look_at_their_new_name(tmp_path: Path) -> None:
    photos = {f"{number}.jpg": photo(number) for number in range(40)}
    make_tree(tmp_path / "in", photos)
    command = [sys.executable, "-m", "sorter", "run", "--once", "--inbox", str(tmp_path / "in")]
    trace = ["strace", "-f", "-qq", "-e", "trace=access,faccessat,faccessat2", "-o", str(tmp_path / "trace"), *command]
    subprocess.run(trace, check=True, capture_output=True)
    calls = (tmp_path / "trace").read_text(encoding="utf-8", errors="replace").splitlines()
    assert len([call for call in calls if re.search(r'"[^"]*\b\d+\.[a-z.]+"', call)]) <= 50


def test_a_name_that_is_too_long_in_the_new_place_is_left_and_holds_up_nothing(
    tmp_path: Path, manifest: Manifest
) -> None:
    inbox, long = tmp_path / "in", "a" * 247 + ".jpg"
    make_tree(inbox, {"b.jpg": plain(RED), "b.xmp": b"b's"})
    pipeline = pipeline_to(inbox, RedGreenEngine(), manifest, Settings(inbox=inbox, once=True))
    sidecar = Inbox(inbox, recursive=False, excluded=frozenset(), settle_seconds=0).look("b.xmp", time.time())
    assert sidecar is not None
    pipeline.follow([Decision(Decoded(sidecar, "skipped"), "sidecar", "cats", name=f"{long}-12.xmp", run=RUN)])
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
