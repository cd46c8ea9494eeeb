"""The mover's promise: each photo stays intact, and nothing is overwritten."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LONG_AGO, as_nobody, hashes, make_tree, read_tree

from sorter.errors import StorageError
from sorter.files import atomic, inodes
from sorter.files.atomic import ChangedError, StayedError, numbered
from sorter.files.photo import Photo
from sorter.inbox.scan import Inbox
from sorter.moving import copies
from sorter.moving import mover as mover_module
from sorter.moving.mover import Mover


def found(root: Path) -> Photo:
    (photo,) = Inbox(root, recursive=True, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    return photo


def move(mover: Mover, photo: Photo, folder: str = "cats") -> str:
    plan = mover.plan(photo, folder)
    try:
        mover.move(plan)
    finally:
        mover.forget(plan)
    return mover.path(plan)


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than tmp_path."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(params=["rename", "link", "across", "across by link"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder for each way to move. No file system here lacks renameat2's flag, so its absence is played."""
    if "link" in request.param:
        monkeypatch.setattr(atomic, "_rename_function", None)
    if "across" in request.param:
        folder: Path = request.getfixturevalue("other_file_system")
        return folder
    return tmp_path / "out"


def test_a_photo_moves_intact(tmp_path: Path, output: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    assert move(Mover(output), found(tmp_path / "in")) == str(output / "cats/a.jpg")
    assert read_tree(tmp_path / "in") == {}
    assert read_tree(output) == {"cats/a.jpg": b"photo"}


def test_a_name_that_is_taken_gets_a_number_and_both_are_kept(tmp_path: Path, output: Path) -> None:
    make_tree(output, {"cats/a.jpg": b"first", "cats/a-1.jpg": b"second"})
    make_tree(tmp_path / "in", {"a.jpg": b"third"})
    move(Mover(output), found(tmp_path / "in"))
    assert read_tree(output) == {"cats/a.jpg": b"first", "cats/a-1.jpg": b"second", "cats/a-2.jpg": b"third"}


def test_time_mode_and_extended_attributes_survive(tmp_path: Path, output: Path) -> None:
    path = make_tree(tmp_path / "in", {"a.jpg": b"photo"}) / "a.jpg"
    path.chmod(0o640)
    os.utime(path, ns=(1_500_000_000_123_456_789, 1_400_000_000_987_654_321))
    try:
        os.setxattr(path, "user.rating", b"5")
    except OSError as error:
        pytest.skip(f"this file system has no extended attributes ({error.strerror})")
    moved = Path(move(Mover(output), found(tmp_path / "in")))
    status = moved.stat()
    assert status.st_mtime_ns == 1_400_000_000_987_654_321
    assert stat.S_IMODE(status.st_mode) == 0o640
    try:
        assert os.getxattr(moved, "user.rating") == b"5"
    except OSError:
        try:
            os.setxattr(moved, "user.probe", b"1")
        except OSError:
            return  # the other file system holds none
        raise


def test_a_copy_runs_as_nobody_else(tmp_path: Path, other_file_system: Path) -> None:
    path = make_tree(tmp_path / "in", {"a.jpg": b"photo"}) / "a.jpg"
    path.chmod(0o6755)
    moved = Path(move(Mover(other_file_system), found(tmp_path / "in")))
    assert stat.S_IMODE(moved.stat().st_mode) == 0o755


def test_a_photo_that_does_not_fit_holds_up_nobody_else(
    tmp_path: Path, other_file_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path / "in", {"large.jpg": b""})
    with (tmp_path / "in/large.jpg").open("r+b") as file:
        file.truncate(1 << 42)
    photo = found(tmp_path / "in")
    with pytest.raises(StayedError, match="free some space"):
        move(Mover(other_file_system), photo)
    monkeypatch.setattr(copies, "_ROOM_BYTES", 1 << 60)  # a disk that is full for all
    monkeypatch.setattr(copies, "copy_contents", no_space)
    with pytest.raises(StorageError, match="No space"):
        move(Mover(other_file_system), photo)
    assert read_tree(other_file_system) == {}


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("output", [".", "deep/out"])
def test_an_inbox_that_is_gone_is_not_recreated_for_its_output(tmp_path: Path, output: str) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    target = Mover(inbox / output)
    move(target, found(inbox))
    inbox.rename(tmp_path / "away")
    with pytest.raises(StorageError, match="No such file"):
        target.check_output(inbox)
    assert [p.name for p in tmp_path.iterdir()] == ["away"]
    inbox.mkdir()
    target.check_output(inbox)
    assert (inbox / output).is_dir()


def test_a_photo_that_is_in_its_folder_already_stays(tmp_path: Path) -> None:
    make_tree(tmp_path, {"in/cats/a.jpg": b"photo"})
    (photo,) = Inbox(tmp_path / "in", recursive=True, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    with pytest.raises(StayedError, match="already"):
        move(Mover(tmp_path / "in"), photo)
    assert read_tree(tmp_path) == {"in/cats/a.jpg": b"photo"}


def test_names_of_any_bytes_survive(tmp_path: Path, output: Path) -> None:
    name = os.fsdecode("katze 🐈\n".encode() + b"\xff\xfe.jpg")
    make_tree(tmp_path / "in", {name: b"photo"})
    move(Mover(output), found(tmp_path / "in"))
    assert read_tree(output) == {f"cats/{name}": b"photo"}


def test_a_photo_that_changed_after_it_was_classified_stays(tmp_path: Path, output: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    photo = found(tmp_path / "in")
    make_tree(tmp_path / "in", {"a.jpg": b"other"}, modified=LONG_AGO + 1)
    with pytest.raises(ChangedError, match="changed"):
        move(Mover(output), photo)
    assert read_tree(tmp_path / "in") == {"a.jpg": b"other"}
    assert read_tree(output) == {}


def test_a_photo_that_became_a_link_stays_and_so_does_what_it_points_to(tmp_path: Path, output: Path) -> None:
    make_tree(tmp_path, {"in/a.jpg": b"photo", "secret/a.jpg": b"photo"})
    photo = found(tmp_path / "in")
    (tmp_path / "in/a.jpg").unlink()
    (tmp_path / "in/a.jpg").symlink_to(tmp_path / "secret/a.jpg")
    with pytest.raises(ChangedError):
        move(Mover(output), photo)
    assert (tmp_path / "in/a.jpg").is_symlink()
    assert read_tree(tmp_path / "secret") == {"a.jpg": b"photo"}
    assert read_tree(output) == {}


def test_a_photo_that_is_gone_is_said_to_be(tmp_path: Path, output: Path) -> None:
    make_tree(tmp_path / "in", {"s/a.jpg": b"photo"})
    photo = found(tmp_path / "in")
    (tmp_path / "in/s/a.jpg").unlink()
    with pytest.raises(ChangedError, match="gone"):
        move(Mover(output), photo)
    (tmp_path / "in/s").rmdir()
    with pytest.raises(ChangedError, match="gone"):
        move(Mover(output), photo)


def test_another_file_that_slips_in_during_the_move_goes_back(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path, {"in/a.jpg": b"photo", "new": b"other photo"})
    photo = found(tmp_path / "in")
    check = atomic.check_removable

    def swapped_after_the_check(folder: int, base: str) -> None:
        check(folder, base)
        if (tmp_path / "new").exists():
            os.link(tmp_path / "in/a.jpg", tmp_path / "kept")
            (tmp_path / "new").replace(tmp_path / "in/a.jpg")

    before = hashes(tmp_path)
    monkeypatch.setattr(mover_module, "check_removable", swapped_after_the_check)
    with pytest.raises(ChangedError):
        move(Mover(output), photo)
    assert (tmp_path / "in/a.jpg").read_bytes() == b"other photo"
    assert set(before) <= set(hashes(tmp_path) + hashes(output))
    assert not any(
        name.endswith((".sorter-part", ".sorter-away")) for name in [*read_tree(output), *read_tree(tmp_path)]
    )


def test_a_copy_that_does_not_fit_leaves_the_photo_and_no_partial_file(
    tmp_path: Path, other_file_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    photo = found(tmp_path / "in")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        move(Mover(other_file_system), photo)
    monkeypatch.undo()
    assert read_tree(tmp_path / "in") == {"a.jpg": b"photo"}
    assert read_tree(other_file_system) == {}


def test_a_destination_folder_that_is_a_link_takes_no_photos(tmp_path: Path) -> None:
    make_tree(tmp_path, {"in/a.jpg": b"photo", "elsewhere/x": b"x"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cats").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        move(Mover(tmp_path / "out"), found(tmp_path / "in"))
    assert read_tree(tmp_path) == {"in/a.jpg": b"photo", "elsewhere/x": b"x"}


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Play a file system that can neither rename without replacing nor make hard links."""

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(atomic, "_rename_function", None)
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(inodes, "_real", {})


def test_where_there_are_no_links_either_a_photo_reserves_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path, {"in/a.jpg": b"photo", "out/cats/a.jpg": b"other"})
    without_links(monkeypatch)
    assert move(Mover(tmp_path / "out"), found(tmp_path / "in")) == str(tmp_path / "out/cats/a-1.jpg")
    assert read_tree(tmp_path) == {"out/cats/a.jpg": b"other", "out/cats/a-1.jpg": b"photo"}


def test_a_reservation_that_cannot_be_used_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path, {"in/a.jpg": b"photo"})
    without_links(monkeypatch)
    rename = os.rename

    def fails_onto_a_reservation(source: str, target: str, **folders: int) -> None:
        if target == "a.jpg":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", fails_onto_a_reservation)
    with pytest.raises(StorageError):
        move(Mover(tmp_path / "out"), found(tmp_path / "in"))
    assert read_tree(tmp_path) == {"in/a.jpg": b"photo"}


def test_what_another_program_writes_into_a_reservation_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path, {"in/a.jpg": b"photo"})
    without_links(monkeypatch)
    is_reservation = atomic.is_reservation

    def replaced_first(folder: int, name: str) -> bool:
        (tmp_path / "out/cats/a.jpg").write_bytes(b"theirs")
        return is_reservation(folder, name)

    monkeypatch.setattr(atomic, "is_reservation", replaced_first)
    with pytest.raises(ChangedError):
        move(Mover(tmp_path / "out"), found(tmp_path / "in"))
    assert read_tree(tmp_path) == {"in/a.jpg": b"photo", "out/cats/a.jpg": b"theirs"}


@pytest.mark.parametrize("mode", [0o555, 0o1777])
@pytest.mark.parametrize("across", [False, True])
def test_a_photo_that_cannot_be_taken_out_of_its_folder_is_not_copied_either(
    mode: int, across: bool, open_to_all: Path, request: pytest.FixtureRequest
) -> None:
    if mode == 0o1777 and os.geteuid() != 0:
        pytest.skip("needs a second user to own the photo")
    output: Path = request.getfixturevalue("other_file_system") if across else open_to_all / "out"
    output.mkdir(exist_ok=True)
    output.chmod(0o777)
    inbox = make_tree(open_to_all / "in", {"a.jpg": b"photo"})
    (inbox / "a.jpg").chmod(0o666)
    inbox.chmod(mode)

    def refused() -> None:
        target = Mover(output)
        for _ in range(2):
            with pytest.raises(StayedError, match=r"(taken out of|removed from) its folder"):
                move(target, found(inbox))

    as_nobody(refused)
    inbox.chmod(0o755)
    assert read_tree(inbox) == {"a.jpg": b"photo"}
    assert read_tree(output) == {}


def test_a_refusal_after_the_copy_takes_the_copy_back(
    tmp_path: Path, other_file_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename_away = atomic._rename_away

    def read_only_inbox(folder: int, base: str, hidden: str) -> None:
        if os.path.samestat(os.fstat(folder), (tmp_path / "in").stat()):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        rename_away(folder, base, hidden)

    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    monkeypatch.setattr(atomic, "_rename_away", read_only_inbox)
    with pytest.raises(StayedError, match="Read-only"):
        move(Mover(other_file_system), found(tmp_path / "in"))
    assert read_tree(tmp_path / "in") == {"a.jpg": b"photo"}
    assert read_tree(other_file_system) == {}


def test_hard_links_of_one_photo_all_move(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"0.jpg": b"photo"})
    for number in range(1, 20):
        os.link(inbox / "0.jpg", inbox / f"{number}.jpg")
    photos = list(Inbox(inbox, recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10))
    target = Mover(tmp_path / "out")
    for photo in photos:
        move(target, photo)
    assert len(read_tree(tmp_path / "out")) == 20


def test_an_output_that_became_another_folder_takes_no_photos(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    target = Mover(tmp_path / "out")
    move(target, found(tmp_path / "in"))
    make_tree(tmp_path / "in", {"b.jpg": b"photo"})
    (tmp_path / "out").rename(tmp_path / "unmounted")
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="no longer the folder"):
        move(target, found(tmp_path / "in"))
    assert read_tree(tmp_path / "in") == {"b.jpg": b"photo"}
    assert read_tree(tmp_path / "out") == {}


def test_no_destination_is_promised_twice(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    target = Mover(tmp_path / "out")
    photo = found(tmp_path / "in")
    assert target.path(target.plan(photo, "cats")) == str(tmp_path / "out/cats/a.jpg")
    assert target.path(target.plan(photo, "cats")) == str(tmp_path / "out/cats/a-1.jpg")


def test_numbers_keep_the_extension_and_the_limit_of_255_bytes() -> None:
    assert numbered("a.jpg", 0) == "a.jpg"
    assert numbered("a.jpg", 12) == "a-12.jpg"
    long = "ä" * 125 + ".jpg"  # 254 bytes
    assert numbered(long, 7).endswith("-7.jpg")
    assert len(os.fsencode(numbered(long, 7))) <= 255
    assert len(os.fsencode(numbered("a." + "x" * 252, 7))) <= 255
    for character in "é猫🐈":
        for length in range(60, 130):  # not in the middle of one, which many file systems refuse
            numbered(character * length + ".jpg", 7).encode()


def test_a_thousand_photos_of_one_name_are_all_kept(tmp_path: Path) -> None:
    target = Mover(tmp_path / "out")
    for number in range(1000):
        make_tree(tmp_path / "in", {"a.jpg": str(number).encode()})
        move(target, found(tmp_path / "in"))
    assert sorted(read_tree(tmp_path / "out").values()) == sorted(str(n).encode() for n in range(1000))


def test_the_folders_of_a_batch_are_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name descriptors")
    monkeypatch.setattr(os, "fsync", counted)
    target = Mover(tmp_path / "out")
    for number in range(5):
        make_tree(tmp_path / "in", {f"{number}.jpg": b"photo"})
        move(target, found(tmp_path / "in"))
    target.settle()
    # The destinations first: a name may be on the disk twice, but never not at all.
    assert synced[0] == str(tmp_path), "the output itself is new"
    assert sorted(synced[1:3]) == [str(tmp_path / "out"), str(tmp_path / "out/cats")]
    assert synced[3:] == [str(tmp_path / "in")]


def test_a_disk_that_fails_at_the_last_step_of_a_copy_leaves_the_photo_once(
    tmp_path: Path, other_file_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path / "in", {"a.jpg": b"photo"})
    unlink, failures = os.unlink, iter([True])

    def fail_once(name: str, *, dir_fd: int) -> None:
        if next(failures, False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(name, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail_once)
        move(Mover(other_file_system), found(tmp_path / "in"))
    assert read_tree(tmp_path / "in") == {}
    assert read_tree(other_file_system) == {"cats/a.jpg": b"photo"}
