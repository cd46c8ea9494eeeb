"""Every state that a cut-short move can leave behind, made by hand, and the one name after."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LONG_AGO, make_tree, read_tree

from sorter.files import FOLDER
from sorter.files.atomic import away_name, partial_name
from sorter.files.photo import Identity
from sorter.history.store import History, Move, Run
from sorter.inbox.scan import Inbox
from sorter.moving.recovery import Recovered, recover

TOKEN = "0123456789abcdef"
PARTIAL, HIDDEN = partial_name(TOKEN), away_name(TOKEN)


@pytest.fixture
def history(tmp_path: Path) -> History:
    """The history of an output, with one intent: the photo in/a.jpg is to become out/cats/a-1.jpg."""
    make_tree(tmp_path, {"in/a.jpg": b"photo", "out/cats/a.jpg": b"an older one"})
    (tmp_path / "out" / FOLDER).mkdir()
    (found,) = Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0).scan(LONG_AGO + 10)
    history = History(tmp_path / "out")
    history.begin(Run("run", "0", "model"))
    history.intend([Move(TOKEN, "run", tmp_path / "in", "a.jpg", "cats", "a-1.jpg", found.identity, "sorted")])
    return history


def recovered(history: History, root: Path) -> tuple[dict[str, bytes], str]:
    """What is where after recovery, and what the history says: done, withdrawn or open."""
    found = recover(history, root / "out")
    assert (found.moved + found.stayed, len(found.waiting)) in ((1, 0), (0, 1))
    tree = read_tree(root)
    assert tree.pop("out/cats/a.jpg") == b"an older one"
    if found.waiting:
        assert len(history.unfinished()) == 1
        return tree, "open"
    assert history.unfinished() == []
    (count,) = history._connection.execute("SELECT count(*) FROM moves WHERE done IS NOT NULL").fetchone()
    assert count == found.moved
    return tree, "done" if count else "withdrawn"


def copied(source: Path, target: Path) -> None:
    """What the mover's copy looks like: another inode, the same bytes and times."""
    shutil.copy2(source, target)


def test_what_is_recovered_is_so_once(tmp_path: Path, history: History) -> None:
    recovered(history, tmp_path)
    assert recover(history, tmp_path / "out") == Recovered(0, 0, ())


def test_killed_before_the_move(tmp_path: Path, history: History) -> None:
    assert recovered(history, tmp_path) == ({"in/a.jpg": b"photo"}, "withdrawn")


def test_killed_after_a_rename(tmp_path: Path, history: History) -> None:
    (tmp_path / "in/a.jpg").rename(tmp_path / "out/cats/a-1.jpg")
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo"}, "done")


def test_killed_after_a_rename_and_the_name_is_another_photos_now(tmp_path: Path, history: History) -> None:
    (tmp_path / "in/a.jpg").rename(tmp_path / "out/cats/a-1.jpg")
    make_tree(tmp_path, {"in/a.jpg": b"a later photo"})
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo", "in/a.jpg": b"a later photo"}, "done")


def test_killed_after_a_hard_link(tmp_path: Path, history: History) -> None:
    os.link(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo"}, "done")


def test_killed_after_a_hard_link_of_a_file_that_has_changed_since(tmp_path: Path, history: History) -> None:
    os.link(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    make_tree(tmp_path / "in", {"a.jpg": b"photo, edited"})
    assert recovered(history, tmp_path) == ({"in/a.jpg": b"photo, edited"}, "withdrawn")


def test_killed_while_copying(tmp_path: Path, history: History) -> None:
    make_tree(tmp_path / "out/cats", {PARTIAL: b"pho"})
    assert recovered(history, tmp_path) == ({"in/a.jpg": b"photo"}, "withdrawn")


def test_killed_after_the_copy_got_its_name(tmp_path: Path, history: History) -> None:
    copied(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo"}, "done")


def test_killed_while_the_copy_had_both_names(tmp_path: Path, history: History) -> None:
    copied(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    os.link(tmp_path / "out/cats/a-1.jpg", tmp_path / "out/cats" / PARTIAL)
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo"}, "done")


def test_killed_while_the_old_name_was_taken_away(tmp_path: Path, history: History) -> None:
    copied(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    (tmp_path / "in/a.jpg").rename(tmp_path / "in" / HIDDEN)
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo"}, "done")


def test_killed_after_somebody_elses_file_was_taken_away(tmp_path: Path, history: History) -> None:
    copied(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    (tmp_path / "in/a.jpg").unlink()
    make_tree(tmp_path / "in", {HIDDEN: b"somebody else's"})
    tree = {"out/cats/a-1.jpg": b"photo", "in/a.jpg": b"somebody else's"}
    assert recovered(history, tmp_path) == (tree, "done")


def test_killed_while_a_taken_away_name_was_put_back_by_a_link(tmp_path: Path, history: History) -> None:
    os.link(tmp_path / "in/a.jpg", tmp_path / "in" / HIDDEN)
    assert recovered(history, tmp_path) == ({"in/a.jpg": b"photo"}, "withdrawn")


def test_killed_with_only_the_hidden_name_left(tmp_path: Path, history: History) -> None:
    (tmp_path / "in/a.jpg").rename(tmp_path / "in" / HIDDEN)
    assert recovered(history, tmp_path) == ({"in/a.jpg": b"photo"}, "withdrawn")


def test_somebody_elses_file_under_the_planned_name_stays_and_so_does_the_photo(
    tmp_path: Path, history: History
) -> None:
    make_tree(tmp_path, {"out/cats/a-1.jpg": b"other"})
    assert recovered(history, tmp_path) == ({"in/a.jpg": b"photo", "out/cats/a-1.jpg": b"other"}, "withdrawn")


def test_a_photo_that_its_owner_deleted_meanwhile_is_withdrawn(tmp_path: Path, history: History) -> None:
    make_tree(tmp_path, {"out/cats/a-1.jpg": b"not it"})  # first, or it may get the photo's inode
    (tmp_path / "in/a.jpg").unlink()
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"not it"}, "withdrawn")


def test_a_folder_that_was_deleted_meanwhile_is_no_obstacle(tmp_path: Path, history: History) -> None:
    shutil.move(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    (tmp_path / "in").rmdir()
    (tmp_path / "in").mkdir()
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo"}, "done")


def test_a_copy_waits_for_an_inbox_that_is_not_plugged_in(tmp_path: Path, history: History) -> None:
    copied(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    (tmp_path / "in").rename(tmp_path / "unplugged")
    tree = {"out/cats/a-1.jpg": b"photo", "unplugged/a.jpg": b"photo"}
    assert recovered(history, tmp_path) == (tree, "open")
    (tmp_path / "unplugged").rename(tmp_path / "in")
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo"}, "done")


def test_devices_may_have_other_numbers_after_a_restart_of_the_machine(tmp_path: Path, history: History) -> None:
    status = (tmp_path / "in/a.jpg").stat()
    other = Identity(status.st_dev + 77, *Identity.of(status)[1:])
    history.settle([], history.unfinished())
    history.intend([Move(TOKEN, "run", tmp_path / "in", "a.jpg", "cats", "a-1.jpg", other, "sorted")])
    copied(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    assert recovered(history, tmp_path) == ({"out/cats/a-1.jpg": b"photo"}, "done")


def test_killed_while_a_copy_was_taken_back(tmp_path: Path, history: History) -> None:
    copied(tmp_path / "in/a.jpg", tmp_path / "out/cats" / HIDDEN)
    assert recovered(history, tmp_path) == ({"in/a.jpg": b"photo"}, "withdrawn")


@pytest.mark.parametrize("original", [True, False])
def test_killed_while_a_copy_was_taken_back_over_which_its_owner_had_saved_another(
    tmp_path: Path, history: History, original: bool
) -> None:
    make_tree(tmp_path / "out/cats", {HIDDEN: b"edited by its owner"})
    kept = {"in/a.jpg": b"photo"} if original else {}
    if not original:
        (tmp_path / "in/a.jpg").unlink()
    tree = {"out/cats/a-1.jpg": b"edited by its owner", **kept}
    assert recovered(history, tmp_path) == (tree, "withdrawn")


def test_a_link_on_the_way_leads_nowhere(tmp_path: Path, history: History) -> None:
    make_tree(tmp_path, {f"outside/{HIDDEN}": b"precious", "outside/a-1.jpg": b"photo"})
    (tmp_path / "out/cats").rename(tmp_path / "out/was")
    (tmp_path / "out/cats").symlink_to(tmp_path / "outside")
    recover(history, tmp_path / "out")
    assert read_tree(tmp_path / "outside") == {HIDDEN: b"precious", "a-1.jpg": b"photo"}
    assert (tmp_path / "in/a.jpg").read_bytes() == b"photo"


# --- links to photos that stay ---


@pytest.fixture
def linking(tmp_path: Path, history: History) -> History:
    """The same, where out/cats/a-1.jpg is to become a link to in/a.jpg."""
    (planned,) = history.unfinished()
    history.settle([], [planned])
    history.intend([replace(planned, linked=True)])
    return history


@pytest.fixture
def unlinking(tmp_path: Path, linking: History) -> History:
    """The same, where that link is about to be removed."""
    (planned,) = linking.unfinished()
    linking.settle([], [planned])
    linking.intend(
        [
            replace(
                planned,
                root=tmp_path / "out",
                source="cats/a-1.jpg",
                folder="",
                name="a.jpg",
                kind="undone",
                target=tmp_path / "in",
            )
        ]
    )
    return linking


BOTH = {"in/a.jpg": b"photo", "out/cats/a-1.jpg": b"photo"}


def test_killed_before_the_link(tmp_path: Path, linking: History) -> None:
    assert recovered(linking, tmp_path) == ({"in/a.jpg": b"photo"}, "withdrawn")


@pytest.mark.parametrize("make", [os.link, copied])
def test_killed_before_a_link_or_copy_got_its_name(
    make: Callable[[Path, Path], None], tmp_path: Path, linking: History
) -> None:
    make(tmp_path / "in/a.jpg", tmp_path / "out/cats" / PARTIAL)
    assert recovered(linking, tmp_path) == ({"in/a.jpg": b"photo"}, "withdrawn")


@pytest.mark.parametrize("make", [os.link, copied])
def test_killed_after_a_link_or_copy_got_its_name_and_both_stay(
    make: Callable[[Path, Path], None], tmp_path: Path, linking: History
) -> None:
    make(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    assert recovered(linking, tmp_path) == (BOTH, "done")


@pytest.mark.parametrize("make", [os.link, copied])
@pytest.mark.parametrize("meanwhile", ["deleted", "replaced", "unplugged"])
def test_killed_after_a_link_or_copy_whose_photo_its_owner_took_meanwhile(
    meanwhile: str, make: Callable[[Path, Path], None], tmp_path: Path, linking: History
) -> None:
    make(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    kept = {}
    if meanwhile == "unplugged":
        (tmp_path / "in").rename(tmp_path / "unplugged")
        kept = {"unplugged/a.jpg": b"photo"}
    else:
        (tmp_path / "in/a.jpg").unlink()
    if meanwhile == "replaced":
        kept = {"in/a.jpg": b"a later photo"}
        make_tree(tmp_path, kept)
    assert recovered(linking, tmp_path) == ({**kept, "out/cats/a-1.jpg": b"photo"}, "done")


def test_killed_after_a_link_through_which_its_owner_edited_the_photo(tmp_path: Path, linking: History) -> None:
    os.link(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    (tmp_path / "in/a.jpg").write_bytes(b"edited in place")
    tree = {"in/a.jpg": b"edited in place", "out/cats/a-1.jpg": b"edited in place"}
    assert recovered(linking, tmp_path) == (tree, "done")


def test_somebody_elses_file_under_the_name_of_a_link_stays(tmp_path: Path, linking: History) -> None:
    make_tree(tmp_path, {"out/cats/a-1.jpg": b"other"})
    assert recovered(linking, tmp_path) == ({"in/a.jpg": b"photo", "out/cats/a-1.jpg": b"other"}, "withdrawn")


def test_killed_before_a_link_is_removed(tmp_path: Path, unlinking: History) -> None:
    os.link(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    assert recovered(unlinking, tmp_path) == (BOTH, "withdrawn")


@pytest.mark.parametrize("make", [os.link, copied])
@pytest.mark.parametrize("original", [True, False])
def test_killed_while_a_link_or_copy_was_removed_which_gets_its_name_back(
    original: bool, make: Callable[[Path, Path], None], tmp_path: Path, unlinking: History
) -> None:
    make(tmp_path / "in/a.jpg", tmp_path / "out/cats" / HIDDEN)
    if not original:
        (tmp_path / "in/a.jpg").unlink()
    tree = BOTH if original else {"out/cats/a-1.jpg": b"photo"}
    assert recovered(unlinking, tmp_path) == (tree, "withdrawn")


def test_killed_after_a_link_was_removed(tmp_path: Path, unlinking: History) -> None:
    assert recovered(unlinking, tmp_path) == ({"in/a.jpg": b"photo"}, "done")


def test_killed_while_a_removed_link_got_its_name_back_by_another_link(tmp_path: Path, unlinking: History) -> None:
    os.link(tmp_path / "in/a.jpg", tmp_path / "out/cats" / HIDDEN)
    os.link(tmp_path / "in/a.jpg", tmp_path / "out/cats/a-1.jpg")
    assert recovered(unlinking, tmp_path) == (BOTH, "withdrawn")
