"""Files of a job that are damaged, or that its owner may not read: what is said, and who goes on all the same."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from memory_store import MemoryStore

from sorter.cli import object_store, preflight
from sorter.cluster import exclusion, lease, shard_mover
from sorter.cluster import job as jobs
from sorter.cluster import status as statuses
from sorter.cluster.job import Job
from sorter.cluster.lease import FRESH_SECONDS, Lease
from sorter.cluster.object_mover import ObjectMover
from sorter.cluster.shard_mover import ShardMover
from sorter.cluster.shards import Decided, JobFiles, MovedRow
from sorter.cluster.taking_back import take_back
from sorter.errors import JobFileError, NotNowError, ObjectError
from sorter.inbox.sidecars import SidecarNames
from sorter.settings import Settings

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def job(store: MemoryStore) -> Job:
    return Job("0123456789ab", store, "in/", store, "sorted/")


def described(inbox: str = "memory://photos/in/") -> dict[str, object]:
    folders = ["cats", "dogs", "unsure", "failed"]
    model = {"model": "two-colours", "min_confidence": 0.5, "catch_neither": False}
    return {"inbox": inbox, "folders": folders, **model}


def sort_one(job: Job) -> None:
    """A shard of one photo, with all of its files."""
    item = job.inbox.put("in/a.jpg", b"photo")  # type: ignore[attr-defined]
    with exclusion.begin(job, described()):
        job.files.put_shard("00000", [item])
        decisions = job.files.put_decisions("00000", [Decided("in/a.jpg", "sorted", "sorted/cats/a.jpg", "cat", 1.0)])
        mover = ShardMover(job.files, ObjectMover(job.output, "copy"), SidecarNames())
        mover.move("00000", decisions)
        mover.close()


def cut(store: MemoryStore, key: str) -> None:
    store.put(key, store.objects[key][1][:-9])


def forbid(store: MemoryStore, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = store.read

    def refuse(wanted: str) -> bytes | None:
        if wanted == key:
            raise ObjectError("the store refuses it (AccessDenied: Access Denied)")
        return read(wanted)

    monkeypatch.setattr(store, "read", refuse)


@pytest.mark.parametrize("table", ["shards", "decisions", "moves", "undo"])
@pytest.mark.parametrize("fault", ["damaged", "forbidden"])
def test_a_file_of_the_job_that_cannot_be_read_is_named(
    store: MemoryStore, job: Job, table: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sort_one(job)
    job.files.put_undo("00000", [MovedRow("sorted/cats/a.jpg", "moved", "in/a.jpg", "e")])
    key = f"{job.folder}{table}/00000.parquet"
    if fault == "damaged":
        cut(store, key)
    else:
        forbid(store, key, monkeypatch)
    read: dict[str, Callable[[], object]] = {
        "shards": lambda: job.files.read_shard("00000"),
        "decisions": lambda: job.files.read_decisions("00000"),
        "moves": lambda: job.files.read_moves("00000"),
        "undo": lambda: statuses.read(job),
    }
    said = "is damaged: restore an intact copy" if fault == "damaged" else r"cannot be read, .*AccessDenied.*: check"
    with pytest.raises(JobFileError, match=rf"^memory://photos/{re.escape(key)} {said}"):
        read[table]()


@pytest.mark.parametrize("fault", ["damaged", "forbidden"])
def test_what_cannot_be_read_of_a_job_stops_another_one_only_if_it_may_have_the_same_photos(
    store: MemoryStore, job: Job, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sort_one(job)
    key = f"{job.folder}job.json"
    if fault == "damaged":
        cut(store, key)
    else:
        forbid(store, key, monkeypatch)
    other = replace(job, id="ba9876543210", inbox_prefix="elsewhere/")
    with exclusion.begin(other, described("memory://photos/elsewhere/")):
        store.put("elsewhere/b.jpg", b"photo")
        assert jobs.list_inbox(other, preflight.selection(Settings())) == (1, 1)
    store.put(f"{job.folder}moving/00001", b"")  # half done, in whatever inbox
    with pytest.raises(JobFileError, match=f"not finished may have the same inbox, but memory://photos/{key} "):
        exclusion.begin(other, described("memory://photos/elsewhere/")).__enter__()
    with exclusion.begin(job, described()):  # the job itself goes on
        pass


def test_a_job_at_work_whose_description_is_damaged_is_waited_for(store: MemoryStore, job: Job) -> None:
    other = replace(job, id="ba9876543210", inbox_prefix="elsewhere/")
    with exclusion.begin(job, described()):
        cut(store, f"{job.folder}job.json")
        with pytest.raises(NotNowError, match="at work on an inbox that is not known, as the job 0123456789ab"):
            exclusion.begin(other, described("memory://photos/elsewhere/")).__enter__()


def test_an_inbox_around_the_output_is_not_listed_while_the_folders_of_a_job_are_not_known(store: MemoryStore) -> None:
    """They may be those of a model with other classes, whose photos would be sorted again."""
    job = Job("0123456789ab", store, "", store, "sorted/")
    store.put("sorted/.sorter/cluster/ba9876543210/job.json", b'{"inbox": "memory')
    with pytest.raises(JobFileError, match=r"sorted into are not known, as .*ba9876543210/job.json is damaged"):
        jobs.list_inbox(job, preflight.selection(Settings()))


def test_status_and_undo_find_a_job_beside_a_damaged_one_and_name_that_if_there_is_no_other(
    store: MemoryStore, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(object_store, "open_store", lambda url: (store, url.removeprefix("memory://photos/") + "/"))
    urls = ("memory://photos/in", "memory://photos/sorted")
    sort_one(job)
    damaged = f"{jobs.jobs_folder('sorted/')}ba9876543210/job.json"
    store.put(damaged, b"{")
    object_store.status(Settings(), *urls, None)
    assert "0123456789ab" in capsys.readouterr().out
    with pytest.raises(JobFileError, match=f"{damaged} is damaged: .*, or remove it and repeat the command"):
        object_store.status(Settings(), *urls, "ba9876543210")
    cut(store, f"{job.folder}job.json")
    with pytest.raises(JobFileError, match=f"{job.folder}job.json is damaged"):
        object_store.status(Settings(), *urls, None)


def test_empty_objects_that_stand_for_folders_are_nobodys_files(store: MemoryStore, job: Job) -> None:
    """Some programs leave them where somebody looks at a bucket as at a disk."""
    sort_one(job)
    before = statuses.read(job)
    for folder in ("", "lease/", "moving/", "shards/", "decisions/", "moves/", "undo/", "undoing/", "deaths/"):
        store.put(f"{job.folder}{folder}", b"")
    store.put(jobs.jobs_folder("sorted/"), b"")
    after = statuses.read(job)
    assert replace(after, holder=before.holder) == before
    assert (after.holder.number, after.holder.may_have_nodes) == (2, False)
    assert shard_mover.half_moved(job.files) == set()
    with exclusion.begin(job, described()):
        assert [row.kind for row in take_back(job, "copy", SidecarNames())] == ["moved"]
    assert store.objects["in/a.jpg"][1] == b"photo"
    assert JobFiles(store, job.folder).undos() == {"00000": ["00000"]}


def test_a_damaged_lease_is_somebodys_until_it_is_too_old(store: MemoryStore, job: Job) -> None:
    Lease(store, job.folder)
    cut(store, f"{job.folder}lease/00000001.json")
    with pytest.raises(NotNowError, match=r"another process is at work on this job: wait .* for 1\d\d seconds"):
        Lease(store, job.folder)
    store.idle_seconds += FRESH_SECONDS
    Lease(store, job.folder)
    assert lease.holder(store, job.folder).number == 2


def test_a_lease_that_may_not_be_read_is_named(store: MemoryStore, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    Lease(store, job.folder)
    forbid(store, f"{job.folder}lease/00000001.json", monkeypatch)
    with pytest.raises(JobFileError, match=r"lease/00000001.json cannot be read, .*AccessDenied.*: check the permis"):
        Lease(store, job.folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, "min_confidence 0.5"), ({"min_confidence": 0.9, "catch_neither": True}, "min_confidence 0.9, catch_neither")],
)
def test_a_half_done_job_is_named_with_what_it_began_with_and_with_the_command_that_takes_it_back(
    store: MemoryStore, job: Job, settings: dict[str, object], said: str
) -> None:
    with exclusion.begin(job, described("memory://photos/in/") | settings):
        store.put(f"{job.folder}moving/00000", b"")
    other = replace(job, id="ba9876543210", inbox_prefix="")
    with pytest.raises(NotNowError) as refused:
        exclusion.begin(other, described("memory://photos/")).__enter__()
    assert re.search(rf"\(began \d{{4}}-.*, model two-colours, {said}\)", str(refused.value))
    undo = "sorter cluster undo --inbox memory://photos/in/ --output memory://photos/sorted/ --job 0123456789ab"
    assert str(refused.value).endswith(undo)
