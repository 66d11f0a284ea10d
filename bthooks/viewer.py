"""Viewer: the runs under a directory, in TensorBoard's own program or as lines of text.

In: a directory with event files. Out: a server on a port, or a report on standard output.
"""

import contextlib
import errno
import io
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_PORTS = 20  # that are tried
_SAMPLES = {"scalars": 10_000, "histograms": 500, "images": 100, "text": 1000, "hparams": 1000}
_METRIC = r"(.*/)?(train|val|eval|test)/|.*gradients/total_norm|.*calibration/ece$"
_HEALTH, _ALERTS = r"(.*/)?health/[a-z_]+", "health/alerts/text_summary"
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
    files = _event_files(logdir)
    if not files:
        return f"there are no event files (events.out.tfevents...) in {logdir} or below it"
    if not any(any(_events(file)) for file in files):
        return f"nothing has been logged yet: all event files in {logdir} are empty ({len(files)})"
    return ""


def _event_files(logdir: Path) -> list[Path]:
    """Those that TensorBoard finds, which follows links; a directory is looked into once."""
    files, seen = [], set()
    for at, directories, names in os.walk(logdir, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories.sort(key=lambda name: os.path.islink(os.path.join(at, name)))
        files += [Path(at, name) for name in names if "tfevents" in name]
    return [file for file in files if os.access(file, os.R_OK)]


def _events(file: Path) -> Iterator[Any]:
    """Those with values."""
    # The loader without "Legacy" makes each scalar a tensor, which takes nine times as long.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return (event for event in LegacyEventFileLoader(str(file)).Load() if event.summary.value)


def _runs(logdir: Path) -> Iterator["Run"]:
    files: dict[Path, list[Path]] = {}
    for file in sorted(_event_files(logdir)):  # by directory, and by time
        files.setdefault(file.parent, []).append(file)
    for directory, parts in files.items():
        at = directory.relative_to(logdir)
        run = Run((logdir.resolve() / at).name if at == Path() else at.as_posix(), {}, {})
        ended = 0.0
        for part in map(_Part, parts):
            for tag, step in part.judged.items() if part.began > ended else ():
                # Another start of the run, or one that is resumed: what it does again is forgotten.
                run.texts[tag] = [text for text in run.texts.get(tag, []) if text[0] < step]
            ended = max(ended, part.ended)
            run.scalars.update(part.scalars)
            for tag, texts in part.texts.items():
                run.texts.setdefault(tag, []).extend(texts)
        yield run


class _Part:
    """What one event file holds.

    Attributes:
        began, ended: in seconds.
        scalars: tag -> the last step and value.
        texts: tag -> steps and alerts.
        judged: tag of the alerts -> the first step that was judged.
    """

    def __init__(self, file: Path) -> None:
        from tensorboard.util.tensor_util import make_ndarray

        self.began, self.ended = math.inf, 0.0
        self.texts: dict[str, list[tuple[int, str]]] = {}
        first: dict[str, int] = {}
        last: dict[str, tuple[int, Any]] = {}
        for event in _events(file):
            self.began, self.ended = min(self.began, event.wall_time), event.wall_time
            for value in event.summary.value:
                is_number = value.HasField("simple_value")
                if is_number or value.metadata.plugin_data.plugin_name == "scalars":
                    first.setdefault(value.tag, event.step)
                    last[value.tag] = event.step, value
                elif value.tag.endswith(_ALERTS):
                    text = make_ndarray(value.tensor).item().decode()
                    self.texts.setdefault(value.tag, []).append((event.step, text))
        self.scalars = {tag: (step, _number(value)) for tag, (step, value) in last.items()}
        self.judged: dict[str, int] = {}
        for tag, step in first.items():
            if re.fullmatch(_HEALTH, tag):
                alerts = tag.rpartition("health/")[0] + _ALERTS
                self.judged[alerts] = min(step, self.judged.get(alerts, step))


def _number(value: Any) -> float:
    from tensorboard.util.tensor_util import make_ndarray

    if value.HasField("simple_value"):
        return float(value.simple_value)
    return float(make_ndarray(value.tensor).item())


class Run(NamedTuple):
    """What the event files of one directory hold, as in `_Part`."""

    name: str
    scalars: dict[str, tuple[int, float]]
    texts: dict[str, list[tuple[int, str]]]

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
            if value and re.fullmatch(_HEALTH, tag):
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
