"""Gradients: their norms, by parameter name, as 0-d float32 tensors on their devices. Pure."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..names import parameter_names
from ..torch_private import norm_of_each
from .dtypes import as_real, widened
from .sharded import is_sharded, local, readable

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
    parameters = {name: p for p, name in parameter_names(model).items()}
    found = norms({name: p.grad for name, p in parameters.items() if p.grad is not None})
    return _whole(parameters, found)


@torch.no_grad()
def _whole(parameters: Mapping[str, Any], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms of whole tensors, from those of each rank's parts; -1 where no rank has one.

    Every rank of a mesh must call this: one reduction per dimension of the mesh over which anything
    is sharded, so one under FSDP2.
    """
    found = dict(parts)
    meshes: dict[Any, list[str]] = {}
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            meshes.setdefault(parameter.device_mesh, []).append(name)
    for mesh, names in meshes.items():
        missing = torch.full((), -1, dtype=torch.float64, device=mesh.device_type)
        norms = torch.stack([parts.get(name, missing).to(missing) for name in names])  # (names,)
        is_there = ~(norms < 0)  # NaN too
        sums = torch.stack([torch.where(is_there, norms.square(), 0), is_there.to(norms)])
        placements = [parameters[name].placements for name in names]
        for dimension in range(mesh.ndim):
            copied = [on[dimension].is_replicate() for on in placements]
            if all(copied):
                continue
            if any(copied):
                weights = [1 / mesh.size(dimension) if copy else 1.0 for copy in copied]
                shares = torch.tensor(weights, dtype=sums.dtype)
                sums[0] *= shares.to(sums.device, non_blocking=True)
            dist.all_reduce(sums, group=mesh.get_group(dimension))
        squares, there = sums
        wholes = torch.where(there > 0, squares.sqrt(), -1).to(torch.float32)
        found.update(zip(names, wholes.unbind(), strict=True))
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


def _first_stage(tensor: Tensor) -> Tensor:
    """The norms of a tensor's rows of 1024, and the elements that are left over."""
    wide = widened(tensor.dtype)
    flat = tensor.reshape(-1)
    rest = len(flat) % _ROW
    rows = flat[: len(flat) - rest].view(-1, _ROW)
    of_rows = torch.linalg.vector_norm(rows, dim=-1, dtype=wide)
    return torch.cat([of_rows, flat[-rest:].to(wide)]) if rest else of_rows
