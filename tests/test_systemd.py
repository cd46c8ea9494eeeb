"""The service under a real systemd, its units, and the files that `make install` installs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import systemd_scenario as scenario
from conftest import SHARED

from sorter.classifier.engine import open_engine
from sorter.classifier.manifest import read
from sorter.settings import SHIPPED_MODEL

ROOT = Path(__file__).resolve().parents[1]
SANDBOX = SHARED.parent / "tools" / "systemd-sandbox"
CLONE = ("Makefile", "pyproject.toml", "README.md", "LICENSE", "config", "sorter", "systemd", "trainer")

Boot = Callable[..., dict[str, dict[str, Any]]]


def _boot(host: Path, photos: list[Path], steps: list[str], limit_seconds: int) -> dict[str, dict[str, Any]]:
    """Run steps of the scenario in a throw-away machine."""
    if os.geteuid() != 0 or not SANDBOX.is_file():
        pytest.skip("needs root and ../shared/tools/systemd-sandbox, which is not part of the project")
    for name in ("clone", "photos"):
        (host / name).mkdir(parents=True)
    os.chmod(host, 0o755)
    for name in CLONE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, host / "clone" / name)
    for photo in photos:
        shutil.copy(photo, host / "photos" / photo.name)
    shutil.copy(scenario.__file__, host / "scenario.py")
    where = {
        "executable": os.path.realpath(sys.executable),
        "prefix": os.path.realpath(sys.base_prefix),
        "packages": _packages(host),
        "precision": open_engine(SHIPPED_MODEL, read(SHIPPED_MODEL), "auto", "cpu", 32).precision,
    }
    (host / "where.json").write_text(json.dumps(where))
    script = host.parent / "boot.sh"
    script.write_text(f"exec {where['executable']} /run/host/scenario.py {' '.join(steps)}\n")
    done = subprocess.run(
        [SANDBOX, script, host], env={**os.environ, "LIMIT_S": str(limit_seconds)}, capture_output=True, text=True
    )
    assert (host / "results.json").is_file(), done.stdout + done.stderr
    results: dict[str, dict[str, Any]] = json.loads((host / "results.json").read_text())
    return results


def _packages(host: Path) -> str:
    """Where the machine finds the packages of the tests: it has its own /tmp and /run."""
    packages = sysconfig.get_path("purelib")
    if not packages.startswith(("/tmp/", "/run/", "/dev/")):
        return packages
    # Hard links: PyTorch takes gigabytes.
    if subprocess.run(["cp", "-al", packages, host / "packages"], capture_output=True).returncode != 0:
        pytest.skip("needs a virtual environment outside /tmp, or on the file system of the temporary folder")
    return "/run/host/packages"


def _analyze(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    return subprocess.run(
        ["systemd-analyze", *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


def _make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # There may be no network: pip finds the packages of the tests. PIP_NO_BUILD_ISOLATION=0 is "do not isolate".
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": ""}
    return subprocess.run(["make", "-C", ROOT, *arguments], env=environment, capture_output=True, text=True)


def _unit(tmp_path: Path, name: str = "sorter.service", drop_in: str = "") -> Path:
    shutil.copy(ROOT / "systemd" / name, tmp_path)
    if drop_in:
        (tmp_path / f"{name}.d").mkdir()
        (tmp_path / f"{name}.d" / "drop-in.conf").write_text(drop_in)
    return tmp_path / name


@pytest.mark.parametrize(("drop_in", "limit"), [("", 1.0), ("sorter-gpu.conf", 1.5)])
def test_the_service_is_confined(tmp_path: Path, drop_in: str, limit: float) -> None:
    unit = _unit(tmp_path, drop_in=(ROOT / "systemd" / drop_in).read_text() if drop_in else "")
    # The threshold counts tenths.
    done = _analyze("security", "--offline=true", "--no-pager", f"--threshold={10 * limit:.0f}", unit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("char-nvidia" in done.stdout) == bool(drop_in)


@pytest.mark.parametrize("unit", ["sorter.service", "user/sorter.service"])
def test_units_verify(tmp_path: Path, unit: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sorter").symlink_to(sys.executable)  # verify looks for the program
    copy = tmp_path / Path(unit).name
    copy.write_text((ROOT / "systemd" / unit).read_text().replace("/usr/local", str(tmp_path)))
    done = _analyze("verify", *(["--user"] if "/" in unit else []), copy, XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_drop_in_for_prometheus_opens_little(tmp_path: Path) -> None:
    documents = [(path / "README.md") for path in (ROOT, ROOT / "config", ROOT / "systemd")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents if path.is_file())
    (drop_in,) = re.findall(r"```ini\n(\[Service\]\nPrivateNetwork=no\n.*?)```", text, re.DOTALL)
    done = _analyze("security", "--offline=true", "--no-pager", "--threshold=10", _unit(tmp_path, drop_in=drop_in))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"✗ PrivateNetwork=", done.stdout), done.stdout
    assert "IP address allow list with only localhost entries" in done.stdout
    assert "cannot allocate packet sockets" in done.stdout


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


@pytest.mark.long
def test_a_package_does_not_name_its_build_folder_and_is_removed_completely(tmp_path: Path) -> None:
    root, library = tmp_path / "package", tmp_path / "package/usr/local/lib/sorter"
    for name in ("etc/sorter/sorter.toml", "usr/local/bin/other"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("# mine\n")
    before = _files(root)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", library], check=True)
    (site,) = library.glob("lib/python*/site-packages")
    (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
    (library / "my-model").mkdir()
    (library / "my-model" / "manifest.json").write_text("{}")

    installed = _make("install", f"DESTDIR={root}")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "systemctl enable --now sorter" in installed.stdout
    assert (root / "etc/sorter/sorter.toml").read_text() == "# mine\n"
    assert os.readlink(root / "usr/local/bin/sorter") == "/usr/local/lib/sorter/bin/sorter"
    assert (library / "bin/sorter").read_text().startswith("#!/usr/local/lib/sorter/bin/python")
    service, instance = ((root / f"usr/local/lib/systemd/system/sorter{at}.service").read_text() for at in ("", "@"))
    assert instance.replace("/%i.toml", "/sorter.toml").replace(" (%i)\n", "\n") == service
    assert "\nExecStart=/usr/local/bin/sorter run --config /etc/sorter/%i.toml\n" in instance
    naming = [path for path in root.rglob("*") if path.is_file() and os.fsencode(root) in path.read_bytes()]
    assert naming == []
    assert (site / "sorter/models/catdog-resnet50/weights.safetensors").is_file()
    removed = _make("uninstall", f"DESTDIR={root}")
    assert removed.returncode == 0, removed.stdout + removed.stderr
    assert _files(root) == before | {"usr/local/lib/sorter/my-model/manifest.json"}


def test_install_does_not_replace_a_command_of_another_program(tmp_path: Path) -> None:
    other = tmp_path / "usr/local/bin/sorter"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\n")
    installed = _make("install", f"DESTDIR={tmp_path}")
    assert installed.returncode != 0
    assert "belongs to another program" in installed.stderr
    _make("uninstall", f"DESTDIR={tmp_path}")
    assert _files(tmp_path) == {"usr/local/bin/sorter"}


INSTALL = "make_install_installs_a_service_that_verifies"
SORT = "dropped_photos_are_sorted_and_the_journal_is_json"
BUSY = "an_instance_whose_folder_another_sorter_has_is_restarted_until_it_is_free"
LATE = "an_instance_waits_for_an_inbox_that_is_not_there_yet"
RELOAD = "a_reload_takes_the_model_that_a_link_names_and_refuses_a_broken_one"
STEPS = [
    INSTALL,
    SORT,
    "a_killed_service_restarts_and_sorts_the_rest",
    "a_hanging_service_is_restarted_by_the_watchdog",
    "a_wrong_configuration_is_reported_once_and_not_retried",
    "a_second_instance_waits_while_its_disk_is_full_and_continues",
    "a_stop_finishes_the_current_batch_and_leaves_the_rest",
    "make_uninstall_removes_the_service_and_leaves_the_photos",
]


def _some_photos(count: int) -> list[Path]:
    return [path for path in sorted((SHARED / "photos").glob("*")) if path.suffix != ".csv"][:count]


def _first_error(results: dict[str, dict[str, Any]]) -> str | None:
    return next((f"{step}: {result['error']}" for step, result in results.items() if result["error"]), None)


@pytest.mark.shared
def test_a_real_systemd_starts_the_installed_service_and_it_sorts(tmp_path: Path) -> None:
    results = _boot(tmp_path / "host", _some_photos(40), [INSTALL, SORT], 100)
    assert _first_error(results) is None
    assert list(results) == [INSTALL, SORT]


@pytest.mark.shared
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_real_systemd_reloads_the_service_with_another_model(tmp_path: Path) -> None:
    results = _boot(tmp_path / "host", _some_photos(40), [INSTALL, SORT, RELOAD], 200)
    assert _first_error(results) is None
    assert list(results) == [INSTALL, SORT, RELOAD]


@pytest.mark.shared
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_real_systemd_retries_what_may_work_later_and_the_service_waits_for_its_inbox(tmp_path: Path) -> None:
    results = _boot(tmp_path / "host", _some_photos(40), [INSTALL, SORT, BUSY, LATE], 200)
    assert _first_error(results) is None
    assert list(results) == [INSTALL, SORT, BUSY, LATE]


@pytest.mark.shared
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_real_systemd_restarts_stops_and_uninstalls_it(tmp_path: Path) -> None:
    results = _boot(tmp_path / "host", _some_photos(340), STEPS, 250)
    assert _first_error(results) is None
    assert list(results) == STEPS


@pytest.mark.shared
@pytest.mark.torture
@pytest.mark.timeout(1700)
def test_twenty_restarts_under_load_lose_nothing_and_sort_nothing_twice(
    tmp_path: Path, proved: Callable[[str], None]
) -> None:
    photos = sorted((SHARED / "kaggle-180").rglob("*.jpg"))[:2000]
    restarts = "twenty_restarts_under_load_lose_nothing_and_sort_nothing_twice"
    results = _boot(tmp_path / "host", photos, [INSTALL, "a_user_sorts_in_folders_of_their_own", restarts], 1600)
    assert [result["error"] for result in results.values()] == [None] * 3
    seconds = results[restarts]["seconds"]
    proved(f"20 restarts of the real service under load, {seconds:.0f} s: {len(photos)} photos sorted, each once")
