"""attach: the one call. It checks its arguments and starts a `Handle`."""

import numbers
import operator
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .capture.wanted import KINDS, ON_REQUEST, Wanted
from .handle import Handle, attached_to
from .health.alerts import Alert, Alerts
from .health.conditions import Thresholds
from .names import Selector, globs, selector
from .record.backend import is_main_rank
from .record.recorder import Recorder
from .record.writers import Writer, check_backend, open_writer
from .report import Ledger
from .schedule import Cadence, Schedule
from .wiring import Wiring


def attach(
    model: nn.Module,
    writer: Writer | str | os.PathLike[str] | None,
    *,
    backend: str = "torch",
    capture: Sequence[str] | None = None,
    every: Cadence = 100,
    histograms_every: Cadence = 500,
    attention_rows: int | None = 128,
    include: Selector = None,
    prefix: str = "",
    step: int = 0,
    thresholds: Thresholds = Thresholds(),
    on_alert: Callable[[Alert], object] | None = None,
    on_error: Literal["warn", "raise"] = "warn",
) -> Handle:
    """Log what `model` does in training from now on; no further call is needed.

    Args:
        writer: an object with SummaryWriter's methods, which is never closed; or a path, where
            a writer of `backend` is opened that `detach()` closes; or None: nothing is written.
        capture: which kinds must be there; None is all of attention, gradients, learning_rate,
            uncertainty and histograms that are. On request only: activations, updates.
        every, histograms_every: every how many steps scalars and histograms are written, or a
            function of the step. The first step of a run always is.
        attention_rows: query rows per map that statistics are taken from, evenly spread; None
            is all of them.
        include: which module paths and parameter names: a glob, several, or a function.
        prefix: joined in front of every tag with "/".
        step: the number of the first step.
        thresholds: what counts as vanishing, exploding, collapsed and so on.
        on_alert: called with each `Alert`, which is also warned of, and in `Handle.alerts`. What it
            raises does not end the training: it is warned of.
        on_error: "warn" says once what could not be measured; "raise" is for tests.

    | tag | what |
    | --- | --- |
    | `attention/<statistic>/<module>` | as in `log_attention_stats` |
    | `attention/max_logit/<module>` | the largest scaled and masked score |
    | `attention/mean_entropy` | nats, mean over the layers |
    | `attention/head_entropy` | image, layers x heads, at the cadence of histograms |
    | `attention/healthy_entropy/low`, `attention/healthy_entropy/high` | 0.5 and 2 nats |
    | `gradients/norm/<parameter>` | L2 norm of the gradient that the optimizer applied |
    | `gradients/layer_mean/<module>`, `gradients/total_norm` | as in `log_gradients` |
    | `gradients/total_norm_before_clip` | the same at the end of backward(), the loss unscaled |
    | `gradients/skipped_steps` | optimizer steps that a `torch.amp.GradScaler` skipped so far |
    | `gradients/update_ratio/<parameter>` | change / size of the parameter, L2 ("updates") |
    | `learning_rate/<group>`, `learning_rate/<optimizer>/<group>` | the rate used for this step |
    | `uncertainty/<kind>`, `uncertainty/distribution/<kind>` | of what the model's output holds |
    | `parameters/<name>`, `gradients/distribution/<name>` | histograms |
    | `activations/<module>` | histograms ("activations") |
    | `health/nonfinite/<kind>/<name>` | values in a histogram that were not finite, unless none |
    | `health/<condition>` | fraction of the layers, heads, ... that are in it; see `Alert` |
    | `health/alerts` | text: what began to be wrong, where and by how much; what is over |
    | `val/...` | the same of the first forward in eval mode after a step |

    >>> model = nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with attach(model, writer) as handle:
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    ...     handle.step
    1

    The custom scalars tab is laid out with the charts that show whether the run is healthy.

    Raises:
        TypeError, ValueError: an argument is none of what is described here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model is a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("attach: a scripted model takes no hooks; attach to it unscripted")
    for name, cadence in (("every", every), ("histograms_every", histograms_every)):
        if not callable(cadence) and not _is_whole(cadence, 1):
            raise ValueError(
                f"attach: {name}={cadence!r}: expected a number of steps, 1 or more, or a "
                "function of the step; to leave a kind out, name the others in capture="
            )
    if attention_rows is not None and not _is_whole(attention_rows, 1):
        raise ValueError(
            f"attach: attention_rows={attention_rows!r}: expected 1 or more, or None for all"
        )
    if not _is_whole(step, 0):
        raise ValueError(f"attach: step={step!r}: expected a whole number from 0, below 2**62")
    if not isinstance(prefix, str):
        raise TypeError(f"attach: prefix is a str, got {prefix!r}")
    _check_thresholds(thresholds)
    if on_alert is not None and not callable(on_alert):
        raise TypeError(f"attach: on_alert is a function of an Alert, got {on_alert!r}")
    if on_error not in ("warn", "raise"):
        raise ValueError(f'attach: on_error={on_error!r}: expected "warn" or "raise"')
    check_backend(backend)
    target: Any = writer
    # The methods first: a mock has __fspath__ too.
    if writer is None or callable(getattr(writer, "add_scalar", None)):
        pass
    elif isinstance(writer, str | os.PathLike):
        target = Path(writer).absolute()
    else:
        raise TypeError(
            "attach: writer is an object with SummaryWriter's methods, a path or None, got "
            f"{type(writer).__name__}"
        )
    wanted = Wanted(
        KINDS if capture is None else _checked_kinds(capture),
        by_name=capture is not None,
        selected=selector(include),
        globs=globs(include),
        rows=attention_rows,
    )
    for former, its_model in attached_to(target, prefix):
        if its_model is model:
            warnings.warn(
                "bthooks.attach: this model was attached to this writer already: this attachment "
                f"replaces the former, which ends before step {former.step}",
                stacklevel=2,
            )
            former.detach()
        elif target is not None:
            warnings.warn(
                "bthooks.attach: another model is attached to this writer: their points mix in the "
                'same tags; give each a prefix="..." of its own',
                stacklevel=2,
            )
    ledger = Ledger(strict=on_error == "raise")
    schedule = Schedule(step, (every, histograms_every), ledger.failed)
    owns_writer = isinstance(target, Path) and is_main_rank()
    opened = open_writer(target, backend) if owns_writer else None
    recorder = Recorder(
        opened if isinstance(target, Path) else target,
        prefix,
        Alerts(thresholds, on_alert, ledger),
        ledger,
    )
    wiring = Wiring(model, wanted, schedule, recorder, ledger)
    return Handle(model, wiring, target, owns_writer=owns_writer)


def _is_whole(value: Any, least: int) -> bool:
    """Whether `value` is a whole number, numpy's too; True and False are none."""
    return (
        not isinstance(value, bool)
        and hasattr(value, "__index__")
        and least <= operator.index(value) < 1 << 62
    )


def _check_thresholds(thresholds: Any) -> None:
    if not isinstance(thresholds, Thresholds):
        raise TypeError(f"attach: thresholds is a bthooks.Thresholds(...), got {thresholds!r}")
    for name, value in thresholds._asdict().items():
        where = f"attach: thresholds has {name}={value!r}"
        if name == "checks":
            if not _is_whole(value, 1):
                raise ValueError(f"{where}: expected a whole number from 1")
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{where}: expected a number")
        elif name in ("vanishing", "collapsed", "entropy", "keys"):
            if not float(value) >= 0:
                raise ValueError(f"{where}: expected 0 or more")
        elif not float(value) > 0:
            raise ValueError(f"{where}: expected more than 0; math.inf switches the judgement off")


def _checked_kinds(capture: Any) -> tuple[str, ...]:
    known = (*KINDS, *ON_REQUEST)
    if isinstance(capture, str) or not isinstance(capture, Collection):
        raise TypeError(f"attach: capture is a sequence of names, got {capture!r}; known: {known}")
    for kind in capture:
        if kind not in known:
            raise ValueError(f"attach: capture has {kind!r}; known: {known}")
    return tuple(capture)
