"""Sharded: norms of tensors whose parts lie on several ranks, by one reduction for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..torch_private import without_overrides

_PLAIN = {Tensor, nn.Parameter}  # hasattr takes 1 us to find that they have no such thing


def local(tensor: Tensor) -> Tensor:
    """This rank's own part of a DTensor; another tensor as it is."""
    if type(tensor) in _PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    part: Tensor = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part  # that of a collective under way


def is_sharded(tensor: Tensor) -> bool:
    """Whether other ranks hold parts or copies of it, as of a DTensor."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def is_wrapper(tensor: Tensor) -> bool:
    """Whether its type runs operators its own way: as of quantised weights, or a DTensor."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def readable(tensor: Tensor) -> Tensor:
    """`tensor` as a plain one, if this rank holds all its values; else ValueError or TypeError."""
    if tensor.is_meta:
        raise ValueError("a tensor on the meta device has no values")
    if type(tensor) in _PLAIN:
        return tensor
    if is_sharded(tensor):
        raise ValueError("of a DTensor one rank holds a part; give its full_tensor()")
    if not is_wrapper(tensor):
        with without_overrides()[0]:  # else a subclass may make itself of what it becomes
            return tensor.as_subclass(Tensor)
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    try:
        return plain.copy_(tensor.detach())  # as its type says
    except Exception as error:
        kind = type(tensor).__name__
        raise TypeError(f"the values of a {kind} can't be read: {error}") from error


@torch.no_grad()
def whole_norms(
    parameters: Mapping[str, Any], parts: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """The norms of whole tensors, from those of each rank's parts; -1 where no rank has one.

    `parameters` are the same on every rank; one that is no DTensor is whole already. Every rank of
    a mesh must call this with as many `parts`, norms by name: one reduction per dimension of the
    mesh over which anything is sharded, so one under FSDP2.
    """
    found = [dict(part) for part in parts]
    if not parts:
        return found
    meshes: dict[Any, list[str]] = {}
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            meshes.setdefault(parameter.device_mesh, []).append(name)
    for mesh, names in meshes.items():
        missing = torch.full((), -1, dtype=torch.float64, device=mesh.device_type)
        rows = [[part.get(name, missing).to(missing) for name in names] for part in parts]
        norms = torch.stack([torch.stack(row) for row in rows])  # (parts, names)
        is_there = ~(norms < 0)  # NaN too
        sums = torch.cat([torch.where(is_there, norms.square(), 0), is_there.to(norms)])
        placements = [parameters[name].placements for name in names]
        for dimension in range(mesh.ndim):
            copied = [on[dimension].is_replicate() for on in placements]
            if all(copied):
                continue
            if any(copied):
                weights = [1 / mesh.size(dimension) if copy else 1.0 for copy in copied]
                shares = torch.tensor(weights, dtype=sums.dtype)
                sums[: len(parts)] *= shares.to(sums.device, non_blocking=True)
            dist.all_reduce(sums, group=mesh.get_group(dimension))
        squares, there = sums.chunk(2)
        wholes = torch.where(there > 0, squares.sqrt(), -1).to(torch.float32)
        for part, row in zip(found, wholes, strict=True):
            part.update(zip(names, row.unbind(), strict=True))
    return found
