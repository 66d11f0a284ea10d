"""Calls: what is told of each call of the attached model, by hooks on it."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from ..torch_private import Hook, hide_from_script

# Those whose hooks torch.jit.script is to pass over, and what ends that once there is none.
_hidden: list["Calls"] = []
_ends: list[Callable[[], None]] = []


class Calls:
    """Calls `before(root, args, kwargs)` and `after(root, args, output)` around each call of it.

    The latter is called even when the forward raises.
    """

    _after: RemovableHandle | None

    def __init__(
        self, root: nn.Module, before: Callable[..., None], after: Callable[..., None]
    ) -> None:
        self._before = Hook(before).put(root.register_forward_pre_hook, "with_kwargs")
        self._after = Hook(after).put(root.register_forward_hook, "always_call")

    def hide(self) -> None:
        """Let torch.jit.script pass over the hooks, until `remove`."""
        if not _ends:
            _ends.append(hide_from_script())
        _hidden.append(self)

    def stop(self) -> None:
        """No call is told of any more; that one that runs ends is."""
        self._before.remove()

    def remove(self) -> None:
        """Take everything off."""
        self.stop()
        if self._after is not None:
            self._after.remove()
        if self in _hidden:
            _hidden.remove(self)
        if _ends and not _hidden:
            _ends.pop()()


class CallsOfLayer(Calls):
    """The same of an nn.TransformerEncoderLayer, whose C++ fast path is off while it has a hook.

    So the pre-hook takes itself off for the call, and a hook on all modules, which the layer does
    not ask for, waits for its end. No longer than that: torch.compile and a strict torch.export of
    any model trace such a hook, which costs new graphs or fails. Of the layer itself they trace the
    other path, as with any hook.
    """

    def __init__(
        self, root: nn.Module, before: Callable[..., None], after: Callable[..., None]
    ) -> None:
        self._root, self._tell_before, self._tell_after = weakref.ref(root), before, after
        self._is_on, self._thread = True, 0
        self._after = None
        self._put(root)

    def stop(self) -> None:
        self._is_on = False
        self._before.remove()

    def _put(self, root: nn.Module) -> None:
        self._before = Hook(self._begins).put(root.register_forward_pre_hook, "with_kwargs")

    def _begins(self, root: nn.Module, *given: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or root is not self._root():
            return
        self._before.remove()
        self._thread = threading.get_ident()
        register = root.register_forward_hook if root.training else register_module_forward_hook
        self._after = register(Hook(self._ends), always_call=True)
        self._tell_before(root, *given)

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        is_here = module is self._root() and self._thread == threading.get_ident()
        if is_here and self._after is not None:
            self._after.remove()
            if self._is_on:
                self._put(module)
            self._tell_after(module, args, output)


def calls_of(root: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Calls:
    """The `Calls` of `root`."""
    kind = CallsOfLayer if isinstance(root, nn.TransformerEncoderLayer) else Calls
    return kind(root, before, after)
