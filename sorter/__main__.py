"""The entry point: `sorter` and `python -m sorter`."""

import signal


def main() -> int:
    """Run the command line."""
    # Ctrl-C while the modules load ends the process without a traceback, as it does with other tools.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sorter.cli import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
