"""Photos that a person moved between the folders by hand: found, taken as corrections, and restored by an undo."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import GREEN, LONG_AGO, RED, make_tree, plain, read_tree, small_manifest
from test_corrections import BROWN, Library

from sorter.review.deck import Deck


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path, small_manifest())


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def mv(library: Library, old: str, new: str) -> None:
    """Move a file of the output as a person does."""
    target = library.output / new
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mv", "-n", library.output / old, target], check=True)


def mv_across(library: Library, elsewhere: Path, old: str, new: str) -> None:
    """Move a file to another file system and back: it is another file then."""
    (library.output / new).parent.mkdir(exist_ok=True)
    with open(library.output / old):  # or the copy might get the number of its inode
        subprocess.run(["mv", library.output / old, elsewhere / "on its way"], check=True)
        subprocess.run(["mv", "-n", elsewhere / "on its way", library.output / new], check=True)


def follow(library: Library) -> int:
    with library.review() as review:
        return review.follow_hand_moves()


def verdicts(library: Library) -> list[Any]:
    """The photos by their names in the inbox, with the label that counts and how it came about."""
    query = (
        "SELECT m.source, v.label, v.how FROM verdicts v JOIN moves m ON m.id = v.move "
        "WHERE v.id IN (SELECT max(id) FROM verdicts GROUP BY move) ORDER BY m.source"
    )
    return [(os.fsdecode(source), label, how) for source, label, how in library.rows(query)]


def places(library: Library) -> dict[str, str]:
    """Where the history has each photo, by its name in the inbox."""
    with library.reader() as reader:
        return {entry.name: entry.place for entry in reader.photos()}


def take(library: Library, label: str, *names: str, modified: float = 0) -> None:
    """Sort photos that differ from each other, with times of their own unless one is given."""
    for name in names:
        seed = sum(os.fsencode(name))
        own = LONG_AGO - 10 * seed + 0.123456
        make_tree(library.inbox, {name: plain(RED, seed) + os.fsencode(name)}, modified=modified or own)
    library.take_as(label, *names)


@pytest.fixture
def sorted_library(library: Library) -> Library:
    """Two cats, of which the first has a sidecar, and a dog."""
    take(library, "dog", "c.jpg")
    make_tree(library.inbox, {"a.xmp": b"about a"})
    take(library, "cat", "a.jpg", "b.jpg")
    library.take_as("cat", "a.xmp")
    return library


def test_fifty_photos_moved_by_hand_are_corrections_and_undo_puts_them_back(library: Library) -> None:
    cats, dogs = ([f"{kind}{n}.jpg" for n in range(39)] + [f"{kind}-caf\udce9.jpg"] for kind in "cd")
    take(library, "dog", *dogs)
    take(library, "cat", *cats)
    before = read_tree(library.output)
    for name in cats[-25:]:
        mv(library, f"cats/{name}", f"dogs/{name}")
    for name in dogs[-25:]:
        mv(library, f"dogs/{name}", f"cats/{name}")
    assert follow(library) == 50
    assert verdicts(library) == [(name, "dog", "moved") for name in sorted(cats[-25:], key=os.fsencode)] + [
        (name, "cat", "moved") for name in sorted(dogs[-25:], key=os.fsencode)
    ]
    digests = dict(library.rows("SELECT m.source, digest FROM verdicts v JOIN moves m ON m.id = v.move"))
    assert digests == {
        os.fsencode(name): hashlib.sha256(before[f"{'cats' if name in cats else 'dogs'}/{name}"]).digest()
        for name in (*cats[-25:], *dogs[-25:])
    }
    assert library.rows("SELECT DISTINCT label_was, model FROM verdicts WHERE label = 'dog'") == [("cat", "model")]
    assert set(places(library).values()) == set(read_tree(library.output))
    assert follow(library) == 0, "they are known"
    with closing(Deck(library.output)) as deck:
        cards, _ = deck.page("corrected")
        assert {(card.place, card.said) for card in cards} == {
            *((f"dogs/{name}", "dog") for name in cats[-25:]),
            *((f"cats/{name}", "cat") for name in dogs[-25:]),
        }
        assert {card.place for card in deck.page("least-sure")[0]} == {
            *(f"cats/{name}" for name in cats[:-25]),
            *(f"dogs/{name}" for name in dogs[:-25]),
        }
    library.undo("--last")
    assert read_tree(library.inbox) == {name: before[f"cats/{name}"] for name in cats}
    assert set(read_tree(library.output)) == {f"{'cats' if name in dogs[-25:] else 'dogs'}/{name}" for name in dogs}
    library.undo("--last")
    assert read_tree(library.inbox) == {os.path.basename(place): content for place, content in before.items()}
    assert read_tree(library.output) == {}


def test_undo_looks_for_them_itself_and_a_dry_run_changes_nothing(sorted_library: Library) -> None:
    mv(sorted_library, "cats/a.jpg", "dogs/a.jpg")
    moved = sorted_library.output / "dogs/a.jpg"
    rows = sorted_library.rows("SELECT count(*) FROM moves")
    for chosen in ("--last", moved, sorted_library.output / "dogs"):
        assert f"{moved} → {sorted_library.inbox / 'a.jpg'}" in sorted_library.undo("--dry-run", chosen)
    assert sorted_library.rows("SELECT count(*) FROM moves") == rows
    sorted_library.undo(moved)
    assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "a.xmp"}
    assert set(read_tree(sorted_library.output)) == {"cats/b.jpg", "dogs/c.jpg"}


@pytest.mark.parametrize("has_looked", [True, False])
def test_moved_there_and_back_is_as_if_nothing_had_happened(sorted_library: Library, has_looked: bool) -> None:
    mv(sorted_library, "cats/a.jpg", "dogs/a.jpg")
    if has_looked:
        assert follow(sorted_library) == 1
    mv(sorted_library, "dogs/a.jpg", "cats/a.jpg")
    assert follow(sorted_library) == has_looked
    assert verdicts(sorted_library) == []
    assert places(sorted_library)["a.jpg"] == "cats/a.jpg"
    assert not sorted_library.entry("a.jpg").corrected
    sorted_library.undo("--last")
    assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "b.jpg", "a.xmp"}


def test_a_hand_move_that_is_taken_back_on_the_page_goes_back_to_its_subfolder_and_name(library: Library) -> None:
    names = ("2019/a.jpg", "b.jpg", "2019/c.jpg")
    take(library, "cat", *names)
    before = read_tree(library.output)
    mv(library, "cats/2019/a.jpg", "dogs/other.jpg")
    mv(library, "cats/b.jpg", "dogs/2020/b.jpg")
    mv(library, "cats/2019/c.jpg", "dogs/d.jpg")
    (library.output / "cats/2019").rmdir()
    assert follow(library) == 3
    with library.review() as review:
        back = [review.take_back(library.entry(name).id) for name in names[:2]]
        assert [outcome.error for outcome in back] == ["", ""]
        make_tree(library.output, {"cats/2019/c.jpg": b"a new one"})
        review.take_back(library.entry("2019/c.jpg").id)
    expected = {"cats/2019/c.jpg": b"a new one", "cats/2019/d.jpg": before["cats/2019/c.jpg"]}
    assert read_tree(library.output) == before | expected
    assert set(places(library).values()) == {"cats/2019/a.jpg", "cats/b.jpg", "cats/2019/d.jpg"}


def test_what_a_person_said_on_the_page_is_answered_by_a_later_move(sorted_library: Library) -> None:
    assert sorted_library.correct("a.jpg", "dog") == "dogs/a.jpg"
    mv(sorted_library, "dogs/a.jpg", "cats/a.jpg")
    assert follow(sorted_library) == 1
    assert verdicts(sorted_library) == [("a.jpg", "cat", "moved")]


def test_each_folder_says_what_it_says_and_a_new_name_says_nothing(sorted_library: Library) -> None:
    mv(sorted_library, "cats/a.jpg", "unsure/other.jpg")
    mv(sorted_library, "cats/b.jpg", "cats/2019/renamed.jpg")
    mv(sorted_library, "dogs/c.jpg", "cats/c.jpg")
    assert follow(sorted_library) == 3
    assert verdicts(sorted_library) == [("a.jpg", None, "moved"), ("c.jpg", "cat", "moved")]
    mv(sorted_library, "unsure/other.jpg", "dogs/holiday/a.jpg")
    assert follow(sorted_library) == 1
    assert verdicts(sorted_library)[0] == ("a.jpg", "dog", "moved")
    kinds = {line["path"].removeprefix(f"{sorted_library.output}/"): line["kind"] for line in sorted_library.history()}
    assert kinds["unsure/other.jpg"] == kinds["cats/b.jpg"] == "moved"
    sorted_library.undo("--last")
    assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "b.jpg", "a.xmp"}


def test_a_folder_that_no_photo_was_sorted_into_counts_if_the_model_has_it(library: Library) -> None:
    take(library, "cat", "a.jpg", "b.jpg")
    mv(library, "cats/a.jpg", "dogs/a.jpg")
    mv(library, "cats/b.jpg", "holiday/b.jpg")
    assert follow(library) == 1
    assert places(library) == {"a.jpg": "dogs/a.jpg", "b.jpg": "cats/b.jpg"}
    mv(library, "dogs/a.jpg", "cats/a.jpg")
    library.undo("--last", code=3)
    assert set(read_tree(library.inbox)) == {"a.jpg"}
    assert set(read_tree(library.output)) == {"holiday/b.jpg"}


def test_a_photo_that_became_another_file_is_known_by_its_exact_time_or_its_name(
    sorted_library: Library, elsewhere: Path
) -> None:
    mv_across(sorted_library, elsewhere, "cats/a.jpg", "dogs/renamed.jpg")
    assert follow(sorted_library) == 1
    take(sorted_library, "cat", "d.jpg", "ee.jpg", modified=1_600_000_000)
    mv_across(sorted_library, elsewhere, "cats/d.jpg", "dogs/d.jpg")
    assert follow(sorted_library) == 1
    assert verdicts(sorted_library) == [("a.jpg", "dog", "moved"), ("d.jpg", "dog", "moved")]
    mv_across(sorted_library, elsewhere, "dogs/d.jpg", "cats/d.jpg")
    assert follow(sorted_library) == 1
    mv_across(sorted_library, elsewhere, "dogs/renamed.jpg", "unsure/a.jpg")
    assert follow(sorted_library) == 1
    assert verdicts(sorted_library) == [("a.jpg", None, "moved")]


def test_a_copy_under_another_name_and_with_a_coarse_time_needs_a_digest(library: Library, elsewhere: Path) -> None:
    take(library, "cat", "a.jpg", modified=1_600_000_000)
    mv_across(library, elsewhere, "cats/a.jpg", "cats/renamed.jpg")
    assert follow(library) == 0
    mv_across(library, elsewhere, "cats/renamed.jpg", "cats/a.jpg")
    library.decide(library.verdict("a.jpg", "cat", "confirmed"))  # which records the digest
    mv_across(library, elsewhere, "cats/a.jpg", "dogs/renamed.jpg")
    assert follow(library) == 1
    assert verdicts(library) == [("a.jpg", "dog", "moved")]
    library.undo("--last")
    assert set(read_tree(library.inbox)) == {"a.jpg"}


def test_a_digest_that_differs_is_another_photo(library: Library) -> None:
    take(library, "cat", "a.jpg")
    library.decide(library.verdict("a.jpg", "cat", "confirmed"))
    status = os.stat(library.output / "cats/a.jpg")
    (library.output / "cats/a.jpg").unlink()
    forged = make_tree(library.output, {"dogs/a.jpg": b"x" * status.st_size}) / "dogs/a.jpg"
    os.utime(forged, ns=(status.st_mtime_ns,) * 2)
    assert follow(library) == 0


def test_neither_copies_nor_edited_nor_foreign_photos_are_taken_for_moved_ones(sorted_library: Library) -> None:
    output = sorted_library.output
    shutil.copy2(output / "cats/a.jpg", output / "dogs/a.jpg")  # a copy
    os.link(output / "cats/a.jpg", output / "dogs/link.jpg")
    mv(sorted_library, "cats/b.jpg", "dogs/b.jpg")
    (output / "dogs/b.jpg").write_bytes(plain(GREEN, 3))  # edited
    make_tree(output, {"cats/foreign.jpg": plain(GREEN, 9), "dogs/.hidden.jpg": b"x", "dogs/notes.txt": b"x"})
    before = read_tree(output)
    assert follow(sorted_library) == 0
    assert verdicts(sorted_library) == []
    assert places(sorted_library) == {"a.jpg": "cats/a.jpg", "b.jpg": "cats/b.jpg", "c.jpg": "dogs/c.jpg"}
    sorted_library.undo("--last", code=3)
    assert read_tree(output) == {place: before[place] for place in before if place not in ("cats/a.jpg", "cats/a.xmp")}


def test_two_files_that_could_both_be_the_photo_are_left_alone(sorted_library: Library) -> None:
    output = sorted_library.output
    for name in ("one.jpg", "two.jpg"):
        shutil.copy2(output / "cats/a.jpg", output / "dogs" / name)
        os.link(output / "cats/b.jpg", output / "dogs" / f"link {name}")
    (output / "cats/a.jpg").unlink()
    (output / "cats/b.jpg").unlink()
    assert follow(sorted_library) == 0
    (output / "dogs/two.jpg").unlink()
    (output / "dogs/link two.jpg").unlink()
    assert follow(sorted_library) == 2


def equal(library: Library, *names: str) -> None:
    """Sort photos with the same contents and times."""
    make_tree(library.inbox, {name: plain(RED) for name in names}, modified=1_600_000_000.5)
    library.take_as("cat", *names)


def test_equal_photos_are_told_apart_by_their_names_or_not_at_all(library: Library, elsewhere: Path) -> None:
    equal(library, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    mv(library, "cats/a.jpg", "dogs/x.jpg")
    assert follow(library) == 0, "its inode may have been given to a copy of another one"
    mv(library, "dogs/x.jpg", "dogs/a.jpg")
    mv(library, "cats/b.jpg", "unsure/b.jpg")
    assert follow(library) == 2
    assert verdicts(library) == [("a.jpg", "dog", "moved"), ("b.jpg", None, "moved")]
    mv_across(library, elsewhere, "cats/c.jpg", "dogs/c.jpg")
    mv_across(library, elsewhere, "cats/d.jpg", "dogs/other.jpg")
    follow(library)
    assert places(library)["d.jpg"] == "cats/d.jpg"
    mv(library, "dogs/other.jpg", "unsure/d.jpg")
    follow(library)
    expected = {"a.jpg": "dogs/a.jpg", "b.jpg": "unsure/b.jpg", "c.jpg": "dogs/c.jpg", "d.jpg": "unsure/d.jpg"}
    assert places(library) == expected


def test_photos_of_one_size_that_were_written_in_one_second_are_told_apart(library: Library, elsewhere: Path) -> None:
    for n, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        make_tree(library.inbox, {name: plain(RED) + b"%d" % n}, modified=1_600_000_000.123 + n / 7)
    library.take_as("cat", "a.jpg", "b.jpg", "c.jpg")
    mv(library, "cats/a.jpg", "dogs/x.jpg")
    mv_across(library, elsewhere, "cats/b.jpg", "dogs/y.jpg")
    assert follow(library) == 2
    assert places(library) == {"a.jpg": "dogs/x.jpg", "b.jpg": "dogs/y.jpg", "c.jpg": "cats/c.jpg"}


def test_a_copy_of_an_equal_photo_that_is_still_there_is_not_the_one_that_is_gone(library: Library) -> None:
    equal(library, "a.jpg", "b.jpg")
    (library.output / "dogs").mkdir()
    (library.output / "cats/a.jpg").unlink()
    shutil.copy2(library.output / "cats/b.jpg", library.output / "dogs/copy.jpg")
    assert follow(library) == 0


def test_photos_that_changed_places_are_followed(sorted_library: Library) -> None:
    output = sorted_library.output
    mv(sorted_library, "cats/b.jpg", "cats/c.jpg")
    assert follow(sorted_library) == 1
    for old, new in (("cats/c.jpg", "on its way"), ("dogs/c.jpg", "cats/c.jpg"), ("on its way", "dogs/c.jpg")):
        os.rename(output / old, output / new)
    assert follow(sorted_library) == 2
    assert verdicts(sorted_library) == [("b.jpg", "dog", "moved"), ("c.jpg", "cat", "moved")]
    assert places(sorted_library) == {"a.jpg": "cats/a.jpg", "b.jpg": "dogs/c.jpg", "c.jpg": "cats/c.jpg"}
    sorted_library.undo("--last")
    assert set(read_tree(output)) == {"cats/c.jpg"}


def test_sidecars_that_moved_along_go_back_with_their_photo_and_those_that_stayed_too(sorted_library: Library) -> None:
    mv(sorted_library, "cats/a.jpg", "dogs/renamed.jpg")
    assert follow(sorted_library) == 1  # the sidecar stayed behind
    mv(sorted_library, "dogs/renamed.jpg", "unsure/a.jpg")
    mv(sorted_library, "cats/a.xmp", "unsure/a.xmp")
    (sorted_library.output / "unsure/a.xmp").write_bytes(b"written since")
    assert follow(sorted_library) == 1
    assert sorted_library.rows("SELECT CAST(now_name AS TEXT), now_folder FROM moves WHERE follows IS NOT NULL") == [
        ("a.xmp", "unsure")
    ]
    sorted_library.undo("--last")
    assert read_tree(sorted_library.inbox)["a.xmp"] == b"written since"
    assert set(read_tree(sorted_library.output)) == {"dogs/c.jpg"}


def test_a_sidecar_that_stayed_behind_goes_back_with_its_photo(sorted_library: Library) -> None:
    mv(sorted_library, "cats/a.jpg", "dogs/renamed.jpg")
    sorted_library.undo("--last")
    assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "b.jpg", "a.xmp"}
    assert set(read_tree(sorted_library.output)) == {"dogs/c.jpg"}


def test_a_sidecar_of_another_photo_is_not_taken_along(sorted_library: Library) -> None:
    mv(sorted_library, "cats/a.jpg", "dogs/a.jpg")
    (sorted_library.output / "cats/a.xmp").unlink()
    make_tree(sorted_library.output, {"dogs/a.png": b"of its owner", "dogs/a.xmp": b"of its owner"})
    sorted_library.undo("--last", code=3)
    assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "b.jpg"}
    assert set(read_tree(sorted_library.output)) == {"dogs/a.png", "dogs/a.xmp", "dogs/c.jpg"}


def test_a_photo_that_was_sorted_twice_is_what_its_last_move_made_of_it(sorted_library: Library) -> None:
    os.rename(sorted_library.output / "cats/b.jpg", sorted_library.inbox / "back.jpg")
    sorted_library.take_as("cat", "back.jpg")
    os.link(sorted_library.output / "cats/back.jpg", sorted_library.output / "dogs/link.jpg")
    assert follow(sorted_library) == 0, "it is still there"
    (sorted_library.output / "dogs/link.jpg").unlink()
    mv(sorted_library, "cats/back.jpg", "dogs/back.jpg")
    assert follow(sorted_library) == 1
    assert verdicts(sorted_library) == [("back.jpg", "dog", "moved")]
    sorted_library.undo("--last")
    assert set(read_tree(sorted_library.inbox)) == {"back.jpg"}


def test_a_photo_that_was_sorted_again_out_of_unsure_and_put_back_there_is_followed(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(BROWN)})
    library.sort(min_confidence=0.9)
    library.sort(library.output / "unsure")
    assert set(read_tree(library.output)) == {"cats/a.jpg"}
    mv(library, "cats/a.jpg", "unsure/a.jpg")
    assert follow(library) == 1
    assert verdicts(library) == [("a.jpg", None, "moved")]


def test_links_are_followed_and_removed_by_an_undo(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED), "b.jpg": plain(RED, 1)})
    library.sort(link=True)
    mv(library, "cats/a.jpg", "dogs/renamed.jpg")
    assert follow(library) == 1
    assert verdicts(library) == [("a.jpg", "dog", "moved")]
    library.undo("--last")
    assert read_tree(library.output) == {}
    assert set(read_tree(library.inbox)) == {"a.jpg", "b.jpg"}


def test_a_photo_that_could_not_be_decoded_is_followed_without_a_verdict(library: Library) -> None:
    make_tree(library.inbox, {"a.jpg": plain(RED)[:200]})
    library.sort()
    assert set(read_tree(library.output)) == {"failed/a.jpg"}
    mv(library, "failed/a.jpg", "cats/a.jpg")
    assert follow(library) == 1
    assert verdicts(library) == []
    library.undo("--last")
    assert set(read_tree(library.inbox)) == {"a.jpg"}


def test_what_happens_between_the_search_and_its_record_is_not_recorded(sorted_library: Library) -> None:
    mv(sorted_library, "cats/a.jpg", "dogs/a.jpg")
    mv(sorted_library, "cats/b.jpg", "dogs/b.jpg")
    with sorted_library.review() as review:
        found = review._hand_moves.find()
        assert {move.stray.place for move in found} == {"dogs/a.jpg", "dogs/b.jpg"}
        mv(sorted_library, "dogs/a.jpg", "cats/a.jpg")
        os.rename(sorted_library.output / "dogs/b.jpg", sorted_library.inbox / "b.jpg")
        sorted_library.take_as("dog", "b.jpg")
        with review._locked():
            assert review._hand_moves.record(found, review._history) == 0
    assert verdicts(sorted_library) == []


@contextmanager
def mounted(at: Path) -> Iterator[None]:
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(at)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


def test_a_folder_that_is_another_file_system_is_like_any_other(sorted_library: Library) -> None:
    with mounted(sorted_library.output / "unsure"):
        mv(sorted_library, "cats/a.jpg", "unsure/a.jpg")
        mv(sorted_library, "dogs/c.jpg", "unsure/renamed.jpg")
        assert follow(sorted_library) == 2
        assert verdicts(sorted_library) == [("a.jpg", None, "moved"), ("c.jpg", None, "moved")]
        mv(sorted_library, "unsure/renamed.jpg", "cats/c.jpg")
        sorted_library.undo("--last")
        sorted_library.undo("--last")
        assert set(read_tree(sorted_library.inbox)) == {"a.jpg", "b.jpg", "c.jpg", "a.xmp"}
        assert read_tree(sorted_library.output) == {}
