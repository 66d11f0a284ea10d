"""Finite: the first module of a forward whose output is not. Pure.

In: a flag of what each module made in turn, 0-d, which is not finite where that is not. Out: once
the flags are on the host, the module, and whether it is its own parameters or what it was given.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Fault(NamedTuple):
    """The first module whose output is not finite.

    Attributes:
        path: of the module.
        names: of its own parameters and buffers that are not finite.
        given: whether what it was given from outside the modules is not.
    """

    path: str
    names: tuple[str, ...]
    given: bool


class Stretch(NamedTuple):
    """Operators that one call of a module ran in a row, between those of other modules.

    Attributes:
        path: of the module.
        made: a flag of the last thing they made: 0-d, not finite where that is not.
        given: one of what they were given that comes from no operator and is no parameter.
    """

    path: str
    made: Tensor
    given: Tensor


@dataclass
class Flags:
    """What is not finite in one forward.

    Attributes:
        stretches: in order.
        returned: a flag of what the model returned; None where that was seen to be finite.
        owned: parameter or buffer name -> its flag.
    """

    stretches: list[Stretch] = field(default_factory=list)
    returned: Tensor | None = None
    owned: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        flags = [flag for stretch in self.stretches for flag in stretch[1:]]
        return [] if self.returned is None else [*flags, self.returned, *self.owned.values()]

    def on_host(self, host: Iterator[Tensor]) -> "Flags":
        """The same with its tensors from `host`."""
        if self.returned is None:
            return self
        stretches = [Stretch(stretch.path, next(host), next(host)) for stretch in self.stretches]
        return Flags(stretches, next(host), {name: next(host) for name in self.owned})

    def fault(self) -> Fault | None:
        """The first module whose output is not finite while its inputs are.

        None if the model returned finite values: an infinity on the way may be a mask.
        """
        if self.returned is None or math.isfinite(self.returned):
            return None
        made = [float(stretch.made) for stretch in self.stretches]
        given = [float(stretch.given) for stretch in self.stretches]
        bad = [at for at, value in enumerate(made) if not math.isfinite(value)]
        if not bad:
            return Fault("root", (), False)
        nans = (at for at in range(len(made)) if math.isnan(made[at]) or math.isnan(given[at]))
        at = next(nans, bad[-1])
        while at - 1 in bad:  # an infinity that led to it, which may be further ones'
            at -= 1
        path = self.stretches[at].path
        called = {stretch.path for stretch in self.stretches}
        own = [
            name
            for name, flag in self.owned.items()
            if _owner(name, called) == path and (math.isnan(flag) or flag == math.inf)
        ]
        return Fault(path, tuple(own), math.isnan(given[at]) or given[at] == math.inf)


def flag(tensor: Tensor) -> Tensor:
    """0-d, not finite if a value of `tensor` is not: its sum, of all reductions the fastest."""
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))


def join(flags: Sequence[Tensor]) -> Tensor:
    """0-d, not finite if any of `flags` is not."""
    return flags[0] if len(flags) == 1 else torch.stack([f.to(flags[0]) for f in flags]).sum()


def _owner(name: str, called: Collection[str]) -> str:
    """The innermost module above a parameter that was called."""
    path = name.rpartition(".")[0]
    while path and path not in called:
        path = path.rpartition(".")[0]
    return path or "root"
