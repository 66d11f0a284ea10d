"""Steps: what is told of each step of every optimizer, by torch's hooks on all of them.

An optimizer may step others within its own step (Lookahead, ZeroRedundancyOptimizer, a subclass
that calls `super().step()`), and torch tells of each. So it is kept which of them run, by thread.
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..torch_private import is_captured, steps_on_stack


class Listener(Protocol):
    """What is told of steps."""

    def optimizer_begins(self, optimizer: Optimizer, is_outermost: bool) -> None:
        """A step of `optimizer`, which may be another model's, begins."""

    def optimizer_ended(
        self, optimizer: Optimizer, inside: list[Optimizer], is_outermost: bool
    ) -> None:
        """It has ended; `inside` it these have stepped, which step no other."""

    def optimizer_captured(self, optimizer: Optimizer) -> None:
        """It is recorded into a CUDA graph, of which ours must not become a part."""


# One pair of hooks for all attachments. torch walks over its hooks during a step: none may be
# taken off before that ends.
_listeners: tuple[Listener, ...] = ()
_hooks: list[Callable[[], None]] = []
# By thread: the optimizers whose steps run, each within the one before, with those inside it.
_running: dict[int, list[tuple[Optimizer, list[Optimizer]]]] = {}


def listen(listener: Listener) -> None:
    """Tell `listener` of all steps."""
    global _listeners
    _listeners = (*_listeners, listener)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step).remove)
        _hooks.append(register_optimizer_step_post_hook(_after_step).remove)


def unlisten(listener: Listener) -> None:
    """Tell `listener` of no step any more."""
    global _listeners
    _listeners = tuple(other for other in _listeners if other is not listener)
    if not _listeners and not steps_on_stack():
        for remove in _hooks:
            remove()
        _hooks.clear()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if is_captured():
        for listener in _listeners:
            listener.optimizer_captured(optimizer)
        return
    running = _running.get(threading.get_ident())
    if running is None:
        running = _running[threading.get_ident()] = []
    elif running:
        del running[max(steps_on_stack() - 1, 0) :]  # those that raised have had no second hook
    for listener in _listeners:
        listener.optimizer_begins(optimizer, not running)
    running.append((optimizer, []))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    running = _running.get(threading.get_ident())
    if running and running[-1][0] is optimizer:
        _, inside = running.pop()
    elif is_captured():
        return
    else:
        inside = []
    for listener in _listeners:
        listener.optimizer_ended(optimizer, inside, not running)
    if running:
        running[-1][1].extend(inside or [optimizer])
