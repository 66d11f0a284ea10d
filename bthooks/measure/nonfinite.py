"""Non-finite values: which module of a forward was the first to make one, and of what. Pure.

In: min and max of what each call of a module was given and returned, on their devices: two numbers
tell, and no wait. Out, on the host: the module, and whether its own parameters or the data did it.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtypes import as_real


class Extremes(NamedTuple):
    """The min and max of a tensor, 0-d each; both NaN if any value is."""

    low: Tensor
    high: Tensor

    def is_nan(self) -> bool:
        return math.isnan(self.low)

    def is_fault(self) -> bool:
        """Whether it holds NaN or inf, or nothing but -inf; among other values -inf is a mask."""
        return self.is_nan() or math.isinf(self.high)


class Call(NamedTuple):
    """A call of a module."""

    path: str
    given: list[Extremes]  # of its arguments, as they were before it ran
    made: list[Extremes]  # of what it returned

    def began(self, is_bad: Callable[[Extremes], bool]) -> bool:
        """Whether it made such values, and was given none."""
        return any(map(is_bad, self.made)) and not any(map(is_bad, self.given))


class Fault(NamedTuple):
    """The first module whose output is not finite."""

    path: str
    names: tuple[str, ...]  # of its own parameters and buffers that are not finite
    given: str  # its arguments are "finite", "masked" (some are -inf) or "not finite"
    compiled: tuple[str, ...]  # modules in it, which were not looked into


@dataclass
class Forward:
    """What the modules made in one forward."""

    # As they ended, that of the model last; none where what it returned was seen to be finite.
    calls: list[Call] = field(default_factory=list)
    owned: dict[str, Extremes] = field(default_factory=dict)  # by parameter or buffer name
    compiled: list[str] = field(default_factory=list)  # paths of modules

    def mapped(self, function: Callable[[Tensor], Any]) -> "Forward":
        """The same with `function` of each tensor in it."""

        def pairs(of: Iterable[Extremes]) -> list[Extremes]:
            return [Extremes(function(low), function(high)) for low, high in of]

        calls = [Call(path, pairs(given), pairs(made)) for path, given, made in self.calls]
        owned = dict(zip(self.owned, pairs(self.owned.values()), strict=True))
        return Forward(calls, owned, self.compiled)

    def fault(self) -> Fault | None:
        """What went wrong first; None where the model returned finite values all the same."""
        is_fault, is_nan = Extremes.is_fault, Extremes.is_nan
        if not self.calls or not any(map(is_fault, self.calls[-1].made)):
            return None
        first = next((call for call in self.calls if call.began(is_fault)), self.calls[-1])
        first_nan = next((call for call in self.calls if call.began(is_nan)), first)
        # An inf that an earlier call made did no harm, unless this one was given it.
        path, given, _ = first if any(map(is_fault, first_nan.given)) else first_nan
        called = {call.path for call in self.calls}
        own = [n for n, p in self.owned.items() if p.is_fault() and _owner(n, called) == path]
        inside = [place for place in self.compiled if _owner(f"{place}.", called) == path]
        if any(map(is_fault, given)):
            return Fault(path, (), "not finite", tuple(inside))
        masked = any(pair.low == -math.inf for pair in given)
        return Fault(path, tuple(own), "masked" if masked else "finite", tuple(inside))


def extremes(tensor: Tensor) -> Extremes:
    """Of a floating-point or complex tensor, in one pass: an eighth of what `isfinite` takes."""
    return Extremes(*torch.aminmax(as_real(tensor)))


def _owner(name: str, called: Collection[str]) -> str:
    """The innermost module above a parameter that was called."""
    while name := name.rpartition(".")[0]:
        if name in called:
            return name
    return "root"
