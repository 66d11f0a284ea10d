"""Readings: what was measured for one step, and the event that it amounts to.

In: measures by name, small tensors on their devices. Out: `Event`, after one device-to-host copy.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..health.conditions import Figures
from ..names import distinct
from ..record.images import heat_map
from ..record.transfer import Transfer
from ..record.writers import Event
from . import attention, gradients
from .histograms import Histogram, histogram
from .nonfinite import Forward
from .scaling import Scaling, Skips
from .sharded import readable

# Of forwards without end, and no optimizer step.
_SAMPLES, _FORWARDS = 1 << 20, 64


@dataclass
class Readings:
    """What was measured for one step. Tensors stay on their devices until `compose`."""

    scalars: dict[str, Tensor | float] = field(default_factory=dict)  # tag -> 0-d
    base_rates: dict[str, Tensor | float] = field(default_factory=dict)  # tag -> a scheduler's
    means: dict[str, Tensor] = field(default_factory=dict)  # tag -> (2,): sum, count
    norms: dict[str, Tensor] = field(default_factory=dict)  # parameter name -> 0-d
    unclipped: dict[str, Tensor] = field(default_factory=dict)  # the same, before clipping
    scaling: Scaling | None = None  # of the loss
    attention: dict[str, Tensor] = field(default_factory=dict)  # module path -> (heads, 15)
    histograms: dict[str, Histogram] = field(default_factory=dict)  # tag -> buckets
    samples: dict[str, Tensor] = field(default_factory=dict)  # tag -> (n,), drawn as histogram
    forwards: list[Forward] = field(default_factory=list)  # what was not finite in each
    # By path of a map that may turn out to be none, what is to be said then; on the host, of those
    # that did.
    doubts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def merge(self, other: "Readings") -> None:
        """Take in what another forward or optimizer brought to the same step."""
        for tag, sums in other.means.items():
            self.means[tag] = self.means[tag] + sums if tag in self.means else sums
        for path, sums in other.attention.items():
            mine = self.attention.get(path)
            self.attention[path] = sums if mine is None else attention.merge(mine, sums)
        for tag, values in other.samples.items():
            mine = self.samples.get(tag)
            if mine is None:
                self.samples[tag] = values
            elif mine.numel() < _SAMPLES:
                self.samples[tag] = torch.cat([mine, values])
        self.forwards += [f for f in other.forwards if f.calls or not self.forwards]
        del self.forwards[_FORWARDS:]
        self.scalars |= other.scalars
        self.base_rates |= other.base_rates
        self.norms |= other.norms
        self.unclipped |= other.unclipped
        self.scaling = other.scaling or self.scaling
        self.histograms |= other.histograms
        self.doubts |= other.doubts


class Reading:
    """`readings` on their way to the host: one device-to-host copy per device."""

    def __init__(self, readings: Readings) -> None:
        # Another thread that runs the model may still merge into these.
        copies = {name: copy.copy(value) for name, value in vars(readings).items()}
        self._readings = r = Readings(**copies)
        self._histograms = r.histograms | {tag: histogram(v) for tag, v in r.samples.items()}
        self._scalars = {tag: v for tag, v in r.scalars.items() if isinstance(v, Tensor)}
        by_name = (self._scalars, r.means, r.norms, r.unclipped, r.attention)
        tensors = [tensor for part in by_name for tensor in part.values()]
        tensors += [tensor for part in self._histograms.values() for tensor in part]
        tensors += [tensor for forward in r.forwards for tensor in forward.tensors()]
        tensors += [r.scaling.state] if r.scaling else []
        self._transfer = Transfer(tensors)

    def is_done(self) -> bool:
        """Whether `result()` need not wait."""
        return self._transfer.is_done()

    def result(self) -> Readings:
        """The readings in float64 on the host."""
        r, host = self._readings, iter(self._transfer.result())
        by_name = (self._scalars, r.means, r.norms, r.unclipped, r.attention)
        scalars, means, norms, unclipped, maps = ({key: next(host) for key in p} for p in by_name)
        doubtful = {path: attention.without_doubt(maps[path]) for path in r.doubts if path in maps}
        lost = [path for path, sums in doubtful.items() if not len(sums)]
        maps |= doubtful
        return Readings(
            r.scalars | scalars,
            r.base_rates,
            means,
            norms,
            unclipped,
            attention={path: sums for path, sums in maps.items() if path not in lost},
            histograms={
                tag: Histogram(*(next(host) for _ in part))
                for tag, part in self._histograms.items()
            },
            forwards=[forward.on_host(host) for forward in r.forwards],
            scaling=r.scaling._replace(state=next(host)) if r.scaling else None,
            doubts={path: r.doubts[path] for path in lost},
        )


def read(readings: Readings) -> Readings:
    """`readings` on the host, in float64."""
    return Reading(readings).result()


def compose(
    readings: Readings, *, model: bool = False, images: bool = False, skips: Skips | None = None
) -> Event:
    """The event that `readings`, which are on the host, amount to.

    Args:
        model: the readings are of all layers: with the figures over them.
        images: with the heat map of all heads.
        skips: what counts the steps that a loss scaler skipped.
    """
    scalars = {tag: float(value) for tag, value in readings.scalars.items()}
    for tag, (total, count) in readings.means.items():
        if count:
            scalars[tag] = float(total / count)
    norms = {name: float(norm) for name, norm in readings.norms.items()}
    unclipped = {name: float(norm) for name, norm in readings.unclipped.items()}
    scale = 1.0
    if readings.scaling is not None:
        scale, clean, overflow = map(float, readings.scaling.state)
        if skips is not None:
            scalars["gradients/skipped_steps"] = skips.look(readings.scaling, scale, clean)
        if overflow:  # a fused optimizer was called, and did nothing
            norms, unclipped = {}, {}
            applied = [name for name in scalars if name.startswith("gradients/update_ratio/")]
            scalars = {name: value for name, value in scalars.items() if name not in applied}
    scalars |= {f"gradients/norm/{name}": norm for name, norm in norms.items() if not norm < 0}
    summary = gradients.summarize(norms, unclipped, scale)
    scalars |= {f"gradients/{name}": value for name, value in summary.items()}
    stats = attention.whole(readings.attention)
    for path, found in stats.items():
        told = {k: value for k, value in found.items() if value or k != "dead_rows"}  # else zeros
        scalars |= {f"attention/{name}/{path}": value for name, value in told.items()}
    entropies = [found["entropy"] for found in stats.values() if "entropy" in found]
    if model and entropies:
        scalars["attention/mean_entropy"] = sum(entropies) / len(entropies)
    drawn = {}
    if images and stats:
        rows = [attention.finalize(sums)["entropy"] for sums in readings.attention.values()]
        drawn["attention/head_entropy"] = heat_map(rows)
    for tag, found_ in readings.histograms.items():
        if nonfinite := float(found_.summary[5]):
            scalars[f"health/nonfinite/{tag.replace('/distribution', '', 1)}"] = nonfinite
    return Event(scalars, readings.histograms, drawn)


def figures(readings: Readings, event: Event) -> Figures:
    """What `readings`, which are on the host and amount to `event`, are judged by."""
    start = "activations/"
    summaries = {
        tag.removeprefix(start): found.summary.tolist()
        for tag, found in readings.histograms.items()
        if tag.startswith(start)
    }
    return Figures(
        event.scalars,
        {path: attention.of_heads(sums) for path, sums in readings.attention.items()},
        {path: (low, high) for path, (low, high, count, *_) in summaries.items() if count > 1},
        readings.forwards,
        base_rates={t: rate for t, rate in readings.base_rates.items() if isinstance(rate, float)},
    )


def learning_rates(
    optimizer: Optimizer, index: int = 0, key: str = "lr"
) -> dict[str, Tensor | float]:
    """The rate of each group by tag; `index` numbers the optimizer where there are several."""
    groups = optimizer.param_groups
    names = distinct(str(group.get("name", at)) for at, group in enumerate(groups))
    start = f"learning_rate/{index}/" if index else "learning_rate/"
    rates = (group.get(key) for group in groups)
    # A scheduler changes a tensor rate in place: hence the copy.
    return {
        start + name: rate.detach().clone() if isinstance(rate, Tensor) else float(rate)
        for name, rate in zip(names, rates, strict=True)
        if rate is not None  # it is the optimizer's own business, as in Adafactor
    }


def parameter_histograms(names: Mapping[nn.Parameter, str]) -> dict[str, Histogram]:
    """The histograms of the parameters and of the gradients that are there, by tag."""
    found = {f"parameters/{name}": histogram(readable(p)) for p, name in names.items()}
    return found | {
        f"gradients/distribution/{name}": histogram(readable(p.grad))
        for p, name in names.items()
        if p.grad is not None
    }


@torch.no_grad()
def uncertainties(found: Mapping[str, Tensor], distributions: bool = True) -> Readings:
    """The means and distributions of the uncertainties by kind; both kinds add up to the total."""
    values = {
        kind: v.detach().to(torch.promote_types(v.dtype, torch.float32))
        for kind, v in found.items()
    }
    both = [values[kind] for kind in ("epistemic", "aleatoric") if kind in values]
    if len(both) == 2 and both[0].shape == both[1].shape and "total" not in values:
        values["total"] = both[0] + both[1]
    readings = Readings()
    for kind, v in values.items():
        readings.means[f"uncertainty/{kind}"] = torch.stack([v.sum(), v.new_full((), v.numel())])
        if distributions:
            # A copy: the caller may overwrite its tensor before the step is over.
            readings.samples[f"uncertainty/distribution/{kind}"] = v.flatten().clone()
    return readings
