"""Moves on an object store, in every order of requests: each photo ends once, and nothing is overwritten."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from memory_store import MemoryStore, every_order

from sorter.cluster.object_mover import Moved, ObjectMover
from sorter.cluster.stores import MARK, MODIFIED, Mode, StoredObject
from sorter.errors import FailingObjectError, ObjectError, StoreError

MODES: tuple[Mode, ...] = ("copy", "upload")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sorter.cluster.object_mover.pause", lambda attempt: None)


def contents(store: MemoryStore) -> dict[str, bytes]:
    return {key: data for key, (_, data) in sorted(store.objects.items())}


@pytest.mark.parametrize("mode", MODES)
def test_an_object_arrives_with_its_metadata_a_mark_and_the_time_it_had(store: MemoryStore, mode: Mode) -> None:
    item = store.put("in/a.jpg", b"a", camera="x")
    moved = ObjectMover(store, mode).move(item, "cats/a.jpg")
    assert moved == Moved("moved", "cats/a.jpg", item.etag)
    assert contents(store) == {"cats/a.jpg": b"a"}
    metadata = store.objects["cats/a.jpg"][0].metadata or {}
    assert (metadata["camera"], metadata[MODIFIED]) == ("x", item.modified.isoformat())
    assert len(metadata[MARK]) == 64


@pytest.mark.parametrize("mode", MODES)
def test_a_key_that_is_taken_gets_a_number_also_if_the_photos_are_equal(store: MemoryStore, mode: Mode) -> None:
    store.put("cats/a.jpg", b"same")
    store.put("cats/a-1.jpg", b"other")
    item = store.put("in/a.jpg", b"same")
    assert ObjectMover(store, mode).move(item, "cats/a.jpg").key == "cats/a-2.jpg"
    assert contents(store) == {"cats/a.jpg": b"same", "cats/a-1.jpg": b"other", "cats/a-2.jpg": b"same"}


def test_a_sidecar_whose_name_is_taken_stays(store: MemoryStore) -> None:
    store.put("cats/a.xmp", b"stranger")
    item = store.put("in/a.xmp", b"mine")
    assert ObjectMover(store, "copy").move(item, "cats/a.xmp", numbered=False).kind == "left"
    assert contents(store) == {"cats/a.xmp": b"stranger", "in/a.xmp": b"mine"}


def test_a_photo_that_was_replaced_or_deleted_is_not_moved(store: MemoryStore) -> None:
    first, second = store.put("in/a.jpg", b"old"), store.put("in/b.jpg", b"b")
    store.put("in/a.jpg", b"new")
    del store.objects["in/b.jpg"]
    mover = ObjectMover(store, "copy")
    assert [mover.move(item, f"cats/{item.key}").kind for item in (first, second)] == ["changed", "changed"]
    assert contents(store) == {"in/a.jpg": b"new"}


def test_the_same_bytes_uploaded_again_are_another_photo(store: MemoryStore) -> None:
    mover = ObjectMover(store, "copy")
    assert mover.move(store.put("in/a.jpg", b"a"), "cats/a.jpg").key == "cats/a.jpg"
    assert mover.move(store.put("in/a.jpg", b"a"), "cats/a.jpg").key == "cats/a-1.jpg"


def test_a_key_that_would_be_too_long_leaves_the_photo(store: MemoryStore) -> None:
    item = store.put("ö" * 512, b"a")
    left = ObjectMover(store, "copy").move(item, "cats/" + item.key)
    assert (left.kind, left.reason) == ("left", "its new key would be longer than 1024 bytes")
    assert contents(store) == {item.key: b"a"}


def test_what_the_store_does_not_copy_is_left_and_what_it_does_not_delete_is_said_to_be_there_twice(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = store.put("in/a.jpg", b"a")
    mover = ObjectMover(store, "copy")
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise ObjectError("the store refuses it (AccessDenied)")

        patch.setattr(store, "copy_new", refuse)
        assert mover.move(item, "cats/a.jpg") == Moved("left", reason="the store refuses it (AccessDenied)")
    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_exact", lambda item: "changed")
        left = mover.move(item, "cats/a.jpg")
        assert (left.kind, left.key) == ("left", "cats/a.jpg")
        patch.setattr(store, "delete_exact", refuse)
        assert mover.move(item, "cats/a.jpg") == replace(
            left, reason="the store refuses it (AccessDenied): it is there twice"
        )
    assert mover.move(item, "cats/a.jpg").kind == "moved"
    assert contents(store) == {"cats/a.jpg": b"a"}


def fail_at(store: MemoryStore, patch: pytest.MonkeyPatch, method: str, key: str, times: int = 1_000) -> None:
    """Have a method fail so many times, at one key or, if that is empty, at all."""
    original, left = getattr(store, method), [times]

    def failing(*arguments: Any, **named: Any) -> Any:
        if left[0] and (not key or key in [getattr(argument, "key", argument) for argument in arguments]):
            left[0] -= 1
            raise FailingObjectError("the store fails at it")
        return original(*arguments, **named)

    patch.setattr(store, method, failing)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["copy_new", "head", "delete_exact"])
def test_an_object_at_which_the_store_always_fails_is_left_if_the_store_works_and_otherwise_the_job_ends(
    store: MemoryStore, mode: Mode, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = store.put("in/a.jpg", b"a"), store.put("in/b.jpg", b"b")
    store.put("cats/a.jpg", b"stranger")  # otherwise nobody looks at the object
    mover = ObjectMover(store, mode)
    with monkeypatch.context() as patch:
        fail_at(store, patch, method, "in/a.jpg")
        left = mover.move(first, "cats/a.jpg")
        twice = "cats/a-1.jpg" if method == "delete_exact" else None
        reason = "the store fails at it" + ": it is there twice" * (twice is not None)
        assert (left.kind, left.key, left.reason) == ("left", twice, reason)
        assert mover.move(second, "cats/b.jpg").kind == "moved"
    there = {"cats/a.jpg": b"stranger", "cats/b.jpg": b"b", "in/a.jpg": b"a"}
    assert contents(store) == there | ({twice: b"a"} if twice else {})
    with monkeypatch.context() as patch:
        fail_at(store, patch, method, "")
        with pytest.raises(StoreError, match="fails at it"):
            mover.move(first, "cats/a.jpg")
    assert contents(store) == there | ({twice: b"a"} if twice else {})
    assert mover.move(first, "cats/a.jpg").key == "cats/a-1.jpg"
    assert contents(store) == {"cats/a.jpg": b"stranger", "cats/a-1.jpg": b"a", "cats/b.jpg": b"b"}


@pytest.mark.parametrize("method", ["copy_new", "delete_exact"])
def test_a_store_that_has_recovered_by_the_time_it_is_looked_at_writes_no_photo_off(
    store: MemoryStore, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = store.put("in/a.jpg", b"a")
    fail_at(store, monkeypatch, method, "", times=1)
    assert ObjectMover(store, "copy").move(item, "cats/a.jpg").kind == "moved"
    assert contents(store) == {"cats/a.jpg": b"a"}


def test_a_copy_that_is_there_although_the_store_said_that_it_failed_is_finished(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, original = store.put("in/a.jpg", b"a"), store.copy_new

    def fail_afterwards(*arguments: Any, **named: Any) -> Any:
        original(*arguments, **named)
        raise FailingObjectError("the store fails at it")

    monkeypatch.setattr(store, "copy_new", fail_afterwards)
    assert ObjectMover(store, "copy").move(item, "cats/a.jpg").kind == "moved"
    assert contents(store) == {"cats/a.jpg": b"a"}


@pytest.mark.parametrize("fails", [True, False])
def test_undo_leaves_what_the_store_fails_at_and_ends_where_the_store_fails(
    store: MemoryStore, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover, item = ObjectMover(store, "copy"), store.put("in/a.jpg", b"a")
    moved = mover.move(item, "cats/a.jpg")
    with monkeypatch.context() as patch:
        fail_at(store, patch, "head", "" if fails else "cats/a.jpg")
        if fails:
            with pytest.raises(StoreError):
                mover.move_back(item, moved)
        else:
            assert mover.move_back(item, moved) == Moved("left", reason="the store fails at it")
    assert mover.move_back(item, moved).kind == "moved"
    assert contents(store) == {"in/a.jpg": b"a"}


def test_a_store_that_refuses_a_free_key_for_ever_ends_the_job(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = store.put("in/a.jpg", b"a")
    monkeypatch.setattr(store, "copy_new", lambda *_, **__: None)
    with pytest.raises(StoreError, match="refuses the free key"):
        ObjectMover(store, "copy").move(item, "cats/a.jpg")


@pytest.mark.parametrize("mode", MODES)
def test_undo_brings_a_photo_back_with_its_metadata_and_twice_is_once(store: MemoryStore, mode: Mode) -> None:
    mover, item = ObjectMover(store, mode), store.put("in/a.jpg", b"a", camera="x")
    moved = mover.move(item, "cats/a.jpg")
    back = mover.move_back(item, moved)
    assert (back.kind, back.key) == ("moved", "in/a.jpg")
    assert mover.move_back(item, moved) == back
    assert contents(store) == {"in/a.jpg": b"a"}
    metadata = dict(store.objects["in/a.jpg"][0].metadata or {})
    assert metadata.pop(MARK)
    assert metadata == {"camera": "x", MODIFIED: item.modified.isoformat()}
    assert back.etag != item.etag, "what deletes the original late does not hit what came back"
    again = mover.move(next(store.list("in/")), "cats/a.jpg")
    if mode == "upload":  # it is in parts now, which a store with this mode does not delete on a condition
        assert again.kind == "left"
        return
    assert again.etag != moved.etag, "what deletes the first copy late does not hit the second"
    assert (store.objects[str(again.key)][0].metadata or {})[MODIFIED] == item.modified.isoformat()


def test_undo_leaves_what_was_changed_since_and_what_would_overwrite(store: MemoryStore) -> None:
    mover = ObjectMover(store, "copy")
    items = [store.put(f"in/{name}.jpg", name.encode()) for name in "abc"]
    moved = [mover.move(item, item.key.replace("in", "cats")) for item in items]
    store.put("cats/a.jpg", b"edited")
    store.put("in/b.jpg", b"stranger")
    del store.objects["cats/c.jpg"]
    back = [mover.move_back(item, done) for item, done in zip(items, moved, strict=True)]
    assert [(one.kind, one.reason) for one in back] == [
        ("changed", "it was changed, moved or deleted since it was sorted"),
        ("left", "another object has the key 'in/b.jpg'"),
        ("changed", "it was changed, moved or deleted since it was sorted"),
    ]
    assert contents(store) == {"cats/a.jpg": b"edited", "cats/b.jpg": b"b", "in/b.jpg": b"stranger"}


class Guarded(MemoryStore):
    """A bucket of which one object may not be deleted, as long as that is so."""

    guarded = "in/a.jpg"
    error: ObjectError | StoreError | None = None

    def delete_exact(self, item: StoredObject) -> Literal["deleted", "gone", "changed"]:
        if item.key == self.guarded:
            self.step("delete")
            if self.error is not None:
                raise self.error
            return "changed"
        return super().delete_exact(item)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "fate",
    ["", "denied", "may be deleted", "edited", "edited in place", "original edited", "copy deleted", "both deleted"],
)
def test_undo_of_a_photo_that_is_there_twice_brings_it_back_if_the_original_can_be_deleted(
    mode: Mode, fate: str
) -> None:
    store = Guarded()
    item, mover = store.put("in/a.jpg", b"a", camera="x"), ObjectMover(store, mode)
    left = mover.move(item, "cats/a.jpg")
    assert (left.kind, left.key) == ("left", "cats/a.jpg")
    assert contents(store) == {"cats/a.jpg": b"a", "in/a.jpg": b"a"}
    if fate == "denied":
        store.error = ObjectError("the store refuses it (AccessDenied)")
    if fate in ("may be deleted", "copy deleted", "both deleted"):
        store.guarded = ""
    if "edited" in fate:
        key = "in/a.jpg" if fate == "original edited" else "cats/a.jpg"
        kept = store.objects[key][0].metadata
        edited = store.put(key, b"edited")
        if fate == "edited in place":
            store.objects[key] = replace(edited, metadata=kept), b"edited"
    if fate in ("copy deleted", "both deleted"):
        del store.objects["cats/a.jpg"]
    if fate == "both deleted":
        del store.objects["in/a.jpg"]
    before = contents(store)
    back = mover.move_back_copied(item, left)
    assert mover.move_back_copied(item, left) == back
    if fate in ("may be deleted", "copy deleted"):
        assert (back.kind, back.key) == ("moved", "in/a.jpg")
        assert contents(store) == {"in/a.jpg": b"a"}
        assert (store.objects["in/a.jpg"][0].metadata or {})["camera"] == "x"
        assert back.etag == store.objects["in/a.jpg"][0].etag
        return
    assert (back.kind, contents(store)) == ("changed" if fate == "both deleted" else "left", before)
    if not fate:
        assert back.reason == "the store refuses to delete the original: it is there twice"
    if fate == "edited":
        assert back.reason == "its copy was changed since: the original is where it was"
    if fate == "denied":
        assert back.reason == "the store refuses it (AccessDenied): it is there twice"


def test_a_mover_that_was_thought_dead_beside_the_undo_of_a_photo_that_is_there_twice_loses_nothing() -> None:
    """Whatever it is killed at, and whether or not the original may be deleted by then."""

    def scene() -> tuple[MemoryStore, list[Callable[[], object]], list[Callable[[], object]]]:
        store = Guarded()
        item, mover = store.put("in/a.jpg", b"photo"), ObjectMover(store, "copy")
        left = mover.move(item, "cats/a.jpg")
        finished[:] = [lambda: mover.move_back_copied(item, left)]
        programs: list[Callable[[], object]] = [lambda: mover.move(item, "cats/a.jpg"), finished[0]]
        return store, programs, [lambda: setattr(store, "guarded", "")]

    def judge(store: MemoryStore, results: list[object]) -> None:
        assert isinstance(store, Guarded)
        assert set(contents(store).values()) == {b"photo"}, results
        last = finished[0]()
        assert isinstance(last, Moved)
        if last.kind == "moved":
            assert contents(store) == {"in/a.jpg": b"photo"}, results
        else:
            assert (store.guarded, contents(store)) == ("in/a.jpg", {"in/a.jpg": b"photo", "cats/a.jpg": b"photo"})

    finished: list[Callable[[], object]] = []
    assert every_order(scene, judge, kills=1) > 50


def test_photos_move_from_one_bucket_into_another_and_back() -> None:
    inbox, output = MemoryStore("inbox"), MemoryStore("output")
    item, mover = inbox.put("a.jpg", b"a"), ObjectMover(output, "copy", inbox)
    moved = mover.move(item, "a.jpg")
    assert (contents(inbox), contents(output)) == ({}, {"a.jpg": b"a"})
    assert mover.move_back(item, moved).kind == "moved"
    assert (contents(inbox), contents(output)) == ({"a.jpg": b"a"}, {})


# What somebody else does meanwhile, in one step. Each returns the contents that must be there at the end.


def nobody(store: MemoryStore) -> dict[str, bytes]:
    return {}


def replacer(store: MemoryStore) -> dict[str, bytes]:
    store.put("in/a.jpg", b"new")
    return {"in/a.jpg": b"new"}


def stranger(store: MemoryStore) -> dict[str, bytes]:
    if "cats/a.jpg" in store.objects:
        return {}
    store.put("cats/a.jpg", b"stranger")
    return {"cats/a.jpg": b"stranger"}


def owner(store: MemoryStore) -> dict[str, bytes]:
    store.objects.pop("in/a.jpg", None)
    return {}


Other = Callable[[MemoryStore], dict[str, bytes]]


def play(mode: Mode, other: Other, kills: int) -> int:
    """Two movers of one photo, in every order, then a third that nobody disturbs: what must hold at the end."""
    item = MemoryStore().put("in/a.jpg", b"photo", camera="x")
    kept: dict[str, bytes] = {}

    def scene() -> tuple[MemoryStore, list[Callable[[], object]], list[Callable[[], object]]]:
        store = MemoryStore()
        store.put("in/a.jpg", b"photo", camera="x")
        kept.clear()
        programs: list[Callable[[], object]] = [lambda: ObjectMover(store, mode).move(item, "cats/a.jpg")] * 2
        return store, programs, [] if other is nobody else [lambda: kept.update(other(store))]

    def judge(store: MemoryStore, results: list[object]) -> None:
        last = ObjectMover(store, mode).move(item, "cats/a.jpg")
        found, seen = contents(store), (results, last, store.objects)
        photos = [key for key, data in found.items() if data == b"photo"]
        assert len(photos) == 1 or (not photos and other in (replacer, owner)), seen
        assert photos in ([], ["cats/a.jpg"], ["cats/a-1.jpg"]), seen
        assert {key: data for key, data in found.items() if data != b"photo"} == kept, seen
        assert last.kind == ("moved" if photos else "changed"), seen
        for result in results:
            if result == "killed":
                continue
            assert isinstance(result, Moved), seen
            if mode == "upload" and other in (replacer, owner) and result.kind == "changed":
                continue  # the other one had read the bytes before they were replaced, and wrote them after this look
            assert (result.kind, result.key) == (last.kind, photos[0] if photos else None), seen

    return every_order(scene, judge, kills)


def play_undo(mode: Mode, as_parts: bool) -> tuple[int, int]:
    """Two movers that were thought dead beside an undo of the same photo, in every order: how many, and with doubles.

    Args:
        mode: of all three.
        as_parts: the original was uploaded in parts, and so its copy is made in several requests.
    """
    item = MemoryStore().put("in/a.jpg", b"photo", as_parts=as_parts, camera="x")
    doubles = 0

    def scene() -> tuple[MemoryStore, list[Callable[[], object]], list[Callable[[], object]]]:
        store = MemoryStore()
        store.put("in/a.jpg", b"photo", as_parts=as_parts, camera="x")
        mover = ObjectMover(store, mode)

        def undo() -> Moved:
            return mover.move_back(item, Moved("moved", "cats/a.jpg", item.etag))

        return store, [lambda: mover.move(item, "cats/a.jpg"), undo, lambda: mover.move(item, "cats/a.jpg")], []

    def judge(store: MemoryStore, results: list[object]) -> None:
        nonlocal doubles
        found, seen = contents(store), (results, store.objects, store.changes)
        assert set(found.values()) == {b"photo"}, seen
        _, is_undone, later = "\n".join(map(" ".join, store.changes)).partition("delete cats/a.jpg")
        is_late = bool(is_undone) and "put cats/a.jpg" in later
        assert sorted(found) == (["cats/a.jpg", "in/a.jpg"] if is_late else sorted(found)[:1]), seen
        if is_late:
            doubles += 1

    count = every_order(scene, judge, kills=0)
    assert bool(doubles) == (mode == "upload" or as_parts), "one request looks at the original in the same instant"
    return count, doubles


@pytest.mark.parametrize("as_parts", [False, True])
def test_an_undo_that_was_thought_dead_loses_nothing_of_what_is_sorted_again(
    as_parts: bool, proved: Callable[[str], None]
) -> None:
    doubles = 0

    def scene() -> tuple[MemoryStore, list[Callable[[], object]], list[Callable[[], object]]]:
        store = MemoryStore()
        item, mover = store.put("in/a.jpg", b"photo", as_parts=as_parts), ObjectMover(store, "copy")
        moved = mover.move(item, "cats/a.jpg")

        def undo_and_sort_again() -> None:
            mover.move_back(item, moved)
            (listed,) = store.list("in/")
            mover.move(listed, "dogs/a.jpg")

        return store, [lambda: mover.move_back(item, moved), undo_and_sort_again], []

    def judge(store: MemoryStore, results: list[object]) -> None:
        nonlocal doubles
        found, seen = contents(store), (results, store.objects, store.changes)
        _, _, later = "\n".join(map(" ".join, store.changes)).partition("put dogs/a.jpg\ndelete in/a.jpg")
        is_late = "put in/a.jpg" in later
        assert found == dict.fromkeys(["dogs/a.jpg", *["in/a.jpg"] * is_late], b"photo"), seen
        doubles += is_late

    count = every_order(scene, judge, kills=0)
    assert bool(doubles) == (not as_parts), "what was in parts comes back in one request"
    proved(
        f"two undos of one object{' in parts' * as_parts}, which is then sorted again, {count} orders of requests: "
        f"none lost, {doubles} with it under both keys, by a write that came after it was sorted again"
    )


@pytest.mark.torture
@pytest.mark.whole
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("mode", "as_parts"), [("copy", False), ("copy", True), ("upload", False)])
def test_an_undo_beside_movers_that_were_thought_dead_loses_nothing(
    mode: Mode, as_parts: bool, proved: Callable[[str], None]
) -> None:
    count, doubles = play_undo(mode, as_parts)
    proved(
        f"two movers and an undo of one object{' in parts' * as_parts}, {mode}: {count} orders of requests, none lost, "
        f"{doubles} with it under both keys, by a write that came after the undo"
    )


@pytest.mark.parametrize("other", [nobody, replacer, stranger, owner])
def test_two_movers_of_one_photo_in_every_order_of_their_requests(other: Other) -> None:
    assert play("copy", other, kills=0) > 1


@pytest.mark.torture
@pytest.mark.whole
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", [nobody, replacer, stranger, owner])
def test_two_movers_killed_at_any_request_in_every_order(
    mode: Mode, other: Other, proved: Callable[[str], None]
) -> None:
    kills = 0 if (mode, other) == ("upload", stranger) else 1 if mode == "upload" else 2  # they would take an hour
    count = play(mode, other, kills)
    proved(
        f"two movers of one object, {mode}, {other.__name__}: {count} orders of requests and {kills} kills, moved once"
    )
