"""Figures: the numbers of one step on the host, by name, of the whole job.

These are what is judged (`health`) and what is written (`record`); no tag is made here.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor

from ..names import layer_of
from . import attention
from .attention import Head
from .histograms import Histogram
from .nonfinite import Forward
from .ranks import Job, Series
from .readings import NO_RATE, Drawn, Readings
from .scaling import Skips


@dataclass
class OfRank:
    """What is judged of each rank: put together, what is wrong on one would be hidden."""

    heads: Mapping[str, Mapping[int, Head]]  # module -> by number
    # module -> the min and max, where there are several values
    activations: Mapping[str, tuple[float, float]]
    forwards: Sequence[Forward]  # what was not finite in each


@dataclass
class Figures:
    """What is known of one step, as floats; what was not measured is not there."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # group ->
    base_rates: Mapping[str, float] = field(default_factory=dict)  # that a scheduler was given
    effective_rates: Mapping[str, float] = field(default_factory=dict)  # group -> `d * lr`
    norms: Mapping[str, float] = field(default_factory=dict)  # parameter ->
    layers: Mapping[str, float] = field(default_factory=dict)  # module -> mean of its own norms
    layers_before_clip: Mapping[str, float] = field(default_factory=dict)
    total_norm: float | None = None
    total_norm_before_clip: float | None = None
    update_ratios: Mapping[str, float] = field(default_factory=dict)  # parameter ->
    are_updates_asked: bool = False  # or they are known for judgement alone, of a few
    layer_updates: Mapping[str, float] = field(default_factory=dict)  # module -> of all its own
    sizes: Mapping[str, float] = field(default_factory=dict)  # parameter -> norm, if it is known
    gaps: Mapping[str, str] = field(default_factory=dict)  # parameter -> why it does not learn
    ran: Mapping[str, int] = field(default_factory=dict)  # module -> when its first call ended
    loss: float | None = None
    skipped_steps: int | None = None
    # module -> statistic ->
    attention: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    heads: Mapping[str, Sequence[Head]] = field(default_factory=dict)  # module ->
    # What is to be warned of, by site and reason, as of what turned out to be no attention.
    unsaid: Sequence[tuple[str, str]] = ()
    uncertainty: Mapping[str, float] = field(default_factory=dict)  # kind -> mean
    calibration: Mapping[str, float] = field(default_factory=dict)  # statistic ->
    chance: float = 0.0  # the calibration error of a model that is right as often as it says
    histograms: Mapping[Drawn, Histogram] = field(default_factory=dict)
    nonfinite: Mapping[Drawn, float] = field(default_factory=dict)  # how many values, unless none
    ranks: Mapping[int, OfRank] = field(default_factory=dict)
    alone: Set[int] = frozenset()  # the ranks that have a tensor of which there is no copy


def figures_of(
    by_rank: Mapping[int, Readings], skips: Skips | None = None, is_all: bool = True
) -> Figures:
    """The figures that the readings of the ranks, which are on the host, amount to.

    Unless they are of all ranks that have tensors of their own (`is_all`) they have no total.
    """
    job = Job({rank: readings.settled() for rank, readings in by_rank.items()})
    norms, before_clip = job.norms("norms"), job.norms("norms_before_clip")
    changes, sizes = job.norms("changes"), job.norms("sizes")
    scale, skipped = 1.0, None
    scaling = next((found.scaling for found in job.by_rank.values() if found.scaling), None)
    if scaling is not None:
        scale, clean = map(float, scaling.state)
        if skips is not None:
            skipped = skips.look(scaling, scale, clean)
    layers = _by_layer(norms)
    for name in job.partial:
        layers.pop(_layer(Series(name)), None)
    is_all = is_all and not job.partial and bool(norms)
    is_all_before = is_all and norms.keys() <= before_clip.keys() and not job.is_reduced_late
    maps, headless = job.maps()
    heads = attention.of_heads(maps)
    histograms = job.histograms()
    known = {series: change for series, change in changes.items() if series in sizes}
    size_of = _by_layer({series: sizes[series] for series in known})
    return Figures(
        metrics={n: float(v) for found in job.by_rank.values() for n, v in found.metrics.items()},
        learning_rates=_of_all(job, lambda found: _rates(found, found.learning_rates)),
        base_rates=_of_all(job, lambda found: _known(found.base_rates)),
        effective_rates=_of_all(job, lambda found: _rates(found, found.effective_rates)),
        norms={"".join(series): norm for series, norm in norms.items()},
        layers=_means(layers),
        layers_before_clip=(
            _means(_by_layer(before_clip)) if norms.keys() <= before_clip.keys() else {}
        ),
        total_norm=math.hypot(*norms.values()) if is_all else None,
        total_norm_before_clip=(
            math.hypot(*map(before_clip.__getitem__, norms)) / scale if is_all_before else None
        ),
        update_ratios={
            "".join(series): _ratio(change, sizes[series]) for series, change in known.items()
        },
        are_updates_asked=any(found.are_updates_asked for found in job.by_rank.values()),
        layer_updates={
            layer: _ratio(math.hypot(*of), math.hypot(*size_of[layer]))
            for layer, of in _by_layer(known).items()
        },
        sizes={"".join(series): size for series, size in sizes.items()}
        | {
            name: float(found.sizes[name])
            for found in job.by_rank.values()
            for name in found.gaps.keys() & found.sizes.keys()
        },
        gaps={
            name: why
            for found in job.by_rank.values()
            for name, why in found.gaps.items()
            if why == NO_RATE or not any(name in other.norms for other in job.by_rank.values())
        },
        ran={p: at for found in job.by_rank.values() for p, at in found.ran.items()},
        loss=next((sum_ / (n or 1) for sum_, n in _sums_of(job, "losses").values()), None),
        skipped_steps=skipped,
        attention=attention.whole(maps),
        heads=heads,
        unsaid=[*_unsaid(job), *((f"attention of {path}", _HEADLESS) for path in headless)],
        uncertainty={k: sum_ / n for k, (sum_, n) in _sums_of(job, "uncertainty").items() if n},
        histograms=histograms,
        nonfinite={
            d: lost for d, found in histograms.items() if (lost := float(found.summary[-1]))
        },
        ranks={
            rank: _of_rank(job, rank, heads if len(job.by_rank) == 1 else None)
            for rank in job.by_rank
        },
        alone=job.alone,
    )


_HEADLESS = "left out: some of its heads are on ranks of which nothing is known"


def _by_layer(norms: Mapping[Series, float]) -> dict[str, list[float]]:
    layers: dict[str, list[float]] = {}
    for series, norm in norms.items():
        layers.setdefault(_layer(series), []).append(norm)
    return layers


def _means(layers: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {layer: sum(own) / len(own) for layer, own in layers.items()}


def _sums_of(job: Job, what: str) -> dict[str, list[float]]:
    """Over all ranks, of what each has sums and counts of, by kind."""
    totals: dict[str, list[float]] = {}
    for rank in job.distinct(job.by_rank):
        for kind, (sum_, count) in getattr(job.by_rank[rank], what).items():
            total = totals.setdefault(kind, [0.0, 0.0])
            total[0], total[1] = total[0] + float(sum_), total[1] + float(count)
    return totals


def layer_means(norms: Mapping[str, float]) -> dict[str, float]:
    """By module the mean norm of its own parameters."""
    return _means(_by_layer({Series(name): norm for name, norm in norms.items()}))


def _layer(series: Series) -> str:
    return layer_of(series.name) + series.suffix


def _ratio(change: float, size: float) -> float:
    if size:
        return change / size
    return math.inf if change else math.nan


def _known(rates: Mapping[str, Tensor | float]) -> dict[str, float]:
    return {group: rate for group, rate in rates.items() if isinstance(rate, float)}


def _of_all(job: Job, rates: Callable[[Readings], dict[str, float]]) -> dict[str, float]:
    """The rates by group, also those of other ranks that differ from the first one's."""
    found: dict[str, float] = {}
    for rank, readings in job.by_rank.items():
        for group, rate in rates(readings).items():
            if found.setdefault(group, rate) != rate:
                found[f"{group}/rank{rank}"] = rate
    return found


def _of_rank(job: Job, rank: int, known: Mapping[str, Sequence[Head]] | None) -> OfRank:
    """What is judged of a rank, whose heads may be known already."""
    readings = job.by_rank[rank]
    heads = {}
    for path, found in (known or attention.of_heads(readings.attention)).items():
        part = readings.heads.get(path)
        first = 0 if part is None else part.place * len(found)
        heads[path + job.suffix(path, rank)] = dict(enumerate(found, first))
    activations = {}
    for drawn, histogram in readings.histograms.items():
        low, high, count, *_ = histogram.summary.tolist()
        if drawn.group == "activations" and count > 1:
            activations[drawn.name + job.suffix(drawn.name, rank)] = low, high
    return OfRank(heads, activations, readings.forwards)


def _unsaid(job: Job) -> list[tuple[str, str]]:
    """What is to be said of how the ranks' numbers went together."""
    found = [doubt for readings in job.by_rank.values() for doubt in readings.doubts.values()]
    if job.differing:
        (name, (one, other)), *_ = job.differing.items()
        found.append(
            (
                "gradients differ between ranks",
                f"that of {name} on ranks {one} and {other}, {len(job.differing)} in all, though "
                "these parameters are the same there, as where gradients are reduced in the "
                f"optimizer's step: what is written is rank {one}'s",
            )
        )
    if job.is_reduced_late:
        found.append(
            (
                "gradients/total_norm_before_clip",
                "left out: at the end of backward() the gradients of one parameter differ between "
                "ranks: they are reduced later",
            )
        )
    if several := list(dict.fromkeys(name for name, suffix in job.copies if suffix)):
        found.append(
            (
                "one name on several ranks",
                f"{several[0]}, {len(several)} in all, is not the same tensor on each: there is a "
                "series for each, which ends with /rank<k>",
            )
        )
    if job.partial:
        found.append(
            (
                "parts of parameters",
                f"left out: {job.partial[0]}, {len(job.partial)} in all, and totals: other parts "
                "of these are on ranks of which nothing is known",
            )
        )
    return found


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
