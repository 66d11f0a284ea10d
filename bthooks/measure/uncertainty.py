"""Uncertainty: how much of it is the model's, and how much the data's. Pure.

In: what several samples of a model predict, or the output of a forward that says it by itself.
Out: the uncertainties by kind.
"""

from typing import Any

import torch
from torch import Tensor

from .dtypes import widened
from .outputs import held_as

KEYS = {
    "epistemic": ("epistemic_uncertainty", "epistemic"),
    "aleatoric": ("aleatoric_uncertainty", "aleatoric"),
    "total": ("uncertainty",),
}


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
    where = "decompose_uncertainty"
    for given in (probabilities, mean, variance):
        if given is not None and (not isinstance(given, Tensor) or given.is_complex()):
            raise TypeError(f"{where}: expected real tensors, got {type(given).__name__}")
    if (probabilities is None) == (mean is None):
        raise ValueError(f"{where}: give either probabilities, or mean= (and variance=)")
    if probabilities is not None:
        if probabilities.dim() < 2 or not probabilities.numel() or variance is not None:
            raise ValueError(
                f"{where}: probabilities have shape (samples, batch, classes) and no variance, got "
                f"{tuple(probabilities.shape)}; one sample alone is probabilities[None]"
            )
        p = _wide(probabilities)
        # Below 0 where rounding made a probability greater than 1.
        total = torch.special.entr(p.mean(0)).sum(-1).clamp(min=0)
        aleatoric = torch.special.entr(p).sum(-1).clamp(min=0).mean(0).minimum(total)
        return {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}
    assert mean is not None
    if mean.dim() < 1 or not mean.numel() or not (variance is None or variance.shape == mean.shape):
        raise ValueError(
            f"{where}: mean and variance have shape (samples, batch, ...), got {tuple(mean.shape)} "
            f"and {None if variance is None else tuple(variance.shape)}"
        )
    means = _wide(mean)
    epistemic = means.var(0, correction=0)
    aleatoric = torch.zeros_like(epistemic) if variance is None else _wide(variance).mean(0)
    return {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(widened(values.dtype))


def find_uncertainties(output: Any) -> dict[str, Tensor]:
    """The real tensors in `output` under one of `KEYS`, by kind.

    Args:
        output: a dict, or anything with attributes: a dataclass, a named tuple, an object.

    >>> find_uncertainties({"logits": torch.zeros(2), "epistemic": torch.ones(2)})
    {'epistemic': tensor([1., 1.])}
    """
    found = {}
    for kind, keys in KEYS.items():
        for key in keys:
            value = held_as(output, key)
            if not isinstance(value, Tensor) or value.is_meta or value.is_complex():
                continue
            if value.numel():
                found[kind] = value
                break
    return found
