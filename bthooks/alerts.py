"""Alerts: what is wrong with a run, by the figures of its steps. Pure.

In: the readings of each number, on the host. Out: an `Alert` where an episode begins.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .finite import Fault, Forward


class Alert(NamedTuple):
    """What began to be wrong at a step.

    >>> print(Alert("nonfinite", "head", 12, "its output is not finite, its inputs are"))
    nonfinite: head: step 12: its output is not finite, its inputs are
    """

    condition: str
    where: str
    step: int
    message: str

    def __str__(self) -> str:
        return f"{self.condition}: {self.where}: step {self.step}: {self.message}"


class Episodes:
    """Which conditions last, so that each is told once."""

    def __init__(self) -> None:
        self._open: set[tuple[str, str]] = set()

    def judge(self, forwards: Iterable[Forward], step: int, prefix: str) -> list[Alert]:
        """The alerts that begin at `step`."""
        faults = [forward.fault() for forward in forwards]
        if not faults:
            return []
        fault = next((fault for fault in faults if fault), None)
        key = ("nonfinite", prefix)
        begins = fault is not None and key not in self._open
        self._open -= {key}
        if fault is None:
            return []
        self._open.add(key)
        return [_nonfinite(fault, step)] if begins else []


def _nonfinite(fault: Fault, step: int) -> Alert:
    """The alert of a forward whose output is not finite."""
    if fault.names:
        message = f"its own parameters or buffers are not finite: {_listed(fault.names)}"
    elif fault.given == "not finite":
        message = "what the model is given is not finite: look at the data"
    else:
        message = "the first module whose output is not finite, while its inputs are"
        message += " but for -inf, as in a mask" * (fault.given == "masked")
        if fault.compiled:
            message += f"; it, or what is compiled in it: {_listed(fault.compiled)}"
    return Alert("nonfinite", fault.path, step, message)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)
