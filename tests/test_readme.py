"""The README and the map of the rooms are true."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from sorter.cli import main as cli
from sorter.errors import ExitCode, Reason
from sorter.settings import Settings
from trainer import arguments

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_sorter_and_trainer_command_in_the_readme_parses() -> None:
    commands = re.findall(r"^\$ (sorter|trainer) (.+)$", README, re.MULTILINE)
    commands += re.findall(r"`(sorter|trainer) ([a-z]+ --[^`]+)`", README)
    assert len(commands) >= 5
    for program, rest in commands:
        if "--help" in rest:
            continue
        parser = cli.build_parser() if program == "sorter" else arguments.build_parser()
        parser.parse_args(shlex.split(rest.partition(" > ")[0]))


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z]+)(?= INBOX|`|$)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("event", sorted({
    event
    for path in (ROOT / "sorter").rglob("*.py")
    for event in re.findall(r'log\.(?:info|warning|error)\(\s*"([a-z]+\.[a-z]+)"', path.read_text(encoding="utf-8"))
}))  # fmt: skip
def test_every_event_is_in_the_readme(event: str) -> None:
    assert f"`{event}`" in README


def test_every_reason_and_exit_code_is_in_the_readme() -> None:
    assert [reason for reason in Reason if f"`{reason}`" not in README] == []
    assert [code for code in ExitCode if f"\n| {code:d} |" not in README] == []


def test_every_flag_in_the_readme_is_a_setting() -> None:
    known = {"--" + name.replace("_", "-") for name in Settings.model_fields} | {"--config", "--help", "--data"}
    known |= _options(arguments.build_parser()) | _options(cli.build_parser())
    ours = re.sub(r"torchrun .* -m trainer|systemctl .*", "", README)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= known


def _options(parser: argparse.ArgumentParser) -> set[str]:
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    return {flag for command in commands.values() for action in command._actions for flag in action.option_strings}


def test_every_test_named_in_the_readme_exists() -> None:
    for file, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", README):
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in text


def test_every_module_is_on_the_map_of_the_rooms() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = [path.name for path in (ROOT / "sorter").glob("*.py") if not path.name.startswith("__")]
    assert [module for module in modules if module not in text] == []
