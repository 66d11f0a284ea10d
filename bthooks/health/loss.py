"""Loss: one that is not finite, one that jumps; and whether it falls, which others ask."""

import math
import statistics
from dataclasses import dataclass, field

from ..measure.figures import Figures
from ..names import tag
from .findings import Finding, Judge
from .thresholds import Thresholds

_WINDOW, _FEW, _LATEST, _START = 128, 16, 8, 5  # values
_LONG = 64  # values, before which it may not have begun to fall
_SPREAD = 1.4826  # of a normal distribution, the deviation over the median of the distances
_RETURN = 0.25  # of the way back to the start: what has converged may jump by less
_FALLS = 0.98  # of the start, where it is less
_FARTHER = 2  # times as far as the second largest value
_JUMP, _BLOWN_UP = 1e3, 1e5  # times the values before, while they are few; times the first one


@dataclass
class Loss(Judge):
    """The loss of a run under one prefix."""

    first: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # the latest that are finite, and no jump
    jumped: list[float] = field(default_factory=list)  # those since, while it is one
    steps: list[int] = field(default_factory=list)  # the latest
    zeros: list[int] = field(default_factory=list)  # of these, where it was 0
    is_finite: bool = True  # the last one
    worst: float = 0.0  # the largest so far, as a multiple of the first

    def look(self, figures: Figures, step: int, limits: Thresholds, prefix: str) -> list[Finding]:
        """Not finite: at once. Far above its own spread and all but one that was seen lately."""
        if (value := figures.loss) is None:
            return []
        where = tag(prefix or "train", "loss")
        self.is_finite = math.isfinite(value)
        if not self.is_finite:
            return [Finding(where, math.inf, f"it is {value}", at_once=True, follows=True)]
        severity, message = self._jump(value, limits)
        self.first += [value] * (len(self.first) < _START)
        self.worst = max(self.worst, value / abs(self.first[0]) if self.first[0] else 0.0)
        self.steps = [*self.steps, step][-_WINDOW:]
        self.zeros = [*self.zeros, *[step] * (value == 0)][-_WINDOW:]
        if severity < 1:
            self.values, self.jumped = [*self.values, *self.jumped[:1], value][-_WINDOW:], []
        else:
            self.jumped.append(value)
            if len(self.jumped) == _WINDOW:  # by now it is the rule
                self.values, self.jumped = self.jumped, []
        # Logged at each step, it may well jump twice: the first one does not count.
        is_first = severity >= 1 and len(self.jumped) == 1
        return [Finding(where, 0.9 if is_first else severity, message)]

    def _jump(self, value: float, limits: Thresholds) -> tuple[float, str]:
        """How far it is above what it was, over how far it may be."""
        known = self.values
        if not known or math.isinf(limits.loss):
            return 0.0, ""
        middle = statistics.median(known)
        message = f"it is {value:.3g}, the median of the last {len(known)} {middle:.3g}"
        if len(known) < _FEW:
            largest = max(map(abs, known)) if len(known) > 2 else 0.0
            return (value / largest / _JUMP if largest else 0.0), message
        spread = _SPREAD * statistics.median(abs(v - middle) for v in known)
        limit = max(limits.loss * spread, _RETURN * (self.start - middle), 1e-3 * abs(middle))
        level = max(middle, statistics.median(known[-_LATEST:]))  # one that rises slowly is no jump
        tail = sorted(known)[-2] - level  # what has been so before is its own way to be
        if not limit or (value - level <= _FARTHER * tail and not self.jumped):
            return 0.0, message
        return max(value - level, 0.0) / limit, message

    @property
    def start(self) -> float:
        return statistics.median(self.first) if self.first else math.nan

    @property
    def size(self) -> float:
        """Its typical magnitude, at the start or now, whichever is more."""
        latest = statistics.median(map(abs, self.values)) if self.values else math.nan
        return max(abs(self.start), latest)

    @property
    def has_blown_up(self) -> bool:
        """Whether it is, or was, out of all proportion, and is not below the first one again."""
        if not self.is_finite or self.worst < _BLOWN_UP:
            return not self.is_finite
        return statistics.median([*self.values, *self.jumped][-_LATEST:]) > _FALLS * self.first[0]

    def falls(self) -> bool | None:
        """Whether it is lower than at the start; None where that is not known, or not yet."""
        if not self.is_finite:
            return False
        latest = [*self.values, *self.jumped]
        if len(latest) < _LATEST:
            return None
        falls = statistics.median(latest[-_LATEST:]) < self.start - (1 - _FALLS) * abs(self.start)
        return falls if falls or len(latest) >= _LONG else None

    def was_zero(self, step: int) -> bool | None:
        """Whether that of a step was 0; None if it was not given lately."""
        return step in self.zeros if step in self.steps else None
