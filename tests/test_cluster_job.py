"""Jobs on real Ray clusters with real object stores, from the command line: what is sorted where, kills, undo."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

import pytest
from breaking_line import Fault, Line, Request, breaking_line
from conftest import GREEN, RED, plain
from object_stores import Server
from ray_machines import ENVIRONMENT, INTERRUPTED, Machines, interrupt, machines, processes
from test_terminal import Terminal

from sorter.classifier import manifest as manifests
from sorter.cluster import exclusion
from sorter.cluster import job as jobs
from sorter.cluster.job import Job
from sorter.cluster.node import MAX_DEATHS
from sorter.cluster.object_mover import KEY_BYTES, ObjectMover
from sorter.cluster.shard_mover import ShardMover
from sorter.cluster.shards import Decided
from sorter.cluster.stores import open_store
from sorter.inbox.sidecars import SidecarNames
from sorter.settings import SHIPPED_MODEL, Settings

pytestmark = pytest.mark.timeout(1800)

NODE = "ray::ObjectNode"


class Photos:
    """A bucket of its own, with an inbox."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.bucket, self.client = server, name, server.client
        self.client.create_bucket(Bucket=name)
        self.urls = ("--inbox", f"s3://{name}/in", "--output", f"s3://{name}/sorted")

    def put(self, files: dict[str, bytes]) -> None:
        def put(item: tuple[str, bytes]) -> None:
            name, data = item
            key = f"in/{name}"
            self.client.put_object(
                Bucket=self.bucket, Key=key, Body=data, ContentType="image/jpeg", Metadata={"name": name}
            )

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put, files.items()))

    def objects(self) -> list[str]:
        """What there is, without the sorter's own files."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return [key for key in keys if ".sorter/" not in key]

    def contents(self) -> Counter[bytes]:
        """The bytes of each, however often: none may get lost, and none may be there twice."""
        with ThreadPoolExecutor(4) as pool:
            read = pool.map(
                lambda key: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read(), self.objects()
            )
            return Counter(read)

    def start(self, action: str, *flags: str, server: Server | None = None) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "sorter", "cluster", action, *self.urls, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, **(server or self.server).environment},
            start_new_session=True,
        )

    def run(self, action: str, *flags: str, server: Server | None = None) -> tuple[int, str, str]:
        with self.start(action, *flags, server=server) as process:
            out, err = process.communicate(timeout=1500)
        return process.returncode, out, err

    def job(self, monkeypatch: pytest.MonkeyPatch, settings: Settings | None = None) -> Job:
        """The job that `run` is going to do, so that a test can deal smaller shards."""
        for name, value in self.server.environment.items():
            monkeypatch.setenv(name, value)
        places = (*open_store(f"s3://{self.bucket}/in"), *open_store(f"s3://{self.bucket}/sorted"))
        return jobs.job_of(*places, settings or Settings(), manifests.read(SHIPPED_MODEL))[0]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[[Photos, int], Job]:
    """Deals an inbox into shards of a few photos."""

    def deal(photos: Photos, rows: int) -> Job:
        job = photos.job(monkeypatch)
        items = list(job.inbox.list(job.inbox_prefix))
        for number, start in enumerate(range(0, len(items), rows)):
            assert job.files.put_shard(f"{number:05}", items[start : start + rows])
        return job

    return deal


@pytest.fixture
def bucket(strict_moto: Server, request: pytest.FixtureRequest) -> Photos:
    return Photos(strict_moto, f"b{abs(hash(request.node.name)) % 10**9}")


@pytest.fixture
def line(strict_moto: Server) -> Iterator[Line]:
    with breaking_line(strict_moto) as one:
        yield one


def samples(shared: Path, count: int, seed: int = 1) -> list[Path]:
    photos = sorted((shared / "kaggle-180" / "training_set" / "training_set").glob("*/*.jpg"))
    return random.Random(seed).sample(photos, count)


@pytest.mark.torture
def test_a_thousand_photos_are_sorted_as_one_machine_sorts_them(
    swift: Server, shared: Path, tmp_path: Path, pytestconfig: pytest.Config, proved: Callable[[str], None]
) -> None:
    chosen = samples(shared, 1_000 // pytestconfig.getoption("every"))
    files = {f"{photo.parent.name}/{photo.name}": photo.read_bytes() for photo in chosen}
    photos = Photos(swift, "thousand")
    photos.put(files)
    for name, data in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    command = [sys.executable, "-m", "sorter", "run", "--once", "--recursive", "--settle-seconds", "0"]
    places = ["--inbox", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    subprocess.run([*command, *places], check=True, capture_output=True)
    expected = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob("*/*/*.jpg")}

    started = time.monotonic()
    code, out, err = photos.run("run")
    seconds = time.monotonic() - started
    assert code == 0, err
    assert {key.removeprefix("sorted/") for key in photos.objects()} == expected
    assert photos.contents() == Counter(files.values())
    for key in photos.objects():
        head = photos.client.head_object(Bucket=photos.bucket, Key=key)
        assert head["ContentType"] == "image/jpeg"
        assert head["Metadata"]["name"] == "/".join(key.split("/")[2:])
    proved(f"{len(expected)} photos in Swift went where sorter run puts them, with metadata, in {seconds:.0f} s")
    assert f"{len(expected)} photos sorted" in out


@pytest.mark.torture
def test_it_goes_on_after_every_kill_and_no_photo_is_lost_or_there_twice(
    bucket: Photos,
    line: Line,
    shared: Path,
    tmp_path: Path,
    small_shards: Callable[[Photos, int], Job],
    proved: Callable[[str], None],
) -> None:
    """Actors, machines and commands die; what is finished is never fetched again."""
    generator = random.Random(7)
    files = {photo.name: photo.read_bytes() for photo in samples(shared, 800)}
    bucket.put(files)
    job = small_shards(bucket, 8)
    killed, finished_at_start = Counter[str](), dict[int, set[str]]()
    with machines(2, tmp_path, line.server.environment) as cluster:
        commands = 0
        while True:
            finished_at_start[len(line.requests)] = job.files.finished("moves")
            command = bucket.start("run", "--address", cluster.address, "--workers", "2", server=line.server)
            commands += 1
            _kill_until_it_ends(command, cluster, line, generator, killed, commands)
            _, err = command.communicate()
            if command.returncode != -signal.SIGKILL:
                break
    assert command.returncode == 0, err
    assert bucket.contents() == Counter(files.values())
    assert all(key.startswith(("sorted/cats/", "sorted/dogs/")) for key in bucket.objects())
    fetched_again = 0
    shard_of = {item.key: name for name in job.files.shards() for item in job.files.read_shard(name)}
    for number, request in enumerate(line.requests):
        before = finished_at_start[max(start for start in finished_at_start if start <= number)]
        key = request.path.partition("?")[0].removeprefix(f"/{bucket.bucket}/")
        fetched_again += request.operation == "GetObject" and shard_of.get(key, "") in before
    assert fetched_again == 0
    proved(
        f"{len(files)} photos, {killed['actor']} actors, {killed['machine']} machines and {killed['command']} commands "
        f"killed: 0 lost, 0 twice, 0 of finished shards fetched again; {commands} commands"
    )
    assert killed == {"actor": 20, "machine": 2, "command": 5}


def _kill_until_it_ends(
    command: "subprocess.Popen[str]",
    cluster: Machines,
    line: Line,
    generator: random.Random,
    killed: Counter[str],
    commands: int,
) -> None:
    """Kill nodes at random moments of their work; after every third one a machine, up to two, and five commands."""
    before = killed["actor"]
    while _worked_on(line, command):
        time.sleep(generator.uniform(0, 0.4))
        if killed["command"] < 5 and killed["actor"] >= before + 3:
            if killed["machine"] < min(2, commands):
                cluster.kill()
                cluster.add()
                killed["machine"] += 1
            command.kill()
            killed["command"] += 1
            return
        actors = processes(NODE, cluster.pid)
        if killed["actor"] < 20 and actors:
            with suppress(ProcessLookupError):
                os.kill(generator.choice(actors), signal.SIGKILL)
                killed["actor"] += 1


def _worked_on(line: Line, command: "subprocess.Popen[str]") -> bool:
    """Wait until a photo is fetched, copied or deleted; False if the command has ended before."""
    seen = len(line.requests)
    while command.poll() is None:
        for request in line.requests[seen:]:
            is_work = request.operation in ("GetObject", "CopyObject", "DeleteObject")
            if is_work and ".sorter/" not in request.path:
                return True
        time.sleep(0.02)
    return False


@pytest.mark.long
@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("listing", signal.SIGTERM),
        ("gcs_server", signal.SIGINT),
        ("raylet/raylet", signal.SIGTERM),
        (NODE, signal.SIGINT),
    ],
)
def test_a_signal_before_the_first_node_is_ready_ends_the_command_and_all_of_ray_and_frees_the_lease(
    bucket: Photos, line: Line, monkeypatch: pytest.MonkeyPatch, phase: str, number: int, proved: Callable[[str], None]
) -> None:
    bucket.put({"a.jpg": plain(RED)})
    monkeypatch.setitem(ENVIRONMENT, "RAY_AUTH_TOKEN", uuid4().hex)
    command = bucket.start("run", server=line.server)

    def begun() -> object:
        if phase == "listing":
            return any("prefix=in%2F" in request.path for request in line.requests)
        return processes(phase, command.pid)

    out, err, seconds = interrupt(command, begun, number)
    assert (command.returncode, out) == (3, ""), err
    assert err.splitlines()[-1] == INTERRUPTED
    assert bucket.objects() == ["in/a.jpg"]
    keys = [entry["Key"] for entry in bucket.client.list_objects_v2(Bucket=bucket.bucket)["Contents"]]
    last = max(key for key in keys if "/lease/" in key)
    assert json.loads(bucket.client.get_object(Bucket=bucket.bucket, Key=last)["Body"].read())["released"]
    assert not any("/probe-" in key for key in keys)
    proved(f"{signal.Signals(number).name} at {phase}: the command and all of Ray ended within {seconds:.1f} s")


@pytest.mark.long
def test_undo_after_a_job_brings_every_photo_back(bucket: Photos, strict_moto: Server) -> None:
    files = {f"2019/{n}.jpg": plain(RED if n % 2 else GREEN, n) for n in range(40)} | {"2019/1.xmp": b"<xmp>"}
    bucket.put(files)
    before = sorted(bucket.objects())
    assert bucket.run("undo")[0] == 2  # there is no job yet
    code, _, err = bucket.run("run")
    assert code == 0, err
    assert not any(key.startswith("in/") for key in bucket.objects())
    code, out, _ = bucket.run("status")
    assert code == 0
    assert "finished\nsorted   1 of 1 shards" in out
    assert "undone" not in out
    bucket.put({"2019/7.jpg": b"a stranger's"})
    code, out, err = bucket.run("undo")
    assert (code, out) == (3, "Restored 40 objects; 1 could not be restored.\n"), err
    assert "sorted/cats/2019/7.jpg: another object has the key 'in/2019/7.jpg'" in err
    assert sorted(bucket.objects()) == sorted([*before, "sorted/cats/2019/7.jpg"])
    code, out, _ = bucket.run("status")
    assert code == 0
    assert out.splitlines()[1:] == ["state  undone. Restored 40 objects; 1 could not be restored."]
    code, out, _ = bucket.run("undo")
    assert (code, out) == (3, "Restored 0 objects; 1 could not be restored.\n")
    bucket.client.delete_object(Bucket=bucket.bucket, Key="in/2019/7.jpg")
    code, out, _ = bucket.run("undo")
    assert (code, out) == (0, "Restored 1 object; 0 could not be restored.\n")
    assert sorted(bucket.objects()) == before
    assert bucket.contents() == Counter(files.values())
    code, out, _ = bucket.run("status")
    assert code == 0
    assert out.splitlines()[1:] == ["state  undone. Restored 41 objects; 0 could not be restored."]
    code, _, err = bucket.run("run")
    assert code == 0, err
    assert sorted(bucket.objects()) == before


def one_completion_at_a_time() -> Callable[[Request], None]:
    """Slows an undo down, so that it can be interrupted in the middle."""
    turn = threading.Lock()

    def before(request: Request) -> None:
        if request.operation == "CompleteMultipartUpload":
            with turn:
                time.sleep(0.1)

    return before


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_undo_after_the_photos_in_hand_and_a_second_one_at_once_and_the_same_command_goes_on(
    bucket: Photos, line: Line, monkeypatch: pytest.MonkeyPatch, number: int, proved: Callable[[str], None]
) -> None:
    files = {f"{n:02}.jpg": plain(RED, n) for n in range(80)}
    bucket.put(files)
    _sort_into_cats(bucket.job(monkeypatch))
    assert not any(key.startswith("in/") for key in bucket.objects())

    def interrupted(signals: int) -> tuple[int, str, str]:
        line.reset()
        line.before = one_completion_at_a_time()
        command = bucket.start("undo", server=line.server)
        while sum(r.operation == "DeleteObject" and "/cats/" in r.path for r in line.requests) < 8:
            assert command.poll() is None, command.communicate()
            time.sleep(0.02)
        for _ in range(signals):
            command.send_signal(number)
            time.sleep(0.2)
        out, err = command.communicate(timeout=60)
        return command.returncode, out, err

    code, out, err = interrupted(1)
    back = sum(key.startswith("in/") for key in bucket.objects())
    assert (code, out, err) == (
        3,
        f"Restored {back} objects; 0 could not be restored. Interrupted: the same command goes on.\n",
        "",
    )
    assert 0 < back < len(files)
    assert bucket.contents() == Counter(files.values())
    assert "undo interrupted: run sorter cluster undo again" in bucket.run("status")[1]
    assert interrupted(2)[0] == 128 + number
    code, _, err = bucket.run("run")
    assert (code, "finish it first, with sorter cluster undo --inbox s3://" in err) == (4, True), err
    assert bucket.run("undo")[:2] == (0, f"Restored {len(files)} objects; 0 could not be restored.\n")
    assert sorted(bucket.objects()) == sorted(f"in/{name}" for name in files)
    assert bucket.contents() == Counter(files.values())
    proved(f"{signal.Signals(number).name} to an undo of {len(files)}: it ended with {back} back, none twice")


@pytest.mark.long
def test_on_a_terminal_an_undo_shows_how_far_it_is_and_names_what_it_cannot_restore(
    bucket: Photos, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put({f"{n:02}.jpg": plain(RED, n) for n in range(80)})
    _sort_into_cats(bucket.job(monkeypatch))
    bucket.put({"07.jpg": b"a stranger's"})
    line.before = one_completion_at_a_time()
    terminal = Terminal("cluster", "undo", *bucket.urls, **line.server.environment)
    terminal.wait_for(b"restoring")
    terminal.wait_for(b" photos/s")
    terminal.press_ctrl_c()
    terminal.wait_for(b"\x1b[?25h")  # the cursor that the bar has hidden
    terminal.wait_for(b"Interrupted: the same command goes on.")
    assert terminal.exit_code() == 3
    assert b"cannot restore sorted/cats/07.jpg: another object has the key" in terminal.shown


def _sort_into_cats(job: Job) -> None:
    """What a job without Ray and a model would do."""
    described = {"inbox": f"{job.inbox.url}/{job.inbox_prefix}", "folders": ["cats"], "sidecar_suffixes": []}
    with exclusion.begin(job, described):
        items = list(job.inbox.list(job.inbox_prefix))
        job.files.put_shard("00000", items)
        decided = [Decided(i.key, "sorted", f"sorted/cats/{i.key.removeprefix(job.inbox_prefix)}") for i in items]
        with closing(ShardMover(job.files, ObjectMover(job.output, "copy"), SidecarNames())) as mover:
            mover.move("00000", job.files.put_decisions("00000", decided))


@pytest.mark.long
def test_what_is_left_is_named_with_its_reason_and_later_runs_say_so_until_it_is_gone(bucket: Photos) -> None:
    bucket.put({"b.jpg": plain(RED, 1), "c.jpg": plain(RED)[:300]})
    bucket.client.put_object(Bucket=bucket.bucket, Key="in/a.jpg", Body=plain(RED), StorageClass="GLACIER")
    code, out, err = bucket.run("run")
    assert code == 3, err
    (left,) = [json.loads(one) for one in err.splitlines() if "photo.left" in one]
    assert left["path"] == "in/a.jpg"
    assert left["reason"] == "its storage class is GLACIER: restore it first"
    assert bucket.objects() == ["in/a.jpg", "sorted/cats/b.jpg", "sorted/failed/c.jpg"]
    code, out, _ = bucket.run("status")
    assert code == 0
    assert ["failed", "1"] in [row.split() for row in out.splitlines()]
    assert ["left", "1"] in [row.split() for row in out.splitlines()]
    folder = next(row.split()[1].rstrip(",") for row in out.splitlines() if row.startswith("reasons"))
    content = bucket.client.get_object(Bucket=bucket.bucket, Key=f"{folder.partition(bucket.bucket)[2][1:]}00000.jsonl")
    rows = [json.loads(row) for row in content["Body"].read().splitlines()]
    assert [(row["key"], row["kind"]) for row in rows] == [("in/a.jpg", "left"), ("in/c.jpg", "failed")]
    code, out, err = bucket.run("run")
    assert code == 3, err
    assert "left earlier are still in the inbox" in out
    bucket.client.delete_object(Bucket=bucket.bucket, Key="in/a.jpg")
    code, out, err = bucket.run("run")
    assert code == 0, err
    assert "earlier" not in out


@pytest.mark.long
def test_a_store_that_fails_for_two_seconds_costs_no_photo_and_one_that_goes_on_failing_ends_the_command_for_now(
    bucket: Photos, line: Line, proved: Callable[[str], None]
) -> None:
    files = {f"{number:03}.jpg": plain(RED if number % 2 else GREEN, number) for number in range(200)}
    bucket.put(files)
    began: list[float] = []

    def fail_for(seconds: float) -> Callable[[Request], Fault | None]:
        def before(request: Request) -> Fault | None:
            if not began and request.operation == "GetObject" and "/in/" in request.path:
                began.append(time.monotonic())
            return "failure" if began and time.monotonic() < began[0] + seconds else None

        return before

    line.before = fail_for(float("inf"))
    code, _, err = bucket.run("run", server=line.server)
    ended = time.monotonic() - began[0]
    assert code == 1, err
    assert "Traceback" not in err
    assert bucket.contents() == Counter(files.values())
    assert {key.partition("/")[0] for key in bucket.objects()} == {"in"}
    line.reset()
    began.clear()
    line.before = fail_for(2)
    code, out, err = bucket.run("run", server=line.server)
    assert (code, "200 photos sorted" in out) == (0, True), (out, err)
    assert bucket.contents() == Counter(files.values())
    assert not any(key.startswith("in/") for key in bucket.objects())
    proved(f"a store that answers everything with 500 from the first photo on ends the command {ended:.0f} s later")


@pytest.mark.long
def test_a_photo_that_may_not_be_deleted_is_there_twice_and_blocks_neither_its_job_nor_undo_nor_another_job(
    bucket: Photos, line: Line
) -> None:
    bucket.put({"a.jpg": plain(RED), "b.jpg": plain(RED, 1)})
    line.before = lambda request: "denial" if request.method == "DELETE" and "/in/a.jpg" in request.path else None
    code, out, err = bucket.run("run", server=line.server)
    assert (code, "1 photo sorted" in out, "left in the inbox" in out) == (3, True, True), (out, err)
    assert sorted(bucket.objects()) == ["in/a.jpg", "sorted/cats/a.jpg", "sorted/cats/b.jpg"]
    code, out, err = bucket.run("undo", server=line.server)
    assert (code, out) == (3, "Restored 1 object; 1 could not be restored.\n"), err
    assert sorted(bucket.objects()) == ["in/a.jpg", "in/b.jpg", "sorted/cats/a.jpg"]
    line.reset()
    code, out, err = bucket.run("run", "--min-confidence", "0.01", server=line.server)
    assert (code, "2 photos sorted" in out) == (0, True), (out, err)
    assert sorted(bucket.objects()) == ["sorted/cats/a.jpg", "sorted/cats/b.jpg"]


@pytest.mark.long
def test_of_two_commands_with_other_settings_on_one_inbox_one_at_most_sorts_and_status_knows_which(
    bucket: Photos, shared: Path, proved: Callable[[str], None]
) -> None:
    files = {photo.name: photo.read_bytes() for photo in samples(shared, 60)}
    bucket.put(files)
    commands = [bucket.start("run", *flags) for flags in ((), ("--min-confidence", "0.9"))]
    ends = [(*command.communicate(), command.returncode) for command in commands]
    codes = Counter(code for _, _, code in ends)
    assert codes in (Counter([0, 4]), Counter([4, 4])), ends
    for _, err, code in ends:
        assert code != 4 or "is at work on s3://" in err
    assert bucket.contents() == Counter(files.values())
    if codes[0]:
        code, out, err = bucket.run("status")
        assert (code, "finished" in out) == (0, True), err
        assert all(key.startswith("sorted/") for key in bucket.objects())
    proved(f"two commands with other settings at once on one inbox: exit codes {sorted(codes.elements())}, none twice")


ODD_KEYS = ["with  spaces.jpg", "a+b.jpg", "100%.jpg", "%2e%2E.jpg", "Köln/ö.jpg", "🐈/🐕.jpg", "a//b.jpg", "?q&#.jpg"]


@pytest.mark.long
def test_decide_only_moves_nothing_and_the_next_run_moves_by_that_whatever_the_keys(bucket: Photos, line: Line) -> None:
    fits = "f" * (KEY_BYTES - len("sorted/cats/.jpg")) + ".jpg"
    longest = "l" * (KEY_BYTES - len("in/.jpg")) + ".jpg"
    hidden = ["../x.jpg", "./y.jpg", "ends in a slash/"]  # as in a folder, where none of these is a photo's name
    moved, names = [*ODD_KEYS, fits], [*ODD_KEYS, fits, longest, *hidden]
    files = {name: plain(RED, number) for number, name in enumerate(names)}
    for name, data in files.items():
        bucket.client.put_object(Bucket=bucket.bucket, Key=f"in/{name}", Body=data)
    code, out, err = bucket.run("run", "--decide-only", server=line.server)
    assert code == 0, err
    assert f"{len(moved) + 1} photos would be sorted" in out
    assert sorted(bucket.objects()) == sorted(f"in/{name}" for name in names)

    def fetched() -> list[str]:
        return [r.path for r in line.requests if r.operation == "GetObject" and "/in/" in r.path]

    assert len(fetched()) == len(moved) + 1
    line.reset()
    code, out, err = bucket.run("run", server=line.server)
    assert code == 3, err
    assert f"{len(moved)} photos sorted" in out
    assert fetched() == []
    expected = [*(f"sorted/cats/{name}" for name in moved), *(f"in/{name}" for name in (longest, *hidden))]
    assert sorted(bucket.objects()) == sorted(expected)
    assert bucket.contents() == Counter(files.values())


@pytest.mark.long
def test_nodes_that_only_move_are_no_standstill(bucket: Photos, line: Line, proved: Callable[[str], None]) -> None:
    """A store that copies one object a second, and a command that ends if nothing happens for eight."""
    files = {f"{n}.jpg": plain(RED, n) for n in range(24)}
    bucket.put(files)
    assert bucket.run("run", "--decide-only")[0] == 0
    turn = threading.Lock()

    def wait(request: Request) -> None:
        if request.operation == "CopyObject" and "/.sorter/" not in request.path:
            with turn:
                time.sleep(1)

    line.before = wait
    code = (
        "import sys\nfrom sorter.cli.main import main\nfrom sorter.cluster import pool\n"
        "await_first = pool.Pool.await_first\n"
        "def begin(self):\n    found = await_first(self)\n    pool.NO_PROGRESS_SECONDS = 8.0\n    return found\n"
        "pool.Pool.await_first = begin\nsys.exit(main(sys.argv[1:]))"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "cluster", "run", *bucket.urls],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, **line.server.environment},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert bucket.contents() == Counter(files.values())
    assert all(key.startswith("sorted/cats/") for key in bucket.objects())
    proved(f"24 copies of a second each in {time.monotonic() - started:.0f} s, with a standstill of 8 s: all moved")


@pytest.mark.torture
def test_two_commands_at_once_whose_lease_was_removed_by_hand_move_each_photo_once(
    bucket: Photos, shared: Path, tmp_path: Path, small_shards: Callable[[Photos, int], Job]
) -> None:
    files = {photo.name: photo.read_bytes() for photo in samples(shared, 100)}
    bucket.put(files)
    job = small_shards(bucket, 10)
    with machines(2, tmp_path, bucket.server.environment) as cluster:
        flags = ("--address", cluster.address, "--workers", "1")
        first = bucket.start("run", *flags)
        while not any(".sorter/cluster" in item.key and "/lease/" in item.key for item in job.output.list("sorted/")):
            time.sleep(0.2)
            assert first.poll() is None
        code, _, err = bucket.run("run", *flags)
        assert code == 4, err
        assert "is at work on this job" in err
        assert bucket.run("undo")[0] == 4
        for item in job.output.list(f"{job.folder}lease/"):
            bucket.client.delete_object(Bucket=bucket.bucket, Key=item.key)
        second = bucket.start("run", *flags)
        codes = [command.communicate()[0] and command.returncode for command in (first, second)]
    assert set(codes) <= {0, 4}  # the one whose lease is gone may notice that
    assert 0 in codes
    assert bucket.contents() == Counter(files.values())
    assert all(key.startswith("sorted/") for key in bucket.objects())


@pytest.mark.torture
def test_a_stopped_node_that_goes_on_after_others_have_finished_its_shard_changes_nothing(
    bucket: Photos, line: Line, shared: Path, tmp_path: Path, small_shards: Callable[[Photos, int], Job]
) -> None:
    files = {photo.name: photo.read_bytes() for photo in samples(shared, 30)}
    bucket.put(files)
    job = small_shards(bucket, 10)
    stopped: list[int] = []
    lock = threading.Lock()

    with machines(1, tmp_path, line.server.environment) as cluster:

        def stop(request: Request) -> None:
            """At the first copy, all nodes that there are stand still."""
            with lock:
                if request.operation == "CopyObject" and not stopped and "/sorted/.sorter/probe" not in request.path:
                    stopped.extend(processes(NODE, cluster.pid))
                    for process in stopped:
                        os.kill(process, signal.SIGSTOP)

        line.before = stop
        zombie = bucket.start("run", "--address", cluster.address, server=line.server)
        while not stopped:
            assert zombie.poll() is None
            time.sleep(0.1)
        zombie.kill()  # its lease is free at once; its node stands still
        zombie.communicate()
        cluster.add()
        code, _, err = bucket.run("run", "--address", cluster.address, "--workers", "1")
        assert code == 0, err
        before = sorted(bucket.objects())
        for process in stopped:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        time.sleep(5)
    assert sorted(bucket.objects()) == before
    assert bucket.contents() == Counter(files.values())
    assert job.files.finished("moves") == {"00000", "00001", "00002"}


@pytest.mark.long
def test_a_poison_photo_fails_and_the_rest_is_sorted(bucket: Photos, shared: Path) -> None:
    """Photos that kill their decoders, of the broken ones that were found."""
    bad = {path.name: path.read_bytes() for path in sorted((shared / "bad").iterdir()) if path.is_file()}
    good = {f"{n}.jpg": plain(RED, n) for n in range(20)}
    bucket.put(bad | good)
    code, _, err = bucket.run("run")
    assert code == 3, err
    keys = bucket.objects()
    assert all(any(key.endswith(f"/{name}") and "failed" not in key for key in keys) for name in good)
    assert Counter(bucket.contents().values()) == Counter({1: len(bad | good)})
    assert sum(key.startswith("sorted/failed/") for key in keys) >= 10


@pytest.mark.long
def test_a_photo_that_kills_its_node_each_time_fails_and_its_neighbours_are_sorted(
    bucket: Photos, line: Line, small_shards: Callable[[Photos, int], Job], proved: Callable[[str], None]
) -> None:
    """Whoever fetches it is killed from outside, as the kernel kills what takes too much memory."""
    bucket.put({f"{n}.jpg": plain(RED, n) for n in range(5)})
    job = small_shards(bucket, 5)
    command = bucket.start("run", server=line.server)

    def poison(request: Request) -> Fault | None:
        if request.operation != "GetObject" or not request.path.endswith("/in/2.jpg"):
            return None
        for process in processes(NODE, command.pid):
            os.kill(process, signal.SIGKILL)
        return "cut before"

    line.before = poison
    _, err = command.communicate(timeout=1500)
    assert command.returncode == 3, err
    assert sorted(bucket.objects()) == [*(f"sorted/cats/{n}.jpg" for n in (0, 1, 3, 4)), "sorted/failed/2.jpg"]
    reasons = [row.reason for name in job.files.shards() for row in job.files.read_decisions(name) or [] if row.reason]
    assert reasons == ["decoder-crash"]
    deaths = {name: job.files.deaths(name) for name in job.files.shards()}
    proved(f"a shard of 5 with a photo that kills its node: {sum(deaths.values())} nodes died, 1 failed, 4 sorted")
    assert deaths == {"00000": 3, "00000-0": 0, "00000-1": 3, "00000-1-0": 3, "00000-1-1": 0}


@pytest.mark.long
def test_a_photo_whose_command_is_killed_each_time_it_is_fetched_is_sorted_in_the_end(
    bucket: Photos, line: Line, proved: Callable[[str], None]
) -> None:
    """As a machine that is taken away: the command goes, and its nodes with it."""
    bucket.put({"a.jpg": plain(RED)})
    commands: list[subprocess.Popen[str]] = []
    lock = threading.Lock()

    def kill(request: Request) -> Fault | None:
        if request.operation != "GetObject" or not request.path.endswith("/in/a.jpg"):
            return None
        with lock:
            nodes = processes(NODE, commands[-1].pid)
            commands[-1].kill()
            for node in nodes:
                with suppress(ProcessLookupError):
                    os.kill(node, signal.SIGKILL)
        return "cut before"

    line.before = kill
    for _ in range(MAX_DEATHS):
        commands.append(bucket.start("run", server=line.server))
        commands[-1].communicate(timeout=300)
        assert commands[-1].returncode == -signal.SIGKILL
    code, _, err = bucket.run("run")
    assert code == 0, err
    assert bucket.objects() == ["sorted/cats/a.jpg"]
    proved(f"a photo whose command was killed {MAX_DEATHS} times while it was fetched: sorted by the next one")


@pytest.mark.long
def test_no_packet_leaves_the_machine(tmp_path: Path, shared: Path) -> None:
    """In a network that has nothing but the loopback; Ray's usage reports are off in its own processes too."""
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        pytest.skip("a network of its own needs root and unshare")
    for photo in samples(shared, 30):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(photo, tmp_path / "in")
    seen = tmp_path / "seen.json"
    command = f"{sys.executable} -m sorter cluster run --settle-seconds 0 --inbox {tmp_path}/in --output {tmp_path}/out"
    watch = (
        "import json, os, sys, time\nfrom pathlib import Path\nfound = {}\n"
        f"while not Path({str(tmp_path / 'done')!r}).exists():\n"
        "    for entry in filter(str.isdigit, os.listdir('/proc')):\n"
        "        try:\n"
        "            title = Path('/proc', entry, 'cmdline').read_bytes().decode(errors='replace')\n"
        "            if title.startswith('ray::Node'):\n"
        "                found[entry] = Path('/proc', entry, 'environ').read_bytes().decode(errors='replace')\n"
        "        except OSError:\n            pass\n    time.sleep(0.1)\n"
        f"Path({str(seen)!r}).write_text(json.dumps(found))\n"
    )
    script = f"ip link set lo up; ip -o link | wc -l; {command}; echo code $?"
    watcher = subprocess.Popen([sys.executable, "-c", watch])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [unshare, "--net", "sh", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    (tmp_path / "done").touch()
    watcher.wait(30)
    assert done.stdout.splitlines()[0] == "1", done.stderr
    assert "code 0" in done.stdout, done.stderr
    assert "30 photos sorted" in done.stdout
    environments = json.loads(seen.read_text())
    assert environments
    assert all("RAY_USAGE_STATS_ENABLED=0" in text and "RAY_AUTH_MODE=token" in text for text in environments.values())
