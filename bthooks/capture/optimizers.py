"""Optimizers: which of them hold parameters of the model.

No optimizer is passed to `attach`: torch tells of every step of every optimizer, other models' too.
"""

import gc
import heapq
import itertools
import weakref
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..measure.sharded import is_sharded, is_wrapper, local
from ..torch_private import version

NONE = -2  # the number of an optimizer that has none


class Known:
    """An optimizer that was seen to step, and what is known of it."""

    __slots__ = ("_before", "held", "key", "number", "optimizer", "rivals", "wraps")

    def __init__(self, optimizer: Optimizer, is_gone: Callable[["Known"], None]) -> None:
        self.optimizer = weakref.ref(optimizer, lambda _: is_gone(self))
        self.key = id(optimizer)
        self.held: list[Tensor] = []  # its parameters, if any is the model's
        self.number = NONE  # in the order of the first steps, if it updates something itself
        self.wraps = False  # whether it steps others, and may update nothing itself
        self._before: list[int] = []  # the versions of its parameters, if it wraps others
        self.rivals: set[Known] = set()  # those that hold a parameter of it as well

    def begins(self) -> None:
        """A step of it begins."""
        if self.wraps:
            self._before = [version(p) for p in self.held]

    def has_updated(self) -> bool:
        """Whether a step in which no other has stepped has updated anything."""
        before, self._before = self._before, []
        return not self.wraps or (bool(before) and before != [version(p) for p in self.held])

    def shares(self, other: "Known") -> bool:
        """Whether both hold a parameter."""
        return self is other or self in other.rivals

    def numbers(self) -> Collection[int]:
        """Its own, and those of its rivals."""
        if not self.rivals:  # nearly always
            return () if self.number == NONE else (self.number,)
        return {self.number, *(rival.number for rival in self.rivals)} - {NONE}


class Optimizers:
    """The optimizers that hold a parameter of the model.

    There may be one for each parameter: all that is asked at a step costs the same for any number.
    """

    def __init__(self, is_gone: Callable[[int], None]) -> None:
        self._tell = is_gone  # of the number of one that is gone
        self._known: dict[int, Known] = {}  # by id
        self._holders: dict[Tensor, list[Known]] = {}
        self._own: set[Tensor] = set()  # parameters of the model, while optimizers are new
        self._numbers = itertools.count()
        self._free: list[int] = []  # numbers of optimizers that are gone
        self.count = 0  # of those that have a number
        self.any_wraps = False

    def find(self, optimizer: Optimizer, root: nn.Module | None) -> Known | None:
        """What is known of `optimizer`; None if it holds no parameter of `root`."""
        known = self._known.get(id(optimizer))
        if known is None or known.optimizer() is not optimizer:
            known = self._known[id(optimizer)] = Known(optimizer, self._is_gone)
            if root is not None:
                self._look(known, optimizer, root)
        return known if known.held else None

    def number_of(self, optimizer: Optimizer) -> int:
        """The number of one that has stepped, and wraps no other; else `NONE`."""
        known = self._known.get(id(optimizer))
        if known is None or known.wraps or known.optimizer() is not optimizer:
            return NONE
        return known.number

    def number(self, known: Known) -> int:
        """The number of an optimizer that has stepped."""
        if known.number == NONE:
            known.number = heapq.heappop(self._free) if self._free else next(self._numbers)
            self.count += 1
        return known.number

    def held_by_others(self, stepped: Collection[Known]) -> set[Tensor]:
        """The parameters of those that have not stepped."""
        others = [known for known in [*self._known.values()] if known not in stepped]
        return {p for known in others for p in known.held}

    def recheck(self) -> None:
        """Look at all again: their parameters may have become the model's, or others."""
        self._holders, self._own = {}, set()
        for known in [*self._known.values()]:
            known.rivals = set()
            optimizer = known.optimizer()
            if known.held and optimizer is not None:
                self._hold(known, optimizer)
            else:
                self._known.pop(known.key, None)

    def forget(self) -> None:
        """Keep no parameter of the model alive for the sake of optimizers that may be new."""
        if self._own:
            self._own = set()

    def _look(self, known: Known, optimizer: Optimizer, root: nn.Module) -> None:
        held_ = held(optimizer)
        if self._own.isdisjoint(held_):  # or it is of another time
            self._own = {p for _, p in root.named_parameters()}  # GANs override parameters()
        if not self._own.isdisjoint(held_):
            self._hold(known, optimizer)

    def wraps(self, known: Known) -> None:
        """It steps others in its step."""
        known.wraps = self.any_wraps = True

    def _hold(self, known: Known, optimizer: Optimizer) -> None:
        known.held = held(optimizer)
        if _has_others(optimizer):
            self.wraps(known)
        for p in known.held:
            holders = self._holders.setdefault(p, [])
            for other in holders:
                known.rivals.add(other)
                other.rivals.add(known)
            holders.append(known)

    def _is_gone(self, known: Known) -> None:
        if self._known.get(known.key) is known:
            del self._known[known.key]
        for p in known.held:
            if known in (holders := self._holders.get(p, [])):
                holders.remove(known)
        if known.number != NONE:
            heapq.heappush(self._free, known.number)
            self.count -= 1
            self._tell(known.number)


class Homeless:
    """Tells which parameters no optimizer of this process holds, though none has stepped yet.

    A walk over all objects takes some 0.1 s: each parameter is looked for once.
    """

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def among(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `named` that none holds."""
        if named.keys() - self._known.keys():
            found = _held_by_any({*named.values()})
            self._known |= {name: p not in found for name, p in named.items()}
        return {name: p for name, p in named.items() if self._known[name]}


def _held_by_any(parameters: set[Tensor]) -> set[Tensor]:
    found: set[Tensor] = set()
    for each in gc.get_objects():
        if issubclass(type(each), Optimizer):
            for group in getattr(each, "param_groups", ()):  # one that wraps another may lack them
                found.update(p for p in group["params"] if p in parameters)
    return found


def held(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of `optimizer`."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _has_others(optimizer: Optimizer) -> bool:
    """Whether there are optimizers among the attributes of `optimizer`, also in a container."""
    for value in vars(optimizer).values():
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(value, Optimizer) or (
            isinstance(value, (list, tuple, dict))
            and any(isinstance(each, Optimizer) for each in inner)
        ):
            return True
    return False


class Probe:
    """Tells whether parameters change though no optimizer is seen, by the smallest one trained."""

    def __init__(self) -> None:
        self._last: tuple[list[int], Tensor] | None = None

    @torch.no_grad()
    def changed(self, root: nn.Module) -> Tensor | None:
        """Whether its value (`p.data` keeps the version) changed since a last look, 0-d."""
        every = (p for _, p in root.named_parameters() if p.requires_grad)
        own = [p for p in every if not (is_lazy(p) or p.is_meta)]
        own = [p for p in own if is_sharded(p) or not is_wrapper(p)]
        if not own:
            return None
        smallest, ids = local(min(own, key=torch.numel).detach()), [id(p) for p in own]
        before, self._last = self._last, (ids, smallest.clone())
        return (before[1] != smallest).any() if before and before[0] == ids else None
