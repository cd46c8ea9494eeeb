"""Trainers that are killed, and trainers that work together: real processes."""

import csv
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_fit import red_and_green

from sorter.classifier import network
from trainer.fitting import checkpoint

pytestmark = pytest.mark.timeout(300)

# A checkpoint after each step, so that a kill finds one within an epoch.
TRAINER = """
import sys
from trainer import cli
from trainer.fitting import loop
loop.CHECKPOINT_SECONDS = {seconds}
sys.exit(cli.main())
"""
OPTIONS = ("--weights", "none", "--arch", "resnet18", "--image-size", "32", "--num-workers", "0", "--device", "cpu")
RECIPE = ("--recipe", "default", "--epochs", "2", "--batch-size", "8")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return red_and_green(tmp_path_factory.mktemp("data"), 40)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def command(dataset: Path, output: Path, *options: str, seconds: float = 1e9) -> list[str]:
    given = ("fit", "--data", str(dataset), "--output", str(output), *OPTIONS, *RECIPE, *options)
    return [sys.executable, "-c", TRAINER.format(seconds=seconds), *given]


def finish(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def metrics(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open() as rows:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "stage")} for row in csv.DictReader(rows)
        ]


def within_an_epoch(path: Path) -> bool:
    if not path.exists():
        return False
    position = torch.load(path, weights_only=True)["state"]["position"]
    return position is not None and position["position"]["step"] > 0


def test_a_killed_fit_goes_on_and_ends_with_the_same_numbers(
    dataset: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "model", tmp_path / "again" / "model"
    finish(command(dataset, whole), environment)
    process = subprocess.Popen(command(dataset, broken, seconds=0), env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not within_an_epoch(broken / checkpoint.NAME):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    said = finish(command(dataset, broken, "--resume"), environment)
    assert "going on from" in said
    assert metrics(broken) == metrics(whole)
    assert (broken / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert not (broken / checkpoint.NAME).exists()


def test_two_processes_fit_what_one_fits(dataset: Path, environment: dict[str, str], tmp_path: Path) -> None:
    # Frozen statistics, as with any backbone that was trained before: each process normalises its half the same.
    (tmp_path / "w.safetensors").write_bytes(network.half(network.build("resnet18", (), 2).state_dict()))
    weights = ("--weights", str(tmp_path / "w.safetensors"))
    finish([*command(dataset, tmp_path / "one"), *weights], environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    given = command(dataset, tmp_path / "two", *weights)[3:]
    said = finish([*launcher, f"--master-port={port}", "-m", "trainer", *given], environment)
    assert said.count('"event": "epoch"') == len(metrics(tmp_path / "two")), "one of them talks"
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert {name: float(value) for name, value in two.items()} == pytest.approx(
            {name: float(value) for name, value in one.items()}, rel=0.03, abs=0.02
        )
