"""Unlearned: parameters that are meant to be trained, and are not.

Not those that are frozen on purpose (`requires_grad=False`), nor heads that a task skips.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..measure.figures import Figures
from ..measure.readings import NO_GRADIENT, NO_RATE
from ..names import layer_of
from .findings import Finding, Judge, listed
from .thresholds import Thresholds

_SHARE = 0.5  # of the parameters' count
_STILL = 3  # looks at an update
NO_UPDATE = "updates of exactly 0"


@dataclass
class Unlearned(Judge):
    """Which parameters of a run have not been seen to learn."""

    gaps: dict[str, list[Any]] = field(default_factory=dict)  # by name: why, for how many checks
    learnt: list[str] = field(default_factory=list)  # have had a gradient, and an optimizer
    moved: list[str] = field(default_factory=list)  # were seen to change in a step
    sizes: dict[str, float] = field(default_factory=dict)  # of those without an optimizer

    def look(
        self, figures: Figures, limits: Thresholds, told: Collection[str] | None
    ) -> list[Finding]:
        """Whole modules that are cut off, where the rest of the model learns.

        Where it is `told` of layers why they have no update, or of all (None), that is none.
        """
        if not figures.norms:
            return []
        self._take_in(figures, told)
        found = self.parameters(limits.checks)
        known = {*self.learnt, *self.gaps}
        cut = {
            path: why
            for path, why in _modules(found, known).items()
            if why != NO_GRADIENT or self._is_cut_off(path, figures.ran)
        }
        ill = [
            Finding(path, math.inf, _message(path, why, found), at_once=True)
            for path, why in cut.items()
        ]
        return ill + [Finding(layer, 0.0, "") for layer in {*map(layer_of, known)} - cut.keys()]

    def _take_in(self, figures: Figures, told: Collection[str] | None) -> None:
        learnt, moved = {*self.learnt}, {*self.moved}
        gaps = {name: why for name, why in figures.gaps.items() if why != NO_RATE}
        for name, ratio in figures.update_ratios.items():
            if ratio == 0 and name not in moved and figures.norms.get(name):
                is_told = told is None or layer_of(name) in told
                if not is_told and name not in figures.gaps:
                    self._count(name, NO_UPDATE)
            elif ratio > 0:
                moved.add(name)
                self.gaps.pop(name, None)
        for name in figures.norms:
            learnt.add(name)
            if name in self.gaps and self.gaps[name][0] != NO_UPDATE:
                del self.gaps[name]
        for name, why in gaps.items():
            size = figures.sizes.get(name)
            is_still = self.sizes.setdefault(name, size) == size if size is not None else True
            if name not in learnt and is_still:
                self._count(name, why)
            elif not is_still:  # another kind of optimizer has it
                learnt.add(name)
                self.gaps.pop(name, None)
        self.learnt, self.moved = sorted(learnt), sorted(moved)

    def _count(self, name: str, why: str) -> None:
        former, count = self.gaps.get(name, (why, 0))
        self.gaps[name] = [why, count + 1 if former == why else 1]

    def parameters(self, checks: int) -> dict[str, str]:
        """Those that have not learnt in so many checks, each with the reason."""
        least = {NO_UPDATE: max(checks, _STILL)}
        gaps = self.gaps.items()
        return {name: why for name, (why, n) in gaps if n >= least.get(why, checks)}

    def _is_cut_off(self, path: str, ran: Mapping[str, int]) -> bool:
        """Whether a module without gradients ran where gradients should come through.

        So it is where nothing that learns ran before it, as a trunk whose output is detached; or
        where it is a large part of the model. A pooler of whose output no use is made is not.
        """
        inside = [at for place, at in ran.items() if f"{place}.".startswith(f"{path}.")]
        if not inside:
            return False
        learners = [ran[layer] for layer in map(layer_of, self.learnt) if layer in ran]
        mine = sum(name.startswith(f"{path}.") for name in self.gaps)
        is_large = mine >= _SHARE * (len(self.learnt) + len(self.gaps))
        return bool(learners) and (is_large or max(inside) < min(learners))


def said(found: Mapping[str, str]) -> str:
    """One line of a report: the modules whose parameters do not learn, by reason."""
    by_reason: dict[str, set[str]] = {}
    for name, why in found.items():
        by_reason.setdefault(why, set()).add(layer_of(name))
    return "; ".join(f"{why}: {listed(sorted(of))}" for why, of in sorted(by_reason.items()))


def _modules(found: Mapping[str, str], known: Iterable[str]) -> dict[str, str]:
    """The outermost modules, but the root, of which no parameter learns, each with the reason."""
    total, cut = Counter[str](), Counter[str]()
    for name in known:
        for path in _above(name):
            total[path] += 1
            cut[path] += name in found
    whole = {path for path in total if cut[path] == total[path]}
    modules: dict[str, str] = {}
    for name, why in found.items():
        if outermost := next((path for path in _above(name) if path in whole), None):
            modules.setdefault(outermost, why)
    return modules


def _above(name: str) -> list[str]:
    """The modules that a parameter is in, from the outermost on, without the root."""
    *parts, _ = name.split(".")
    return [".".join(parts[: at + 1]) for at in range(len(parts))]


def _message(path: str, why: str, found: Mapping[str, str]) -> str:
    inside = sum(name.startswith(f"{path}.") for name in found)
    return f"none of its {inside} parameters learns: {why}"
