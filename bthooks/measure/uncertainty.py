"""Uncertainty: how much of it is the model's, and how much the data's.

Several predictions of one model, each with another dropout mask, tell the two apart; so do the
members of an ensemble. A model that says its uncertainty by itself is asked for nothing more: what
it returns is searched for it. `mc_dropout` runs the model, and leaves it and the random numbers of
the caller as they were; the rest is pure.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import checks
from ..torch_private import is_normalization, leaves_of
from .dtypes import widened
from .outputs import held_as

KEYS = {
    "epistemic": ("epistemic_uncertainty", "epistemic"),
    "aleatoric": ("aleatoric_uncertainty", "aleatoric"),
    "total": ("uncertainty",),
}
"""By kind, the names that a model's output may hold it under."""


@torch.no_grad()
def decompose_uncertainty(
    probabilities: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> dict[str, Tensor]:
    """The uncertainties of a prediction, from several samples of it (Depeweg et al., 2018).

    The samples may be those of `mc_dropout`, of an ensemble or of Bayesian layers.

    Args:
        probabilities: `(samples, batch, ..., classes)`, not logits.
        mean, variance: of a regression instead, `(samples, batch, ...)` each, the variance not
            its log; where none is predicted, leave it out.

    Returns:
        `total`, `aleatoric` and `epistemic`, `(batch, ...)` each, none below 0, float32 or better.

    | kind | of classes, in nats | of a regression, in the target's unit squared |
    | --- | --- | --- |
    | `total` | entropy of the mean | variance: the sum of both |
    | `aleatoric` | mean of the entropies | mean of the variances |
    | `epistemic` | mutual information: their difference | variance of the means |

    >>> sure_of_either = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> {kind: round(u.item(), 4) for kind, u in decompose_uncertainty(sure_of_either).items()}
    {'total': 0.6931, 'aleatoric': 0.0, 'epistemic': 0.6931}

    Raises:
        ValueError: the shapes are others.
        TypeError: what is given is no real tensor.
    """
    given = {"probabilities": probabilities, "mean": mean, "variance": variance}
    checks.samples("decompose_uncertainty", given)
    if probabilities is not None:
        p = _wide(probabilities)
        # Below 0 where rounding made a probability greater than 1.
        total = torch.special.entr(p.mean(0)).sum(-1).clamp(min=0)
        aleatoric = torch.special.entr(p).sum(-1).clamp(min=0).mean(0).minimum(total)
        return {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}
    assert mean is not None
    means = _wide(mean)
    epistemic = means.var(0, correction=0)
    aleatoric = torch.zeros_like(epistemic) if variance is None else _wide(variance).mean(0)
    return {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(widened(values.dtype))


def find_uncertainties(output: Any) -> dict[str, Tensor]:
    """The real tensors that `output`, a dict or an object, holds under one of `KEYS`, by kind.

    >>> find_uncertainties({"logits": torch.zeros(2), "epistemic": torch.ones(2)})
    {'epistemic': tensor([1., 1.])}
    """
    found: dict[str, Tensor] = {}
    for kind, key in ((kind, key) for kind, keys in KEYS.items() for key in keys):
        value = held_as(output, key)
        is_real = isinstance(value, Tensor) and not (value.is_meta or value.is_complex())
        if is_real and value.numel():
            found.setdefault(kind, value)
    return found


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
    checks.model("mc_dropout", model)
    checks.whole("mc_dropout", "samples", samples, 1)
    drawn: list[list[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        drawn[-1].append(tensor.clone())
        return tensor

    with _dropping(model, (inputs, keywords)), torch.no_grad():
        for _ in range(samples):
            # Dropout in place would drop out of the input of the next forward too.
            args, kwargs = _mapped((inputs, keywords), lambda tensor: tensor.clone())
            drawn.append([])
            output = _mapped(model(*args, **kwargs), keep)
    if not drawn[-1]:
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


@contextlib.contextmanager
def _dropping(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Training mode for all but normalisation; afterwards flags, buffers and RNG are as before."""
    flags = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in flags
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer) and not buffer.is_inference()
    ]
    tensors = [*model.parameters(), *model.buffers(), *leaves_of(inputs)[0]]
    devices = {t.device.index for t in tensors if isinstance(t, Tensor) and t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
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
