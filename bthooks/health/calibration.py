"""Calibration: whether a model is as sure as it is right."""

import math
from dataclasses import dataclass

from ..measure.figures import Figures
from ..names import tag
from .findings import Finding, Judge
from .thresholds import Thresholds

_PATIENCE = 3  # validations without a better one, and it no longer learns
_BETTER = 0.01  # of the likelihood, relative


@dataclass
class Calibration(Judge):
    """The calibration of a run over its validations."""

    nll: float = math.inf  # the best so far
    accuracy: float = 0.0
    stale: int = 0  # validations since either was

    def look(self, figures: Figures, limits: Thresholds, prefix: str) -> list[Finding]:
        """Over-confidence; under-confidence, which is normal before, once nothing gets better."""
        of = figures.calibration
        error, gap = of.get("ece"), of.get("gap")
        if error is None or gap is None:
            return []
        nll, accuracy = of.get("nll", math.inf), of.get("accuracy", 0.0)
        is_better = nll < self.nll - _BETTER * abs(self.nll) or accuracy > self.accuracy
        self.stale = 0 if is_better or math.isinf(self.nll) else self.stale + 1
        self.nll, self.accuracy = min(nll, self.nll), max(accuracy, self.accuracy)
        severity = (error - figures.chance) / limits.calibration
        if gap <= 0 and self.stale < _PATIENCE:
            severity = 0.0
        which = "over-confident" if gap > 0 else "under-confident"
        message = f"the expected calibration error is {error:.3g}: {which} by {abs(gap):.3g}"
        return [Finding(tag(prefix, "calibration/ece"), severity, message)]
