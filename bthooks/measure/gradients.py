"""Gradients: norms per parameter, per layer and in total; update ratios. Pure.

In: tensors by parameter name. Out: 0-d float32 tensors by parameter name, on their devices;
from these, once they are on the host, the figures per layer and in total.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..names import parameter_names
from ..torch_private import norm_of_each
from .dtypes import as_real, widened
from .sharded import local, readable, whole_norms

# Summed in float32 in one stage, the norm of 1 k equal elements is off by 8e-7 on the CPU, that of
# 4 k by 3e-6, that of 38.6 M by 2.7e-3.
_ROW, _LARGE = 1024, 1 << 15


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The L2 norm of each parameter's gradient, as 0-d float32 tensors on their devices.

    A parameter without a gradient is left out; a shared one is there once. Where parameters are
    DTensors every rank must call this: the norms are those of the whole, and -1 for one without.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
    >>> gradient_norms(layer)
    {'weight': tensor(5.)}
    """
    names = parameter_names(model)
    found = norms({name: p.grad for p, name in names.items() if p.grad is not None})
    (found,) = whole_norms({name: p for p, name in names.items()}, [found])
    return found


@torch.no_grad()
def norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The L2 norm of each tensor's part on this rank, as 0-d float32 tensors on their devices."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], dict[str, Tensor]] = {}
    for name, values in tensors.items():
        plain = type(values) is Tensor and values.layout is torch.strided and not values.is_meta
        if not (plain and values.is_floating_point()):
            values = readable(as_real(local(values)))
            values = values if values.is_floating_point() else values.float()
            if values.layout is not torch.strided:
                raise TypeError(f"gradient of {name}: no norm of a tensor of {values.layout}")
        if values.numel() >= _LARGE:
            values = _first_stage(values)
        is_long = values.numel() > _ROW and values.is_cpu
        wide = torch.float64 if is_long or values.dtype == torch.float64 else torch.float32
        groups.setdefault((values.device, values.dtype, wide), {})[name] = values
    found: dict[str, Tensor] = {}
    for (_, _, wide), group in groups.items():
        of_each = norm_of_each([*group.values()], wide)
        if wide != torch.float32:
            of_each = [norm.float() for norm in of_each]
        found |= zip(group, of_each, strict=True)
    return found if len(groups) == 1 else {name: found[name] for name in tensors}


@torch.no_grad()
def ratios(change: Mapping[str, Tensor], size: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """‖change‖ / ‖size‖ for each parameter, as 0-d float32 tensors."""
    return {name: change[name] / size[name] for name in size}


class Totals(NamedTuple):
    """What the norms of single parameters amount to, L2.

    Attributes:
        total_norm: over all; None without any gradient.
        before_clip: the same before clipping. None where the loss seems to have been scaled by
            other than its `scale`.
        layers: module -> mean of its own parameters' norms.
    """

    total_norm: float | None = None
    before_clip: float | None = None
    layers: Mapping[str, float] = {}


def totals(
    norms: Mapping[str, float], before_clip: Mapping[str, float] | None = None, scale: float = 1.0
) -> Totals:
    """The totals of norms on the host.

    Args:
        norms, before_clip: by parameter name; those below 0 are of parameters without a gradient.
        scale: what the loss was multiplied with.

    >>> totals({"a.weight": 3.0, "a.bias": 4.0})
    Totals(total_norm=5.0, before_clip=None, layers={'a': 3.5})
    """
    layers: dict[str, list[float]] = {}
    for name, norm in norms.items():
        if not norm < 0:
            layers.setdefault(name.rpartition(".")[0] or "root", []).append(norm)
    if not layers:
        return Totals()
    total = math.hypot(*(norm for own in layers.values() for norm in own))
    before = math.hypot(*(norm for norm in (before_clip or {}).values() if not norm < 0)) / scale
    is_known = before_clip and not _is_scaled(before, total)
    means = {layer: sum(own) / len(own) for layer, own in layers.items()}
    return Totals(total, before if is_known else None, means)


def _is_scaled(unclipped: float, applied: float) -> bool:
    """Whether a total norm shrank by a power of two, as by a loss scale; clipping never does."""
    if not (0 < applied < unclipped < math.inf):
        return False
    power = math.log2(unclipped / applied)
    return power > 0.5 and abs(power - round(power)) < 1e-5


def _first_stage(tensor: Tensor) -> Tensor:
    """The norms of a tensor's rows of 1024, and the elements that are left over."""
    wide = widened(tensor.dtype)
    flat = tensor.reshape(-1)
    rest = flat.numel() % _ROW
    whole, left_over = flat.split([len(flat) - rest, rest]) if rest else (flat, None)
    rows = torch.linalg.vector_norm(whole.view(-1, _ROW), dim=-1, dtype=wide)
    return rows if left_over is None else torch.cat([rows, left_over.to(wide)])
