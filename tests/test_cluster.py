"""What the cluster's parts promise without a cluster or a store: deciding, scratch space, nodes, flags, refusals."""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import GREEN, RED, RedGreenEngine, make_tree, plain
from object_stores import Server
from ray_machines import with_another_disk_in

from sorter.classifier.manifest import Manifest
from sorter.cli import cluster
from sorter.cli.main import main
from sorter.cluster.deciding import Decider
from sorter.cluster.lease import Lease
from sorter.cluster.node import Node, setup
from sorter.cluster.pool import Pool
from sorter.cluster.ray_cluster import Shape, connected, shape
from sorter.cluster.scratch import Scratch
from sorter.cluster.shared_folder import SharedFolder
from sorter.cluster.stores import open_store
from sorter.decisions import Outcome
from sorter.errors import ConfigurationError, NotNowError, Reason, StorageError
from sorter.files.photo import Identity, Photo
from sorter.settings import Settings

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def decider(manifest: Manifest) -> Iterator[Decider]:
    one = Decider(RedGreenEngine(), manifest, Settings(batch_size=8), workers=2)
    yield one
    one.close()


def photos_in(folder: Path) -> list[Photo]:
    return [Photo(folder, path.name, Identity.of(path.stat()), time.time()) for path in sorted(folder.iterdir())]


def folders(outcomes: list[Outcome]) -> dict[str, str]:
    return {o.photo.name: o.decision.folder if o.decision else o.kind for o in outcomes}


def test_a_node_decides_as_the_sorter_does_and_touches_nothing(tmp_path: Path, decider: Decider) -> None:
    files = {"r.jpg": plain(RED), "g.jpg": plain(GREEN), "broken.jpg": plain(RED)[:300], "a.txt": b"text"}
    before = make_tree(tmp_path / "in", files)
    outcomes: list[Outcome] = []
    decider.decide(photos_in(before), outcomes.append)
    assert folders(outcomes) == {"r.jpg": "cats", "g.jpg": "dogs", "broken.jpg": "failed", "a.txt": "skipped"}
    reasons = {o.photo.name: o.decision.decoded.reason for o in outcomes if o.decision is not None}
    assert reasons["broken.jpg"] in (Reason.TRUNCATED, Reason.CORRUPT)
    assert {path.name: path.read_bytes() for path in before.iterdir()} == files


def test_several_requests_at_once_get_their_own_answers(tmp_path: Path, decider: Decider) -> None:
    answers: dict[int, list[Outcome]] = {number: [] for number in range(4)}

    def ask(number: int) -> None:
        folder = make_tree(
            tmp_path / str(number), {f"{n}.jpg": plain(RED if number % 2 else GREEN, n) for n in range(25)}
        )
        decider.decide(photos_in(folder), answers[number].append)

    threads = [threading.Thread(target=ask, args=(number,)) for number in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {n: folders(found) for n, found in answers.items()} == {
        n: {f"{m}.jpg": "cats" if n % 2 else "dogs" for m in range(25)} for n in answers
    }
    assert decider.decided == 100


def test_a_batch_that_cannot_be_filled_is_decided_on_all_the_same(tmp_path: Path, decider: Decider) -> None:
    """Photos may wait for the space that those of the batch take: then no more come until it is done."""
    folder = make_tree(tmp_path / "in", {f"{n}.jpg": plain(RED, n) for n in range(4)})
    space, told = threading.Semaphore(2), []

    def one_by_one() -> Iterator[Photo]:
        for photo in photos_in(folder):
            assert space.acquire(timeout=30)
            yield photo

    def tell(outcome: Outcome) -> None:
        told.append(outcome)
        space.release()

    decider.decide(one_by_one(), tell)
    assert len(told) == 4


def test_scratch_space_is_bounded_and_a_larger_photo_gets_all_of_it() -> None:
    scratch = Scratch(100)
    try:
        scratch.reserve(60)
        scratch.reserve(40)
        waiting = threading.Thread(target=scratch.reserve, args=(1_000,))
        waiting.start()
        scratch.release(60)
        waiting.join(0.2)
        assert waiting.is_alive()
        scratch.release(40)
        waiting.join(10)
        assert not waiting.is_alive()
    finally:
        scratch.close()
    assert not scratch.folder.exists()


def test_what_a_killed_node_left_is_removed_and_what_a_live_one_has_is_not() -> None:
    code = "import time; from sorter.cluster.scratch import Scratch; s = Scratch(100); print(s.folder, flush=True); "
    code += "(s.folder / 'a.jpg').write_bytes(b'a'); time.sleep(100)"
    with ExitStack() as stack:
        command = [sys.executable, "-c", code]
        running = [stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) for _ in range(2)]
        for process in running:
            stack.callback(process.kill)
        left = [Path(process.stdout.readline().strip()) for process in running if process.stdout is not None]
        running[0].kill()
        running[0].wait()
        Scratch(100).close()
        assert [folder.exists() for folder in left] == [False, True]
    Scratch(100).close()
    assert not left[1].exists()


def test_a_folder_that_is_locked_is_somebodys() -> None:
    one = Scratch(100)
    try:
        descriptor = os.open(one.folder / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    finally:
        one.close()


def test_a_node_refuses_another_folder_than_the_commands_and_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": plain(RED)})
    folder, host = SharedFolder.of(inbox), os.uname().nodename
    folder.check()
    code = f"from pathlib import Path; from sorter.cluster.shared_folder import SharedFolder; {folder!r}.check()"
    code = code.replace("PosixPath", "Path")
    done = subprocess.run(
        [*with_another_disk_in(inbox), sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"the node {host} has another folder in {inbox} than this machine: mount the shared disk" in done.stderr
    with pytest.raises(ConfigurationError, match=f"node {host} cannot open the folder .* .No such file.*: mount"):
        replace(folder, path=tmp_path / "missing").check()
    other = replace(folder, path=tmp_path)
    monkeypatch.setattr("sorter.files.file_systems.kind", lambda _: "fuse.sshfs")
    other.check()  # whose numbers say nothing
    assert SharedFolder.of(inbox).inode is None


def test_a_node_looks_at_the_shared_folder_when_it_begins_and_when_photos_are_missing(tmp_path: Path) -> None:
    folder, node = SharedFolder.of(tmp_path), Node()
    with pytest.raises(ConfigurationError, match="another folder"):
        node.begin(setup(Settings(), "", 1, folder=replace(folder, inode=0)))
    shutil.rmtree(tmp_path)
    node._folder = folder
    with pytest.raises(ConfigurationError, match="cannot open the folder"):
        node.decide(tmp_path, ["a.jpg"])


class _Machines:
    """As much of Ray as `shape` asks."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self._machines = machines

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": machine} for machine in self._machines]


@pytest.mark.parametrize(
    ("machines", "device", "nodes", "expected"),
    [
        ([{"CPU": 2}], "auto", None, Shape(1, 2, 0)),
        ([{"CPU": 2}], "auto", 2, Shape(2, 1, 0)),
        ([{"CPU": 0}, {"CPU": 64}, {"CPU": 64}], "auto", None, Shape(2, 64, 0)),  # a head without work, and workers
        ([{"CPU": 16}, {"CPU": 64}], "auto", None, Shape(5, 16, 0)),
        ([{"CPU": 1}, *[{"CPU": 16}] * 8], "auto", None, Shape(8, 16, 0)),  # a head with one CPU
        ([{"CPU": 64}], "auto", 8, Shape(8, 8, 0)),
        ([{"CPU": 2}], "auto", 4, Shape(2, 1, 0)),
        ([{"CPU": 64}, {"CPU": 64}], "auto", 8, Shape(8, 64, 0)),  # of a cluster that grows
        ([{"CPU": 8}, {"CPU": 64, "GPU": 4}], "auto", None, Shape(4, 16, 1)),
        ([{"CPU": 8}, {"CPU": 64, "GPU": 4}], "cpu", None, Shape(9, 8, 0)),
    ],
)
def test_there_is_a_node_for_each_machine_or_gpu(
    machines: list[dict[str, float]], device: str, nodes: int | None, expected: Shape
) -> None:
    assert shape(_Machines(*machines), device, nodes) == expected


def test_a_cluster_without_cpus_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="start its workers"):
        shape(_Machines({"CPU": 0}), "auto", None)


class _Stuck:
    """As much of Ray as a pool needs of a cluster in which nothing happens."""

    def remote(self, *_: object, **__: object) -> "_Stuck":
        return self

    def __call__(self, *_: object) -> "_Stuck":
        return self

    def __getattr__(self, _: str) -> "_Stuck":
        return self

    def wait(self, references: list[object], **_: object) -> tuple[list[object], list[object]]:
        return [], references


def test_nodes_that_finish_nothing_for_ten_minutes_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(_Stuck(), Shape(1, 1, 0), setup(Settings(), "", 1))
    now = time.monotonic()
    monkeypatch.setattr("sorter.cluster.pool.time.monotonic", lambda: now + 599)
    pool.check_progress()
    monkeypatch.setattr("sorter.cluster.pool.time.monotonic", lambda: now + 700)
    with pytest.raises(StorageError, match="10 minutes"):
        pool.await_first()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("run --inbox s3://photos/in --output out", "a folder and a URL"),
        ("run --inbox s3://photos/in --link", "--link does not apply"),
        ("run --inbox s3://photos/in --dry-run", "use --decide-only"),
        ("run --inbox s3://photos/in --state-dir state", "--state-dir does not apply"),
        ("run --inbox gs://photos/in", "s3://"),
        ("run --inbox s3://photos/in --no-recursive", "--no-recursive does not apply"),
        ("run --inbox s3:photos/in", "--inbox s3:photos/in is not a URL: write s3://bucket/prefix"),
        ("run --inbox s3://photos/in --output S3:photos", "--output S3:photos is not a URL: write s3://"),
        ("run --inbox s3://photos/in//x", "--inbox: should be a URL without // or /./ in it, not 's3://photos/in//x'"),
        ("run --inbox s3://photos/./in", "without // or /./"),
        ("run --inbox s3:///photos/in", "without // or /./"),
        ("status --inbox s3://photos/in --output s3://photos//", "--output: should be a URL without //"),
        ("run --inbox s3://photos/in --sidecar-suffixes .jpg", "such files are photos"),
        ("run --inbox s3://photos/in --job 1", "--job is not for sorter cluster run"),
        ("undo --inbox s3://photos/in --workers 2", "--workers is not for sorter cluster undo"),
        ("run --inbox in --decide-only", "use --dry-run"),
        ("run --inbox in --metrics-port 9000", "--metrics-port"),
        ("status --inbox in", "sorter status"),
        ("undo --inbox in", "sorter undo"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(flags: str, said: str, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert main(["cluster", *flags.split()]) == 2
    _, err = capsys.readouterr()
    assert said in err
    assert err.startswith("sorter: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("ray client connection timeout"), "ray client connection timeout"),
        (
            ConnectionAbortedError(
                "Initialization failure from server:\nTraceback (most recent call last):\n  File proxier.py\n"
                "RuntimeError: Starting Ray client server failed. See ray_client_server_1.err for detailed logs.\n"
            ),
            "Initialization failure from server: RuntimeError: Starting Ray client server failed. See "
            "ray_client_server_1.err for detailed logs.",
        ),
        (ValueError(), "ValueError"),
    ],
)
def test_what_ray_says_is_told_with_its_cause(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")

    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("sorter.cluster.ray_cluster._prepare_environment", lambda **_: None)
    with pytest.raises(NotNowError) as refused, connected("ray://head:10001"):
        pass
    assert str(refused.value).startswith(f"the Ray cluster at ray://head:10001 cannot be used ({said}): ")


def test_the_help_says_what_is_not_for_urls(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["cluster", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--inbox and --output are two folders that all machines share, or two URLs, s3://bucket/prefix." in out
    assert "Not with URLs: --state-dir, --flat, --once, --dry-run, --link, --include-undone, --on-sorted" in out


def test_the_scheme_of_a_url_may_be_in_capitals() -> None:
    assert cluster._url("S3:/Bucket/In") == cluster._url("s3://Bucket/In") == "s3://Bucket/In"


def test_a_url_for_one_machine_is_led_to_the_cluster(capsys: Capture) -> None:
    assert main(["run", "--once", "--inbox", "s3://photos/in"]) == 2
    assert "use sorter cluster run" in capsys.readouterr().err


def test_an_endpoint_that_is_no_url_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "foo")
    with pytest.raises(ConfigurationError, match="Invalid endpoint: foo"):
        open_store("s3://photos/in")


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that answers every request in one way, and the environment that leads to it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
            monkeypatch.setenv(f"AWS_{name}", "some")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


class _Forbidden(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_DELETE = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_credentials_that_may_not_write_are_said_with_the_bucket(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with _serving(_Forbidden, monkeypatch):
        assert main(["cluster", "check", "--inbox", "s3://photos/in", "--output", "s3://photos/sorted"]) == 1
    said = "s3://photos cannot be used: the store refuses it (403: Forbidden); check the permissions"
    assert said in capsys.readouterr().err


class _Flaky(BaseHTTPRequestHandler):
    """Gives each object on the third request for it: fails at the first, and cuts the connection of the second off."""

    failures: Counter[str]

    def do_GET(self) -> None:
        failures = self.failures[self.path]
        self.failures[self.path] = min(failures + 1, 2)
        if failures == 1:
            return
        self.send_response(500 if failures == 0 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_an_error_of_the_store_is_repeated_also_where_botocore_has_used_up_its_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sorter.cluster.s3.pause_seconds", lambda attempt: 0.01)
    _Flaky.failures = Counter()
    with _serving(_Flaky, monkeypatch), ThreadPoolExecutor(32) as pool:
        store, _ = open_store("s3://photos")
        assert list(pool.map(store.read, map(str, range(100)))) == [b""] * 100
    assert _Flaky.failures.total() == 200, "botocore would repeat 35 to 100 requests of a process, and fail at others"


@pytest.mark.usefixtures("_own_signals")
def test_undo_waits_for_the_nodes_of_a_command_that_was_killed(
    strict_moto: Server, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    strict_moto.client.create_bucket(Bucket="killed")
    for name, value in strict_moto.environment.items():
        monkeypatch.setenv(name, value)
    store, _ = open_store("s3://killed")
    folder = "sorted/.sorter/cluster/0123456789ab/"
    store.put_new(f"{folder}job.json", json.dumps({"inbox": "s3://killed/in/", "sidecar_suffixes": []}).encode())
    with monkeypatch.context() as patch:
        patch.setattr("sorter.cluster.lease.os.getpid", lambda: 2**22 + 1)  # more than any process has
        Lease(store, folder)
    undo = ["cluster", "undo", "--inbox", "s3://killed/in", "--output", "s3://killed/sorted"]
    assert main(undo) == 4
    said = r"nodes of a command that was killed may still be at work on this job: wait for 1\d\d seconds"
    assert re.search(said, capsys.readouterr().err)
    with Lease(store, folder):
        pass  # the same command goes on at once, and ends: the nodes of the first one need not have
    assert main(undo) == 4
    assert re.search(said, capsys.readouterr().err)


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    missing, found = {"ray", "boto3", "pyarrow"}, importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
    )
    for place in ("s3://photos/in", "."):
        assert main(["cluster", "run", "--inbox", place]) == 2
        assert "'cluster'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("action", "said"), [("status", "0 of 1 shards"), ("undo", "Restored 0"), ("check", "keeps every")]
)
def test_status_undo_and_check_of_a_bucket_need_no_ray(action: str, said: str, strict_moto: Server) -> None:
    """In a process that cannot import it; `run` says what to install."""
    code = "import sys; sys.modules['ray'] = None; from sorter.cli.main import main; sys.exit(main(sys.argv[1:]))"
    bucket, environment = f"no-ray-{action}", {**os.environ, **strict_moto.environment}
    urls = ["--inbox", f"s3://{bucket}/in", "--output", f"s3://{bucket}/sorted"]
    strict_moto.client.create_bucket(Bucket=bucket)
    described = json.dumps({"inbox": f"s3://{bucket}/in/", "sidecar_suffixes": []}).encode()
    for name, data in {"job.json": described, "shards/00000.parquet": b""}.items():
        key = f"sorted/.sorter/cluster/0123456789ab/{name}"
        strict_moto.client.put_object(Bucket=bucket, Key=key, Body=data)
    run, done = (
        subprocess.run(
            [sys.executable, "-c", code, "cluster", one, *urls],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for one in ("run", action)
    )
    assert (done.returncode, said in done.stdout) == (0, True), done.stderr
    assert (run.returncode, "'cluster'" in run.stderr) == (2, True), run.stderr


def test_a_prefix_with_nothing_below_it_is_said(strict_moto: Server) -> None:
    strict_moto.client.create_bucket(Bucket="nothing-here")
    urls = ["--inbox", "s3://nothing-here/photo", "--output", "s3://nothing-here/sorted"]
    done = subprocess.run(
        [sys.executable, "-m", "sorter", "cluster", "run", *urls],
        env={**os.environ, **strict_moto.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing to sort is below s3://nothing-here/photo/: check --inbox" in done.stdout


def test_the_sorter_alone_imports_nothing_of_the_cluster() -> None:
    code = "import sys, sorter.cli.main; print({'ray', 'boto3', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
