"""Dropout: several predictions of one model, each with another dropout mask.

In: a model and its inputs. Out: its outputs, stacked. The model and the random numbers of the
caller are left as they were.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

_NORM = nn.modules.batchnorm._NormBase  # of batches and of instances: with running statistics


def mc_dropout(model: nn.Module, *inputs: Any, samples: int = 16, **keywords: Any) -> Any:
    """The outputs of `samples` forwards with dropout active (Gal and Ghahramani, 2016).

    Dropout is active as in training, also that of functions and of
    `F.scaled_dot_product_attention`; normalisation stays as in evaluation. Training flags, buffers
    and the caller's random numbers are as before afterwards, also after an exception; an
    attachment does not see these forwards. No gradient is kept.

    Args:
        inputs, keywords: what the model is called with.

    Returns:
        what the model returns, each tensor in it `(samples, ...)`.

    Warns:
        RuntimeWarning: two samples are identical: the model has no dropout.

    >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3), nn.Softmax(-1))
    >>> mc_dropout(model, torch.ones(4, 8), samples=32).shape
    torch.Size([32, 4, 3])

    Raises:
        ValueError: `samples` is below 1.
    """
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"mc_dropout: samples is a whole number from 1, got {samples!r}")
    with _dropping(model), torch.no_grad():
        outputs = [model(*inputs, **keywords) for _ in range(samples)]
    flat = [_pytree.tree_flatten(output) for output in outputs]
    structure = flat[0][1]
    leaves = [
        torch.stack(values) if isinstance(values[0], Tensor) else values[0]
        for values in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]
    if samples > 1 and tensors and all(torch.equal(leaf[0], leaf[1]) for leaf in tensors):
        warnings.warn(
            "bthooks: mc_dropout: two samples are identical; has the model no dropout?",
            RuntimeWarning,
            stacklevel=2,
        )
    return _pytree.tree_unflatten(leaves, structure)


@contextlib.contextmanager
def _dropping(model: nn.Module) -> Iterator[None]:
    """Training mode but for normalisation, and everything as it was afterwards."""
    flags = {module: module.training for module in model.modules()}
    buffers = {b: (b._version, b.clone()) for b in model.buffers() if not b.is_inference()}
    devices = {t.device for t in (*model.parameters(), *buffers) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        try:
            for module in flags:
                # Not train(), which models override.
                module.training = not isinstance(module, _NORM)
            yield
        finally:
            for module, flag in flags.items():
                module.training = flag
            with torch.no_grad():
                for buffer, (version, value) in buffers.items():
                    if buffer._version != version:  # spectral norm, say
                        buffer.copy_(value)
