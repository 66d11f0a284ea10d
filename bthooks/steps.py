"""Steps: what number it is, and whether that number is logged. It counts; it hooks nothing.

In: which optimizer stepped, which forward ran. Out: numbers, and what is due at them.

A round is what one number stands for. It begins at an optimizer step, and again when an optimizer
steps that already stepped in it; so K micro-batches, or two optimizers side by side, are one.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .measure.sharded import local
from .record.transfer import Transfer

Cadence = int | Callable[[int], bool]


class Due(NamedTuple):
    """What is logged at a number."""

    scalars: bool
    histograms: bool


NEVER = Due(False, False)


class Steps:
    """The rounds of one attachment.

    Args:
        first: the number of the first round, which is always logged.
        cadences: every how many numbers scalars and histograms are, or functions of the number.
        failed: called with what failed where a cadence raises; nothing is due then.
    """

    def __init__(
        self,
        first: int,
        cadences: tuple[Cadence, Cadence],
        failed: Callable[[str, Exception], None],
    ) -> None:
        self._first: int | None = first  # None after a resume
        self._cadences, self._failed = cadences, failed
        self.number = first  # of the round that comes next
        self.rounds = 0
        self.due = NEVER  # at the round that has begun
        self.due_next = self.due_at(first)
        # The optimizers that stepped in it; weakly, since one that is replaced is gone.
        self.stepped: weakref.WeakSet[object] = weakref.WeakSet()
        self.evaluated = False  # whether an eval forward was kept since the last step
        self.inferences = 0  # eval or no-grad forwards before any round
        self._last_eval = -1

    def due_at(self, number: int) -> Due:
        if number == self._first:
            return Due(True, True)
        try:
            scalars, histograms = (
                bool(cadence(number)) if callable(cadence) else number % cadence == 0
                for cadence in self._cadences
            )
        except Exception as error:
            self._failed("cadence", error)
            return NEVER
        return Due(scalars, histograms)

    def begins_round(self, optimizer: Optimizer | None) -> bool:
        """Whether a step of `optimizer` begins a round."""
        return not self.stepped or (optimizer or self) in self.stepped

    def count(self, optimizer: Optimizer | None, begins: bool) -> None:
        """Count a step of `optimizer`, which begins a round; None is one `advance` tells of."""
        if begins:
            self.stepped.clear()
            self.rounds += 1
            self.number += 1
            self.due, self.due_next = self.due_next, self.due_at(self.number)
        self.stepped.add(optimizer or self)
        self.evaluated = False

    def eval_number(self) -> int:
        """The number of an eval forward: the step just done, or its own before any step."""
        return self.number - 1 if self.rounds else self.number + self.inferences

    def count_eval(self) -> int:
        """Count an eval forward and return its number.

        Never the number of an earlier one: inference before training may have run ahead of it.
        """
        self._last_eval = max(self.eval_number(), self._last_eval + 1)
        if self.rounds:
            self.evaluated = True
        else:
            self.inferences += 1
        return self._last_eval

    def state_dict(self) -> dict[str, int]:
        return {
            "step": self.number,
            "rounds": self.rounds,
            "evaluated": int(self.evaluated),
            "inferences": self.inferences,
            "last_eval": self._last_eval,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.number, self.rounds = state["step"], state["rounds"]
        self.evaluated = bool(state["evaluated"])
        self.inferences, self._last_eval = state["inferences"], state["last_eval"]
        self._first = None if self.rounds or self.inferences else self.number
        self.due, self.due_next = NEVER, self.due_at(self.number)
        self.stepped.clear()


class Optimizers:
    """Which optimizers hold a parameter of the model, in the order of their first steps."""

    def __init__(self) -> None:
        self._index: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._shared: weakref.WeakKeyDictionary[
            Optimizer, weakref.WeakKeyDictionary[Optimizer, bool]
        ] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._index)

    def index(self, optimizer: Optimizer, root: nn.Module | None) -> int | None:
        """The number of `optimizer`; None if it holds no parameter of `root`."""
        index = self._index.get(optimizer)
        if index is not None or root is None or optimizer in self._others:
            return index
        own = {p for _, p in root.named_parameters()}  # GANs override parameters()
        if held(optimizer).isdisjoint(own):
            self._others.add(optimizer)
            return None
        taken = set(self._index.values())
        index = self._index[optimizer] = next(i for i in itertools.count() if i not in taken)
        return index

    def others(self, optimizer: Optimizer | None) -> list[Optimizer]:
        return [other for other in self._index if other is not optimizer]

    def share(self, a: object, b: object) -> bool:
        """Whether two optimizers hold a parameter in common: the one has replaced the other."""
        if not (isinstance(a, Optimizer) and isinstance(b, Optimizer)):
            return False
        known = self._shared.setdefault(a, weakref.WeakKeyDictionary())
        if b not in known:
            known[b] = not held(a).isdisjoint(held(b))
        return known[b]

    def recheck(self) -> None:
        """Look at the others again: their parameters may have become the model's."""
        self._others.clear()
        self._shared.clear()


def held(optimizer: Optimizer) -> set[Tensor]:
    """The parameters of `optimizer`."""
    return {p for group in optimizer.param_groups for p in group["params"]}


class Probe:
    """Tells whether parameters change, by the smallest that is trained."""

    def __init__(self) -> None:
        self._last: tuple[list[int], Tensor] | None = None
        self._changes: deque[Transfer] = deque()
        self._moves = 0

    def moved(self, root: nn.Module) -> bool:
        """Whether it changed twice: once may be weights that were loaded.

        By its value: `p.data` keeps the version.
        """
        own = [
            p
            for _, p in root.named_parameters()
            if p.requires_grad and not (is_lazy(p) or p.is_meta)
        ]
        if not own:
            return False
        smallest = local(min(own, key=torch.numel).detach())
        before, self._last = self._last, ([id(p) for p in own], smallest.clone())
        if before is not None and before[0] == self._last[0]:
            self._changes.append(Transfer([(before[1] != smallest).any()]))
        while self._changes and self._changes[0].is_done():
            self._moves += bool(self._changes.popleft().result()[0])
        return self._moves > 1
