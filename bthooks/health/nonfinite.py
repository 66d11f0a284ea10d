"""Values that are not finite: of a module's output, of a gradient. Told at once."""

import math

from ..measure.figures import Figures
from ..measure.nonfinite import Fault
from .findings import Finding, listed, of_ranks


def faults(figures: Figures) -> list[Finding]:
    """The first fault of the forwards of each rank."""
    found = []
    for part, of_rank in of_ranks(figures):
        first = next(filter(None, (forward.fault() for forward in of_rank.forwards)), None)
        if first is not None:
            is_old = bool(first.names)  # what made it so has been seen, or told, before
            severe = Finding(first.path, math.inf, _cause(first), part, True, follows=is_old)
            found.append(severe)
        elif of_rank.forwards:
            found.append(Finding("root", 0.0, "", part))
    return found


def gradients(figures: Figures) -> list[Finding]:
    """Each parameter whose gradient is not finite, the last one first."""
    message = "its gradient is {}; of the parameters of which it is not finite it is the last"
    return [
        Finding(
            name,
            0.0 if math.isfinite(norm) else math.inf,
            message.format(norm),
            at_once=True,
            follows=True,
        )
        for name, norm in reversed(list(figures.norms.items()))
    ]


def _cause(fault: Fault) -> str:
    if fault.names:
        return f"its own parameters or buffers are not finite: {listed(fault.names)}"
    if fault.given == "not finite":
        return "what the model is given is not finite: look at the data"
    message = "the first module whose output is not finite, while its inputs are"
    message += " but for -inf, as in a mask" * (fault.given == "masked")
    if fault.compiled:
        message += f"; it, or what is compiled in it: {listed(fault.compiled)}"
    return message
