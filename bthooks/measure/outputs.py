"""Outputs: where tensors are in what a module is given and returns."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(output: Any, depth: int, *, dataclass: bool = True) -> Iterator[Tensor]:
    """The tensors in `output`, in the order in which it holds them.

    Args:
        output: a tensor, or a mapping, list, tuple or dataclass of these; each may hold others.
        depth: how many of these inside one another are opened.
        dataclass: open dataclasses too.

    >>> [t.item() for t in tensors_in({"a": Tensor([1]), "b": [Tensor([2]), "c"]}, depth=2)]
    [1.0, 2.0]
    """
    if isinstance(output, Tensor):
        yield output
    elif depth:
        if isinstance(output, Mapping):
            output = list(output.values())
        elif dataclass and dataclasses.is_dataclass(output) and not isinstance(output, type):
            output = list(vars(output).values())
        for value in output if isinstance(output, list | tuple) else ():
            yield from tensors_in(value, depth - 1, dataclass=dataclass)


def held_as(output: Any, name: str) -> Any:
    """What `output`, a mapping or an object, holds under `name`; None if nothing.

    A property is left alone, which may compute or draw random numbers.
    """
    if isinstance(output, Mapping):
        return output.get(name)
    static = inspect.getattr_static(output, name, None)
    if static is None or isinstance(static, property | functools.cached_property):
        return None
    return getattr(output, name, None)
