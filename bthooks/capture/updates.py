"""Updates: of which parameters it is looked at what an optimizer makes of their gradients.

For that a copy of them is held during the step; so it is not all of them, unless that is asked for.
"""

from collections.abc import Collection, Mapping

from torch import Tensor
from torch.optim import Optimizer

from ..names import layer_of
from .wanted import Wanted

_TURNS = 16  # looks, after which each parameter has had one


class Turns:
    """Takes the parameters in turn, some at each step that is logged: so what never moves is found.

    Each optimizer is asked at its own step: of those whose turn it is it may hold all, or none.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._places: dict[str, int] = {}  # of the parameters, in the order
        self._turn, self._count = 0, 1  # whose turn it is: from there on so many
        self._asked: set[int] = set()  # the optimizers that have stepped since

    def looked_at(
        self, named: Mapping[str, Tensor], optimizer: Optimizer, suspects: Collection[str]
    ) -> set[str]:
        """Those of the parameters of `optimizer`: all, or some in turn and those of `suspects`."""
        kinds = self._wanted.kinds
        if "updates" in kinds or "gradients" not in kinds:
            return {*named} if "updates" in kinds else set()
        if id(optimizer) in self._asked:  # all that step have been
            self._asked.clear()
            self._turn += self._count
        self._asked.add(id(optimizer))
        for name in named:
            self._places.setdefault(name, len(self._places))
        total = len(self._places)
        self._count = max(1, total // _TURNS)
        return {
            name
            for name in named
            if layer_of(name) in suspects or (self._places[name] - self._turn) % total < self._count
        }


def resting(named: Mapping[str, Tensor], optimizer: Optimizer) -> list[str]:
    """Those in groups whose learning rate is 0."""
    groups = [group["params"] for group in optimizer.param_groups if group.get("lr") == 0]
    at_rest = {p for group in groups for p in group}
    return [name for name, p in named.items() if p in at_rest] if at_rest else []
