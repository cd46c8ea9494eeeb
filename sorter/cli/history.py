"""`sorter history`: what went where, when and why, as a table or as one line of JSON per photo."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sorter.cli import entries, options
from sorter.errors import ExitCode
from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import SIDECAR
from sorter.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter history`."""
    group = parser.add_argument_group("what to show")
    group.add_argument("--limit", metavar="N", type=options.positive, default=50, help="the last N (default: 50)")
    group.add_argument("--since", metavar="WHEN", type=options.point_in_time, help=f"from then on: {options.WHEN}")
    group.add_argument("--run", metavar="ID", help="photos of this run")
    group.add_argument("--json", dest="as_json", action="store_true", help="print one line of JSON per photo")


def show(settings: Settings, *, limit: int, since: float | None, run: str | None, as_json: bool) -> ExitCode:
    """Print the last entries of the history, oldest first.

    Raises:
        ConfigurationError: the history is missing or cannot be read, or has no such run.
    """
    reader = HistoryReader(settings.output_folder, settings.state_dir)
    if run is not None:
        entries.check_run(reader, run)
    found = reader.entries(run=run, since=since, limit=limit)
    if as_json:
        for entry in found:
            print(json.dumps(entries.to_json(entry)))
    elif found:
        has_several_models = len({entry.model for entry in found if entry.model}) > 1
        columns = ("when", "run", *(["model"] if has_several_models else []), "photo", "", "went to", "why")
        _print_table(columns, [_row(settings, entry, with_model=has_several_models) for entry in found])
    else:
        print("No photos match.")
    return ExitCode.DONE


def _row(settings: Settings, entry: Entry, *, with_model: bool) -> Sequence[str]:
    inbox, output = settings.inbox, settings.output_folder
    came_from = output if entry.root == os.path.realpath(output) else inbox
    went_to = inbox if entry.kind == "undone" else output
    folder, base = os.path.split(_relative(entry.destination, went_to))
    new_name = "" if base == os.path.basename(entry.source) else base
    return (
        entries.local_time(entry.done),
        entry.run,
        *([entry.model] if with_model else []),
        entries.printable(_relative(entry.source, came_from)),
        entries.arrow(),
        entries.printable(os.path.join(folder or ".", new_name)),
        ", ".join(filter(None, (entries.why(entry), _linked(entry), *_since(entry)))),
    )


def _since(entry: Entry) -> Iterator[str]:
    """What was done with a photo after it was sorted."""
    if entry.corrected:
        yield "corrected"
    if entry.undone:
        yield "undone"


def _linked(entry: Entry) -> str:
    return "linked" if entry.linked and entry.kind not in ("undone", SIDECAR) else ""


def _relative(path: str, folder: Path) -> str:
    """A path relative to a folder, or unchanged if it is outside of it."""
    real = os.path.realpath(folder)
    return os.path.relpath(path, real) if Path(path).is_relative_to(real) else path


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # Rich takes a third of a second to import.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in ("when", "run", ""))
    for row in rows:
        table.add_row(*map(Text, row))
    terminal = Console()
    if not terminal.is_terminal:
        terminal = Console(width=10_000)
    with terminal.capture() as text:  # printed by us, because rich exits the process when the pipe's reader is gone
        terminal.print(table)
    print(text.get(), end="")
