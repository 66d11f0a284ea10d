"""`python -m bthooks [LOGDIR]`: arguments, and TensorBoard's own program.

TensorBoard is started in this process and not as a command, so that it is the one of this
environment, reads more points of a tag than by default, and says one line. Without a port it looks
for a free one itself, from 6006 on.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from pathlib import Path

from .checks import folder
from .runs import missing, report

_EPILOG = """
Without --report the exit status is 0 when it is stopped with Ctrl-C, and 2 when there is nothing
to show. With --report it is 0 when no alert is open, 1 when one is, and 2 when there is no run.
"""
_SAMPLES = {"scalars": 10_000, "histograms": 500, "images": 100, "text": 1000, "hparams": 1000}


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        "python -m bthooks", description="Shows the runs under a directory.", epilog=_EPILOG
    )
    add = parser.add_argument
    add(
        "logdir",
        nargs="?",
        default="runs",
        type=_folder,
        help="where the runs are, a directory or a URL such as s3://... (default: runs)",
    )
    add(
        "--report",
        action="store_true",
        help="print the health of each run instead: last metrics, alerts with their steps",
    )
    add(
        "--host",
        default="localhost",
        help="who may connect: the address to listen on (default: localhost, this machine only)",
    )
    add("--port", type=_port, help="the port to listen on (default: the next free one from 6006)")
    given = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if told := missing(given.logdir):
            print(told, file=sys.stderr)
            return 2
        if given.report:
            return report(given.logdir)
        return _serve(given.logdir, given.host, given.port)
    except KeyboardInterrupt:
        return 130 if given.report else 0
    except BrokenPipeError:  # of `| head`, say; Python writes what is left at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _folder(given: str) -> Path | str:
    try:
        return folder("logdir", given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _port(given: str) -> int:
    port = int(given) if given.isdecimal() else 0
    if not 0 < port < 1 << 16:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, got {given}")
    return port


def _serve(logdir: Path | str, host: str, port: int | None) -> int:
    """Show `logdir` until Ctrl-C."""
    from tensorboard import program

    said = io.StringIO()  # a note on its loader; and why it ends, if it does
    server = program.TensorBoard()
    try:
        with contextlib.redirect_stderr(said):
            server.configure(logdir=str(logdir), host=host, port=port, samples_per_plugin=_SAMPLES)
            url = server.launch()
    except (OSError, UnicodeError, program.TensorBoardServerException, SystemExit) as error:
        # The web server prints why it can't listen, in the last paragraph, and exits.
        last = said.getvalue().strip().rpartition("\n\n")[2]
        why = last if isinstance(error, SystemExit) else error
        print(f"can't serve on {host}, port {port or '6006 and up'}: {why}", file=sys.stderr)
        return 2
    print(f"{url} shows {logdir} (stop with Ctrl-C)", flush=True)
    while True:
        time.sleep(1)  # waiting on a lock would not end with Ctrl-C on Windows


if __name__ == "__main__":
    sys.exit(main())
