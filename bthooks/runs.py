"""Runs: what event files hold, read back: last figures, and alerts."""

import functools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .record.event import alerts_in
from .record.folders import refuse_unknown

Value = TypeVar("Value")
Points = list[tuple[int, Value]]  # steps and values

_FILE = "tfevents"
_METRIC = r"(.*/)?(train|val|eval|test)/|.*gradients/total_norm|.*calibration/ece$"
_HEALTH, _ALERTS = r"(.*/)?health/[a-z_]+", "health/alerts/text_summary"
_MEASURED = r".*(attention|gradients/norm|learning_rate|uncertainty|health)/|.*calibration/(?!ece$)"


def report(logdir: Path | str) -> int:
    """Print the health of each run under `logdir`; 1 where an alert is open, else 0."""
    count = are_open = 0
    for run in runs(logdir):
        print("\n".join(run.lines()), end="\n\n")
        count += 1
        are_open += sum(len(told) == 1 for told in run.alerts().values())
    print(f"runs: {count}, open alerts: {are_open}", flush=True)
    return int(are_open > 0)


def missing(logdir: Path | str) -> str:
    """Why there is nothing to show, with what to do; "" where there is."""
    if isinstance(logdir, str):
        try:
            refuse_unknown("python -m bthooks", logdir)
        except Exception as error:  # of a package for its kind, which may be any
            return str(error) if logdir in str(error) else f"can't read {logdir}: {error}"
    elif not logdir.exists():
        return (
            f"there is no directory {logdir}: name the one that was given to make_writer or attach"
        )
    elif not logdir.is_dir():
        return f"{logdir} is a file: name the directory that it is in"
    files = event_files(logdir)
    if not files:
        return f"there are no event files (events.out.tfevents...) in {logdir} or below it"
    if not any(event.summary.value for file in files for event in events(file)):
        return f"nothing has been logged yet: all event files in {logdir} are empty ({len(files)})"
    return ""


def event_files(logdir: Path | str) -> list[str]:
    """Those that TensorBoard finds, which follows links; a directory is looked into once."""
    if isinstance(logdir, str):
        from tensorboard.compat import tf

        places = tf.io.gfile.walk(logdir)
        return [
            f"{at.rstrip('/')}/{name}" for at, _, names in places for name in names if _FILE in name
        ]
    files, seen = [], set()
    for at, directories, names in os.walk(logdir, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories.sort(key=lambda name: os.path.islink(os.path.join(at, name)))
        files += [os.path.join(at, name) for name in names if _FILE in name]
    return [file for file in files if os.access(file, os.R_OK)]


def events(file: str) -> Iterator[Any]:
    """Those with values, and the marks that a session starts."""
    # The loader without "Legacy" makes each scalar a tensor, which takes nine times as long.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    loaded = LegacyEventFileLoader(file).Load()
    return (event for event in loaded if event.summary.value or event.session_log.status)


def runs(logdir: Path | str) -> Iterator["Run"]:
    """Those under a directory."""
    files: dict[str, list[str]] = {}
    for file in sorted(event_files(logdir)):  # by directory, and by time
        files.setdefault(os.path.dirname(file), []).append(file)
    start = str(logdir)
    for directory, its_files in files.items():
        below = directory[len(start) :].strip("/" + os.sep).replace(os.sep, "/")
        whole = start if isinstance(logdir, str) else str(logdir.resolve())
        run = Run(below or os.path.basename(whole.rstrip("/")))
        for file in its_files:
            run.add(file)
        yield run


@dataclass
class Run:
    """What is in force in the event files of one directory: of a step done twice, the later."""

    name: str
    scalars: dict[str, Points[float]] = field(default_factory=dict)  # by tag, those that are told
    others: dict[str, int] = field(default_factory=dict)  # the last step of every other scalar
    texts: dict[str, Points[str]] = field(default_factory=dict)  # tag -> steps, alerts
    ended: float = 0.0  # in seconds

    def add(self, file: str) -> None:
        """Take in an event file, the next by time."""
        began, ended = math.inf, 0.0
        first: dict[str, int] = {}
        texts: dict[str, Points[str]] = {}
        for event in events(file):
            began, ended = min(began, event.wall_time), event.wall_time
            if event.session_log.status:  # what comes now supersedes what was written of a step
                self.scalars = _all_before(event.step, self.scalars)
                self.texts = _all_before(event.step, self.texts)
                texts = _all_before(event.step, texts)
                self.others = {tag: at for tag, at in self.others.items() if at < event.step}
            for value in event.summary.value:
                tag, step = value.tag, event.step
                is_number = value.HasField("simple_value")
                if is_number or value.metadata.plugin_data.plugin_name == "scalars":
                    if not is_told(tag):
                        self.others[tag] = step
                        continue
                    first.setdefault(tag, step)
                    self.scalars.setdefault(tag, []).append((step, float(_held(value))))
                elif tag.endswith(_ALERTS):
                    texts.setdefault(tag, []).append((step, _held(value).decode()))
        for tag, step in first.items():
            # Another start of the run, or one that is resumed: what it does again is forgotten.
            if began > self.ended and re.fullmatch(_HEALTH, tag):
                alerts = tag.rpartition("health/")[0] + _ALERTS
                self.texts[alerts] = _before(step, self.texts.get(alerts, []))
        self.ended = max(self.ended, ended)
        for tag, told in texts.items():
            self.texts.setdefault(tag, []).extend(told)

    def alerts(self) -> dict[tuple[str, str], list[str]]:
        """By the tag and the condition with its place: what was told, in order."""
        found: dict[tuple[str, str], list[str]] = {}
        for tag, texts in self.texts.items():
            for key, is_over, told in (told for _, text in texts for told in _told(text)):
                if is_over:
                    found.get((tag, key), []).append(told)
                else:
                    found[tag, key] = [told]
        return found

    def lines(self) -> Iterator[str]:
        last = {tag: points[-1] for tag, points in self.scalars.items() if points}
        steps = [*self.others.values(), *(step for step, _ in last.values())]
        yield f"{self.name}: step {max(steps)}" if steps else f"{self.name}: no scalars"
        for tag, (_, value) in last.items():
            if not re.fullmatch(_HEALTH, tag):
                yield f"  {tag} {value:.4g}"
        for tag, (step, value) in last.items():
            if value and re.fullmatch(_HEALTH, tag):
                yield f"  {tag} {value:.0%} at step {step}"
        told = self.alerts()
        if not told:
            yield "  no alerts"
        for alert, *over in told.values():
            yield f"  {'over ' if over else 'OPEN '} {alert}"
            for line in over:
                yield f"         {line}"


@functools.lru_cache(1 << 16)
def is_told(tag: str) -> bool:
    """Whether the last value of a scalar is in the report."""
    is_metric = re.match(_METRIC, tag) and not re.match(_MEASURED, tag)
    return bool(is_metric or re.fullmatch(_HEALTH, tag))


def _all_before(step: int, of_tags: dict[str, Points[Value]]) -> dict[str, Points[Value]]:
    return {tag: _before(step, points) for tag, points in of_tags.items()}


def _before(step: int, points: Points[Value]) -> Points[Value]:
    return [point for point in points if point[0] < step]


def _held(value: Any) -> Any:
    """The number or the bytes that a value of an event holds."""
    from tensorboard.util.tensor_util import make_ndarray

    is_number = value.HasField("simple_value")
    return value.simple_value if is_number else make_ndarray(value.tensor).item()


def _told(text: str) -> Iterator[tuple[str, bool, str]]:
    """Of each alert in a text: condition and place, whether it is over, what is said of it."""
    if alerts := alerts_in(text):
        for alert in alerts:
            yield f"{alert.condition}: {alert.where}", alert.cleared is not None, str(alert)
        return
    for told in text.split("\n\n"):  # of 0.1.0, which wrote no fields
        said = told.removeprefix("cleared: ")
        if found := re.match(r"([a-z_]+: .+?): step \d+", said):
            yield found[1], said != told, told
