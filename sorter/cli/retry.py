"""`sorter retry`: sort the photos in `unsure/` or `failed/` again, with another model, threshold or version."""

import argparse

from sorter.cli import run
from sorter.errors import ConfigurationError, ExitCode
from sorter.files import FAILED, UNSURE
from sorter.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter retry`."""
    parser.add_argument("folder", choices=(UNSURE, FAILED), help="the folder whose photos are sorted again")
    run.add_options(parser)


def retry(settings: Settings, *, folder: str, as_json: bool) -> ExitCode:
    """Run once with that folder as the inbox: what belongs there again stays, under its name.

    Raises:
        SorterError: something is wrong, or sorting cannot continue.
    """
    output = settings.output_folder
    inbox = output / folder
    if not inbox.is_dir():
        raise ConfigurationError(
            f"there is no folder {inbox}: no photo went there; if you sorted with --output, pass it here too"
        )
    # Whoever asks for a retry after undoing one means these photos too.
    again = {"inbox": inbox, "output": output, "once": True, "recursive": True, "include_undone": True}
    return run.run(settings.model_copy(update=again), as_json=as_json)
