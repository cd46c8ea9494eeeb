"""A shard's way through a node, a job's lease and its undo, with real decoders, on a store in memory."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal, NoReturn, cast

import pytest
from conftest import GREEN, RED, RedGreenEngine, plain
from memory_store import KilledError, MemoryStore, every_order

from sorter.classifier.manifest import Manifest
from sorter.cli import preflight
from sorter.cli.main import main
from sorter.cluster import exclusion, lease, listing, shard_mover, taking_back
from sorter.cluster import job as jobs
from sorter.cluster import status as statuses
from sorter.cluster.deciding import Decider
from sorter.cluster.job import Job, Totals, unfinished
from sorter.cluster.lease import FRESH_SECONDS, Action, Lease
from sorter.cluster.node import MAX_DEATHS
from sorter.cluster.object_mover import ObjectMover
from sorter.cluster.pool import Finished, Pool, Task
from sorter.cluster.shard_mover import ShardMover
from sorter.cluster.shard_sorter import ShardSorter
from sorter.cluster.shards import Decided
from sorter.cluster.stores import StoredObject
from sorter.cluster.taking_back import take_back
from sorter.errors import ConfigurationError, FailingObjectError, NotNowError, Reason, StoreError
from sorter.inbox.sidecars import SidecarNames
from sorter.settings import Settings

SETTINGS = Settings(batch_size=8, max_megabytes=0.1)
NewSorter = Callable[..., ShardSorter]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def job(store: MemoryStore) -> Job:
    return Job("0123456789ab", store, "in/", store, "sorted/")


@pytest.fixture
def new_sorter(manifest: Manifest, job: Job) -> Iterator[NewSorter]:
    """Nodes that share a model."""
    decider, sorters = Decider(RedGreenEngine(), manifest, SETTINGS, workers=2), []

    def new(*, decide_only: bool = False) -> ShardSorter:
        place = job.place("copy", decide_only=decide_only)
        sorters.append(ShardSorter(decider, SETTINGS, place, job.inbox, job.output))
        return sorters[-1]

    yield new
    for sorter in sorters:
        sorter.close()
    decider.close()


def put(store: MemoryStore, files: dict[str, bytes]) -> list[StoredObject]:
    return sorted((store.put(f"in/{name}", data, camera="x100") for name, data in files.items()), key=lambda i: i.key)


def tree(store: MemoryStore) -> dict[str, bytes]:
    """What is there without the sorter's own files."""
    return {key: data for key, (_, data) in store.objects.items() if ".sorter/" not in key}


def test_photos_keep_their_paths_and_metadata_and_take_their_sidecars_along(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    files = {
        "2019/a.jpg": plain(RED),
        "2019/a.xmp": b"<xmp>",
        "2019/a.jpg.json": b"{}",
        "2020/a.jpg": plain(GREEN),
        "2020/a.aae": b"aae",
        "b.JPG": plain(RED)[:300],
        "note.txt": b"text",
        "alone.xmp": b"nobody's",
        "large.jpg": bytes(200_000),
        "film.avi": bytes(200_000),
    }
    job.files.put_shard("00000", put(store, files))
    result = new_sorter().sort("00000")
    assert tree(store) == {
        "sorted/cats/2019/a.jpg": files["2019/a.jpg"],
        "sorted/cats/2019/a.xmp": files["2019/a.xmp"],
        "sorted/cats/2019/a.jpg.json": files["2019/a.jpg.json"],
        "sorted/dogs/2020/a.jpg": files["2020/a.jpg"],
        "sorted/dogs/2020/a.aae": files["2020/a.aae"],
        "sorted/failed/b.JPG": files["b.JPG"],
        "sorted/failed/large.jpg": files["large.jpg"],
        "in/note.txt": files["note.txt"],
        "in/alone.xmp": files["alone.xmp"],
        "in/film.avi": files["film.avi"],
    }
    assert result.counts == {"cats/": 1, "dogs/": 1, "failed/": 2, "sidecar": 3, "skipped": 3}
    assert {(item.metadata or {}).get("camera") for key, (item, _) in store.objects.items() if "/cats/" in key} == {
        "x100"
    }
    reasons = {row.key: row.reason for row in job.files.read_decisions("00000") or []}
    assert reasons["in/large.jpg"] == Reason.TOO_LARGE
    assert reasons["in/b.JPG"] in (Reason.TRUNCATED, Reason.CORRUPT)


def test_a_strangers_object_keeps_its_name_and_the_sidecar_follows_the_photos_number(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    store.put("sorted/cats/a.jpg", b"a stranger's")
    files = {"a.jpg": plain(RED), "a.xmp": b"<xmp>"}
    job.files.put_shard("00000", put(store, files))
    new_sorter().sort("00000")
    assert tree(store) == {
        "sorted/cats/a.jpg": b"a stranger's",
        "sorted/cats/a-1.jpg": files["a.jpg"],
        "sorted/cats/a-1.xmp": files["a.xmp"],
    }


def test_a_photo_that_was_replaced_since_it_was_listed_stays(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    job.files.put_shard("00000", put(store, {"a.jpg": plain(RED), "b.jpg": plain(RED, 1)}))
    store.put("in/a.jpg", plain(GREEN))
    assert new_sorter().sort("00000").counts == {"changed": 1, "cats/": 1}
    assert set(tree(store)) == {"in/a.jpg", "sorted/cats/b.jpg"}


def test_a_sidecar_that_stays_with_its_photo_is_left_and_not_moved_along(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    files = {"a.jpg": plain(RED), "a.xmp": b"<xmp>", "b.jpg": plain(RED, 1), "b.xmp": b"<xmp>", "c.txt": b"text"}
    job.files.put_shard("00000", put(store, files))
    counts = {"cats/": 2, "sidecar": 2, "skipped": 1}
    assert new_sorter(decide_only=True).sort("00000").counts == counts
    store.put("in/a.jpg", plain(GREEN))
    assert new_sorter().sort("00000").counts == {"changed": 1, "left": 1, "cats/": 1, "sidecar": 1, "skipped": 1}
    assert set(tree(store)) == {"in/a.jpg", "in/a.xmp", "in/c.txt", "sorted/cats/b.jpg", "sorted/cats/b.xmp"}


def test_what_fails_or_stays_is_written_down_with_its_reason_and_status_counts_it(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    files = {"a.jpg": plain(RED), "a.xmp": b"<xmp>", "b.jpg": plain(RED)[:300], "c.jpg": plain(RED, 1), "d.txt": b"d"}
    listed = put(store, files | {"e.jpg": plain(RED, 2), "f.jpg": plain(RED, 3)})
    listed[-2] = replace(listed[-2], storage_class="GLACIER")
    job.files.put_shard("00000", listed)
    new_sorter(decide_only=True).sort("00000")
    store.put("in/a.jpg", plain(GREEN))
    result = new_sorter().sort("00000")
    assert result.counts == {"cats/": 2, "failed/": 1, "left": 2, "changed": 1, "skipped": 1}
    archived = "its storage class is GLACIER: restore it first"
    replaced = "it was replaced or deleted after it was listed"
    assert [(row.key, row.kind, row.reason) for row in result.staying] == [
        ("in/a.jpg", "changed", replaced),
        ("in/a.xmp", "left", "its photo stays"),
        ("in/e.jpg", "left", archived),
    ]
    found = [json.loads(line) for line in store.objects[f"{job.folder}problems/00000.jsonl"][1].splitlines()]
    assert [row["kind"] for row in found] == ["changed", "left", "failed", "left"]
    assert found[2]["reason"].startswith(("truncated: ", "corrupt: "))
    assert statuses.read(job).problems == {"failed": 1, "left": 2, "changed": 1}


def failing(key: str) -> NoReturn:
    raise FailingObjectError(f"the store fails at {key!r}")


def test_what_was_left_is_known_until_it_is_gone_or_becomes_another(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = put(store, {f"{n}.jpg": plain(RED, n) for n in range(3)})
    assert not jobs.any_left(job)
    job.files.put_shard("00000", [replace(item, storage_class="GLACIER") for item in listed[:2]])
    job.files.put_shard("00001", listed[2:])
    for name in ("00000", "00001"):
        new_sorter().sort(name)
    assert jobs.any_left(job)
    del store.objects["in/0.jpg"]
    assert jobs.any_left(job)
    with monkeypatch.context() as patch:
        patch.setattr(store, "head", failing)  # which is why it was left
        assert jobs.any_left(job)
    store.put("in/1.jpg", plain(GREEN))
    assert not jobs.any_left(job)


def test_a_command_names_the_first_20_objects_that_stay(
    store: MemoryStore, job: Job, new_sorter: NewSorter, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [replace(item, storage_class="GLACIER") for item in put(store, {f"{n}.jpg": b"" for n in range(10, 60)})]
    for number in range(4):
        job.files.put_shard(f"0000{number}", listed[number * 12 : number * 12 + 12])
    assert deal(job, MortalNode(new_sorter(), job, "")).counts == {"left": 48}
    told = [line for line in capsys.readouterr().out.splitlines() if "photo.left" in line]
    assert len(told) == 20
    assert "in/10.jpg" in told[0]
    assert "its storage class is GLACIER" in told[0]


def test_what_is_archived_is_left(store: MemoryStore, job: Job, new_sorter: NewSorter) -> None:
    (item,) = put(store, {"a.jpg": plain(RED)})
    job.files.put_shard("00000", [replace(item, storage_class="GLACIER")])
    assert new_sorter().sort("00000").counts == {"left": 1}
    assert set(tree(store)) == {"in/a.jpg"}


def test_the_first_decisions_count_whoever_decides_otherwise(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    job.files.put_shard("00000", put(store, {"a.jpg": plain(RED)}))
    new_sorter(decide_only=True).sort("00000")
    before = job.files.read_decisions("00000")
    assert before is not None
    assert set(tree(store)) == {"in/a.jpg"}
    # A node that has been thought dead comes with its own.
    counted = job.files.put_decisions("00000", [replace(before[0], destination="sorted/dogs/a.jpg")])
    assert counted == before
    new_sorter().sort("00000")
    assert set(tree(store)) == {"sorted/cats/a.jpg"}


def test_moves_by_what_was_decided_before_are_signs_of_life(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_mover, "TRANSFERS", 1)
    job.files.put_shard("00000", put(store, {f"{n}.jpg": plain(RED, n) for n in range(5)} | {"1.xmp": b"<xmp>"}))
    new_sorter(decide_only=True).sort("00000")
    sorter, seen = new_sorter(), list[int]()
    store.step = lambda request: seen.append(sorter.moved) if request == "copy" else None
    sorter.sort("00000")
    assert seen == [0, 1, 2, 3, 4, 5]
    assert sorter.moved == 6


def test_a_finished_shard_is_neither_fetched_nor_moved_again(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.files.put_shard("00000", put(store, {"a.jpg": plain(RED)}))
    new_sorter().sort("00000")
    assert list(jobs.unfinished(job, decide_only=False)) == []
    before = tree(store)
    monkeypatch.setattr(store, "download", lambda *_: pytest.fail("it was decided on before"))
    new_sorter().sort("00000")
    assert tree(store) == before


class MortalNode:
    """A pool of one node that works on two shards at a time and dies of whichever has the poison, if that is open."""

    def __init__(self, sorter: ShardSorter, job: Job, poison: str) -> None:
        self._sorter, self._job, self._poison = sorter, job, poison
        self._tasks: list[Task] = []
        self.deaths = self.photos = 0

    @property
    def in_hand(self) -> int:
        return len(self._tasks)

    @property
    def wants_more(self) -> bool:
        return self.in_hand < 2

    def submit(self, task: Task) -> None:
        self._tasks.insert(0 if task.alone else len(self._tasks), task)

    def wait(self, _: float) -> Iterator[Finished]:
        count = 1 if any(task.alone for task in self._tasks[:2]) else 2
        taken, self._tasks = self._tasks[:count], self._tasks[count:]
        if any(self._dies_of(task.tag) for task in taken):
            self.deaths += 1
            assert self.deaths < 50
            yield from [Finished(task, died=True) for task in taken]
        else:
            yield from [Finished(task, self._sorter.sort(task.tag)) for task in taken]

    def _dies_of(self, shard: str) -> bool:
        files = self._job.files
        fetches = files.deaths(shard) < MAX_DEATHS and shard not in files.finished("decisions")
        return fetches and any(item.key == self._poison for item in files.read_shard(shard))

    def check_progress(self) -> None:
        pass


def deal(job: Job, node: MortalNode) -> Totals:
    """What one command does."""
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    to_do = list(unfinished(job, decide_only=False))
    return jobs.Run(
        cast(Pool, node), to_do, job.files, stopping=lambda: False, check=nothing, on_progress=nothing
    ).run()


def test_a_shard_that_kills_is_halved_and_a_photo_that_kills_is_blamed_and_its_neighbours_are_sorted(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    names = [f"{number}.jpg" for number in range(6)]
    listed = put(store, {name: plain(RED, n) for n, name in enumerate(names)} | {"4.xmp": b"<xmp>"})
    job.files.put_shard("00000", listed[2:])
    job.files.put_shard("00001", listed[:2])
    node = MortalNode(new_sorter(), job, "in/4.jpg")
    totals = deal(job, node)
    assert set(tree(store)) == {
        *(f"sorted/cats/{name}" for name in names if name != "4.jpg"),
        "sorted/failed/4.jpg",
        "sorted/failed/4.xmp",
    }
    assert totals.counts == {"cats/": 5, "failed/": 1, "sidecar": 1}
    assert list(jobs.unfinished(job, decide_only=False)) == []
    # Of 4 photos, of 2, of 1; what was in hand beside it is blamed once.
    assert node.deaths == 3 * MAX_DEATHS
    assert {name: job.files.deaths(name) for name in job.files.shards()} == {
        "00000": 3,
        "00000-0": 0,
        "00000-1": 3,
        "00000-1-0": 3,
        "00000-1-1": 0,
        "00001": 1,
    }


def test_however_many_nodes_died_of_another_shard_one_counts(job: Job) -> None:
    for _ in range(2 * MAX_DEATHS):
        job.files.add_death("00000", alone=False)
    assert job.files.deaths("00000") == 1
    job.files.add_death("00000", alone=True)
    job.files.add_death("00000", alone=True)
    job.files.add_death("00000-1", alone=True)
    assert (job.files.deaths("00000"), job.files.deaths("00000-1")) == (3, 1)


@pytest.mark.parametrize("writes", range(4))
def test_a_shard_whose_split_was_cut_short_is_split_by_the_next_one(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    files = {f"{n}.jpg": plain(RED, n) for n in range(4)}
    job.files.put_shard("00000", put(store, files))
    for _ in range(MAX_DEATHS):
        job.files.add_death("00000", alone=True)
    original = store.put_new
    written: list[str] = []

    def die_after_some(key: str, data: bytes) -> bool:
        if len(written) == writes:
            raise KeyboardInterrupt
        written.append(key)
        return original(key, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_new", die_after_some)
        with pytest.raises(KeyboardInterrupt):
            new_sorter().sort("00000")
    while to_do := list(unfinished(job, decide_only=False)):
        for name in to_do:
            new_sorter().sort(name)
    assert tree(store) == {f"sorted/cats/{name}": data for name, data in files.items()}


@pytest.mark.parametrize("end", [StoreError("the store is away: start again"), KeyboardInterrupt()])
def test_an_attempt_that_the_store_ended_or_of_which_nobody_saw_the_end_is_no_death(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    job.files.put_shard("00000", put(store, {"a.jpg": plain(RED)}))
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise end

        patch.setattr(store, "download", refuse)
        for _ in range(2 * MAX_DEATHS):
            with pytest.raises(type(end)):
                new_sorter().sort("00000")
    assert new_sorter().sort("00000").counts == {"cats/": 1}


def described(inbox: str = "memory://photos/in/", sidecar_suffixes: Iterable[str] = ()) -> dict[str, object]:
    model = {"model": "two-colours", "min_confidence": 0.0, "catch_neither": False}
    folders = ["cats", "dogs", "unsure", "failed"]
    return {"inbox": inbox, "folders": folders, "sidecar_suffixes": [*sidecar_suffixes], **model}


def run(job: Job, new_sorter: NewSorter) -> None:
    """What the command does, without Ray."""
    with exclusion.begin(job, described()):
        jobs.list_inbox(job, preflight.selection(SETTINGS))
        for name in unfinished(job, decide_only=False):
            new_sorter().sort(name)


def test_a_photo_that_the_store_fails_to_give_is_left_and_a_store_that_fails_writes_no_photo_off(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.files.put_shard("00000", put(store, {"a.jpg": plain(RED), "b.jpg": plain(GREEN)}))
    original, read = store.download, store.read

    def fail(item: StoredObject, path: Path) -> None:
        if item.key == "in/b.jpg":
            raise FailingObjectError("s3://photos fails at 'in/b.jpg'")
        original(item, path)

    def fail_at_all(key: str) -> bytes | None:
        if "/cluster/" not in key:
            raise StoreError("s3://photos fails")
        return read(key)

    monkeypatch.setattr(store, "download", fail)
    with monkeypatch.context() as patch:
        patch.setattr(store, "read", fail_at_all)
        with pytest.raises(StoreError):
            new_sorter().sort("00000")
    assert job.files.read_decisions("00000") is None
    assert new_sorter().sort("00000").counts == {"cats/": 1, "left": 1}
    assert sorted(tree(store)) == ["in/b.jpg", "sorted/cats/a.jpg"]


def undo(job: Job) -> dict[str, str]:
    """What became of each object that was not back before."""
    return {row.key: row.kind for row in take_back(job, "copy", SidecarNames())}


def test_undo_brings_all_back_and_what_somebody_was_in_the_way_of_by_the_next_undo(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    files = {"x/a.jpg": plain(RED), "x/a.xmp": b"<xmp>", "b.jpg": plain(GREEN), "c.jpg": plain(RED, 1), "d.txt": b"d"}
    job.files.put_shard("00000", put(store, files))
    before = tree(store)
    new_sorter().sort("00000")
    store.put("in/c.jpg", b"a stranger's")
    assert undo(job) == {
        "sorted/cats/c.jpg": "left",
        **dict.fromkeys(("sorted/cats/x/a.jpg", "sorted/cats/x/a.xmp", "sorted/dogs/b.jpg"), "moved"),
    }
    assert tree(store) == before | {"in/c.jpg": b"a stranger's", "sorted/cats/c.jpg": files["c.jpg"]}
    assert undo(job) == {"sorted/cats/c.jpg": "left"}
    found = statuses.read(job)
    assert (found.undone, found.restored, found.stayed) == (1, 3, 1)
    assert jobs.list_inbox(job, preflight.selection(SETTINGS)) == (1, 1)  # the stranger's alone
    del store.objects["in/c.jpg"]
    assert undo(job) == {"sorted/cats/c.jpg": "moved"}
    assert tree(store) == before
    found = statuses.read(job)
    assert (found.undone, found.restored, found.stayed) == (1, 4, 0)
    assert undo(job) == {}
    assert jobs.list_inbox(job, preflight.selection(SETTINGS)) == (0, 0)


def test_what_was_restored_and_then_edited_or_deleted_is_no_concern_of_the_next_undo(
    store: MemoryStore, job: Job, new_sorter: NewSorter
) -> None:
    job.files.put_shard("00000", put(store, {f"{n}.jpg": plain(RED, n) for n in range(4)}))
    new_sorter().sort("00000")
    store.put("sorted/cats/0.jpg", b"edited")
    assert undo(job)["sorted/cats/0.jpg"] == "changed"
    store.put("in/1.jpg", b"edited")
    del store.objects["in/2.jpg"]
    before = tree(store)
    assert undo(job) == {"sorted/cats/0.jpg": "changed"}
    assert tree(store) == before


@pytest.mark.parametrize("deaths", range(1, 5))
def test_a_second_undo_that_is_killed_is_finished_by_the_third(
    store: MemoryStore, job: Job, new_sorter: NewSorter, deaths: int
) -> None:
    files = {f"{n}.jpg": plain(RED, n) for n in range(3)}
    job.files.put_shard("00000", put(store, files))
    new_sorter().sort("00000")
    strangers = [store.put(f"in/{name}", b"a stranger's") for name in files]
    assert set(undo(job).values()) == {"left"}
    for stranger in strangers:
        store.delete_exact(stranger)
    requests = Counter[str]()

    def die(request: str) -> None:
        requests[request] += 1
        if request == "put" or requests["delete"] == deaths:
            raise KeyboardInterrupt

    store.step = die
    with pytest.raises(KeyboardInterrupt):
        undo(job)
    store.step = lambda request: None
    assert set(undo(job).values()) == {"moved"}
    assert tree(store) == {f"in/{name}": data for name, data in files.items()}
    assert jobs.list_inbox(job, preflight.selection(SETTINGS)) == (0, 0)


@pytest.mark.parametrize("is_second", [False, True])
def test_after_an_undo_that_was_killed_at_any_request_nothing_runs_before_its_end_and_no_photo_is_there_twice(
    store: MemoryStore,
    job: Job,
    new_sorter: NewSorter,
    monkeypatch: pytest.MonkeyPatch,
    is_second: bool,
    proved: Callable[[str], None],
) -> None:
    """The second one tries again what strangers were in the way of."""
    monkeypatch.setattr(taking_back, "TRANSFERS", 1)  # in one order
    monkeypatch.setattr(listing, "SHARD_ROWS", 2)
    monkeypatch.setattr(listing, "AHEAD_ROWS", 4)
    files = {"a.jpg": plain(RED), "a.xmp": b"<xmp>", "b.jpg": plain(GREEN), "c.jpg": plain(RED, 1), "d.txt": b"text"}
    put(store, files)
    before = tree(store)
    run(job, new_sorter)
    assert sum(key.startswith("sorted/") for key in tree(store)) == 4
    if is_second:
        strangers = [store.put(f"in/{name}.jpg", b"a stranger's") for name in "abc"]
        assert "moved" not in undo(job).values()
        for stranger in strangers:
            store.delete_exact(stranger)
    beginning, ends = dict(store.objects), Counter[str]()

    def refused(is_half_done: bool) -> AbstractContextManager[object]:
        return pytest.raises(NotNowError, match=f"--job {job.id}") if is_half_done else nullcontext()

    for at in count(1):
        store.objects = dict(beginning)
        was_killed = _undo_killed(job, store, monkeypatch, at)
        there = tree(store)
        is_half_done = bool(job.files.half_undone())
        assert is_half_done or Counter(there.values()) == Counter(files.values()), "what is twice is known to be"
        ends["waits" if is_half_done else "runs"] += 1
        with refused(is_half_done):
            run(job, new_sorter)
        other = replace(job, id="ba9876543210", inbox_prefix="")
        with refused(is_half_done), exclusion.begin(other, described("memory://photos/")):
            pass
        assert tree(store) == there, "what is back stays, and what was not begun is sorted"
        assert set(undo(job).values()) <= {"moved"}
        assert tree(store) == before
        run(job, new_sorter)
        assert tree(store) == before
        if not was_killed:
            break
    assert min(ends["runs"], ends["waits"]) > 2
    which = "a second undo" if is_second else "an undo"
    proved(f"{which} of 4 objects, killed at each of {at - 1} requests: the next run {dict(ends)}, 0 lost, 0 twice")


def _undo_killed(job: Job, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, at: int) -> bool:
    """Undo, and end at a request as SIGKILL does; whether there were that many."""
    requests = count(1)

    def die(_: str) -> None:
        if next(requests) >= at:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("sorter.cluster.lease.os.getpid", lambda: 2**22 + 1)  # more than any process has
        patch.setattr(store, "step", die)
        try:
            with exclusion.begin(job, described(), "undo"):
                undo(job)
        except KilledError:
            return True
    return False


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], _own_signals: None
) -> Command:
    """`sorter cluster` with the store in memory: what it ends with and prints."""
    monkeypatch.setattr("sorter.cli.object_store.open_store", lambda url: (store, f"{url.rpartition('/')[2]}/"))
    monkeypatch.setattr("sorter.cli.object_store.probe", lambda *_: "copy")

    def run_command(action: str, *flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        places = ("--inbox", "memory://photos/in", "--output", "memory://photos/sorted")
        code = main(["cluster", action, *places, *flags])
        return (code, *capsys.readouterr())

    return run_command


def test_status_tells_an_undo_that_is_under_way_from_one_that_was_interrupted_and_one_that_is_done(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def state() -> str:
        code, out, err = command("status")
        assert code == 0, err
        return str(out.splitlines()[1].removeprefix("state").strip())

    put(store, {f"{n}.jpg": plain(RED, n) for n in range(3)})
    run(job, new_sorter)
    assert state() == "finished"
    with exclusion.begin(job, described()):
        assert state().startswith("running, process ")
    with exclusion.begin(job, described(), "undo"), closing(take_back(job, "copy", SidecarNames())) as rows:
        next(rows)
        assert state().startswith("undo under way, process ")
    assert state() == "undo interrupted: run sorter cluster undo again"
    assert _undo_killed(job, store, monkeypatch, 5)
    assert state() == "undo interrupted: run sorter cluster undo again"
    assert command("undo")[:2] == (0, "Restored 3 objects; 0 could not be restored.\n")
    assert state() == "undone. Restored 3 objects; 0 could not be restored."
    put(store, {"new.jpg": plain(RED, 9)})
    assert jobs.list_inbox(job, preflight.selection(SETTINGS)) == (1, 1)
    assert state() == "not running"
    assert "undone   1 of 1 sorted shards. Restored 3 objects" in command("status")[1]
    run(job, new_sorter)
    assert state() == "finished"


def test_undo_goes_by_the_sidecars_of_the_job_and_not_by_its_own(
    store: MemoryStore, job: Job, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    store.put(f"{job.folder}job.json", json.dumps(described(sidecar_suffixes=[".cat"])).encode())
    store.put("sorted/cats/a.jpg", b"a stranger's")
    job.files.put_shard("00000", put(store, {"a.jpg": plain(RED), "a.cat": b"sidecar"}))
    before = tree(store)
    sidecar = Decided("in/a.cat", "sidecar", "sorted/cats/a.cat", follows="in/a.jpg")
    job.files.put_decisions("00000", [sidecar, Decided("in/a.jpg", "sorted", "sorted/cats/a.jpg")])
    with pytest.raises(KilledError):
        move(job, SidecarNames([".cat"]), dies_before_it_deletes="in/a.cat")
    assert "sorted/cats/a-1.cat" in tree(store)
    assert command("undo")[:2] == (0, "Restored 2 objects; 0 could not be restored.\n")
    assert tree(store) == before


def move(job: Job, sidecars: SidecarNames, dies_before_it_deletes: str = "") -> None:
    """Move the first shard by its decisions."""
    store, deleted = cast(MemoryStore, job.output), job.inbox.delete_exact

    def die(item: StoredObject) -> Literal["deleted", "gone", "changed"]:
        if item.key == dies_before_it_deletes:
            raise KilledError
        return deleted(item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "delete_exact", die)
        with closing(ShardMover(job.files, ObjectMover(store, "copy"), sidecars)) as mover:
            mover.move("00000", job.files.read_decisions("00000") or [])


def test_an_undo_waits_for_every_job_of_its_output_that_is_at_work_or_half_done(
    store: MemoryStore, job: Job, new_sorter: NewSorter, command: Command
) -> None:
    """Such a job would find a key free that it found taken before, and put its photo there once more."""
    other, others = replace(job, id="ba9876543210", inbox_prefix="in2/"), described("memory://photos/in2/")
    put(store, {"a.jpg": plain(RED)})
    run(job, new_sorter)
    with exclusion.begin(other, others):
        code, _, err = command("undo")
        assert (code, "is at work on memory://photos/in2/" in err) == (4, True)
        other.files.put_shard("00000", [store.put("in2/a.jpg", plain(RED, 1))])
        other.files.put_decisions("00000", [Decided("in2/a.jpg", "sorted", "sorted/cats/a.jpg")])
        with pytest.raises(KilledError):
            move(other, SidecarNames(), dies_before_it_deletes="in2/a.jpg")
    assert set(tree(store)) == {"sorted/cats/a.jpg", "sorted/cats/a-1.jpg", "in2/a.jpg"}
    code, _, err = command("undo")
    assert (code, f"the job {other.id} of memory://photos/in2/" in err) == (4, True)
    with exclusion.begin(other, others):
        move(other, SidecarNames())
    assert command("undo")[0] == 0
    assert tree(store) == {"in/a.jpg": plain(RED), "sorted/cats/a-1.jpg": plain(RED, 1)}


def test_no_job_of_an_output_is_run_beside_an_undo(store: MemoryStore, job: Job) -> None:
    other, others = replace(job, id="ba9876543210", inbox_prefix="in2/"), described("memory://photos/in2/")
    with exclusion.begin(job, described(), "undo"):
        with pytest.raises(NotNowError, match="is at work on memory://photos/in/"), exclusion.begin(other, others):
            pass
        with pytest.raises(NotNowError, match="is at work on this job"), exclusion.begin(job, described()):
            pass
    with exclusion.begin(other, others):
        pass


def test_of_two_jobs_that_are_half_done_and_wait_for_each_other_one_can_be_taken_back(
    store: MemoryStore, job: Job, command: Command
) -> None:
    """As two of one inbox may be after a node that was thought dead."""
    other = replace(job, id="ba9876543210")
    for one in (job, other):
        with exclusion.begin(one, described()):
            pass
    for one in (job, other):
        one.files.put_shard("00000", [])
        store.put_new(f"{one.folder}moving/00000", b"")
    for one in (job, other):
        with pytest.raises(NotNowError, match="is not finished"), exclusion.begin(one, described()):
            pass
    assert command("undo", "--job", other.id)[0] == 0
    with exclusion.begin(job, described()):
        pass


def test_an_undo_that_is_killed_beside_a_half_done_job_goes_on(
    store: MemoryStore, job: Job, new_sorter: NewSorter, command: Command
) -> None:
    """Otherwise each would wait for the other: the undo for the job, and the job for the end of the undo."""
    other = replace(job, id="ba9876543210")
    for one in (job, other):
        with exclusion.begin(one, described()):
            pass
    put(store, {"a.jpg": plain(RED)})
    run(job, new_sorter)
    store.put_new(f"{other.folder}moving/00000", b"")
    assert command("undo", "--job", job.id)[0] == 4
    job.files.begin_undo("00000", 1)  # as of an undo that was allowed, because both were half done
    with pytest.raises(NotNowError, match="was interrupted"), exclusion.begin(other, described()):
        pass
    assert command("undo", "--job", job.id)[0] == 0
    assert tree(store) == {"in/a.jpg": plain(RED)}


def test_undo_names_what_could_not_be_deleted_and_brings_it_back_once_it_can(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, {"a.jpg": plain(RED), "a.xmp": b"<xmp>", "b.jpg": plain(GREEN), "c.jpg": plain(RED, 1)})
    before, original = tree(store), store.delete_exact

    def refuse(item: StoredObject) -> Literal["deleted", "gone", "changed"]:
        return "changed" if item.key in ("in/a.jpg", "in/c.jpg") else original(item)

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_exact", refuse)
        run(job, new_sorter)
        copies = {"sorted/cats/a.jpg", "sorted/cats/c.jpg"}
        assert set(tree(store)) == {*before, *copies, "sorted/dogs/b.jpg"} - {"in/b.jpg"}
        store.put("sorted/cats/c.jpg", b"edited")
        assert undo(job) == {"sorted/cats/a.jpg": "left", "sorted/dogs/b.jpg": "moved", "sorted/cats/c.jpg": "left"}
        assert set(tree(store)) == {*before, *copies}
    assert undo(job) == {"sorted/cats/a.jpg": "moved", "sorted/cats/c.jpg": "left"}
    assert tree(store) == before | {"sorted/cats/c.jpg": b"edited"}
    run(job, new_sorter)
    assert tree(store) == before | {"sorted/cats/c.jpg": b"edited"}


@pytest.mark.parametrize("fate", ["in the way", "edited", "deleted"])
def test_a_sidecar_stays_with_a_photo_that_undo_cannot_restore(
    store: MemoryStore, job: Job, new_sorter: NewSorter, fate: str
) -> None:
    files = {"a.jpg": plain(RED), "a.jpg.json": b"{}", "a.xmp": b"<xmp>", "b.jpg": plain(RED, 1), "b.xmp": b"<b>"}
    job.files.put_shard("00000", put(store, files))
    new_sorter().sort("00000")
    if fate == "in the way":
        store.put("in/a.jpg", b"a stranger's")
    elif fate == "edited":
        store.put("sorted/cats/a.jpg", b"edited")
    else:
        del store.objects["sorted/cats/a.jpg"]
    found = undo(job)
    assert (found["sorted/cats/a.xmp"], found["sorted/cats/a.jpg.json"]) == ("stayed", "stayed")
    assert {"sorted/cats/a.xmp", "sorted/cats/a.jpg.json", "in/b.jpg", "in/b.xmp"} <= set(tree(store))
    if fate == "in the way":
        del store.objects["in/a.jpg"]
        assert set(undo(job).values()) == {"moved"}
        assert tree(store) == {f"in/{name}": data for name, data in files.items()}


def test_undo_also_finds_what_a_killed_node_has_moved(
    store: MemoryStore, job: Job, new_sorter: NewSorter, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{n}.jpg": plain(RED, n) for n in range(5)}
    job.files.put_shard("00000", put(store, files))
    before, moved = tree(store), list[str]()
    original = store.delete_exact

    def die_after_two(item: StoredObject) -> str:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(item.key)
        return original(item)

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_exact", die_after_two)
        with pytest.raises(KeyboardInterrupt):
            new_sorter().sort("00000")
    assert shard_mover.half_moved(job.files) == {"00000"}
    assert set(undo(job).values()) == {"moved"}
    assert tree(store) == before


@pytest.mark.parametrize("inbox", ["in/", "in/2019/", ""])
def test_a_job_with_other_settings_waits_until_a_half_done_one_is_finished_or_taken_back(
    store: MemoryStore, job: Job, new_sorter: NewSorter, inbox: str
) -> None:
    other, others = replace(job, id="ba9876543210", inbox_prefix=inbox), described(f"memory://photos/{inbox}")
    with exclusion.begin(job, described()):
        job.files.put_shard("00000", put(store, {"a.jpg": plain(RED)}))
        new_sorter(decide_only=True).sort("00000")
    with exclusion.begin(other, others):
        pass  # nothing was moved yet
    store.put_new(f"{job.folder}moving/00000", b"")
    with pytest.raises(NotNowError, match=f"{job.id}.* is not finished"), exclusion.begin(other, others):
        pass
    assert not lease.holder(store, other.folder).is_fresh, "who is refused is in nobody's way"
    assert undo(job) == {"sorted/cats/a.jpg": "moved"}
    with exclusion.begin(other, others):
        pass


@pytest.mark.parametrize("inbox", ["in/", "in/2019/", ""])
def test_of_two_jobs_of_one_inbox_the_second_is_refused_and_no_photo_is_sorted_twice(
    store: MemoryStore, job: Job, new_sorter: NewSorter, inbox: str
) -> None:
    files = {f"2019/{n}.jpg": plain(RED, n) for n in range(5)}
    put(store, files)
    other, others = replace(job, id="ba9876543210", inbox_prefix=inbox), described(f"memory://photos/{inbox}")
    with exclusion.begin(job, described()):
        assert jobs.list_inbox(job, preflight.selection(SETTINGS)) == (5, 1)
        with pytest.raises(NotNowError, match=f"process .* is at work on .*{job.id}"), exclusion.begin(other, others):
            pass
        neighbor = replace(job, id="aaaaaaaaaaaa", inbox_prefix="in2/")
        with exclusion.begin(neighbor, described("memory://photos/in2/")):
            pass  # another inbox
        new_sorter().sort("00000")
    assert tree(store) == {f"sorted/cats/{name}": data for name, data in files.items()}
    with exclusion.begin(other, others):
        assert jobs.list_inbox(other, preflight.selection(SETTINGS)) == (0, 0)


def test_a_job_waits_for_the_nodes_of_another_one_whose_command_was_killed(
    store: MemoryStore, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node on another machine may still decide to move something, which no mark says yet."""
    other = replace(job, id="ba9876543210")
    store.put_new(f"{job.folder}job.json", json.dumps(described()).encode())
    with monkeypatch.context() as patch:
        patch.setattr("sorter.cluster.lease.os.getpid", lambda: 2**22 + 1)  # more than any process has
        Lease(store, job.folder)
    said = r"nodes of a command that was killed may still be at work on memory://photos/in/.*: wait for \d+ seconds"
    with pytest.raises(NotNowError, match=said), exclusion.begin(other, described()):
        pass
    with exclusion.begin(job, described()):
        pass  # the same command goes on at once
    with pytest.raises(NotNowError, match=said), exclusion.begin(other, described()):
        pass
    store.idle_seconds = FRESH_SECONDS
    with exclusion.begin(other, described()):
        pass


class Watched(MemoryStore):
    """Also looking for other jobs, and for whoever holds a lease, is a step."""

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        if prefix.endswith("/lease/") or prefix == after:
            self.step("list")
        yield from super().list(prefix, after)


@pytest.mark.parametrize(("action", "inbox"), [("run", "in/"), ("undo", "in2/")])
def test_two_jobs_of_one_inbox_or_an_undo_and_a_run_that_begin_at_once_are_never_both_at_work(
    monkeypatch: pytest.MonkeyPatch, proved: Callable[[str], None], action: Action, inbox: str
) -> None:
    monkeypatch.setattr(Lease, "__enter__", lambda self: self)  # it lasts for an instant: nothing is renewed
    monkeypatch.setattr(Lease, "__exit__", lambda self, *_: self._renew(released=True) and None)
    ends: Counter[tuple[object, ...]] = Counter()

    def scene() -> tuple[MemoryStore, list[Callable[[], object]], list[Callable[[], object]]]:
        store, at_work = Watched(), set[str]()

        def work(id_: str, action: Action, inbox: str) -> str:
            job, about = Job(id_, store, inbox, store, "sorted/"), described(f"memory://photos/{inbox}")
            try:
                with exclusion.begin(job, about, action):
                    at_work.add(id_)
                    store.step("work")
                    is_alone = at_work == {id_}
                    at_work.discard(id_)
                    return "done" if is_alone else "both"
            except NotNowError:
                return "refused"

        return store, [partial(work, "a", action, inbox), partial(work, "b", "run", "in/")], []

    count = every_order(scene, lambda _, results: ends.update([tuple(results)]), kills=0)
    assert set(ends) == {("done", "done"), ("done", "refused"), ("refused", "done"), ("refused", "refused")}
    which = "two runs of one inbox" if action == "run" else "an undo and a run of another inbox"
    proved(f"{which} that begin at once, {count} orders of requests: never both at work")


def test_the_inbox_may_be_the_output_and_sorted_photos_are_not_listed_again(
    store: MemoryStore, new_sorter: NewSorter
) -> None:
    job = Job("0123456789ab", store, "in/", store, "in/")
    with exclusion.begin(job, described()):
        pass
    put(
        store,
        {"a.jpg": plain(RED), "cats/b.jpg": plain(RED), "failed/c.jpg": b"", ".hidden.jpg": b"", "d.jpg.part": b""},
    )
    put(store, {"@eaDir/e.jpg": b"", "folder/": b""})
    assert jobs.list_inbox(job, preflight.selection(SETTINGS)) == (1, 1)
    assert [item.key for item in job.files.read_shard("00000")] == ["in/a.jpg"]


def test_an_inbox_that_photos_are_sorted_into_is_refused(store: MemoryStore, manifest: Manifest) -> None:
    with pytest.raises(ConfigurationError, match="sorted into"):
        jobs.check_urls(Job("0", store, "sorted/unsure/", store, "sorted/"), manifest)
    jobs.check_urls(Job("0", store, "in/", store, "sorted/"), manifest)


def test_two_commands_do_not_have_a_job_at_once_unless_the_other_one_is_gone(
    store: MemoryStore, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease(store, job.folder)
    with pytest.raises(NotNowError, match="is at work"):
        Lease(store, job.folder)
    store.idle_seconds = FRESH_SECONDS + 60
    second = Lease(store, job.folder)  # as far as anybody knows, the first one's machine is gone
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    with first, pytest.raises(NotNowError, match="taken this job over"):
        check_for_30_seconds(first)
    store.idle_seconds = 0
    assert lease.holder(store, job.folder).is_fresh
    with second:
        second.check()
    assert not lease.holder(store, job.folder).is_fresh  # released


def check_for_30_seconds(held: Lease) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        held.check()


def test_the_lease_of_a_process_that_was_killed_on_this_machine_is_free_at_once(
    store: MemoryStore, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sorter.cluster.lease.os.getpid", lambda: 2**22 + 1)  # more than any process has
        Lease(store, job.folder)
    Lease(store, job.folder)


def test_a_process_number_of_another_container_says_nothing(
    store: MemoryStore, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sorter.cluster.lease.os.getpid", lambda: 2**22 + 1)
        patch.setattr("sorter.cluster.lease.os.readlink", lambda path: "pid:[1]")
        Lease(store, job.folder)
    with pytest.raises(NotNowError, match="is at work"):
        Lease(store, job.folder)


def test_the_job_is_another_with_another_threshold_or_inbox(
    store: MemoryStore, manifest: Manifest, tmp_path: Path
) -> None:
    def id_of(prefix: str = "in/", **values: object) -> str:
        return jobs.job_of(store, prefix, store, "sorted/", Settings(**values), manifest)[0].id  # type: ignore[arg-type]

    ids = [id_of(), id_of("in2/"), id_of(min_confidence=0.9), id_of(catch_neither=True), id_of(max_megabytes=1)]
    assert len({*ids}) == len(ids)
    assert id_of(batch_size=8, log_level="debug") == ids[0]
