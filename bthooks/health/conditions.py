"""Conditions: what is wrong by the figures of one step, and of those before. Pure."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..measure.figures import Figures, OfRank
from ..measure.nonfinite import Fault
from ..names import tag

_IDLE = 10  # checks


class Thresholds(NamedTuple):
    """What is still healthy; `attach(..., thresholds=Thresholds(exploding=50.0))`.

    A condition is over again at half of its threshold (or twice, where less is worse), or once it
    has been short of it for ten times as many checks. A threshold that can't be passed switches
    the judgement off: 0 for `vanishing`, `collapsed` and `entropy`, `math.inf` for the others.

    Attributes:
        checks: how many logged steps in a row a condition must hold to begin, or not to be over.
        vanishing: mean gradient norm of a layer, as a fraction of the largest layer's; 0 counts
            where it lasts for ten checks.
        exploding: L2 norm of all gradients before clipping.
        decades: log10 of a layer's norm over its own running mean (and beyond 3 deviations).
        collapsed: standard deviation of the layers' norms, as a fraction of their mean.
        entropy: nats of one attention head.
        keys: a head whose queries see as many keys or fewer, on average, is not judged.
        logit: the largest attention score, where it is twice that of the first step, too.
        jump: the learning rate over the largest so far, once it has stopped rising.
        warmup: steps for which the learning rate may rise from the first one on.
        calibration: expected calibration error, of what `log_calibration` is given, over what
            chance alone makes of so few.
    """

    checks: int = 2
    vanishing: float = 1e-5
    exploding: float = 10.0
    decades: float = 1.0
    collapsed: float = 0.01
    entropy: float = 0.1
    keys: float = 4.0
    logit: float = 100.0
    jump: float = 10.0
    warmup: int = 10_000
    calibration: float = 0.1


class Finding(NamedTuple):
    """What one check says of one place."""

    where: str
    severity: float  # 1 and more is in the condition, 1/2 and less is well
    message: str  # the figure
    part: str = ""  # what of the place, as "head 3, rank 1"

    @property
    def place(self) -> str:
        return f"{self.where} {self.part}".rstrip()


class Conditions:
    """Looks at the steps under one prefix: those of training, or of validation."""

    def __init__(self, thresholds: Thresholds, prefix: str) -> None:
        self._limits, self._prefix = thresholds, prefix
        self._zeros: dict[str, int] = {}  # by layer, checks in a row without any gradient
        self._baselines: dict[str, _Baseline] = {}  # by layer, log10 of its gradient norm
        self._rates: dict[str, _Rate] = {}
        self._first_logits: dict[str, float] = {}

    def look(self, figures: Figures, step: int) -> dict[str, list[Finding]]:
        """By condition, all places that were looked at."""
        limits = self._limits
        faults = _faults(figures)
        finite = {name: norm for name, norm in figures.layers.items() if math.isfinite(norm)}
        return {
            "nonfinite": faults,
            "nonfinite_gradients": [] if any(f.severity for f in faults) else _nonfinite(figures),
            "vanishing_gradients": self._vanishing(finite),
            "exploding_gradients": self._exploding(finite, figures),
            "collapsed_gradients": _collapsed(finite, limits),
            "attention_collapse": _attention_collapse(figures, limits),
            "attention_logits": self._attention_logits(figures),
            "dead_activations": [
                Finding(path, math.inf if low == high else 0.0, f"every value is {low:.3g}", part)
                for part, of_rank in _ranks(figures)
                for path, (low, high) in of_rank.activations.items()
            ],
            "learning_rate": self._learning_rate(figures, step),
            "miscalibration": _miscalibration(figures, limits, self._prefix),
        }

    def _vanishing(self, layers: Mapping[str, float]) -> list[Finding]:
        """A norm of 0 is a sign where all are, or where it stays; not of an idle expert."""
        limit, largest = self._limits.vanishing, max(layers.values(), default=0.0)
        findings = []
        for name, norm in layers.items():
            self._zeros[name] = 0 if norm else self._zeros.get(name, 0) + 1
            is_idle = largest > 0 and 0 < self._zeros[name] < _IDLE
            share = norm / largest if largest else 0.0
            message = f"its mean gradient norm is {norm:.1e}, the largest layer's {largest:.1e}"
            findings.append(Finding(name, 0.0 if is_idle else _below(limit, share), message))
        return findings

    def _exploding(self, layers: Mapping[str, float], figures: Figures) -> list[Finding]:
        limits, applied, total = self._limits, figures.total_norm, figures.total_norm_before_clip
        total = applied if total is None else total
        if not layers or total is None or not math.isfinite(total):
            return []
        largest = max(layers, key=lambda name: layers[name])
        message = f"the norm of all gradients before clipping is {total:.3g}, most of it here"
        findings = [Finding(largest, total / limits.exploding, message, "with the total")]
        unclipped = total / applied if applied else 1.0
        for name, norm in layers.items():
            if 0 < norm * unclipped < math.inf:
                baseline = self._baselines.setdefault(name, _Baseline())
                over, allowed = baseline.look(math.log10(norm * unclipped), limits.decades)
                message = f"its gradient norm is 10 ** {over:.1f} times its own running mean"
                findings.append(Finding(name, over / allowed, message))
        return findings

    def _attention_logits(self, figures: Figures) -> list[Finding]:
        found = []
        for path, statistics in figures.attention.items():
            if (logit := statistics.get("max_logit")) is not None:
                first = self._first_logits.setdefault(path, logit)
                growth = logit / first if first > 0 else math.inf
                severity = min(logit / self._limits.logit, growth / 2)
                found.append(Finding(path, severity, f"its largest score is {logit:.3g}"))
        return found

    def _learning_rate(self, figures: Figures, step: int) -> list[Finding]:
        found, is_any = [], any(figures.learning_rates.values())
        for group, rate in figures.learning_rates.items():
            seen = self._rates.setdefault(group, _Rate(step))
            base = figures.base_rates.get(group, 0.0)
            severity, message = seen.look(rate, step, self._limits, base)
            if not is_any:  # of one group alone it is meant
                severity, message = math.inf, "0 while training goes on"
            found.append(Finding(tag("learning_rate", group), severity, message))
        return found


def _nonfinite(figures: Figures) -> list[Finding]:
    message = "its gradient is {}; of the parameters of which it is not finite it is the last"
    return [
        Finding(name, 0.0 if math.isfinite(norm) else math.inf, message.format(norm))
        for name, norm in reversed(list(figures.norms.items()))
    ]


def _ranks(figures: Figures) -> list[tuple[str, OfRank]]:
    """What is known of each rank, behind its name, if there are several."""
    several = len(figures.ranks) > 1
    return [(f"rank {rank}" * several, found) for rank, found in figures.ranks.items()]


def _faults(figures: Figures) -> list[Finding]:
    """The first fault of the forwards of each rank."""
    found = []
    for part, of_rank in _ranks(figures):
        faults = [forward.fault() for forward in of_rank.forwards]
        first = next(filter(None, faults), None)
        if first is not None:
            found.append(Finding(first.path, math.inf, _cause(first), part))
        elif faults:
            found.append(Finding("root", 0.0, "", part))
    return found


def _cause(fault: Fault) -> str:
    if fault.names:
        return f"its own parameters or buffers are not finite: {listed(fault.names)}"
    if fault.given == "not finite":
        return "what the model is given is not finite: look at the data"
    message = "the first module whose output is not finite, while its inputs are"
    message += " but for -inf, as in a mask" * (fault.given == "masked")
    if fault.compiled:
        message += f"; it, or what is compiled in it: {listed(fault.compiled)}"
    return message


def _collapsed(layers: Mapping[str, float], limits: Thresholds) -> list[Finding]:
    norms = [norm for norm in layers.values() if norm > 0]
    if len(norms) < 4:
        return []
    mean = sum(norms) / len(norms)
    spread = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / len(norms)) / mean
    message = f"all {len(norms)} layers have the gradient norm {mean:.3g}, within {spread:.2%}"
    return [Finding("root", _below(limits.collapsed, spread), message)]


def _attention_collapse(figures: Figures, limits: Thresholds) -> list[Finding]:
    """Of heads that see enough keys, and do not look at the token before or behind.

    That is no collapse: the positional heads of Voita et al. (2019), with 0.9 on one position.
    """
    return [
        Finding(
            path,
            _below(limits.entropy, entropy) if near < 0.9 else 0.0,
            f"its entropy is {entropy:.2g} nats over {keys:.0f} keys",
            ", ".join(filter(None, (f"head {head}", part))),
        )
        for part, of_rank in _ranks(figures)
        for path, heads in of_rank.heads.items()
        for head, (entropy, keys, near) in heads.items()
        if keys > limits.keys
    ]


def _below(limit: float, value: float) -> float:
    """The severity of a value that is healthy above `limit`."""
    if value <= 0:
        return math.inf if limit else 0.0
    return limit / value


def _miscalibration(figures: Figures, limits: Thresholds, prefix: str) -> list[Finding]:
    error, gap = figures.calibration.get("ece"), figures.calibration.get("gap")
    if error is None or gap is None:
        return []
    which = "over-confident" if gap > 0 else "under-confident"
    message = f"the expected calibration error is {error:.3g}: {which} by {abs(gap):.3g}"
    severity = (error - figures.chance) / limits.calibration
    return [Finding(tag(prefix, "calibration/ece"), severity, message)]


@dataclass
class _Baseline:
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


class _Rate:
    """The learning rate of one group over the checks."""

    def __init__(self, step: int) -> None:
        self._first = step
        self._largest = 0.0  # but for the latest
        self._latest: deque[float] = deque(maxlen=4)
        self._rises = True  # at every check so far

    def look(self, rate: float, step: int, limits: Thresholds, base: float) -> tuple[float, str]:
        """The severity of `rate`, and a message; up to `base` a jump is a warm-up by epochs."""
        self._rises = self._rises and rate > max(self._latest, default=-1.0)
        if len(self._latest) == self._latest.maxlen:
            self._largest = max(self._largest, self._latest[0])
        self._latest.append(rate)
        is_jump = rate >= limits.jump * self._largest > 0 and rate > 1.001 * base
        if is_jump and not self._rises:
            over = rate / self._largest
            return over / limits.jump, f"{rate:.3g}, {over:.3g} times all before"
        steps = step - self._first
        if self._rises and steps >= limits.warmup:
            return steps / limits.warmup, f"has risen for all {steps} steps: {rate:.3g}"
        return 0.0, ""


def listed(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)
