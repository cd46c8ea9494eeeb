"""`sorter review`: look at sorted photos in the browser, and correct them."""

import argparse
import sys
from contextlib import closing, suppress

from sorter import extras
from sorter.classifier import manifest
from sorter.cli import console, entries, options
from sorter.decoding.images import Limits
from sorter.errors import ExitCode, NotNowError
from sorter.inbox.sidecars import SidecarNames
from sorter.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sorter review`."""
    group = parser.add_argument_group("the page")
    group.add_argument(
        "--port",
        metavar="N",
        type=options.port,
        help="of 127.0.0.1 (default: 8471, or a free one if that is taken)",
    )
    group.add_argument(
        "--check",
        metavar="N",
        type=options.positive,
        help="show N sorted photos at random, without the model's labels, and say how many of these are right",
    )


def review(settings: Settings, *, port: int | None, check: int | None) -> ExitCode:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigurationError, ModelError: the extra, the history or the model is missing or cannot be used, or the port.
        StorageError: the history cannot be written.
    """
    for module in ("starlette", "uvicorn", "jinja2"):
        extras.require(module, "review", "sorter review")
    from sorter.review import app, keys, server
    from sorter.review.corrections import Corrections
    from sorter.review.deck import Deck
    from sorter.review.pictures import Pictures
    from sorter.review.spot_check import SpotCheck

    output, model = settings.output_folder, manifest.read(settings.model)
    folders = {one.label: one.folder for one in model.classes}
    sidecars = SidecarNames(settings.sidecar_suffixes)
    limits = Limits(settings.max_megapixels, settings.max_jpeg_megapixels)
    with (
        closing(server.listen(port)) as listener,
        closing(Corrections(output, model.classes, settings.state_dir, sidecars)) as corrections,
        closing(Deck(output, settings.state_dir)) as deck,
        closing(Pictures(limits, int(settings.max_megabytes * 1e6), settings.decode_timeout_seconds)) as pictures,
    ):
        moved = 0
        with suppress(NotNowError):  # an undo beside it looks for them as well
            moved = corrections.follow_hand_moves()
        spot_check = None if check is None else SpotCheck(deck, check)
        token, (host, number) = server.new_token(), listener.getsockname()
        url = f"http://{host}:{number}/{token}/"
        page = app.build(
            app.Review(
                title=entries.printable(str(output.absolute())),
                folders=folders,
                keys=keys.assign([*folders]),
                deck=deck,
                corrections=corrections,
                pictures=pictures,
                check=spot_check,
            ),
            token,
            number,
        )
        console.say(f"{url}\nOpen this address to review {output.absolute()}; end with Ctrl-C.", sys.stdout, flush=True)
        if moved:
            followed = entries.counted(moved, "photo")
            console.say(f"The history now follows {followed} that a person has moved by hand.", sys.stdout, flush=True)
        with server.opened_browser(url):
            server.serve(page, listener)
        if spot_check is not None:
            console.say(spot_check.sentence(), sys.stdout)
    return ExitCode.DONE
