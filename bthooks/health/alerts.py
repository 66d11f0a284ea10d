"""Alerts: what is wrong with a run, told once.

A condition comes and goes from step to step. What is told are its episodes: an `Alert` where one
begins, and the same with the step at which it was over.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..measure.figures import Figures
from ..report import Ledger
from .conditions import Conditions
from .findings import Finding, listed
from .thresholds import Thresholds

_BETTER = 10  # times as long without being well, and it is over too
_CALLS = 2  # for which it is put off where no step comes
_NOT_FINITE = ("nonfinite", "nonfinite_gradients", "loss")  # each may come of another


class Alert(NamedTuple):
    """What began to be wrong at a step.

    Attributes:
        condition: `nonfinite`, `nonfinite_gradients`, `vanishing_gradients`,
            `exploding_gradients`, `collapsed_gradients`, `attention_collapse`, `attention_logits`,
            `dead_rows`, `dead_activations`, `learning_rate`, `loss`, `unlearned` or
            `miscalibration`.
        where: the module, parameter or tag where it is worst.
        step: at which it was told.
        message: by how much, and where else.
        cleared: the step at which it was over; None while it lasts.

    >>> print(Alert("nonfinite", "head", 12, "its output is not finite, its inputs are"))
    nonfinite: head: step 12: its output is not finite, its inputs are
    """

    condition: str
    where: str
    step: int
    message: str
    cleared: int | None = None

    def __str__(self) -> str:
        if self.cleared is not None:
            return f"cleared: {self.condition}: {self.where}: step {self.cleared}"
        return f"{self.condition}: {self.where}: step {self.step}: {self.message}"


class Verdict(NamedTuple):
    """What a check amounts to."""

    shares: dict[str, float]  # by condition, which fraction of the places looked at is in it
    begun: list[Alert]  # of the episodes that begin
    cleared: list[Alert]  # of those that are over


class Alerts:
    """The alerts of one attachment, of its training steps and of its validation."""

    def __init__(
        self, thresholds: Thresholds, on_alert: Callable[[Alert], object] | None, ledger: Ledger
    ) -> None:
        self.thresholds, self._on_alert, self._ledger = thresholds, on_alert, ledger
        self._conditions: dict[str, Conditions] = {}  # by the prefix of the steps
        self._episodes: dict[tuple[str, str], _Episode] = {}  # by that and the condition
        self.all: list[Alert] = []  # what began to be wrong so far
        self._untold: deque[Alert] = deque()
        self._steps = 0  # of the attachment, that were judged
        # By prefix and condition: what was found at a step, how many were judged then, and how
        # often it was put off.
        self._put_off: dict[tuple[str, str], tuple[Sequence[Finding], int, int, int]] = {}

    def judge(
        self, figures: Figures, step: int, prefix: str = "", expects: bool = False
    ) -> Verdict:
        """What the figures of `step`, which go under `prefix`, amount to.

        Where a step of the attachment is about to be judged too, as it `expects`, what is told at
        once waits for it: it may say where that came from.
        """
        verdict = Verdict({}, [], [])
        with self._ledger.guard("health"):
            self._steps += not expects
            for condition, findings in self._of(prefix).look(figures, step).items():
                if not findings or (expects and self._puts_off(findings, prefix, condition, step)):
                    continue
                self._put_off.pop((prefix, condition), None)
                self._look(findings, condition, prefix, step, verdict)
        return verdict

    def settle(self) -> list[tuple[str, int, Verdict]]:
        """Judge what was put off for a step that may never come, behind its prefix and step."""
        put_off, self._put_off = self._put_off, {}
        found = []
        with self._ledger.guard("health"):
            for (prefix, condition), (findings, step, *_) in put_off.items():
                verdict = Verdict({}, [], [])
                self._look(findings, condition, prefix, step, verdict)
                found.append((prefix, step, verdict))
        return found

    def _puts_off(
        self, findings: Sequence[Finding], prefix: str, condition: str, step: int
    ) -> bool:
        """Whether what is found at once waits: for a step to be judged, and one more call."""
        if not _is_grave(findings):
            return False
        key = prefix, condition
        _, _, steps, calls = self._put_off.get(key, (findings, step, self._steps, 0))
        if steps != self._steps or calls == _CALLS:
            return False
        self._put_off[key] = findings, step, steps, calls + 1
        return True

    def _look(
        self,
        findings: Sequence[Finding],
        condition: str,
        prefix: str,
        step: int,
        verdict: Verdict,
    ) -> None:
        """Take what was found of a condition into its episode, and what comes of it down."""
        episode = self._episodes.setdefault((prefix, condition), _Episode(condition))
        is_grave = _is_grave(findings)
        if step <= episode.last and not is_grave:  # a flush parted the step
            return
        if is_grave and episode.alert is not None and not episode.is_infinite:
            self._end(episode, episode.over(episode.alert, step), prefix, verdict)
        alert = episode.look(findings, step, self.thresholds.checks)
        verdict.shares[condition] = episode.share
        if alert is None:
            return
        if alert.cleared is not None:
            self._end(episode, alert, prefix, verdict)
            return
        episode.is_told = not (
            self._is_told(alert, prefix) or self._follows(findings, condition, prefix)
        )
        if episode.is_told:
            self.all.append(alert)
            self._untold.append(alert)
            verdict.begun.append(alert)

    def _end(self, episode: "_Episode", over: Alert, prefix: str, verdict: Verdict) -> None:
        """An alert is over, unless the steps of training, which saw the same place, are in it."""
        if not episode.is_told:
            return
        begun = over._replace(cleared=None)
        training = self._episodes.get(("", over.condition))
        if prefix and training and training.alert and training.alert.where == over.where:
            episode.alert = begun
        else:
            self.all[self.all.index(begun)] = over
            verdict.cleared.append(over)

    def _of(self, prefix: str) -> Conditions:
        return self._conditions.setdefault(prefix, Conditions(self.thresholds, prefix))

    @property
    def suspects(self) -> set[str]:
        """The layers of which it is to be known what the optimizer makes of their gradients."""
        return self._of("").suspects

    def untrained(self) -> dict[str, str]:
        """The parameters that have not been seen to learn, each with the reason."""
        return self._of("").unlearned.parameters(self.thresholds.checks)

    def tell(self) -> None:
        """Tell what began to be wrong, once all is written: what is told may flush or detach."""
        while self._untold:
            alert = self._untold.popleft()
            self._ledger.warn(str(alert))
            if self._on_alert is not None:
                with self._ledger.guard("on_alert"):
                    self._on_alert(alert)

    def _is_told(self, alert: Alert, prefix: str) -> bool:
        """Whether training tells it, at any place, or validation, which saw this place first."""
        return any(
            other.condition == alert.condition and (other.where == alert.where or not at)
            for at, other in self._lasting()
            if at != prefix
        )

    def _follows(self, findings: Sequence[Finding], condition: str, prefix: str) -> bool:
        """Whether it comes of another condition of its kind, which was told and lasts.

        What is not finite makes the gradients so, then the loss, and the parameters.
        """
        severe = [finding for finding in findings if finding.severity >= 1]
        return all(finding.follows for finding in severe) and any(
            episode.is_told and episode.alert is not None and episode.is_infinite
            for key, episode in self._episodes.items()
            if key != (prefix, condition) and key[1] in _NOT_FINITE
        )

    def _lasting(self) -> list[tuple[str, Alert]]:
        """What was told and lasts, behind the prefix of its steps."""
        episodes = self._episodes.items()
        return [(at, e.alert) for (at, _), e in episodes if e.alert is not None and e.is_told]

    def state(self) -> list[list[Any]]:
        """Each alert that lasts as plain data, behind its prefix and whether it is grave."""
        return [
            [prefix, self._episodes[prefix, alert.condition].is_infinite, *alert]
            for prefix, alert in self._lasting()
        ]

    def baselines(self) -> dict[str, dict[str, Any]]:
        """What the judgements rest on, as plain data, by the prefix of the steps."""
        return {prefix: conditions.state() for prefix, conditions in self._conditions.items()}

    def resume(
        self, state: Iterable[Sequence[Any]], baselines: Mapping[str, Any], step: int
    ) -> None:
        """Go on at `step` with what `state` and `baselines` gave; what came after is forgotten."""
        self._conditions.clear()
        for prefix, known in baselines.items():
            self._of(prefix).resume(known)
        self._episodes.clear()
        self.all = [
            alert if alert.cleared is None or alert.cleared < step else alert._replace(cleared=None)
            for alert in self.all
            if alert.step < step
        ]
        self._put_off.clear()
        self._untold.clear()
        for prefix, is_infinite, *fields in state:
            alert = Alert(*fields)
            episode = _Episode(alert.condition, alert=alert, is_told=True, is_infinite=is_infinite)
            self._episodes[prefix, alert.condition] = episode
            if alert not in self.all:
                self.all.append(alert)


@dataclass
class _Episode:
    """One condition over the checks, so that it is told once."""

    condition: str
    last: int = -1  # the step of the last check
    held: dict[str, int] = field(default_factory=dict)  # by place: the checks in a row
    alert: Alert | None = None  # while it lasts
    is_infinite: bool = False
    is_told: bool = False  # or the steps of another prefix tell it
    share: float = 0.0  # of the places at the last check, which are in it
    well: int = 0  # checks in a row, at half of the threshold or less
    better: int = 0  # the same, below the threshold

    def look(self, findings: Sequence[Finding], step: int, checks: int) -> Alert | None:
        """Its alert where it begins, or is over, by what was found at `step`."""
        self.last = step
        held = [finding for finding in findings if finding.severity >= 1]
        if self.alert is None:
            self.held = {f.place: self.held.get(f.place, 0) + 1 for f in held}
            lasting = [
                f for f in held if f.is_certain and (f.at_once or self.held[f.place] >= checks)
            ]
            # Nothing is charted of what is not told: a blip.
            self.share = len(lasting) / len(findings)
            if lasting:
                self.alert = _alert(self.condition, lasting, step)
                self.is_infinite = all(math.isinf(f.severity) for f in lasting)
            return self.alert
        self.share = len(held) / len(findings)
        self.better = 0 if held else self.better + 1
        self.well = self.well + 1 if all(f.severity <= 0.5 for f in findings) else 0
        if self.well < checks and self.better < _BETTER * checks:
            return None
        return self.over(self.alert, step)

    def over(self, alert: Alert, step: int) -> Alert:
        """Its alert, which ends at `step`."""
        over = alert._replace(cleared=step)
        self.alert, self.held, self.well, self.better = None, {}, 0, 0
        return over


def _is_grave(findings: Sequence[Finding]) -> bool:
    """Whether any of them is told at once."""
    return any(finding.at_once and finding.severity >= 1 for finding in findings)


def _alert(condition: str, lasting: Sequence[Finding], step: int) -> Alert:
    """The alert of the worst of the findings, with the places of the others."""
    worst = max(lasting, key=lambda finding: finding.severity)
    message = worst.message
    if worst.part.startswith(("head", "rank")):
        message = f"{worst.part}: {message}"
    others = [finding.place for finding in lasting if finding is not worst]
    if others:
        message += f"; {len(others)} more: {listed(others)}"
    return Alert(condition, worst.where, step, message)
