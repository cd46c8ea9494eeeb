"""The entry point: `sorter` and `python -m sorter`."""

import os
import signal


def main() -> int:
    """Run the command line."""
    # With one of the three closed, the next file that is opened, a lock or a photo, would take its place.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    # Ctrl-C while the modules load ends the process without a traceback, as it does with other tools.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sorter.cli.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
