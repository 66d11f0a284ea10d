"""Trail: what the modules of one forward were given and made.

What a module was given is looked at when it has ended, with what it made: half as many hooks. One
that overwrites it is known by its attribute `inplace`, as torch's are, or by returning it.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..measure.nonfinite import Call, Extremes, Forward, extremes
from ..measure.outputs import tensors_in
from ..measure.sharded import local
from ..report import Ledger
from ..torch_private import (
    Hook,
    is_compiled,
    is_in_functorch,
    version,
    without_modes,
    without_overrides,
)

_REAL = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DTYPES = _REAL | {torch.complex64, torch.complex128}


class Trail:
    """Follows one forward of a model, of whose modules these are the paths."""

    def __init__(self, paths: Mapping[nn.Module, str], ledger: Ledger) -> None:
        self._paths, self._ledger = paths, ledger
        self._thread = threading.get_ident()
        self._calls: list[Call] = []
        self._given: dict[nn.Module, list[Extremes]] = {}  # of those that overwrite it
        # What one module made the next is given.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, Extremes]] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Put the hooks on, one by one."""
        before, after = Hook(self.before), Hook(self._after)
        for module in observable(self._paths):
            if getattr(module, "inplace", None) is True:
                yield module.register_forward_pre_hook(before, with_kwargs=True)
            yield module.register_forward_hook(after, with_kwargs=True)

    def before(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """The pre-hook of the root, and of modules that overwrite what they are given."""
        if self._is_here():
            self._given[module] = self._extremes((args, kwargs))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._is_here():
            given = self._given.pop(module, None)
            if given is None:
                # One that overwrites what it is given, and has no attribute `inplace`, returns it.
                given = self._extremes((args, kwargs), former=tensors_in(output, 4))
            self._calls.append(Call(self._paths[module], given, self._extremes(output)))

    def _is_here(self) -> bool:
        return not torch.compiler.is_compiling() and threading.get_ident() == self._thread

    def ran(self) -> dict[str, int]:
        """The modules that have run, in the order in which they ended first."""
        return {path: at for at, path in enumerate(dict.fromkeys(c.path for c in self._calls))}

    def ended(self, root: nn.Module, output: Any) -> Forward:
        """What was seen, once the model has returned `output`; nothing if that is finite."""
        self._after(root, (), {}, output)
        calls, self._calls, self._seen = self._calls, [], {}
        made = calls[-1].made if calls else []
        with without_modes():
            if all(pair.low.device.type == "cpu" and not pair.is_fault() for pair in made):
                return Forward()
        owned = {}
        for module, path in self._paths.items():
            # Unbound: some models override them.
            for named in (nn.Module.named_parameters, nn.Module.named_buffers):
                for name, tensor in named(module, recurse=False, remove_duplicate=False):
                    for pair in self._extremes(tensor):
                        owned[f"{path}.{name}".removeprefix("root.")] = pair
        compiled = [path for module, path in self._paths.items() if is_compiled(module)]
        return Forward(calls, owned, compiled)

    def _extremes(self, values: Any, former: Iterable[Tensor] = ()) -> list[Extremes]:
        """Of the tensors in `values` that can be read; of those in `former` as they were seen."""
        try:
            stale = {id(tensor) for tensor in former}
            # Modes are off by a flag: to take them off the stack costs more than all the rest.
            functions, dispatch = without_overrides()
            with functions, dispatch, torch.no_grad():
                pairs = [self._of(t, is_former=id(t) in stale) for t in tensors_in(values, 4)]
                return [pair for pair in pairs if pair is not None]
        except Exception as error:
            self._ledger.failed("finite values", error)
            return []

    def _of(self, tensor: Tensor, is_former: bool) -> Extremes | None:
        written = version(tensor)
        found = self._seen.get(id(tensor))
        if found is not None and found[0]() is tensor and (is_former or found[1] == written):
            return found[2]
        if not _is_readable(part := local(tensor)):
            return None
        pair = extremes(part)
        self._seen[id(tensor)] = weakref.ref(tensor), written, pair
        return pair


def observable(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules below the first that a hook may be put on without changing what runs.

    A hook in nn.TransformerEncoderLayer or nn.MultiheadAttention switches off their C++ fast path
    (eval), one in a compiled module is never called, one on a scripted module is refused.
    """
    fast = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    root, *below = modules
    hidden: set[nn.Module] = set()
    for module in (root, *below):
        is_fast = isinstance(module, fast) and not module.training
        if is_fast or isinstance(module, torch.jit.ScriptModule) or is_compiled(module):
            hidden.update(module.modules())
    return (module for module in below if module not in hidden)


def _is_readable(tensor: Tensor) -> bool:
    return (
        tensor.dtype in _DTYPES
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested)
        and not is_in_functorch(tensor)
        and tensor.untyped_storage().size() > 0
        and tensor.numel() > 0
    )
