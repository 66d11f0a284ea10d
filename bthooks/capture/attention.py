"""Attention: the maps of one forward, as torch's dispatcher sees them, and who ran them.

Why at the dispatcher, in the manner of `torch.utils.flop_counter`: it lies below autograd and
autocast, where all attention has come down to two kinds of operator, whatever the architecture
(`operators.py`): an explicit softmax (DeBERTa, T5, eager attention), of which `softmax.py` finds
the scores; and a fused operator (F.scaled_dot_product_attention, FlexAttention, flash-attn,
torch.nn's C++ fast paths in eval()), of which `fused.py` reads query, key and mask.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..measure.outputs import tensors_in
from ..report import Ledger
from ..torch_private import (
    as_outside_modes,
    backward_pass,
    call_of,
    dispatch_mode,
    has_values,
    innermost,
    is_entered,
    leave,
    own_tensors,
    without_modes,
)
from . import fused
from .operators import carried, role
from .softmax import Provenance

_UNSUPPORTED = (
    "unsupported operator: it takes query, key and value, but what it returns is not "
    "softmax(scale query key^T) value as far as its arguments are understood; dropout "
    "inside it can't be seen through"
)
Doubt = tuple[str, str]  # what is to be said if the accumulators turn out to be of no attention


class _Call(NamedTuple):
    """A call of a module: known by its frame and what it is given, of which none is kept alive."""

    frame: int
    given: Callable[[], Tensor | None]  # the first tensor
    places: list[int]  # in the code, of the maps so far


class AttentionMode:
    """Passes every operator through and reports the attention maps among them, until `leave`.

    `found` is called with the path of the innermost module that ran a map, which of the maps of its
    call it is, and its accumulators; and, of a fused operator, with what is to be said if these
    turn out to be of no attention.
    """

    def __init__(
        self,
        paths: Mapping[nn.Module, str],
        found: Callable[[str, int, Tensor, Doubt | None], None],
        rows: int | None,
        ledger: Ledger,
    ) -> None:
        self._paths, self._found, self._rows, self._ledger = paths, found, rows, ledger
        self._calls: dict[nn.Module, _Call] = {}  # the last one that ran a map
        self._provenance = Provenance(*own_tensors(paths), self._map, rows)
        self._backward = backward_pass()  # reentrant checkpointing around the whole model
        self._mode = dispatch_mode(self._dispatch)
        self._mode.__enter__()

    def can_leave(self) -> bool:
        """Whether it is not in the middle of looking at an operator."""
        return is_entered(self._mode)

    def leave(self) -> None:
        """Stop, and let go of the model."""
        mode, self._paths = self._mode, {}
        del self._provenance, self._mode  # they refer to this
        try:
            leave(mode)
        except Exception:
            mode.__exit__(None, None, None)  # the public way, if it is the innermost
            raise

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:  # a guard takes 1.5 us, at each operator
            its = role(func)
            outside = as_outside_modes() if its.chooses else nullcontext()
        except Exception as error:
            self._ledger.failed(f"attention of {func}", error)
            return func(*args, **kwargs)
        # Most of all that run. Those of a subclass that wraps tensors have a storage of their own.
        if its.is_view and type(args[0]) in (Tensor, nn.Parameter):
            return func(*args, **kwargs)
        if its.decomposes:
            with self._mode:
                return func.decompose(*args, **kwargs)
        with outside:
            output = func(*args, **kwargs)
        try:
            if its.carries:
                self._look(*carried(func, args, kwargs, output))
            else:
                self._look(func, args, kwargs, output)
        except Exception as error:
            self._ledger.failed(f"attention of {func}", error)
        return output

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        its = role(func)
        if isinstance(output, Tensor) and not has_values(output):
            return
        if its.fused is None:
            return self._provenance.follow(its, args, kwargs, output)
        given = its.defaults | dict(zip(its.defaults, args, strict=False)) | kwargs
        first = next((value for value in given.values() if isinstance(value, Tensor)), None)
        if first is None or not has_values(first) or not first.numel():
            return
        with without_modes(), torch.autocast(first.device.type, enabled=False):
            found = fused.sums_of(its.fused, given, output, rows=self._rows)
        doubt = f"attention of {func}", _UNSUPPORTED
        if found is None:
            self._ledger.warn_once(*doubt)
        else:
            self._map(found, doubt)

    def _map(self, sums: Tensor, doubt: Doubt | None = None) -> None:
        if (self._backward is None) != (
            backward_pass() is None
        ):  # checkpointing: it was seen already
            return
        module = innermost(self._paths)
        number = 0 if module is None else self._number(module)
        if isinstance(module, nn.TransformerEncoderLayer):
            module = module.self_attn  # whose forward the fast path does not call
        if module is None:
            self._ledger.warn_once(
                "attention of an unknown module",
                "a map was seen, but no call of a module of the model is on the Python stack, by "
                "which it would be named: not measured",
            )
        elif type(sums) is not Tensor:  # a fake one, or a DTensor: it would cost the whole event
            why = f"unsupported tensors: {type(sums).__name__}"
            self._ledger.warn_once(f"attention of {self._paths[module]}", why)
        else:
            self._found(self._paths[module], number, sums, doubt)

    def _number(self, module: nn.Module) -> int:
        """Which map of the call of `module` this is: compiled, one call runs those of all layers.

        Where the same code runs again, as in a loop, it counts from 0.
        """
        frame, given, place = call_of(module)
        tensor, call = next(tensors_in(given, 4), None), self._calls.get(module)
        goes_on = call is not None and call.frame == frame and call.given() is tensor
        if call is None or not goes_on or place in call.places:
            reference = (lambda: None) if tensor is None else weakref.ref(tensor)
            call = self._calls[module] = _Call(frame, reference, [])
        call.places.append(place)
        return len(call.places) - 1
