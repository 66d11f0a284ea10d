"""Uncertainty: what a model's output says of its own. Pure.

In: the output of a forward. Out: the uncertainties in it, by kind.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

KEYS = {
    "epistemic": ("epistemic_uncertainty", "epistemic"),
    "aleatoric": ("aleatoric_uncertainty", "aleatoric"),
    "total": ("uncertainty",),
}


def find_uncertainties(output: Any) -> dict[str, Tensor]:
    """The real tensors in `output` under one of `KEYS`, by kind.

    Args:
        output: a dict, or anything with attributes: a dataclass, a named tuple, an object.

    >>> import torch
    >>> find_uncertainties({"logits": torch.zeros(2), "epistemic": torch.ones(2)})
    {'epistemic': tensor([1., 1.])}
    """
    found = {}
    for kind, keys in KEYS.items():
        for key in keys:
            value = output.get(key) if isinstance(output, Mapping) else _attribute(output, key)
            if not isinstance(value, Tensor) or value.is_meta or value.is_complex():
                continue
            if value.numel():
                found[kind] = value
                break
    return found


def _attribute(output: Any, name: str) -> Any:
    """What `output` holds: a property is left alone, which may compute or draw random numbers."""
    static = inspect.getattr_static(output, name, None)
    if static is None or isinstance(static, property | functools.cached_property):
        return None
    return getattr(output, name, None)
