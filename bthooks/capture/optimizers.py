"""Optimizers: which of them hold parameters of the model.

No optimizer is passed to `attach`: torch tells of every step of every optimizer, other models' too.
"""

import itertools
import weakref
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..measure.sharded import local


class Optimizers:
    """The optimizers that hold a parameter of the model, in the order of their first steps."""

    def __init__(self) -> None:
        self._index: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._foreign: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._shared: weakref.WeakKeyDictionary[
            Optimizer, weakref.WeakKeyDictionary[Optimizer, bool]
        ] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._index)

    def index(self, optimizer: Optimizer, root: nn.Module | None) -> int | None:
        """The number of `optimizer`; None if it holds no parameter of `root`."""
        index = self._index.get(optimizer)
        if index is not None or root is None or optimizer in self._foreign:
            return index
        own = {p for _, p in root.named_parameters()}  # GANs override parameters()
        if held(optimizer).isdisjoint(own):
            self._foreign.add(optimizer)
            return None
        taken = set(self._index.values())
        index = self._index[optimizer] = next(i for i in itertools.count() if i not in taken)
        return index

    def held_by_others(self, optimizer: Optimizer | None) -> set[Tensor]:
        """The parameters of the others."""
        return {p for other in self._index if other is not optimizer for p in held(other)}

    def share(self, optimizer: Optimizer | None, stepped: Collection[object]) -> bool:
        """Whether `optimizer` has replaced one that `stepped`: they hold a parameter in common."""
        if optimizer is None or optimizer in stepped:
            return False
        known = self._shared.setdefault(optimizer, weakref.WeakKeyDictionary())
        others = [other for other in stepped if isinstance(other, Optimizer)]
        for other in others:
            if other not in known:
                known[other] = not held(optimizer).isdisjoint(held(other))
        return any(known[other] for other in others)

    def recheck(self) -> None:
        """Look at all again: their parameters may have become the model's."""
        self._foreign.clear()
        self._shared.clear()


def held(optimizer: Optimizer) -> set[Tensor]:
    """The parameters of `optimizer`."""
    return {p for group in optimizer.param_groups for p in group["params"]}


class Probe:
    """Tells whether parameters change though no optimizer is seen, by the smallest one trained."""

    def __init__(self) -> None:
        self._last: tuple[list[int], Tensor] | None = None

    @torch.no_grad()
    def changed(self, root: nn.Module) -> Tensor | None:
        """Whether its value (`p.data` keeps the version) changed since a last look, 0-d."""
        every = (p for _, p in root.named_parameters() if p.requires_grad)
        own = [p for p in every if not (is_lazy(p) or p.is_meta)]
        if not own:
            return None
        smallest, ids = local(min(own, key=torch.numel).detach()), [id(p) for p in own]
        before, self._last = self._last, (ids, smallest.clone())
        return (before[1] != smallest).any() if before and before[0] == ids else None
