"""Photos from subfolders keep them: where they go, what is in the way, and the way back."""

import errno
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GREEN, LONG_AGO, RED, RUN, make_tree, photo, plain, read_tree
from test_retry import BROWN, Folders
from test_undo import sort, sorter, undo

from sorter.classifier.manifest import Manifest
from sorter.cli import console
from sorter.cli.retry import retry
from sorter.decisions import Decision
from sorter.decoding.decoded import Decoded
from sorter.errors import StorageError
from sorter.files import FOLDER
from sorter.files.atomic import StayedError
from sorter.history.reader import Counts
from sorter.history.store import History
from sorter.inbox.scan import Inbox
from sorter.moving import mover as mover_module
from sorter.moving.batch_mover import BatchMover
from sorter.moving.mover import Mover
from sorter.moving.recovery import Plan, Recovered, recover, resolve
from sorter.settings import Settings

ODD = ("caf\udce9", "two\nlines", "-rf", "a folder", "🐈", "trailing.", "cats", "unsure", "a,b;c'd\"e")


@pytest.fixture
def folders(tmp_path: Path, manifest: Manifest) -> Folders:
    return Folders(tmp_path, manifest)


@pytest.fixture
def across(manifest: Manifest, tmp_path: Path) -> Iterator[Folders]:
    """An inbox and an output on two file systems."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        folders = Folders(tmp_path, manifest)
        folders.output = Path(folder, "out")
        yield folders


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Every file and folder with what a move must not change, but for the sorter's own."""
    found: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        if FOLDER not in path.parts:
            content = (path.read_bytes(), status.st_mtime_ns, status.st_mode) if path.is_file() else ("folder",)
            found[str(path.relative_to(root))] = content
    return found


def thousand() -> dict[str, bytes]:
    """Files in 50 folders: equal names, sidecars, what is no photo, and names of any bytes."""
    places = [
        *ODD,
        *(f"20{n:02}/{'paris' if n % 2 else 'rome'}" for n in range(20)),
        *(f"deep/{n}/er" for n in range(20)),
    ]
    files = {}
    for number, place in enumerate([*places, ""]):
        for n in range(15):
            color = GREEN if (number + n) % 3 else RED
            files[os.path.join(place, f"IMG_{n}.jpg")] = plain(color, n)
        files |= {os.path.join(place, f"IMG_{n}.xmp"): b"%d of %d" % (n, number) for n in range(4)}
        files[os.path.join(place, "notes.txt")] = b"%d" % number
    return files


def test_a_thousand_files_keep_their_folders_and_come_back_to_exactly_what_was(folders: Folders) -> None:
    files = thousand()
    make_tree(folders.inbox, files)
    assert (len(files), len({os.path.dirname(name) for name in files})) == (1000, 50)
    before, red = tree(folders.inbox), {plain(RED, n) for n in range(15)}
    counters, _ = folders.sort(recursive=True)
    expected = {}
    for name, content in files.items():
        photo = files.get(name.replace(".xmp", ".jpg"), b"")
        if not name.endswith(".txt"):
            expected[os.path.join("cats" if photo in red else "dogs", name)] = content
    assert read_tree(folders.output) == expected
    assert set(counters.folders) == {"cats", "dogs"}
    assert (counters.photos, counters.sidecars, counters.skipped, counters.left) == (750, 200, 50, 0)
    assert folders.counts() == Counts(dict(counters.folders), 0)
    assert [undone.problem for undone in folders.undo(folders.undoable()) if undone.problem] == []
    assert tree(folders.inbox) == before
    assert read_tree(folders.output) == {}


def test_folders_that_were_removed_are_made_again_by_undo(folders: Folders) -> None:
    make_tree(folders.inbox, {"2019/paris/a.jpg": plain(RED), "2019/paris/a.xmp": b"edits", "b/c.jpg": plain(GREEN)})
    before = tree(folders.inbox)
    folders.sort(recursive=True)
    shutil.rmtree(folders.inbox / "2019")
    (folders.inbox / "b").rmdir()
    folders.undo(folders.undoable())
    assert tree(folders.inbox) == before


def test_photos_that_are_unsure_or_broken_keep_their_folders_too(folders: Folders) -> None:
    files = {"2019/a.jpg": plain(BROWN), "2019/a.xmp": b"edits", "x/y/broken.jpg": plain(RED)[:200]}
    make_tree(folders.inbox, files)
    folders.sort(recursive=True, min_confidence=0.9)
    assert set(read_tree(folders.output)) == {"unsure/2019/a.jpg", "unsure/2019/a.xmp", "failed/x/y/broken.jpg"}


def test_a_name_that_is_taken_gets_a_number_in_its_own_folder_only(folders: Folders) -> None:
    make_tree(folders.output, {"cats/2019/a.jpg": b"first"})
    make_tree(
        folders.inbox, {f"{place}a.jpg": plain(RED) for place in ("", "2019/", "2020/")} | {"2019/a.xmp": b"mine"}
    )
    folders.sort(recursive=True)
    places = {"a.jpg", "2019/a.jpg", "2019/a-1.jpg", "2019/a-1.xmp", "2020/a.jpg"}
    assert set(read_tree(folders.output)) == {f"cats/{place}" for place in places}
    assert (folders.output / "cats/2019/a.jpg").read_bytes() == b"first"


def test_with_flat_every_photo_goes_directly_into_its_folder_and_back(folders: Folders) -> None:
    make_tree(folders.inbox, {f"{place}/a.jpg": plain(RED) for place in ("x", "y", "y/z")} | {"y/a.xmp": b"edits"})
    before = tree(folders.inbox)
    folders.sort(recursive=True, flat=True)
    sorted_ = set(read_tree(folders.output))
    assert {name for name in sorted_ if name.endswith(".jpg")} == {f"cats/a{number}.jpg" for number in ("", "-1", "-2")}
    assert len(sorted_) == 4
    folders.undo(folders.undoable())
    assert tree(folders.inbox) == before


def test_a_late_sidecar_follows_its_photo_to_where_that_went(folders: Folders) -> None:
    make_tree(folders.inbox, {"2019/a.jpg": plain(RED), "2019/b.jpg": plain(RED, 1)})
    folders.sort(recursive=True)
    make_tree(folders.inbox, {"2019/a.xmp": b"a's", "2019/b.jpg.xmp": b"b's"})
    counters, _ = folders.sort(recursive=True, flat=True)
    places = {"a.jpg", "a.xmp", "b.jpg", "b.jpg.xmp"}
    assert (set(read_tree(folders.output)), counters.sidecars) == ({f"cats/2019/{place}" for place in places}, 2)
    (a_photo,) = (entry for entry in folders.undoable() if entry.name == "2019/a.jpg")
    follows = {entry.name: entry.follows for entry in folders.undoable()}
    assert follows["2019/a.xmp"] == a_photo.id


def test_what_was_sorted_into_the_inbox_is_not_sorted_again(tmp_path: Path, manifest: Manifest) -> None:
    folders = Folders(tmp_path, manifest)
    folders.output = folders.inbox
    make_tree(folders.inbox, {"2019/paris/a.jpg": plain(RED)})
    folders.sort(recursive=True)
    counters, _ = folders.sort(recursive=True)
    assert (set(read_tree(folders.inbox)), counters.photos) == ({"cats/2019/paris/a.jpg"}, 0)


# --- what is in the way ---


@pytest.mark.parametrize("obstacle", ["link", "dangling link", "file", "name too long", "path too long"])
def test_what_is_in_a_folders_place_stops_the_photos_of_that_folder_alone(folders: Folders, obstacle: str) -> None:
    elsewhere = folders.inbox.parent / "elsewhere"
    elsewhere.mkdir()
    (folders.output / "cats").mkdir(parents=True)
    place = folders.output / "cats/2019"
    if obstacle == "link":
        place.symlink_to(elsewhere)
    elif obstacle == "dangling link":
        place.symlink_to(folders.inbox.parent / "nowhere")
    elif obstacle == "file":
        place.write_bytes(b"a file")
    files = {"2019/paris/a.jpg": plain(RED), "2019/paris/a.xmp": b"edits", "2020/b.jpg": plain(RED, 1)}
    make_tree(folders.inbox, files)
    with pytest.MonkeyPatch.context() as patch:
        if "long" in obstacle:
            here = len(os.fsencode(folders.output / "cats/2020/b.jpg"))
            patch.setattr(mover_module, "_LONGEST_PATH_BYTES", here if obstacle == "path too long" else 4095)
        if obstacle == "name too long":
            patch.setattr(mover_module, "make_inner_folder", refusing_long_names)
        counters, logs = folders.sort(recursive=True)
    assert (set(read_tree(folders.inbox)), list(elsewhere.iterdir())) == ({"2019/paris/a.jpg", "2019/paris/a.xmp"}, [])
    assert (folders.output / "cats/2020/b.jpg").is_file()
    assert (counters.photos, counters.left, counters.exit_code) == (1, 1, 3)
    (left,) = (log for log in logs if log["event"] == "photo.left")
    reason = "would have too long a path" if obstacle == "path too long" else "cannot be used"
    assert reason in left["reason"]


def refusing_long_names(root: Path, relative: str) -> int:
    """As a file system does whose names are shorter than the inbox's."""
    if "paris" in relative:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), relative)
    from sorter.files.atomic import make_inner_folder

    return make_inner_folder(root, relative)


def test_a_path_that_no_program_could_open_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    (found,) = Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    mover = Mover(tmp_path / "out")
    with pytest.raises(StayedError, match="too long a path"):
        mover.move(mover.plan(found, "cats/" + "/".join(["n" * 200] * 21)))
    assert read_tree(tmp_path) == {"in/a.jpg": b"photo"}


def test_the_destination_itself_in_the_way_is_a_fault_of_the_storage(tmp_path: Path) -> None:
    make_tree(tmp_path, {"in/a.jpg": b"photo", "out/cats": b"a file"})
    (found,) = Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    mover = Mover(tmp_path / "out")
    with pytest.raises(StorageError, match="accepts no photos"):
        mover.move(mover.plan(found, "cats/2019"))


# --- undo, retry, crashes ---


def test_undo_takes_a_folder_of_the_output_by_its_path(folders: Folders) -> None:
    names = ["2019/a.jpg", "2019/paris/b.jpg", "20190/c.jpg", "2020/a.jpg"]
    make_tree(folders.inbox, {name: plain(RED, n) for n, name in enumerate(names)})
    folders.sort(recursive=True)
    with folders.history() as reader:

        def found(place: str) -> set[str]:
            return {entry.name for entry in reader.undoable(path=str(folders.output / place))}

        assert found("cats/2019") == {"2019/a.jpg", "2019/paris/b.jpg"}
        assert found("cats/2019/paris/b.jpg") == {"2019/paris/b.jpg"}
        assert found("cats") == found(".") == set(names)
        assert found("dogs") == found("cats/paris") == set()


def test_nothing_comes_back_through_a_link_in_the_output(folders: Folders) -> None:
    make_tree(folders.inbox, {"2019/a.jpg": plain(RED)})
    folders.sort(recursive=True)
    (folders.output / "cats/2019").rename(folders.inbox.parent / "elsewhere")
    (folders.output / "cats/2019").symlink_to(folders.inbox.parent / "elsewhere")
    (undone,) = folders.undo(folders.undoable())
    assert undone.problem
    assert read_tree(folders.inbox.parent / "elsewhere") == {"a.jpg": plain(RED)}


def test_a_retry_takes_photos_out_of_subfolders_into_the_same_or_leaves_them(folders: Folders) -> None:
    make_tree(folders.inbox, {"2019/paris/a.jpg": plain(BROWN), "2019/paris/a.xmp": b"1", "b/c.jpg": plain(RED)[:200]})
    before = tree(folders.inbox)
    folders.sort(recursive=True, min_confidence=0.9)
    counters, _ = folders.sort("unsure", recursive=True, min_confidence=0.9)
    assert set(read_tree(folders.output / "unsure")) == {"2019/paris/a.jpg", "2019/paris/a.xmp"}
    assert (counters.photos, counters.kept) == (0, {"unsure": 1})
    folders.sort("unsure", recursive=True)
    assert set(read_tree(folders.output)) == {"cats/2019/paris/a.jpg", "cats/2019/paris/a.xmp", "failed/b/c.jpg"}
    assert folders.counts() == Counts({"cats": 1, "failed": 1}, 0)
    for _ in range(2):
        assert [undone for undone in folders.undo(folders.undoable()) if undone.problem] == []
    assert tree(folders.inbox) == before


@pytest.mark.parametrize("moved", [True, False])
def test_a_move_into_a_subfolder_that_a_crash_cut_short_is_finished_or_withdrawn(folders: Folders, moved: bool) -> None:
    make_tree(folders.inbox, {"2019/paris/a.jpg": plain(RED)})
    (folders.output / FOLDER).mkdir(parents=True)
    (found,) = Inbox(folders.inbox, recursive=True, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    history = History(folders.output)
    history.begin(RUN)
    mover = BatchMover(Mover(folders.output), history, patient=False, stopping=threading.Event())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(History if moved else Mover, "settle" if moved else "move", power_cut)
        patch.setattr(History, "settle", power_cut)
        with pytest.raises(KeyboardInterrupt):
            mover.move([Decision(Decoded(found, "pixels"), "sorted", "cats", "cat", 0.9, run=RUN)], lambda _: None)
    assert recover(history, folders.output) == Recovered(int(moved), int(not moved), ())
    history.close()
    assert [entry.destination for entry in folders.undoable()] == (
        [str(folders.output / "cats/2019/paris/a.jpg")] if moved else []
    )


def power_cut(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_planned_folder_that_cannot_exist_does_not_keep_recovery_waiting(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    (found,) = Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    make_tree(tmp_path / "out", {"cats/b.jpg": b"another"})
    assert not resolve(tmp_path / "out", Plan(found, "cats/" + "n" * 300, "a.jpg", "0" * 16))


def test_folders_are_kept_on_another_file_system_and_on_the_way_back(across: Folders) -> None:
    make_tree(
        across.inbox, {f"{place}/a.jpg": plain(RED) for place in ("2019/paris", "x", "caf\udce9")} | {"x/a.xmp": b"1"}
    )
    before = tree(across.inbox)
    across.sort(recursive=True)
    assert read_tree(across.output) == {
        f"cats/{name}": content for name, (content, *_) in before.items() if content != "folder"
    }
    across.undo(across.undoable())
    assert tree(across.inbox) == before


# --- what is told ---


def test_folders_that_sorting_emptied_are_listed_once_and_stay(folders: Folders) -> None:
    files = {f"{n}/a.jpg": plain(RED, n) for n in range(7)} | {
        "7/a.jpg": plain(RED),
        "7/notes.txt": b"",
        "b.jpg": plain(RED),
    }
    make_tree(folders.inbox, files | {"8/deep/a.jpg": plain(RED)})
    (folders.inbox / "was empty before").mkdir()
    counters, logs = folders.sort(recursive=True)
    emptied = [*map(str, range(7)), "8/deep"]
    assert counters.emptied == emptied
    (log,) = (log for log in logs if log["event"] == "inbox.emptied")
    assert (log["folders"], log["first"]) == (8, [str(folders.inbox / name) for name in emptied[:5]])
    lines = console.summary(counters, ["cats", "dogs"], dry_run=False).splitlines()
    assert [line.split() for line in lines[-7:]] == [
        ["folders", "left", "empty", "8"],
        *([f"{number}/"] for number in range(5)),
        ["and", "3", "more"],
    ]
    assert all((folders.inbox / name).is_dir() for name in emptied)


def test_retry_looks_into_subfolders(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders.output / "unsure").mkdir(parents=True)
    asked: list[Settings] = []
    monkeypatch.setattr("sorter.cli.run.run", lambda settings, *, as_json: asked.append(settings))
    retry(Settings(inbox=folders.inbox, output=folders.output), folder="unsure", as_json=False)
    assert (asked[0].recursive, asked[0].inbox, asked[0].flat) == (True, folders.output / "unsure", False)


@pytest.mark.long
def test_the_commands_and_the_hook_name_the_subfolder(tmp_path: Path) -> None:
    inbox = make_tree(
        tmp_path / "in", {"2019/paris/a.jpg": photo(1), "2019/paris/a.xmp": b"edits", "2020/a.jpg": photo(2)}
    )
    before, flags = tree(inbox), ("--output", tmp_path / "out")
    sort(inbox, "--recursive", *flags, "--on-sorted", f"sh -c 'cat >> {tmp_path}/told; echo >> {tmp_path}/told'")
    placed = {str(tmp_path / "out" / name) for name in read_tree(tmp_path / "out")}
    places = {name.partition("/")[2] for name in read_tree(tmp_path / "out")}
    assert places == {"2019/paris/a.jpg", "2019/paris/a.xmp", "2020/a.jpg"}
    calls = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert {told["destination"] for call in calls for told in call["photos"]} == placed
    lines = [json.loads(line) for line in sorter("history", "--json", "--inbox", inbox, *flags).splitlines()]
    assert {line["destination"] for line in lines} == placed
    assert re.search(
        r"2019/paris/a\.jpg +(→|->) +(cats|dogs)/2019/paris/ ", sorter("history", "--inbox", inbox, *flags)
    )
    counts = json.loads(sorter("status", "--json", "--inbox", inbox, *flags))["in_all"]
    assert (set(counts) <= {"cats", "dogs"}, sum(counts.values())) == (True, 2)
    undo(inbox, *flags, "--last")
    assert tree(inbox) == before
    sort(inbox, "--recursive", "--flat", "--include-undone", *flags)
    assert {os.path.dirname(name) for name in read_tree(tmp_path / "out")} <= {"cats", "dogs"}


def test_a_photo_that_is_seen_in_the_output_by_another_path_goes_no_deeper(tmp_path: Path) -> None:
    """As where the output is a bind mount of a folder in the inbox, so that its path does not say so."""
    make_tree(tmp_path / "in", {"out/cats/2019/a.jpg": b"photo"})
    (found,) = Inbox(tmp_path / "in", recursive=True, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    mover = Mover(tmp_path / "in/out")
    with pytest.raises(StayedError, match="already"):
        mover.move(mover.plan(found, "cats/out/cats/2019"))
    assert set(tree(tmp_path / "in")) == {"out", "out/cats", "out/cats/2019", "out/cats/2019/a.jpg"}
