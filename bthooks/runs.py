"""Runs: what event files hold, read back: last figures, and alerts."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .record.event import alerts_in

_METRIC = r"(.*/)?(train|val|eval|test)/|.*gradients/total_norm|.*calibration/ece$"
_HEALTH, _ALERTS = r"(.*/)?health/[a-z_]+", "health/alerts/text_summary"
_MEASURED = r".*(attention|gradients/norm|learning_rate|uncertainty|health)/|.*calibration/(?!ece$)"


def report(logdir: Path) -> int:
    """Print the health of each run under `logdir`; 1 where an alert is open, else 0."""
    count = are_open = 0
    for run in runs(logdir):
        print("\n".join(run.lines()), end="\n\n")
        count += 1
        are_open += sum(len(told) == 1 for told in run.alerts().values())
    print(f"runs: {count}, open alerts: {are_open}", flush=True)
    return int(are_open > 0)


def missing(logdir: Path) -> str:
    """Why there is nothing to show, with what to do; "" where there is."""
    if not logdir.exists():
        return (
            f"there is no directory {logdir}: name the one that was given to make_writer or attach"
        )
    if not logdir.is_dir():
        return f"{logdir} is a file: name the directory that it is in"
    files = event_files(logdir)
    if not files:
        return f"there are no event files (events.out.tfevents...) in {logdir} or below it"
    if not any(event.summary.value for file in files for event in events(file)):
        return f"nothing has been logged yet: all event files in {logdir} are empty ({len(files)})"
    return ""


def event_files(logdir: Path) -> list[Path]:
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


def events(file: Path) -> Iterator[Any]:
    """Those with values, and the marks that a session starts."""
    # The loader without "Legacy" makes each scalar a tensor, which takes nine times as long.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    loaded = LegacyEventFileLoader(str(file)).Load()
    return (event for event in loaded if event.summary.value or event.session_log.status)


def runs(logdir: Path) -> Iterator["Run"]:
    """Those under a directory."""
    files: dict[Path, list[Path]] = {}
    for file in sorted(event_files(logdir)):  # by directory, and by time
        files.setdefault(file.parent, []).append(file)
    for directory, its_files in files.items():
        at = directory.relative_to(logdir)
        run = Run((logdir.resolve() / at).name if at == Path() else at.as_posix())
        for file in its_files:
            run.add(file)
        yield run


@dataclass
class Run:
    """What is in force in the event files of one directory: of a step done twice, the later."""

    name: str
    scalars: dict[str, tuple[int, float]] = field(default_factory=dict)  # tag -> last step, value
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # tag -> steps, alerts
    ended: float = 0.0  # in seconds

    def add(self, file: Path) -> None:
        """Take in an event file, the next by time."""
        began, ended = math.inf, 0.0
        first: dict[str, int] = {}
        last: dict[str, tuple[int, Any]] = {}
        texts: dict[str, list[tuple[int, str]]] = {}
        for event in events(file):
            began, ended = min(began, event.wall_time), event.wall_time
            if event.session_log.status:  # what comes now supersedes what was written of a step
                last = {tag: at for tag, at in last.items() if at[0] < event.step}
                texts = {tag: _before(event.step, told) for tag, told in texts.items()}
            for value in event.summary.value:
                is_number = value.HasField("simple_value")
                if is_number or value.metadata.plugin_data.plugin_name == "scalars":
                    first.setdefault(value.tag, event.step)
                    last[value.tag] = event.step, value
                elif value.tag.endswith(_ALERTS):
                    text = _held(value).decode()
                    texts.setdefault(value.tag, []).append((event.step, text))
        for tag, step in first.items():
            # Another start of the run, or one that is resumed: what it does again is forgotten.
            if began > self.ended and re.fullmatch(_HEALTH, tag):
                alerts = tag.rpartition("health/")[0] + _ALERTS
                self.texts[alerts] = _before(step, self.texts.get(alerts, []))
        self.ended = max(self.ended, ended)
        self.scalars |= {tag: (step, float(_held(value))) for tag, (step, value) in last.items()}
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


def _before(step: int, texts: list[tuple[int, str]]) -> list[tuple[int, str]]:
    return [text for text in texts if text[0] < step]


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
