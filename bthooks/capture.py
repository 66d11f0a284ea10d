"""Capture: the attention maps that the dispatcher sees during one forward, and who ran them.

In: every operator that runs while the mode is entered; each passes through untouched.
Out: the sums of each attention map by the path of the module that ran it; activations.

In the manner of `torch.utils.flop_counter`. It sits below autograd and autocast, so that it sees
the operators that really run, fast paths included, and changes none of them.
"""

import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils.hooks import RemovableHandle

from .attention import merge, sums_of_query_key
from .histograms import Histogram, histogram
from .names import module_names

_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_MASKS = ("attn_mask", "attn_bias")


class AttentionMode(TorchDispatchMode):
    """Passes every operator through and reports the attention maps among them.

    Args:
        paths: the modules that a map may belong to, with their paths.
        found: called with the path of the innermost of them that ran the map, and its sums
            `(heads, 12)`.
        rows: the query rows per map that statistics are taken from; None takes all.
        failed: called with what could not be measured, and why.
    """

    # Without it flex_attention raises under a mode.
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Else compiled regions fall back to eager, and fullgraph=True regions raise.
        return True

    def __init__(
        self,
        paths: Mapping[nn.Module, str],
        found: Callable[[str, Tensor], None],
        rows: int | None,
        failed: Callable[[str, Exception], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, not annotated
        self._paths, self._found, self._rows, self._failed = paths, found, rows, failed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:  # arrives whole under inference_mode
            with self:
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        if names := _fused_attention(func):
            try:
                self._measure(dict(zip(names, args, strict=False)) | kwargs)
            except Exception as error:
                self._failed(f"attention of {func.name()}", error)
        return output

    def _measure(self, given: Mapping[str, Any]) -> None:
        query, key = given["query"], given["key"]
        path = self._innermost()
        if path is None or query.numel() == 0 or key.numel() == 0:
            return
        with torch.autocast(query.device.type, enabled=False):
            sums = sums_of_query_key(
                query,
                key,
                mask=next((given[name] for name in _MASKS if given.get(name) is not None), None),
                is_causal=given.get("is_causal", False),
                scale=given.get("scale"),
                rows=self._rows,
            )
        self._found(path, sums)

    def _innermost(self) -> str | None:
        """The path of the innermost module on the Python stack.

        No hook, so nothing that would switch off a fast path or recompile a graph.
        """
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code in _CALLS:
                path = self._paths.get(frame.f_locals["self"])
                if path is not None:
                    return path
            frame = frame.f_back
        return None


def calls_on_stack(module: nn.Module) -> int:
    """How many calls of `module` are running in this thread."""
    frame: FrameType | None = sys._getframe(1)
    calls = 0
    while frame is not None:
        calls += frame.f_code is _CALLS[0] and frame.f_locals["self"] is module
        frame = frame.f_back
    return calls


def leave(mode: TorchDispatchMode) -> None:
    """Take `mode` off the stack, also from below others that an exception left behind."""
    if mode not in _get_current_dispatch_mode_stack():
        return
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    _push_mode(top)
    mode.__exit__(None, None, None)
    for other in reversed(above):
        _push_mode(other)


@functools.cache
def _fused_attention(func: Any) -> tuple[str, ...] | None:
    """The argument names of a fused attention operator, by its schema; None for any other."""
    if not isinstance(func, OpOverload) or not func.name().startswith("aten::_scaled_dot_product_"):
        return None
    if "backward" in func.name():
        return None
    return tuple(argument.name for argument in func._schema.arguments)


class Window:
    """One observed forward of `root`: open before it, `close()` after it.

    Args:
        selected: which module paths are wanted.
        kinds: of these, "attention" and "activations" are captured here.
        rows: the query rows per map that statistics are taken from; None takes all.
        failed: called with what could not be measured, and why.
    """

    def __init__(
        self,
        root: nn.Module,
        selected: Callable[[str], bool],
        kinds: Collection[str],
        rows: int | None,
        failed: Callable[[str, Exception], None],
    ) -> None:
        self.thread = threading.get_ident()
        self.activations: dict[str, Histogram] = {}
        self._selected, self._failed = selected, failed
        self._maps: dict[str, list[Tensor]] = {}
        self._averaged: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._mode: AttentionMode | None = None
        paths = module_names(root)
        if "activations" in kinds:
            for module in _observable(root):
                if selected(paths[module]):
                    hook = functools.partial(self._activation, paths[module])
                    self._handles.append(module.register_forward_hook(hook))
        if "attention" in kinds:
            self._mode = AttentionMode(paths, self._map, rows, failed)
            self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch's, not annotated

    def close(self) -> None:
        """Take everything off again."""
        if self._mode is not None:
            leave(self._mode)
        for handle in self._handles:
            handle.remove()

    def maps(self) -> dict[str, Tensor]:
        """The sums of each map by path; a module's further maps as `<path>/1`, `<path>/2`, ..."""
        return {
            f"{path}/{index}" if index else path: sums
            for path, maps in self._maps.items()
            for index, sums in enumerate(maps)
        }

    def _map(self, path: str, sums: Tensor) -> None:
        if not self._selected(path):
            return
        maps = self._maps.setdefault(path, [])
        maps.append(sums)
        if len(maps) > 4 or path in self._averaged:
            self._averaged.add(path)
            maps[:] = [functools.reduce(merge, maps)]

    def _activation(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        try:
            tensor = _first_tensor(output)
            if tensor is not None and path not in self.activations:
                self.activations[path] = histogram(tensor)
        except Exception as error:
            self._failed(f"activations of {path}", error)


def _observable(root: nn.Module) -> Iterator[nn.Module]:
    """The modules below `root` that a hook may be put on without changing what runs.

    A hook in nn.TransformerEncoderLayer or nn.MultiheadAttention switches off their C++ fast path
    (eval), one in a compiled module is never called.
    """
    fast = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    hidden: set[nn.Module] = set()
    for module in root.modules():
        compiled = module._compiled_call_impl is not None or "_orig_mod" in module._modules
        if compiled or (isinstance(module, fast) and not module.training):
            hidden.update(module.modules())
    for module in root.modules():
        if module is not root and module not in hidden:
            yield module


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        output = next((item for item in output if isinstance(item, Tensor)), None)
    return output if isinstance(output, Tensor) else None
