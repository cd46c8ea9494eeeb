"""A terminal: one that closes, one whose cursor must come back, one that shows only ASCII."""

import contextlib
import os
import pty
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Running, make_tree, photo, plain, read_tree

from sorter.files import FOLDER, HISTORY
from sorter.service.shutdown import Shutdown

Start = Callable[..., Running]


class Terminal:
    """A `sorter` process in the foreground of a terminal of its own."""

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        self.shown = b""
        self.process, self._terminal = pty.fork()
        if self.process == 0:
            os.environ.update(environment)
            os.execv(sys.executable, [sys.executable, "-m", "sorter", *map(str, arguments)])

    def wait_for(self, text: bytes, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._terminal], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._terminal, 65536)
                except OSError:  # the process has ended
                    raise AssertionError(self.shown) from None

    def press_ctrl_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def close(self) -> None:
        os.close(self._terminal)

    def exit_code(self, *, seconds: float = 30) -> int:
        deadline = time.monotonic() + seconds
        while (ended := os.waitpid(self.process, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(ended[1])


def finished_runs(output: Path) -> int:
    with contextlib.closing(sqlite3.connect(output / FOLDER / HISTORY)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM runs WHERE finished IS NOT NULL").fetchone()
    return int(count)


def test_a_daemon_whose_terminal_closes_ends_as_with_sigterm(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    terminal = Terminal("run", "--inbox", inbox)
    terminal.wait_for(b"photo.sorted")
    terminal.close()
    assert terminal.exit_code() == 0
    assert finished_runs(inbox) == 1


@pytest.mark.long
def test_a_sort_whose_terminal_closes_ends_with_its_batch(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(400)})
    terminal = Terminal("run", "--once", "--inbox", inbox)
    terminal.wait_for(b"\x1b[?25l")  # the bar
    while not list(inbox.glob("*s/*.jpg")):
        time.sleep(0.02)
    terminal.close()
    assert terminal.exit_code() == 3
    assert finished_runs(inbox) == 1
    assert len(read_tree(inbox)) == 400


@pytest.mark.long
def test_a_daemon_without_a_terminal_goes_on_after_sighup(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    running = start("run", "--inbox", inbox, "--settle-seconds", "0.1", NOTIFY_SOCKET="/nobody/listens")
    running.wait_for_event("photo.sorted")
    running.process.send_signal(signal.SIGHUP)
    running.wait_for_event("model.unchanged")
    make_tree(inbox, {"b.jpg": photo(2)})
    running.wait_for_event("photo.sorted", 2)
    running.process.send_signal(signal.SIGTERM)
    assert running.finish()[0] == 0


def test_a_signal_that_is_ignored_from_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    others = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        Shutdown(0).listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in [(signal.SIGHUP, before), *others]:
            signal.signal(number, handler)


@pytest.mark.long
def test_a_second_ctrl_c_gives_the_terminal_its_cursor_back(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {f"{n}.jpg": photo(n) for n in range(1000)})
    terminal = Terminal("run", "--once", "--inbox", inbox, "--batch-size", "1000")
    terminal.wait_for(b"\x1b[?25l")  # the bar hides the cursor
    time.sleep(2)  # one batch, which takes longer than this
    terminal.press_ctrl_c()
    time.sleep(0.2)
    assert b"\x1b[?25h" not in terminal.shown
    terminal.press_ctrl_c()
    terminal.wait_for(b"\x1b[?25h")
    assert terminal.exit_code() == 130
    assert len(read_tree(inbox)) == 1000


ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def test_history_and_undo_print_where_standard_output_is_ascii(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"caf\u00e9.jpg": plain((220, 30, 30))})
    sorter = [sys.executable, "-m", "sorter"]
    subprocess.run([*sorter, "run", "--once", "--inbox", inbox], check=True, capture_output=True)
    for environment in ASCII:
        for arguments in (["history"], ["undo", "--last", "--dry-run"]):
            command = [*sorter, *arguments, "--inbox", str(inbox)]
            done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "caf" in done.stdout
            assert "->" in done.stdout or "\u2192" in done.stdout


def test_a_narrow_terminal_hides_no_name(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a-name-of-some-length.jpg": plain((220, 30, 30))})
    subprocess.run([sys.executable, "-m", "sorter", "run", "--once", "--inbox", inbox], check=True, capture_output=True)
    terminal = Terminal("history", "--inbox", inbox, COLUMNS="40")
    terminal.wait_for(b"cats/")
    assert b"a-name-of-some" in terminal.shown
    assert terminal.exit_code() == 0
    terminal.close()


_SLOW_UNDO = """
import sys, time
from sorter.cli.main import main
from sorter.moving.undo import Undo
Undo._move = lambda *_: (print("moving", flush=True), time.sleep(60))
sys.exit(main(["undo", "--last", "--inbox", sys.argv[1]]))
"""


@pytest.mark.long
def test_a_second_signal_ends_an_undo_that_hangs(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": photo(1)})
    subprocess.run([sys.executable, "-m", "sorter", "run", "--once", "--inbox", inbox], check=True, capture_output=True)
    undo = subprocess.Popen([sys.executable, "-c", _SLOW_UNDO, inbox], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert undo.stdout is not None
    assert undo.stdout.readline() == b"moving\n"
    for _ in range(2):
        undo.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    undo.communicate(timeout=5)
    assert undo.returncode == 128 + signal.SIGTERM
    assert len(read_tree(inbox)) == 1


def test_the_text_of_a_crash_of_python_reaches_the_log() -> None:
    crash = "from sorter import logs; logs.configure('json', 'info'); import faulthandler; faulthandler._sigsegv()"
    done = subprocess.run([sys.executable, "-c", crash], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
