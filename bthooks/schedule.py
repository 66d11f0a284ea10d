"""Schedule: which step it is, and what is logged at it. A state machine without torch.

What happens comes in as events, in the order in which a training loop makes them; out come the
decisions: observe this forward, measure this optimizer's step, write what waits. A step begins at
an optimizer's step, and again when an optimizer steps that already stepped in it; so K
micro-batches, or two optimizers side by side, are one. All that step within one backward pass are
one step too. A forward runs before we know whether the step that it belongs to is logged, hence
the cadence is asked one step ahead.
"""

import operator
from collections.abc import Callable, Collection, Mapping
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


BY_HAND = -1  # the number of an optimizer that is told by hand


class Schedule:
    """The steps of one attachment, of which the `first` is always logged.

    Where one of the cadences, of scalars and of histograms, raises, `failed` is called. A model
    that `trains` before any step, one in training mode, is validated by eval forwards; of another
    they are inference, a step each. Optimizers are known by their numbers.
    """

    def __init__(
        self,
        first: int,
        cadences: tuple[Cadence, Cadence],
        failed: Callable[[str, Exception], None],
        trains: bool = False,
    ) -> None:
        self._cadences, self._failed = cadences, failed
        self._trains = trains
        self.forwards = 0  # training forwards before any step
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
        self._stepped: set[int] = set()  # the optimizers that stepped in this step
        self._backward: int | None = None  # the backward pass within which they did
        self._is_fresh = False  # whether a training forward ran since this step began
        self.expects_more = False  # whether another optimizer may step in this step
        self.observes = any(self._due_next)  # the next training forward
        self.watches = self._due_next.scalars  # the gradients at the next backward pass's end
        self.is_near = self.observes  # whether this step is logged, or the next one

    @property
    def step(self) -> int:
        """The number of the next step: `first` and the steps begun since."""
        return self._next + (0 if self.steps else self._inferences)

    @property
    def upcoming(self) -> int:
        """The number of the training step that begins next."""
        return self._next

    @property
    def trains(self) -> bool:
        """Whether eval forwards are a validation pass; before, they are inference."""
        return self._trains or self.steps > 0

    def training_forward(self) -> Slot | None:
        """A training forward: its readings belong to the optimizer step that follows."""
        self._trains = self._is_fresh = True
        self.forwards += not self.steps
        if not self.observes:
            return None
        return Slot(self._next, Due(*map(operator.or_, self.due, self._due_next)))

    def eval_forward(self) -> Slot | None:
        """An eval forward, the first of a validation pass; before training, inference."""
        if not self.trains:
            return Slot(self.step, self._due_at(self.step), validation=True)
        if self._validated:
            return None
        due = self.due if self.steps else self._due_next
        return Slot(self._done(), Due(True, due.histograms), validation=True)

    def validated(self, slot: Slot) -> Slot:
        """The eval forward that goes to `slot` has ended well: where it really goes.

        Never to the step of an earlier one: inference before training may have run ahead of it.
        """
        step = self._done() if self.trains else self.step
        self._last_validation = max(step, self._last_validation + 1)
        if self.trains:
            self._validated = True
        else:
            self._inferences += 1
        return slot._replace(step=self._last_validation)

    def _done(self) -> int:
        """The step just done; before any, the first."""
        return self._next - 1 if self.steps else self._next

    def moved_unseen(self) -> None:
        """The parameters change, and no optimizer is seen: no training forward has a step."""
        self.observes = False

    def begins_step(self, numbers: Collection[int], backward: int | None = None) -> bool:
        """Whether an optimizer's step begins one of ours.

        Args:
            numbers: its own, and those of others that hold a parameter of it: which it replaces.
            backward: the backward pass within which it steps.
        """
        again = not self._stepped.isdisjoint(numbers)
        if backward is not None and self._stepped:
            return backward != self._backward and (again or self._is_fresh)
        return again or not self._stepped

    def goes_on(self, number: int, backward: int | None) -> bool:
        """Whether an optimizer's step, of many in one backward pass, changes nothing here.

        Where each parameter has an optimizer it is asked for all but the first: what else is done
        at a step, 4 us, would be felt. A number below 0 is of none that has stepped before.
        """
        if number < 0 or backward is None or backward != self._backward or self.is_near:
            return False
        self._stepped.add(number)
        return True

    def optimizer_begins(self, numbers: Collection[int], backward: int | None = None) -> Due:
        """An optimizer's step begins: what is due at the step that it belongs to."""
        return self._due_next if self.begins_step(numbers, backward) else self.due

    def optimizer_ends(
        self, number: int, begins: bool, backward: int | None = None, known: int = 0
    ) -> Slot | None:
        """An optimizer's step, of `known` ones, has ended: the slot of the step that `begins`."""
        if begins:
            self._stepped.clear()
            self._is_fresh = False
            self.steps += 1
            self._next += 1
            self.due, self._due_next = self._due_next, self._due_at(self._next)
        self._stepped.add(number)
        self._backward, self._validated = backward, False
        # Another optimizer may step in this step: what it is given belongs to it too. In the first
        # step the others are not known yet.
        is_due = any(self.due)
        more = self.expects_more = is_due and len(self._stepped) < known
        self.observes = any(self._due_next) or more
        self.is_near = is_due or self.observes
        self.watches = self._due_next.scalars or (self.due.scalars and (more or self.steps == 1))
        return Slot(self._next - 1, self.due) if begins and is_due else None

    def optimizer_is_gone(self, number: int) -> None:
        """One that replaces it begins a step."""
        self._stepped.discard(number)

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
