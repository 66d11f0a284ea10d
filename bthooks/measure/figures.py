"""Figures: the numbers of one step on the host, by name.

These are what is judged (`health`) and what is written (`record`); no tag is made here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from . import attention
from .attention import Head
from .histograms import Histogram
from .nonfinite import Forward
from .readings import Drawn, Readings
from .scaling import Skips


@dataclass
class Figures:
    """What is known of one step, as floats; what was not measured is not there."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # group ->
    base_rates: Mapping[str, float] = field(default_factory=dict)  # that a scheduler was given
    effective_rates: Mapping[str, float] = field(default_factory=dict)  # group -> `d * lr`
    norms: Mapping[str, float] = field(default_factory=dict)  # parameter ->
    layers: Mapping[str, float] = field(default_factory=dict)  # module -> mean of its own norms
    total_norm: float | None = None
    total_norm_before_clip: float | None = None
    update_ratios: Mapping[str, float] = field(default_factory=dict)  # parameter ->
    skipped_steps: int | None = None
    # module -> statistic ->
    attention: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    heads: Mapping[str, Sequence[Head]] = field(default_factory=dict)  # module ->
    # Of what turned out to be no attention: to be warned of, by site and reason.
    no_maps: Sequence[tuple[str, str]] = ()
    uncertainty: Mapping[str, float] = field(default_factory=dict)  # kind -> mean
    calibration: Mapping[str, float] = field(default_factory=dict)  # statistic ->
    chance: float = 0.0  # the calibration error of a model that is right as often as it says
    histograms: Mapping[Drawn, Histogram] = field(default_factory=dict)
    # module -> the min and max, where there are several values
    activations: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    nonfinite: Mapping[Drawn, float] = field(default_factory=dict)  # how many values, unless none
    forwards: Sequence[Forward] = ()  # what was not finite in each


def figures_of(readings: Readings, skips: Skips | None = None) -> Figures:
    """The figures that `readings`, which are on the host, amount to."""
    norms = {name: float(norm) for name, norm in readings.norms.items() if not norm < 0}
    before_clip = {name: readings.norms_before_clip.get(name, -1.0) for name in norms}
    ratios = {name: float(ratio) for name, ratio in readings.update_ratios.items()}
    scale, skipped = 1.0, None
    if readings.scaling is not None:
        scale, clean = map(float, readings.scaling.state)
        if skips is not None:
            skipped = skips.look(readings.scaling, scale, clean)
    layers: dict[str, list[float]] = {}
    for name, norm in norms.items():
        layers.setdefault(name.rpartition(".")[0] or "root", []).append(norm)
    is_whole = norms and not any(norm < 0 for norm in before_clip.values())
    maps = dict(readings.attention)
    for path in readings.doubts:
        maps[path] = attention.without_doubt(maps[path])
    maps = {path: sums for path, sums in maps.items() if sums.numel()}
    activations, nonfinite = {}, {}
    for drawn, found in readings.histograms.items():
        low, high, count, *_, lost = found.summary.tolist()
        if drawn.group == "activations" and count > 1:
            activations[drawn.name] = low, high
        if lost:
            nonfinite[drawn] = lost
    return Figures(
        metrics={name: float(value) for name, value in readings.metrics.items()},
        learning_rates=_rates(readings, readings.learning_rates),
        base_rates={g: rate for g, rate in readings.base_rates.items() if isinstance(rate, float)},
        norms=norms,
        layers={layer: sum(own) / len(own) for layer, own in layers.items()},
        effective_rates=_rates(readings, readings.effective_rates),
        total_norm=math.hypot(*norms.values()) if norms else None,
        total_norm_before_clip=math.hypot(*before_clip.values()) / scale if is_whole else None,
        update_ratios={name: ratio for name, ratio in ratios.items() if not ratio < 0},
        skipped_steps=skipped,
        attention=attention.whole(maps),
        heads={path: attention.of_heads(sums) for path, sums in maps.items()},
        no_maps=[doubt for path, doubt in readings.doubts.items() if path not in maps],
        uncertainty={
            kind: float(sum_ / n) for kind, (sum_, n) in readings.uncertainty.items() if n
        },
        histograms=readings.histograms,
        activations=activations,
        nonfinite=nonfinite,
        forwards=readings.forwards,
    )


def _rates(readings: Readings, rates: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The rates by group; of optimizers in a backward pass one of each value, the first one's."""
    found = {group: float(rate) for group, rate in rates.items()}
    if not readings.in_backward:
        return found
    first: dict[float, str] = {}
    for group in sorted(found, key=_number):
        first.setdefault(found[group], group)
    return {group: rate for rate, group in first.items()}


def _number(group: str) -> int:
    """That of the optimizer which the name of a group begins with; 0 for the first one."""
    number, slash, _ = group.partition("/")
    return int(number) if slash and number.isdigit() else 0
