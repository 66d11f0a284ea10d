"""Dtypes: the one rule by which numbers are widened, and how any tensor is read as real numbers."""

import torch
from torch import Tensor


def widened(dtype: torch.dtype) -> torch.dtype:
    """Float32, or `dtype` where that is wider: what is computed in."""
    return torch.promote_types(dtype, torch.float32)


def widest(device: torch.device) -> torch.dtype:
    """What long sums are accumulated in: float64, which MPS has not."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_real(tensor: Tensor) -> Tensor:
    """The values as a dense real tensor: of a sparse one the coalesced values, of a complex one
    its real and imaginary parts. The L2 norm stays."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
