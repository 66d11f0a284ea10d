"""Stack: which modules, optimizers and dispatch modes run in this thread.

From its Python frames: no hook, so nothing that would switch off a fast path or recompile a graph.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Container, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
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

    Args:
        owner: whose hook it is.
    """

    def __init__(self, owner: Any, call: Callable[..., None]) -> None:
        self.owner, self._call = owner, call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


# What `capture` needs to watch operators.


@functools.cache
def _watching() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        supports_higher_order_operators = True

        def __init__(self, handle: Callable[..., Any]) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # torch's, not annotated
            self.handle = handle

        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return self.handle(func, args, kwargs or {})

    return Watching


def dispatch_mode(handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    """A context in which each operator of this thread becomes `handle(operator, args, kwargs)`.

    Forward hooks see modules and no operators, and `TorchFunctionMode` lies above autograd and
    switches torch.nn's fast paths off. `TorchDispatchMode` and its two switches: torch 2.11 or
    before. Without `supports_higher_order_operators` flex_attention raises under a mode; without
    `ignore_compile_internals` compiled regions run eagerly, and those with fullgraph=True raise.
    """
    return _watching()(handle)


def leave(mode: Any) -> None:
    """Take `mode` off the stack of modes, also from below others that an exception left behind.

    Publicly a mode is only left in its own order. `_get_current_dispatch_mode_stack`, `_pop_mode`
    and `_push_mode`: torch 2.11 or before. If they were renamed: ImportError.
    """
    from torch.utils._python_dispatch import (
        _get_current_dispatch_mode_stack,
        _pop_mode,
        _push_mode,
    )

    if mode not in _get_current_dispatch_mode_stack():
        return
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    _push_mode(top)
    mode.__exit__(None, None, None)
    for other in reversed(above):
        _push_mode(other)


@contextlib.contextmanager
def as_outside_modes() -> Iterator[None]:
    """Let `linear` and `matmul`, which a mode is handed whole, run as they do without a mode.

    Under inference_mode, and inside a mode's handler, the views that they take of a weight lose its
    requires_grad, by which torch chooses between mm and bmm: results are 1e-7 apart. Nothing public
    does it. `_dispatch_tls_set_dispatch_key_excluded`: torch 2.11 or before. If it was renamed:
    AttributeError; if torch chose otherwise: outputs that differ in their last bits.
    """
    key = torch._C.DispatchKey.ADInplaceOrView
    if not torch._C._dispatch_tls_is_dispatch_key_excluded(key):
        yield
        return
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def own_tensors(modules: Collection[nn.Module]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The parameters and the buffers that `modules` hold themselves.

    The public `named_parameters(recurse=False)` and `named_buffers` take 18 times as long (370 us
    for 82 modules), and a model may override them. `_parameters` and `_buffers`: torch 2.11 or
    before. If they were renamed: AttributeError.
    """
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    return parameters, [b for m in modules for b in m._buffers.values() if b is not None]


def schema(func: Any) -> torch.FunctionSchema | None:
    """The schema of an operator: its names, defaults, and whether it overwrites; None of others.

    `OpOverload` and its `_schema`: torch 2.11 or before; the operator itself has only its name and
    tags. If they were renamed: AttributeError.
    """
    return func._schema if isinstance(func, torch._ops.OpOverload) else None


def storage_of(tensor: Tensor) -> tuple[int, torch.UntypedStorage] | None:
    """The storage of `tensor`, with what it is known by while it lives; None if it has none.

    Parameters inside `torch.func.grad` or `vmap` are wrappers, which a dispatch mode never sees:
    they are unwrapped. The public `data_ptr` is 0 of every empty one. `_functorch` and `_cdata`:
    torch 2.11 or before. If they were renamed: AttributeError.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    try:
        storage = tensor.untyped_storage()
    except RuntimeError:  # a sparse tensor has none
        return None
    return storage._cdata, storage
