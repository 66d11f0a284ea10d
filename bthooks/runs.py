"""Runs: what event files hold, read back: last figures, and alerts.

In: a directory. Out: `Run`, one for each directory with event files.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
    print(f"runs: {count}, open alerts: {are_open}")
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
    """Those under a directory, each with what is in force: of a step done twice, the later."""
    files: dict[Path, list[Path]] = {}
    for file in sorted(event_files(logdir)):  # by directory, and by time
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
        for event in events(file):
            self.began, self.ended = min(self.began, event.wall_time), event.wall_time
            if event.session_log.status:  # what comes now supersedes what was written of a step
                last = {tag: at for tag, at in last.items() if at[0] < event.step}
                for told in self.texts.values():
                    told[:] = [at for at in told if at[0] < event.step]
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
                for key, is_over, told in _told(text):
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
