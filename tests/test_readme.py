"""What the documents say is true: commands parse, flags and tests exist, links lead somewhere."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from sorter.cli import main as cli
from sorter.errors import ExitCode, Reason
from sorter.settings import Settings
from trainer import arguments

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = r"(?:torchrun|systemctl|loginctl|systemd-analyze|sudo|pip|pipx|python) .*"
"""Other programs, whose flags are not ours."""


def documents() -> dict[str, str]:
    """The project's Markdown files by their path, without the changelog."""
    folders = ("config", "sorter", "systemd", "tests", "trainer")
    paths = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in paths if p.name != "CHANGELOG.md"}


DOCUMENTS = documents()
REFERENCE = DOCUMENTS["config/README.md"]


def parsers() -> dict[str, argparse.ArgumentParser]:
    return {"sorter": cli.build_parser(), "trainer": arguments.build_parser()}


def test_readme_md_stays_short() -> None:
    assert len(DOCUMENTS["README.md"].encode()) <= 10_000


def test_every_sorter_and_trainer_command_parses() -> None:
    count = 0
    for name, text in DOCUMENTS.items():
        commands = re.findall(r"^\$ (sorter|trainer) (.+)$", text, re.MULTILINE)
        commands += re.findall(r"`(sorter|trainer) ([a-z]+ --[^`]+)`", text)
        for program, rest in commands:
            words = shlex.split(rest.partition(" > ")[0], comments=True)
            if "--help" in words or "..." in words:
                continue
            count += 1
            try:
                parsers()[program].parse_args(words)
            except SystemExit:
                raise AssertionError(f"{name}: {program} {rest}") from None
    assert count >= 15


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        (name, target)
        for name, text in DOCUMENTS.items()
        for target in re.findall(r"(?:`|\$ |sudo )make ([a-z]+)(?= [A-Z]+=|`|$)", text, re.MULTILINE)
    }
    assert len(named) >= 8
    assert [found for found in named if not re.search(rf"^{found[1]}:", makefile, re.MULTILINE)] == []


def test_every_flag_exists() -> None:
    known = {"--" + name.replace("_", "-") for name in Settings.model_fields} | {"--config", "--help", "--data"}
    known |= {
        "--no-" + name.replace("_", "-") for name, field in Settings.model_fields.items() if field.annotation is bool
    }
    for parser in parsers().values():
        known |= options(parser)
    for name, text in DOCUMENTS.items():
        ours = re.sub(ELSEWHERE, "", text)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) - {"--strict"} <= known, name


def options(parser: argparse.ArgumentParser) -> set[str]:
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    return {flag for command in commands.values() for action in command._actions for flag in action.option_strings}


def test_every_test_that_is_named_exists() -> None:
    missing = []
    for name, text in DOCUMENTS.items():
        for file, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text):
            path = ROOT / "tests" / file
            if not path.is_file() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
                missing.append(f"{name}: {file}::{test}")
    assert missing == []


def test_every_link_and_image_leads_somewhere() -> None:
    broken = []
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if path.startswith("http"):
                continue
            place = (ROOT / name).parent / path if path else ROOT / name
            if not place.exists() or (anchor and anchor not in anchors(place)):
                broken.append(f"{name}: {target}")
    assert broken == []


def anchors(path: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_event_reason_and_exit_code_is_in_the_reference() -> None:
    said = {
        event
        for path in (ROOT / "sorter").rglob("*.py")
        for event in re.findall(
            r'log\w*\.(?:info|warning|error)\(\s*"([a-z]+\.[a-z_]+)"', path.read_text(encoding="utf-8")
        )
    }
    assert len(said) >= 12
    assert [event for event in said if f"`{event}`" not in REFERENCE] == []
    assert [reason for reason in Reason if f"`{reason}`" not in REFERENCE] == []
    assert [code for code in ExitCode if f"\n| {code:d} |" not in REFERENCE] == []


def test_every_package_has_its_row_in_the_map() -> None:
    text = DOCUMENTS["CONTRIBUTING.md"]
    packages = [path.parent.name for top in ("sorter", "trainer") for path in (ROOT / top).glob("*/__init__.py")]
    assert [package for package in packages if f"/{package}/`" not in text] == []
