"""`sorter bench`, on a few photos; the speeds it measures are not judged here."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tree, read_tree
from pictures import encoded, smooth

from sorter.bench import parts, programs, report
from sorter.errors import ConfigurationError
from sorter.settings import SHIPPED_MODEL, Settings


def bench(*flags: str | Path, temporary: Path) -> "subprocess.CompletedProcess[str]":
    temporary.mkdir()
    return subprocess.run(
        [sys.executable, "-m", "sorter", "bench", *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        timeout=220,  # the loops are slow beside other work
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {f"{n}.jpg": encoded(smooth(n, (300, 200)), "JPEG") for n in range(10)}
    return make_tree(tmp_path_factory.mktemp("photos"), files | {"notes.txt": b"not a photo"})


@pytest.mark.long
def test_it_measures_copies_and_leaves_nothing_behind(photos: Path, tmp_path: Path) -> None:
    before = read_tree(photos)
    done = bench("--photos", photos, "--count", "12", "--runs", "1", "--json", temporary=tmp_path / "tmp")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["photos"], found["distinct"], found["runs"], found["compared"]) == (12, 10, 1, 10)
    assert found["image_size"] == 144
    assert found["differing"] <= found["compared"]
    for rate in ("decode", "classify", "move", "sorter", "start_seconds", "peak_mb"):
        assert found[rate] > 0, rate
    for loop in ("loader", "plain"):
        assert found[f"{loop}_loop"] > 0
        assert found[f"{loop}_ratio"] == pytest.approx(found["sorter"] / found[f"{loop}_loop"], rel=0.01)
        assert len(found[f"{loop}_loop_runs"]) == 1
    assert read_tree(photos) == before
    assert list((tmp_path / "tmp").glob("sorter-*")) == []


def test_without_pytorch_the_plain_loop_is_skipped_with_a_sentence(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "has_torch", lambda: False)
    monkeypatch.setattr(parts, "ENGINE_SECONDS", 0.1)
    said: list[str] = []
    before = read_tree(photos)
    found = report.measure(Settings(), photos, 12, 2, said.append)
    assert "skipping: the plain loop needs the extra 'gpu': run pip install '.[gpu]' in sorter's folder" in said
    assert (found.photos, found.distinct, found.runs, len(found.sorter_runs), found.compared) == (12, 10, 2, 2, 0)
    assert (found.loader_loop, found.loader_ratio, found.plain_loop, found.plain_ratio) == (None, None, None, None)
    assert min(found.decode, found.classify, found.move, found.sorter, found.start_seconds, found.peak_mb) > 0
    assert "plain loops     not measured: it needs the extra 'gpu'" in report.as_text(found)
    assert json.loads(report.as_json(found))["plain_loop_runs"] == []
    with_loops = replace(found, loader_loop=50.0, loader_ratio=5.1, plain_loop=30.0, plain_ratio=8.5)
    rows = [line.split() for line in report.as_text(with_loops).splitlines() if "times as fast" in line]
    assert [row[:2] for row in rows] == [["data", "loader"], ["plain", "loop"]], "the faster loop comes first"
    assert read_tree(photos) == before


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loop_sorts_with_and_without_a_data_loader(workers: int, photos: Path, tmp_path: Path) -> None:
    copies = make_tree(tmp_path, {path.name: path.read_bytes() for path in photos.glob("*.jpg")})
    assert programs.plain_loop(SHIPPED_MODEL, copies, 4, workers) > 0
    assert set(programs.folders(copies)) == {f"{n}.jpg" for n in range(10)}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupted_one_removes_its_copies(number: signal.Signals, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "sorter", "bench", "--photos", str(photos), "--count", "24"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stderr is not None
        while not (line := running.stderr.readline()).startswith("run 1"):
            assert line, "it ended too early"
        time.sleep(0.3)
        running.send_signal(number)
        said = running.stderr.read()
    message = "sorter: interrupted before anything was measured; the copies have been removed\n"
    assert (running.returncode, said) == (3, message)
    assert list((tmp_path / "tmp").glob("sorter-*")) == []


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"--photos {tmp_path}: there are no photos in this folder"):
        report.measure(Settings(), tmp_path, 1, 1)
    with pytest.raises(ConfigurationError, match=f"--photos {tmp_path / 'missing'}: No such file"):
        report.measure(Settings(), tmp_path / "missing", 1, 1)
