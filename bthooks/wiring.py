"""Wiring: torch's callbacks -> schedule -> capture -> recorder. It says when; it computes nothing.

What torch tells of are the forwards of the attached model, through hooks on it, and the steps of
all optimizers, through torch's own hooks for them. Training forwards wait in a pool for the
optimizer step that follows and go with it; eval forwards stand apart, under `val/`.
"""

import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import get_worker_info

from .capture.calls import calls_of
from .capture.forward import ObservedForward, uncertainty_of
from .capture.gradients import Gradients
from .capture.heads import heads_of
from .capture.optimizers import Known, Optimizers, Probe
from .capture.steps import listen, unlisten
from .capture.wanted import Wanted
from .measure.readings import Readings
from .measure.uncertainty import mc_dropout
from .record.recorder import Pending, Recorder
from .record.transfer import Transfer
from .record.turns import put_off, turn
from .report import Ledger
from .schedule import BY_HAND, Schedule, Slot
from .torch_private import (
    backward_pass,
    calls_on_stack,
    is_rehearsed,
    is_running,
    is_traced,
    steps_on_stack,
    without_modes,
)
from .unseen import CAPTURED, NO_STEP, PATIENCE, UNSEEN_STEP, UNSEEN_TRAINING, say_absent


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
        self._optimizers = Optimizers(schedule.optimizer_is_gone)
        self._gradients = Gradients(wanted, ledger)
        self._probe, self._changes, self._moves = Probe(), deque[Transfer](), 0
        self._pool: Readings | None = None  # of the training forwards since the last step
        self._step: Pending | None = None  # the step that has begun, if it is logged
        self._validation: Pending | None = None  # the pass that goes on
        self._forward: ObservedForward | None = None  # the one that runs
        self._slot: Slot | None = None  # where its readings go
        self._depth = 0  # calls of the root inside its own forward
        self._handled: BaseException | None = None
        self.is_on = True
        self._hooks = calls_of(model, self._before_forward, self._after_forward)
        with ledger.guard("torch.jit.script"):
            self._hooks.hide()
        listen(self)
        self._watch()
        self._changed(model)

    def is_here(self) -> bool:
        """Whether this is the process that writes: a forked child has the hooks alone."""
        return self.recorder.output.is_here()

    def _may_train(self, root: nn.Module) -> bool:
        """Whether a forward of `root` is to be seen: also in a fork that may move the writing."""
        if self.is_here():
            return True
        trains = root.training and torch.is_grad_enabled() and get_worker_info() is None
        return trains and self.recorder.output.may_move()

    def flush(self) -> None:
        """Hand over all that was observed, also of a step that is not over, and write it."""
        if put_off(self.flush):
            return
        with turn, self.ledger.lock:
            goes_on, pool, self._pool = [], self._pool, None
            if pool is not None and (slot := self.schedule.flush()) is not None:
                self.recorder.add(Pending(slot.step, *slot.due, readings=pool, goes_on=True))
            elif pool is not None and self._step is not None:
                self._step.readings.merge(pool)
            if self._step is not None:
                goes_on.append(self._step)  # in which another optimizer may still step
            if self._validation is not None:  # what is a mean over the pass waits for its end
                mean = self._validation.readings.take_uncertainty()
                self._validation = replace(self._validation, readings=mean, has_left=False)
                goes_on.append(self._validation)
        self.recorder.flush(*goes_on)

    def resume(self) -> None:
        """The schedule goes on elsewhere: no step has begun."""
        self._step = self._validation = None

    def off(self) -> None:
        """Take everything off the model, the optimizers and torch; flush what is left."""
        self.is_on = False
        if put_off(self.off):
            return
        self._hooks.stop()
        # A forward that another thread runs, or in the middle of whose capture a signal's handler
        # detaches, ends with a hook, which then takes itself off.
        running = self._forward
        if running is None or (running.thread == threading.get_ident() and running.can_close()):
            self._hooks.remove()
            self._close_forward()
        unlisten(self)
        self._gradients.unwatch()
        self._gradients.ended()
        self._validation = None
        self.flush()
        self._say_absent()
        root = self.root()
        if root is not None and not (self.calls or self.schedule.steps):
            with self.ledger.guard("parameters"):
                if bool(self._changed(root)):
                    self.ledger.warn_once("optimizer", UNSEEN_TRAINING)
        self._step = None

    def _before_forward(self, root: nn.Module, *given: Any) -> None:
        if torch.compiler.is_compiling() or root is not self.root() or not self._may_train(root):
            return
        self.calls += 1
        self.recorder.send_on()
        running = self._forward
        if running is not None and running.thread == threading.get_ident():
            is_inside = True
            with self.ledger.guard("forward"):
                is_inside = calls_on_stack(root) > 1
            if is_inside:
                self._depth += 1
                return
            self._close_forward()  # KeyboardInterrupt skips the hook that closes it
        if not root.training:
            slot = self.schedule.eval_forward()
        elif torch.is_grad_enabled():
            slot = self.schedule.training_forward()
            if self._validation is not None and self._validation.goes_on:
                self._validation.goes_on = False
                self.recorder.send_ahead(self._validation.step)
            if self.schedule.forwards == PATIENCE and not (self.schedule.steps or steps_on_stack()):
                self.ledger.warn_once("optimizer", NO_STEP)
        else:
            return  # a rollout, a reference pass: it belongs to no step
        if slot is None:
            return
        with self.ledger.guard("forward"), turn:
            if not self.is_on:  # the cadence, which is the user's, has detached
                return
            if not slot.validation and self._moved_unseen(root):
                return
            elsewhere = self._forward is not None and self._forward.is_alive()
            is_real = not (is_traced() or is_rehearsed() or is_running(mc_dropout))
            if is_real and not elsewhere:
                self._optimizers.recheck()
                self.recorder.ranks.look_first(slot.step)
                self._handled, self._depth, self._slot = sys.exc_info()[1], 0, slot
                due = slot.due._asdict()
                self._forward = ObservedForward(root, given, self.wanted, **due, ledger=self.ledger)
            if not slot.validation and slot.due.scalars:
                self._gradients.forget_names()
                self._gradients.watch(root)

    def _after_forward(self, root: nn.Module, args: Any, output: Any) -> None:
        """The hook that is called even when the forward of `root` raised."""
        forward, slot = self._forward, self._slot
        if torch.compiler.is_compiling() or root is not self.root() or not self.is_here():
            return
        if forward is None or slot is None or forward.thread != threading.get_ident():
            self._validate_further(root, output)
            return
        if self._depth:
            self._depth -= 1
            return
        with self.ledger.guard("forward"), turn:
            handled = self._handled
            self._close_forward()
            if not self.is_on:
                self._hooks.remove()
            elif sys.exc_info()[1] is handled:  # else it raised: not a whole forward
                readings = forward.readings(root, output)
                if slot.validation:
                    self._validated(root, slot, readings)
                elif self._pool is None:
                    self._pool, self.recorder.expects = readings, True
                else:
                    self._pool.merge(readings)

    def _validated(self, root: nn.Module, slot: Slot, readings: Readings) -> None:
        """The first forward of a validation pass has ended, or one of inference."""
        self._place(root, readings)
        slot = self.schedule.validated(slot)
        pending = Pending(slot.step, *slot.due, prefix="val", readings=readings)
        if self.schedule.trains:
            pending.goes_on = True
            self._validation = pending
        else:
            self.recorder.send()
        self.recorder.add(pending)
        self.recorder.send_ahead(pending.step)

    def _place(self, root: nn.Module, readings: Readings) -> None:
        """Keep which heads of the maps in `readings` this rank has."""
        if self.recorder.ranks.are_several:
            with self.ledger.guard("heads"):
                readings.heads |= heads_of(root, readings.attention)

    def _validate_further(self, root: nn.Module, output: Any) -> None:
        """A further forward of a validation pass has ended: its uncertainty counts."""
        pending = self._validation
        if pending is None or root.training or "uncertainty" not in self.wanted.kinds:
            return
        with self.ledger.guard("uncertainty"), turn:
            if not (is_running(mc_dropout) or is_traced() or calls_on_stack(root) > 1):
                further = uncertainty_of(output, pending.histograms, self.ledger)
                pending.readings.merge(further)

    def _close_forward(self) -> None:
        """Close the forward that is observed in this thread."""
        if self._forward is not None and self._forward.thread == threading.get_ident():
            self._forward.close()
            self._forward = self._handled = None

    def _moved_unseen(self, root: nn.Module) -> bool:
        """Whether the parameters change, twice at least, and no optimizer is seen: said once."""
        if self.schedule.steps:
            return False
        changed = self._changed(root)
        if changed is not None and self.schedule.forwards > 1:  # else a checkpoint was loaded
            self._changes.append(Transfer([changed]))
        while self._changes and self._changes[0].is_done():
            self._moves += bool(self._changes.popleft().result()[0])
        # LBFGS moves them too, between the calls of its closure.
        if self._moves < 2 or steps_on_stack():
            return False
        self.ledger.warn_once("optimizer", UNSEEN_STEP)
        self.schedule.moved_unseen()
        return True

    def _changed(self, root: nn.Module) -> Tensor | None:
        """Whether a parameter is another than at the last call, 0-d; None if that can't be told."""
        with self.ledger.guard("parameters"), without_modes():
            return None if is_traced() else self._probe.changed(root)
        return None

    def optimizer_begins(self, optimizer: Optimizer, is_outermost: bool) -> None:
        """A step of `optimizer`, which may be another model's, begins."""
        if not (self.schedule.is_near or self._optimizers.any_wraps):
            return
        if is_outermost:
            self._gradients.ended()
        known, root = self._find(optimizer), self.root()
        if known is None or root is None:
            return
        with self.ledger.guard("parameters of the optimizer"):
            known.begins()
        backward = self._backward()
        due = self.schedule.optimizer_begins(known.numbers(), backward)
        if any(due):
            with turn:
                if is_outermost and backward is None:
                    self._gradients.forget_names()
                if self.is_on:
                    suspects = self.recorder.suspects
                    self._gradients.begins(root, optimizer, **due._asdict(), suspects=suspects)

    def optimizer_ended(
        self, optimizer: Optimizer, inside: list[Optimizer], is_outermost: bool
    ) -> None:
        """A step of `optimizer` has ended, in which those `inside` have stepped."""
        if is_outermost and not inside and not self.schedule.is_near:
            try:  # `_backward` is a frame more, for each of the optimizers in a backward pass
                number = self._optimizers.number_of(optimizer)
                if self.schedule.goes_on(number, backward_pass()):
                    return
            except Exception as error:
                self.ledger.failed("optimizers that step in backward()", error)
        known = self._find(optimizer)
        if inside:
            if known is not None:
                self._optimizers.wraps(known)
            found = [self._find(each) for each in dict.fromkeys(inside)] if is_outermost else []
            stepped = [each for each in found if each is not None]
            if known is not None and not any(known.shares(each) for each in stepped):
                stepped = [known, *stepped]  # it updates others itself
            if stepped and is_outermost:
                self.count(stepped)
        elif known is not None:
            self._gradients.stepped(optimizer)
            if is_outermost and known.has_updated():
                self.count([known])

    def count(self, stepped: Sequence[Known] = ()) -> None:
        """Optimizers have stepped together; none: it is told by hand."""
        schedule, optimizers, backward = self.schedule, self._optimizers, self._backward()
        numbers = [n for known in stepped for n in known.numbers()] if stepped else [BY_HAND]
        begins = schedule.begins_step(numbers, backward)
        if begins:
            self._close_forward()
            if schedule.steps == 1 or (self._step and not self._step.readings.forwards):
                self._say_absent()
            self.recorder.send(schedule.upcoming)
            self._step = self._validation = None
            self._gradients.forget_names()
            optimizers.forget()
        first, *others = map(optimizers.number, stepped) if stepped else (BY_HAND,)
        with turn, self.ledger.lock:
            slot = schedule.optimizer_ends(first, begins, backward, optimizers.count)
            for number in others:
                schedule.optimizer_ends(number, False, backward, optimizers.count)
            if not self.is_on:  # the cadence, which is the user's, has detached
                return
            if slot is not None:
                self._step = Pending(slot.step, *slot.due, stepped=True)
                self.recorder.add(self._step)
            if self._step is not None or self._pool is not None:
                self._measure(stepped, begins, backward)
            if self._step is not None:
                self._step.goes_on = schedule.expects_more
                if not self._step.goes_on:
                    self.recorder.send_ahead(self._step.step)
            if schedule.watches != self._gradients.is_watching:
                self._watch()

    def _measure(self, stepped: Sequence[Known], begins: bool, backward: int | None) -> None:
        pool, self._pool = self._pool, None
        root, step = self.root(), self._step  # which another thread may end
        if step is None or root is None:
            return
        with self.ledger.guard("optimizer step"):
            if pool is not None:
                step.readings.merge(pool)
                self._place(root, step.readings)
            step.readings.in_backward |= backward is not None
            self._gradients.measure(
                root,
                stepped,
                readings=step.readings,
                steps=self.schedule.steps - 1,
                **self.schedule.due._asdict(),
                others=self._optimizers.held_by_others(stepped) if begins else None,
            )
            self._gradients.ended()

    def _watch(self) -> None:
        root = self.root()
        if self.schedule.watches and root is not None:
            self._gradients.watch(root)
        else:
            self._gradients.unwatch()

    def _find(self, optimizer: Optimizer) -> Known | None:
        """`optimizer`, if it holds a parameter of the model and its steps count here."""
        if not self.is_on:
            return None
        try:
            known = self._optimizers.find(optimizer, self.root())
        except Exception as error:
            self.ledger.failed("parameters of the optimizer", error)
            return None
        # Where nothing is written it need not be asked, at 0.4 us each time.
        if known is not None and self.schedule.is_near and not self.is_here():
            self.recorder.output.move()
            return known if self.is_here() else None
        return known

    def _say_absent(self) -> None:
        say_absent(self.root(), self.wanted, self.ledger, self.calls, self.schedule.steps)

    def optimizer_captured(self, optimizer: Optimizer) -> None:
        """A step is recorded into a CUDA graph, of which ours must not become a part."""
        if self._find(optimizer) is not None:
            self.ledger.warn_once("optimizer", CAPTURED)

    def _backward(self) -> int | None:
        """The backward pass within which an optimizer steps."""
        try:
            return backward_pass()
        except Exception as error:
            self.ledger.failed("optimizers that step in backward()", error)
            return None
