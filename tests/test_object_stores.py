"""Moves on real servers and over lines that break: OpenStack Swift, and moto with Amazon's conditions."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import object_stores
import pytest
from breaking_line import Fault, Line, Request, breaking_line
from object_stores import Server

from sorter.cluster.object_mover import Moved, ObjectMover
from sorter.cluster.probe import probe
from sorter.cluster.shards import JobFiles
from sorter.cluster.stores import MARK, MODIFIED, Mode, Store, StoredObject, open_store
from sorter.errors import ChangedError, ObjectError, StoreError, UnsafeStoreError

pytestmark = pytest.mark.long
HERE = Path(__file__).resolve().parent
WAYS = ["swift-upload", "swift-multipart", "moto-copy", "moto-multipart", "moto-upload"]
"""Servers and modes. Swift never copies on a condition."""


@dataclass
class Place:
    """A bucket of the test's own, looked at past the sorter, and the sorter's store at the other end of a line."""

    line: Line
    client: Any
    bucket: str
    store: Store
    mode: Mode
    is_swift: bool

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def mover(self) -> ObjectMover:
        return ObjectMover(self.store, self.mode)

    def put(self, key: str, data: bytes, **arguments: Any) -> StoredObject:
        """Write an object as another program does, and return it as listed."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data, **arguments)
        return next(item for item in self.store.list(key) if item.key == key)

    def tree(self) -> dict[str, bytes]:
        found = {}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
            for entry in page.get("Contents", ()):
                if "/.sorter/" not in "/" + entry["Key"]:
                    answer = self.client.get_object(Bucket=self.bucket, Key=entry["Key"])
                    found[entry["Key"]] = answer["Body"].read()
        return found


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    name, _, mode = request.param.partition("-")
    server: Server = request.getfixturevalue("swift" if name == "swift" else "strict_moto")
    client, bucket = server.client, f"test-{uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    with breaking_line(server) as line:
        for variable, value in line.server.environment.items():
            monkeypatch.setenv(variable, value)
        store, _ = open_store(f"s3://{bucket}")
        yield Place(line, client, bucket, store, mode, name == "swift")


everywhere = pytest.mark.parametrize("place", WAYS, indirect=True)
of_each_kind = pytest.mark.parametrize(
    "place",
    [way if way in ("swift-upload", "moto-copy") else pytest.param(way, marks=pytest.mark.whole) for way in WAYS],
    indirect=True,
)
both = pytest.mark.parametrize("place", ["swift-upload", "moto-copy"], indirect=True)
swift_only = pytest.mark.parametrize("place", ["swift-upload"], indirect=True)
moto_only = pytest.mark.parametrize("place", ["moto-copy", "moto-multipart", "moto-upload"], indirect=True)


@both
def test_the_probe_finds_how_a_store_copies_and_leaves_nothing(place: Place) -> None:
    assert probe(place.store, "out/") == place.mode
    written = {request.path.partition("?")[0] for request in place.line.requests if request.method != "GET"}
    assert all(path.startswith(f"/{place.bucket}/out/.sorter/probe-") for path in written)
    assert list(place.store.list("")) == []
    assert "Uploads" not in place.client.list_multipart_uploads(Bucket=place.bucket)


@both
def test_an_objects_age_is_known_whatever_clock_this_machine_has(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.store.put_new("a", b"")
    monkeypatch.setattr("time.time", lambda: 0.0)
    (item,) = place.store.list("a")
    assert abs((place.store.now("a") - item.modified).total_seconds()) <= 5  # Swift rounds up


@swift_only
def test_the_probe_refuses_a_bucket_of_swift_with_versions(place: Place) -> None:
    enabled = {"Status": "Enabled"}
    place.client.put_bucket_versioning(Bucket=place.bucket, VersioningConfiguration=enabled)
    with pytest.raises(UnsafeStoreError):
        probe(place.store, "")
    assert list(place.store.list("")) == []


@contextmanager
def bucket_of(server: Server) -> Iterator[Store]:
    """A bucket with objects of others, which have to be all there is afterwards."""
    there = {"out/a.jpg": b"a photo", "out/.sorter/b": b"somebody's", "c.jpg": b"another"}
    server.client.create_bucket(Bucket="bucket")
    for key, data in there.items():
        server.client.put_object(Bucket="bucket", Key=key, Body=data)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in server.environment.items():
            patch.setenv(variable, value)
        store, _ = open_store("s3://bucket")
    yield store
    assert {item.key: store.read(item.key) for item in store.list("")} == there


def test_the_probe_refuses_a_store_that_deletes_whatever_is_there(tmp_path: Path) -> None:
    refused = pytest.raises(UnsafeStoreError, match="it ignores If-Match when an object is deleted")
    with object_stores.localbucket(tmp_path) as server, bucket_of(server) as store, refused:
        probe(store, "out/")


def test_the_probe_refuses_a_store_that_overwrites_whatever_is_there(tmp_path: Path) -> None:
    program = object_stores.rclone_with_s3()
    if program is None:
        pytest.skip("needs rclone 1.65 or newer, whose serve knows s3")
    refused = pytest.raises(UnsafeStoreError, match="it ignores If-None-Match when an object is written")
    with object_stores.rclone(program, tmp_path) as server, bucket_of(server) as store, refused:
        probe(store, "out/")


def test_the_probe_does_not_trust_the_copies_of_a_store_that_ignores_conditions(tmp_path: Path) -> None:
    with object_stores.moto(tmp_path, strict=False) as server, bucket_of(server) as store:
        assert probe(store, "out/") == "upload", "it overwrites with CopyObject, and copies whatever version is there"


@everywhere
def test_metadata_headers_and_content_arrive_and_come_back(place: Place) -> None:
    expires = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    headers = {
        "CacheControl": "max-age=60",
        "ContentDisposition": 'attachment; filename="a.jpg"',
        "ContentEncoding": "identity",
        "ContentLanguage": "de",
        "ContentType": "image/jpeg",
        "Expires": expires,
    }
    item = place.put("in/a.jpg", b"photo", Metadata={"camera": "x", "place": "Paris, France"}, **headers)
    before = place.client.head_object(Bucket=place.bucket, Key="in/a.jpg")
    moved = place.mover.move(item, "cats/a.jpg")
    assert place.tree() == {"cats/a.jpg": b"photo"}
    after = place.client.head_object(Bucket=place.bucket, Key="cats/a.jpg")
    assert {name: after.get(name) for name in headers} == {name: before.get(name) for name in headers}
    assert after["ContentType"] == "image/jpeg"
    metadata = dict(after["Metadata"])
    assert len(metadata.pop(MARK)) == 64
    assert metadata == {"camera": "x", "place": "Paris, France", MODIFIED: item.modified.isoformat()}
    assert moved.etag == after["ETag"]
    if place.is_swift and place.mode == "multipart":
        return  # see the next test but one
    back = place.mover.move_back(item, moved)
    assert (back.kind, back.key) == ("moved", "in/a.jpg")
    assert place.mover.move_back(item, moved) == back
    assert place.tree() == {"in/a.jpg": b"photo"}
    restored = place.client.head_object(Bucket=place.bucket, Key="in/a.jpg")
    assert {name: restored.get(name) for name in headers} == {name: before.get(name) for name in headers}
    assert {key: value for key, value in restored["Metadata"].items() if not key.startswith("sorter-")} == {
        "camera": "x",
        "place": "Paris, France",
    }


@pytest.mark.parametrize("place", ["moto-copy", "moto-multipart"], indirect=True)
def test_what_is_restored_and_what_is_sorted_again_never_has_the_etag_that_was_just_deleted_there(place: Place) -> None:
    item = place.put("in/a.jpg", b"photo")
    sorted_once = place.mover.move(item, "cats/a.jpg")
    restored = place.mover.move_back(item, sorted_once)
    (listed,) = place.store.list("in/")
    sorted_again = place.mover.move(listed, "cats/a.jpg")
    assert place.tree() == {"cats/a.jpg": b"photo"}
    restored_again = place.mover.move_back(listed, sorted_again)
    assert place.tree() == {"in/a.jpg": b"photo"}
    assert restored.etag != item.etag
    assert sorted_again.etag != sorted_once.etag
    assert restored_again.etag != restored.etag


@moto_only
def test_tags_and_the_storage_class_arrive_and_archived_or_locked_objects_stay(place: Place) -> None:
    item = place.put("in/a.jpg", b"photo", Tagging="a=1&b=c%20d", StorageClass="STANDARD_IA")
    place.mover.move(item, "cats/a.jpg")
    tags = place.client.get_object_tagging(Bucket=place.bucket, Key="cats/a.jpg")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"a": "1", "b": "c d"}
    assert place.client.head_object(Bucket=place.bucket, Key="cats/a.jpg")["StorageClass"] == "STANDARD_IA"
    archived = place.put("in/b.jpg", b"old", StorageClass="GLACIER")
    assert archived.is_archived
    left = place.mover.move(archived, "cats/b.jpg")
    assert (left.kind, left.reason) == ("left", "it is archived: restore it to another storage class first")
    with pytest.raises(ObjectError):
        place.store.download(archived, Path(os.devnull))
    assert [item.key for item in place.store.list("")] == ["cats/a.jpg", "in/b.jpg"]


@pytest.mark.parametrize("place", ["swift-multipart", "moto-copy", "moto-multipart"], indirect=True)
def test_a_large_object_is_copied_in_parts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sorter.cluster.s3.PART_BYTES", 5 << 20)  # the least that a part may have
    film = os.urandom((12 << 20) + 1)
    item = place.put("in/film.mov", film, Metadata={"a": "b"})
    place.line.reset()
    moved = place.mover.move(item, "cats/film.mov")
    assert place.line.operations().count("UploadPartCopy") == 3
    assert str(moved.etag).endswith('-3"')
    assert place.tree() == {"cats/film.mov": film}
    assert place.client.head_object(Bucket=place.bucket, Key="cats/film.mov")["Metadata"]["a"] == "b"


@both
def test_metadata_without_room_for_the_mark_leaves_the_photo(place: Place) -> None:
    item = place.put("in/a.jpg", b"photo", Metadata={f"note{number}": "x" * 240 for number in range(8)})
    left = place.mover.move(item, "cats/a.jpg")
    assert (left.kind, "no room" in str(left.reason)) == ("left", True)
    assert place.tree() == {"in/a.jpg": b"photo"}


@swift_only
def test_swift_leaves_what_was_uploaded_in_parts_because_it_does_not_delete_it_on_a_condition(place: Place) -> None:
    upload = place.client.create_multipart_upload(Bucket=place.bucket, Key="in/a.jpg")["UploadId"]
    target = {"Bucket": place.bucket, "Key": "in/a.jpg", "UploadId": upload}
    part = place.client.upload_part(**target, PartNumber=1, Body=b"photo")
    place.client.complete_multipart_upload(
        **target, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    )
    (item,) = place.store.list("in/")
    assert place.store.delete_exact(item) == "changed", (
        "if this fails, Swift has learnt it, and `upload` may move these"
    )
    left = place.mover.move(item, "cats/a.jpg")
    assert (left.kind, left.key) == ("left", None)
    assert place.tree() == {"in/a.jpg": b"photo"}


KEYS = [
    "with spaces  and more.jpg",
    "a+b.jpg",
    "100%.jpg",
    "%2e%2E%41.jpg",
    "Köln/ö.jpg",
    "cafe\u0301.jpg",
    "🐈/🐕.jpg",
    "a//b.jpg",
    "//c.jpg",
    "../x.jpg",
    "./y/../z.jpg",
    "ends in a slash/",
    "quotes'\"&<>.jpg",
    "question?and#hash=1&2.jpg",
    "back\\slash.jpg",
    "tab\there.jpg",
    "~tilde!*().jpg",
    "no extension",
    ".jpg",
    "日本/" + "犬" * 330 + ".jpg",
]


@everywhere
def test_keys_of_all_kinds_are_listed_fetched_moved_and_brought_back(place: Place, tmp_path: Path) -> None:
    longest = "l" * (1_024 - len("out/") - 4) + ".jpg"
    assert len(f"out/{longest}") == 1_024
    keys = [*KEYS, longest]
    if place.is_swift and place.mode == "multipart":  # Swift needs 48 bytes of a key for an upload's number
        keys = [key for key in keys if len(key.encode()) < 970]
    for key in keys:
        place.client.put_object(Bucket=place.bucket, Key=f"in/{key}", Body=key.encode())
    items = list(place.store.list("in/"))
    assert [item.key for item in items] == sorted(f"in/{key}" for key in keys)
    moved = []
    for item in items:
        name = item.key.removeprefix("in/")
        place.store.download(item, tmp_path / "photo")
        assert (tmp_path / "photo").read_bytes() == name.encode()
        moved.append(place.mover.move(item, f"out/{name}"))
    assert {one.kind for one in moved} == {"moved"}
    assert place.tree() == {f"out/{key}": key.encode() for key in keys}
    if place.is_swift:  # see the next test
        return
    for item, one in zip(items, moved, strict=True):
        assert place.mover.move_back(item, one).kind == "moved"
    assert place.tree() == {f"in/{key}": key.encode() for key in keys}


@swift_only
def test_swift_brings_keys_of_all_kinds_back_but_those_without_room_for_the_number_of_an_upload(place: Place) -> None:
    longest = "l" * (1_024 - len("out/") - 4) + ".jpg"
    for key in [*KEYS, longest]:
        item = place.put(f"in/{key}", key.encode())
        back = place.mover.move_back(item, place.mover.move(item, f"out/{key}"))
        assert back.kind == "moved" or (back.kind == "left" and len(key.encode()) > 970)
    assert sorted(place.tree().values()) == sorted(key.encode() for key in [*KEYS, longest])


@everywhere
def test_an_empty_object_moves(place: Place) -> None:
    item = place.put("in/empty.jpg", b"", Metadata={"a": "b"})
    assert place.mover.move(item, "failed/empty.jpg").kind == "moved"
    assert place.tree() == {"failed/empty.jpg": b""}
    assert place.client.head_object(Bucket=place.bucket, Key="failed/empty.jpg")["Metadata"]["a"] == "b"


@everywhere
def test_a_photo_replaced_before_or_after_it_was_copied_and_a_strangers_object_are_all_kept(
    place: Place, tmp_path: Path
) -> None:
    replaced_first = place.put("in/a.jpg", b"first")
    replaced_later = place.put("in/b.jpg", b"second")
    strangers = place.put("in/c.jpg", b"third")
    place.store.download(replaced_first, tmp_path / "photo")
    place.put("in/a.jpg", b"first, edited")
    with pytest.raises(ChangedError):
        place.store.download(replaced_first, tmp_path / "photo")

    def replace_before_deletion(request: Request) -> None:
        if request.operation == "DeleteObject" and request.path.endswith("b.jpg"):
            place.client.put_object(Bucket=place.bucket, Key="in/b.jpg", Body=b"second, edited")

    def take_the_name(request: Request) -> None:
        wanted = {"copy": "CopyObject", "multipart": "CompleteMultipartUpload", "upload": "PutObject"}[place.mode]
        if request.operation == wanted and "cats/c.jpg" in request.path:
            place.client.put_object(Bucket=place.bucket, Key="cats/c.jpg", Body=b"stranger")

    def before(request: Request) -> Fault | None:
        replace_before_deletion(request)
        take_the_name(request)
        return None

    place.line.before = before
    assert place.mover.move(replaced_first, "cats/a.jpg").kind == "changed"
    assert place.mover.move(replaced_later, "cats/b.jpg").key == "cats/b.jpg"
    assert place.mover.move(strangers, "cats/c.jpg").key == "cats/c-1.jpg"
    assert place.tree() == {
        "in/a.jpg": b"first, edited",
        "in/b.jpg": b"second, edited",
        "cats/b.jpg": b"second",
        "cats/c.jpg": b"stranger",
        "cats/c-1.jpg": b"third",
    }


@everywhere
def test_a_connection_that_is_cut_before_or_after_each_request_of_a_move_moves_it_once(place: Place) -> None:
    place.mover.move(place.put("in/probe.jpg", b"probe"), "probe/a.jpg")
    count = len(place.line.requests)
    for number in range(count - 1):
        for fault in ("cut before", "cut after"):
            place.line.reset()
            key = f"{number} {fault}.jpg"
            item = place.put(f"in/{key}", key.encode(), Metadata={"a": "b"})
            place.line.reset()

            def before(request: Request, number: int = number, fault: Fault = fault) -> Fault | None:
                return fault if request.number == number else None

            place.line.before = before
            assert place.mover.move(item, f"cats/{key}").key == f"cats/{key}"
            place.line.reset()
            assert place.tree() == {"probe/a.jpg": b"probe"} | {f"cats/{key}": key.encode()}
            place.client.delete_object(Bucket=place.bucket, Key=f"cats/{key}")


def kill_at(place: Place, number: int, after: bool, item: StoredObject, *, undo: bool = False) -> bool:
    """Move a shard of one photo, or take it back, in a process that is killed at a request. Whether it came so far."""
    folder = f".sorter/cluster/{uuid4().hex}/"
    files = JobFiles(place.store, folder)
    assert files.put_shard("00000", [item])
    command = [sys.executable, str(HERE / "move_shard.py"), place.url, folder, place.mode, "00000", "1"]
    if undo:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        command[-1] = "undo"
    place.line.reset()
    killed: list[str] = []

    def kill(request: Request) -> Fault | None:
        if request.number == number:
            killed.append(request.operation)
            process.kill()
            process.wait()
        return "cut before" if killed else None

    if after:
        place.line.after = kill
    else:
        place.line.before = kill
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    process.wait()
    place.line.reset()
    if not killed:
        return False
    again = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    assert again.stdout == b"finished\n"
    decisions, moves = files.read_decisions("00000"), files.read_moves("00000")
    assert decisions is not None
    assert moves is not None
    assert [row.destination for row in moves] == [decisions[0].destination]
    if undo:
        assert [row.destination for row in files.read_undos(["00000"]).values()] == [item.key]
    return True


def killed_at_each(place: Place, every: int, *, undo: bool = False) -> Iterator[tuple[str, str, bool]]:
    """The key, name and fate of a photo for each request before and after which its move, or undo, is killed."""
    for after in (False, True):
        for number in range(0, 100, every):
            name = f"{number}-{after}.jpg"
            item = place.put(f"in/{name}", name.encode(), Metadata={"a": "b"})
            was_killed = kill_at(place, number, after, item, undo=undo)
            (key,) = place.tree()
            assert place.tree() == {key: name.encode()}
            assert place.client.head_object(Bucket=place.bucket, Key=key)["Metadata"]["a"] == "b"
            yield key, name, was_killed
            place.client.delete_object(Bucket=place.bucket, Key=key)
            if not was_killed:
                break


@pytest.mark.torture
@pytest.mark.timeout(1200)
@everywhere
def test_a_node_killed_before_or_after_each_of_its_requests_moves_each_photo_once(
    place: Place, pytestconfig: pytest.Config, proved: Callable[[str], None]
) -> None:
    kills = 0
    for key, name, was_killed in killed_at_each(place, pytestconfig.getoption("every")):
        assert key in (f"cats/{name}", f"dogs/{name}")
        kills += was_killed
    server = "Swift" if place.is_swift else "moto"
    proved(
        f"a node killed before and after requests of a shard of one, {server}, {place.mode}: {kills} kills, moved once"
    )


@pytest.mark.torture
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", [way for way in WAYS if way != "swift-multipart"], indirect=True)
def test_an_undo_killed_before_or_after_each_of_its_requests_brings_each_photo_back_once(
    place: Place, pytestconfig: pytest.Config, proved: Callable[[str], None]
) -> None:
    kills = 0
    for key, name, was_killed in killed_at_each(place, pytestconfig.getoption("every"), undo=True):
        assert key == f"in/{name}"
        kills += was_killed
    server = "Swift" if place.is_swift else "moto"
    proved(
        f"an undo killed before and after requests of a shard of one, {server}, {place.mode}: {kills} kills, back once"
    )


@everywhere
def test_a_node_that_was_stopped_before_its_copy_and_goes_on_after_another_finished_changes_nothing(
    place: Place,
) -> None:
    item = place.put("in/a.jpg", b"photo")
    folder = ".sorter/cluster/job/"
    files = JobFiles(place.store, folder)
    files.put_shard("00000", [item])
    command = [sys.executable, str(HERE / "move_shard.py"), place.url, folder, place.mode, "00000", "1"]
    stopped: list[int] = []

    def stop(request: Request) -> Fault | None:
        if "/cats/a.jpg" in request.path or "/dogs/a.jpg" in request.path:
            os.kill(zombie.pid, signal.SIGSTOP)
            stopped.append(request.number)
            place.line.before = lambda request: None
            while is_stopped:
                time.sleep(0.02)
        return None

    is_stopped = [True]
    place.line.before = stop
    zombie = subprocess.Popen(command, stdout=subprocess.PIPE)
    while not stopped:
        assert zombie.poll() is None
        time.sleep(0.02)
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == b"finished\n"
    before, moves = place.tree(), files.read_moves("00000")
    os.kill(zombie.pid, signal.SIGCONT)
    is_stopped.clear()
    out, _ = zombie.communicate(timeout=60)
    assert out == b"finished\n"
    assert list(before.values()) == [b"photo"]
    assert (place.tree(), files.read_moves("00000")) == (before, moves)


@both
def test_a_store_that_is_overloaded_collides_and_breaks_off_its_answers_gives_the_same_result(
    place: Place, tmp_path: Path
) -> None:
    chance = random.Random(7)
    photos = {f"{number:02}.jpg": os.urandom(2_000) for number in range(40)}
    items = [place.put(f"in/{name}", data) for name, data in photos.items()]
    faults: Counter[str] = Counter()

    def before(request: Request) -> Fault | None:
        if chance.random() > 0.1:
            return None
        kinds: list[Fault] = ["slow down"]
        if request.operation in ("CopyObject", "CompleteMultipartUpload", "PutObject", "DeleteObject"):
            kinds.append("conflict")
        if request.operation == "GetObject":
            kinds += ["cut body", "cut body"]
        fault = chance.choice(kinds)
        faults[fault] += 1
        return fault

    place.line.reset()
    place.line.before = before
    for item in items:
        place.store.download(item, tmp_path / "photo")
        assert (tmp_path / "photo").read_bytes() == photos[item.key.removeprefix("in/")]
        assert place.mover.move(item, item.key.replace("in/", "cats/")).kind == "moved"
    place.line.reset()
    assert place.tree() == {f"cats/{name}": data for name, data in photos.items()}
    assert min(faults["slow down"], faults["conflict"], faults["cut body"]) > 0, faults


@pytest.mark.parametrize("place", ["moto-copy", "moto-upload"], indirect=True)
def test_a_store_that_answers_everything_with_500_for_two_seconds_only_delays_the_work(
    place: Place, tmp_path: Path
) -> None:
    names = [f"{number:03}.jpg" for number in range(100)]
    items = [place.put(f"in/{name}", name.encode()) for name in names]
    failures: Counter[str] = Counter()

    def fail_for_two_seconds() -> None:
        until = time.monotonic() + 2

        def before(request: Request) -> Fault | None:
            if time.monotonic() > until:
                return None
            failures[request.operation] += 1
            return "failure"

        place.line.before = before

    def download(item: StoredObject) -> None:
        path = tmp_path / item.key.rpartition("/")[2]
        place.store.download(item, path)
        assert path.read_bytes() == path.name.encode()

    with ThreadPoolExecutor(32) as pool:
        fail_for_two_seconds()
        list(pool.map(download, items))
        fail_for_two_seconds()
        moved = list(pool.map(lambda item: place.mover.move(item, item.key.replace("in/", "cats/")).kind, items))
    place.line.reset()
    assert moved == ["moved"] * len(items)
    assert place.tree() == {f"cats/{name}": name.encode() for name in names}
    assert failures["GetObject"] >= 32, failures


def failing_at(place: Place, key: str, operation: str, fault: Fault = "failure") -> None:
    """Have the store refuse all requests of a kind that concern one object, for ever."""
    operations = {operation, "CreateMultipartUpload"} if operation == "CompleteMultipartUpload" else {operation}
    place.line.before = lambda request: fault if request.operation in operations and key in request.path else None


@pytest.mark.parametrize(
    ("place", "operation", "key"),
    [
        ("moto-copy", "GetObject", "in/a.jpg"),
        ("moto-copy", "HeadObject", "in/a.jpg"),
        ("moto-copy", "CopyObject", "cats/a.jpg"),
        ("moto-copy", "DeleteObject", "in/a.jpg"),
        ("moto-multipart", "CompleteMultipartUpload", "cats/a.jpg"),
        ("moto-upload", "PutObject", "cats/a.jpg"),
        ("swift-upload", "GetObject", "in/a.jpg"),
        ("swift-upload", "DeleteObject", "in/a.jpg"),
    ],
    indirect=["place"],
)
def test_an_object_at_which_the_store_always_fails_is_left_and_a_store_that_fails_at_all_ends_the_job(
    place: Place, operation: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sorter.cluster.s3.pause_seconds", lambda attempt: 0.01)
    item, other = place.put("in/a.jpg", b"photo"), place.put("in/b.jpg", b"other")

    def work(item: StoredObject) -> Moved:
        try:
            place.mover.insist(lambda: place.store.download(item, tmp_path / "photo"))
        except ObjectError as error:
            return Moved("left", reason=str(error))
        return place.mover.move(item, item.key.replace("in/", "cats/"))

    failing_at(place, key, operation)
    left = work(item)
    is_there_twice = operation == "DeleteObject"
    assert (left.kind, left.key) == ("left", "cats/a.jpg" if is_there_twice else None)
    assert "fails at" in str(left.reason)
    assert ("there twice" in str(left.reason)) == is_there_twice
    assert work(other).kind == "moved"
    failing_at(place, "", operation)
    with pytest.raises(StoreError, match=r"fails at|refuses PutObject"):
        work(place.put("in/c.jpg", b"third"))
    place.line.reset()
    tree = place.tree()
    assert sorted(set(tree.values())) == [b"other", b"photo", b"third"]
    assert (tree["in/a.jpg"], tree["cats/b.jpg"]) == (b"photo", b"other")
    assert work(item).kind == "moved"
    assert [key for key in place.tree() if ".sorter" in key] == []


@pytest.mark.parametrize("place", ["moto-copy"], indirect=True)
def test_an_object_that_may_not_be_deleted_is_said_to_be_there_twice_and_its_neighbours_are_moved(place: Place) -> None:
    items = [place.put(f"in/{name}.jpg", name.encode()) for name in "ab"]
    failing_at(place, "in/a.jpg", "DeleteObject", "denial")
    left, moved = (place.mover.move(item, item.key.replace("in/", "cats/")) for item in items)
    assert (left.kind, left.key, moved.kind) == ("left", "cats/a.jpg", "moved")
    assert left.reason == "the store refuses it (AccessDenied: by the test): it is there twice"
    assert place.tree() == {"cats/a.jpg": b"a", "cats/b.jpg": b"b", "in/a.jpg": b"a"}


@pytest.mark.parametrize("place", ["moto-copy"], indirect=True)
def test_a_deletion_that_collides_for_ever_ends_the_job_and_is_not_taken_for_a_change(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sorter.cluster.s3.pause_seconds", lambda attempt: 0.01)
    item = place.put("in/a.jpg", b"photo")
    failing_at(place, "in/a.jpg", "DeleteObject", "conflict")
    with pytest.raises(StoreError, match="refuses DeleteObject"):
        place.mover.move(item, "cats/a.jpg")
    assert place.line.operations().count("DeleteObject") == 8
    place.line.reset()
    assert place.mover.move(item, "cats/a.jpg").kind == "moved"
    assert place.tree() == {"cats/a.jpg": b"photo"}


@pytest.mark.parametrize("place", ["moto-multipart"], indirect=True)
def test_a_copy_in_parts_that_collides_is_made_again_after_a_pause(place: Place) -> None:
    item, pauses = place.put("in/a.jpg", b"photo"), list[float]()

    def before(request: Request) -> Fault | None:
        if request.operation == "CompleteMultipartUpload":
            pauses.append(time.monotonic())
            return "conflict" if len(pauses) < 4 else None
        return None

    place.line.before = before
    assert place.mover.move(item, "cats/a.jpg").kind == "moved"
    assert len(pauses) == 4
    assert pauses[3] - pauses[0] > (0.3 + 0.6 + 1.2) / 2
    place.line.reset()
    assert place.tree() == {"cats/a.jpg": b"photo"}
    assert "Uploads" not in place.client.list_multipart_uploads(Bucket=place.bucket)


@both
def test_answers_that_always_break_off_end_the_job_and_the_photo_stays(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sorter.cluster.s3.pause", lambda attempt: None)
    item = place.put("in/a.jpg", b"photo")
    place.line.before = lambda request: "cut body" if request.operation == "GetObject" else None
    with pytest.raises(StoreError, match="ends its answers early, 8 times"):
        place.store.download(item, tmp_path / "photo")
    place.line.reset()
    assert place.tree() == {"in/a.jpg": b"photo"}


@pytest.mark.torture
@pytest.mark.timeout(1200)
@of_each_kind
def test_two_nodes_at_a_shard_killed_at_random_lose_nothing_and_move_nothing_twice(
    place: Place, proved: Callable[[str], None]
) -> None:
    shards, size, chance = 2, 60, random.Random(place.mode)
    folder = ".sorter/cluster/job/"
    files = JobFiles(place.store, folder)
    photos: dict[str, bytes] = {}
    for shard in range(shards):
        rows = []
        for number in range(size):
            name = f"{shard}-{number:03}.jpg"
            photos[name] = f"photo {name}".encode()
            rows.append(place.put(f"in/{name}", photos[name], Metadata={"name": name}))
        assert files.put_shard(f"{shard:05}", rows)
        place.put(f"in/{shard}-007.jpg", b"edited %d" % shard)  # replaced after it was listed
        for label in ("cats", "dogs"):
            place.put(f"{label}/{shard}-011.jpg", f"stranger in {label} {shard}".encode())
    kills = runs = 0
    for shard in range(shards):
        command = [sys.executable, str(HERE / "move_shard.py"), place.url, folder, place.mode, f"{shard:05}", "4"]
        while files.read_moves(f"{shard:05}") is None:
            nodes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
            runs += 2
            deadline = time.monotonic() + 0.8 + chance.random() * 1.5
            while time.monotonic() < deadline and any(node.poll() is None for node in nodes):
                time.sleep(0.02)
            for node in nodes:
                if chance.random() < 0.8 and node.poll() is None:
                    node.kill()
                    kills += 1
            assert all(node.wait() in (0, -signal.SIGKILL) for node in nodes)
    tree = place.tree()
    found = Counter(tree.values())
    replaced = {b"photo %d-007.jpg" % shard for shard in range(shards)}
    assert {data: found[data] for data in photos.values() if data not in replaced and found[data] != 1} == {}
    assert all(found[data] == 0 for data in replaced)
    for shard in range(shards):
        assert tree[f"in/{shard}-007.jpg"] == b"edited %d" % shard
        for label in ("cats", "dogs"):
            assert tree[f"{label}/{shard}-011.jpg"] == f"stranger in {label} {shard}".encode()
        assert (
            sum(tree.get(f"{label}/{shard}-011-1.jpg") == photos[f"{shard}-011.jpg"] for label in ("cats", "dogs")) == 1
        )
    assert len(tree) == len(photos) + 2 * shards
    for key, data in tree.items():
        if data in photos.values():
            name = data.decode().removeprefix("photo ")
            assert place.client.head_object(Bucket=place.bucket, Key=key)["Metadata"]["name"] == name
    proved(
        f"two nodes at a shard, {'Swift' if place.is_swift else 'strict moto'}, {place.mode}: {runs} runs, {kills} "
        f"kills, {len(photos) - shards} photos moved: lost 0, twice 0, strangers' kept {2 * shards} of {2 * shards}, "
        f"replaced kept {shards} of {shards}, metadata kept"
    )


@pytest.mark.parametrize("place", ["moto-copy"], indirect=True)
def test_what_replaces_an_object_in_the_instant_of_its_deletion_is_kept(place: Place) -> None:
    chance = random.Random(1)

    def overwrite(key: str) -> None:
        time.sleep(chance.random() * 0.03)
        place.client.put_object(Bucket=place.bucket, Key=key, Body=b"new")

    with ThreadPoolExecutor() as pool:
        for number in range(50):
            item = place.put(f"{number}.jpg", b"old")
            overwriting = pool.submit(overwrite, item.key)
            place.store.delete_exact(item)
            overwriting.result()
    assert place.tree() == {f"{number}.jpg": b"new" for number in range(50)}


@pytest.mark.parametrize("place", ["moto-copy"], indirect=True)
def test_of_many_that_create_one_object_in_the_same_instant_one_wins(place: Place) -> None:
    with ThreadPoolExecutor(16) as pool:
        for number in range(20):
            created = pool.map(
                lambda data, key=f"{number}.jpg": place.store.put_new(key, data), [b"%d" % n for n in range(16)]
            )
            assert sum(created) == 1


@both
def test_two_that_list_race_for_keys_and_one_wins(place: Place) -> None:
    assert place.store.put_new("key", b"first")
    assert not place.store.put_new("key", b"second")
    assert place.store.read("key") == b"first"
