"""Softmax: which tensors of one forward are attention scores or weights, by their provenance.

A softmax alone says nothing: routers, codebooks and classifiers have one too. What tells is what it
descends from. Scores are a product of two activations. They stay scores through element-wise and
view operators and through a product with a parameter over the heads (talking heads). The softmax
over their last dimension makes weights, and weights that enter a product with an activation are an
attention map. So a router, a codebook or a vocabulary is none: the one factor is a parameter, or
made of parameters (Bayesian layers, adapters, weight norms), or the softmax enters no product.
"""

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from ..measure.attention import sums_of_scores, sums_of_weights
from ..measure.scores import BLOCKED, hiding_level
from ..torch_private import storage_of, without_modes
from .operators import Role


class _Made(enum.Enum):
    PARAMETER = enum.auto()  # of parameters and constants alone
    CONSTANT = enum.auto()  # a buffer, noise, a range; with a parameter of its size it is one
    NORM = enum.auto()  # what makes weights of exp(scores): their sum over the keys, or its log


_PARAMETER, _CONSTANT, _NORM = _Made
_KNOWN = (_PARAMETER, _CONSTANT)


@dataclass(frozen=True)
class _Scores:
    heads: int  # of the product that made them, times its batches
    width: int  # its last size
    keys: slice | None = None  # the columns that are keys, where others are sinks
    normal: bool = False  # whether their exp is weights: a log_softmax, or a norm was taken off
    level: Tensor | float = field(default=-math.inf, compare=False)  # the largest that hid a key


@dataclass
class _Weights:
    """Weights, or exp(scores) on the way to them: an attention map once they enter a product."""

    heads: int  # these as of the scores
    width: int
    sums: Tensor | None  # accumulators; None before the rows sum to 1, and once handed out


_Mark = _Made | _Scores | _Weights


class Provenance:
    """Marks the storages of one forward by what lies in them, and finds the attention maps.

    A product with a parameter, or with what is made of parameters and constants, makes no scores.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        buffers: Iterable[Tensor],
        found: Callable[[Tensor], None],
        rows: int | None,
    ) -> None:
        self._found, self._rows = found, rows
        # A weak reference to the storage: nothing is kept alive for the trace, and the address is
        # not used again before the reference goes.
        self._marks: dict[int, tuple[StorageWeakRef | None, _Mark | None]] = {}
        for tensors, mark in ((buffers, _CONSTANT), (parameters, _PARAMETER)):
            for tensor in tensors:
                if not is_lazy(tensor):
                    self._mark(tensor, mark)

    def follow(
        self, role: Role, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Take note of an operator of that role that was called with these arguments."""
        self._trace(role, args, output)
        if role.masking and isinstance(output, Tensor):
            given = args[:1] if role.product else args  # baddbmm adds to a product
            self._mask(role.masking, given, kwargs.get("alpha", 1), output)

    def _trace(self, role: Role, args: tuple[Any, ...], output: Any) -> None:
        part = role.part
        if part == "product":
            self._product(args[role.product], args[role.product + 1], output)
        elif part == "convolution":
            mark, shape = self._of(args[0]), args[0].shape
            if isinstance(mark, _Scores | _Weights) and shape[-1] == mark.width:
                self._mark(output, mark)  # over the heads, as images have channels
        elif part in ("softmax", "log_softmax"):
            self._softmax(args[0], args[1], output, logarithm=part == "log_softmax")
        elif part == "exp" and isinstance(mark := self._of(args[0]), _Scores):
            # A softmax that is written out, once its norm is seen.
            sums = self._sums_of_weights(output) if mark.normal else None
            self._mark(output, _Weights(mark.heads, mark.width, sums))
        elif part == "copy" and isinstance(self._of(args[0]), _Scores) and _is_whole(args[0]):
            self._mark(args[0], self._of(args[1]))  # a buffer that is used again
        elif part in ("logsumexp", "sum") and self._is_norm(part, args):
            self._mark(output, _NORM)
        else:
            self._carry(role, args, output)
            if part == "cat":
                self._cat(*args, output=output)

    def _product(self, a: Tensor, b: Tensor, output: Tensor) -> None:
        marks = self._of(a), self._of(b)
        weights = next((mark for mark in marks if isinstance(mark, _Weights)), None)
        scores = next((mark for mark in marks if isinstance(mark, _Scores)), None)
        by_parameter = _PARAMETER in marks
        # Two batches of constants are attention among learnt queries, as of an object detector.
        if all(mark in _KNOWN for mark in marks) and (by_parameter or output.dim() == 2):
            self._mark(output, _CONSTANT)
        elif by_parameter:
            # A sum over the heads changes nothing. One over features ends what was attention; those
            # of a linear attention, q @ state, are its heads times the last size of that product.
            kept, width = weights or scores, a.shape[-1]
            if kept is not None and kept.heads % width == 0 and width % kept.width:
                self._mark(output, kept)
        elif weights is None:
            shape = (1,) if output.is_nested or not output.dim() else output.shape
            self._mark(output, _Scores(math.prod(shape[:-2]), shape[-1]))
        else:
            self._seen(weights)

    def _softmax(self, scores: Tensor, dim: int, output: Tensor, *, logarithm: bool) -> None:
        mark = self._of(scores)
        if not isinstance(mark, _Scores) or not _is_last(dim, scores):
            return
        if logarithm:
            return self._mark(output, replace(mark, normal=True))
        if output.data_ptr() == scores.data_ptr():  # softmax(..., out=scores)
            sums = self._sums_of_weights(output)
        else:
            with without_modes():
                sums = sums_of_scores(
                    scores.detach(), keys=mark.keys, rows=self._rows, level=mark.level
                )
        self._mark(output, _Weights(mark.heads, mark.width, sums))

    def _sums_of_weights(self, weights: Tensor) -> Tensor | None:
        if not _is_last(-1, weights):
            return None
        with without_modes():
            return sums_of_weights(weights.detach(), rows=self._rows)

    def _is_norm(self, part: str, args: tuple[Any, ...]) -> bool:
        mark = self._of(args[0])
        fits = isinstance(mark, _Weights) if part == "sum" else isinstance(mark, _Scores)
        return fits and len(args) > 1 and _is_last(args[1], args[0])

    def _seen(self, weights: _Weights) -> None:
        if weights.sums is not None:
            sums, weights.sums = weights.sums, None
            self._found(sums)

    def _cat(self, tensors: Sequence[Tensor], dim: int = 0, *, output: Tensor) -> None:
        """Sinks are scores that were learnt, put beside those of the keys (GPT-OSS)."""
        scores = [at for at, t in enumerate(tensors) if isinstance(self._of(t), _Scores)]
        mark = self._of(tensors[scores[0]]) if len(scores) == 1 else None
        if len(tensors) == 2 and isinstance(mark, _Scores) and _is_last(dim, output):
            width = tensors[0].shape[-1]
            keys = slice(width, None) if scores == [1] else slice(0, width)
            self._mark(output, replace(mark, keys=keys))

    def _carry(self, role: Role, args: tuple[Any, ...], output: Any) -> None:
        tensors = _tensors(args)
        marks = [self._of(tensor) for tensor in tensors]
        if tensors and not any(marks) and role.part != "fill":
            return
        outputs = [o for o in _tensors([output]) if o.is_floating_point()]
        if not outputs:
            return
        kept: _Mark | None = None
        for tensor, mark in zip(tensors, marks, strict=True):
            if isinstance(mark, _Weights):
                same = role.keeps or tensor.numel() == outputs[0].numel()  # a norm, say
                kept = mark if same else None
                break
            is_part = mark is _NORM or isinstance(mark, _Scores)
            if is_part and role.keeps and not isinstance(kept, _Scores):
                kept = mark
        if isinstance(kept, _Weights) and kept.width == 1 and role.part == "mul":
            self._seen(kept)  # the product with the value of the only key
        if _NORM in marks:
            if isinstance(kept, _Scores):
                kept = replace(kept, normal=True)
            elif isinstance(kept, _Weights):  # whatever was masked since
                kept = replace(kept, sums=self._sums_of_weights(outputs[0]))
        if kept is not None:
            self._mark(outputs[0], kept)
        elif not any(tensor.is_nested for tensor in (*tensors, *outputs)):
            self._settle(role, list(zip(tensors, marks, strict=True)), outputs)

    def _mask(self, masking: str, args: Sequence[Any], alpha: float, output: Tensor) -> None:
        """Note the largest value that hides keys in scores: what is added to them, or put there."""
        mark = self._of(output)
        if not isinstance(mark, _Scores) or output.is_nested:
            return
        level = mark.level
        with without_modes(), torch.no_grad():
            for value in args:
                if isinstance(value, Tensor):
                    other = self._of(value)
                    if isinstance(other, _Scores):
                        level = _largest(level, other.level)
                    elif other is not _PARAMETER:
                        level = _largest(level, _level_of(value, masking, alpha, output.shape[-1]))
                elif type(value) in (int, float):
                    if masking == "put" and value <= BLOCKED:
                        level = _largest(level, value)
                    elif masking in ("times", "over") and value > 0:
                        level = level * (value if masking == "times" else 1 / value)
        if level is not mark.level:
            self._mark(output, replace(mark, level=level))

    def _settle(
        self, role: Role, given: list[tuple[Tensor, _Mark | None]], outputs: list[Tensor]
    ) -> None:
        """Mark what is made of parameters and constants alone, by whatever operator."""
        known = all(mark in _KNOWN or tensor.numel() == 1 for tensor, mark in given)
        known = known or role.part == "fill"
        for output in outputs if known or role.mutates else ():
            before = self._of(output)
            if known and before is None:
                sizes = [tensor.numel() for tensor, mark in given if mark is _PARAMETER]
                self._mark(output, _PARAMETER if output.numel() in sizes else _CONSTANT)
            elif before is _CONSTANT and not known:
                self._mark(output, None)

    def _of(self, tensor: Tensor) -> _Mark | None:
        found = storage_of(tensor)
        return None if found is None else self._marks.get(found[0], (None, None))[1]

    def _mark(self, tensor: Tensor, mark: _Mark | None) -> None:
        if (found := storage_of(tensor)) is not None:
            self._marks[found[0]] = StorageWeakRef(found[1]), mark


def _level_of(mask: Tensor, masking: str, alpha: float, keys: int) -> Tensor | float:
    """The largest in `mask` that hides one of so many keys where it is added, taken off or put."""
    is_for_each = mask.dim() > 0 and mask.shape[-1] == keys  # else it is the same for all
    sign = {"added": alpha * is_for_each, "taken": -alpha * is_for_each, "put": 1}.get(masking, 0)
    if not sign or not mask.numel():
        return -math.inf
    mask = mask if sign == 1 else mask * sign
    return hiding_level(mask) if mask.is_floating_point() else -math.inf


def _largest(one: Tensor | float, other: Tensor | float) -> Tensor | float:
    if isinstance(one, Tensor):
        return one.clamp(min=other)
    return other.clamp(min=one) if isinstance(other, Tensor) else max(one, other)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the values, and those in lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [inner for inner in value if isinstance(inner, Tensor)]
    return found


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is all that its storage holds."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _is_last(dim: int | Sequence[int] | None, tensor: Tensor) -> bool:
    dims, many = [dim] if isinstance(dim, int) else dim or (), tensor.dim()
    return many > 1 and tensor.numel() > 0 and [d % many for d in dims] == [many - 1]
