"""`sorter history`: what went where, when and why, or what people said of it; for people, as JSON or as CSV."""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sorter.cli import entries, options
from sorter.errors import ConfigurationError, ExitCode
from sorter.history.reader import Entry, HistoryReader
from sorter.history.store import SIDECAR
from sorter.history.verdicts_reader import PhotoVerdict, VerdictsReader
from sorter.settings import Settings

_MOVES = 50
"""How many are shown."""
_LEAST_WIDTH = 80
_FIELDS = ("label", "how", "label_was", "confidence", "model", "time", "digest")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter history`."""
    group = parser.add_argument_group("what to show")
    group.add_argument(
        "--limit", metavar="N", type=options.positive, help=f"the last N (default: {_MOVES}; verdicts: all)"
    )
    group.add_argument("--since", metavar="WHEN", type=options.point_in_time, help=f"from then on: {options.WHEN}")
    group.add_argument("--run", metavar="ID", help="photos of this run")
    group.add_argument("--verdicts", action="store_true", help="the newest verdict on each photo, of sorter review")
    group.add_argument("--json", dest="as_json", action="store_true", help="print one line of JSON per photo")
    group.add_argument("--csv", dest="as_csv", action="store_true", help="print verdicts for trainer evaluate")


def show(
    settings: Settings,
    *,
    limit: int | None,
    since: float | None,
    run: str | None,
    verdicts: bool,
    as_json: bool,
    as_csv: bool,
) -> ExitCode:
    """Print the last entries of the history, or verdicts, oldest first.

    Raises:
        ConfigurationError: the history is missing or cannot be read, or has no such run; or the form does not exist.
    """
    if as_csv and (as_json or not verdicts):
        raise ConfigurationError("--csv prints verdicts: use it with --verdicts and without --json")
    output, state_dir = settings.output_folder, settings.state_dir
    reader = VerdictsReader(output, state_dir) if verdicts else HistoryReader(output, state_dir)
    if run is not None:
        entries.check_run(reader, run)
    if isinstance(reader, VerdictsReader):
        given = reader.verdicts(run=run, since=since)[-limit if limit else None :]
        _print_verdicts(settings, given, as_json=as_json, as_csv=as_csv)
        return ExitCode.DONE
    found = reader.entries(run=run, since=since, limit=limit or _MOVES)
    if as_json:
        for entry in found:
            print(json.dumps(entries.to_json(entry)))
    elif found:
        has_several_models = len({entry.model for entry in found if entry.model}) > 1
        _print_table([_row(settings, entry, with_model=has_several_models) for entry in found])
    else:
        print("No photos match.")
    return ExitCode.DONE


def _print_verdicts(settings: Settings, given: Sequence[PhotoVerdict], *, as_json: bool, as_csv: bool) -> None:
    if as_csv:
        _print_csv(given)
    elif as_json:
        for verdict in given:
            print(json.dumps(entries.verdict_to_json(verdict)))
    elif given:
        _print_table(
            [
                {
                    "when": entries.local_time(verdict.at),
                    "photo": entries.printable(_relative(verdict.path, settings.output_folder)),
                    "is": verdict.label or "none of the classes",
                    "how": verdict.how,
                    "the model said": f"{verdict.label_was} {verdict.confidence or 0:.1%}",
                }
                for verdict in given
            ]
        )
    else:
        print("No verdicts match. Photos moved by hand count once sorter review has been started since.")


def _print_csv(given: Sequence[PhotoVerdict]) -> None:
    """One row for each photo, its label empty if it shows none of the classes; names keep bytes that are not UTF-8."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ("name", *_FIELDS), extrasaction="ignore")
    table.writeheader()
    table.writerows({"name": v.path, **entries.verdict_to_json(v)} for v in given)
    sys.stdout.flush()
    sys.stdout.buffer.write(text.getvalue().encode(errors="surrogateescape"))


def _row(settings: Settings, entry: Entry, *, with_model: bool) -> dict[str, str]:
    """The columns of an entry by their names; the model only where it tells entries apart."""
    inbox, output = settings.inbox, settings.output_folder
    came_from = output if entry.root == os.path.realpath(output) else inbox
    went_to = inbox if entry.kind == "undone" else output
    folder, base = os.path.split(_relative(entry.destination, went_to))
    new_name = "" if base == os.path.basename(entry.source) else base
    return {
        "when": entries.local_time(entry.done),
        "run": entry.run,
        **({"model": entry.model} if with_model else {}),
        "photo": entries.printable(_relative(entry.source, came_from)),
        "": entries.arrow(),
        "went to": entries.printable(os.path.join(folder or ".", new_name)),
        "why": ", ".join(filter(None, (entries.why(entry), _linked(entry), *_since(entry)))),
    }


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


def _print_table(rows: Sequence[dict[str, str]]) -> None:
    # Rich takes a third of a second to import.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold", no_wrap=name in ("when", "run", ""))
    for row in rows:
        table.add_row(*map(Text, row.values()))
    terminal = Console()
    # A narrow terminal folds the lines itself: rich would leave out the names of photos.
    terminal = Console(width=max(terminal.width, _LEAST_WIDTH) if terminal.is_terminal else 10_000)
    with terminal.capture() as text:  # printed by us, because rich exits the process when the pipe's reader is gone
        terminal.print(table)
    print(text.get(), end="")
