"""What the command line says: help, usage errors, wrong settings, and `sorter check`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import encoded, smooth

import sorter
from sorter.classifier import manifest
from sorter.cli.main import COMMANDS, build_parser, main
from sorter.settings import SHIPPED_MODEL, Settings

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for name in os.environ:
        if name.upper().startswith("SORTER_"):
            monkeypatch.delenv(name)


def help_of(*command: str, capsys: Capture) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def squeezed(text: str) -> str:
    """Text without the white space that depends on line breaks."""
    return "".join(text.split())


def test_help_names_each_command_on_one_line_and_the_exit_codes(capsys: Capture) -> None:
    text = help_of(capsys=capsys)
    assert [name for name, c in COMMANDS.items() if not re.search(rf"\n    {name} +{re.escape(c.help)}\n", text)] == []
    assert all(f"\n  {code}  " in text for code in range(4))


def test_each_setting_has_a_flag_with_its_description_its_default_and_its_opposite(capsys: Capture) -> None:
    for command in ("run", "check"):
        text = help_of(command, capsys=capsys)
        for name, field in Settings.model_fields.items():
            flag, description, default = f"--{name.replace('_', '-')}", str(field.description), field.default
            assert f"\n  {flag}" in text, (command, name)
            if isinstance(default, bool):
                assert re.search(rf"{flag}, --no-{flag[2:]}\s", text), (command, name)
            elif isinstance(default, tuple) and default:
                assert f"(default: {len(default)}, in config/settings.md)" in " ".join(text.split()), (command, name)
            elif "(default" not in description:
                description += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
            assert squeezed(description) in squeezed(text), (command, name)


def test_help_fits_into_a_hundred_columns(capsys: Capture) -> None:
    for command in ((), *((name,) for name in COMMANDS)):
        assert max(map(len, help_of(*command, capsys=capsys).splitlines())) <= 100, command


@pytest.mark.parametrize("columns", ["", "0", "wide"])
def test_help_does_not_need_to_know_the_terminals_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "exit codes:" in build_parser().format_help()


def test_version_prints_the_version(capsys: Capture) -> None:
    for flag in ("--version", "-V"):
        with pytest.raises(SystemExit) as caught:
            main([flag])
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"sorter {sorter.__version__}\n"


def test_a_usage_error_is_one_line_and_exits_with_2(capsys: Capture) -> None:
    for command in (
        "",
        "dance",
        "--dance",
        "run --dance",
        "run now",
        "run --inbox",
        "check --batch-sizes=3",
        "undo",
        "history --limit 0",
        "history --since yesterday",
        "bench --count -1",
        "bench --count many",
        f"bench --runs {'9' * 5000}",
        "review --port 80",
        "review --port 65536",
        "review --check 0",
        "completion tcsh",
    ):
        with pytest.raises(SystemExit) as caught:
            main(command.split())
        out, err = capsys.readouterr()
        assert caught.value.code == 2, command
        assert (out, err.count("\n"), err.startswith("sorter")) == ("", 1, True), command


def refusal(*arguments: str | Path, capsys: Capture) -> str:
    """The one line with which `sorter check` refuses."""
    assert main(["check", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    return line


def test_a_wrong_setting_is_named_as_it_was_given(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal("--batch-size", "0", capsys=capsys).startswith("sorter: --batch-size: ")
    config = tmp_path / "my.toml"
    config.write_text("batch_size = 0\n", encoding="utf-8")
    assert refusal("--config", config, capsys=capsys).startswith(f"sorter: batch_size in {config}: ")
    monkeypatch.setenv("SORTER_BATCH_SIZE", "0")
    assert refusal(capsys=capsys).startswith("sorter: SORTER_BATCH_SIZE: ")


def test_everything_that_is_wrong_gets_a_line(capsys: Capture) -> None:
    assert main(["check", "--batch-size", "0", "--device", "toaster"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(":")[1] for line in lines) == [" --batch-size", " --device"]


def test_run_reports_mistakes_as_a_sentence_unless_json_was_asked_for() -> None:
    command = [sys.executable, "-m", "sorter", "run", "--batch-size", "0"]

    def failed(*flags: str, **variables: str) -> str:
        environment = {**os.environ, **variables}
        done = subprocess.run(
            [*command, *flags], capture_output=True, text=True, timeout=110, check=False, env=environment
        )
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        return line

    assert failed().startswith("sorter: --batch-size: ")
    for line in (failed("--log-format", "json"), failed(SORTER_LOG_FORMAT="json")):
        assert json.loads(line)["detail"].startswith("--batch-size: ")


def test_check_refuses_folders_models_and_devices_that_cannot_be_used(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.write_bytes(b"mine")
    for arguments, sentence in (
        (("--inbox", file), f"the inbox {file} is not a folder: "),
        (("--inbox", tmp_path, "--model", missing), f"there is no model in {missing} "),
        (("--inbox", tmp_path, "--device", "cuda:999"), "--device"),
    ):
        assert refusal(*arguments, capsys=capsys).startswith(f"sorter: {sentence}"), arguments
    assert main(["check", "--inbox", str(missing)]) == 4
    assert capsys.readouterr().err.startswith(f"sorter: the inbox folder '{missing}' does not exist: ")
    assert not missing.exists()
    monkeypatch.setenv("SORTER_INBOX", "")
    assert refusal(capsys=capsys).startswith("sorter: SORTER_INBOX: must not be empty")


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that a program could change in a folder, and the folder itself."""
    state: dict[str, tuple[object, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        stat = path.stat()
        content = path.read_bytes() if path.is_file() else None
        state[str(path.relative_to(root))] = (stat.st_ino, stat.st_mode, stat.st_mtime_ns, content)
    return state


def test_check_prints_what_a_run_would_use_and_touches_nothing(tmp_path: Path, capsys: Capture) -> None:
    inbox = tmp_path / "inbox"
    (inbox / "holiday").mkdir(parents=True)
    (inbox / "one.jpg").write_bytes(encoded(smooth(1), "JPEG"))
    (inbox / "holiday" / "two.jpg").write_bytes(encoded(smooth(2), "JPEG"))
    before = tree(tmp_path)
    assert main(["check", "--inbox", str(inbox), "--device", "cpu", "--batch-size", "7"]) == 0
    out, err = capsys.readouterr()
    assert tree(tmp_path) == before
    assert err == ""
    assert out.endswith("\nEverything is fine.\n")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (rows["inbox"], rows["output"]) == (str(inbox), str(inbox))
    assert rows["folders"] == "cats/, dogs/, unsure/, failed/"
    model = manifest.read(SHIPPED_MODEL)
    assert rows["model"] == f"{model.name}, {model.architecture} at {model.input.size} px"
    assert model.accuracy is not None
    assert rows["accuracy"] == f"{model.accuracy:.2%} on photos that it was not trained on"
    assert rows["engine"].startswith("openvino on cpu, ")
    assert rows["engine"].endswith(", batches of 7")
