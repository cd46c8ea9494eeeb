"""A decoder that crashes, hangs or eats memory takes its own photo with it and nothing else."""

import contextlib
import fcntl
import functools
import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import LONG_AGO, make_tree, photo
from pictures import encoded
from PIL import Image

from sorter.decoding.decoded import Decoded
from sorter.decoding.decoders import Decoders
from sorter.decoding.images import Limits, Preprocessing
from sorter.errors import Reason, SorterError
from sorter.files.photo import Photo
from sorter.inbox.scan import Inbox

if not Path("/proc/self/task").is_dir():
    pytest.skip("needs /proc to find the worker processes", allow_module_level=True)


def workers(parent: int | None = None) -> list[int]:
    """The decoder processes of a process."""
    found = []
    # Not iterdir, which raises if the parent ends.
    for task in Path(f"/proc/{parent or os.getpid()}/task").glob("*"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return [pid for pid in found if b"sorter.decoding.worker" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Bench:
    """Decoders with a queue for what they deliver."""

    def __init__(
        self, root: Path, *, workers: int = 1, timeout_seconds: float = 20, max_bytes: int = 10_000_000
    ) -> None:
        self.root = root
        self.results: queue.Queue[Decoded] = queue.Queue()
        self.errors: list[BaseException] = []
        self.decoders = Decoders(
            workers=workers,
            rows=4,
            preprocessing=Preprocessing(32),
            limits=Limits(),
            max_bytes=max_bytes,
            timeout_seconds=timeout_seconds,
            deliver=self.results.put,
            fail=self.errors.append,
        )

    def decode(self, name: str) -> Decoded:
        assert self.decoders.submit(self.photo(name), timeout_seconds=5)
        return self.results.get(timeout=60)

    def photo(self, name: str) -> Photo:
        box = Inbox(self.root, recursive=False, excluded=frozenset(), settle_seconds=0)
        found = box.look(name, LONG_AGO + 10)
        assert found is not None
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**options: float) -> Bench:
        benches.append(Bench(tmp_path / "in", **options))  # type: ignore[arg-type]
        return benches[-1]

    make_tree(tmp_path / "in", {"a.jpg": photo(1), "b.jpg": photo(2)})
    yield make
    for made in benches:
        with contextlib.suppress(OSError):  # closed by the test
            made.decoders.close()
        assert made.errors == []


@contextlib.contextmanager
def repeatedly(look: Callable[[], None]) -> Iterator[None]:
    """Do something every few milliseconds in a thread."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            look()
            time.sleep(0.002)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def signal_workers_that_open(path: Path, number: signal.Signals) -> contextlib.AbstractContextManager[None]:
    """Send a signal to each worker that has a file open, as if decoding it had that effect."""

    def send() -> None:
        for pid in workers():
            if str(path) in open_files(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    return repeatedly(send)


def open_files(pid: int) -> list[str]:
    """The paths that a process has open, as /proc names them."""
    found = []
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return found


def is_alive(pid: int) -> bool:
    """True if a worker runs, stopped or not; a zombie has no command line."""
    return b"sorter.decoding.worker" in _command(pid)


def reset_peak() -> None:
    """Restart the measurement of the workers' peak resident memory."""
    for pid in workers():
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak resident memory of any worker since `reset_peak`."""
    peak = 0
    for pid in workers():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
    return peak


def cpu_seconds() -> float:
    """CPU time of the workers since they started; unlike wall time it is the same on a busy machine."""
    ticks = 0
    for pid in workers():
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime: proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


@functools.cache
def slow() -> bytes:
    """A picture that takes long enough to decode to be caught in the act."""
    return encoded(Image.new("RGB", (5000, 5000)), "PNG", compress_level=1)


def test_a_photo_becomes_pixels_in_its_row(bench: Callable[..., Bench]) -> None:
    made = bench()
    decoded = made.decode("a.jpg")
    assert decoded.verdict == "pixels"
    stride = 32 * 32 * 3
    assert any(made.decoders.pixels[decoded.row * stride : (decoded.row + 1) * stride])
    made.decoders.release(decoded.row)


def test_a_hanging_decoder_is_killed_and_its_photo_tried_once_more(bench: Callable[..., Bench]) -> None:
    made = bench(timeout_seconds=1)
    assert made.decode("a.jpg").verdict == "pixels"
    (stopped,) = workers()
    os.kill(stopped, signal.SIGSTOP)
    assert made.decode("b.jpg").verdict == "pixels"
    assert stopped not in workers()


def test_a_photo_that_hangs_the_decoder_twice_fails_and_the_next_is_decoded(
    tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    make_tree(tmp_path / "in", {"hangs.png": slow()})
    made = bench(timeout_seconds=1)
    with signal_workers_that_open(tmp_path / "in/hangs.png", signal.SIGSTOP):
        decoded = made.decode("hangs.png")
    assert (decoded.verdict, decoded.reason) == ("failed", Reason.DECODER_TIMEOUT)
    assert made.decode("b.jpg").verdict == "pixels"


@pytest.mark.parametrize(
    "number",
    [signal.SIGSEGV, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGKILL, signal.SIGABRT))],
    ids=lambda number: number.name,
)
def test_a_photo_that_kills_the_decoder_twice_fails_and_the_next_is_decoded(
    number: signal.Signals, tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    make_tree(tmp_path / "in", {"kills.png": slow()})
    made = bench()
    with signal_workers_that_open(tmp_path / "in/kills.png", number):
        decoded = made.decode("kills.png")
    assert (decoded.verdict, decoded.reason) == ("failed", Reason.DECODER_CRASH)
    assert number.name in decoded.detail
    assert made.decode("b.jpg").verdict == "pixels"


def test_a_decoder_that_dies_once_gets_the_photo_a_second_time_in_a_new_process(
    tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    make_tree(tmp_path / "in", {"unlucky.png": slow()})
    made = bench()
    made.decode("a.jpg")
    (first,) = workers()
    assert made.decoders.submit(made.photo("unlucky.png"), timeout_seconds=5)
    deadline = time.monotonic() + 10
    while str(tmp_path / "in/unlucky.png") not in open_files(first):
        assert time.monotonic() < deadline
    os.kill(first, signal.SIGKILL)
    assert made.results.get(timeout=60).verdict == "pixels"
    assert first not in workers()


def test_the_end_waits_for_no_photo_in_hand_and_blames_none(tmp_path: Path, bench: Callable[..., Bench]) -> None:
    make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(3)})
    made = bench(timeout_seconds=60)
    assert made.decode("a.jpg").verdict == "pixels"
    (hanging,) = workers()
    os.kill(hanging, signal.SIGSTOP)
    for n in range(3):
        assert made.decoders.submit(made.photo(f"{n}.jpg"), timeout_seconds=5)
    started = time.monotonic()
    made.decoders.close()
    assert time.monotonic() - started < 30, "half of what one photo may take"
    assert made.results.empty()
    assert workers() == []


@pytest.mark.parametrize(("python", "why"), [("/bin/false", "exit code 1"), ("/nothing", "No such file")])
def test_decoders_that_cannot_start_are_not_held_against_a_photo(
    python: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    monkeypatch.setattr(sys, "executable", python)  # as after an upgrade under a running daemon
    made = Bench(tmp_path / "in")
    with contextlib.closing(made.decoders):
        deadline = time.monotonic() + 30
        while not made.errors:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert made.decoders.submit(made.photo("a.jpg"), timeout_seconds=5)
        (error,) = made.errors
        assert isinstance(error, SorterError)
        assert f"do not start ({why}" in str(error)
        assert made.results.empty()


@pytest.mark.parametrize("photos", [2, pytest.param(300, marks=[pytest.mark.torture, pytest.mark.timeout(900)])])
def test_crash_after_crash_leaves_no_process_descriptor_or_row_behind(
    photos: int, tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    make_tree(tmp_path / "in", {"kills.png": slow()})
    made = bench()
    assert made.decode("kills.png").verdict == "pixels"
    made.decoders.release(0)
    gc.collect()  # of earlier tests
    descriptors, threads = len(open_files(os.getpid())), threading.active_count()
    with signal_workers_that_open(tmp_path / "in/kills.png", signal.SIGKILL):
        for _ in range(photos):
            assert made.decode("kills.png").reason is Reason.DECODER_CRASH
    deadline = time.monotonic() + 10
    while len(workers()) != 1:
        assert time.monotonic() < deadline
    assert (len(open_files(os.getpid())), threading.active_count()) == (descriptors, threads)
    assert sorted(made.decode("a.jpg").row for _ in range(4)) == [0, 1, 2, 3], "every row is free again"
    assert _zombies() == []


def _zombies() -> list[str]:
    states = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                states.append(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0])
    return [state for state in states if state == "Z"]


def test_a_worker_has_nothing_open_but_its_socket_and_the_shared_rows(
    tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = bench(workers=2)
        made.decode("a.jpg")
        for pid in workers():
            # A worker that is still starting has the module open that it imports; what was inherited stays open.
            deadline = time.monotonic() + 10
            while not _kinds(pid) <= {"/dev/null", "socket", "/memfd"}:
                assert time.monotonic() < deadline, f"a lock would outlive the process that took it: {_kinds(pid)}"
                time.sleep(0.05)


def _kinds(pid: int) -> set[str]:
    return {name.split(":")[0].removesuffix(" (deleted)") for name in open_files(pid)}


def test_shared_memory_may_be_larger_than_a_workers_memory_limit(tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    results: queue.Queue[Decoded] = queue.Queue()
    decoders = Decoders(
        workers=1,
        rows=3 * 1024,
        preprocessing=Preprocessing(512),  # 2.4 GB of rows, of which one is touched
        limits=Limits(),
        max_bytes=10_000_000,
        timeout_seconds=20,
        deliver=results.put,
        fail=lambda error: results.put(error),  # type: ignore[arg-type]
    )
    with contextlib.closing(decoders):
        box = Inbox(tmp_path / "in", recursive=False, excluded=frozenset(), settle_seconds=0)
        (found,) = box.scan(LONG_AGO + 10)
        assert decoders.submit(found, timeout_seconds=5)
        assert results.get(timeout=60).verdict == "pixels"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, bench: Callable[..., Bench]) -> None:
    make_tree(tmp_path / "in", {"big.jpg": photo(1)})
    os.truncate(tmp_path / "in/big.jpg", 11_000_000)
    decoded = bench().decode("big.jpg")
    assert (decoded.verdict, decoded.reason) == ("failed", Reason.TOO_LARGE)


def test_a_file_that_is_no_photo_is_skipped_and_a_photo_without_an_extension_is_not(
    tmp_path: Path, bench: Callable[..., Bench]
) -> None:
    make_tree(tmp_path / "in", {"notes.txt": b"cats", "no-extension": photo(3), "text.jpg": b"an error page"})
    made = bench()
    assert made.decode("notes.txt").verdict == "skipped"
    assert made.decode("no-extension").verdict == "pixels"
    assert made.decode("text.jpg").reason == Reason.NOT_A_PHOTO


def test_a_file_that_changed_since_it_was_settled_is_not_decoded(tmp_path: Path, bench: Callable[..., Bench]) -> None:
    made = bench()
    settled = made.photo("a.jpg")
    make_tree(tmp_path / "in", {"a.jpg": photo(9)})
    assert made.decoders.submit(settled, timeout_seconds=5)
    assert made.results.get(timeout=60).verdict == "gone"


def test_a_photo_that_may_not_be_read_is_left(tmp_path: Path, bench: Callable[..., Bench]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "in/a.jpg").chmod(0)
    assert bench().decode("a.jpg").verdict == "left"


_PARENT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_decoders import Bench, workers
bench = Bench(Path({inbox!r}))
{then}
print(*workers(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "then",
    [
        pytest.param("bench.decode('a.jpg')", id="idle", marks=pytest.mark.long),
        pytest.param("bench.decode('a.jpg'); [os.kill(pid, signal.SIGSTOP) for pid in workers()]", id="hung"),
        pytest.param(
            "bench.decode('a.jpg'); bench.decoders.submit(bench.photo('slow.png'), timeout_seconds=5)",
            id="decoding",
            marks=pytest.mark.long,
        ),
        pytest.param("time.sleep(0.02)", id="starting", marks=pytest.mark.long),
    ],
)
def test_workers_die_with_their_parent(then: str, tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1), "slow.png": slow()})
    script = _PARENT.format(tests=str(Path(__file__).parent), inbox=str(inbox), then=then)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        parent.kill()
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_ends_with_the_thread_that_owns_it(tmp_path: Path, bench: Callable[..., Bench]) -> None:
    """Linux sends the parent-death signal when the thread that started the process ends."""
    made = bench(workers=2)
    made.decode("a.jpg")
    pids = workers()
    made.decoders.close()
    assert not any(map(is_alive, pids))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("decoder-")] == []
