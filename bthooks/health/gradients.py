"""Gradients: those that vanish, explode, or are all alike; and what optimizers make of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..measure.figures import Figures
from .findings import Finding, Judge, below
from .loss import Loss
from .thresholds import Thresholds

_IDLE = 10  # checks
_START = 3  # checks
_UNASKED = 3  # checks, after which no update of a suspected layer is waited for
_LEARNS = 10.0  # times as much growth, where the loss falls
_STALLS = 30.0  # times the start, where the loss does not fall
_LAYER, _LAYER_LEARNS = 10.0, 30.0  # times the largest layer at the start; where the loss falls
_ALONE = 1e3  # times the next layer's norm, or the loss
_MANY = 4  # layers


@dataclass
class Baseline:
    """A running mean and variance."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def look(self, value: float, least: float) -> tuple[float, float]:
        """How far `value` is over the mean (0 for the first five), and how far it may be.

        It becomes a part of the mean, an outlier only slowly.
        """
        self.count += 1
        over = value - self.mean
        allowed = max(least, 3 * math.sqrt(self.variance))
        if self.count <= 5:
            weight, step, told = 1 / self.count, over, 0.0
        else:
            weight, step, told = 1 / 20, max(-allowed, min(over, allowed)), over
        self.mean += weight * step
        self.variance = (1 - weight) * (self.variance + weight * step * step)
        return told, allowed


@dataclass
class Gradients(Judge):
    """The norms of a run's gradients over its checks."""

    zeros: dict[str, int] = field(default_factory=dict)  # by layer, checks without any gradient
    unasked: dict[str, int] = field(default_factory=dict)  # by layer, checks without its update
    baselines: dict[str, Baseline] = field(default_factory=dict)  # by layer, log10 of its norm
    totals: list[float] = field(default_factory=list)  # of the first checks
    level: float = 0.0  # the largest norm of a layer in them

    def vanishing(
        self, figures: Figures, step: int, limits: Thresholds, loss: Loss
    ) -> list[Finding]:
        """Layers with next to no gradient, of which the optimizer makes next to nothing.

        A norm of 0 is a sign where it stays: not of an idle expert, or of a batch whose loss is 0.
        """
        layers = finite(figures.layers)
        largest = max(layers.values(), default=0.0)
        was_zero = loss.was_zero(step)
        has_loss = None if was_zero is None else not was_zero
        updates = figures.layer_updates
        fastest = max(
            (updates.get(name, 0.0) for name in layers if layers[name] == largest), default=0.0
        )
        findings = []
        for name, norm in layers.items():
            self.zeros[name] = 0 if norm else self.zeros.get(name, 0) + 1
            is_idle = 0 < self.zeros[name] < _IDLE and (largest > 0 or has_loss is not True)
            share = norm / largest if largest else 0.0
            severity = 0.0 if is_idle else below(limits.vanishing, share)
            message = f"its mean gradient norm is {norm:.1e}, the largest layer's {largest:.1e}"
            is_certain = True
            if severity >= 1 and largest > 0 and norm:
                if name in updates and fastest > 0:
                    moves = updates[name] / fastest
                    severity = min(severity, below(limits.updates, moves))
                    message += f", its update / size {moves:.1e} of that one's"
                else:
                    self.unasked[name] = self.unasked.get(name, 0) + 1
                    is_certain = self.unasked[name] > _UNASKED
            findings.append(Finding(name, severity, message, is_certain=is_certain))
        return findings

    def exploding(self, figures: Figures, limits: Thresholds, loss: Loss) -> list[Finding]:
        """The total, where more than the unit of the loss makes it large; layers that grow."""
        layers = finite(figures.layers)
        applied, total = figures.total_norm, figures.total_norm_before_clip
        total = applied if total is None else total
        if not layers or total is None or not math.isfinite(total):
            return []
        by_norm = sorted(layers, key=lambda name: -layers[name])
        if len(self.totals) < _START:
            self.totals.append(total)
            self.level = max(self.level, layers[by_norm[0]])
        # A threshold of the user's own knows the unit of the loss; the default one does not.
        severity, why = math.inf, ""
        if limits.exploding == Thresholds().exploding:
            severity, why = self._evidence(figures, total, by_norm, limits, loss)
        severity = min(total / limits.exploding, severity)
        message = f"the norm of all gradients before clipping is {total:.3g}, most of it here{why}"
        findings = [Finding(by_norm[0], severity, message, "with the total")]
        unclipped = total / applied if applied else 1.0
        high = self.level * (_LAYER_LEARNS if loss.falls() else _LAYER)
        for name, norm in layers.items():
            if 0 < norm * unclipped < math.inf:
                baseline = self.baselines.setdefault(name, Baseline())
                over, allowed = baseline.look(math.log10(norm * unclipped), limits.decades)
                severity = min(over / allowed, norm * unclipped / high) if high else 0.0
                message = f"its gradient norm is 10 ** {over:.1f} times its own running mean"
                findings.append(Finding(name, severity, message))
        return findings

    def _evidence(
        self, figures: Figures, total: float, by_norm: list[str], limits: Thresholds, loss: Loss
    ) -> tuple[float, str]:
        """How much more there is to it than the unit of the loss, and what."""
        start = min((norm for norm in self.totals if norm), default=math.inf)
        growth = total / start
        allowed = limits.growth * (_LEARNS if loss.falls() else 1)
        found = [(growth / allowed, f", {growth:.3g} times that of the start")]
        if loss.falls() is False:
            found.append(
                (
                    growth / _STALLS,
                    f"; {growth:.3g} times that of the start, and the loss does not fall",
                )
            )
        if loss.has_blown_up:
            found.append((math.inf, "; the loss has blown up"))
        if loss.falls() is not True:
            update = figures.layer_updates.get(by_norm[0], 0.0)
            found.append(
                (update, f", whose weights change by {update:.3g} times their size in a step")
            )
        if len(by_norm) >= _MANY and (second := figures.layers[by_norm[1]]) > 0:
            alone = figures.layers[by_norm[0]] / second
            found.append((alone / _ALONE, f", {alone:.3g} times any other layer's"))
        if loss.size > 0:
            # A policy gradient's may be as good as 0: so the norm alone is to be out of proportion.
            over = min(total / loss.size, total / limits.exploding) / _ALONE
            found.append((over, f"; the loss is {loss.size:.3g}"))
        return max(found)

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self.baselines = {name: Baseline(**of) for name, of in state["baselines"].items()}


def suspects(layers: Mapping[str, float], total: float | None, limits: Thresholds) -> set[str]:
    """The layers of which the next check needs to know what the optimizer makes of the gradient.

    Such are few, mostly none: to know it a copy of their parameters is held during a step.
    """
    norms = finite(layers)
    largest = max(norms, key=lambda name: norms[name], default=None)
    if largest is None:
        return set()
    small = {name for name, norm in norms.items() if norm < limits.vanishing * norms[largest]}
    is_large = total is not None and total > limits.exploding
    return small | {largest} if small or is_large else set()


def finite(norms: Mapping[str, float]) -> dict[str, float]:
    """Those that are."""
    return {name: norm for name, norm in norms.items() if math.isfinite(norm)}


def collapsed(figures: Figures, limits: Thresholds) -> list[Finding]:
    """All layers alike; before clipping, where that is known: clipping layer by layer makes it."""
    norms = [n for n in finite(figures.layers_before_clip or figures.layers).values() if n > 0]
    if len(norms) < _MANY:
        return []
    mean = sum(norms) / len(norms)
    spread = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / len(norms)) / mean
    message = f"all {len(norms)} layers have the gradient norm {mean:.3g}, within {spread:.2%}"
    return [Finding("root", below(limits.collapsed, spread), message)]
