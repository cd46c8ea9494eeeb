"""Fits that are killed and resumed, and fits by several processes: real processes."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import red_and_green

from sorter.classifier import network
from trainer import cli
from trainer.fitting import checkpoint, fit
from trainer.packaging import package

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]  # torch warns about itself

# One thread, because torch's threads spin while they wait for each other. A checkpoint after each step, so that a kill
# finds one within an epoch.
TRAINER = """
import sys
from trainer import cli
from trainer.fitting import fit, loop
fit.available_cpus = lambda: 1
loop.CHECKPOINT_SECONDS = {seconds}
sys.exit(cli.main())
"""
OPTIONS = ("--weights", "none", "--arch", "resnet18", "--image-size", "32", "--num-workers", "0", "--device", "cpu")
RECIPE = ("--recipe", "finetune", "--epochs", "2", "--batch-size", "8")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return red_and_green(tmp_path_factory.mktemp("data"), 40)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def fit_arguments(dataset: Path, output: Path, *options: str) -> list[str]:
    return ["fit", "--data", str(dataset), "--output", str(output), *OPTIONS, *RECIPE, *options]


def command(arguments: list[str], *, checkpoint_seconds: float = 1e9) -> list[str]:
    return [sys.executable, "-c", TRAINER.format(seconds=checkpoint_seconds), *arguments]


def finish(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kill_within_an_epoch(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    """Start a fit and kill it as soon as it has written a checkpoint between two steps."""
    started = command(arguments, checkpoint_seconds=0)
    process = subprocess.Popen(started, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not is_within_an_epoch(output / checkpoint.NAME):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()


def is_within_an_epoch(path: Path) -> bool:
    if not path.exists():
        return False
    position = torch.load(path, weights_only=True)["state"]["position"]
    return position is not None and position["position"]["step"] > 0


class FittedError(Exception):
    """Ends a fit before its model is packaged, and holds the network's weights."""


def fit_without_packaging(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Run the command in this process; give its epochs, without their speed, and the weights that it ended with."""

    def stop(_: Path, fitted: torch.nn.Module, *__: object) -> None:
        raise FittedError(fitted.state_dict())

    monkeypatch.setattr(package, "write", stop)
    with pytest.raises(FittedError) as caught:
        cli.main(arguments)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    epochs = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines if line["event"] == "epoch"]
    return epochs, caught.value.args[0]


@pytest.mark.long
def test_a_killed_fit_resumes_and_ends_with_the_same_numbers(
    dataset: Path,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    monkeypatch.setattr(fit, "available_cpus", lambda: 1)
    small = ("--arch", "shufflenet_v2_x1_0")  # its checkpoints are a tenth of a ResNet18's
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    epochs, weights = fit_without_packaging(fit_arguments(dataset, uninterrupted, *small), monkeypatch, capsys)
    kill_within_an_epoch(fit_arguments(dataset, killed, *small), killed, environment)
    resume = fit_arguments(dataset, killed, *small, "--resume")
    remaining, resumed_weights = fit_without_packaging(resume, monkeypatch, capsys)
    assert 0 < len(remaining) < len(epochs)
    assert remaining == epochs[-len(remaining) :]
    assert all(torch.equal(resumed_weights[name], value) for name, value in weights.items())


def metrics(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open() as rows:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "stage")} for row in csv.DictReader(rows)
        ]


@pytest.mark.long
def test_a_resumed_fit_writes_the_model_folder_of_an_uninterrupted_one(
    dataset: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    uninterrupted, killed = tmp_path / "model", tmp_path / "again" / "model"
    finish(command(fit_arguments(dataset, uninterrupted)), environment)
    kill_within_an_epoch(fit_arguments(dataset, killed), killed, environment)
    said = finish(command(fit_arguments(dataset, killed, "--resume")), environment)
    assert "resuming from" in said
    assert metrics(killed) == metrics(uninterrupted)
    assert (killed / "weights.safetensors").read_bytes() == (uninterrupted / "weights.safetensors").read_bytes()
    assert not (killed / checkpoint.NAME).exists()


@pytest.mark.long
def test_two_processes_fit_the_same_model_as_one(dataset: Path, environment: dict[str, str], tmp_path: Path) -> None:
    # Frozen statistics, as with any pretrained backbone: each process normalises its half in the same way.
    (tmp_path / "w.safetensors").write_bytes(network.half(network.build("resnet18", (), 2).state_dict()))
    weights = ("--weights", str(tmp_path / "w.safetensors"))
    finish(command(fit_arguments(dataset, tmp_path / "one", *weights)), environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    arguments = fit_arguments(dataset, tmp_path / "two", *weights)
    said = finish([*launcher, f"--master-port={port}", "-m", "trainer", *arguments], environment)
    assert said.count('"event": "epoch"') == len(metrics(tmp_path / "two")), "only one of them reports"
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert {name: float(value) for name, value in two.items()} == pytest.approx(
            {name: float(value) for name, value in one.items()}, rel=0.03, abs=0.02
        )
