"""`pip install .` into a new virtual environment, without extras: small, without PyTorch, and it sorts."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_tree

ROOT = Path(__file__).resolve().parents[1]
CLONE = ("pyproject.toml", "README.md", "LICENSE", "sorter", "trainer")
MAX_MB = 700


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.upper().startswith("SORTER_")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, (command, done.stdout, done.stderr)
    return done.stdout


def labels(program: list[str | Path], inbox: Path) -> dict[str, str]:
    """The label of each photo, from a dry run."""
    flags = ("run", "--once", "--dry-run", "--json", "--inbox", inbox)
    lines = map(json.loads, run(*program, *flags, cwd=inbox.parent).splitlines())
    return {Path(line["path"]).name: line["label"] for line in lines}


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.timeout(1200)
def test_a_base_installation_is_small_has_no_pytorch_and_sorts_like_this_one(
    shared: Path, tmp_path: Path, proved: Callable[[str], None]
) -> None:
    clone, venv, inbox = tmp_path / "clone", tmp_path / "venv", tmp_path / "inbox"
    for folder in (clone, inbox):
        folder.mkdir()
    for name in CLONE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    for photo in [path for path in sorted((shared / "photos").iterdir()) if path.suffix == ".jpg"][:20]:
        shutil.copy2(photo, inbox)
    before = read_tree(inbox)
    expected = labels([sys.executable, "-m", "sorter"], inbox)
    assert len(expected) == len(before) == 20

    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    pip, sorter = venv / "bin" / "pip", venv / "bin" / "sorter"
    try:
        run(pip, "download", "--no-deps", "--dest", tmp_path / "probe", "typing-extensions", cwd=tmp_path)
    except AssertionError:
        pytest.skip("needs a package index")
    started = time.monotonic()
    run(pip, "install", clone, cwd=tmp_path)
    seconds = time.monotonic() - started
    installed = {package["name"].lower() for package in json.loads(run(pip, "list", "--format", "json", cwd=tmp_path))}
    assert installed & {"torch", "torchvision", "shtab", "argparse-manpage", "prometheus-client"} == set()
    size_mb = int(run("du", "-sm", venv, cwd=tmp_path).split()[0])
    assert size_mb < MAX_MB

    assert run(sorter, "check", "--inbox", inbox, cwd=tmp_path).endswith("Everything is fine.\n")
    assert labels([sorter], inbox) == expected
    assert run(sorter, "run", "--once", "--inbox", inbox, cwd=tmp_path).startswith("20 photos sorted in ")
    assert {path.name: path.parent.name for path in inbox.glob("*s/*.jpg")} == {
        name: f"{label}s" for name, label in expected.items()
    }
    assert len(run(sorter, "history", "--json", "--inbox", inbox, cwd=tmp_path).splitlines()) == 20
    assert "needs the extra 'shell'" in run_errors(sorter, "completion", "bash", cwd=tmp_path)
    assert run(sorter, "undo", "--last", "--inbox", inbox, cwd=tmp_path).startswith("Restored 20 photos; 0 ")
    assert read_tree(inbox) == before
    proved(
        f"pip install . without extras: {size_mb} MB in {seconds:.0f} s, and it sorts 20 photos like this environment"
    )


def run_errors(*command: str | Path, cwd: Path) -> str:
    """Standard error of a command that is refused."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    return done.stderr


@pytest.mark.parametrize(("code", "said"), [(0, ""), (3, ""), (1, "Error 1"), (2, "Error 2"), (4, "Error 4")])
def test_make_sort_says_with_which_code_the_sort_ended(tmp_path: Path, code: int, said: str) -> None:
    sorter = tmp_path / "venv/bin/sorter"
    sorter.parent.mkdir(parents=True)
    sorter.write_text(f"#!/bin/sh\nexit {code}\n")
    sorter.chmod(0o755)
    (tmp_path / "venv/.installed").touch()
    command = ["make", "-C", str(ROOT), "sort", f"VENV={tmp_path}/venv", f"INBOX={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(said)
    assert said in done.stderr
