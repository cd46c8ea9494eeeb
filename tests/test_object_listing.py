"""Listing an inbox into shards, and a job's files: each object in one shard, each file written once."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from memory_store import START, MemoryStore

from sorter.cluster import listing
from sorter.cluster.families import families
from sorter.cluster.listing import list_new
from sorter.cluster.object_mover import ObjectMover
from sorter.cluster.shards import Decided, JobFiles, MovedRow
from sorter.cluster.stores import StoredObject, open_store
from sorter.errors import ConfigurationError, StoreError
from sorter.inbox.sidecars import SidecarNames

JOB = "out/.sorter/cluster/job/"


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def files(store: MemoryStore) -> JobFiles:
    return JobFiles(store, JOB)


@pytest.fixture(autouse=True)
def _small_shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "torture" not in request.keywords:
        monkeypatch.setattr(listing, "SHARD_ROWS", 10)
        monkeypatch.setattr(listing, "AHEAD_ROWS", 20)


def list_inbox(files: JobFiles, wanted: Callable[[str], bool] = lambda key: True) -> tuple[int, int]:
    return list_new(files.store, "in/", files, wanted, SidecarNames())


def listed(files: JobFiles) -> list[list[str]]:
    return [[item.key.removeprefix("in/") for item in files.read_shard(name)] for name in files.shards()]


def test_every_object_is_in_one_shard_with_all_that_is_known_of_it(store: MemoryStore, files: JobFiles) -> None:
    for number in range(35):
        store.put(f"in/{number:02}.jpg", b"x" * number)
    store.put("elsewhere/a.jpg", b"a")
    assert list_inbox(files, lambda key: key != "07.jpg") == (34, 4)
    assert files.shards() == ["00000", "00001", "00002", "00003"]
    rows = [item for name in files.shards() for item in files.read_shard(name)]
    assert rows == [item for item in store.list("in/") if item.key != "in/07.jpg"]


def test_a_second_listing_adds_what_is_new_or_was_replaced_or_uploaded_again(
    store: MemoryStore, files: JobFiles
) -> None:
    for number in range(25):
        store.put(f"in/{number:02}.jpg", b"old")
    assert list_inbox(files) == (25, 3)
    assert list_inbox(files) == (0, 0)
    store.put("in/04.jpg", b"new")
    store.put("in/05.jpg", b"old")
    store.put("in/04a.jpg", b"another")
    assert list_inbox(files) == (3, 1)
    assert listed(files)[3] == ["04.jpg", "04a.jpg", "05.jpg"]


def test_what_undo_put_back_is_not_listed_again_until_it_changes(store: MemoryStore, files: JobFiles) -> None:
    mover = ObjectMover(store, "copy")
    items = [store.put(f"in/{name}.jpg", name.encode()) for name in "ab"]
    list_inbox(files)
    moved = [mover.move(item, item.key.replace("in", "cats")) for item in items]
    back = [mover.move_back(item, one) for item, one in zip(items, moved, strict=True)]
    rows = [MovedRow(str(there.key), one.kind, one.key, one.etag) for there, one in zip(moved, back, strict=True)]
    files.put_undo("00000", rows)
    assert list_inbox(files) == (0, 0)
    store.put("in/b.jpg", b"edited")
    assert list_inbox(files) == (1, 1)
    assert listed(files)[1] == ["b.jpg"]


def test_a_photo_and_its_sidecars_are_in_the_same_shard_also_where_other_names_come_between(
    store: MemoryStore, files: JobFiles
) -> None:
    names = [f"IMG_1{number}.jpg" for number in range(9)]
    names += ["IMG_1.HEIC", "IMG_1.aae", "IMG_1.heic.xmp", "IMG_1_HEVC.MOV", "IMG_2.jpg", "a.jpg", "a(1).jpg"]
    names += ["a.jpg.supplemental-metadata(1).json", "sub/IMG_1.xmp", "IMG_14.xmp"]
    for name in names:
        store.put(f"in/{name}", name.encode())
    list_inbox(files)
    shards = listed(files)
    assert sorted(name for shard in shards for name in shard) == sorted(names)
    assert len(shards) == 2
    for group in (
        {"IMG_1.HEIC", "IMG_1.aae", "IMG_1.heic.xmp", "IMG_1_HEVC.MOV"},
        {"IMG_14.jpg", "IMG_14.xmp"},
        {"a(1).jpg", "a.jpg.supplemental-metadata(1).json"},
    ):
        assert [group & set(shard) for shard in shards if group & set(shard)] == [group]


def test_families_are_of_one_folder_and_a_sidecar_of_two_photos_joins_them() -> None:
    store = MemoryStore()
    for key in ("x/a.cr2", "x/a.jpg", "x/a.xmp", "x/b.jpg", "y/a.jpg", "y/b.xmp"):
        store.put(key, b"")
    found = families(list(store.list("")), SidecarNames())
    assert [[item.key for item in family] for family in found] == [
        ["x/a.cr2", "x/a.jpg", "x/a.xmp"],
        ["x/b.jpg"],
        ["y/a.jpg"],
        ["y/b.xmp"],
    ]


def test_two_that_list_at_once_put_each_object_into_one_shard(store: MemoryStore, files: JobFiles) -> None:
    for number in range(300):
        store.put(f"in/{number:03}.jpg", b"old")
    both_at_first, begun, lock, arriving = threading.Barrier(2), set[int](), threading.Lock(), iter(range(300))

    def arrive(request: str) -> None:
        with lock:  # between any two requests of the two
            store.put(f"in/{next(arriving) * 7 % 300:03}a.jpg", b"new")
            is_first = threading.get_ident() not in begun
            begun.add(threading.get_ident())
        if is_first:
            both_at_first.wait()

    store.step = arrive
    threads = [threading.Thread(target=list_inbox, args=(JobFiles(store, JOB),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.step = lambda request: None
    list_inbox(files)
    names = [name for shard in listed(files) for name in shard]
    assert sorted(names) == sorted(item.key.removeprefix("in/") for item in store.list("in/"))
    assert len(names) == len(set(names)) > 330


def test_a_store_that_lists_out_of_order_is_refused(store: MemoryStore, files: JobFiles) -> None:
    items = [store.put(f"in/{name}.jpg", b"a") for name in "ba"]
    store.list = lambda prefix, after="": iter(items if prefix == "in/" else [])  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="use a bucket whose keys are in order"):
        list_inbox(files)


def test_what_was_decided_and_moved_first_counts(files: JobFiles) -> None:
    first = [Decided("in/a.jpg", "sorted", "cats/a.jpg", "cat", 0.9), Decided("in/b.txt", "skipped", detail="no photo")]
    second = [Decided("in/a.jpg", "sorted", "dogs/a.jpg", "dog", 0.51), Decided("in/b.txt", "skipped")]
    assert files.read_decisions("00000") is None
    assert files.put_decisions("00000", first) == first
    assert files.put_decisions("00000", second) == first
    assert files.read_decisions("00000") == first
    moves = [MovedRow("in/a.jpg", "moved", "cats/a.jpg", '"1"'), MovedRow("in/b.txt", "stayed")]
    assert files.put_moves("00000", moves)
    assert not files.put_moves("00000", [])
    assert files.read_moves("00000") == moves
    assert (files.finished(), files.finished("undo")) == ({"00000"}, set())


def test_a_shard_is_undone_once_all_of_it_is_back_and_that_something_is_back_counts(files: JobFiles) -> None:
    back, stayed = MovedRow("cats/a.jpg", "moved", "in/a.jpg", '"1"'), MovedRow("cats/b.jpg", "left", reason="taken")
    files.put_undo("00000", [back, stayed])
    files.put_undo("00000", [stayed])
    files.put_undo("00000-1", [])
    assert files.finished("undo") == {"00000-1"}
    late = MovedRow("cats/b.jpg", "moved", "in/b.jpg", '"2"')
    files.put_undo("00000", [late])
    files.put_undo("00000", [MovedRow("cats/b.jpg", "changed", reason="by an undo that was thought dead")])
    assert files.finished("undo") == {"00000", "00000-1"}
    undos = files.undos()
    assert {shard: sorted(found) for shard, found in undos.items()} == {
        "00000": ["00000", "00000.1", "00000.2", "00000.3"],
        "00000-1": ["00000-1"],
    }
    assert files.read_undos(undos["00000"]) == {"cats/a.jpg": back, "cats/b.jpg": late}


def test_a_shard_is_split_in_halves_unless_it_was_decided_and_whoever_still_works_on_it_stops(
    store: MemoryStore, files: JobFiles
) -> None:
    names, sidecars = ("a.jpg", "a.xmp", "b.jpg", "c.jpg"), SidecarNames()
    rows = [store.put(f"in/{name}", name.encode()) for name in names]
    assert files.put_shard("00000", rows)
    assert files.put_shard("00001", rows[:2])
    assert files.split("00000", sidecars) == ["00000-0", "00000-1"] == files.split("00000", sidecars)
    assert listed(files)[1:3] == [["a.jpg", "a.xmp"], ["b.jpg", "c.jpg"]]
    assert files.shards() == ["00000", "00000-0", "00000-1", "00001"]
    assert files.put_decisions("00000", [Decided("in/a.jpg", "sorted", "cats/a.jpg")]) == []
    assert files.finished() == {"00000"}
    assert files.split("00001", sidecars) == [], "a photo with its sidecar"
    decided = [Decided(row.key, "sorted") for row in rows[2:]]
    assert files.put_decisions("00000-1", decided) == decided
    assert files.split("00000-1", sidecars) == []
    assert files.split("00000-0", sidecars) == []
    assert list_inbox(files) == (0, 0)


@pytest.mark.parametrize("url", ["", "photos", "s3://", "s3:/bucket", "gs://bucket/photos", "/mnt/photos"])
def test_what_names_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="names no bucket"):
        open_store(url)


def test_a_url_names_a_bucket_and_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for url, prefix in {"s3://b/": "", "s3://b/a": "a/", "s3://b/a b/#?%/": "a b/#?%/"}.items():
        store, found = open_store(url)
        assert (store.url, found) == ("s3://b", prefix)


def test_sorter_alone_imports_neither_boto3_nor_pyarrow_nor_ray() -> None:
    code = (
        "import sys, sorter, sorter.cli.main, sorter.cli.run, sorter.cluster.stores\n"
        "print([name for name in ('boto3', 'botocore', 'pyarrow', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Million(MemoryStore):
    """A bucket of a million empty objects that are made up as they are listed, and a job's files that are kept."""

    has_more = False

    def list(self, prefix: str, after: str = "") -> Iterator[StoredObject]:
        if prefix != "in/":
            yield from super().list(prefix, after)
            return
        for number in range(1_000_000):
            key = f"in/{number // 10_000:03}/IMG_{number:07}.jpg"
            yield StoredObject(key, 0, '"d41d8cd98f00b204e9800998ecf8427e"', START, "STANDARD")
            if self.has_more and number % 100_000 == 0:
                yield StoredObject(f"{key}.new.jpg", 0, '"1"', datetime(2026, 2, 1, tzinfo=UTC), "STANDARD")


@pytest.mark.torture
@pytest.mark.whole
@pytest.mark.timeout(900)
def test_a_million_objects_are_listed_in_little_memory_and_a_second_time_only_what_is_new(
    proved: Callable[[str], None], tmp_path: Path
) -> None:
    code = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import test_object_listing as tests
files = tests.JobFiles(tests.Million(), tests.JOB)
figures = []
for _ in range(2):
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sum(len(d) for _, d in files.store.objects.values())
    found = tests.list_inbox(files)
    kept = sum(len(d) for _, d in files.store.objects.values()) - before[1]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[0]) / 1024 - kept / 2**20
    figures.append([*found, time.monotonic() - started, grown])
    files.store.has_more = True
names = [name for name in files.shards()]
keys = [item.key for name in names for item in files.read_shard(name)]
print(json.dumps([figures, len(names), len(keys), len(set(keys))]))
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (first, second), shards, rows, different = json.loads(done.stdout)
    assert first[:2] == [1_000_000, 1_000]
    assert second[:2] == [10, 1]
    assert (shards, rows, different) == (1_001, 1_000_010, 1_000_010)
    assert first[3] < 60, f"MiB more than before, without what it wrote: {first[3]}"
    assert second[3] < 60
    proved(
        f"1,000,000 objects listed into 1,000 shards in {first[2]:.0f} s with {max(first[3], 0):.0f} MiB more memory; "
        f"again in {second[2]:.0f} s with {second[3]:.0f} MiB more, and only the 10 new ones were added"
    )
