"""Figures: the numbers of one step on the host, by name.

These are what is judged (`health`) and what is written (`record`); no tag is made here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import attention, gradients
from .attention import Head
from .histograms import Histogram
from .nonfinite import Forward
from .readings import Drawn, Readings
from .scaling import Skips


@dataclass
class Figures:
    """What is known of one step, as floats; what was not measured is not there.

    Attributes:
        learning_rates, base_rates: group -> the rate used, and the one a scheduler was given.
        norms, update_ratios: by parameter.
        layers: module -> mean norm of its own parameters' gradients.
        attention: module -> statistic -> value.
        heads: module -> what its heads are judged by.
        no_maps: what turned out to be no attention: to be warned of, by site and reason.
        uncertainty: kind -> mean.
        calibration: statistic -> value.
        chance: the calibration error that a model may have that is right as often as it says.
        activations: module -> the least and the largest value, where there are several values.
        forwards: what was not finite in each.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    base_rates: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    total_norm: float | None = None
    total_norm_before_clip: float | None = None
    update_ratios: Mapping[str, float] = field(default_factory=dict)
    skipped_steps: int | None = None
    attention: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    heads: Mapping[str, Sequence[Head]] = field(default_factory=dict)
    no_maps: Sequence[tuple[str, str]] = ()
    uncertainty: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, float] = field(default_factory=dict)
    chance: float = 0.0
    histograms: Mapping[Drawn, Histogram] = field(default_factory=dict)
    activations: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    forwards: Sequence[Forward] = ()


def figures_of(readings: Readings, skips: Skips | None = None) -> Figures:
    """The figures that `readings`, which are on the host, amount to.

    Args:
        skips: counts the steps that a loss scaler skipped.
    """
    norms = {name: float(norm) for name, norm in readings.norms.items()}
    before_clip = {name: float(norm) for name, norm in readings.norms_before_clip.items()}
    ratios = {name: float(ratio) for name, ratio in readings.update_ratios.items()}
    scale, skipped = 1.0, None
    if readings.scaling is not None:
        scale, clean, overflow = map(float, readings.scaling.state)
        if skips is not None:
            skipped = skips.look(readings.scaling, scale, clean)
        if overflow:  # a fused optimizer was called, and did nothing
            norms, before_clip, ratios = {}, {}, {}
    norms = {name: norm for name, norm in norms.items() if not norm < 0}
    totals = gradients.totals(norms, before_clip, scale)
    maps = dict(readings.attention)
    for path in readings.doubts:
        maps[path] = attention.without_doubt(maps[path])
    no_maps = [doubt for path, doubt in readings.doubts.items() if not maps[path].numel()]
    maps = {path: accumulators for path, accumulators in maps.items() if accumulators.numel()}
    summaries = {
        drawn.name: found.summary.tolist()
        for drawn, found in readings.histograms.items()
        if drawn.group == "activations"
    }
    return Figures(
        metrics={name: float(value) for name, value in readings.metrics.items()},
        learning_rates={group: float(rate) for group, rate in readings.learning_rates.items()},
        base_rates={g: rate for g, rate in readings.base_rates.items() if isinstance(rate, float)},
        norms=norms,
        layers=totals.layers,
        total_norm=totals.total_norm,
        total_norm_before_clip=totals.before_clip,
        update_ratios=ratios,
        skipped_steps=skipped,
        attention=attention.whole(maps),
        heads={path: attention.of_heads(accumulators) for path, accumulators in maps.items()},
        no_maps=no_maps,
        uncertainty={
            kind: float(sum_ / n) for kind, (sum_, n) in readings.uncertainty.items() if n
        },
        histograms=readings.histograms,
        activations={path: (low, high) for path, (low, high, n, *_) in summaries.items() if n > 1},
        forwards=readings.forwards,
    )
