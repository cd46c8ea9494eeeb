"""`--on-sorted`: the command that runs after each batch."""

import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RUN, Running, make_tree, photo, read_tree
from structlog.testing import capture_logs

from sorter.decisions import Decision, Outcome
from sorter.decoding.decoded import Decoded
from sorter.errors import ConfigurationError
from sorter.files.photo import Identity, Photo
from sorter.history.store import Run
from sorter.service import hook

Start = Callable[..., Running]


def script(folder: Path, body: str) -> str:
    """A command that is a real program."""
    path = folder / "a hook"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return shlex.quote(str(path))


def recorder(folder: Path) -> tuple[str, Callable[[], list[dict[str, Any]]]]:
    """A command that keeps its standard input, and what it was given so far."""
    calls = folder / "calls"
    command = script(folder, f'cat >> "{calls}"; echo >> "{calls}"; echo noise')
    return command, lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def moved(count: int = 1, run: Run = RUN) -> list[Outcome]:
    outcomes = []
    for number in range(count):
        of = Photo(Path("/inbox"), f"{number}.jpg", Identity(0, 0, 0, 0, 0), 0.0)
        decision = Decision(Decoded(of, "pixels", 0), "sorted", "cats", "cat", 0.98765, run=run)
        outcomes.append(Outcome(of, "sorted", decision, f"/out/cats/{number}.jpg"))
    return outcomes


def call(command: str, *, limit: float = 10, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The warnings after one batch."""
    monkeypatch.setattr(hook, "LIMIT_SECONDS", limit)
    with capture_logs() as logs:
        running = hook.Hook(hook.split(command), {})
        running.notify_batch(moved())
        running.close()
    return logs


def test_each_moved_photo_is_passed_on_as_it_is_logged(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(
        tmp_path / "inbox", {**{f"{n}.jpg": photo(n) for n in range(5)}, "broken.jpg": b"\xff\xd8\xff", "a.txt": b"a"}
    )
    os.rename(inbox / "1.jpg", os.fsencode(inbox) + b"/\xff.jpg")
    command, calls = recorder(tmp_path)
    sort = start("run", "--once", "--inbox", inbox, "--on-sorted", command, "--log-format", "json")
    code, out = sort.finish()
    assert (code, "noise" in out) == (3, False)
    (started,) = sort.events("service.started")
    passed_on: dict[str, Any] = {}
    for one in calls():
        assert (one["run"], one["model"]) == (started["run"], "catdog-resnet50")
        passed_on |= {entry["path"]: entry for entry in one["photos"]}
    events = {e["path"]: e for e in sort.events() if "destination" in e}
    assert len(events) == 6
    assert set(passed_on) == set(events)
    for path, event in events.items():
        assert passed_on[path] == {
            "path": path,
            "destination": event["destination"],
            "kind": event["event"].removeprefix("photo."),
            "label": event.get("label"),
            "confidence": event.get("confidence"),
            "reason": event.get("reason"),
        }
        assert os.path.exists(passed_on[path]["destination"])
    assert any("\udcff.jpg" in path for path in passed_on)


@pytest.mark.long
def test_a_dry_run_does_not_run_the_command(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "inbox", {"a.jpg": photo()})
    command, calls = recorder(tmp_path)
    assert start("run", "--once", "--dry-run", "--inbox", inbox, "--on-sorted", command).finish()[0] == 0
    assert calls() == []


@pytest.mark.long
def test_a_slow_command_holds_up_no_photo_and_is_called_for_the_rest_at_sigterm(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "inbox", {f"{n}.jpg": photo(n) for n in range(12)})
    calls = tmp_path / "calls"
    wait = f'while [ ! -e "{tmp_path}/go" ]; do sleep 0.1; done'
    command = script(tmp_path, f'cat >> "{calls}"; echo >> "{calls}"; {wait}')
    sort = start("run", "--inbox", inbox, "--on-sorted", command, "--batch-size", "2", "--log-format", "json")
    sort.wait_for_event("photo.sorted", 12)  # while the first call goes on
    sort.process.send_signal(signal.SIGTERM)
    sort.wait_for_event("run.finished")
    assert len(calls.read_text().splitlines()) == 1
    (tmp_path / "go").touch()
    assert sort.finish()[0] == 0
    first, second = map(json.loads, calls.read_text().splitlines())
    assert len(first["photos"]) == 2
    assert len(second["photos"]) == 10
    assert sort.events("hook.failed") == []


@pytest.mark.long
def test_a_command_that_fails_changes_neither_photos_nor_the_exit_code(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "inbox", {f"{n}.jpg": photo(n) for n in range(3)})
    command = script(tmp_path, "echo the gallery is down >&2; exit 7")
    sort = start("run", "--once", "--inbox", inbox, "--on-sorted", command, "--log-format", "json")
    assert sort.finish()[0] == 0
    assert len([path for path in read_tree(inbox) if path.startswith(("cats/", "dogs/"))]) == 3
    failed = sort.events("hook.failed")
    assert sum(event["photos"] for event in failed) == 3
    assert {(event["reason"], event["detail"]) for event in failed} == {("ended with 7", "the gallery is down")}


@pytest.mark.parametrize("body", ["exec <&-", "exec 2>&-; sleep 0.2", "true"])
def test_a_command_need_not_listen(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(script(tmp_path, body), monkeypatch=monkeypatch) == []


def test_a_command_that_hangs_is_killed_with_everything_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    command = script(tmp_path, f'echo waiting >&2; sleep 1000 & echo $! $$ > "{pids}"; wait')
    started = time.monotonic()
    (warning,) = call(command, limit=0.5, monkeypatch=monkeypatch)
    assert time.monotonic() - started < 10
    assert warning["reason"] == "took longer than 0.5 seconds and was killed"
    assert warning["detail"] == "waiting"
    for pid in pids.read_text().split():
        until = time.monotonic() + 10
        while lives(pid):
            assert time.monotonic() < until
            time.sleep(0.05)


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_command_leaves_behind_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    command = script(tmp_path, f'sleep 1000 & echo $! > "{pid}"')  # which holds standard error
    started = time.monotonic()
    try:
        assert call(command, limit=30, monkeypatch=monkeypatch) == []
        assert time.monotonic() - started < 10
        assert lives(pid.read_text().strip())
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_the_end_of_a_commands_long_output_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = script(tmp_path, "head -c 1000000 /dev/zero >&2; echo the end >&2; kill -9 $$")
    (warning,) = call(command, monkeypatch=monkeypatch)
    assert warning["reason"] == "was ended by signal 9"
    assert warning["detail"].endswith("the end")
    assert len(warning["detail"]) <= 1000


def test_photos_of_two_models_come_in_two_calls(tmp_path: Path) -> None:
    command, calls = recorder(tmp_path)
    running = hook.Hook(hook.split(command), {})
    running.notify_batch([*moved(2), *moved(1, Run("later", "0", "second"))])
    running.close()
    assert [(c["run"], c["model"], len(c["photos"])) for c in calls()] == [("run", "model", 2), ("later", "second", 1)]


def test_a_program_that_is_removed_meanwhile_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = script(tmp_path, "true")
    words = hook.split(command)
    os.unlink(words[0])
    with capture_logs() as logs:
        running = hook.Hook(words, {})
        running.notify_batch(moved())
        running.close()
    assert [log["reason"].split(":")[0] for log in logs] == ["cannot be run"]


def test_a_call_that_fails_for_any_reason_is_followed_by_others() -> None:
    with capture_logs() as logs:
        running = hook.Hook(["true"], {"link": object()})  # which is not JSON
        for count in (1, 2):
            running.notify_batch(moved(count))
            until = time.monotonic() + 10
            while len(logs) < count:
                assert time.monotonic() < until
                time.sleep(0.02)
        running.close()
    assert [log["photos"] for log in logs] == [1, 2]


def test_a_command_inherits_no_open_files_and_has_a_session_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    code = f"""import os
found = sorted(os.listdir('/proc/self/fd')), os.getsid(0) == os.getpid()
open({str(seen)!r}, 'w').write(str(found))"""
    with (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        assert call(shlex.join([sys.executable, "-c", code]), monkeypatch=monkeypatch) == []
    assert seen.read_text() == "(['0', '1', '2', '3'], True)"  # 3 is the folder that is listed


def test_a_command_that_cannot_run_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    plain_file = tmp_path / "file"
    plain_file.touch(mode=0o644)
    for command, sentence in (
        ("no-such-program --x", "'no-such-program' was not found or is not executable: check its path"),
        (str(plain_file), f"'{plain_file}' was not found or is not executable: check its path and its permissions"),
        ("sh 'a", '--on-sorted: cannot parse "sh \'a" (no closing quotation): correct the command'),
        (" ", "--on-sorted is empty: give a command or omit it"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(sentence)):
            hook.split(command)


@pytest.mark.long
def test_a_command_that_cannot_run_is_refused_at_the_start(tmp_path: Path, start: Start) -> None:
    inbox = make_tree(tmp_path / "inbox", {"a.jpg": photo()})
    for name in ("run", "check"):
        refused = start(name, "--inbox", inbox, "--on-sorted", "no-such-program --x")
        assert refused.finish()[0] == 2
        assert "'no-such-program' was not found" in refused.errors.read_text()
    assert list(inbox.iterdir()) == [inbox / "a.jpg"]


@pytest.mark.long
def test_a_second_signal_leaves_no_command_behind(tmp_path: Path, start: Start) -> None:
    inbox, group = make_tree(tmp_path / "in", {"a.jpg": photo(1)}), tmp_path / "group"
    command = script(tmp_path, f'echo $$ > "{group}.new"; mv "{group}.new" "{group}"; sleep 100')
    running = start("run", "--inbox", inbox, "--on-sorted", command)
    running.wait_for(group.exists)
    running.process.send_signal(signal.SIGTERM)
    running.wait_for_event("service.stopping")
    running.process.send_signal(signal.SIGTERM)
    assert running.finish(seconds=20)[0] == 143
    deadline = time.monotonic() + 10
    while _group_exists(int(group.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
