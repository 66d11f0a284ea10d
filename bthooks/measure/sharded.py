"""Sharded: tensors of which a rank has a part, and which part it is. Pure; no rank is asked."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..torch_private import without_overrides

_PLAIN = {Tensor, nn.Parameter}  # hasattr takes 1 us to find that they have no such thing


class Part(NamedTuple):
    """Which part of a whole a rank has."""

    ranks: tuple[int, ...]  # that have parts of it, or copies of these
    place: int  # of this one among the parts
    parts: int  # how many there are


def part_of(tensor: Any, dimensions: slice = slice(None)) -> Part | None:
    """Which part of a DTensor this rank holds; None where it holds none.

    Of the mesh's `dimensions` alone: it is a part of what the others have left of the whole.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    dims = [
        dim for dim in range(mesh.ndim)[dimensions] if not tensor.placements[dim].is_replicate()
    ]
    place = 0
    for dim in dims:
        place = place * mesh.size(dim) + coordinate[dim]
    parts = math.prod(mesh.size(dim) for dim in dims)
    return Part(tuple(mesh.mesh.flatten().tolist()), place, parts)


def local(tensor: Tensor) -> Tensor:
    """This rank's own part of a DTensor; another tensor as it is."""
    if type(tensor) in _PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    if any(placement.is_partial() for placement in getattr(tensor, "placements", ())):
        raise ValueError(
            "of a DTensor that is still to be summed over its ranks no rank has a part"
        )
    part: Tensor = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part  # that of a collective under way


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of it, as a plain tensor."""
    return readable(local(tensor))


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
