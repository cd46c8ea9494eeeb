"""What the documents say is true: commands parse, what they name exists, links lead somewhere, events are listed."""

import argparse
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sorter.cli import main as sorter_cli
from sorter.errors import ExitCode, Reason
from sorter.settings import Settings
from trainer import arguments as trainer_cli

ROOT = Path(__file__).resolve().parents[1]
UNCHECKED = {"CHANGELOG.md", "card.md"}
"""The past, and a template."""
FOREIGN_FLAGS = {"--strict", "--now", "--user"}
"""Of mypy and systemctl, where they are named outside a command."""


def documents() -> dict[str, str]:
    """Every Markdown file of the project by its path."""
    found = {}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "build"]
        for path in (Path(folder, name) for name in files if name.endswith(".md") and name not in UNCHECKED):
            found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
    return found


DOCUMENTS = documents()
REFERENCE = DOCUMENTS["config/README.md"]
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "sorter").rglob("*.py"))}


@cache
def commands(program: str) -> dict[str, argparse.ArgumentParser]:
    """A program's commands by name."""
    module = sorter_cli if program == "sorter" else trainer_cli
    parser = module.build_parser()
    return dict(next(action.choices for action in parser._actions if isinstance(action.choices, dict)))


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def console_lines(text: str) -> list[str]:
    return re.findall(r"^\$ (.+)$", text, re.MULTILINE)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def named(pattern: str) -> set[tuple[str, str]]:
    """What stands in code, inline or on a console, as (document, match)."""
    return {
        (name, match)
        for name, text in DOCUMENTS.items()
        for code in (*code_spans(text), *console_lines(text))
        for match in re.findall(pattern, code)
    }


def test_the_readme_stays_short() -> None:
    assert len(DOCUMENTS["README.md"].encode()) <= 10_000


def test_every_document_is_reached_by_links_from_the_readme() -> None:
    reached, waiting = set(), ["README.md"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        for _, place, _ in links(name):
            target = os.path.relpath(place, ROOT)
            if target in DOCUMENTS and target not in reached:
                waiting.append(target)
    assert set(DOCUMENTS) - reached == set()


def test_every_sorter_and_trainer_command_is_understood() -> None:
    count = 0
    for name, text in DOCUMENTS.items():
        inline = [code for code in code_spans(text) if re.match(r"(sorter|trainer) [a-z]", code)]
        for line in (*console_lines(text), *inline):
            program, *words = shlex.split(line.partition(" > ")[0], comments=True)
            if program not in ("sorter", "trainer") or not words:
                continue
            count += 1
            command, *rest = words
            assert command in commands(program), f"{name}: {line}"
            if "--help" in rest:
                continue
            if line in inline:  # often a part of a command, so only its flags are checked
                given = {word for word in rest if word.startswith("--")}
                assert given <= flags(commands(program)[command]), f"{name}: {line}"
                continue
            try:
                commands(program)[command].parse_args(rest)
            except SystemExit:
                raise AssertionError(f"{name}: {line}") from None
    assert count >= 30


def test_every_flag_that_is_named_alone_exists() -> None:
    known = set(FOREIGN_FLAGS) | {"--" + field.replace("_", "-") for field in Settings.model_fields}
    for program in ("sorter", "trainer"):
        known |= {flag for parser in commands(program).values() for flag in flags(parser)}
    found = {(name, code.split()[0].partition("=")[0]) for name, code in named(r"^(--[a-z].*)")}
    assert len(found) >= 30
    assert {(name, flag) for name, flag in found if flag not in known} == set()


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = named(r"^(?:sudo )?make ([a-z]+)")
    assert len(found) >= 8
    assert {(name, target) for name, target in found if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_every_test_that_is_named_exists() -> None:
    missing = []
    for name, code in named(r"^((?:test_\w+|systemd_scenario)\.py(?:::\w+)?)$"):
        file, _, test = code.partition("::")
        path = ROOT / "tests" / file
        if not path.is_file() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
            missing.append(f"{name}: {code}")
    assert missing == []


def test_every_path_that_is_named_exists() -> None:
    found = named(r"(?<![\w/.~-])((?:sorter|trainer|tests|config|systemd|\.ci|\.github)/[\w./@-]*)")
    assert len(found) >= 20
    assert {(name, path) for name, path in found if not (ROOT / path).exists()} == set()


def test_every_link_and_image_leads_somewhere() -> None:
    broken = [
        f"{name}: {place} {anchor}"
        for name in DOCUMENTS
        for _, place, anchor in links(name)
        if not place.exists() or (anchor and anchor not in anchors(place))
    ]
    assert broken == []


def links(name: str) -> Iterator[tuple[str, Path, str]]:
    """A document's links to other files and to its own headings: the target as written, its place, its anchor."""
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name]):
        path, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", path):
            yield target, ROOT / name if not path else ((ROOT / name).parent / path).resolve(), anchor


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_lists_every_event_reason_exit_code_and_metric_and_no_others() -> None:
    code = "\n".join(SOURCES.values())
    logged = set(re.findall(r'\.(?:info|warning|error)\(\s*"([a-z]+\.[a-z_]+)"', code))
    logged |= {"photo.sorted", "photo.unsure"}  # put together from the decision's kind
    logged |= {"native.output"}  # at one of two levels
    listed = {event for row in re.findall(r"^\| (`[a-z]+\.[a-z_]+`.*?) \|", REFERENCE, re.MULTILINE)
              for event in re.findall(r"`([a-z]+\.[a-z_]+)`", row)}  # fmt: skip
    assert len(logged) >= 18
    assert logged == listed
    assert {reason for reason in Reason if f"`{reason}`" not in REFERENCE} == set()
    assert {int(number) for number in re.findall(r"^\| (\d) \|", REFERENCE, re.MULTILINE)} == set(ExitCode)
    metrics = set(re.findall(r'"(sorter_[a-z_]+)"', (ROOT / "sorter/service/metrics.py").read_text(encoding="utf-8")))
    told = {metric.removesuffix("_total") for metric in re.findall(r"^\| `(sorter_[a-z_]+)`", REFERENCE, re.MULTILINE)}
    assert told - {"sorter_info"} == metrics


def test_every_package_has_its_row_in_the_map() -> None:
    text = DOCUMENTS["CONTRIBUTING.md"]
    packages = [path.parent for top in ("sorter", "trainer") for path in (ROOT / top).glob("*/__init__.py")]
    assert {package.name for package in packages if f"`{package.relative_to(ROOT)}/`" not in text} == set()
