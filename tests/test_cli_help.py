"""What the command line says: help, usage errors, configuration errors, and `sorter check`."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from pictures import encoded, smooth
from pydantic.fields import FieldInfo

import sorter
from sorter.classifier import manifest
from sorter.cli.main import build_parser, main
from sorter.settings import SHIPPED_MODEL, Settings


def sorter_process(*arguments: str | Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("SORTER_")}
    command = [sys.executable, "-m", "sorter", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, env={**environment, **variables}
    )


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def squeezed(text: str) -> str:
    """Text without the white space that depends on where lines are broken."""
    return "".join(text.split())


# --- help ---


def test_help_names_the_commands_and_the_exit_codes() -> None:
    text = build_parser().format_help()
    assert "\n    run " in text
    assert "\n    check " in text
    assert all(f"\n  {code}  " in text for code in range(4))


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("field", Settings.model_fields)
def test_each_setting_has_a_flag_with_its_description(
    field: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, capsys=capsys)
    assert f"\n  --{field.replace('_', '-')}" in text
    assert squeezed(str(Settings.model_fields[field].description)) in squeezed(text)


def shows_its_default(field: FieldInfo) -> bool:
    return "(default" not in str(field.description) and not isinstance(field.default, bool)


@pytest.mark.parametrize("field", [name for name, field in Settings.model_fields.items() if shows_its_default(field)])
def test_each_setting_that_is_no_switch_shows_its_default(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    default, description = Settings.model_fields[field].default, Settings.model_fields[field].description
    shown = f"{default:g}" if isinstance(default, float) else default
    assert squeezed(f"{description} (default: {shown})") in squeezed(help_of("run", capsys=capsys))


@pytest.mark.parametrize("field", [name for name, field in Settings.model_fields.items() if field.annotation is bool])
def test_each_switch_can_be_turned_off_again(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = field.replace("_", "-")
    assert re.search(rf"--{flag}, --no-{flag}\s", help_of("run", capsys=capsys))


@pytest.mark.parametrize("command", [(), ("run",), ("check",)])
def test_help_fits_into_a_hundred_columns(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, help_of(*command, capsys=capsys).splitlines())) <= 100


@pytest.mark.parametrize("columns", ["", "0", "wide"])
def test_help_does_not_need_to_know_the_terminals_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "exit codes:" in build_parser().format_help()


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"sorter {sorter.__version__}\n"


# --- errors ---


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["--dance"], ["run", "--dance"], ["run", "now"], ["run", "--inbox"], ["check", "--batch-sizes=3"]],
    ids=" ".join,
)
def test_a_usage_error_is_one_line_and_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("sorter")) == ("", 1, True)


def refusal(*arguments: str | Path, **variables: str) -> str:
    """The one line that `sorter check` refuses to go on with."""
    done = sorter_process("check", *arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_a_wrong_flag_exits_with_2_and_names_the_flag() -> None:
    assert refusal("--batch-size", "0").startswith("sorter: --batch-size: ")


def test_a_wrong_variable_exits_with_2_and_names_the_variable() -> None:
    assert refusal(SORTER_BATCH_SIZE="0").startswith("sorter: SORTER_BATCH_SIZE: ")


def test_a_wrong_key_exits_with_2_and_names_the_key(tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text("batch_size = 0\n", encoding="utf-8")
    assert refusal("--config", config).startswith(f"sorter: batch_size in {config}: ")


def test_everything_that_is_wrong_gets_a_line() -> None:
    done = sorter_process("check", "--batch-size", "0", "--device", "toaster")
    assert done.returncode == 2
    assert sorted(line.split(":")[1] for line in done.stderr.splitlines()) == [" --batch-size", " --device"]


def test_run_says_what_is_wrong_in_json_where_a_program_reads_it() -> None:
    done = sorter_process("run", "--batch-size", "0")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["detail"].startswith("--batch-size: ")


# --- check ---


@dataclass(frozen=True)
class Checked:
    """A `sorter check` of a fine inbox, and the inbox's folder before and after."""

    inbox: Path
    before: dict[str, tuple[object, ...]]
    after: dict[str, tuple[object, ...]]
    done: "subprocess.CompletedProcess[str]"


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All that a program could change below a folder, and the folder itself."""
    state: dict[str, tuple[object, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        stat = path.stat()
        content = path.read_bytes() if path.is_file() else None
        state[str(path.relative_to(root))] = (stat.st_ino, stat.st_mode, stat.st_mtime_ns, content)
    return state


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    root = tmp_path_factory.mktemp("check")
    inbox = root / "inbox"
    (inbox / "holiday").mkdir(parents=True)
    (inbox / "one.jpg").write_bytes(encoded(smooth(1), "JPEG"))
    (inbox / "holiday" / "two.jpg").write_bytes(encoded(smooth(2), "JPEG"))
    before = tree(root)
    done = sorter_process("check", "--inbox", inbox, "--device", "cpu", "--batch-size", "7")
    return Checked(inbox, before, tree(root), done)


def test_check_of_a_fine_inbox_exits_with_0_and_complains_of_nothing(checked: Checked) -> None:
    assert (checked.done.returncode, checked.done.stderr) == (0, "")
    assert checked.done.stdout.endswith("\nAll is well.\n")


def test_check_says_what_it_found(checked: Checked) -> None:
    rows = dict(line.split(maxsplit=1) for line in checked.done.stdout.splitlines())
    assert (rows["inbox"], rows["output"]) == (str(checked.inbox), str(checked.inbox))
    assert rows["folders"] == "cats/, dogs/, unsure/, failed/"
    assert rows["model"] == "catdog-resnet50, resnet50 at 144 px"
    assert rows["engine"].startswith("openvino on cpu, ")
    assert rows["engine"].endswith(", batches of 7")


def test_check_says_how_good_the_model_is_on_photos_it_never_saw(checked: Checked) -> None:
    accuracy = manifest.read(SHIPPED_MODEL).accuracy
    assert accuracy is not None
    assert f"\naccuracy  {accuracy:.2%} on photos it never saw\n" in checked.done.stdout


def test_check_touches_nothing(checked: Checked) -> None:
    assert checked.after == checked.before


def test_check_refuses_a_missing_inbox(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refusal("--inbox", missing).startswith(f"sorter: there is no inbox {missing}: ")
    assert not missing.exists()


def test_check_refuses_an_inbox_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "inbox"
    file.write_bytes(b"mine")
    assert refusal("--inbox", file).startswith(f"sorter: the inbox {file} is not a folder: ")


def test_check_refuses_an_empty_inbox_variable() -> None:
    assert refusal(SORTER_INBOX="").startswith("sorter: SORTER_INBOX: must not be empty")


def test_check_refuses_a_missing_model(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refusal("--inbox", tmp_path, "--model", missing).startswith(f"sorter: there is no model in {missing} ")


def test_check_refuses_a_device_that_does_not_exist(tmp_path: Path) -> None:
    assert refusal("--inbox", tmp_path, "--device", "cuda:999").startswith("sorter: --device")
