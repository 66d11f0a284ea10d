"""Loss: one that is not finite, one that jumps; and whether it falls, which others ask."""

import math
import statistics
from dataclasses import dataclass, field

from ..measure.figures import Figures
from ..names import tag
from .findings import Finding, Judge
from .thresholds import Thresholds

_WINDOW, _FEW, _START = 128, 8, 5  # values
_LONG = 64  # values, before which it may not have begun to fall
_SPREAD = 1.4826  # of a normal distribution, the deviation over the median of the distances
_RETURN = 0.25  # of the way back to the start: what has converged may jump by less
_BLOWN_UP = 1e3  # times the first value
_FALLS = 0.98  # of the start, where it is less


@dataclass
class Loss(Judge):
    """The loss of a run under one prefix."""

    first: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # the latest that are finite
    steps: list[int] = field(default_factory=list)
    is_finite: bool = True  # the last one
    worst: float = 0.0  # the largest so far, as a multiple of the first

    def look(self, figures: Figures, step: int, limits: Thresholds, prefix: str) -> list[Finding]:
        """Not finite: at once. Far above its own running spread, and on its way to the start."""
        if (value := figures.loss) is None:
            return []
        where = tag(prefix or "train", "loss")
        self.is_finite = math.isfinite(value)
        if not self.is_finite:
            return [Finding(where, math.inf, f"it is {value}", at_once=True, follows=True)]
        self.first += [value] * (len(self.first) < _START)
        times = value / abs(self.first[0]) if self.first[0] else 0.0
        self.worst = max(self.worst, times)
        severity = times / _BLOWN_UP if math.isfinite(limits.loss) else 0.0
        message = f"it is {value:.3g}, at first {self.first[0]:.3g}"
        if len(self.values) >= _FEW:
            middle = statistics.median(self.values)
            spread = _SPREAD * statistics.median(abs(v - middle) for v in self.values)
            back = _RETURN * (self.start - middle)
            limit = max(limits.loss * spread, back, 1e-3 * abs(middle))
            if limit and (value - middle) / limit > severity:
                severity = (value - middle) / limit
                message = (
                    f"it is {value:.3g}, the median of the last {len(self.values)} {middle:.3g}"
                )
        self.values, self.steps = [*self.values, value][-_WINDOW:], [*self.steps, step][-_WINDOW:]
        return [Finding(where, severity, message)]

    @property
    def start(self) -> float:
        """The least of the first ones."""
        return min(self.first, default=math.nan)

    @property
    def size(self) -> float:
        """Its typical magnitude, at the start or now, whichever is more."""
        latest = statistics.median(map(abs, self.values)) if self.values else math.nan
        return max(abs(self.start), latest)

    @property
    def has_blown_up(self) -> bool:
        """Whether it is, or was, out of all proportion, and has not come back."""
        return not self.is_finite or (self.worst >= _BLOWN_UP and not self.falls())

    def falls(self) -> bool | None:
        """Whether it is lower than at the start; None where that is not known."""
        if not self.is_finite:
            return False
        if len(self.values) < _FEW:
            return None
        latest = statistics.median(self.values[-_FEW:])
        falls = latest < self.start - (1 - _FALLS) * abs(self.start)
        return falls if falls or len(self.values) >= _LONG else None

    def at(self, step: int) -> float | None:
        """That of a step, if it was given lately."""
        return self.values[self.steps.index(step)] if step in self.steps else None
