"""Recorder: the readings of each step until they are written, as one event, each tag once.

A step goes to the host in the order of the steps, without a wait; once it is there it is written,
with what the other ranks have sent of it, or sent to the rank that writes. What a flush in the
middle of a step has written is not written again.
"""

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..health.alerts import Alerts
from ..health.gradients import suspects
from ..job import rank
from ..measure.figures import Figures, figures_of, layer_means
from ..measure.readings import Readings
from ..measure.scaling import Skips, is_any_scaler
from ..names import tag
from ..report import Ledger
from ..torch_private import without_modes
from .backend import PATIENCE, Removed, flush, hand_over, was_told
from .event import event_of, event_of_model, prefixed
from .folders import Folder, Output
from .mail import Mail
from .ranks import GRACE, Ranks
from .transfer import Reading
from .turns import put_off, turn


@dataclass
class Pending:
    """What is to be written of a step."""

    step: int
    scalars: bool  # whether these are due at it
    histograms: bool
    prefix: str = ""  # in front of the tags, "val" for a validation pass
    stepped: bool = False  # whether an optimizer has, or `advance()` said so
    goes_on: bool = False  # whether more is expected of it
    has_left: bool = False  # whether a part of it is on its way already
    is_told: bool = False  # whether the rank that writes was told that it is over

    @property
    def key(self) -> tuple[int, str]:
        return self.step, self.prefix

    readings: Readings = field(default_factory=Readings)


class Recorder:
    """Has each step of one attachment judged, and writes it."""

    def __init__(self, output: Output, prefix: str, alerts: Alerts, ledger: Ledger) -> None:
        self.output, self.prefix, self.alerts = output, prefix, alerts
        self._ledger = ledger
        slots = {found.ranks.slot for found in _recorders if tag(found.prefix) == tag(prefix)}
        slot = next(slot for slot in itertools.count() if slot not in slots)
        self.ranks: Ranks = Ranks(slot, prefix, output.is_given, ledger)
        self.skips = Skips()
        self._scalers: bool | None = None  # whether there is any
        self._waiting: list[Pending] = []
        self._leaving: deque[tuple[Pending, Reading]] = deque()  # on their way to the host
        self._written: tuple[tuple[int, str], dict[int, Readings]] | None = None  # last, by rank
        # The step last written, and whether a kill would still lose it, or those before.
        self._unsettled: tuple[int, Callable[[], bool]] | None = None
        self._lost: list[int] = []  # the steps that could not be written
        self._last: dict[str, int] = {}  # by tag: the step last written
        self._has_layout = False
        self.expects = False  # whether what a training step measured is about to be judged
        self._suspects: set[str] = set()  # on a rank that does not write
        self.given: set[str] = set()  # the tags of losses that are logged by hand
        _recorders.append(self)

    def add(self, pending: Pending) -> None:
        """Take in a step, to whose readings more may come until it is sent."""
        self._waiting.append(pending)
        self.expects |= not pending.prefix

    def open(self) -> Any:
        """The writer, opened if it is not; None where nothing is written, or it can't be opened."""
        writer = None
        with self._ledger.guard("event file"):
            is_here = self.output.is_here() and self.writes
            writer = self.output.open(self._ledger) if is_here else None
        return writer

    @property
    def writes(self) -> bool:
        """Whether it is this rank that writes, as far as is known."""
        return self.ranks.writes

    @property
    def suspects(self) -> set[str]:
        """The layers of which it is to be known what the optimizer makes of their gradients."""
        return self.alerts.suspects if self.writes else self._suspects

    def send(self, step: int = 1 << 62) -> None:
        """Write what waits, as far as it has arrived on the host; `step` begins: what is of those
        before it is over."""
        is_any = self._waiting or self._leaving or self._unsettled or self.ranks.is_held_up
        if not is_any or not self.output.is_here():
            return
        if put_off(partial(self.send, step)):
            return
        with turn, self._ledger.lock:
            self._end_all(step)
            self._send(False)
        with self._ledger.lock:
            self.alerts.tell()

    def send_on(self) -> None:
        """Send what has arrived on the host since, where another rank writes."""
        if self._leaving and not self.writes:
            self.send_ahead(self._leaving[0][0].step)

    def send_ahead(self, step: int) -> None:
        """Send what waits to the rank that writes, though it may go on.

        So it need not wait for the next step of this one.
        """
        if put_off(partial(self.send_ahead, step)):
            return
        with turn, self._ledger.lock:
            self.ranks.look(step)
            if not self.writes:
                self._send(False, *self._waiting)

    def _end_all(self, step: int = 1 << 62) -> None:
        """Nothing more is expected of what is before `step`."""
        for pending in (*self._waiting, *(pending for pending, _ in self._leaving)):
            pending.goes_on &= pending.step >= step

    def _send(
        self, wait: bool, *kept: Pending, without: bool = False, patiently: bool = False
    ) -> None:
        """As `send`; more may come to what is `kept`. `without` what other ranks have not sent."""
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is not None:
            step, is_settled = unsettled
            with self._losing(step):
                self._unsettled = None if is_settled() else unsettled
        waiting, self._waiting = self._waiting, [*kept]
        # What is on its way since an earlier step is due where another one has begun.
        new = {pending.key for pending in waiting if not pending.has_left}
        wait_for = sum(pending.key not in new for pending, _ in self._leaving) if new else 0
        for pending in waiting:
            readings, pending.readings = pending.readings, Readings()
            is_nothing = pending.has_left and readings == Readings()
            if is_nothing and (self.writes or pending.goes_on or pending.is_told):
                continue
            pending.has_left = True
            # A forward runs before we know whether its step is logged.
            if not pending.histograms:
                readings.histograms, readings.samples = {}, {}
            if not pending.scalars:
                readings.attention, readings.doubts, readings.uncertainty = {}, {}, {}
            with self._losing(pending.step):
                self._leaving.append((pending, Reading(readings)))
        if waiting:
            self.ranks.look(waiting[0].step)
        self.ranks.deliver()
        while self._leaving:
            pending, reading = self._leaving[0]
            is_due, may_leave = wait_for > 0, False
            with self._losing(pending.step):
                may_leave = is_due or (
                    (wait or reading.transfer.is_done())
                    and (without or self._are_in(pending, patiently))
                )
            if not may_leave:
                break
            last, parts = self._take_leaving(pending.key)
            wait_for -= len(parts)
            with self._losing(pending.step):
                self._leave(last, parts)

    def _are_in(self, pending: Pending, patiently: bool) -> bool:
        """Whether all is there of a step: also of this rank, if others have a part in it."""
        if not (self.writes and self.ranks.are_several):
            return True
        *_, last = (other for other, _ in self._leaving if other.key == pending.key)
        return not last.goes_on and self.ranks.are_in(*pending.key, patiently)

    def _take_leaving(self, key: tuple[int, str]) -> tuple[Pending, list[Reading]]:
        """All that is on its way of the step that comes first, behind the last of it."""
        parts = []
        while self._leaving and self._leaving[0][0].key == key:
            parts.append(self._leaving.popleft())
        return parts[-1][0], [reading for _, reading in parts]

    def flush(self, *goes_on: Pending) -> None:
        """Write what waits, to the disk; to a step that `goes_on` more may come.

        A step of which other ranks have not sent all goes on waiting for them.
        """
        if not self.output.is_here():
            return
        if put_off(partial(self.flush, *goes_on)):
            return
        with turn, self._ledger.lock:
            self._send(True, *goes_on)
            self._settle()
            writer = self.output.writer
            if writer is not None and self.writes and not self._lost:
                with self._losing(None):
                    flush(writer)
        with self._ledger.lock:
            self.alerts.tell()

    def finish(self, until: float) -> None:
        """Write all, once the other ranks have sent what they have of it, or it is `until` then."""
        if put_off(partial(self.finish, until)):
            return
        self._end_all()
        start = time.monotonic()
        while (self._waiting or self._leaving) and time.monotonic() < until:
            with turn, self._ledger.lock:
                self.ranks.is_patient = time.monotonic() < start + GRACE
                self._send(True, patiently=self.ranks.is_patient)
            if self._leaving:
                time.sleep(0.01)
        with turn, self._ledger.lock:
            self._send(True, without=True)
            self._settle()
        with self._ledger.lock:
            self.alerts.tell()

    def _settle(self) -> None:
        """Write what was put off for a step that has not come."""
        for prefix, step, verdict in self.alerts.settle() if self.writes else ():
            with self._losing(step):
                event = prefixed(event_of(Figures(), verdict), tag(self.prefix, prefix))
                if event and (writer := self.output.open(self._ledger)) is not None:
                    hand_over(writer, event, step, patient=not self._lost)

    def resume(self, step: int) -> None:
        """Go on at `step`: what is in the folder at it and after is superseded.

        Unless it is of other attachments alone. Here a step can get lost: a tag that is still held
        for written (`_last`) is not.
        """
        self._waiting = []  # of a step that is abandoned, and flushed
        self.finish(until=0.0)
        self.ranks.resume(step)
        self._written = None
        why = ""
        others = [found for found in _recorders if found is not self and self._shares(found)]
        wrote = self.has_written(step)
        if not wrote and any(other.has_written(step) for other in others):
            why = "other attachments of this process have written to the folder"
        else:
            self._has_layout = False
            with self._ledger.guard("resume"):
                if self.writes and not self.output.supersede(step, self) and wrote:
                    why = "the writer is no SummaryWriter: what it wrote"
        if why:
            self._ledger.warn_once(
                "resume",
                f"{why} at step {step} and after, which stays beside what is written from now on",
            )
        self._last = {tag: last for tag, last in self._last.items() if last < step}

    def has_written(self, step: int) -> bool:
        """Whether it has written at `step` or after."""
        return any(last >= step for last in self._last.values())

    def close(self, until: float | None = None) -> None:
        """Be found by its writer no more; the last one closes it, where attach opened it.

        What other ranks have not sent is waited for `until` then.
        """
        if put_off(partial(self.close, until)):
            return
        self.finish(time.monotonic() + PATIENCE if until is None else until)
        with self._ledger.lock:
            self.ranks.end()
        with contextlib.suppress(ValueError):
            _recorders.remove(self)
        if not any(map(self._shares, _recorders)):
            with turn, self._ledger.guard("event file"):
                self.output.close()

    def _shares(self, other: "Recorder") -> bool:
        """Whether both write to one writer."""
        ours, theirs = self.output, other.output
        return ours is theirs or (ours.writer is not None and ours.writer is theirs.writer)

    def _leave(self, pending: Pending, parts: list[Reading]) -> None:
        """Send on what has arrived on the host, or write it."""
        readings = Readings()
        for part in parts:
            readings.merge(part.result())
        if self.writes:
            with without_modes():  # a collection may end an attachment while torch traces another
                self._write(pending, readings)
        elif readings != Readings() or not pending.goes_on:
            pending.is_told = not pending.goes_on
            mail = Mail(pending.step, readings.settled(), pending.prefix, pending.is_told)
            self.ranks.send(mail)
            if readings.norms:  # of its parts: what is suspected of the whole is of them too
                found = layer_means({name: float(n) for name, n in readings.norms.items()})
                self._suspects = suspects(found, None, self.alerts.thresholds)

    def _write(self, pending: Pending, readings: Readings) -> None:
        found, is_all = self.ranks.with_others(*pending.key, readings)
        by_rank: dict[int, Readings] = {}
        if self._written is not None and self._written[0] == pending.key:  # a flush parted it
            by_rank = self._written[1]
        for number, part in found.items():
            by_rank.setdefault(number, Readings()).merge(part)
        self._written = pending.key, by_rank
        figures = self._figures(by_rank, is_all)
        is_given = bool(pending.prefix) or tag(self.prefix, "train/loss") in self.given
        if is_given and (figures.loss is None or math.isfinite(figures.loss)):
            figures = replace(figures, loss=None)
        if not pending.prefix:
            self.ranks.judged({*by_rank}, {*figures.alone})
        if len(by_rank) > 1:
            self._ledger.captured("ranks", map(str, sorted(by_rank)))
        verdict = self.alerts.judge(figures, pending.step, pending.prefix)
        self.expects = bool(self._waiting or self._leaving)
        figures = replace(figures, loss=None) if is_given else figures
        event = event_of_model(
            figures,
            verdict,
            training=not pending.prefix,
            charts=pending.stepped and not self._has_layout,
            collapsed=self.alerts.thresholds.entropy if pending.histograms else None,
        )
        self._has_layout = self._has_layout or pending.stepped
        event = prefixed(event, tag(self.prefix, pending.prefix))
        event = event.mapped(lambda part: self._unwritten(part, pending.step))
        if event:
            writer = self.output.open(self._ledger)
            is_settled = hand_over(writer, event, pending.step, patient=not self._lost)
            self._unsettled = pending.step, is_settled

    def _figures(self, by_rank: dict[int, Readings], is_all: bool) -> Figures:
        """Without a total norm before clipping that is not one, and it is said why."""
        figures = figures_of(by_rank, self.skips, is_all)
        for site, why in figures.unsaid:
            self._ledger.warn_once(site, why)
        is_scaled = any(readings.scaling for readings in by_rank.values())
        if (reason := self._no_norm_before_clip(figures, is_scaled)) is not None:
            self._ledger.warn_once("gradients/total_norm_before_clip", f"left out: {reason}")
            figures = replace(figures, total_norm_before_clip=None)
        return figures

    def _no_norm_before_clip(self, figures: Figures, is_scaled: bool) -> str | None:
        total, before = figures.total_norm, figures.total_norm_before_clip
        if total is None:
            return None
        if before is None:
            return (
                "no backward pass that accumulates all the gradients was seen to end: they were "
                "set by hand, or under compiled autograd, where torch calls no hook at its end"
            )
        if is_scaled or not 0 < total < before < math.inf:
            return None
        power = math.log2(before / total)  # clipping never divides by a power of two
        is_exact = power > 0.5 and abs(power - round(power)) < 1e-5
        if (is_exact or power > 4) and self._is_any_scaler():
            return (
                "the gradients at the end of backward() seem to be those of a scaled loss, and "
                "the optimizer was not called by scaler.step(optimizer)"
            )
        if is_exact and power > 6.5:  # above 64, which micro-batches are averaged by
            return (
                f"the gradients at the end of backward() are {2 ** round(power)} times what the "
                "optimizer was given: of a loss that a scaler of its own has scaled, it seems, or "
                "of so many micro-batches, by whose number they were divided by hand"
            )
        return None

    def _is_any_scaler(self) -> bool:
        self._scalers = is_any_scaler() if self._scalers is None else self._scalers
        return self._scalers

    def _unwritten(self, values: dict[str, Any], step: int) -> dict[str, Any]:
        """`values` by tag without those that a flush in the middle of a step has written."""
        left = {tag: value for tag, value in values.items() if self._last.get(tag, -1) < step}
        self._last |= dict.fromkeys(left, step)
        return left

    @contextlib.contextmanager
    def _losing(self, step: int | None) -> Iterator[None]:
        """Say that what fails inside has cost the event of `step`, if it is of one."""
        try:
            yield
        except Exception as error:
            lost = "lost: what the writer still held"
            if step is not None:
                self._lost.append(step)
            if self._lost:
                first, last = min(self._lost), max(self._lost)
                which = f"{len(self._lost)} events of the steps {first} to {last}"
                lost = f"lost: {which}, and what the writer still held"
            if not (isinstance(error, Removed) and was_told(self.output.writer)):
                self._ledger.failed("event file", error)
            self._ledger.note("event file", f"{type(error).__name__}: {error}; {lost}")


# A function for scripts knows the writer alone; what it writes is judged where the writer's is.
_recorders: list[Recorder] = []


def recorder_of(writer: Any, prefix: str = "") -> Recorder | None:
    """The recorder that writes to `writer`: of several that whose prefix is in front of `prefix`,
    or the first one."""
    found = [each for each in _recorders if each.output.writer is writer]
    own = [each for each in found if tag(each.prefix) and within(each.prefix, prefix) is not None]
    return next(iter([*own, *found]), None)


def within(prefix: str, whole: str) -> str | None:
    """What is left of `whole` behind a prefix; None if that is not in front of it."""
    parts, start = tag(whole).split("/"), [part for part in tag(prefix).split("/") if part]
    return "/".join(parts[len(start) :]) if parts[: len(start)] == start else None


def losses_given(writer: Any, name: str) -> None:
    """The loss under this tag is logged by hand: no attachment with this writer writes it."""
    for found in _recorders:
        if found.output.writer is writer:
            found.given.add(name)


def is_written(writer: Any) -> bool:
    """Whether this rank writes what is logged by hand: rank 0, or the one that writes by itself."""
    recorder = recorder_of(writer)
    if recorder is None:
        return rank() == 0
    if rank() != 0:  # another may have a writer too
        recorder.ranks.look(0)
    return recorder.writes


def folder_of(folder: Path | str) -> Folder | None:
    """What the attachments of this process write to in `folder`; None if there are none."""
    outputs = [found.output for found in _recorders]
    found = (out for out in outputs if isinstance(out, Folder) and out.folder == folder)
    return next((out for out in found if out.is_here()), None)
