"""`sorter completion` and `sorter manpage`: a completion script and a manual page, made from the parser itself."""

import argparse
import textwrap
from typing import Literal, get_args, get_origin

import sorter
from sorter import extras
from sorter.cli.parser import Parser
from sorter.settings import Settings

SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = "watches a folder and sorts the photos in it into cats/ and dogs/"


def add_completion_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter completion`."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def completion(parser: Parser, shell: str) -> str:
    """A script that completes commands, flags, paths and values in a shell.

    Args:
        parser: one that nothing else uses, because completions are noted in it.
        shell: one of `SHELLS`.

    Raises:
        ConfigurationError: the extra `shell` is not installed.
    """
    extras.require("shtab", "shell", "sorter completion")
    import shtab

    for command in parser.commands.values():
        command.description = command.summary
        for action in command._actions:  # argparse has no public list of them; shtab reads this one too
            if action.metavar in ("DIR", "FILE", "PATH"):
                action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
            field = Settings.model_fields.get(action.dest)
            if field is not None and get_origin(field.annotation) is Literal:
                action.choices = get_args(field.annotation)
    return str(shtab.complete(parser, shell))


def manual_page(parser: Parser) -> str:
    """The manual page as troff source.

    Args:
        parser: one that nothing else uses, because its descriptions and its epilog are removed.

    Raises:
        ConfigurationError: the extra `shell` is not installed.
    """
    extras.require("argparse_manpage", "shell", "sorter manpage")
    from argparse_manpage.manpage import Manpage

    for command in parser.commands.values():
        command.description = None  # the page has each command's help already
    exit_codes, parser.epilog = textwrap.dedent(str(parser.epilog).partition("\n")[2]), None
    about = {"version": sorter.__version__, "description": _DESCRIPTION, "manual_title": "User Commands"}
    page = Manpage(parser, about, format="single-commands-section")
    page.add_section("exit status", "=", f".nf\n{exit_codes}.fi")
    return str(page)
