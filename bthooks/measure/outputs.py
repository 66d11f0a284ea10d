"""Outputs: where tensors are in what a module is given and returns."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(output: Any, depth: int, *, dataclass: bool = True) -> Iterator[Tensor]:
    """The tensors in mappings, lists, tuples and dataclasses, in the order in which they hold them.

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
    """What `output` holds under `name`, or None; a property, which may compute, is left alone."""
    if isinstance(output, Mapping):
        return output.get(name)
    static = inspect.getattr_static(output, name, None)
    if static is None or isinstance(static, property | functools.cached_property):
        return None
    return getattr(output, name, None)
