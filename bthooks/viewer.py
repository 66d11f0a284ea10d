"""Viewer: the runs under a directory, in TensorBoard's own program or as lines of text.

In: a directory with event files. Out: a server on a port, or a report on standard output.
"""

import contextlib
import errno
import io
import socket
import sys
import time
from pathlib import Path

from .runs import event_files, events, runs

_PORTS = 20  # that are tried
_SAMPLES = {"scalars": 10_000, "histograms": 500, "images": 100, "text": 1000, "hparams": 1000}


def view(logdir: Path, host: str = "localhost", port: int = 6006) -> int:
    """Serve `logdir` until Ctrl-C. Returns an exit status."""
    if missing := _missing(logdir):
        print(missing, file=sys.stderr)
        return 2
    from tensorboard import program

    said = io.StringIO()  # of its fast loader; and why it ends, if it does
    server = program.TensorBoard()
    try:
        free = _free_port(host, port)
        with contextlib.redirect_stderr(said):
            server.configure(logdir=str(logdir), host=host, port=free, samples_per_plugin=_SAMPLES)
            url = server.launch()
    except (OSError, UnicodeError, program.TensorBoardServerException) as error:
        print(f"can't serve on {host}, port {port}: {error}", file=sys.stderr)
        return 2
    except SystemExit:
        print(said.getvalue(), file=sys.stderr)
        return 2
    if free != port:
        print(f"port {port} is taken: {free} instead")
    print(f"{url} shows {logdir} (stop with Ctrl-C)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)  # waiting on a lock would not end with Ctrl-C on Windows
    return 0


def report(logdir: Path) -> int:
    """Print the health of each run under `logdir`. Returns an exit status."""
    if missing := _missing(logdir):
        print(missing, file=sys.stderr)
        return 2
    count = are_open = 0
    for run in runs(logdir):
        print("\n".join(run.lines()), end="\n\n")
        count += 1
        are_open += sum(len(told) == 1 for told in run.alerts().values())
    print(f"runs: {count}, open alerts: {are_open}")
    return int(are_open > 0)


def _free_port(host: str, first: int) -> int:
    """The first port from `first` on that is not taken."""
    addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    ports = range(first, min(first + _PORTS, 1 << 16))
    for port in ports:
        errors = []
        for family, _, _, _, address in addresses:
            try:
                socket.create_server((address[0], port), family=family).close()
            except OSError as error:
                errors.append(error)
        if any(error.errno == errno.EADDRINUSE for error in errors):
            continue
        if len(errors) == len(addresses):  # one may lack: ::1 where there is no IPv6
            raise errors[0]
        return port
    raise OSError(f"no port from {first} to {ports[-1]} is free: name another with --port")


def _missing(logdir: Path) -> str:
    """What is missing where there is nothing to show."""
    if not logdir.exists():
        return (
            f"there is no directory {logdir}: name the one that was given to make_writer or attach"
        )
    if not logdir.is_dir():
        return f"{logdir} is a file: name the directory that it is in"
    files = event_files(logdir)
    if not files:
        return f"there are no event files (events.out.tfevents...) in {logdir} or below it"
    if not any(any(events(file)) for file in files):
        return f"nothing has been logged yet: all event files in {logdir} are empty ({len(files)})"
    return ""
