"""Log: the functions for scripts: one measure, one event; no cadence, no state."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checks
from .health.alerts import Verdict
from .measure.attention import sums_of_weights
from .measure.calibration import calibration_bins, calibration_of, error_by_chance, ranking_stats
from .measure.figures import Figures, figures_of
from .measure.gradients import gradient_norms
from .measure.histograms import histogram
from .measure.readings import Drawn, Readings, parameter_histograms, rates_of, uncertainties
from .measure.sharded import is_sharded
from .names import parameter_names, tag
from .record.backend import write
from .record.event import Event, event_of, prefixed
from .record.images import reliability_diagram
from .record.recorder import Recorder, is_written, losses_given, recorder_of, within
from .record.transfer import Transfer, read
from .record.writers import Writer


class _Judged(NamedTuple):
    """What an attachment says of what is logged by hand, and under which prefix it does."""

    recorder: Recorder
    verdict: Verdict
    prefix: str


def log_metrics(
    writer: Writer | None, metrics: Mapping[str, Any], step: int, *, prefix: str = "train"
) -> None:
    """Write each metric, a number or a tensor of one element.

    | tag | what |
    | --- | --- |
    | `train/<name>` | the metric, under `prefix`; NaN and inf as they are |

    Where an attachment has this writer, its thresholds judge the metric `loss`, and `health/loss`
    (0 or 1) is written while it is in trouble.

    >>> log_metrics(writer, {"loss": torch.tensor(0.5), "accuracy": 0.9}, step=10, prefix="val")

    Raises:
        TypeError, ValueError: a metric is not one real number; the message names it.
    """
    if writer is None:
        return
    checks.instance("log_metrics: metrics are a dict of numbers", metrics, Mapping)
    scalars = {name: checks.number("log_metrics", name, value) for name, value in metrics.items()}
    figures = figures_of({0: read(Readings(metrics=scalars))})
    step = checks.whole("log_metrics", "step", step)
    loss = figures.metrics.get("loss")
    judged = None if loss is None else _judged(writer, Figures(loss=loss), step, prefix)
    is_well = judged is None or not (any(judged.verdict.shares.values()) or judged.verdict.cleared)
    _put(writer, _with(None if is_well else judged, event_of(figures), prefix), step)
    if judged is not None:  # once it is written: what is told may flush or detach
        judged.recorder.alerts.tell()


def log_learning_rate(
    writer: Writer | None, optimizer: Optimizer, step: int, *, prefix: str = ""
) -> None:
    """Write the rate of each parameter group as it is now: before the scheduler's step.

    | tag | what |
    | --- | --- |
    | `learning_rate/<group>` | by the group's name, where it has one, else by its index |
    | `learning_rate/effective/<group>` | `d * lr`, where the optimizer estimates a `d` |

    >>> log_learning_rate(writer, torch.optim.SGD([torch.zeros(1)], lr=0.1), step=0)
    """
    if writer is None:
        return
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(
            f"log_learning_rate: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    readings = Readings()
    readings.take_rates(rates_of(optimizer))
    event = _event(readings)
    _write("log_learning_rate", writer, event, step, prefix)


def log_gradients(writer: Writer | None, model: nn.Module, step: int, *, prefix: str = "") -> None:
    """Write the norms of the gradients as they are now: after backward(), before zero_grad().

    | tag | what |
    | --- | --- |
    | `gradients/norm/<parameter>` | L2 norm |
    | `gradients/layer_mean/<module>` | mean of the norms of the module's own parameters |
    | `gradients/total_norm` | L2 norm over all |

    Without any gradient nothing is written, with a warning. Where parameters are DTensors every
    rank must call this.

    >>> model = nn.Linear(2, 2)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> log_gradients(writer, model, step=0)
    """
    is_module = isinstance(model, nn.Module)
    if writer is None and not (is_module and any(map(is_sharded, model.parameters()))):
        return
    norms = gradient_norms(checks.model("log_gradients", model))  # every rank's, if sharded
    if writer is None:
        return
    if not norms:
        warnings.warn(
            "bthooks.log_gradients: no parameter has a gradient, nothing is written; call it "
            "after backward() and before zero_grad()",
            stacklevel=2,
        )
    _write("log_gradients", writer, _event(Readings(norms=norms)), step, prefix)


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
    | `attention/entropy_normalized/<name>` | 0 to 1: entropy / log(keys that the row sees) |
    | `attention/weight_mean/<name>`, `attention/weight_std/<name>` | of the weights |
    | `attention/weight_max/<name>` | the largest weight |
    | `attention/sink/<name>` | mean weight on key 0 |
    | `attention/dead_rows/<name>` | fraction of rows that see no key, unless none |

    >>> log_attention_stats(writer, torch.full((1, 4, 8, 8), 1 / 8), step=0, name="blocks.0")

    Raises:
        ValueError: the shape is another, a weight is negative, or a row does not sum to 1.
    """
    if writer is None:
        return
    sums = sums_of_weights(checks.weights("log_attention_stats", attention_weights))
    event = _event(Readings(attention={name: sums}))
    if attention_entropy is not None:
        entropy = torch.as_tensor(attention_entropy).double().mean().item()
        if not entropy >= 0:
            raise ValueError(
                f"log_attention_stats: attention_entropy has mean {entropy}, expected nats >= 0"
            )
        event.scalars[f"attention/entropy/{name}"] = entropy
    _write("log_attention_stats", writer, event, step, prefix)


def log_uncertainty_metrics(
    writer: Writer | None, epistemic: Any, step: int, *, aleatoric: Any = None, prefix: str = ""
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
    | `health/nonfinite/uncertainty/<kind>` | how many were not finite, unless none |

    >>> log_uncertainty_metrics(writer, torch.rand(32), step=0, aleatoric=torch.rand(32))
    """
    if writer is None:
        return
    where = "log_uncertainty_metrics"
    values = {"epistemic": checks.reals(where, "epistemic", epistemic)}
    if aleatoric is not None:
        shape = values["epistemic"].shape
        values["aleatoric"] = checks.reals(where, "aleatoric", aleatoric, shape)
    _write(where, writer, _event(uncertainties(values)), step, prefix)


def log_calibration(
    writer: Writer | None,
    probabilities: Tensor,
    targets: Tensor,
    step: int,
    *,
    uncertainty: Tensor | None = None,
    prefix: str = "",
) -> None:
    """Write how well the probabilities fit what is true, best over a whole validation set.

    Args:
        probabilities: `(batch, classes)`, or with further dimensions between; not logits.
        targets: `(batch)`, class indices.
        uncertainty: `(batch)`, larger where less sure, in any unit.

    | tag | what |
    | --- | --- |
    | `calibration/ece`, `calibration/mce` | expected and maximum calibration error, 15 bins |
    | `calibration/brier`, `calibration/nll` | mean Brier score (0 to 2) and -log p (nats) |
    | `calibration/accuracy`, `calibration/confidence` | fraction right; mean largest probability |
    | `calibration/gap` | confidence - accuracy: above 0 is over-confident |
    | `calibration/auroc` | with `uncertainty`: how well it tells the wrong from the right |
    | `calibration/spearman` | with it: its rank correlation with -log p of the true class |
    | `calibration/aurc` | with it: the risk-coverage area |
    | `calibration/reliability` | image: accuracy over confidence |

    What can't be said (`auroc`, where all are right) is left out; and where a probability is NaN
    all of it is, where an uncertainty is what takes it, with a warning. Where an attachment has
    this writer, its thresholds judge the error, and `health/miscalibration` (0 or 1) is written
    too.

    >>> p, targets = torch.rand(100, 10).softmax(-1), torch.randint(10, (100,))
    >>> log_calibration(writer, p, targets, step=0, uncertainty=1 - p.amax(-1))

    Raises:
        ValueError: the shapes are others, the probabilities are none, a target is no class.
        TypeError: probabilities are not floats, or targets not whole numbers.
    """
    if writer is None:
        return
    where = "log_calibration"
    p = checks.values(where, "probabilities", probabilities)
    true = checks.values(where, "targets", targets)
    checks.probabilities(where, p, true)
    if _lost(p.isnan().any(-1), "rows of probabilities", "nothing of them is written"):
        return
    bins = calibration_bins(p, true)
    stats = calibration_of(bins)
    if uncertainty is not None:
        unsure = checks.reals(where, "uncertainty", uncertainty, true.shape)
        if not _lost(unsure.isnan(), "values of uncertainty", "it is left out"):
            stats |= ranking_stats(unsure, p, true)
    *numbers, bins = Transfer([*stats.values(), bins]).result()
    found = dict(zip(stats, numbers, strict=True))
    figures = Figures(calibration=found, chance=float(error_by_chance(bins)))
    step = checks.whole(where, "step", step)
    judged = _judged(writer, figures, step, prefix)
    event = event_of(figures)
    event.images["calibration/reliability"] = reliability_diagram(bins)
    _put(writer, _with(judged, event, prefix), step)
    if judged is not None:
        judged.recorder.alerts.tell()


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
    names = parameter_names(checks.model("log_model_histograms", model))
    event = _event(Readings(histograms=parameter_histograms(names)))
    _write("log_model_histograms", writer, event, step, prefix)


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
    checks.instance("log_activations: activations are a dict of tensors", activations, Mapping)
    found = {
        Drawn("activations", name): histogram(checks.values("log_activations", name, values))
        for name, values in activations.items()
    }
    _write("log_activations", writer, _event(Readings(histograms=found)), step, prefix)


def log_text(writer: Writer | None, tag: str, text: str, step: int, *, prefix: str = "") -> None:
    """Write a text, in Markdown.

    | tag | what |
    | --- | --- |
    | `<tag>` | the text |

    >>> log_text(writer, "samples/greedy", "To be, or not to be", step=0)
    """
    if writer is None:
        return
    checks.instance(f"log_text: the text of tag {tag!r} is a str", text, str)
    if not isinstance(tag, str) or not tag.strip("/"):
        raise TypeError(f"log_text: a tag is a non-empty str, got {tag!r}")
    _write("log_text", writer, Event(texts={tag: text}), step, prefix)


def log_hparams(
    writer: Writer | None,
    hparams: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    prefix: str = "",
) -> None:
    """Write the hyperparameters of the run with the metrics they led to, once, at its end.

    In the run's own event file, with no sub-run. Numbers, bools and strings are kept, None is left
    out, anything else (and inf and NaN, which the tab can't show) is written as its `str`. The
    HParams tab has a column for each hyperparameter of any run in the folder, and offers each
    scalar of these runs as a metric; it shows the first five until others are ticked. Where
    `add_hparams` is not the backend's own (a tracker has replaced it), it is called.

    | tag | what |
    | --- | --- |
    | `hparams/<name>` | the metric |

    >>> log_hparams(writer, {"lr": 1e-3, "layers": [2, 2]}, {"accuracy": 0.97})
    """
    if writer is None:
        return
    for what, given in (("hparams", hparams), ("metrics", metrics)):
        checks.instance(f"log_hparams: {what} are a dict", given, Mapping)
    numbers = {name: checks.number("log_hparams", name, value) for name, value in metrics.items()}
    event = prefixed(_event(Readings(metrics=numbers)), tag(prefix, "hparams"))
    known = {str(name): value for name, value in hparams.items() if value is not None}
    event.hparams = {name: checks.hparam(value) for name, value in known.items()}
    _put(writer, event, 0)


def _lost(is_nan: Tensor, of: str, so: str) -> int:
    """How many values are NaN, of which it is warned."""
    if lost := int(is_nan.sum()):
        said = f"bthooks.log_calibration: {lost} of {is_nan.numel()} {of} are NaN; {so}"
        warnings.warn(said, stacklevel=3)
    return lost


def _judged(writer: Writer, figures: Figures, step: int, prefix: str) -> _Judged | None:
    """What the attachment that has this writer says of the figures; None where there is none."""
    recorder = recorder_of(writer, prefix)
    if figures.loss is not None:
        losses_given(writer, tag(prefix, "loss"))
    if recorder is None or not is_written(writer):
        return None
    inside = within(recorder.prefix, prefix)
    place = prefix if inside is None else inside
    place, start = ("" if place == "train" else place), ("" if inside is None else recorder.prefix)
    expects = recorder.expects and figures.loss is not None
    verdict = recorder.alerts.judge(figures, step, place, expects)
    return _Judged(recorder, verdict, tag(start, place))


def _with(judged: _Judged | None, event: Event, prefix: str) -> Event:
    """`event` under `prefix`, and the verdict on it where that of an attachment's steps is."""
    found = prefixed(event, prefix)
    if judged is not None:
        verdict = prefixed(event_of(Figures(), judged.verdict), judged.prefix)
        found.scalars |= verdict.scalars
        found.texts |= verdict.texts
    return found


def _event(readings: Readings) -> Event:
    return event_of(figures_of({0: read(readings)}))


def _write(where: str, writer: Writer, event: Event, step: int, prefix: str) -> None:
    _put(writer, prefixed(event, prefix), checks.whole(where, "step", step))


def _put(writer: Writer, event: Event, step: int) -> None:
    if is_written(writer):
        write(writer, event, step)
