"""Alerts: what is wrong with a run, told once. Pure.

In: the figures of each number, on the host. Out: how much is in each condition, and an `Alert`
where an episode of one begins or ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .conditions import Conditions, Figures, Finding, Thresholds, listed

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


@dataclass
class _Episode:
    """One condition over the checks, so that it is told once."""

    held: dict[str, int] = field(default_factory=dict)  # by place: the checks in a row
    well: int = 0  # checks in a row, at half of the threshold or less
    better: int = 0  # the same, below the threshold
    last: int = -1  # the step of the last check
    alert: Alert | None = None  # while it lasts
    muted: bool = False  # the numbers of another prefix tell it


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
                if not episode.muted:
                    verdict.cleared.append(episode.alert._replace(cleared=step))
                self._episodes[condition] = _Episode(last=step)
        return verdict

    def lasting(self) -> list[Alert]:
        """The alerts of the episodes that last and are told."""
        return [e.alert for e in self._episodes.values() if e.alert is not None and not e.muted]

    def mute(self, alert: Alert) -> None:
        """Leave it to the numbers of another prefix to tell of an episode that began."""
        self._episodes[alert.condition].muted = True

    def sees(self, alert: Alert) -> bool:
        """Whether an episode of the same condition and place lasts, told or not."""
        episode = self._episodes.get(alert.condition, _Episode())
        return episode.alert is not None and episode.alert.where == alert.where

    def resume(self, alert: Alert) -> None:
        """Go on with an episode that an earlier process told."""
        self._episodes[alert.condition] = _Episode(alert=alert)

    def lasts(self, condition: str) -> bool:
        """Whether an episode of `condition` lasts."""
        return condition in self._episodes and self._episodes[condition].alert is not None


def _alert(condition: str, lasting: Sequence[Finding], step: int) -> Alert:
    """The alert of the worst of the findings, with the places of the others."""
    worst = max(lasting, key=lambda finding: finding.severity)
    message = f"{worst.part}: {worst.message}" if worst.part.startswith("head") else worst.message
    others = [finding.place for finding in lasting if finding is not worst]
    if others:
        message += f"; {len(others)} more: {listed(others)}"
    return Alert(condition, worst.where, step, message)
