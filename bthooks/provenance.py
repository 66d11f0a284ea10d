"""Provenance: which tensors of one forward are attention scores or weights.

In: each operator with its arguments and its output. Out: the attention maps of explicit softmaxes.

Scores are a product of two activations, of which neither is itself scores; they stay scores
through element-wise and view operators and through a product with a parameter (talking heads).
The softmax over their last dimension makes weights, and weights that enter a product with an
activation are an attention map. So a router, a codebook or a vocabulary is none: the one factor
is a parameter, or the softmax enters no product.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _pop_mode, _push_mode

from .attention import sums_of_scores

# By name, the place of the first factor. matmul, linear and softmax: under inference_mode.
_PRODUCTS = {
    **{"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "matmul": 0, "linear": 0},
    **{"addmm": 1, "baddbmm": 1, "addbmm": 1},
}
_SOFTMAX = {"_softmax", "_safe_softmax", "softmax"}
# Views need no entry: they share the storage, by which marks are kept.
_KEEPING = {
    *("add", "sub", "rsub", "mul", "div", "neg", "tanh", "where", "masked_fill", "clamp"),
    *("clamp_min", "clamp_max", "maximum", "minimum", "nan_to_num", "_to_copy", "clone", "copy"),
    *("cat", "constant_pad_nd", "native_dropout", "bernoulli", "contiguous", "_unsafe_view"),
    *("index_select", "index", "slice_scatter", "select_scatter", "tril", "triu", "repeat"),
    *("gather", "roll", "flip", "convolution", "dropout", "to", "type_as", "reshape", "flatten"),
}


@dataclass
class _Parameter:
    """A parameter, or a view or cast of one."""


@dataclass
class _Scores:
    """Scores; the columns outside `keys`, where it is given, are no keys but sinks."""

    keys: slice | None = None


@dataclass
class _Weights:
    """Weights that a softmax made: an attention map once they enter a product."""

    sums: Tensor | None


_Mark = _Parameter | _Scores | _Weights


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """No dispatch mode sees what runs inside: a FLOP counter counts the model and none of ours."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


class Provenance:
    """The marks of one forward.

    Args:
        parameters: a product with one of these, or with a view or cast of it, makes no scores.
        found: called with the sums `(heads, 12)` of each attention map.
        rows: the query rows per map that statistics are taken from; None takes all.
    """

    def __init__(
        self, parameters: Iterable[Tensor], found: Callable[[Tensor], None], rows: int | None
    ) -> None:
        self._found, self._rows = found, rows
        # A weak reference to the storage, and no tensor: nothing is kept alive for the trace, and
        # the address is not used again before the reference goes.
        self._marks: dict[int, tuple[StorageWeakRef, _Mark]] = {}
        for parameter in parameters:
            if not is_lazy(parameter):
                self._mark(parameter, _Parameter())

    def follow(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """Take note of the operator `aten::<name>` that was called with `args`."""
        if name in _PRODUCTS:
            at = _PRODUCTS[name]
            self._product(args[at], args[at + 1], output)
        elif name in _SOFTMAX:
            self._softmax(args[0], args[1], output)
        elif name.rstrip("_") in _KEEPING or name in _KEEPING:
            self._keep(args, output)
            if name == "cat":
                self._cat(*args, output=output)

    def _product(self, a: Tensor, b: Tensor, output: Tensor) -> None:
        marks = self._of(a), self._of(b)
        kept = next((mark for mark in marks if isinstance(mark, _Scores | _Weights)), None)
        if any(isinstance(mark, _Parameter) for mark in marks):
            if kept is not None:
                self._mark(output, kept)
        elif kept is None:
            self._mark(output, _Scores())
        elif isinstance(kept, _Weights) and kept.sums is not None:
            sums, kept.sums = kept.sums, None
            self._found(sums)

    def _softmax(self, scores: Tensor, dim: int, output: Tensor) -> None:
        mark = self._of(scores)
        if not isinstance(mark, _Scores) or scores.dim() < 2 or not scores.numel():
            return
        if dim % scores.dim() != scores.dim() - 1:
            return
        with without_modes():
            sums = sums_of_scores(scores.detach(), keys=mark.keys, rows=self._rows)
        self._mark(output, _Weights(sums))

    def _cat(self, tensors: Sequence[Tensor], dim: int = 0, *, output: Tensor) -> None:
        """Sinks are scores that were learnt, put beside those of the keys (GPT-OSS)."""
        if dim % output.dim() != output.dim() - 1:
            return
        start = 0
        for tensor in tensors:
            stop = start + tensor.shape[-1]
            if isinstance(self._of(tensor), _Scores) and len(tensors) == 2:
                self._mark(output, _Scores(slice(start, stop)))
            start = stop

    def _keep(self, args: tuple[Any, ...], output: Any) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        tensors += [
            t for a in args if isinstance(a, list | tuple) for t in a if isinstance(t, Tensor)
        ]
        marks = [self._of(tensor) for tensor in tensors]
        kept: _Mark | None = next((m for m in marks if isinstance(m, _Scores | _Weights)), None)
        if kept is None and marks and all(isinstance(mark, _Parameter) for mark in marks):
            kept = marks[0]
        output = output[0] if isinstance(output, list | tuple) else output
        if kept is not None and isinstance(output, Tensor):
            self._mark(output, kept)

    def _of(self, tensor: Tensor) -> _Mark | None:
        found = self._marks.get(_storage(tensor)._cdata)
        return None if found is None else found[1]

    def _mark(self, tensor: Tensor, mark: _Mark) -> None:
        reference = StorageWeakRef(_storage(tensor))
        self._marks[reference.cdata] = reference, mark


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    # A parameter inside torch.func.grad or vmap is a wrapper, which the mode never sees.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()
