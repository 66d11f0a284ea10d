"""Wiring: torch's callbacks -> schedule -> capture -> recorder. It says when; it computes nothing.

What torch tells of are the forwards of the attached model, through hooks on it, and the steps of
all optimizers, through torch's own hooks for them. Training forwards wait in a pool for the
optimizer step that follows and go with it; eval forwards stand apart, under `val/`.
"""

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .capture.calls import calls_of
from .capture.forward import ObservedForward
from .capture.gradients import Gradients
from .capture.optimizers import Optimizers, Probe
from .capture.wanted import Wanted
from .measure.readings import Readings
from .measure.uncertainty import mc_dropout
from .record.recorder import Pending, Recorder
from .record.transfer import Transfer
from .report import Ledger
from .schedule import Schedule, Slot
from .torch_private import (
    calls_on_stack,
    hide_from_script,
    is_running,
    is_traced,
    steps_on_stack,
    without_modes,
)
from .unseen import say_absent


class Wiring:
    """One attachment's hooks, and what was observed and is not yet of a step."""

    def __init__(
        self,
        model: nn.Module,
        wanted: Wanted,
        schedule: Schedule,
        recorder: Recorder,
        ledger: Ledger,
    ) -> None:
        self.root = weakref.ref(model)
        self.wanted, self.schedule = wanted, schedule
        self.recorder, self.ledger = recorder, ledger
        self.calls = 0  # forwards of the model
        self._process = os.getpid()  # a forked child has the hooks, and no writer's thread
        self._optimizers, self._gradients = Optimizers(), Gradients(wanted, ledger)
        self._probe, self._changes, self._moves = Probe(), deque[Transfer](), 0
        self._pool = Readings()  # of the training forwards since the last optimizer step
        self._step: Pending | None = None  # the step that has begun, if it is logged
        self._forward: ObservedForward | None = None  # the one that runs
        self._slot: Slot | None = None  # where its readings go
        self._depth = 0  # calls of the root inside its own forward
        self._handled: BaseException | None = None
        self.is_on = True
        self._hooks = calls_of(model, self._before_forward, self._after_forward)
        _listeners.append(self)
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step).remove)
            _hooks.append(register_optimizer_step_post_hook(_after_step).remove)
            with ledger.guard("torch.jit.script"):
                _hooks.append(hide_from_script())
        self._watch()

    def is_here(self) -> bool:
        """Whether this is the process that attached."""
        return os.getpid() == self._process

    def flush(self) -> None:
        """Hand over all that was observed, also of a step that is not over, and write it."""
        pool, self._pool = self._pool, Readings()
        if (slot := self.schedule.flush()) is not None:
            self.recorder.add(Pending(slot.step, *slot.due, readings=pool))
        elif self._step is not None:
            self._step.readings.merge(pool)
        self.recorder.flush()
        if self._step is not None:  # another optimizer may still step in it
            self.recorder.add(self._step)

    def resume(self) -> None:
        """The schedule goes on elsewhere: no step has begun."""
        self._step = None

    def off(self) -> None:
        """Take everything off the model, the optimizers and torch; write what is left."""
        self.is_on = False
        self._hooks.stop()
        # A forward that another thread runs ends with a hook, which then takes itself off.
        if self._forward is None or self._forward.thread == threading.get_ident():
            self._hooks.remove()
        _listeners.remove(self)
        if not _listeners and not steps_on_stack():
            for remove in _hooks:
                remove()
            _hooks.clear()
        self._gradients.unwatch()
        self._close_forward()
        self.flush()
        self._say_absent()
        self._step = None

    def _before_forward(self, root: nn.Module, *given: Any) -> None:
        if torch.compiler.is_compiling() or root is not self.root() or not self.is_here():
            return
        self.calls += 1
        running = self._forward
        if running is not None and running.thread == threading.get_ident():
            is_inside = True
            with self.ledger.guard("forward"):
                is_inside = calls_on_stack(root) > 1
            if is_inside:
                self._depth += 1
                return
            self._close_forward()  # KeyboardInterrupt skips the hook that closes it
        schedule, in_grad = self.schedule, torch.is_grad_enabled()
        training = schedule.training_forward if in_grad else schedule.no_grad_forward
        slot = training() if root.training else schedule.eval_forward()
        if slot is None or not self.is_on:  # the cadence, which is the user's, has detached
            return
        with self.ledger.guard("forward"):
            if not slot.validation and self._moved_unseen(root):
                return
            elsewhere = self._forward is not None and self._forward.is_alive()
            if not elsewhere and not is_traced() and not is_running(mc_dropout):
                self._optimizers.recheck()
                self._handled, self._depth, self._slot = sys.exc_info()[1], 0, slot
                due = slot.due._asdict()
                self._forward = ObservedForward(root, given, self.wanted, **due, ledger=self.ledger)
            if not slot.validation and slot.due.scalars:
                self._gradients.watch(root)

    def _after_forward(self, root: nn.Module, args: Any, output: Any) -> None:
        """The hook that is called even when the forward of `root` raised."""
        forward, slot = self._forward, self._slot
        if forward is None or slot is None or torch.compiler.is_compiling():
            return
        if root is not self.root() or forward.thread != threading.get_ident():
            return
        if self._depth:
            self._depth -= 1
            return
        with self.ledger.guard("forward"):
            handled = self._handled
            self._close_forward()
            if not self.is_on:
                self._hooks.remove()
            elif sys.exc_info()[1] is handled:  # else it raised: not a whole forward
                readings = forward.readings(root, output)
                if not slot.validation:
                    self._pool.merge(readings)
                    return
                if not self.schedule.steps:
                    self.recorder.send()
                slot = self.schedule.validated(slot)
                self.recorder.add(Pending(slot.step, *slot.due, prefix="val", readings=readings))

    def _close_forward(self) -> None:
        """Close the forward that is observed in this thread."""
        if self._forward is not None and self._forward.thread == threading.get_ident():
            self._forward.close()
            self._forward = self._handled = None

    def _moved_unseen(self, root: nn.Module) -> bool:
        """Whether the parameters change, twice at least, and no optimizer is seen: said once."""
        if self.schedule.steps:
            return False
        with without_modes():
            if (changed := self._probe.changed(root)) is not None:
                self._changes.append(Transfer([changed]))
        while self._changes and self._changes[0].is_done():
            self._moves += bool(self._changes.popleft().result()[0])
        # LBFGS moves them too, between the calls of its closure.
        if self._moves < 2 or steps_on_stack():
            return False
        self.ledger.warn_once(
            "optimizer",
            "the parameters change, but no torch.optim.Optimizer that holds them has stepped: "
            "call handle.advance() after each step",
        )
        self.schedule.moved_unseen()
        return True

    def optimizer_begins(self, optimizer: Optimizer) -> None:
        """A step of `optimizer`, which may be another model's, begins."""
        root = self.root()
        if root is not None and "updates" in self.wanted.kinds and self.is_seen(optimizer):
            again = self._optimizers.share(optimizer, self.schedule.stepped)
            if self.schedule.optimizer_begins(optimizer, again).scalars:
                self._gradients.remember(root, optimizer)

    def count(self, optimizer: Optimizer | None) -> None:
        """An optimizer has stepped; None is one that torch tells nothing of."""
        schedule = self.schedule
        again = self._optimizers.share(optimizer, schedule.stepped)
        begins = schedule.begins_step(optimizer, again)
        if begins:
            self._close_forward()
            if schedule.steps == 1 or (self._step and not self._step.readings.forwards):
                self._say_absent()
            self.recorder.send()
            self._step = None
        slot = schedule.optimizer_ends(optimizer, again, known=len(self._optimizers))
        if not self.is_on:  # the cadence has detached
            return
        if slot is not None:
            self._step = Pending(slot.step, *slot.due, stepped=True)
            self.recorder.add(self._step)
        pool, self._pool = self._pool, Readings()
        root, step = self.root(), self._step  # which another thread may end
        if step is not None and root is not None:
            with self.ledger.guard("optimizer step"):
                step.readings.merge(pool)
                self._gradients.measure(
                    root,
                    optimizer,
                    readings=step.readings,
                    index=(optimizer and self._index(optimizer)) or 0,
                    steps=schedule.steps - 1,
                    **schedule.due._asdict(),
                    others=self._optimizers.held_by_others(optimizer) if begins else None,
                )
        self._watch()

    def _watch(self) -> None:
        root = self.root()
        if self.schedule.watches and root is not None:
            self._gradients.watch(root)
        else:
            self._gradients.unwatch()

    def is_seen(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` holds a parameter of the model, and its steps count here."""
        return self.is_on and self.is_here() and self._index(optimizer) is not None

    def _index(self, optimizer: Optimizer) -> int | None:
        try:
            return self._optimizers.index(optimizer, self.root())
        except Exception as error:
            self.ledger.failed("parameters of the optimizer", error)
            return None

    def _say_absent(self) -> None:
        say_absent(self.root(), self.wanted, self.ledger, self.calls, self.schedule.steps)


# torch tells of the steps of all optimizers in one place, so all attachments listen through one
# pair of hooks. torch walks over its hooks during a step: none may be taken off before that ends.
_listeners: list[Wiring] = []
_hooks: list[Callable[[], None]] = []


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for wiring in () if torch.compiler.is_compiling() else tuple(_listeners):
        wiring.optimizer_begins(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for wiring in () if torch.compiler.is_compiling() else tuple(_listeners):
        if wiring.is_seen(optimizer):
            wiring.count(optimizer)
