"""The viewer: `python -m bthooks [LOGDIR]` starts TensorBoard, with `--report` prints instead."""

import argparse
import io
import os
import sys
from pathlib import Path

from .viewer import report, view

_EPILOG = """
Without --report the exit status is 0 when it is stopped with Ctrl-C, and 2 when there is nothing
to show. With --report it is 0 when no alert is open, 1 when one is, and 2 when there is no run.
"""


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        "python -m bthooks", description="Shows the runs under a directory.", epilog=_EPILOG
    )
    parser.add_argument(
        "logdir", nargs="?", default="runs", type=Path, help="where the runs are (default: runs)"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print the health of each run instead: last metrics, alerts with their steps",
    )
    parser.add_argument(
        "--host",
        default="localhost",
        help="who may connect: the address to listen on (default: localhost, this machine only)",
    )
    parser.add_argument(
        "--port", default=6006, type=_port, help="the first port to try (default: 6006)"
    )
    given = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if given.report:
            status = report(given.logdir)
            sys.stdout.flush()
            return status
        return view(given.logdir, given.host, given.port)
    except KeyboardInterrupt:
        return 130 if given.report else 0
    except BrokenPipeError:  # of `| head`, say; Python writes what is left at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _port(given: str) -> int:
    port = int(given) if given.isdecimal() else 0
    if not 0 < port < 1 << 16:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, got {given}")
    return port


if __name__ == "__main__":
    sys.exit(main())
