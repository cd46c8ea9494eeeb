"""A decoder that crashes, hangs or eats memory takes its own photo with it and nothing else."""

import contextlib
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

from sorter.decoders import Decoded, Decoders
from sorter.errors import Reason
from sorter.images import Limits, Preprocessing
from sorter.inbox import Inbox, Photo

if not Path("/proc/self/task").is_dir():
    pytest.skip("needs /proc to find the worker processes", allow_module_level=True)


def workers(parent: int | None = None) -> list[int]:
    """The decoder processes of a process."""
    found = []
    for task in Path(f"/proc/{parent or os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return [pid for pid in found if b"sorter.decoders" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Bench:
    """Decoders with a queue for what they deliver."""

    def __init__(self, root: Path, *, workers: int = 1, timeout_seconds: float = 20) -> None:
        self.root = root
        self.results: queue.Queue[Decoded] = queue.Queue()
        self.errors: list[BaseException] = []
        self.decoders = Decoders(
            workers=workers,
            rows=4,
            preprocessing=Preprocessing(32),
            limits=Limits(),
            max_bytes=10_000_000,
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
        made.decoders.close()
        assert made.errors == []


@contextlib.contextmanager
def every_worker_gets(number: signal.Signals) -> Iterator[None]:
    """Send a signal to each worker as it appears."""
    done = threading.Event()

    def send() -> None:
        while not done.is_set():
            for pid in workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.005)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_photo_becomes_pixels_in_its_row(bench: Callable[..., Bench]) -> None:
    made = bench()
    decoded = made.decode("a.jpg")
    assert decoded.verdict == "pixels"
    stride = 32 * 32 * 3
    assert any(made.decoders.pixels[decoded.row * stride : (decoded.row + 1) * stride])
    made.decoders.release(decoded.row)


def test_a_hanging_decoder_is_killed_and_its_photo_tried_once_more(bench: Callable[..., Bench]) -> None:
    made = bench(timeout_seconds=2)
    assert made.decode("a.jpg").verdict == "pixels"
    (stopped,) = workers()
    os.kill(stopped, signal.SIGSTOP)
    assert made.decode("b.jpg").verdict == "pixels"
    assert stopped not in workers()


def test_a_photo_that_hangs_the_decoder_twice_fails_and_the_next_is_decoded(bench: Callable[..., Bench]) -> None:
    made = bench(timeout_seconds=1)
    with every_worker_gets(signal.SIGSTOP):
        decoded = made.decode("a.jpg")
    assert (decoded.verdict, decoded.reason) == ("failed", Reason.DECODER_TIMEOUT)
    for pid in workers():  # the replacement may have been stopped too
        os.kill(pid, signal.SIGCONT)
    assert made.decode("b.jpg").verdict == "pixels"


def test_a_photo_that_kills_the_decoder_twice_fails_and_the_next_is_decoded(bench: Callable[..., Bench]) -> None:
    made = bench()
    with every_worker_gets(signal.SIGKILL):
        decoded = made.decode("a.jpg")
    assert (decoded.verdict, decoded.reason) == ("failed", Reason.DECODER_CRASH)
    assert "SIGKILL" in decoded.detail
    assert made.decode("b.jpg").verdict == "pixels"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, bench: Callable[..., Bench]) -> None:
    make_tree(tmp_path / "in", {"big.jpg": photo(1)})
    os.truncate(tmp_path / "in/big.jpg", 11_000_000)
    decoded = bench().decode("big.jpg")
    assert (decoded.verdict, decoded.reason) == ("failed", Reason.TOO_LARGE)


def test_what_is_no_photo_is_skipped_and_a_photo_without_extension_is_not(
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


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_decoders import Bench, workers
bench = Bench(Path({str(make_tree(tmp_path / "in", {"a.jpg": photo(1)}))!r}), workers=2)
bench.decode("a.jpg")
print(*workers(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    deadline = time.monotonic() + 10
    while any(b"sorter.decoders" in _command(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
