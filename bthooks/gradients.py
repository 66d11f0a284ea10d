"""Gradients: norms per parameter, per layer and in total; update ratios. Pure.

In: tensors by parameter name. Out: 0-d float32 tensors by parameter name, on their devices;
from these, once they are on the host, the figures per layer and in total.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .names import parameter_names

_LARGE, _ROW = 1 << 16, 1024


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The L2 norm of each parameter's gradient, as 0-d float32 tensors on their devices.

    A parameter without a gradient is left out; a shared one is there once.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
    >>> gradient_norms(layer)
    {'weight': tensor(5.)}
    """
    names = parameter_names(model)
    return norms({name: p.grad for p, name in names.items() if p.grad is not None})


@torch.no_grad()
def norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The L2 norm of each tensor, as 0-d float32 tensors on their devices."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        values = _first_stage(_real(tensor.detach()))
        groups.setdefault((values.device, values.dtype), {})[name] = values
    found: dict[str, Tensor] = {}
    for (_, dtype), group in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        for name, norm in zip(
            group, torch._foreach_norm(list(group.values()), dtype=wide), strict=True
        ):
            found[name] = norm.to(torch.float32)
    return {name: found[name] for name in tensors}


@torch.no_grad()
def update_ratios(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """‖after − before‖ / ‖before‖ for each parameter, as 0-d float32 tensors."""
    size = norms(before)
    change = norms({name: after[name] - tensor for name, tensor in before.items()})
    return {name: change[name] / size[name] for name in before}


def summarize(norms: Mapping[str, float]) -> dict[str, float]:
    """`total_norm` (L2 over all) and `layer_mean/<module>` (mean of its own parameters' norms).

    >>> summarize({"a.weight": 3.0, "a.bias": 4.0})
    {'total_norm': 5.0, 'layer_mean/a': 3.5}
    """
    layers: dict[str, list[float]] = {}
    for name, norm in norms.items():
        layers.setdefault(name.rpartition(".")[0] or "root", []).append(norm)
    means = {f"layer_mean/{layer}": sum(own) / len(own) for layer, own in layers.items()}
    return {"total_norm": math.hypot(*norms.values()), **means} if norms else {}


def _real(tensor: Tensor) -> Tensor:
    """A real floating-point tensor of the same L2 norm."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.is_floating_point() else tensor.float()


def _first_stage(tensor: Tensor) -> Tensor:
    """A large tensor's norms in rows of 1024, with what is left over; a small one as it is.

    In one stage the CPU is off by 2.7e-3 over 38.6 M float32 elements, in two by 2e-7.
    """
    if tensor.numel() < _LARGE:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    flat = tensor.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=-1, dtype=wide)
    return torch.cat([rows, flat[whole:].to(wide)])
