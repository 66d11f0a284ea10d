"""Learning rates: one that is as good as 0, one that jumps, one that never stops rising."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..measure.figures import Figures
from ..names import tag
from .findings import Finding, Judge
from .thresholds import Thresholds

_LASTS = 20  # of so many parts of the run one: the end of a schedule is shorter
_LATEST = 4  # checks over which a rate may rise


@dataclass
class Rate:
    """The learning rate of one group over the checks."""

    first: int  # step
    largest: float = 0.0  # but for the latest
    latest: list[float] = field(default_factory=list)
    rises: bool = True  # at every check so far
    dead: int | None = None  # the step since which it is as good as 0

    def look(self, rate: float, step: int, limits: Thresholds, base: float) -> tuple[float, str]:
        """The severity of `rate`, and a message; up to `base` a jump is a warm-up by epochs."""
        self.rises = self.rises and rate > max(self.latest, default=-1.0)
        if len(self.latest) == _LATEST:
            self.largest = max(self.largest, self.latest.pop(0))
        self.latest.append(rate)
        is_jump = rate >= limits.jump * self.largest > 0 and rate > 1.001 * base
        if is_jump and not self.rises:
            over = rate / self.largest
            return over / limits.jump, f"{rate:.3g}, {over:.3g} times all before"
        steps = step - self.first
        if self.rises and steps >= limits.warmup:
            return steps / limits.warmup, f"has risen for all {steps} steps: {rate:.3g}"
        return 0.0, ""

    def dies(self, rate: float, step: int, limits: Thresholds) -> str:
        """What is to be said of a rate that is 0, or has been next to it for a part of the run."""
        largest = max(self.largest, *self.latest)
        if not rate <= limits.decay * largest < math.inf or not limits.decay:
            self.dead = None
            return ""
        self.dead = step if self.dead is None else self.dead
        if rate and (step - self.dead) * _LASTS < step - self.first:
            return ""
        return f"{rate:.3g} while training goes on" + f", it was {largest:.3g}" * (largest > 0)


@dataclass
class Rates(Judge):
    """The learning rates of a run."""

    groups: dict[str, Rate] = field(default_factory=dict)

    def look(self, figures: Figures, step: int, limits: Thresholds) -> list[Finding]:
        found, deaths = [], []
        for group, rate in figures.learning_rates.items():
            seen = self.groups.setdefault(group, Rate(step))
            severity, message = seen.look(rate, step, limits, figures.base_rates.get(group, 0.0))
            found.append(Finding(tag("learning_rate", group), severity, message))
            deaths.append(seen.dies(rate, step, limits))
        if deaths and all(deaths):  # of one group alone it is meant
            return [
                finding._replace(severity=math.inf, message=said)
                for finding, said in zip(found, deaths, strict=True)
            ]
        return found

    def rise(self) -> bool:
        """Whether one has risen at every check so far: a warm-up, with updates that are rounded."""
        return any(rate.rises and len(rate.latest) > 1 for rate in self.groups.values())

    def resume(self, state: Mapping[str, Any]) -> None:
        self.groups = {group: Rate(**rate) for group, rate in state["groups"].items()}
