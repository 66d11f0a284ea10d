"""Scaling: the loss scaler that an optimizer steps under, and the steps that it skipped.

A skipped step leaves no trace but in the scaler's own state, which changes in place on the device.
"""

import gc
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..torch_private import scaler_state
from .histograms import Histogram, histogram


class Scaling(NamedTuple):
    """The state of a scaler at one optimizer step."""

    state: Tensor  # (2,): scale, clean steps since it grew or shrank
    steps: int  # the optimizer steps before this one
    initial: float  # this and what follows as `torch.amp.GradScaler` has it
    growth: float
    backoff: float
    interval: int


def is_any_scaler() -> bool:
    """Whether a scaler exists anywhere in the process."""
    return any(
        issubclass(type(found), GradScaler) and found.is_enabled() for found in gc.get_objects()
    )


class LossScale(NamedTuple):
    """What a fused optimizer, which unscales the gradients itself, knows of the loss in a step."""

    scale: Tensor | None  # by which the loss was multiplied, if the gradients still are
    found_inf: Tensor | None  # above 0: a gradient is not finite, and nothing will be updated

    @classmethod
    def of(cls, optimizer: Optimizer | None) -> "LossScale":
        """What a loss scaler has told `optimizer`."""
        told = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        return cls(*(None if value is None else torch.as_tensor(value) for value in told))

    def unscaled(self, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norms of gradients, as the optimizer applies them."""
        if (scale := self.scale) is not None:
            norms = _each(norms, lambda n: n / scale.to(n.device, n.dtype).reshape(()))
        return self.applied(norms)

    def applied(self, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same; -1 where nothing is updated."""
        if (found_inf := self.found_inf) is not None:
            norms = _each(
                norms, lambda n: n.masked_fill(found_inf.to(n.device).reshape(()) > 0, -1)
            )
        return norms

    def histogram(self, gradient: Tensor, is_part: bool) -> Histogram:
        """That of a gradient, as the optimizer applies it; empty where nothing is updated."""
        if (scale := self.scale) is not None:
            gradient = gradient / scale.to(gradient.device).reshape(())
        found = histogram(gradient, is_part)
        if (found_inf := self.found_inf) is not None:
            nothing = found_inf.to(gradient.device).reshape(()) > 0
            found = Histogram(*(part.masked_fill(nothing, 0) for part in found))
        return found


def _each(named: dict[str, Tensor], function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`function` of all numbers of a device at once."""
    found: dict[str, Tensor] = {}
    for device in {value.device for value in named.values()}:
        alike = {name: value for name, value in named.items() if value.device == device}
        values = function(torch.stack([*alike.values()]))
        found |= zip(alike, values.unbind(), strict=True)
    return {name: found[name] for name in named}


@torch.no_grad()
def scaling(scaler: GradScaler, steps: int) -> Scaling:
    """The state of `scaler`, copied on its device: it changes in place."""
    scale, clean, initial = scaler_state(scaler)
    state = torch.stack([scale.float(), clean.float()])
    return Scaling(
        state,
        steps,
        initial,
        scaler.get_growth_factor(),
        scaler.get_backoff_factor(),
        scaler.get_growth_interval(),
    )


class Skips:
    """Counts the skipped steps: at one the scale shrinks, and the clean steps begin anew."""

    def __init__(self) -> None:
        self.count = 0
        self._last: tuple[float, float, int] | None = None  # scale, clean steps, steps

    def resume(self, count: int) -> None:
        self.count, self._last = count, None

    def look(self, at: Scaling, scale: float, clean: float) -> int:
        """The steps skipped so far, of a scaler with `scale` and `clean` steps at `at`."""
        first = self._last is None
        former, clean_before, steps = self._last or (at.initial, 0.0, 0)
        self._last = scale, clean, at.steps
        if scale < former:
            self.count += round(math.log(scale / former) / math.log(at.backoff))
        elif not first:
            grown = round(math.log(scale / former) / math.log(at.growth))
            # Else it shrank once and grew again.
            self.count += clean != clean_before + at.steps - steps - grown * at.interval
        return self.count
