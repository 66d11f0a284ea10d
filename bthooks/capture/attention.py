"""Capture: the attention maps that the dispatcher sees during one forward, and who ran them.

In: every operator that runs while the mode is entered; each passes through untouched.
Out: the sums of each attention map, with the path of the module that ran it.

In the manner of `torch.utils.flop_counter`. It sits below autograd and autocast, so that it sees
the operators that really run, fast paths included, and changes none of them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch._ops import OpOverload
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from ..report import Ledger
from ..torch_private import innermost, without_modes
from . import fastpath, fused
from .operators import role
from .softmax import Provenance

# Under inference_mode these arrive whole, and with them the attention that they are made of.
_MADE_OF_OTHERS = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
    torch.ops.aten.einsum.default,
    torch.ops.aten.tensordot.default,
)
_SDPA = "_scaled_dot_product_"
# What nested tensors call on CUDA: laid out as flash_attn's own operators are.
_KERNELS = ("_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward")
_PLAIN = (Tensor, nn.Parameter)
_CHOOSING = (torch.ops.aten.linear.default, torch.ops.aten.matmul.default)


class AttentionMode(TorchDispatchMode):
    """Passes every operator through and reports the attention maps among them.

    Args:
        paths: the modules that a map may belong to, with their paths.
        found: called with the path of the innermost of them that ran the map, and its sums
            `(heads, 15)`.
        rows: the query rows per map that statistics are taken from; None takes all.
        ledger: told what could not be measured, and why.
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
        ledger: Ledger,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, not annotated
        self._paths, self._found, self._rows, self._ledger = paths, found, rows, ledger
        # Not parameters(): a model may override it.
        parameters = (p for module in paths for p in module._parameters.values() if p is not None)
        buffers = (b for module in paths for b in module._buffers.values() if b is not None)
        self._provenance = Provenance(parameters, buffers, self._map, rows)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Most of all that run. Those of a subclass that wraps tensors have a storage of their own.
        if role(func).is_view and type(args[0]) in _PLAIN:
            return func(*args, **kwargs)
        if func in _MADE_OF_OTHERS:
            with self:
                return func.decompose(*args, **kwargs)
        with _as_outside() if func in _CHOOSING else contextlib.nullcontext():
            output = func(*args, **kwargs)
        try:
            self._look(func, args, kwargs, output)
        except Exception as error:
            self._ledger.failed(f"attention of {func}", error)
        return output

    def forget(self) -> None:
        """Let go of the model: the trace and the mode refer to each other."""
        self._paths = {}
        del self._provenance

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_meta:
            return
        if func is flex_attention:
            with without_modes():
                sums = fused.sums_of_flex(*args, rows=self._rows)
            self._map(sums)
            return
        name, defaults = _signature(func)
        if defaults is None:
            self._provenance.follow(func, args, output)
            return
        given = defaults | dict(zip(defaults, args, strict=False)) | kwargs
        first = next((value for value in given.values() if isinstance(value, Tensor)), None)
        if first is None or first.is_meta or not first.numel():
            return
        with without_modes(), torch.autocast(first.device.type, enabled=False):
            found = self._sums(name, given, output)
        if found is None:
            self._ledger.warn_once(
                f"attention of {func}",
                "unsupported operator: it takes query, key and value, but what it returns is not "
                "softmax(scale query key^T) value as far as its arguments are understood; dropout "
                "inside it can't be seen through",
            )
        else:
            self._map(found)

    def _sums(self, name: str, given: Mapping[str, Any], output: Any) -> Tensor | None:
        if name in fastpath.OPERATORS:
            return fastpath.sums_of_layer(given, rows=self._rows)
        if name.startswith(_SDPA):
            return fused.sums_of_sdpa(given, rows=self._rows)
        return fused.sums_of_custom(given, output, rows=self._rows)

    def _map(self, sums: Tensor) -> None:
        module = innermost(self._paths)
        if type(sums) is not Tensor:  # a fake one, or a DTensor: it would cost the whole event
            path = self._paths.get(module, "root") if module is not None else "root"
            self._ledger.warn_once(
                f"attention of {path}", f"unsupported tensors: {type(sums).__name__}"
            )
            return
        if isinstance(module, nn.TransformerEncoderLayer):
            module = module.self_attn  # whose forward the fast path does not call
        if module is not None:
            self._found(self._paths[module], sums)


@contextlib.contextmanager
def _as_outside() -> Iterator[None]:
    """Let `_CHOOSING` run as they do without a mode.

    Under inference_mode they arrive whole, and inside a mode's handler the views that they take
    of a weight lose its requires_grad, by which torch chooses between mm and bmm: 1e-7 apart.
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
def _signature(func: Any) -> tuple[str, dict[str, Any] | None]:
    """The name of an operator; of one that may compute attention also its arguments' defaults."""
    if not isinstance(func, OpOverload):
        return "", None
    namespace, _, name = func._schema.name.partition("::")
    arguments = {argument.name: argument.default_value for argument in func._schema.arguments}
    known = name in fastpath.OPERATORS or name in _KERNELS or name.startswith(_SDPA)
    custom = namespace != "aten" and fused.takes_attention(arguments)
    return name, arguments if (known or custom) and "backward" not in name else None
