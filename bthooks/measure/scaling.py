"""Scaling: the loss scaler that an optimizer steps under, and the steps that it skipped.

A skipped step leaves no trace but in the scaler's own state, which changes in place on the device.
"""

import gc
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..torch_private import scaler_state


class Scaling(NamedTuple):
    """The state of a scaler at one optimizer step."""

    state: Tensor  # (3,): scale, clean steps since it grew or shrank, whether this one overflowed
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


@torch.no_grad()
def scaling(scaler: GradScaler, optimizer: Optimizer, steps: int) -> Scaling:
    """The state of `scaler`, copied on its device: it changes in place."""
    scale, clean, initial = scaler_state(scaler)
    overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer has it during its step
    overflow = torch.zeros_like(scale) if overflow is None else overflow.to(scale.device)
    state = torch.stack([scale.float(), clean.float(), overflow.float().reshape(())])
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
