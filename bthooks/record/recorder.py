"""Outbox: the readings of each number until they go out, as one event, each tag once.

In: readings by number. Out: one event per number and prefix.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..health.alerts import Alert, Health
from ..health.conditions import Figures, Thresholds
from ..health.dashboard import healthy_band, layout
from ..measure.readings import Reading, Readings, compose, figures
from ..measure.scaling import Skips, is_any_scaler
from ..names import tag
from ..report import Ledger
from ..steps import Due
from .writers import Event, hand_over, is_main_rank, prefixed


@dataclass
class Batch:
    """The readings of one number, until they are written.

    Attributes:
        stepped: whether an optimizer has, or `advance()` said so.
    """

    number: int
    due: Due
    prefix: str = ""
    readings: Readings = field(default_factory=Readings)
    stepped: bool = False


class Outbox:
    """What waits to be written.

    Args:
        prefix: in front of every tag.
        thresholds: what is judged by.
        on_alert: called with each alert.
        ledger: told what can't be written, and the alerts.
    """

    def __init__(
        self,
        writer: Any,
        prefix: str,
        thresholds: Thresholds,
        on_alert: Callable[[Alert], object] | None,
        ledger: Ledger,
    ) -> None:
        self._writer, self._prefix, self._ledger = writer, prefix, ledger
        self._on_alert, self._thresholds = on_alert, thresholds
        self._health: dict[str, Health] = {}  # by the prefix of the numbers
        self.alerts: list[Alert] = []
        self._untold: deque[Alert] = deque()
        self.skips = Skips()
        self._scalers: bool | None = None  # whether there is any
        self._waiting: list[Batch] = []
        self._leaving: deque[tuple[Batch, Reading]] = deque()  # on their way to the host
        # The number last written, and whether a kill would still lose it, or those before.
        self._unsettled: tuple[int, Callable[[], bool]] | None = None
        self._lost: list[int] = []  # the numbers that could not be written
        self._lock = threading.RLock()
        self._last: dict[str, int] = {}  # by tag: the number last written
        self._has_layout = False

    def add(self, batch: Batch) -> None:
        self._waiting.append(batch)

    def send(self, wait: bool = False) -> None:
        """Write what waits, as far as it has arrived on the host; with `wait`, all."""
        if not (self._waiting or self._leaving or self._unsettled):
            return
        with self._lock:  # several threads may run one model: their steps in order
            unsettled, self._unsettled = self._unsettled, None
            if unsettled is not None:
                with self._losing(unsettled[0]):
                    if not unsettled[1]():
                        self._unsettled = unsettled
            waiting, self._waiting = self._waiting, []
            wait_for = len(self._leaving) if waiting else 0
            for batch in waiting:
                readings, batch.readings = batch.readings, Readings()
                # A forward is before the step that says which number is its own.
                if not batch.due.histograms:
                    readings.histograms, readings.samples = {}, {}
                if not batch.due.scalars:
                    readings.attention, readings.means = {}, {}
                with self._losing(batch.number):
                    self._leaving.append((batch, Reading(readings)))
            while self._leaving:
                batch, reading = self._leaving[0]
                with self._losing(batch.number):
                    # Those of the last logging step are waited for, at the latest now.
                    if not (wait or wait_for > 0 or reading.is_done()):
                        break
                    self._write(batch, reading.result())
                self._leaving.popleft()
                wait_for -= 1
            self.tell()

    def _write(self, batch: Batch, readings: Readings) -> None:
        for site, why in readings.doubts.values():
            self._ledger.say(site, why)
        event = compose(readings, model=True, images=batch.due.histograms, skips=self.skips)
        self._without_scaled(readings, event)
        self.judge(event, figures(readings, event), batch.number, batch.prefix)
        if not batch.prefix and "attention/mean_entropy" in event.scalars:
            event.scalars |= healthy_band()
        if batch.stepped and not self._has_layout:
            event.layout, self._has_layout = layout(event.scalars), True
        event = prefixed(event, tag(self._prefix, batch.prefix))
        event = self._unwritten(event, batch.number)
        is_settled = hand_over(self._writer, event, batch.number, patient=not self._lost)
        self._unsettled = batch.number, is_settled

    def judge(self, event: Event, figures: Figures, number: int, prefix: str) -> None:
        """Put into `event` what is wrong by the figures."""
        with self._ledger.guard("health"):
            health = self._health.setdefault(prefix, Health(self._thresholds, prefix))
            shares, begun, cleared = health.check(figures, number)
            event.scalars |= {f"health/{condition}": share for condition, share in shares.items()}
            training = self._health.get("")
            if prefix and training is not None:  # what training tells is not told again
                begun = [alert for alert in begun if not training.lasts(alert.condition)]
                cleared = [over for over in cleared if over._replace(cleared=None) in self.alerts]
            if told := [*begun, *cleared]:
                event.texts["health/alerts"] = "\n\n".join(map(str, told))
            for over in cleared:
                self.alerts[self.alerts.index(over._replace(cleared=None))] = over
            self.alerts += begun
            self._untold += begun

    def tell(self) -> None:
        """Tell what began to be wrong, once all is written: what is told may flush or detach."""
        while self._untold:
            alert = self._untold.popleft()
            self._ledger.warn(str(alert))
            if self._on_alert is not None:
                with self._ledger.guard("on_alert"):
                    self._on_alert(alert)

    def lasting(self) -> list[list[Any]]:
        """Each alert that lasts as plain data, behind the prefix of its numbers."""
        return [
            [prefix, *alert]
            for prefix, health in self._health.items()
            for alert in health.lasting()
        ]

    def resume(self, lasting: Iterable[Sequence[Any]]) -> None:
        """Go on with what `lasting` gave, and with nothing else."""
        self._health.clear()
        for prefix, *fields in lasting:
            alert = Alert(*fields)
            self._health.setdefault(prefix, Health(self._thresholds, prefix)).resume(alert)
            if alert not in self.alerts:
                self.alerts.append(alert)

    @contextlib.contextmanager
    def _losing(self, number: int) -> Iterator[None]:
        """Say that what fails inside has cost the event of `number`."""
        try:
            yield
        except Exception as error:
            self._lost.append(number)
            self._ledger.failed("event file", error)
            self._ledger.note(
                "event file",
                f"{type(error).__name__}: {error}; lost: {len(self._lost)} events of the steps "
                f"{min(self._lost)} to {max(self._lost)}, and what the writer still held",
            )

    def _without_scaled(self, readings: Readings, event: Event) -> None:
        """Leave out a total norm before clipping that may be one of a scaled loss, and say so."""
        total, before = "gradients/total_norm", "gradients/total_norm_before_clip"
        if not readings.unclipped or total not in event.scalars:
            return
        far = event.scalars.get(before, 0) > 16 * event.scalars[total]
        if far and readings.scaling is None:
            self._scalers = is_any_scaler() if self._scalers is None else self._scalers
            if self._scalers:
                del event.scalars[before]
        if before not in event.scalars:
            self._ledger.say(
                before,
                "left out: the gradients at the end of backward() seem to be those of a scaled "
                "loss, and the optimizer was not called by scaler.step(optimizer)",
            )

    def flush(self) -> None:
        """Write what waits, to the disk."""
        self.send(wait=True)
        if self._writer is not None and is_main_rank() and not self._lost:
            try:
                self._writer.flush()
            except Exception as error:
                self._ledger.failed("flush of the writer", error)

    def _unwritten(self, event: Event, number: int) -> Event:
        """`event` without the tags that a flush in the middle of a step has brought this far."""
        parts = [
            {tag: value for tag, value in part.items() if self._last.get(tag, -1) < number}
            for part in event.tagged()
        ]
        self._last |= {tag: number for part in parts for tag in part}
        return replace(Event(*parts), layout=event.layout)
