"""Alerts: what is wrong with a run, by the figures of its steps. Pure.

In: the readings of each number, on the host. Out: an `Alert` where an episode begins.
"""

from collections.abc import Iterable
from typing import NamedTuple

from .finite import Fault, Flags


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

    def judge(self, forwards: Iterable[Flags], step: int, prefix: str) -> list[Alert]:
        """The alerts that begin at `step`."""
        faults = [flags.fault() for flags in forwards]
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
        names = ", ".join(fault.names[:8]) + ", ..." * (len(fault.names) > 8)
        message = f"its own parameters or buffers are not finite before the step: {names}"
    elif fault.given:
        message = "what it was given from outside the model is not finite: look at the data"
    else:
        message = "the first module whose output is not finite, while its inputs are"
    return Alert("nonfinite", fault.path, step, message)
