"""What is reported to the service manager: a real datagram socket in its place, real loops, real hangs."""

import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import GREEN, RED, RedGreenEngine, Running, make_tree, photo, pipeline_to, plain, read_tree

from sorter import deadlines
from sorter.classifier.manifest import Manifest
from sorter.errors import StorageError
from sorter.files.photo import Photo
from sorter.inbox import watcher
from sorter.inbox.scan import Inbox
from sorter.inbox.watcher import Watcher
from sorter.moving.mover import Mover
from sorter.moving.recovery import Plan
from sorter.service.loop import Service
from sorter.service.notify import Notifier
from sorter.service.shutdown import Shutdown
from sorter.settings import Settings


class Manager:
    """The service manager's end of the socket: every message with its time."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(65536):
            self.messages.append((time.monotonic(), message.decode()))

    def starting_with(self, beginning: str) -> list[str]:
        return [message for _, message in self.messages if message.startswith(beginning)]

    def pings_since(self, moment: float) -> list[float]:
        return [at for at, message in self.messages if message == "WATCHDOG=1" and at >= moment]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    listening = Manager(str(tmp_path / "notify"))
    yield listening
    listening.close()


def _wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["a path", "an abstract name"])
def test_messages_reach_the_manager(tmp_path: Path, kind: str) -> None:
    manager = Manager(str(tmp_path / "notify") if kind == "a path" else f"@sorter-test-{os.getpid()}")
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    notifier.ready()
    notifier.status(lambda: "3 waiting")
    notifier.alive()  # the manager did not ask for pings
    notifier.stopping()
    _wait_for(lambda: len(manager.messages) == 3)
    assert [message.splitlines()[0] for _, message in manager.messages] == ["READY=1", "STATUS=3 waiting", "STOPPING=1"]
    manager.close()


def test_an_absent_manager_disturbs_nothing() -> None:
    for address in (None, "", "vsock:2:1234", "/nowhere/notify", "/" + "x" * 500):
        notifier = Notifier({"WATCHDOG_USEC": "1"} | ({} if address is None else {"NOTIFY_SOCKET": address}))
        notifier.ready()
        notifier.alive()
        notifier.status(lambda: "3 waiting")
        notifier.stopping()


def test_a_line_break_in_a_name_does_not_start_another_message(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    notifier.status(lambda: "Waiting: no space for a\nMAINPID=1\r\n" + os.fsdecode(b"caf\xe9.jpg"))
    _wait_for(lambda: manager.messages)
    assert manager.messages[0][1] == "STATUS=Waiting: no space for a MAINPID=1 caf\\udce9.jpg"


def test_pings_are_sent_three_times_within_the_managers_timeout(manager: Manager) -> None:
    now = 1000.0
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier(environment, lambda: now)
    assert notifier.alive_seconds == 10
    notifier.ready()
    for _ in range(300):  # 30 seconds
        now += 0.1
        notifier.alive()
    notifier.stopping()
    _wait_for(lambda: manager.starting_with("STOPPING"))
    assert 2 <= len(manager.starting_with("WATCHDOG=1")) <= 3
    assert Notifier(environment | {"WATCHDOG_PID": "1"}).alive_seconds == float("inf")


def test_the_status_changes_once_a_second_at_most(manager: Manager) -> None:
    now = 1000.0
    notifier = Notifier({"NOTIFY_SOCKET": manager.address}, lambda: now)
    for count in range(30):
        notifier.status(lambda count=count: f"{count // 20} waiting")  # type: ignore[misc]
        now += 0.1
    notifier.stopping()
    _wait_for(lambda: manager.starting_with("STOPPING"))
    assert manager.starting_with("STATUS=") == ["STATUS=0 waiting", "STATUS=1 waiting"]


WATCHDOG_SECONDS = 1.5


class Loop:
    """A daemon in a thread, with an engine that needs no torch."""

    def __init__(
        self, folder: Path, manifest: Manifest, box: type[Inbox], mover: type[Mover], rescan_seconds: float
    ) -> None:
        self.inbox, self.output = folder / "in", folder / "out"
        self.inbox.mkdir()
        settings = Settings(
            inbox=self.inbox,
            output=self.output,
            batch_size=1,
            settle_seconds=0,
            rescan_seconds=rescan_seconds,
            decode_timeout_seconds=10,
        )
        self.engine, self.shutdown = RedGreenEngine(), Shutdown(0)
        self.pipeline = pipeline_to(self.output, self.engine, manifest, settings, mover=mover)
        found = box(self.inbox, recursive=False, excluded=frozenset(), settle_seconds=0)
        self.service = Service(settings, found, self.pipeline, self.shutdown, None, log_fields={})
        self.thread = threading.Thread(target=self.service.run, args=(Watcher(found),))

    def sort(self, name: str, color: tuple[int, int, int] = RED) -> None:
        # Renamed into place: with no settling time, a file that is still being written would be looked at too early.
        make_tree(self.inbox, {f".{name}": plain(color)})
        (self.inbox / f".{name}").rename(self.inbox / name)
        _wait_for(lambda: (self.output / ("cats" if color == RED else "dogs") / name).exists())

    def end(self) -> None:
        self.shutdown.requested = True
        self.shutdown.wake()
        self.thread.join(30)
        assert not self.thread.is_alive()


Start = Callable[..., Loop]


@pytest.fixture
def loop(tmp_path: Path, manifest: Manifest, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_SECONDS * 1e6)))
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    monkeypatch.setattr(deadlines, "STEP_SECONDS", 0.5)
    loops: list[Loop] = []

    def run(box: type[Inbox] = Inbox, mover: type[Mover] = Mover, rescan_seconds: float = 60) -> Loop:
        loops.append(Loop(tmp_path, manifest, box, mover, rescan_seconds))
        loops[0].thread.start()
        return loops[0]

    yield run
    loops[0].end()


def _keeps_pinging(manager: Manager, seconds: float) -> bool:
    """Whether signs of life come often enough from now on."""
    moments = [time.monotonic()]
    time.sleep(seconds)
    moments += [*manager.pings_since(moments[0]), time.monotonic()]
    return all(after - before < WATCHDOG_SECONDS for before, after in itertools.pairwise(moments))


def _until(event: threading.Event) -> None:
    event.wait(60)


def test_a_hung_engine_ends_the_pings_until_it_goes_on(loop: Start, manager: Manager) -> None:
    running = loop()
    running.sort("a.jpg")
    go_on = threading.Event()
    running.engine.before_batch = lambda: _until(go_on)
    try:
        make_tree(running.inbox, {"b.jpg": plain(GREEN)})
        _wait_for(lambda: running.pipeline.hung)
        silent = time.monotonic() + 0.1
        for n in range(10):  # photos that go on arriving are no progress
            make_tree(running.inbox, {f"more-{n}.jpg": plain(GREEN, n)})
            time.sleep(0.1)
        assert manager.pings_since(silent) == []
    finally:
        go_on.set()
    running.sort("c.jpg")
    resumed = time.monotonic()
    _wait_for(lambda: manager.pings_since(resumed))


@pytest.mark.long
def test_a_healthy_daemon_keeps_pinging_while_it_is_idle_and_while_it_sorts(loop: Start, manager: Manager) -> None:
    running = loop()
    running.sort("a.jpg")
    assert _keeps_pinging(manager, 3)
    make_tree(running.inbox, {f"b-{n}.jpg": plain(RED, n) for n in range(50)})
    assert _keeps_pinging(manager, 3)


@pytest.mark.long
def test_waiting_for_disk_space_is_not_a_hang(loop: Start, manager: Manager) -> None:
    full = threading.Event()

    class FullDisk(Mover):
        def move(self, plan: Plan) -> None:
            if full.is_set():
                raise StorageError("no space in\nout")
            super().move(plan)

    running = loop(mover=FullDisk)
    full.set()
    make_tree(running.inbox, {"a.jpg": plain(RED)})
    _wait_for(lambda: manager.starting_with("STATUS=Waiting: no space in out; 1 waiting"))
    assert _keeps_pinging(manager, 5)  # longer than the time between two tries
    full.clear()
    running.sort("b.jpg")
    _wait_for(lambda: manager.starting_with("STATUS=0 waiting; 2 in cats/"))


@pytest.mark.long
def test_a_hung_mover_ends_the_pings(loop: Start, manager: Manager) -> None:
    stuck = threading.Event()

    class StuckMover(Mover):
        def move(self, plan: Plan) -> None:
            stuck.wait(30)
            super().move(plan)

    running = loop(mover=StuckMover)
    try:
        make_tree(running.inbox, {"a.jpg": plain(RED)})
        _wait_for(lambda: running.pipeline.hung, 10)
        silent = time.monotonic() + 0.1
        time.sleep(2)
        assert manager.pings_since(silent) == []
    finally:
        stuck.set()


def _decoder() -> int:
    (pid,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _parent(entry) == os.getpid() and b"sorter.decoding.worker" in _command(entry)
    )
    return pid


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.long
def test_a_photo_that_takes_long_to_decode_is_not_a_hang(loop: Start, manager: Manager) -> None:
    running = loop()
    running.sort("a.jpg")
    decoder = _decoder()
    os.kill(decoder, signal.SIGSTOP)
    try:
        # More than the pipeline has space for: the loop waits for it.
        make_tree(running.inbox, {f"b-{n}.jpg": plain(RED, n) for n in range(10)})
        _wait_for(lambda: running.pipeline.in_flight)
        assert _keeps_pinging(manager, 2.5)
        assert running.pipeline.in_flight
    finally:
        os.kill(decoder, signal.SIGCONT)
    _wait_for(lambda: len(read_tree(running.output / "cats")) == 11)


@pytest.mark.long
def test_a_rescan_that_takes_long_is_not_a_hang(loop: Start, manager: Manager) -> None:
    class SlowInbox(Inbox):
        def scan(self, now: float) -> Iterator[Photo]:
            for found in super().scan(now):
                time.sleep(0.03)
                yield found

    running = loop(box=SlowInbox, rescan_seconds=0.5)
    make_tree(running.inbox, {f"{n}.txt": b"no photo" for n in range(60)})
    _wait_for(lambda: running.service.counters.skipped == 60)
    assert _keeps_pinging(manager, 3)


@pytest.mark.long
def test_waiting_for_a_missing_inbox_is_reported_and_not_a_hang(
    loop: Start, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "CHECK_SECONDS", 0.2)
    running = loop()
    running.sort("a.jpg")
    running.inbox.rename(running.inbox.with_name("away"))
    _wait_for(lambda: manager.starting_with("STATUS=Waiting: the inbox was renamed"))
    assert _keeps_pinging(manager, 2)


def test_a_daemon_reports_ready_status_pings_and_stopping(
    tmp_path: Path, manager: Manager, start: Callable[..., Running]
) -> None:
    make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(5)})
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "600000"}
    running = start("run", "--inbox", tmp_path / "in", "--output", tmp_path / "out", **environment)
    running.wait_for(lambda: manager.messages)
    assert manager.messages[0][1] == "READY=1"
    assert running.events("service.started"), "the model had answered"
    running.wait_for(lambda: any("0 waiting; " in text and " in " in text for text in manager.starting_with("STATUS=")))
    sorted_by_folder = [f"{len(os.listdir(tmp_path / 'out' / name))} in {name}/" for name in ("cats", "dogs")
                        if (tmp_path / "out" / name).is_dir()]  # fmt: skip
    assert manager.starting_with("STATUS=")[-1] == f"STATUS=0 waiting; {', '.join(sorted_by_folder)}; 0 left"
    idle = time.monotonic()
    running.wait_for(lambda: len(manager.pings_since(idle)) >= 2)
    assert manager.starting_with("STOPPING=1") == []
    running.process.send_signal(signal.SIGTERM)
    code, _ = running.finish()
    assert code == 0
    assert len(manager.starting_with("STOPPING=1")) == 1
    assert len(manager.starting_with("READY=1")) == 1
    assert len(read_tree(tmp_path / "out")) == 5


def test_a_model_that_cannot_answer_is_never_ready(
    tmp_path: Path, manager: Manager, start: Callable[..., Running]
) -> None:
    make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    running = start("run", "--inbox", tmp_path / "in", "--model", tmp_path / "no-model", NOTIFY_SOCKET=manager.address)
    code, _ = running.finish()
    assert code == 2
    assert manager.messages == []
