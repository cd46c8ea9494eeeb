"""`config/environment`, which `make sort` and `make install` run: what it installs, and what it says about it.

Python, pip and df are scripts here, so that nothing is installed and any machine can be pretended.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sorter.classifier.engine import NVIDIA_FILES

SCRIPT = Path(__file__).resolve().parents[1] / "config" / "environment"

_PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit "$FAKE_OLD" ;;
  *python_version*) echo 3.10.4 ;;
  *'import venv'*) exit "$FAKE_NO_VENV" ;;
  *find_spec*) exit "$FAKE_NO_TORCH" ;;
  '-c import pip') exit 0 ;;
  '-m venv --clear '*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  '-m pip install '*) echo "$*" > "$FAKE_PIP" && exit "$FAKE_PIP_FAILS" ;;
  *) exit 99 ;;
esac
"""
_DF = """#!/bin/sh
echo "Filesystem 1048576-blocks Used Available Capacity Mounted on"
echo "/dev/sda 9000 0 $FAKE_FREE 0% /"
"""


@dataclass(frozen=True)
class Result:
    """How the script ended, and the arguments that pip got."""

    code: int
    output: str
    errors: str
    pip: str


def environment(tmp_path: Path, extras: str, *, gpu: bool = False, free: int = 9000, **fakes: str) -> Result:
    folder = tmp_path / f"case-{len(list(tmp_path.iterdir()))}"
    (folder / "bin").mkdir(parents=True)
    if gpu:
        (folder / "nvidiactl").touch()
    for name, text in (("python", _PYTHON), ("df", _DF)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    if fakes.get("FAKE_NO_TORCH") == "0":
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python").symlink_to(folder / "bin" / "python")
    pip = folder / "pip"
    variables = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "python",
        "GPU_FILES": f"{folder}/nvidiactl {folder}/libcuda.so.1",
        "FAKE_FREE": str(free),
        "FAKE_PIP": str(pip),
        **dict.fromkeys(("FAKE_OLD", "FAKE_NO_VENV", "FAKE_PIP_FAILS"), "0"),
        "FAKE_NO_TORCH": "1",
        **fakes,
    }
    command = [str(SCRIPT), str(folder / "venv"), "/clone", extras, "--editable"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    return Result(done.returncode, done.stdout, done.stderr, pip.read_text() if pip.exists() else "")


def test_pytorch_is_installed_only_for_a_gpu_or_for_training_and_the_size_is_said(tmp_path: Path) -> None:
    cases = [
        ("", False, "1", "/clone", "without PyTorch, because this machine has no NVIDIA GPU (about 500 MB)."),
        ("shell", False, "1", "/clone[shell]", "without PyTorch"),
        ("", True, "1", "/clone[gpu]", "with PyTorch, for this machine's NVIDIA GPU (about 6 GB)."),
        ("shell", True, "1", "/clone[gpu,shell]", "with PyTorch, for this machine's NVIDIA GPU"),
        ("", True, "0", "/clone[gpu]", "for this machine's NVIDIA GPU (PyTorch is installed already)."),
        ("train", False, "1", "/clone[train]", "with PyTorch, for training (about 6 GB)."),
        ("dev", True, "1", "/clone[dev]", "with PyTorch, for training"),
    ]
    for extras, gpu, no_torch, installed, said in cases:
        result = environment(tmp_path, extras, gpu=gpu, FAKE_NO_TORCH=no_torch)
        assert (result.code, result.errors) == (0, ""), (extras, gpu)
        assert said in result.output, (extras, gpu)
        assert result.pip.split()[-2:] == ["--editable", installed], (extras, gpu)


def test_pytorch_is_installed_where_the_sorter_would_look_for_an_nvidia_gpu() -> None:
    (files,) = re.findall(r"\$\{GPU_FILES:-(.*)\}", SCRIPT.read_text())
    assert tuple(files.split()) == NVIDIA_FILES


def test_make_model_asks_for_its_data_before_anything_is_installed() -> None:
    command = ["make", "--silent", "model", "VENV=/nonexistent/venv", "PYTHON=/nonexistent/python"]
    environment = {name: value for name, value in os.environ.items() if name != "DATA"}
    done = subprocess.run(
        command, cwd=SCRIPT.parents[1], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "make model DATA=" in done.stderr
    assert "There is no" not in done.stderr


def test_what_is_missing_is_said_before_anything_is_installed(tmp_path: Path) -> None:
    cases = [
        (environment(tmp_path, "", PYTHON="python9"), "There is no python9: install Python 3.11"),
        (environment(tmp_path, "", FAKE_OLD="1"), "sorter needs Python 3.11 or newer, and python is 3.10.4"),
        (environment(tmp_path, "", FAKE_NO_VENV="1"), "install its venv module"),
        (environment(tmp_path, "", free=699), "needs 700 MB, and only 699 MB are free"),
        (environment(tmp_path, "train", free=6999), "needs 7000 MB, and only 6999 MB are free"),
    ]
    for result, said in cases:
        assert (result.code, result.output, result.pip) == (1, "", ""), said
        assert said in result.errors


def test_a_failed_installation_says_so(tmp_path: Path) -> None:
    result = environment(tmp_path, "", FAKE_PIP_FAILS="1")
    assert result.code == 1
    assert "The installation failed" in result.errors
