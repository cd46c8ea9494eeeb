"""What a shell and `man` know of the commands, made from the help itself: `sorter completion`, `sorter manpage`.

In: the whole command line. Out: the text of a completion script, of a manual page.
"""

import argparse
import textwrap
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

import sorter
from sorter.settings import Settings

SHELLS = ("bash", "zsh", "fish")
_NAME = "watches a folder and sorts the photos in it into cats/ and dogs/"


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that completes commands, flags, paths and values in a shell.

    Args:
        parser: to itself, since what completes is noted in it.
        shell: one of `SHELLS`.
    """
    import shtab

    for what, command in _commands(parser):
        command.description = what
        for action in command._actions:
            if action.metavar in ("DIR", "FILE", "PATH"):
                action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
            field = Settings.model_fields.get(action.dest)
            if field is not None and get_origin(field.annotation) is Literal:
                action.choices = get_args(field.annotation)
    return str(shtab.complete(parser, shell))


def manual_page(parser: argparse.ArgumentParser) -> str:
    """The manual page, in troff's language, as man(1) reads it.

    Args:
        parser: to itself: its epilog, the exit codes, becomes a section.
    """
    from argparse_manpage.manpage import Manpage

    for _, command in _commands(parser):
        command.description = None  # what it does is said anyway
    codes, parser.epilog = textwrap.dedent(str(parser.epilog).partition("\n")[2]), None
    about = {"version": sorter.__version__, "description": _NAME, "manual_title": "User Commands"}
    page = Manpage(parser, about, format="single-commands-section")
    page.add_section("exit status", "=", f".nf\n{codes}.fi")
    return str(page)


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str | None, argparse.ArgumentParser]]:
    """What each command does, in a line, and its own parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield choice.help, action.choices[choice.dest]
