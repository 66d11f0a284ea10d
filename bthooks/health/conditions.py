"""Conditions: what is wrong by the figures of one step, and of those before. Pure."""

import math
from typing import Any

from ..measure.figures import Figures
from . import attention, nonfinite
from .attention import Attention
from .calibration import Calibration
from .findings import Finding, Judge, of_ranks
from .gradients import Gradients, collapsed, suspects
from .loss import Loss
from .rates import Rates
from .thresholds import Thresholds
from .unlearned import Unlearned


class Conditions:
    """Looks at the steps under one prefix: those of training, or of validation."""

    def __init__(self, thresholds: Thresholds, prefix: str) -> None:
        self._limits, self._prefix = thresholds, prefix
        self._gradients, self._rates, self._loss = Gradients(), Rates(), Loss()
        self._attention, self._calibration = Attention(), Calibration()
        self.unlearned = Unlearned()
        self.suspects: set[str] = set()  # layers of which the update is to be measured

    def look(self, figures: Figures, step: int) -> dict[str, list[Finding]]:
        """By condition, all places that were looked at."""
        limits = self._limits
        faults = nonfinite.faults(figures)
        loss = self._loss.look(figures, step, limits, self._prefix)
        if figures.norms:
            self.suspects = suspects(figures.layers, figures.total_norm, limits)
        gradients = nonfinite.gradients(figures)
        rates = self._rates.look(figures, step, limits)
        vanishing = self._gradients.vanishing(figures, step, limits, self._loss)
        told = {finding.where for finding in vanishing if finding.severity >= 1}
        is_dead = bool(rates) and all(math.isinf(finding.severity) for finding in rates)
        is_idle = is_dead or self._rates.rise()
        return {
            "nonfinite": faults,
            "nonfinite_gradients": [] if any(f.severity for f in faults) else gradients,
            "loss": loss,
            "vanishing_gradients": vanishing,
            "exploding_gradients": self._gradients.exploding(figures, limits, self._loss),
            "collapsed_gradients": collapsed(figures, limits),
            "attention_collapse": attention.collapse(figures, limits),
            "attention_logits": self._attention.logits(figures, limits),
            "dead_rows": attention.dead_rows(figures, limits),
            "dead_activations": _dead(figures),
            "learning_rate": rates,
            "unlearned": self.unlearned.look(figures, limits, None if is_idle else told),
            "miscalibration": self._calibration.look(figures, limits, self._prefix),
        }

    def state(self) -> dict[str, Any]:
        """What it knows of the steps before, as plain data."""
        return {name: judge.state() for name, judge in self._judges().items()}

    def resume(self, state: dict[str, Any]) -> None:
        for name, judge in self._judges().items():
            judge.resume(state[name])

    def _judges(self) -> dict[str, Judge]:
        return {
            "gradients": self._gradients,
            "rates": self._rates,
            "loss": self._loss,
            "attention": self._attention,
            "calibration": self._calibration,
            "unlearned": self.unlearned,
        }


def _dead(figures: Figures) -> list[Finding]:
    """Modules whose values are all the same."""
    return [
        Finding(path, math.inf if low == high else 0.0, f"every value is {low:.3g}", part)
        for part, of_rank in of_ranks(figures)
        for path, (low, high) in of_rank.activations.items()
    ]
