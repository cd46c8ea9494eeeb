"""Completion and the manual page, in the real shells and through the real formatter."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sorter.cli.main import build_parser, main
from sorter.cli.shell_help import SHELLS, completion, manual_page
from sorter.settings import Settings

# Calls the function that is registered for the command with the words typed so far, as bash does.
_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
function=$(complete -p sorter | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function" sorter "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def in_bash(folder: Path, script: Path, *words: str) -> set[str]:
    command = ["bash", "--norc", "-c", _BASH, "bash", str(script), *words]
    return {word.rstrip("/") for word in _said(command, folder)}


def in_fish(folder: Path, script: Path, *words: str) -> set[str]:
    command = ["fish", "--no-config", "-c", f"source {script}; complete -C '{' '.join(words)}'"]
    return {line.partition("\t")[0].rstrip("/") for line in _said(command, folder)}


def _said(command: list[str], folder: Path) -> list[str]:
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True, env=environment)
    return done.stdout.splitlines()


def in_zsh(folder: Path, script: Path, *words: str, wanted: set[str]) -> set[str]:
    """What zsh shows a person who types some words and presses Tab; reads on until it shows what is wanted."""
    (folder / ".functions").mkdir()
    shutil.copy(script, folder / ".functions" / "_sorter")
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "HOME": str(folder)})
    try:
        os.write(terminal, b"fpath=($PWD/.functions $fpath); autoload -U compinit; compinit -u -D; echo rea''dy\n")
        _read_until(terminal, {"ready"})
        os.write(terminal, f"{' '.join(words)}\t\t".encode())
        return _read_until(terminal, wanted)
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


def _read_until(terminal: int, wanted: set[str]) -> set[str]:
    """The words on a terminal, once all the wanted ones are there and nothing more comes, or after 30 seconds."""
    shown, words, deadline = "", set[str](), time.monotonic() + 30
    while time.monotonic() < deadline:
        complete = wanted <= words
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 1 << 16).decode(errors="replace")
            words = set(shown.replace("/", " ").split())
        elif complete:
            break
    return words


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "offered", "not_offered"),
    [
        (("sorter", ""), {"run", "check", "history", "status", "undo", "completion"}, {"note.txt"}),
        (("sorter", "run", "--engine", ""), {"auto", "openvino", "torch"}, {"photos"}),
        (("sorter", "run", "--inbox", ""), {"photos"}, {"note.txt", "auto"}),
        (("sorter", "run", "--config", ""), {"note.txt"}, {"auto"}),
        (("sorter", "undo", "--l"), {"--last"}, {"--run"}),
    ],
)
def test_a_shell_completes_commands_values_paths_and_flags(
    shell: str, words: tuple[str, ...], offered: set[str], not_offered: set[str], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    folder = tmp_path / "here"
    (folder / "photos").mkdir(parents=True)
    (folder / "note.txt").touch()
    script = tmp_path / "script"
    script.write_text(completion(build_parser(), shell), encoding="utf-8")
    match shell:
        case "bash":
            found = in_bash(folder, script, *words)
        case "fish":
            found = in_fish(folder, script, *words)
        case _:
            found = in_zsh(folder, script, *words, wanted=offered)
    assert offered <= found
    assert not not_offered & found


def test_the_manual_page_has_every_command_setting_and_exit_code() -> None:
    page = manual_page(build_parser()).replace(r"\-", "-")
    assert [name for name in Settings.model_fields if f"\\fB--{name.replace('_', '-')}\\fR" not in page] == []
    assert all(f".SS \\fBsorter {command}\\fR" in page for command in ("run", "history", "undo", "bench"))
    assert all(f"\n{code}  " in page for code in range(4))


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_the_manual_page_is_formatted_without_a_warning() -> None:
    command = ["groff", "-man", "-ww", "-Tutf8", "-rLL=90n"]
    page = manual_page(build_parser())
    done = subprocess.run(command, input=page, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert "the disk is full" in done.stdout


def test_the_commands_print_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == completion(build_parser(), "bash") + "\n"
    assert main(["manpage"]) == 0
    assert capsys.readouterr().out == manual_page(build_parser())


def test_without_their_extra_the_commands_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (["completion", "bash"], ["manpage"]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        needs = f"sorter: sorter {command[0]} needs the extra 'shell': run pip install '.[shell]' in sorter's folder\n"
        assert (out, err) == ("", needs)
