"""Trail: what the modules made in turn in one forward, by the operators that they ran.

In: every operator before and after it runs, then what the model returned. Out: `Flags`.
"""

import math
from collections.abc import Mapping, Sequence, ValuesView
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .finite import Flags, Stretch, flag, join
from .gradients import norms
from .stack import innermost, without_modes

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Trail:
    """Follows one forward of a model.

    Args:
        paths: its modules, with their paths.
    """

    def __init__(self, paths: Mapping[nn.Module, str]) -> None:
        self._paths = paths
        self._call: tuple[nn.Module, int] | None = None  # which runs
        self._given: list[Tensor] = []
        self._last: tuple[Any, ...] | None = None  # what it made
        self._stretches: list[Stretch] = []
        self._owned = {
            f"{path}.{name}".removeprefix("root."): tensor
            for module, path in paths.items()
            for part in (module._parameters, module._buffers)
            for name, tensor in part.items()
            if _is_plain(tensor)
        }
        self._known = {_address(tensor) for tensor in self._owned.values()}

    def before(self, args: Sequence[Any]) -> None:
        """An operator is about to run."""
        call = innermost(self._paths)
        if call != self._call:
            self._end()
            self._call = call
        for argument in args:
            for tensor in argument if isinstance(argument, list | tuple) else (argument,):
                if _is_plain(tensor) and not isinstance(tensor, nn.Parameter):
                    address = _address(tensor)
                    if address not in self._known:
                        self._known.add(address)
                        with without_modes():
                            self._given.append(flag(tensor))

    def after(self, output: Any) -> None:
        """It has run."""
        for tensor in output if isinstance(output, list | tuple) else (output,):
            if _is_plain(tensor):
                storage = tensor.untyped_storage()
                self._known.add(storage.data_ptr())
                # Not the tensor: torch detaches what a handler returns if anyone holds it.
                place = tensor.storage_offset(), tensor.shape, tensor.stride()
                self._last = tensor.dtype, storage, *place
                return

    @torch.no_grad()
    def ended(self, output: Any) -> Flags:
        """The flags, once the model has returned `output`."""
        self._end()
        parts = output.values() if isinstance(output, Mapping) else output
        parts = parts if isinstance(parts, Sequence | ValuesView) else [parts]
        tensors = [part for part in parts if _is_plain(part)]
        with without_modes():
            # A loss has passed over the logits already.
            flags = [flag(t) for t in [t for t in tensors if t.dim() == 0] or tensors]
            flags = flags or [stretch.made for stretch in self._stretches[-1:]]
            if not flags:
                return Flags()
            returned = join(flags)
            if returned.device.type == "cpu" and math.isfinite(returned):
                return Flags()
            owned = norms({n: t for n, t in self._owned.items() if isinstance(t, nn.Parameter)})
            owned |= {n: flag(t) for n, t in self._owned.items() if n not in owned}
            return Flags(self._stretches, returned, owned)

    def _end(self) -> None:
        if self._last is None:
            return
        path = "root" if self._call is None else self._paths[self._call[0]]
        dtype, storage, *place = self._last
        with without_modes():
            made = flag(torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *place))
            given = join(self._given) if self._given else torch.zeros_like(made)
        self._stretches.append(Stretch(path, made, given))
        self._given, self._last = [], None


def _is_plain(tensor: Any) -> TypeGuard[Tensor]:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and tensor.numel() > 0
    )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
