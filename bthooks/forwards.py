"""Forwards: which forwards of the model are observed, and where their readings go.

In: the calls of the model. Out: the readings of training forwards in `pool`, until the optimizer
step that they belong to; those of eval forwards in the outbox.
"""

import os
import sys
import threading
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .capture.forward import Window
from .capture.gradients import Updates
from .measure.dropout import mc_dropout
from .measure.readings import Readings, uncertainties
from .measure.uncertainty import find_uncertainties
from .record.recorder import Batch, Outbox
from .report import Ledger
from .steps import Due, Optimizers, Probe, Steps
from .torch_private import calls_on_stack, is_running, is_traced, steps_on_stack, without_modes


class Forwards:
    """The forwards of one attachment.

    Args:
        root: a weak reference to the model.
        window: opens one, with the model and the kinds.

    Attributes:
        watch: whether the next training forward is observed.
        calls: how many there were.
        pool: the readings of the training forwards since the last optimizer step.
        last_handle: of the hook that ends a forward in another thread, after a detach.
    """

    def __init__(
        self,
        root: Callable[[], nn.Module | None],
        window: Callable[..., Window],
        kinds: Collection[str],
        steps: Steps,
        optimizers: Optimizers,
        updates: Updates,
        outbox: Outbox,
        ledger: Ledger,
    ) -> None:
        self._root, self._open, self._kinds = root, window, kinds
        self._steps, self._optimizers, self._updates = steps, optimizers, updates
        self._process = os.getpid()  # a forked child has the hooks, and no writer's thread
        self._outbox, self._ledger = outbox, ledger
        self.watch = any(steps.due_next)
        self.calls = 0
        self.pool = Readings()
        self._probe = Probe()  # before any optimizer step is seen
        self.last_handle: RemovableHandle | None = None
        self._window: Window | None = None
        self._observed: Batch | None = None  # what the window's readings go to
        self._depth = 0  # calls of the root inside its own forward
        self._handled: BaseException | None = None

    def take(self) -> Readings:
        """The pool, which is empty then."""
        pool, self.pool = self.pool, Readings()
        return pool

    def is_elsewhere(self) -> bool:
        """Whether another thread is inside an observed forward."""
        return self._window is not None and self._window.thread != threading.get_ident()

    def before(self, root: nn.Module, *given: Any) -> None:
        """The pre-hook of `root`."""
        if torch.compiler.is_compiling() or root is not self._root():
            return
        if os.getpid() != self._process:
            return
        self.calls += 1
        window, steps = self._window, self._steps
        if window is not None and window.thread == threading.get_ident():
            if calls_on_stack(root) > 1:
                self._depth += 1
                return
            self.close()  # KeyboardInterrupt skips the hook that closes it
        training = root.training and (steps.rounds > 0 or torch.is_grad_enabled())
        if not (self.watch if training else steps.rounds == 0 or not steps.evaluated):
            return
        with self._ledger.guard("forward"):
            if not training:
                number = steps.eval_number()
                due = Due(True, steps.due.histograms) if steps.rounds else steps.due_at(number)
                self._open_window(root, Batch(number, due, "val"), given)
            elif not self._moved_unseen(root):
                due = Due(
                    *(now or then for now, then in zip(steps.due, steps.due_next, strict=True))
                )
                self._open_window(root, Batch(steps.number, due), given)
                if due.scalars:
                    self._updates.watch(root)

    def _open_window(self, root: nn.Module, batch: Batch, given: tuple[Any, ...]) -> None:
        if (self._window is not None and self._window.is_alive()) or is_traced():
            return  # another thread's, or one without values
        if is_running(mc_dropout):
            return
        self._optimizers.recheck()
        kinds = set(self._kinds)
        kinds -= set() if batch.due.scalars else {"attention"}
        kinds -= set() if batch.due.histograms else {"activations"}
        self._handled, self._depth, self._observed = sys.exc_info()[1], 0, batch
        self._window = self._open(root, kinds=kinds)
        self._window.trail.before(root, given)

    def after(self, root: nn.Module, args: Any, output: Any) -> None:
        """The hook of `root`, which is called even when its forward raised."""
        window, batch = self._window, self._observed
        if window is None or batch is None or torch.compiler.is_compiling():
            return
        if root is not self._root() or window.thread != threading.get_ident():
            return
        if self._depth:
            self._depth -= 1
            return
        with self._ledger.guard("forward"):
            handled = self._handled
            self.close()
            if self.last_handle is not None:
                self.last_handle.remove()
            elif sys.exc_info()[1] is handled:  # else it raised: not a whole forward
                self._keep(root, window, batch, output)

    def _keep(self, root: nn.Module, window: Window, batch: Batch, output: Any) -> None:
        readings = batch.readings
        with self._ledger.guard("finite values"):
            readings.forwards = [window.trail.ended(root, output)]
        readings.attention, readings.doubts = window.maps(), window.doubts()
        readings.histograms = {f"activations/{p}": h for p, h in window.activations.items()}
        self._ledger.captured("attention", readings.attention)
        self._ledger.captured("activations", window.activations)
        if "uncertainty" in self._kinds:
            with self._ledger.guard("uncertainty"):
                found = find_uncertainties(output)
                readings.merge(uncertainties(found, distributions=batch.due.histograms))
                self._ledger.captured("uncertainty", found)
        if batch.prefix:
            if not self._steps.rounds:
                self._outbox.send()
            batch.number = self._steps.count_eval()
            self._outbox.add(batch)
        else:
            self.pool.merge(readings)

    def close(self) -> None:
        """Close the window that is open in this thread."""
        if self._window is not None and self._window.thread == threading.get_ident():
            self._window.close()
            self._window = self._handled = None

    def _moved_unseen(self, root: nn.Module) -> bool:
        """Whether the parameters change although no optimizer step has been seen: said once."""
        # LBFGS moves them too, between the calls of its closure.
        if self._steps.rounds:
            return False
        with without_modes():
            moved = self._probe.moved(root)
        if not moved or steps_on_stack():
            return False
        self._ledger.say(
            "optimizer",
            "the parameters change, but no torch.optim.Optimizer that holds them has stepped: "
            "call handle.advance() after each step",
        )
        self.watch = False
        return True
