"""Readings: what was measured for one step, by name, as small tensors on their devices.

A step is made of several forwards (micro-batches) and optimizers, so what is kept are accumulators
that merge: sums with counts, never averages. What they amount to is said in `figures.py`.
"""

import copy
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..names import distinct
from . import attention
from .dtypes import widened
from .histograms import Histogram, histogram
from .nonfinite import Forward
from .scaling import Scaling
from .sharded import Part, readable

# Why a parameter that is to be trained does not learn at a step.
NO_GRADIENT = "in an optimizer, and has never had a gradient"
NO_OPTIMIZER = "has gradients, and is in no optimizer"
NO_RATE = "the learning rate of its group is 0"  # which is on purpose

# Bounds for a training loop in which no optimizer ever steps.
_SAMPLES, _FORWARDS = 1 << 20, 64


class Drawn(NamedTuple):
    """Of what a histogram is."""

    group: str  # "parameters", "gradients", "activations" or "uncertainty"
    name: str  # of the parameter, the module or the kind of uncertainty


def _joined(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b]) if a.numel() < _SAMPLES else a


# How two forwards or optimizers of one step go together; of all else the later one stays.
_MERGED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uncertainty": torch.add,
    "losses": torch.add,
    "attention": attention.merge,
    "samples": _joined,
}

_PLAIN = ("parts", "gaps", "ran", "heads", "doubts")  # which hold no tensor


@dataclass
class Readings:
    """What was measured for one step. Tensors stay on their devices until they are transferred."""

    metrics: dict[str, Tensor | float] = field(default_factory=dict)  # name -> 0-d
    learning_rates: dict[str, Tensor | float] = field(default_factory=dict)  # group -> 0-d
    base_rates: dict[str, Tensor | float] = field(default_factory=dict)  # that of a scheduler
    effective_rates: dict[str, Tensor | float] = field(default_factory=dict)  # `d * lr`
    # Whether its optimizers, one for each parameter, stepped within one backward pass.
    in_backward: bool = False
    uncertainty: dict[str, Tensor] = field(default_factory=dict)  # kind -> (2,): sum, count
    losses: dict[str, Tensor] = field(default_factory=dict)  # of the output, "loss" -> the same
    # Of what this rank has of each parameter, by its name, 0-d each; -1 where nothing is updated.
    norms: dict[str, Tensor] = field(default_factory=dict)  # of the gradient
    norms_before_clip: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Tensor] = field(default_factory=dict)  # norms of the updates
    sizes: dict[str, Tensor] = field(default_factory=dict)  # norms of the parameters
    are_updates_asked: bool = False  # or what is known of them is for judgement alone
    gaps: dict[str, str] = field(default_factory=dict)  # parameter -> why it does not learn here
    ran: dict[str, int] = field(default_factory=dict)  # module -> when its first call ended
    parts: dict[str, Part] = field(default_factory=dict)  # of those that are not whole here
    attention: dict[str, Tensor] = field(default_factory=dict)  # module -> its accumulators
    heads: dict[str, Part] = field(default_factory=dict)  # module -> if there are others elsewhere
    # Of a map that may turn out to be none: what is to be warned of then, by site and reason.
    doubts: dict[str, tuple[str, str]] = field(default_factory=dict)  # module ->
    histograms: dict[Drawn, Histogram] = field(default_factory=dict)
    samples: dict[Drawn, Tensor] = field(default_factory=dict)  # (n,), drawn as a histogram
    forwards: list[Forward] = field(default_factory=list)  # what was not finite in each
    scaling: Scaling | None = None  # of the loss

    def merge(self, other: "Readings") -> None:
        """Take in what another forward or optimizer brought to the same step."""
        for name, part in vars(other).items():
            if isinstance(part, dict):
                mine, both = getattr(self, name), _MERGED.get(name)
                for key, value in part.items():
                    mine[key] = both(mine[key], value) if both and key in mine else value
        self.forwards += [f for f in other.forwards if f.calls or not self.forwards]
        del self.forwards[_FORWARDS:]
        self.scaling = other.scaling or self.scaling
        self.in_backward |= other.in_backward
        self.are_updates_asked |= other.are_updates_asked

    def settled(self) -> "Readings":
        """On the host: without what was no attention, and what was finite in each forward."""
        maps = dict(self.attention)
        for path in self.doubts.keys() & maps.keys():
            maps[path] = attention.without_doubt(maps[path])
        maps = {path: sums for path, sums in maps.items() if sums.numel()}
        doubts = {path: doubt for path, doubt in self.doubts.items() if path not in maps}
        forwards = [found if found.fault() else Forward() for found in self.forwards]
        return replace(self, attention=maps, doubts=doubts, forwards=forwards)

    def take_uncertainty(self) -> "Readings":
        """What is measured of the uncertainty, which is no longer here."""
        taken = Readings(uncertainty=self.uncertainty, samples=self.samples)
        self.uncertainty, self.samples = {}, {}
        return taken

    def take_rates(self, rates: "Rates") -> None:
        """Take in the rates of one more optimizer."""
        self.learning_rates |= rates.nominal
        self.base_rates |= rates.base
        self.effective_rates |= rates.effective

    def mapped(self, function: Callable[[Tensor], Any]) -> "Readings":
        """The same with `function` of each tensor in it, always in one order."""

        def each(value: Any) -> Any:
            if isinstance(value, Histogram):
                return Histogram(*map(function, value))
            return function(value) if isinstance(value, Tensor) else value

        # Copied first: another thread that runs the model may merge into them meanwhile.
        parts = {name: copy.copy(part) for name, part in vars(self).items()}
        forwards, scaling = parts.pop("forwards"), parts.pop("scaling")
        in_backward, are_updates_asked = parts.pop("in_backward"), parts.pop("are_updates_asked")
        named = {
            n: part if n in _PLAIN else {key: each(v) for key, v in part.items()}
            for n, part in parts.items()
        }
        return Readings(
            **named,
            forwards=[forward.mapped(function) for forward in forwards],
            scaling=scaling and scaling._replace(state=function(scaling.state)),
            in_backward=in_backward,
            are_updates_asked=are_updates_asked,
        )


class Rates(NamedTuple):
    """The learning rates of an optimizer, by group."""

    nominal: dict[str, Tensor | float]  # 0-d
    base: dict[str, Tensor | float]  # that a scheduler was given
    effective: dict[str, Tensor | float]  # `d * lr`, where the optimizer estimates a `d`

    def of_several(self, number: int) -> "Rates":
        """The same where there are other optimizers: the first one's groups keep their names."""
        if not number:
            return self
        return Rates(*({f"{number}/{group}": r for group, r in rates.items()} for rates in self))


def rates_of(optimizer: Optimizer) -> Rates:
    """The rates that `optimizer` has now; Adafactor's own business is none."""
    groups = optimizer.param_groups
    names = distinct(str(group.get("name", at)) for at, group in enumerate(groups))
    named = dict(zip(names, groups, strict=True))

    def of(*keys: str) -> dict[str, Tensor | float]:
        found = {name: [group.get(key) for key in keys] for name, group in named.items()}
        is_there = {name: all(r is not None for r in rates) for name, rates in found.items()}
        return {name: _product(rates) for name, rates in found.items() if is_there[name]}

    return Rates(of("lr"), of("initial_lr"), of("d", "lr"))


def _product(factors: list[Any]) -> Tensor | float:
    product = functools.reduce(operator.mul, factors)
    # A scheduler changes a tensor rate in place: hence the copy.
    return product.detach().clone() if isinstance(product, Tensor) else float(product)


def parameter_histograms(names: Mapping[nn.Parameter, str]) -> dict[Drawn, Histogram]:
    """The histograms of the parameters and of the gradients that are there."""
    found = {Drawn("parameters", name): histogram(readable(p)) for p, name in names.items()}
    return found | {
        Drawn("gradients", name): histogram(readable(p.grad))
        for p, name in names.items()
        if p.grad is not None
    }


@torch.no_grad()
def uncertainties(found: Mapping[str, Tensor], distributions: bool = True) -> Readings:
    """The sums and distributions of the uncertainties by kind; both kinds add up to the total."""
    values = {kind: v.detach().to(widened(v.dtype)) for kind, v in found.items()}
    both = [values[kind] for kind in ("epistemic", "aleatoric") if kind in values]
    if len(both) == 2 and both[0].shape == both[1].shape:
        values.setdefault("total", both[0] + both[1])
    sums = {kind: torch.stack([v.sum(), v.new_full((), v.numel())]) for kind, v in values.items()}
    drawn = values if distributions else {}
    # A copy: the caller may overwrite its tensor before the step is over.
    samples = {Drawn("uncertainty", kind): v.flatten().clone() for kind, v in drawn.items()}
    return Readings(uncertainty=sums, samples=samples)


@torch.no_grad()
def losses(output: Any, is_share: bool) -> dict[str, Tensor]:
    """The scalar `loss` of a model's output, a dict's key or an attribute, as its sum and count.

    That of a micro-batch which `is_share` of the whole batch's counts 0: they add up to it.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return {}
    value = loss.detach().reshape(()).to(widened(loss.dtype))
    return {"loss": torch.stack([value, torch.full_like(value, not is_share)])}
