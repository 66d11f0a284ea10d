"""Handle: the hooks and the lifetime of an attachment. It decides when; it computes nothing.

In: the forwards of the model and the steps of its optimizers. Out: one event per logged number.

Forwards in training mode wait for the optimizer step that follows and go with its round; forwards
in eval mode stand apart, under `val/`.
"""

import atexit
import functools
import os
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks as optimizer_hooks
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from .capture.forward import Window
from .capture.gradients import Updates
from .forwards import Forwards
from .health.alerts import Alert
from .health.conditions import Figures, Thresholds
from .names import module_names, parameter_names
from .record.recorder import Batch, Outbox
from .record.writers import Event, close, is_main_rank, open_writer
from .report import Ledger, Report, fused_away, reasons, unattended
from .steps import Cadence, Optimizers, Steps
from .torch_private import Hook, is_compiled, steps_on_stack

KINDS = ("attention", "gradients", "learning_rate", "uncertainty", "histograms")
ON_REQUEST = ("activations", "updates")


class Handle:
    """An attachment, as `attach` returns it. A context manager: leaving it detaches.

    Attributes:
        writer: what is written to; None where nothing is.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Any,
        *,
        backend: str,
        prefix: str,
        capture: Collection[str] | None,
        selected: Callable[[str], bool],
        globs: Collection[str],
        rows: int | None,
        cadences: tuple[Cadence, Cadence],
        step: int,
        thresholds: Thresholds,
        on_alert: Callable[[Alert], object] | None,
        strict: bool,
    ) -> None:
        self.target, self.prefix = target, prefix
        self._root = weakref.ref(model)
        self._kinds = KINDS if capture is None else capture
        self._asked = capture is not None
        self._selected, self._globs = selected, globs
        self._ledger = Ledger(strict)
        self._process = os.getpid()  # a forked child has the hooks, and no writer's thread
        self._steps = Steps(step, cadences, self._ledger.failed)
        self._optimizers = Optimizers()

        self._round: Batch | None = None  # the round that has begun, if it is logged
        self._inert: list[RemovableHandle] = []  # left behind by a detach inside a step

        self._opened = isinstance(target, Path) and is_main_rank()
        self.writer: Any = None if isinstance(target, Path) else target
        if self._opened:
            self.writer = open_writer(target, backend)
        self._outbox = Outbox(self.writer, prefix, thresholds, on_alert, self._ledger)
        self._updates = Updates(selected, self._kinds, self._ledger)
        self._forwards = Forwards(
            self._root,
            functools.partial(Window, selected=selected, rows=rows, ledger=self._ledger),
            self._kinds,
            self._steps,
            self._optimizers,
            self._updates,
            self._outbox,
            self._ledger,
        )
        # Exit handlers run in reverse order: this one before that of a writer opened earlier.
        atexit.register(self.detach)
        self._finalizer = weakref.finalize(model, self.detach)
        self._finalizer.atexit = False
        before, after = Hook(self._forwards.before), Hook(self._forwards.after)
        if isinstance(model, nn.TransformerEncoderLayer):
            # A hook of its own switches its C++ fast path off, one on all modules does not.
            self._handles = [
                module.register_module_forward_pre_hook(before),
                module.register_module_forward_hook(after, always_call=True),
            ]
        else:
            self._handles = [
                model.register_forward_pre_hook(before, with_kwargs=True),
                model.register_forward_hook(after, always_call=True),
            ]
        self._handles.append(register_optimizer_step_post_hook(self._after_optimizer))
        if "updates" in self._kinds:
            self._handles.append(register_optimizer_step_pre_hook(self._before_optimizer))
        if self._steps.due_next.scalars:
            self._updates.watch(model)

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is an attachment to `model`."""
        return self._root() is model

    @property
    def step(self) -> int:
        """The number of the next step: `step=` and the rounds begun since."""
        steps = self._steps
        return steps.number if steps.rounds else steps.number + steps.inferences

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """What began to be wrong so far, in the order in which it was seen."""
        return tuple(self._outbox.alerts)

    def judge(self, event: Event, figures: Figures, number: int, prefix: str) -> None:
        """Put into `event`, which goes under `prefix`, what is wrong by the thresholds."""
        self._outbox.judge(event, figures, number, prefix)
        self._outbox.tell()

    def advance(self) -> None:
        """Say, after it, that an optimizer stepped that is no `torch.optim.Optimizer`."""
        self._count(None, None)

    def flush(self) -> None:
        """Write to the disk what was measured so far, also of a step that is not over."""
        steps, pool = self._steps, self._forwards.take()
        if any(steps.due_next) or self._round is None:
            self._outbox.add(Batch(steps.number, steps.due_next, readings=pool))
        else:
            self._round.readings.merge(pool)
        self._outbox.flush()
        if self._round is not None:  # another optimizer may still step in it
            self._outbox.add(self._round)

    def report(self) -> Report:
        """What was captured; what was selected and has not been seen, and why."""
        return self._ledger.report(self._unseen())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue the charts, plain data; flushes first."""
        self.flush()
        outbox = self._outbox
        return self._steps.state_dict() | {
            "skipped": outbox.skips.count,
            "alerts": outbox.lasting(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the step of `state`, without a gap, a double point or a second alert."""
        known = self.state_dict().keys()
        if state.keys() != known:
            raise ValueError(
                f"Handle.load_state_dict: expected the keys {sorted(known)} that "
                f"Handle.state_dict() gives, got {sorted(state)}"
            )
        self._steps.load_state_dict(state)
        self._outbox.skips.count = state["skipped"]
        self._outbox.resume(state["alerts"])
        self._round, self._forwards.watch = None, any(self._steps.due_next)

    def detach(self) -> None:
        """Write what was measured, and take everything off the model, the optimizers and torch.

        A writer that `attach` opened is closed. A second call does nothing.
        """
        if not self._handles:
            return
        handles, self._handles = self._handles, []
        if os.getpid() != self._process:
            return
        if self._forwards.is_elsewhere():
            self._forwards.last_handle = handles.pop(1)  # that forward ends with this hook
        # torch walks over its optimizer hooks right now, which must stay as many until it is done.
        own = 2 if "updates" in self._kinds else 1  # the last ones
        kept = handles[-own:] if steps_on_stack() else []
        for handle in handles[: len(handles) - len(kept)]:
            handle.remove()
        self._inert = kept
        self._updates.unwatch()
        self._finalizer.detach()
        atexit.unregister(self.detach)
        self._forwards.close()
        self.flush()
        self._say_absent()
        self._round = None
        if self._opened:
            with self._ledger.guard("close of the writer"):
                close(self.writer)

    def sweep(self) -> None:
        """Take off what a `detach` inside an optimizer's step had to leave, which does nothing."""
        if not steps_on_stack():
            for handle in self._inert:
                handle.remove()
            self._inert = []

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _index(self, optimizer: Optimizer) -> int | None:
        try:
            return self._optimizers.index(optimizer, self._root())
        except Exception as error:
            self._ledger.failed("parameters of the optimizer", error)
            return None

    def _is_on(self) -> bool:
        return (
            not torch.compiler.is_compiling()
            and bool(self._handles)
            and os.getpid() == self._process
        )

    def _before_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_on():
            return
        if self._index(optimizer) is not None:
            steps = self._steps
            due = steps.due_next if self._begins_round(optimizer) else steps.due
            root = self._root()
            if due.scalars and root is not None:
                self._updates.remember(root, optimizer)

    def _after_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_on():
            return
        index = self._index(optimizer)
        if index is not None:
            self._count(optimizer, index)

    def _count(self, optimizer: Optimizer | None, index: int | None) -> None:
        steps = self._steps
        begins = self._begins_round(optimizer)
        if begins:
            self._end_round()
        steps.count(optimizer, begins)
        if not self._handles:  # the cadence, which is the user's, has detached
            return
        if begins and any(steps.due):
            self._round = Batch(steps.number - 1, steps.due, stepped=True)
            self._outbox.add(self._round)
        root, batch = self._root(), self._round  # which another thread may end
        if batch is not None and root is not None:
            with self._ledger.guard("optimizer step"):
                readings = batch.readings
                readings.merge(self._forwards.pool)
                others = self._optimizers.others(optimizer)
                self._updates.measure(
                    root,
                    optimizer,
                    index,
                    steps.due,
                    readings,
                    others=others if len(steps.stepped) == 1 else None,
                    steps=steps.rounds - 1,
                )
        if self._forwards.watch:
            self._forwards.take()
        # Another optimizer may step in this round: what it is given belongs to it too.
        more = self._round is not None and len(steps.stepped) < len(self._optimizers)
        self._forwards.watch = any(steps.due_next) or more
        # In the first round the others are not known yet.
        watched = steps.due_next.scalars or (steps.due.scalars and (more or steps.rounds == 1))
        if watched and root is not None:
            self._updates.watch(root)
        else:
            self._updates.unwatch()

    def _begins_round(self, optimizer: Optimizer | None) -> bool:
        stepped = self._steps.stepped
        return self._steps.begins_round(optimizer) or any(
            self._optimizers.share(optimizer, other) for other in stepped
        )

    def _end_round(self) -> None:
        self._forwards.close()
        if self._steps.rounds == 1:
            self._say_absent()
        self._outbox.send()
        self._round = None

    def _say_absent(self) -> None:
        """Warn of what was asked for by name and not seen, and of a forward that never ran."""
        unseen = self._unseen()
        for kind, why in unseen.items() if self._asked else ():
            self._ledger.say(kind, why)
        root = self._root()
        if root is not None:
            with self._ledger.guard("include"):
                names = {*parameter_names(root).values(), *module_names(root).values()}
                if not any(map(self._selected, names)):
                    self._ledger.say("include", "it selects no module path and no parameter name")
        if (
            self._steps.rounds
            and not self._forwards.calls
            and "attention" in unseen
            and not self._asked
        ):
            self._ledger.say("attention", unseen["attention"])

    def _unseen(self) -> dict[str, str]:
        """Why each kind has not been seen so far."""
        root = self._root()
        paths = {} if root is None else module_names(root)
        compiled: list[str] = []
        with self._ledger.guard("compiled modules"):
            compiled = [path for module, path in paths.items() if is_compiled(module)]
        why = reasons(
            called=self._forwards.calls > 0, stepped=self._steps.rounds > 0, compiled=compiled
        )
        missed = {kind: why[kind] for kind in self._kinds if not self._ledger.names(kind)}
        if seen := self._ledger.names("attention"):
            missed |= unattended(self._globs, paths.values(), seen)
            missed |= fused_away(compiled, seen)
        return missed


def attachments() -> list[Handle]:
    """The attachments that there are, to any model."""
    owners = [getattr(hook, "__self__", None) for hook in optimizer_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Handle)]
