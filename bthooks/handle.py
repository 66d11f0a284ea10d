"""Handle: what the user holds of an attachment: its lifetime, its resume and its report."""

import atexit
import multiprocessing.util
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .health.alerts import Alert
from .health.unlearned import said
from .names import tag
from .record.backend import PATIENCE
from .report import Report
from .unseen import unseen
from .wiring import Wiring


class Handle:
    """An attachment, as `attach` returns it. A context manager: leaving it detaches."""

    def __init__(self, model: nn.Module, wiring: Wiring, target: Any) -> None:
        self._wiring, self._schedule, self._recorder = wiring, wiring.schedule, wiring.recorder
        be_first_at_exit()
        finalizer = weakref.finalize(model, self.detach)
        finalizer.atexit = False
        _attached[self] = wiring, target, finalizer

    @property
    def step(self) -> int:
        """The number of the next step: `step=` and the steps begun since."""
        return self._schedule.step

    @property
    def writer(self) -> Any:
        """What is written to, opened if it is not yet; None where nothing is written."""
        return self._recorder.open()

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """What began to be wrong so far, in the order in which it was seen."""
        return tuple(self._recorder.alerts.all)

    def advance(self) -> None:
        """Say, after it, that an optimizer stepped that is no `torch.optim.Optimizer`."""
        self._wiring.count()

    def flush(self) -> None:
        """Write to the disk what was measured so far, also of a step that is not over.

        Of a validation pass that goes on the mean uncertainty waits for its end. With several ranks
        a step waits until it is over and all have sent it, at the latest for the next logged step.
        """
        self._wiring.flush()

    def report(self) -> Report:
        """What was captured; what was selected and has not been seen, and why."""
        w = self._wiring
        missed = unseen(w.root(), w.wanted, w.ledger, w.calls, self._schedule.steps)
        if untrained := self._recorder.alerts.untrained():
            missed["training of parameters"] = said(untrained)
        return w.ledger.report(missed)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue the charts, plain data; flushes first."""
        self.flush()
        return self._schedule.state_dict() | {
            "skipped": self._recorder.skips.count,
            "alerts": self._recorder.alerts.state(),
            "baselines": self._recorder.alerts.baselines(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the step of `state`, without a gap, a double point or a second alert.

        All that is in the folder of the writer at that step and after is superseded, also of
        earlier processes and by other hands; unless only other attachments of this process wrote
        it. Of a writer that is no SummaryWriter nothing can be.
        """
        known = self.state_dict().keys()
        if state.keys() != known:
            raise ValueError(
                f"Handle.load_state_dict: expected the keys {sorted(known)} that "
                f"Handle.state_dict() gives, got {sorted(state)}"
            )
        has_stepped = self._schedule.steps > 0
        self._schedule.load_state_dict(state)
        step = state["step"] if has_stepped else self._schedule.step  # inference is a step each
        self._wiring.resume()
        self._recorder.resume(step)
        self._recorder.skips.resume(state["skipped"])
        self._recorder.alerts.resume(state["alerts"], state["baselines"], step)

    def detach(self) -> None:
        """Write what was measured, and take everything off the model, the optimizers and torch.

        A writer that `attach` opened is closed, if no other attachment writes to it. A second call
        does nothing.
        """
        _end(self)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


_attached: dict[Handle, tuple[Wiring, Any, "weakref.finalize[Any, Any]"]] = {}


def _end(handle: Handle, until: float | None = None) -> None:
    """Detach; what other ranks have not sent is waited for `until` then, else for 10 s."""
    wiring, _, finalizer = _attached.pop(handle, (None, None, None))
    if wiring is None or finalizer is None or not wiring.is_here():
        return
    finalizer.detach()
    wiring.off()
    wiring.recorder.close(until)


def be_first_at_exit() -> None:
    """Let the attachments end before what was opened so far: exit handlers run in reverse order."""
    atexit.unregister(_detach_all)
    atexit.register(_detach_all)
    if multiprocessing.parent_process() is not None:  # a forked process has no exit handlers
        multiprocessing.util.Finalize(None, _detach_all, exitpriority=100)


def _detach_all() -> None:
    until = time.monotonic() + PATIENCE  # for all together
    for handle in tuple(_attached):
        _end(handle, until)


def attached_to(target: Any, prefix: str) -> list[tuple[Handle, nn.Module | None]]:
    """The attachments that write to `target` under `prefix`, each with its model."""
    return [
        (handle, wiring.root())
        for handle, (wiring, its_target, _) in _attached.items()
        if its_target is target or (isinstance(target, Path | str) and its_target == target)
        if tag(wiring.recorder.prefix) == tag(prefix)
    ]
