"""The stateless log functions.

In: a writer, what is to be measured and its step. Out: one event at that step.
No cadence and no state: the caller decides when. Bad input is refused at the call.
"""

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .attention import sums_of_weights
from .gradients import gradient_norms
from .histograms import histogram
from .names import parameter_names, tag
from .readings import Readings, compose, learning_rates, parameter_histograms, uncertainties
from .writers import Event, Writer, prefixed, write, write_hparams


def log_metrics(
    writer: Writer | None, metrics: Mapping[str, Any], step: int, *, prefix: str = "train"
) -> None:
    """Write each metric, a number or a tensor of one element.

    | tag | what |
    | --- | --- |
    | `train/<name>` | the metric, under `prefix`; NaN and inf as they are |

    >>> log_metrics(writer, {"loss": torch.tensor(0.5), "accuracy": 0.9}, step=10, prefix="val")

    Raises:
        TypeError, ValueError: a metric is not one real number; the message names it.
    """
    if writer is None:
        return
    if not isinstance(metrics, Mapping):
        raise TypeError(f"log_metrics: metrics are a dict of numbers, got {type(metrics).__name__}")
    scalars = {name: _number("log_metrics", name, value) for name, value in metrics.items()}
    _record(writer, Readings(scalars), step, prefix)


def log_learning_rate(
    writer: Writer | None, optimizer: Optimizer, step: int, *, prefix: str = ""
) -> None:
    """Write the rate of each parameter group as it is now: before the scheduler's step.

    | tag | what |
    | --- | --- |
    | `learning_rate/<group>` | by the group's name, where it has one, else by its index |

    >>> log_learning_rate(writer, torch.optim.SGD([torch.zeros(1)], lr=0.1), step=0)
    """
    if writer is None:
        return
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(
            f"log_learning_rate: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    _record(writer, Readings(learning_rates(optimizer)), step, prefix)


def log_gradients(writer: Writer | None, model: nn.Module, step: int, *, prefix: str = "") -> None:
    """Write the norms of the gradients as they are now: after backward(), before zero_grad().

    | tag | what |
    | --- | --- |
    | `gradients/norm/<parameter>` | L2 norm |
    | `gradients/layer_mean/<module>` | mean of the norms of the module's own parameters |
    | `gradients/total_norm` | L2 norm over all |

    Without any gradient nothing is written, with a warning.

    >>> model = nn.Linear(2, 2)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> log_gradients(writer, model, step=0)
    """
    if writer is None:
        return
    norms = gradient_norms(_checked_model("log_gradients", model))
    if not norms:
        warnings.warn(
            "bthooks.log_gradients: no parameter has a gradient, nothing is written; call it "
            "after backward() and before zero_grad()",
            stacklevel=2,
        )
    _record(writer, Readings(norms=norms), step, prefix)


def log_attention_stats(
    writer: Writer | None,
    attention_weights: Tensor,
    step: int,
    *,
    attention_entropy: Tensor | float | None = None,
    name: str = "root",
    prefix: str = "",
) -> None:
    """Write the statistics of one attention map from its weights, before dropout.

    Args:
        attention_weights: `(batch, heads, query, key)`; each row sums to 1, or is all zeros or
            NaN where it sees no key.
        attention_entropy: the entropy in nats where it is already known, of any shape: its mean
            is written.
        name: the layer's.

    | tag | what |
    | --- | --- |
    | `attention/entropy/<name>` | nats, mean over batch, heads and rows |
    | `attention/entropy_normalized/<name>` | entropy / log(visible keys) |
    | `attention/weight_mean/<name>`, `attention/weight_std/<name>` | of the weights |
    | `attention/weight_max/<name>` | the largest weight |
    | `attention/sink/<name>` | mean weight on key 0 |
    | `attention/dead_rows/<name>` | fraction of rows that see no key |

    >>> log_attention_stats(writer, torch.full((1, 4, 8, 8), 1 / 8), step=0, name="blocks.0")

    Raises:
        ValueError: the shape is another, a weight is negative, or a row does not sum to 1.
    """
    if writer is None:
        return
    attention_weights = _checked_weights(attention_weights)
    readings = Readings(attention={name: sums_of_weights(attention_weights)})
    event = compose(readings)
    if attention_entropy is not None:
        entropy = torch.as_tensor(attention_entropy).double().mean().item()
        if not entropy >= 0:
            raise ValueError(
                f"log_attention_stats: attention_entropy has mean {entropy}, expected nats >= 0"
            )
        event.scalars[f"attention/entropy/{name}"] = entropy
    write(writer, prefixed(event, prefix), _checked_step(step))


def log_uncertainty_metrics(
    writer: Writer | None,
    epistemic: Any,
    step: int,
    *,
    aleatoric: Any = None,
    prefix: str = "",
) -> None:
    """Write the mean and the distribution of each uncertainty over the batch.

    Args:
        epistemic, aleatoric: of any one shape, or a number; in the unit that they come in
            (nats for classes, the target's unit squared for a variance).

    | tag | what |
    | --- | --- |
    | `uncertainty/epistemic`, `uncertainty/aleatoric` | the mean |
    | `uncertainty/total` | the mean of their sum, where both are given |
    | `uncertainty/distribution/<kind>` | histogram |

    >>> log_uncertainty_metrics(writer, torch.rand(32), step=0, aleatoric=torch.rand(32))
    """
    if writer is None:
        return
    found = {"epistemic": epistemic} | ({} if aleatoric is None else {"aleatoric": aleatoric})
    values = {
        kind: _checked_values("log_uncertainty_metrics", kind, v) for kind, v in found.items()
    }
    for kind, value in values.items():
        if value.numel() == 0 or value.is_complex() or value.shape != values["epistemic"].shape:
            raise ValueError(
                f"log_uncertainty_metrics: {kind} has shape {tuple(value.shape)} and dtype "
                f"{value.dtype}, expected real numbers, both kinds of one shape, not empty"
            )
    _record(writer, uncertainties(values), step, prefix)


def log_model_histograms(
    writer: Writer | None, model: nn.Module, step: int, *, prefix: str = ""
) -> None:
    """Write the distributions of the parameters and of those gradients that are there.

    | tag | what |
    | --- | --- |
    | `parameters/<name>`, `gradients/distribution/<name>` | histogram of the finite values |
    | `health/nonfinite/parameters/<name>` | how many were not, unless none |
    | `health/nonfinite/gradients/<name>` | the same |

    >>> log_model_histograms(writer, nn.Linear(2, 2), step=0)
    """
    if writer is None:
        return
    names = parameter_names(_checked_model("log_model_histograms", model))
    _record(writer, Readings(histograms=parameter_histograms(names)), step, prefix)


def log_activations(
    writer: Writer | None, activations: Mapping[str, Tensor], step: int, *, prefix: str = ""
) -> None:
    """Write the distribution of each activation.

    | tag | what |
    | --- | --- |
    | `activations/<name>` | histogram of the finite values |
    | `health/nonfinite/activations/<name>` | how many were not, unless none |

    >>> log_activations(writer, {"encoder": torch.randn(4, 8)}, step=0)
    """
    if writer is None:
        return
    if not isinstance(activations, Mapping):
        raise TypeError(
            f"log_activations: activations are a dict of tensors, got {type(activations).__name__}"
        )
    found = {
        f"activations/{name}": histogram(_checked_values("log_activations", name, values))
        for name, values in activations.items()
    }
    _record(writer, Readings(histograms=found), step, prefix)


def log_text(writer: Writer | None, tag: str, text: str, step: int, *, prefix: str = "") -> None:
    """Write a text, in Markdown.

    | tag | what |
    | --- | --- |
    | `<tag>` | the text |

    >>> log_text(writer, "samples/greedy", "To be, or not to be", step=0)
    """
    if writer is None:
        return
    if not isinstance(text, str):
        raise TypeError(f"log_text: the text of tag {tag!r} is a str, got {type(text).__name__}")
    write(writer, prefixed(Event(texts={tag: text}), prefix), _checked_step(step))


def log_hparams(
    writer: Writer | None,
    hparams: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    prefix: str = "",
) -> None:
    """Write the hyperparameters of the run with the metrics they led to, once, at its end.

    In the run's own event file, with no sub-run. Numbers and strings are kept, anything else is
    written as its `str`.

    | tag | what |
    | --- | --- |
    | `hparams/<name>` | the metric |

    >>> log_hparams(writer, {"lr": 1e-3, "layers": [2, 2]}, {"accuracy": 0.97})
    """
    if writer is None:
        return
    for what, given in (("hparams", hparams), ("metrics", metrics)):
        if not isinstance(given, Mapping):
            raise TypeError(f"log_hparams: {what} are a dict, got {type(given).__name__}")
    numbers = {name: _number("log_hparams", name, value) for name, value in metrics.items()}
    event = compose(Readings(numbers))
    write_hparams(
        writer,
        {name: _hparam(value) for name, value in hparams.items()},
        prefixed(event, tag(prefix, "hparams")).scalars,
    )


def _record(writer: Writer | None, readings: Readings, step: int, prefix: str) -> None:
    write(writer, prefixed(compose(readings), prefix), _checked_step(step))


def _checked_step(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"step is a whole number, got {step!r}") from None
    if number < 0:
        raise ValueError(f"step counts from 0, got {number}")
    return number


def _checked_model(where: str, model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _number(where: str, name: str, value: Any) -> Tensor | float:
    """One real number, left on its device where it is a tensor."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"{where}: names are non-empty str, got {name!r}")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{where}: {name!r} has shape {tuple(value.shape)}, expected one number; "
                "reduce it first, e.g. with .mean()"
            )
        if not value.is_complex():
            return value.detach().reshape(())
    elif not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise TypeError(f"{where}: {name!r} is one real number, got {value!r}")


def _checked_values(where: str, name: str, values: Any) -> Tensor:
    try:
        tensor: Tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{where}: {name!r} is a tensor of numbers, got {type(values).__name__}"
        ) from None
    return tensor


def _checked_weights(given: Any) -> Tensor:
    where = "log_attention_stats"
    weights = _checked_values(where, "attention_weights", given).detach()
    if weights.dim() != 4 or weights.numel() == 0:
        raise ValueError(
            f"{where}: attention_weights have shape (batch, heads, query, key), got "
            f"{tuple(weights.shape)}; for weights averaged over heads use weights.unsqueeze(1)"
        )
    sums = weights.to(torch.float32).sum(-1)
    sums = sums[(sums != 0) & ~sums.isnan()]
    tolerance = 1e-3 if weights.dtype in (torch.float32, torch.float64) else 3e-2
    least = weights.nan_to_num(0).amin().item()
    if least < 0:
        raise ValueError(
            f"{where}: attention_weights go down to {least:.3g}, expected probabilities; "
            "pass the weights after the softmax, not the scores"
        )
    if ((sums - 1).abs() > tolerance).any().item():
        raise ValueError(
            f"{where}: rows of attention_weights sum to {sums.min():.4g}..{sums.max():.4g}, "
            "expected 1 over the last dimension; pass the weights before dropout"
        )
    return weights


def _hparam(value: Any) -> str | float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return float(value)
