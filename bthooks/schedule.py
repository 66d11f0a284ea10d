"""Schedule: which step it is, and what is logged at it. A state machine without torch.

What happens comes in as events, in the order in which a training loop makes them; out come the
decisions: observe this forward, measure this optimizer's step, write what waits. A step begins at
an optimizer's step, and again when an optimizer steps that already stepped in it; so K
micro-batches, or two optimizers side by side, are one. A forward runs before we know whether the
step that it belongs to is logged, hence the cadence is asked one step ahead.
"""

import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Cadence = int | Callable[[int], bool]


class Due(NamedTuple):
    """What is logged at a step."""

    scalars: bool
    histograms: bool


_NEVER = Due(False, False)


class Slot(NamedTuple):
    """Where readings go: the step that they are written at, and what of them is wanted."""

    step: int
    due: Due
    validation: bool = False


class Schedule:
    """The steps of one attachment, of which the `first` is always logged.

    Where one of the cadences, of scalars and of histograms, raises, `failed` is called.
    """

    def __init__(
        self,
        first: int,
        cadences: tuple[Cadence, Cadence],
        failed: Callable[[str, Exception], None],
    ) -> None:
        self._cadences, self._failed = cadences, failed
        start = {"step": first, "rounds": 0, "evaluated": 0, "inferences": 0, "last_eval": -1}
        self.load_state_dict(start)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Begin, or resume, at the step of `state`."""
        self._next = state["step"]  # the number of the step that comes next
        self.steps = state["rounds"]  # how many have begun
        self._validated = bool(state["evaluated"])  # by an eval forward since the last step
        self._last_validation = state["last_eval"]  # the step of the last such
        self._inferences = state["inferences"]  # forwards before any step
        self._first = None if self.steps or self._inferences else self._next
        self.due = _NEVER  # at the step that has begun
        self._due_next = self._due_at(self._next)
        # The optimizers that stepped in this step; weakly, since one that is replaced is gone.
        # `self` is among them for one that is told by hand.
        self.stepped: weakref.WeakSet[object] = weakref.WeakSet()
        self.observes = any(self._due_next)  # the next training forward
        self.watches = self._due_next.scalars  # the gradients at the next backward pass's end

    @property
    def step(self) -> int:
        """The number of the next step: `first` and the steps begun since."""
        return self._next + (0 if self.steps else self._inferences)

    def training_forward(self) -> Slot | None:
        """A forward in training mode: its readings belong to the optimizer step that follows."""
        if not self.observes:
            return None
        return Slot(self._next, Due(*map(operator.or_, self.due, self._due_next)))

    def no_grad_forward(self) -> Slot | None:
        """A forward in training mode without grad; before any step it is inference."""
        return self.training_forward() if self.steps else self.eval_forward()

    def eval_forward(self) -> Slot | None:
        """A forward in eval mode, the first after a step; before any, inference: a step each."""
        if self.steps and self._validated:
            return None
        step = self._next - 1 if self.steps else self.step
        due = Due(True, self.due.histograms) if self.steps else self._due_at(step)
        return Slot(step, due, validation=True)

    def validated(self, slot: Slot) -> Slot:
        """The eval forward that goes to `slot` has ended well: where it really goes.

        Never to the step of an earlier one: inference before training may have run ahead of it.
        """
        step = self._next - 1 if self.steps else self.step
        self._last_validation = max(step, self._last_validation + 1)
        if self.steps:
            self._validated = True
        else:
            self._inferences += 1
        return slot._replace(step=self._last_validation)

    def moved_unseen(self) -> None:
        """The parameters change, and no optimizer is seen: no training forward has a step."""
        self.observes = False

    def begins_step(self, optimizer: object | None, again: bool = False) -> bool:
        """Whether a step of `optimizer`, None if told by hand, begins one of ours.

        `again`: it holds a parameter of another that has stepped.
        """
        return not self.stepped or again or (optimizer or self) in self.stepped

    def optimizer_begins(self, optimizer: object, again: bool = False) -> Due:
        """An optimizer's step begins: what is due at the step that it belongs to."""
        return self._due_next if self.begins_step(optimizer, again) else self.due

    def optimizer_ends(
        self, optimizer: object | None, again: bool = False, known: int = 0
    ) -> Slot | None:
        """An optimizer's step, of `known` ones, has ended: the slot of the step, if one begins."""
        begins = self.begins_step(optimizer, again)
        if begins:
            self.stepped.clear()
            self.steps += 1
            self._next += 1
            self.due, self._due_next = self._due_next, self._due_at(self._next)
        self.stepped.add(optimizer or self)
        self._validated = False
        # Another optimizer may step in this step: what it is given belongs to it too. In the first
        # step the others are not known yet.
        more = any(self.due) and len(self.stepped) < known
        self.observes = any(self._due_next) or more
        self.watches = self._due_next.scalars or (self.due.scalars and (more or self.steps == 1))
        return Slot(self._next - 1, self.due) if begins and any(self.due) else None

    def flush(self) -> Slot | None:
        """Where the forwards since the last step go now; None: to the step that has begun."""
        goes_on = any(self.due) and not any(self._due_next)
        return None if goes_on else Slot(self._next, self._due_next)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._next,
            "rounds": self.steps,
            "evaluated": int(self._validated),
            "inferences": self._inferences,
            "last_eval": self._last_validation,
        }

    def _due_at(self, step: int) -> Due:
        if step == self._first:
            return Due(True, True)
        try:
            scalars, histograms = (
                bool(cadence(step)) if callable(cadence) else step % cadence == 0
                for cadence in self._cadences
            )
        except Exception as error:
            self._failed("cadence", error)
            return _NEVER
        return Due(scalars, histograms)
