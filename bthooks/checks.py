"""Checks: what is given to a function, refused at the call where it is nonsense.

In: anything. Out: the same in one type, or an error that says what, where, what was got and how to
mend it.
"""

import numbers
import operator
from typing import Any

import torch
from torch import Tensor, nn


def checked_step(step: int) -> int:
    """`step` as a whole number from 0."""
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"step is a whole number, got {step!r}") from None
    if number < 0:
        raise ValueError(f"step counts from 0, got {number}")
    return number


def checked_model(where: str, model: nn.Module) -> nn.Module:
    """`model`, if it is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def checked_number(where: str, name: str, value: Any) -> Tensor | float:
    """One real number, left on its device where it is a tensor."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"{where}: names are non-empty str, got {name!r}")
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{where}: {name!r} has shape {tuple(value.shape)}, expected one number; "
                "reduce it first, e.g. with .mean()"
            )
        if not value.is_complex():
            return value.detach().reshape(())
    elif not isinstance(value, str | bytes) and not (
        isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    ):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise TypeError(f"{where}: {name!r} is one real number, got {value!r}")


def checked_values(where: str, name: str, values: Any) -> Tensor:
    """`values` as a tensor of numbers."""
    try:
        tensor: Tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{where}: {name!r} is a tensor of numbers, got {type(values).__name__}"
        ) from None
    return tensor


def checked_weights(given: Any) -> Tensor:
    """Attention weights whose rows are distributions, or see no key."""
    where = "log_attention_stats"
    weights = checked_values(where, "attention_weights", given).detach()
    if weights.dim() != 4 or weights.numel() == 0:
        raise ValueError(
            f"{where}: attention_weights have shape (batch, heads, query, key), got "
            f"{tuple(weights.shape)}; for weights averaged over heads use weights.unsqueeze(1)"
        )
    sums = weights.to(torch.float32).sum(-1)
    sums = sums[(sums != 0) & ~sums.isnan()]
    tolerance = 1e-3 if weights.dtype in (torch.float32, torch.float64) else 3e-2
    least = weights.nan_to_num(0).amin().item()
    if least < 0:
        raise ValueError(
            f"{where}: attention_weights go down to {least:.3g}, expected probabilities; "
            "pass the weights after the softmax, not the scores"
        )
    if ((sums - 1).abs() > tolerance).any().item():
        raise ValueError(
            f"{where}: rows of attention_weights sum to {sums.min():.4g}..{sums.max():.4g}, "
            "expected 1 over the last dimension; pass the weights before dropout"
        )
    return weights


def checked_probabilities(where: str, p: Tensor, true: Tensor) -> None:
    """Whether the values are some of those that `checked_classes` takes; NaN may be."""
    least, largest = (value.item() for value in true.long().aminmax())
    if least < 0 or largest >= p.shape[-1]:
        raise ValueError(
            f"{where}: targets go from {least} to {largest}, expected class indices 0 to "
            f"{p.shape[-1] - 1}; leave out what has none"
        )
    sums = p.float().sum(-1)
    sums = sums[~sums.isnan()]
    # Of bfloat16, widened after its softmax, they are off by up to 3e-3.
    tolerance = 1e-2 if p.dtype in (torch.float32, torch.float64) else 3e-2
    least = p.nan_to_num(0).amin().item()
    if least < 0 or ((sums - 1).abs() > tolerance).any().item():
        found = f"{sums.min():.4g}..{sums.max():.4g}" if len(sums) else "NaN"
        raise ValueError(
            f"{where}: probabilities are at least 0 and sum to 1 over the last dimension, got "
            f"{least:.4g} and {found}; pass them after the softmax, not the logits"
        )


def checked_hparam(value: Any) -> str | float:
    """A number or a string, which both backends write alike; anything else as its `str`."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return float(value)
