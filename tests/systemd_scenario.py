"""What a real systemd does with the service. Runs as root in a throw-away machine that `test_systemd.py` boots.

Each step is one promise and builds on the steps before it; their results are written to `results.json`.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST = Path("/run/host")
SERVICE = Path("/srv/sorter")
INBOX, SORTED, FULL = SERVICE / "inbox", SERVICE / "sorted", SERVICE / "full"
ENDS = Path("/run/ends")  # unit, result and status of every process that ended
PHOTOS = sorted((HOST / "photos").glob("*"))


def run(*command: str | Path, check: bool = True) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 or not check, f"{command}: {done.returncode}\n{done.stdout}"
    return done.stdout


def show(unit: str, name: str) -> str:
    return run("systemctl", "show", "--value", "-p", name, unit).strip()


def journal_lines(unit: str) -> list[str]:
    """The service's own lines."""
    return run("journalctl", "-o", "cat", "--no-pager", f"_SYSTEMD_UNIT={unit}", "_COMM=sorter").splitlines()


def journal(unit: str) -> list[dict[str, Any]]:
    """The log of a service that has started; each line must be JSON."""
    return [json.loads(line) for line in journal_lines(unit)]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {seconds:g} s waiting for {what}")
        time.sleep(0.1)


def drop(photos: list[Path], inbox: Path = INBOX, prefix: str = "") -> None:
    """Copy photos into the inbox as a member of the group."""
    for photo in photos:
        shutil.copy(photo, HOST / "drop" / f"{prefix}{photo.name}")
    run("runuser", "-u", "alice", "--", "sh", "-c", f"umask 022; cp {HOST}/drop/* {inbox}/")
    for photo in (HOST / "drop").iterdir():
        photo.unlink()


def digests(*files: Path) -> list[str]:
    return sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


def photos_below(*folders: Path) -> list[Path]:
    """Every photo in some folders; names that begin with a dot are the sorter's."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in found if not any(part.startswith(".") for part in path.parts)]


def all_sorted(count: int, folder: Path = SORTED) -> Callable[[], bool]:
    return lambda: len(photos_below(folder)) == count


def make_install_installs_a_service_that_verifies() -> None:
    where = json.loads((HOST / "where.json").read_text())
    python = Path(where["executable"])
    # The service cannot access home folders: a Python in one is mounted elsewhere.
    if not where["prefix"].startswith("/usr"):
        os.makedirs("/opt/python")
        run("mount", "--bind", where["prefix"], "/opt/python")
        python = Path("/opt/python") / python.relative_to(where["prefix"])
        Path("/etc/ld.so.conf.d/python.conf").write_text("/opt/python/lib\n")
        run("ldconfig")
    os.makedirs("/opt/packages")
    run("mount", "--bind", where["packages"], "/opt/packages")
    # There is no network: the environment that `make install` would fill uses the packages of the tests.
    run(python, "-m", "venv", "--without-pip", "/usr/local/lib/sorter")
    (site,) = Path("/usr/local/lib/sorter/lib").glob("python*/site-packages")
    (site / "test.pth").write_text("/opt/packages\n")
    # PIP_NO_BUILD_ISOLATION=0 means "do not isolate".
    settings = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": ""}
    os.environ.update(settings)
    said = run("make", "-C", HOST / "clone", "install")
    assert "systemctl enable --now sorter" in said
    share = Path("/usr/local/share")
    assert (share / "man/man1/sorter.1").read_text().startswith(".TH SORTER")
    assert "--max-error-rate" in (share / "bash-completion/completions/sorter").read_text()
    assert (share / "zsh/site-functions/_sorter").read_text().startswith("#compdef sorter")
    assert "complete -c sorter" in (share / "fish/vendor_completions.d/sorter.fish").read_text()
    run("useradd", "-M", "-G", "sorter", "alice")
    assert run("systemd-analyze", "verify", "sorter.service", "sorter@second.service") == ""
    # Shorter than the default, to keep the test short.
    for unit in ("sorter", "sorter@"):
        drop_in = Path(f"/etc/systemd/system/{unit}.service.d/test.conf")
        drop_in.parent.mkdir()
        note = f"ExecStopPost=+/bin/sh -c 'echo %n $SERVICE_RESULT $EXIT_STATUS >> {ENDS}'"
        drop_in.write_text(f"[Service]\nRestartSec=1\n{note}\n")
    run("systemctl", "daemon-reload")


def dropped_photos_are_sorted_and_the_journal_is_json() -> None:
    for unit in ("sorter", "sorter@"):
        Path(f"/etc/systemd/system/{unit}.service.d/watchdog.conf").write_text("[Service]\nWatchdogSec=6\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--now", "sorter")
    drop(PHOTOS[:40])
    wait_for(all_sorted(40), "the sorted photos")
    assert digests(*photos_below(SERVICE)) == digests(*PHOTOS[:40])
    events = journal("sorter.service")
    assert sum(event["event"] == "photo.sorted" for event in events) == 40
    results = sorted(photos_below(SORTED))
    cats = len(photos_below(SORTED / "cats"))
    counts = f"0 waiting; {cats} in cats/, {40 - cats} in dogs/; 0 left"
    wait_for(lambda: show("sorter", "StatusText") == counts, counts)
    run(
        "runuser",
        "-u",
        "alice",
        "--",
        "sh",
        "-c",
        f"cat '{results[0]}' > /dev/null; mv '{results[0]}' '{results[0]}.x'",
    )
    run("runuser", "-u", "alice", "--", "mv", f"{results[0]}.x", results[0])
    assert "denied" in run("runuser", "-u", "nobody", "--", "ls", SORTED, check=False)
    assert events[0]["precision"] == json.loads((HOST / "where.json").read_text())["precision"]


def a_killed_service_restarts_and_sorts_the_rest() -> None:
    process = show("sorter", "MainPID")
    drop(PHOTOS[40:140])
    wait_for(lambda: len(photos_below(SORTED)) > 45, "the first photos")
    os.kill(int(process), signal.SIGKILL)
    assert len(photos_below(SORTED)) < 140, "it was killed too late"
    wait_for(all_sorted(140), "the sorted photos")
    assert show("sorter", "MainPID") != process
    assert show("sorter", "NRestarts") == "1"
    assert digests(*photos_below(SERVICE)) == digests(*PHOTOS[:140])


def a_hanging_service_is_restarted_by_the_watchdog() -> None:
    process = show("sorter", "MainPID")
    os.kill(int(process), signal.SIGSTOP)
    # The next step's instances start while this one hangs.
    for folder in (FULL, FULL / "inbox", FULL / "sorted"):
        run("install", "-d", "-m", "2770", "-o", "sorter", "-g", "sorter", folder)
    run("mount", "-t", "tmpfs", "-o", "size=24m,mode=2770,uid=sorter,gid=sorter", "none", FULL / "sorted")
    Path("/etc/sorter/full.toml").write_text(f'inbox = "{FULL}/inbox"\noutput = "{FULL}/sorted"\n')
    Path("/etc/sorter/wrong.toml").write_text('inbix = "/srv/sorter/inbox"\n')
    run("systemctl", "start", "--no-block", "sorter@full", "sorter@wrong")
    drop(PHOTOS[140:150])
    wait_for(lambda: show("sorter", "Result") == "watchdog", "the watchdog")
    wait_for(all_sorted(150), "the sorted photos")
    assert show("sorter", "NRestarts") == "2"
    assert digests(*photos_below(INBOX, SORTED)) == digests(*PHOTOS[:150])


def a_wrong_configuration_is_reported_once_and_not_retried() -> None:
    assert show("sorter@wrong", "ActiveState") == "failed"
    assert show("sorter@wrong", "ExecMainStatus") == "2"
    assert show("sorter@wrong", "NRestarts") == "0"
    (line,) = journal_lines("sorter@wrong.service")
    assert line.startswith("sorter: inbix in /etc/sorter/wrong.toml")


def an_instance_whose_folder_another_sorter_has_is_restarted_until_it_is_free() -> None:
    busy = SERVICE / "busy"
    for folder in (busy, busy / "inbox", busy / "inbox/.sorter"):
        run("install", "-d", "-m", "2770", "-o", "sorter", "-g", "sorter", folder)
    Path("/etc/sorter/busy.toml").write_text(f'inbox = "{busy}/inbox"\n')
    holder = subprocess.Popen(
        ["runuser", "-u", "sorter", "--", "flock", "-o", busy / "inbox/.sorter/lock", "sleep", "600"]
    )
    run("systemctl", "start", "--no-block", "sorter@busy")
    wait_for(lambda: int(show("sorter@busy", "NRestarts")) >= 2, "two restarts")
    assert "sorter@busy.service exit-code 4" in ENDS.read_text().splitlines()
    run("pkill", "-P", str(holder.pid))
    holder.wait()
    wait_for(lambda: show("sorter@busy", "ActiveState") == "active", "the instance")
    run("systemctl", "stop", "sorter@busy")


def an_instance_waits_for_an_inbox_that_is_not_there_yet() -> None:
    late = SERVICE / "late"
    run("install", "-d", "-m", "2770", "-o", "sorter", "-g", "sorter", late)
    Path("/etc/sorter/late.toml").write_text(f'inbox = "{late}/inbox"\n')
    run("systemctl", "start", "sorter@late")
    wait_for(lambda: show("sorter@late", "StatusText").startswith("Waiting: "), "the wait for the inbox")
    time.sleep(6.5)  # longer than the watchdog
    run("install", "-d", "-m", "2770", "-o", "sorter", "-g", "sorter", late / "inbox")
    drop(PHOTOS[:2], late / "inbox")
    wait_for(all_sorted(2, late / "inbox"), "the photos")
    wait_for(lambda: show("sorter@late", "StatusText").startswith("0 waiting; "), "the sorted photos")
    assert show("sorter@late", "NRestarts") == "0"
    run("systemctl", "stop", "sorter@late")


def a_reload_takes_the_model_that_a_link_names_and_refuses_a_broken_one() -> None:
    folder, models = SERVICE / "reload", SERVICE / "models"
    for made in (folder, folder / "inbox", models):
        run("install", "-d", "-m", "2770", "-o", "sorter", "-g", "sorter", made)
    (shipped,) = Path("/usr/local/lib/sorter/lib").glob("python*/site-packages/sorter/models/catdog-resnet50")
    for name in ("second", "broken"):
        shutil.copytree(shipped, models / name)
        manifest = models / name / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"catdog-resnet50"', f'"{name}"'))
    (models / "broken" / "openvino.bin").unlink()
    run("ln", "-sfn", shipped, models / "current")
    Path("/etc/sorter/reload.toml").write_text(f'inbox = "{folder}/inbox"\nmodel = "{models}/current"\n')
    run("systemctl", "start", "sorter@reload")
    process = show("sorter@reload", "MainPID")

    def events(name: str) -> list[dict[str, Any]]:
        return [event for event in journal("sorter@reload.service") if event["event"] == name]

    def sort(photos: list[Path]) -> None:
        wanted = len(events("photo.sorted")) + len(photos)
        drop(photos, folder / "inbox")
        wait_for(lambda: len(events("photo.sorted")) == wanted, "the sorted photos")

    def reload(target: Path, event: str) -> None:
        before = len(events(event))
        run("ln", "-sfn", target, models / "current")
        run("systemctl", "reload", "sorter@reload")
        wait_for(lambda: len(events(event)) > before, event)

    sort(PHOTOS[:5])
    reload(models / "second", "model.reloaded")
    sort(PHOTOS[5:10])
    reload(models / "broken", "model.refused")
    sort(PHOTOS[10:15])
    reload(shipped, "model.reloaded")
    sort(PHOTOS[15:20])
    used = [event["model"] for event in events("photo.sorted")]
    assert used == ["catdog-resnet50"] * 5 + ["second"] * 10 + ["catdog-resnet50"] * 5
    assert show("sorter@reload", "MainPID") == process
    assert digests(*photos_below(folder)) == digests(*PHOTOS[:20])
    run("systemctl", "stop", "sorter@reload")
    assert ENDS.read_text().splitlines()[-1] == "sorter@reload.service success 0"


def a_second_instance_waits_while_its_disk_is_full_and_continues() -> None:
    wait_for(lambda: show("sorter@full", "ActiveState") == "active", "the second instance")
    filler = FULL / "sorted" / ".filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(FULL / "sorted").free - 200_000))
    process = show("sorter@full", "MainPID")
    drop(PHOTOS[150:190], FULL / "inbox")
    wait_for(lambda: show("sorter@full", "StatusText").startswith("Waiting: "), "the wait for space")
    time.sleep(6.5)  # longer than the watchdog: waiting for space is not a hang
    filler.unlink()
    wait_for(all_sorted(40, FULL / "sorted"), "the sorted photos")
    assert show("sorter@full", "MainPID") == process
    assert digests(*photos_below(FULL)) == digests(*PHOTOS[150:190])
    events = [event["event"] for event in journal("sorter@full.service")]
    assert (events.count("storage.waiting"), events.count("storage.ready")) == (1, 1)


def a_stop_finishes_the_current_batch_and_leaves_the_rest() -> None:
    drop(PHOTOS[190:340])
    wait_for(lambda: len(photos_below(SORTED)) > 155, "the first photos")
    run("systemctl", "stop", "sorter")
    ends = ENDS.read_text().splitlines()
    assert ends[-1] == "sorter.service success 0", ends
    assert photos_below(INBOX) != [], "it was stopped too late"
    assert digests(*photos_below(INBOX, SORTED)) == digests(*PHOTOS[:150], *PHOTOS[190:340])


def make_uninstall_removes_the_service_and_leaves_the_photos() -> None:
    before = digests(*photos_below(SERVICE))
    assert show("sorter@full", "ActiveState") == "active"
    run("make", "-C", HOST / "clone", "uninstall")
    assert show("sorter@full", "ActiveState") == "inactive"
    left = [path for path in Path("/usr/local").rglob("*") if "sorter" in str(path) and not path.is_dir()]
    assert left == []
    assert not Path("/usr/local/lib/sorter").exists()
    assert show("sorter", "LoadState") == "not-found"
    assert list(Path("/etc/systemd/system").rglob("*.wants/sorter*")) == []
    assert digests(*photos_below(SERVICE)) == before
    assert Path("/etc/sorter/sorter.toml").exists()


def a_user_sorts_in_folders_of_their_own() -> None:
    run("useradd", "-m", "bob")
    user = run("id", "-u", "bob").strip()
    home, runtime = Path("/home/bob"), Path("/run/user") / user
    run("install", "-d", "-m", "700", "-o", "bob", runtime)
    as_bob = ("runuser", "-u", "bob", "--", "env", f"XDG_RUNTIME_DIR={runtime}")
    settings = 'inbox = "~/sorter/inbox"\noutput = "~/sorter/sorted"\n'
    (HOST / "user.toml").write_text(settings)
    run(*as_bob, "mkdir", "-p", home / ".config/sorter", home / "sorter/inbox")
    run(*as_bob, "cp", HOST / "user.toml", home / ".config/sorter/sorter.toml")
    run(*as_bob, "cp", *PHOTOS[:20], home / "sorter/inbox")
    run("systemctl", "start", f"user@{user}.service")
    run(*as_bob, "systemctl", "--user", "start", "sorter")
    wait_for(all_sorted(20, home / "sorter/sorted"), "the sorted photos")
    run(*as_bob, "systemctl", "--user", "stop", "sorter")
    assert digests(*photos_below(home / "sorter")) == digests(*PHOTOS[:20])


def twenty_restarts_under_load_lose_nothing_and_sort_nothing_twice() -> None:
    run("systemctl", "start", "sorter")
    for n in range(20):
        drop(PHOTOS[n * len(PHOTOS) // 20 : (n + 1) * len(PHOTOS) // 20])
        before = len(photos_below(SORTED))
        wait_for(lambda before=before: len(photos_below(SORTED)) > before, "another photo")  # type: ignore[misc]
        run("systemctl", "restart", "sorter")
        assert show("sorter", "ActiveState") == "active"
    wait_for(all_sorted(len(PHOTOS)), "the sorted photos", 200)
    assert digests(*photos_below(SERVICE)) == digests(*PHOTOS)
    assert photos_below(INBOX) == []
    events = journal("sorter.service")
    assert sum(event["event"] == "service.stopping" for event in events) == 20
    ends = ENDS.read_text().splitlines()
    assert ends == ["sorter.service success 0"] * 20, ends


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    (HOST / "drop").mkdir()
    for name in sys.argv[1:]:
        start = time.monotonic()
        try:
            globals()[name]()
            results[name] = {"error": None}
        except BaseException:
            log = run("journalctl", "--no-pager", "-n", "200", check=False)
            results[name] = {"error": f"{traceback.format_exc()}\n{log}"}
        results[name]["seconds"] = round(time.monotonic() - start, 1)
        (HOST / "results.json").write_text(json.dumps(results))
        if results[name]["error"]:
            break


if __name__ == "__main__":
    main()
