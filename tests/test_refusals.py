"""A model folder or a configuration that is wrong: one sentence, exit 2, and nothing touched.

Each case goes through `sorter check`; the long tests put it through `sorter run --once` and the daemon as well, each in
a process of its own.
"""

import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import structlog
from conftest import make_tree, photo

from sorter.classifier.manifest import FORMAT_VERSION, MANIFEST, WEIGHTS, Class, Input, Manifest, digest_of, read, write
from sorter.cli.main import main
from sorter.errors import ModelError

CHECK, RUN_ONCE, DAEMON = ["check"], ["run", "--once"], ["run"]
# The heavy modules are imported once: each request runs in a fork of this process.
_SERVER = """
import json, os, signal, sys, tempfile
import torch
from sorter.classifier import network
from sorter.cli.main import main

network.torchvision_models()

for line in sys.stdin:
    request = json.loads(line)
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.chdir(request["folder"])
            os.environ.update(request["variables"])
            code = 99
            try:
                code = main(request["arguments"])
            except SystemExit as ended:
                code = ended.code
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        print(json.dumps([code, errors.read().decode()]), flush=True)
"""


class InProcess:
    """Runs `sorter check` with some arguments, and returns its exit code and its standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def run(self, folder: Path, arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
        with self.monkeypatch.context() as changed:
            for name in [*os.environ]:
                if name.upper().startswith("SORTER_"):
                    changed.delenv(name)
            for name, value in variables.items():
                changed.setenv(name, value)
            changed.chdir(folder)
            structlog.reset_defaults()  # another test in this process may have configured the log
            return main(arguments), self.capsys.readouterr().err


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess(monkeypatch, capsys)


class NewProcess:
    """Runs any command of `sorter` as a person does, and returns its exit code and its standard error."""

    def run(self, folder: Path, arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
        command = [sys.executable, "-m", "sorter", *arguments]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr


class Server:
    """Does the same in forks of a process that has imported what takes long."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("SORTER_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, folder: Path, arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"folder": str(folder), "arguments": arguments, "variables": variables}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code, errors = json.loads(self.process.stdout.readline())
        return code, errors


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.process.communicate()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model of one of the small architectures, with a second file beside its weights."""
    from sorter.classifier import network

    folder = tmp_path_factory.mktemp("small") / "model"
    input_ = Input(size=64, crop="squash", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    manifest = Manifest(
        format_version=1,
        name="small",
        architecture="squeezenet1_1",
        classes=(Class(label="cat", folder="cats"), Class(label="dog", folder="dogs")),
        input=input_,
        temperature=1.0,
        files={},
    )
    weights = network.half(network.build("squeezenet1_1", (), 2).state_dict())
    write(folder, manifest, {WEIGHTS: weights, "openvino.bin": bytes(range(256))}, "# Small\n")
    return folder


def tree(root: Path) -> dict[str, object]:
    """Everything below a folder with its kind, mode, time and content, except the sorter's own hidden folder."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        if ".sorter" in path.parts:
            continue
        status = path.lstat()
        content = None
        if stat.S_ISREG(status.st_mode) and status.st_size < 100_000_000:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        time_ns = 0 if (path / ".sorter").is_dir() else status.st_mtime_ns
        found[str(path.relative_to(root))] = (status.st_mode, status.st_size * (content is not None), time_ns, content)
    return found


def refused(
    program: InProcess | NewProcess | Server,
    folder: Path,
    sentence: str,
    arguments: list[str],
    variables: dict[str, str] | None = None,
    *,
    commands: Sequence[list[str]] = (CHECK,),
) -> None:
    """Check that commands refuse in one line that contains a sentence, and change nothing."""
    make_tree(folder, {"in/a.jpg": photo(1), "in/notes.txt": b"hello"})
    before = tree(folder)
    for command in commands:
        what = (folder.name, command)
        code, errors = program.run(folder, [*command, "--inbox", "in", *arguments], variables or {})
        lines = errors.splitlines()
        assert (code, len(lines)) == (2, 1), (what, errors)
        assert lines[0].startswith("sorter: "), what
        said = lines[0].removeprefix("sorter: ")
        assert sentence in said, what
        assert "\n" not in said, what
        assert len(said) < 1000, what
        assert "Traceback" not in said, what
        assert not said.split(":")[0].endswith(("Error", "Exception", "Interrupt")), what
        assert tree(folder) == before, what


def test_the_model_that_the_cases_break_is_valid(check: InProcess, small_model: Path, tmp_path: Path) -> None:
    make_tree(tmp_path, {"in/a.jpg": photo(1)})
    assert check.run(tmp_path, ["check", "--inbox", "in", "--model", str(small_model)], {}) == (0, "")


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the manifest's content."""

    def edit(model: Path) -> None:
        content = json.loads((model / MANIFEST).read_bytes())
        change(content)
        (model / MANIFEST).write_text(json.dumps(content), encoding="utf-8")

    return edit


def flipped(name: str) -> Callable[[Path], object]:
    def flip(model: Path) -> None:
        content = bytearray((model / name).read_bytes())
        content[len(content) // 2] ^= 0x80
        (model / name).write_bytes(content)

    return flip


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    """Replace a file's content, and its digest in the manifest."""

    def replace(model: Path) -> None:
        (model / name).write_bytes(content)
        edited(lambda m: m["files"].update({name: digest_of(model / name)}))(model)

    return replace


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change tensors, and the file's digest in the manifest."""

    def rewrite(model: Path) -> None:
        tensors = safetensors.numpy.load_file(model / WEIGHTS)
        change(tensors)
        replaced(WEIGHTS, safetensors.numpy.save(tensors))(model)

    return rewrite


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def exchange(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return exchange


def class_folder(name: str) -> Callable[[Path], object]:
    return edited(lambda m: m["classes"][0].update(folder=name))


def _truncate_weights(model: Path) -> None:
    replaced(WEIGHTS, (model / WEIGHTS).read_bytes()[:-1000])(model)


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 50_000_000_000)


FIRST = "features.0.weight"
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte in the weights": (flipped(WEIGHTS), "is damaged"),
    "a flipped byte in a file beside them": (flipped("openvino.bin"), "is damaged"),
    "a flipped byte in the manifest": (flipped(MANIFEST), "not a valid manifest"),
    "a wrong digest": (edited(lambda m: m["files"].update({WEIGHTS: "sha256:" + 64 * "0"})), "is damaged"),
    "an empty digest": (edited(lambda m: m["files"].update({WEIGHTS: ""})), "is damaged"),
    "missing weights": (lambda m: (m / WEIGHTS).unlink(), "copy the whole folder again"),
    "a missing file beside them": (lambda m: (m / "openvino.bin").unlink(), "copy the whole folder again"),
    "a missing manifest": (lambda m: (m / MANIFEST).unlink(), "there is no model"),
    "a newer format": (edited(lambda m: m.update(format_version=FORMAT_VERSION + 1)), "upgrade"),
    "a much newer format": (edited(lambda m: m.update(format_version=10**4200)), "upgrade"),
    "a manifest that is a folder": (in_place_of(MANIFEST, lambda p: p.mkdir()), "there is no model"),
    "a manifest that is a FIFO": (in_place_of(MANIFEST, os.mkfifo), "there is no model"),
    "an endless manifest": (in_place_of(MANIFEST, lambda p: p.symlink_to("/dev/zero")), "there is no model"),
    "a huge manifest": (in_place_of(MANIFEST, _huge), "too large"),
    "a manifest that is not UTF-8": (lambda m: (m / MANIFEST).write_bytes(b'{"name": "caf\xe9"}'), "not a valid"),
    "a manifest of brackets": (lambda m: (m / MANIFEST).write_bytes(b"[" * 200_000), "not a valid manifest"),
    "an unknown field with a line break": (edited(lambda m: m.update({"a\nb": 1})), "export the model again"),
    "weights that are a FIFO": (in_place_of(WEIGHTS, os.mkfifo), "not a regular file"),
    "weights that are a folder": (in_place_of(WEIGHTS, lambda p: p.mkdir()), "copy the whole folder again"),
    "NaN in the weights": (weights(lambda t: t[FIRST].fill(np.nan)), "not finite"),
    "infinite weights": (weights(lambda t: t[FIRST].fill(np.inf)), "not finite"),
    "one NaN in the last layer": (
        weights(lambda t: t[max(t)].reshape(-1).__setitem__(0, np.nan)),
        "not finite",
    ),
    "a tensor of another shape": (weights(lambda t: t.update({FIRST: t[FIRST][:1]})), "size mismatch"),
    "a missing tensor": (weights(lambda t: t.pop(FIRST)), "export the model again"),
    "a surplus tensor": (weights(lambda t: t.update(more=np.zeros(3, np.float16))), "export the model again"),
    "truncated safetensors": (_truncate_weights, "do not fit"),
    "an absurd safetensors header": (replaced(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), "do not fit"),
    "empty weights": (replaced(WEIGHTS, b""), "do not fit"),
    "weights for two classes and a manifest for three": (
        edited(lambda m: m["classes"].append({"label": "cow", "folder": "cows"})),
        "size mismatch",
    ),
    "an unknown architecture": (edited(lambda m: m.update(architecture="resnet5000")), "unknown architecture"),
    "an input smaller than the architecture can see": (edited(lambda m: m["input"].update(size=16)), "cannot run"),
    "an absurd input size": (edited(lambda m: m["input"].update(size=10**9)), "input.size"),
    "a head wider than any memory": (edited(lambda m: m.update(head_hidden=[65536] * 16)), "do not fit"),
    "a head without width": (edited(lambda m: m.update(head_hidden=[0])), "head_hidden"),
    "a standard deviation of zero": (edited(lambda m: m["input"].update(std=[0, 1, 1])), "input.std"),
    "an absurd mean": (edited(lambda m: m["input"].update(mean=[1e300, 0, 0])), "export"),
    "a temperature of almost zero": (edited(lambda m: m.update(temperature=1e-320)), "probabilities"),
    "a folder above": (class_folder(".."), "not a plain name"),
    "a folder in a folder": (class_folder("a/b"), "not a plain name"),
    "a folder with a NUL": (class_folder("a\0b"), "not a plain name"),
    "a folder with a line break": (class_folder("a\nb"), "not a plain name"),
    "a folder with a very long name": (class_folder("ä" * 128), "not a plain name"),
    "a folder with an endless name": (class_folder("a" * 1_000_000), "not a plain name"),
    "the sorter's own folder": (class_folder(".sorter"), "not a plain name"),
    "a reserved folder in other letters": (class_folder("Failed"), "reserved"),
    "two folders that differ in case alone": (class_folder("DOGS"), "same label or folder"),
    "a label with an escape sequence": (edited(lambda m: m["classes"][0].update(label="\x1b[2J")), "cannot be shown"),
    "a file outside the folder": (edited(lambda m: m["files"].update({"../in/a.jpg": "sha256:0"})), "outside itself"),
}


def test_a_model_folder_that_is_wrong_is_refused(check: InProcess, small_model: Path, tmp_path: Path) -> None:
    for case, (change, sentence) in MODELS.items():
        change(shutil.copytree(small_model, tmp_path / case / "model"))
        refused(check, tmp_path / case, sentence, ["--model", "model"])


@pytest.mark.long
@pytest.mark.parametrize("command", [RUN_ONCE, DAEMON], ids=["once", "daemon"])
def test_a_run_refuses_a_model_folder_that_is_wrong(
    command: list[str], server: Server, small_model: Path, tmp_path: Path
) -> None:
    for case, (change, sentence) in MODELS.items():
        change(shutil.copytree(small_model, tmp_path / case / "model"))
        refused(server, tmp_path / case, sentence, ["--model", "model"], commands=[command])


def test_accents_composed_or_not_are_one_folder(small_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(small_model, tmp_path / "model")
    edited(lambda m: [c.update(folder=f) for c, f in zip(m["classes"], ("h\u00fcte", "hu\u0308te"), strict=True)])(
        model
    )
    with pytest.raises(ModelError, match="same label or folder"):
        read(model)


def test_a_manifest_with_any_bit_flipped_is_read_or_refused_in_a_sentence(small_model: Path, tmp_path: Path) -> None:
    model, random = shutil.copytree(small_model, tmp_path / "model"), Random(5)
    valid = (model / MANIFEST).read_bytes()
    refusals = []
    for position in range(len(valid)):
        changed = bytearray(valid)
        changed[position] ^= 1 << random.randrange(8)
        (model / MANIFEST).write_bytes(changed)
        try:
            read(model)
        except ModelError as error:
            refusals.append(str(error))
    assert len(refusals) > len(valid) / 2
    assert [sentence for sentence in refusals if not sentence.isprintable()] == []


def toml(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


CONFIGURATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an unknown key": (toml(b"batchsize = 4"), "unknown setting"),
    "an unknown key with a line break": (toml(b'"a\\nb" = 4'), "unknown setting"),
    "a table": (toml(b"[sorter]\nbatch_size = 4"), "unknown setting"),
    "a word for a number": (toml(b'batch_size = "many"'), "batch_size"),
    "a truth value for a number": (toml(b"min_confidence = true"), "should be a number"),
    "a truth value for a whole number": (toml(b"batch_size = true"), "should be a number"),
    "a list for a path": (toml(b'output = ["a", "b"]'), "output"),
    "a date for a path": (toml(b"output = 2026-01-01"), "output"),
    "a number for a truth value": (toml(b"recursive = 7"), "recursive"),
    "a path with a NUL": (toml(b'output = "a\\u0000b"'), "NUL"),
    "an empty path": (toml(b'output = ""'), "must not be empty"),
    "a number out of range": (toml(b"min_confidence = 1.5"), "min_confidence"),
    "not a number": (toml(b"decode_timeout_seconds = nan"), "decode_timeout_seconds"),
    "an infinite number": (toml(b"max_megabytes = inf"), "max_megabytes"),
    "an endless number": (toml(b"batch_size = " + b"9" * 5000), "not valid TOML"),
    "an endless word": (toml(b'device = "' + b"x" * 100_000 + b'"'), "device"),
    "brackets in brackets": (toml(b"a = " + b"[" * 100_000), "not valid TOML"),
    "not TOML": (toml(b"batch_size: 4\n"), "not valid TOML"),
    "a photo": (toml(photo(1)), "not valid TOML"),
    "another encoding": (toml('inbox = "café"'.encode("utf-16")), "not valid TOML"),
    "bytes that are not UTF-8": (toml(b'output = "caf\xe9"'), "not valid TOML"),
    "NUL bytes": (toml(bytes(100)), "not valid TOML"),
    "the same key twice": (toml(b"batch_size = 4\nbatch_size = 5"), "not valid TOML"),
    "an enormous file": (_huge, "too large"),
    "a folder": (lambda p: p.mkdir(), "no configuration file"),
    "a FIFO": (os.mkfifo, "no configuration file"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "no configuration file"),
    "a link to nothing": (lambda p: p.symlink_to("nothing"), "no configuration file"),
}


VARIABLES = (
    ("SORTER_BATCHSIZE", "4", "unknown environment variable"),
    ("SORTER_", "4", "unknown environment variable"),
    ("SORTER_BATCH_SIZE", "", "SORTER_BATCH_SIZE"),
    ("SORTER_BATCH_SIZE", "many", "SORTER_BATCH_SIZE"),
    ("SORTER_OUTPUT", "", "must not be empty"),
    ("SORTER_CONFIG", "missing.toml", "no configuration file"),
    ("SORTER_RECURSIVE", "perhaps", "SORTER_RECURSIVE"),
    ("SORTER_LOG_LEVEL", "loud", "SORTER_LOG_LEVEL"),
)
COMBINATIONS = (
    (["--inbox", "out/cats", "--output", "out"], "photos are sorted into"),
    (["--output", "fifo"], "not a folder"),
    (["--output", "in/a.jpg"], "not a folder"),
    (["--inbox", "fifo"], "not a folder"),
    (["--model", "fifo"], "there is no model"),
    (["--output", "a" * 300], "cannot access"),
    (["--state-dir", "in/notes.txt"], "not a folder"),
    (["--state-dir", "fifo/state"], "not a folder"),
    (["--sidecar-suffixes", ".JPG"], "such files are photos"),
    (["--sidecar-suffixes", ".edited.png"], "such files are photos"),
    (["--sidecar-suffixes", "jpg"], "such files are photos"),
    (["--exclude", "../x"], "matches nothing"),
)


def refuses_every_configuration(
    commands: Sequence[list[str]], program: InProcess | NewProcess | Server, folder: Path
) -> None:
    for case, (make, sentence) in CONFIGURATIONS.items():
        (folder / case).mkdir()
        make(folder / case / "sorter.toml")
        refused(program, folder / case, sentence, ["--config", "sorter.toml"], commands=commands)
    for name, value, sentence in VARIABLES:
        refused(program, folder / f"{name}={value}", sentence, [], {name: value}, commands=commands)
    for number, (arguments, sentence) in enumerate(COMBINATIONS):
        here = make_tree(folder / f"combination {number}", {"out/failed/a.jpg": photo(2), "out/cats/b.jpg": photo(3)})
        os.mkfifo(here / "fifo")
        refused(program, here, sentence, arguments, commands=commands)


def test_a_configuration_that_is_wrong_is_refused(check: InProcess, tmp_path: Path) -> None:
    refuses_every_configuration([CHECK], check, tmp_path)


def test_a_run_refuses_what_the_check_refuses(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "sorter.toml").write_bytes(b"batchsize = 4")
    flipped(WEIGHTS)(shutil.copytree(small_model, tmp_path / "model"))
    for command in (RUN_ONCE, DAEMON):
        refused(NewProcess(), tmp_path, "unknown setting", ["--config", "sorter.toml"], commands=[command])
        refused(NewProcess(), tmp_path, "is damaged", ["--model", "model"], commands=[command])


@pytest.mark.long
@pytest.mark.parametrize("command", [RUN_ONCE, DAEMON], ids=["once", "daemon"])
def test_a_run_refuses_a_configuration_that_is_wrong(command: list[str], server: Server, tmp_path: Path) -> None:
    refuses_every_configuration([command], server, tmp_path)
