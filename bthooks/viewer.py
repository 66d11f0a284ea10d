"""Viewer: the runs under a directory, in TensorBoard's own program or as lines of text.

In: a directory with event files. Out: a server on a port, or a report on standard output.
"""

import contextlib
import errno
import io
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_PORTS = 20  # that are tried
_SAMPLES = {"scalars": 10_000, "histograms": 500, "images": 100, "text": 1000, "hparams": 1000}
_METRIC = r"(.*/)?(train|val|test)/|.*gradients/total_norm|.*calibration/ece$"
_MEASURED = r".*(attention|gradients/norm|learning_rate|uncertainty|health)/|.*calibration/(?!ece$)"


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
    except (OSError, program.TensorBoardServerException) as error:
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
    runs = are_open = 0
    for run in _runs(logdir):
        print("\n".join(run.lines()), end="\n\n")
        runs += 1
        are_open += sum(len(told) == 1 for told in run.alerts().values())
    print(f"runs: {runs}, open alerts: {are_open}")
    return int(are_open > 0)


def _free_port(host: str, first: int) -> int:
    """The first port from `first` on that is not taken."""
    addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    for port in range(first, first + _PORTS):
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
    raise OSError(f"{_PORTS} ports are taken, from {first} on: name another with --port")


def _missing(logdir: Path) -> str:
    """What is missing where there is nothing to show."""
    if not logdir.exists():
        return (
            f"there is no directory {logdir}: name the one that was given to make_writer or attach"
        )
    if not logdir.is_dir():
        return f"{logdir} is a file: name the directory that it is in"
    files = _event_files(logdir)
    if not files:
        return f"there are no event files (events.out.tfevents...) in {logdir} or below it"
    if not any(map(_has_values, files)):
        return f"nothing has been logged yet: all event files in {logdir} are empty ({len(files)})"
    return ""


def _event_files(logdir: Path) -> list[Path]:
    """Those that TensorBoard finds, which follows links."""
    found = os.walk(logdir, followlinks=True)
    return [Path(at, name) for at, _, names in found for name in names if "tfevents" in name]


def _has_values(file: Path) -> bool:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return any(event.HasField("summary") for event in EventFileLoader(str(file)).Load())


def _runs(logdir: Path) -> Iterator["Run"]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    # 0 keeps all, 1 the last.
    sizes = {"scalars": 1, "tensors": 0, "histograms": 1, "images": 1, "compressedHistograms": 1}
    for directory in sorted({file.parent for file in _event_files(logdir)}):
        events = EventAccumulator(str(directory), sizes).Reload()
        scalars = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
        texts = {
            tag: [
                (event.step, tensor_util.make_ndarray(event.tensor_proto).item().decode())
                for event in events.Tensors(tag)
            ]
            for tag in events.Tags()["tensors"]
            if tag.endswith("health/alerts/text_summary")
        }
        name = directory.relative_to(logdir).as_posix()
        last = {tag: (event.step, event.value) for tag, event in scalars.items()}
        yield Run(logdir.name if name == "." else name, last, texts)


class Run(NamedTuple):
    """What the event files of one directory hold.

    Attributes:
        scalars: tag -> the last step and value.
        texts: tag -> steps and texts.
    """

    name: str
    scalars: Mapping[str, tuple[int, float]]
    texts: Mapping[str, list[tuple[int, str]]]

    def alerts(self) -> dict[tuple[str, str], list[str]]:
        """By the tag and the condition with its place: what was told, in order."""
        found: dict[tuple[str, str], list[str]] = {}
        for tag, texts in self.texts.items():
            for _, text in texts:
                for told in text.split("\n\n"):
                    is_over, key = _parsed(told)
                    if key and is_over:
                        found.get((tag, key), []).append(told)
                    elif key:
                        found[tag, key] = [told]
        return found

    def lines(self) -> Iterator[str]:
        steps = [step for step, _ in self.scalars.values()]
        yield f"{self.name}: step {max(steps)}" if steps else f"{self.name}: no scalars"
        for tag, (_, value) in self.scalars.items():
            if re.match(_METRIC, tag) and not re.match(_MEASURED, tag):
                yield f"  {tag} {value:.4g}"
        for tag, (step, value) in self.scalars.items():
            if value and re.match(r"(.*/)?health/[a-z_]+$", tag):
                yield f"  {tag} {value:.0%} at step {step}"
        told = self.alerts()
        if not told:
            yield "  no alerts"
        for alert, *over in told.values():
            yield f"  {'over ' if over else 'OPEN '} {alert}"
            for line in over:
                yield f"         {line}"


def _parsed(told: str) -> tuple[bool, str]:
    """Whether an alert is over, and its condition with the place; "" if it is none."""
    text = told.removeprefix("cleared: ")
    found = re.match(r"([a-z_]+: .+?): step \d+", text)
    return text != told, found[1] if found else ""
