"""The entry point: `sorter` and `python -m sorter`."""

import os
import signal


def main() -> int:
    """Run the command line."""
    # If a standard stream is closed, the next file opened, a lock or a photo, would get its descriptor.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    # Ctrl-C while modules are imported ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sorter.cli.main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
