"""Dropout: several predictions of one model, each with another dropout mask.

In: a model and its inputs. Out: its outputs, stacked. The model and the random numbers of the
caller are left as they were.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import checked_model
from ..torch_private import is_normalization, leaves_of


def mc_dropout(model: nn.Module, *inputs: Any, samples: int = 16, **keywords: Any) -> Any:
    """The outputs of `samples` forwards with dropout active (Gal and Ghahramani, 2016).

    Dropout is active as in training, also that of functions and of
    `F.scaled_dot_product_attention`; normalisation stays as in evaluation. Inputs, training flags,
    buffers and torch's random numbers on the CPU and CUDA are as before afterwards, also after an
    exception; an attachment does not see these forwards. No gradient is kept.

    Args:
        inputs, keywords: what the model is called with.

    Returns:
        what the model returns, each tensor in it `(samples, ...)`; what is no tensor is that of
        the last forward.

    Warns:
        RuntimeWarning: the samples are identical: the model has no dropout.

    >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3), nn.Softmax(-1))
    >>> mc_dropout(model, torch.ones(4, 8), samples=32).shape
    torch.Size([32, 4, 3])

    Raises:
        ValueError: `samples` is below 1.
        TypeError: `model` is no module, or returns neither tensors nor a dict, tuple, list or
            dataclass of them.
    """
    checked_model("mc_dropout", model)
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"mc_dropout: samples is a whole number from 1, got {samples!r}")
    drawn = []
    with _dropping(model, (inputs, keywords)), torch.no_grad():
        for _ in range(samples):
            # Dropout in place would drop out of the input of the next forward too.
            (args, kwargs), _ = _cloned((inputs, keywords))
            output, tensors = _cloned(model(*args, **kwargs))
            drawn.append(tensors)
    if not tensors:
        raise TypeError(
            f"mc_dropout: the model returns a {type(output).__name__}, in which no tensor is "
            "found; wrap the model in one that returns tensors, or a dict or tuple of them"
        )
    stacked = [torch.stack(values) for values in zip(*drawn, strict=True)]
    sampled = [tensor for tensor in stacked if tensor.numel()]
    if samples > 1 and sampled and all(torch.equal(t, t[:1].expand_as(t)) for t in sampled):
        warnings.warn(
            "bthooks: mc_dropout: the samples are identical; has the model no dropout?",
            RuntimeWarning,
            stacklevel=2,
        )
    following = iter(stacked)
    return _mapped(output, lambda _: next(following))


def _mapped(given: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`given` with `function` of each tensor in it."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        names = [field.name for field in dataclasses.fields(leaf) if field.init]
        parts = {name: _mapped(getattr(leaf, name), function) for name in names}
        return dataclasses.replace(leaf, **parts)

    leaves, rebuilt = leaves_of(given)
    return rebuilt([of_leaf(leaf) for leaf in leaves])


def _cloned(given: Any) -> tuple[Any, list[Tensor]]:
    """`given` with a copy of each tensor in it; the copies."""
    clones: list[Tensor] = []

    def clone(tensor: Tensor) -> Tensor:
        clones.append(tensor.clone())
        return clones[-1]

    return _mapped(given, clone), clones


@contextlib.contextmanager
def _dropping(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Training mode but for normalisation, and everything as it was afterwards."""
    flags = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in flags
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer) and not buffer.is_inference()
    ]
    tensors = [*model.parameters(), *model.buffers(), *leaves_of(inputs)[0]]
    devices = {t.device for t in tensors if isinstance(t, Tensor) and t.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        try:
            for module in flags:
                # Not train(), which models override.
                module.training = not is_normalization(module)
            yield
        finally:
            for module, flag in flags.items():
                module.training = flag
            for module, name, buffer, value in buffers:
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
                if buffer.shape != value.shape:
                    buffer.data = value
                # F.batch_norm writes without a new version; a write here must not make one.
                elif not torch.equal(buffer, value):
                    buffer.data.copy_(value)
