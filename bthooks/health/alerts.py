"""Alerts: what is wrong with a run, told once.

A condition comes and goes from step to step. What is told are its episodes: an `Alert` where one
begins, and the same with the step at which it was over.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..measure.figures import Figures
from ..report import Ledger
from .conditions import Conditions, Finding, Thresholds, listed

_BETTER = 10  # times as long without being well, and it is over too


class Alert(NamedTuple):
    """What began to be wrong at a step.

    Attributes:
        condition: `nonfinite`, `nonfinite_gradients`, `vanishing_gradients`,
            `exploding_gradients`, `collapsed_gradients`, `attention_collapse`, `attention_logits`,
            `dead_activations`, `learning_rate` or `miscalibration`.
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
    """What a check amounts to.

    Attributes:
        shares: by condition, which fraction of the places looked at is in it.
        begun, cleared: the episodes that begin, and those that are over.
    """

    shares: dict[str, float]
    begun: list[Alert]
    cleared: list[Alert]


class Alerts:
    """The alerts of one attachment, of its training steps and of its validation.

    Args:
        on_alert: called with each alert.
        ledger: warns of each.

    Attributes:
        all: what began to be wrong so far.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        on_alert: Callable[[Alert], object] | None,
        ledger: Ledger,
    ) -> None:
        self.thresholds, self._on_alert, self._ledger = thresholds, on_alert, ledger
        self._health: dict[str, Health] = {}  # by the prefix of the steps
        self.all: list[Alert] = []
        self._untold: deque[Alert] = deque()

    def judge(self, figures: Figures, step: int, prefix: str = "") -> Verdict:
        """What the figures of `step`, which go under `prefix`, amount to."""
        verdict = Verdict({}, [], [])
        with self._ledger.guard("health"):
            health = self._health.setdefault(prefix, Health(self.thresholds, prefix))
            shares, begun, cleared = health.check(figures, step)
            begun = [alert for alert in begun if not self._is_told(alert, prefix)]
            cleared = [over for over in cleared if over._replace(cleared=None) in self.all]
            training = self._health.get("")
            for over in cleared[:]:
                if prefix and training is not None and training.sees(over):  # there it lasts
                    health.resume(over._replace(cleared=None))
                    cleared.remove(over)
            for over in cleared:
                self.all[self.all.index(over._replace(cleared=None))] = over
            self.all += begun
            self._untold += begun
            verdict = Verdict(shares, begun, cleared)
        return verdict

    def tell(self) -> None:
        """Tell what began to be wrong, once all is written: what is told may flush or detach."""
        while self._untold:
            alert = self._untold.popleft()
            self._ledger.warn(str(alert))
            if self._on_alert is not None:
                with self._ledger.guard("on_alert"):
                    self._on_alert(alert)

    def _is_told(self, alert: Alert, prefix: str) -> bool:
        """Whether the steps of another prefix tell it.

        What training tells is not told again of validation, wherever that sees it; and a place
        that validation was the first to see, between two logged steps, not again of training.
        """
        return any(
            other.condition == alert.condition and (other.where == alert.where or not at)
            for at, other in self._lasting()
            if at != prefix
        )

    def _lasting(self) -> list[tuple[str, Alert]]:
        """What was told and lasts, behind the prefix of its steps."""
        each = [(prefix, alert) for prefix, h in self._health.items() for alert in h.lasting()]
        return [(prefix, alert) for prefix, alert in each if alert in self.all]

    def state(self) -> list[list[Any]]:
        """Each alert that lasts as plain data, behind the prefix of its steps."""
        return [[prefix, *alert] for prefix, alert in self._lasting()]

    def resume(self, state: Iterable[Sequence[Any]], step: int) -> None:
        """Go on at `step` with what `state` gave; what came after is forgotten."""
        self._health.clear()
        self.all = [
            alert if alert.cleared is None or alert.cleared < step else alert._replace(cleared=None)
            for alert in self.all
            if alert.step < step
        ]
        for prefix, *fields in state:
            alert = Alert(*fields)
            self._health.setdefault(prefix, Health(self.thresholds, prefix)).resume(alert)
            if alert not in self.all:
                self.all.append(alert)


@dataclass
class _Episode:
    """One condition over the checks, so that it is told once."""

    held: dict[str, int] = field(default_factory=dict)  # by place: the checks in a row
    well: int = 0  # checks in a row, at half of the threshold or less
    better: int = 0  # the same, below the threshold
    last: int = -1  # the step of the last check
    alert: Alert | None = None  # while it lasts


class Health:
    """The conditions of one run, or of its eval forwards, over its checks.

    Args:
        thresholds: what is judged by.
        prefix: of what is looked at.
    """

    def __init__(self, thresholds: Thresholds, prefix: str = "") -> None:
        self._checks = thresholds.checks
        self._conditions = Conditions(thresholds, prefix)
        self._episodes: dict[str, _Episode] = {}

    def check(self, figures: Figures, step: int) -> Verdict:
        """Look at the figures of `step`."""
        verdict = Verdict({}, [], [])
        for condition, findings in self._conditions.look(figures, step).items():
            episode = self._episodes.setdefault(condition, _Episode())
            if not findings or step <= episode.last:  # a flush parted the step
                continue
            episode.last = step
            held = [finding for finding in findings if finding.severity >= 1]
            verdict.shares[condition] = len(held) / len(findings)
            if episode.alert is None:
                checks = 1 if condition.startswith("nonfinite") else self._checks
                episode.held = {f.place: episode.held.get(f.place, 0) + 1 for f in held}
                lasting = [f for f in held if episode.held[f.place] >= checks]
                if lasting:
                    episode.alert = _alert(condition, lasting, step)
                    verdict.begun.append(episode.alert)
                continue
            episode.better = 0 if held else episode.better + 1
            is_well = all(finding.severity <= 0.5 for finding in findings)
            episode.well = episode.well + 1 if is_well else 0
            if episode.well >= self._checks or episode.better >= _BETTER * self._checks:
                verdict.cleared.append(episode.alert._replace(cleared=step))
                self._episodes[condition] = _Episode(last=step)
        return verdict

    def lasting(self) -> list[Alert]:
        """The alerts of the episodes that last."""
        return [e.alert for e in self._episodes.values() if e.alert is not None]

    def sees(self, alert: Alert) -> bool:
        """Whether an episode of the same condition and place lasts."""
        return any(a[:2] == alert[:2] for a in self.lasting())

    def resume(self, alert: Alert) -> None:
        """Go on with an episode that an earlier process told."""
        self._episodes[alert.condition] = _Episode(alert=alert)


def _alert(condition: str, lasting: Sequence[Finding], step: int) -> Alert:
    """The alert of the worst of the findings, with the places of the others."""
    worst = max(lasting, key=lambda finding: finding.severity)
    message = f"{worst.part}: {worst.message}" if worst.part.startswith("head") else worst.message
    others = [finding.place for finding in lasting if finding is not worst]
    if others:
        message += f"; {len(others)} more: {listed(others)}"
    return Alert(condition, worst.where, step, message)
