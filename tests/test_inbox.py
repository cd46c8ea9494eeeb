"""What is in the inbox and settled."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import LONG_AGO, as_nobody, make_tree

from sorter.errors import InboxGoneError
from sorter.files import FOLDER, HISTORY
from sorter.files.photo import Identity, Photo, open_file
from sorter.inbox.scan import Inbox
from sorter.inbox.selection import Selection

NOW = 1_000_000.0


def inbox(root: Path, *, recursive: bool = False, excluded: frozenset[str] = frozenset()) -> Inbox:
    return Inbox(root, recursive=recursive, excluded=excluded, settle_seconds=2.0)


def names(box: Inbox, now: float = NOW) -> set[str]:
    return {photo.name for photo in box.scan(now)}


def test_a_destination_mounted_into_the_inbox_is_not_scanned(tmp_path: Path) -> None:
    make_tree(tmp_path, {"in/a.jpg": b"x", "in/sorted/cats/b.jpg": b"x"})
    (tmp_path / "out").mkdir()
    mount = ["mount", "--bind", str(tmp_path / "in/sorted"), str(tmp_path / "out")]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root, and the right to mount")
    try:
        excluded = frozenset({str(tmp_path / "out/cats")})
        box = Inbox(tmp_path / "in", recursive=True, excluded=excluded, settle_seconds=0)
        assert [photo.name for photo in box.scan(LONG_AGO + 10)] == ["a.jpg"]
    finally:
        subprocess.run(["umount", str(tmp_path / "out")], check=True)


def test_a_file_modified_long_ago_is_settled_at_one_look(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"x"}, modified=NOW - 2.0)
    assert names(inbox(tmp_path)) == {"a.jpg"}


def test_a_young_file_needs_two_looks_that_far_apart(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"x"}, modified=NOW - 0.5)
    box = inbox(tmp_path)
    assert names(box) == set()
    assert box.changing == ["a.jpg"]
    assert names(box, NOW + 1.0) == set()
    assert names(box, NOW + 2.0) == {"a.jpg"}
    assert box.changing == []


def test_the_next_look_is_when_the_first_file_can_be_settled(tmp_path: Path) -> None:
    box = inbox(tmp_path)
    assert box.next_look(NOW) == float("inf")
    make_tree(tmp_path, {"a.jpg": b"x"}, modified=NOW - 0.5)
    make_tree(tmp_path, {"b.jpg": b"x"}, modified=NOW + 9999)
    assert names(box) == set()
    assert box.next_look(NOW) == NOW + 1.5
    assert names(box, NOW + 1.6) == {"a.jpg"}
    assert box.next_look(NOW + 1.6) == NOW + 2.0


def test_a_file_from_the_future_needs_two_looks_that_far_apart(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"x"}, modified=NOW + 9999)
    box = inbox(tmp_path)
    assert names(box) == set()
    assert names(box, NOW + 1.9) == set()
    assert names(box, NOW + 2.1) == {"a.jpg"}


def test_a_growing_file_starts_settling_again(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"x"}, modified=NOW)
    box = inbox(tmp_path)
    assert names(box) == set()
    make_tree(tmp_path, {"a.jpg": b"xx"}, modified=NOW + 1.9)
    assert names(box, NOW + 2.0) == set()
    assert names(box, NOW + 3.9) == {"a.jpg"}


def test_a_file_replaced_at_the_same_size_and_time_starts_settling_again(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"x", "other": b"y"}, modified=NOW + 50)
    box = inbox(tmp_path)
    assert names(box) == set()
    (tmp_path / "other").replace(tmp_path / "a.jpg")
    assert names(box, NOW + 2.5) == set()


def test_a_vanished_file_is_not_waited_for(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"x"}, modified=NOW)
    box = inbox(tmp_path)
    assert names(box) == set()
    (tmp_path / "a.jpg").unlink()
    assert list(box.look_again(NOW + 5)) == []
    assert box.changing == []


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.jpg",
        "._IMG_1.JPG",
        ".syncthing.a.jpg.tmp",
        "~syncthing~a.jpg.tmp",
        ".pending-1700000000-a.jpg",
        "a.jpg.part",
        "A.JPG.PART",
        "a.jpg.crdownload",
        "Unconfirmed 1.crdownload",
        "a.jpg.filepart",
        "a.tmp",
        "~$a.jpg",
        "a.jpg~",
        ".a.jpg.~1a2b3c4d",  # Nextcloud and ownCloud, on a desktop
        "a.jpg.ocTransferId1234.part",  # and on their server
        "a.jpg.!sync",  # Resilio
        "a.jpg.ffs_tmp",  # FreeFileSync
        "a.jpg.1a2b3c4d.partial",  # rclone
        ".a.jpg.x7Yz9Q",  # rsync
        ".goutputstream-ABC123",  # GNOME's file manager
    ],
)
def test_hidden_and_unfinished_files_are_not_photos(name: str, tmp_path: Path) -> None:
    make_tree(tmp_path, {name: b"x"}, modified=NOW - 100)
    box = inbox(tmp_path)
    assert Selection().is_temporary(name)
    assert names(box) == set()
    assert box.look(name, NOW) is None


@pytest.mark.parametrize("name", ["a.jpg", "part.jpg", "tmp", "a~b.jpg", "IMG 1 (2).jpeg"])
def test_ordinary_names_do_not_count_as_unfinished(name: str) -> None:
    assert not Selection().is_temporary(name)


def test_only_regular_files_are_photos(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"sub/b.jpg": b"x"}, modified=NOW - 100)
    make_tree(tmp_path, {"outside.jpg": b"x"}, modified=NOW - 100)
    root = tmp_path / "in"
    os.mkfifo(root / "fifo.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "linked-folder").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket.jpg"))
        assert names(inbox(root)) == set()
        assert names(inbox(root, recursive=True)) == {"sub/b.jpg"}
        assert inbox(root).look("fifo.jpg", NOW) is None
        assert inbox(root).look("link.jpg", NOW) is None


def test_subfolders_are_scanned_only_with_recursive_and_hidden_ones_never(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": b"x", "s/b.jpg": b"x", "s/t/c.jpg": b"x", ".h/d.jpg": b"x"}, modified=NOW - 100)
    assert names(inbox(tmp_path)) == {"a.jpg"}
    box = inbox(tmp_path, recursive=True)
    assert names(box) == {"a.jpg", "s/b.jpg", "s/t/c.jpg"}
    assert box.look("s/t/c.jpg", NOW) is not None
    assert box.look(".h/d.jpg", NOW) is None
    assert inbox(tmp_path).look("s/b.jpg", NOW) is None


@pytest.mark.parametrize(
    "folder",
    [
        "@eaDir",
        "@eadir",  # as a share without capitals shows it
        "#recycle",
        "@Recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "System Volume Information",
        "FOUND.000",
        "lost+found",
        ".Trash-1000",
        ".thumbnails",
        "__MACOSX",
        "thumbnails",
        "My Catalog Previews.lrdata",
        "Photos Library.photoslibrary",
        "iPhoto Library.photolibrary",
        "Aperture.aplibrary",
        "Lightroom Library.lrlibrary",
        "appdata_oc1a2b3c",
    ],
)
def test_trash_thumbnails_and_libraries_of_other_programs_are_never_entered(folder: str, tmp_path: Path) -> None:
    make_tree(tmp_path, {f"{folder}/deep/a.jpg": b"x", f"s/{folder}/b.jpg": b"x", "s/c.jpg": b"x"}, modified=NOW - 100)
    box = inbox(tmp_path, recursive=True)
    assert names(box) == {"s/c.jpg"}
    assert box.look(f"{folder}/deep/a.jpg", NOW) is None
    assert box.look(f"s/{folder}/b.jpg", NOW) is None


@pytest.mark.parametrize("folder", ["2024 #recycled", "Eadir", "my thumbnails", "found", "Library", "photos.library"])
def test_ordinary_folders_are_entered(folder: str, tmp_path: Path) -> None:
    make_tree(tmp_path, {f"{folder}/a.jpg": b"x"}, modified=NOW - 100)
    assert names(inbox(tmp_path, recursive=True)) == {f"{folder}/a.jpg"}


SOME = {"a.jpg": b"x", "b.png": b"x", "Scans/c.jpg": b"x", "Scans/keep.jpg": b"x", "2024/Scans/d.jpg": b"x"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"exclude": ["*.png"]}, {"a.jpg", "Scans/c.jpg", "Scans/keep.jpg", "2024/Scans/d.jpg"}),
        ({"exclude": ["Scans/"]}, {"a.jpg", "b.png"}),
        ({"exclude": ["/Scans/"]}, {"a.jpg", "b.png", "2024/Scans/d.jpg"}),
        ({"exclude": ["/Scans/*", "!keep.jpg"]}, {"a.jpg", "b.png", "Scans/keep.jpg", "2024/Scans/d.jpg"}),
        ({"include": ["*.png", "2024/"]}, {"b.png", "2024/Scans/d.jpg"}),
        ({"include": ["**/Scans/*"], "exclude": ["keep.*"]}, {"Scans/c.jpg", "2024/Scans/d.jpg"}),
    ],
)
def test_patterns_choose_files_and_folders(patterns: dict[str, list[str]], expected: set[str], tmp_path: Path) -> None:
    make_tree(tmp_path, SOME, modified=NOW - 100)
    selection = Selection(**patterns)
    box = Inbox(tmp_path, recursive=True, excluded=frozenset(), settle_seconds=2.0, selection=selection)
    assert names(box) == expected
    assert {name for name in SOME if box.look(name, NOW) is not None} == expected


def test_an_excluded_folder_is_not_even_listed(open_to_all: Path) -> None:
    make_tree(open_to_all, {"locked/a.jpg": b"x"}, modified=NOW - 100)
    (open_to_all / "locked").chmod(0)

    def scanned() -> None:
        selection = Selection(exclude=["locked/"])
        box = Inbox(open_to_all, recursive=True, excluded=frozenset(), settle_seconds=2.0, selection=selection)
        assert names(box) == set()
        assert box.unlisted == {}

    as_nobody(scanned)
    (open_to_all / "locked").chmod(0o755)


def test_the_lists_of_names_can_be_replaced(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg.part": b"x", "b.jpg.wip": b"x", "@eaDir/c.jpg": b"x", "old/d.jpg": b"x"}, modified=0)
    selection = Selection(ignored_folders=["OLD"], temporary_names=["*.wip"])
    box = Inbox(tmp_path, recursive=True, excluded=frozenset(), settle_seconds=2.0, selection=selection)
    assert names(box) == {"a.jpg.part", "@eaDir/c.jpg"}


def test_the_output_folders_inside_the_inbox_are_never_scanned(tmp_path: Path) -> None:
    make_tree(tmp_path, {"cats/a.jpg": b"x", "cats/deep/b.jpg": b"x", "s/cats/c.jpg": b"x"}, modified=NOW - 100)
    box = inbox(tmp_path, recursive=True, excluded=frozenset({str(tmp_path / "cats")}))
    assert names(box) == {"s/cats/c.jpg"}
    assert box.look("cats/a.jpg", NOW) is None
    assert box.look("cats/deep/b.jpg", NOW) is None


def test_a_missing_inbox_is_reported_in_a_sentence(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (tmp_path / "other").mkdir()
    box = inbox(root)
    root.rmdir()
    with pytest.raises(InboxGoneError, match="restore it"):
        names(box)
    with pytest.raises(InboxGoneError):
        box.check()
    (tmp_path / "other").rename(root)
    with pytest.raises(InboxGoneError, match="different folder"):
        box.check()


def test_a_photo_is_not_opened_through_a_folder_that_became_a_link(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"s/a.jpg": b"inside"}, modified=NOW - 100)
    make_tree(tmp_path / "secret", {"a.jpg": b"outside"}, modified=NOW - 100)
    (found,) = inbox(tmp_path / "in", recursive=True).scan(NOW)
    (tmp_path / "in/s").rename(tmp_path / "in/t")
    (tmp_path / "in/s").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        open_file(found)


def test_opening_a_fifo_does_not_wait_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    os.close(open_file(Photo(tmp_path, "a.jpg", Identity(0, 0, 0, 0, 0), NOW)))


def test_a_subfolder_that_cannot_be_listed_is_named(open_to_all: Path) -> None:
    make_tree(open_to_all, {"locked/a.jpg": b"x", "open/b.jpg": b"x"}, modified=NOW - 100)
    (open_to_all / "locked").chmod(0)

    def scanned() -> None:
        box = inbox(open_to_all, recursive=True)
        assert names(box) == {"open/b.jpg"}
        assert list(box.unlisted) == ["locked"]

    as_nobody(scanned)
    (open_to_all / "locked").chmod(0o755)


def test_a_subfolder_that_is_sorted_by_itself_is_left_alone_and_said_so(tmp_path: Path) -> None:
    names = ("a/dogs/x.jpg", "a/new.jpg", f"a/{FOLDER}/{HISTORY}", "b/y.jpg", f"b/{FOLDER}/lock")
    make_tree(tmp_path, dict.fromkeys((*names, "own/dogs/z.jpg", "own/w.jpg", f"own/{FOLDER}/{HISTORY}"), b"x"))
    box = inbox(tmp_path, recursive=True, excluded=frozenset({f"{tmp_path.resolve()}/own/dogs"}))
    later = LONG_AGO + 10
    assert {photo.name for photo in box.scan(later)} == {"b/y.jpg", "own/w.jpg"}
    assert list(box.unlisted) == ["a"]
    assert box.look("a/new.jpg", later) is None
    (tmp_path / "a" / FOLDER / HISTORY).unlink()
    assert {photo.name for photo in box.scan(later)} == {"a/dogs/x.jpg", "a/new.jpg", "b/y.jpg", "own/w.jpg"}
