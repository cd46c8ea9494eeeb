"""The sorter where PyTorch is not installed, in processes in which it can be neither found nor imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import LONG_AGO, make_tree
from pictures import encoded, smooth

WITHOUT_TORCH = """
import json, sys
sys.modules.update(dict.fromkeys(("torch", "torchvision")))
from sorter.classifier import engine, manifest
from sorter.errors import ConfigurationError
from sorter.settings import SHIPPED_MODEL
"""

CHOICES = """
shipped = manifest.read(SHIPPED_MODEL)
weights_only = shipped.model_copy(update={"files": {"weights.safetensors": shipped.files["weights.safetensors"]}})

def choose(gpu, name, device, model=shipped):
    engine.GPU_FILES = ("/dev/null",) if gpu else ()
    try:
        opened = engine.open_engine(SHIPPED_MODEL, model, name, device, 4)
    except ConfigurationError as error:
        return str(error)
    return [opened.name, opened.device, opened.precision]

print(json.dumps({
    "folder": str(SHIPPED_MODEL),
    "auto": choose(False, "auto", "auto"),
    "auto beside a GPU": choose(True, "auto", "auto"),
    "torch": choose(False, "torch", "auto"),
    "cuda": choose(True, "auto", "cuda"),
    "torch on cuda": choose(True, "torch", "cuda:1"),
    "weights only": choose(False, "auto", "auto", weights_only),
    "weights only, torch": choose(False, "torch", "cpu", weights_only),
    "weights only, openvino": choose(False, "openvino", "cpu", weights_only),
}))
"""

SORT = """
from sorter.cli.main import main
engine.GPU_FILES = ("/dev/null",)
inbox = ["--inbox", sys.argv[1]]
codes = [main(["check", *inbox]), main(["check", *inbox, "--device", "cpu"])]
codes.append(main(["run", "--once", *inbox]))
unwanted = ("torch", "torchvision", "trainer", "openvino_telemetry")
print(json.dumps([codes, [name for name in unwanted if sys.modules.get(name)]]))
"""


def run(code: str, home: Path, *arguments: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The lines of standard output, and the log."""
    home.mkdir()
    environment = {
        "HOME": str(home),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XDG_CACHE_HOME": str(home.parent / "cache"),
    }
    command = [sys.executable, "-c", WITHOUT_TORCH + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines(), [json.loads(line) for line in done.stderr.splitlines()]


def test_the_engine_is_openvino_and_what_needs_pytorch_is_refused_with_what_to_install(tmp_path: Path) -> None:
    (line,), _ = run(CHOICES, tmp_path / "home")
    chosen = json.loads(line)
    folder, needs = chosen.pop("folder"), "needs the extra 'gpu': run pip install '.[gpu]' in sorter's folder"
    no_network = f"the model in {folder} has no OpenVINO network and {needs}, or use a model that has one"
    assert chosen == {
        "auto": ["openvino", "cpu", "int8"],
        "auto beside a GPU": ["openvino", "cpu", "int8"],
        "torch": f"--engine torch {needs}, or drop --engine torch to run on the CPU",
        "cuda": f"--device cuda {needs}, or drop --device cuda to run on the CPU",
        "torch on cuda": f"--engine torch --device cuda:1 {needs}, "
        "or drop --engine torch --device cuda:1 to run on the CPU",
        "weights only": no_network,
        "weights only, torch": no_network,
        "weights only, openvino": f"the model in {folder} has no OpenVINO network: "
        "make one with trainer export, or use --engine torch",
    }


def test_beside_a_gpu_a_sort_succeeds_hints_at_pytorch_once_and_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    inbox = make_tree(tmp_path / "in", {"a.jpg": encoded(smooth(1), "JPEG")}, modified=LONG_AGO)
    lines, log = run(SORT, tmp_path / "home", str(inbox))
    codes, unwanted = json.loads(lines[-1])
    assert (codes, unwanted) == ([0, 0, 0], [])
    hints = [line for line in lines if line.startswith("note ")]
    assert len(hints) == 1, "`check` says it, unless the CPU was asked for"
    assert hints[0].endswith(
        "seems to have a GPU; using it needs the extra 'gpu': run pip install '.[gpu]' in sorter's folder"
    )
    (event,) = [event for event in log if event["event"] == "engine.unused_gpu"]
    assert event["level"] == "warning"
    assert event["detail"] in hints[0]
    assert list((tmp_path / "home").rglob("*")) == []
