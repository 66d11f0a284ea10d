"""Stack: which modules, optimizers and dispatch modes run in this thread.

From its Python frames: no hook, so nothing that would switch off a fast path or recompile a graph.
"""

import contextlib
import sys
from collections.abc import Callable, Container, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer
from torch.utils._python_dispatch import _pop_mode, _push_mode

_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)


def innermost(modules: Container[nn.Module]) -> nn.Module | None:
    """The innermost of `modules` that is called."""
    for frame in frames():
        if frame.f_code in _CALLS and frame.f_locals["self"] in modules:
            module: nn.Module = frame.f_locals["self"]
            return module
    return None


def calls_on_stack(module: nn.Module) -> int:
    """How many calls of `module` are running in this thread."""
    return sum(frame.f_code is _CALLS[0] and frame.f_locals["self"] is module for frame in frames())


def steps_on_stack() -> bool:
    """Whether an optimizer's step runs in this thread, or torch's hooks around it."""
    return any(frame.f_globals is vars(optimizer) for frame in frames())


def is_running(function: Callable[..., Any]) -> bool:
    """Whether a call of `function` runs in this thread."""
    return any(frame.f_code is function.__code__ for frame in frames())


def is_traced() -> bool:
    """Whether what runs is traced into a graph, of which ours must not become a part."""
    modes = torch._C._TorchDispatchModeKey
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return True
    return torch._C._is_tracing() or any(
        torch._C._get_dispatch_mode(key) is not None for key in (modes.FAKE, modes.PROXY)
    )


def frames() -> Iterator[FrameType]:
    """The Python stack of this thread, from the innermost frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """No dispatch mode sees what runs inside: a FLOP counter counts the model and none of ours."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


class Hook:
    """A hook that copies as nothing.

    deepcopy, pickle and torch.save carry `nullcontext().__exit__` in its place, which takes any
    arguments and does nothing: copies are silent, and load where bthooks is not installed.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")
