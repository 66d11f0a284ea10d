"""attach: the one call. It checks its arguments and starts a `Handle`."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from . import checks
from .capture.wanted import KINDS, ON_REQUEST, Wanted
from .handle import Handle, attached_to, be_first_at_exit
from .health.alerts import Alert, Alerts
from .health.thresholds import Thresholds
from .job import rank, size
from .names import Selector, globs, selector
from .record.backend import PACKAGES
from .record.folders import Folder, Output, refuse_folder
from .record.recorder import Recorder, folder_of
from .record.writers import Writer, open_writer
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
        writer: an object with SummaryWriter's methods, which is never closed; or a path or a URL
            (as `make_writer` takes), where a writer of `backend` is opened at the first write that
            `detach()` closes; or None: nothing is written. Attachments of one process to one path
            share its writer, which is of the first one's `backend`.
        capture: which kinds must be there; None is all of attention, gradients, learning_rate,
            uncertainty and histograms that are. On request only: activations, updates.
        every, histograms_every: every how many steps scalars and histograms are written, or a
            function of the step. The first step of a run always is.
        attention_rows: query rows per map that statistics are taken from, evenly spread; None
            is all of them.
        include: which module paths and parameter names: a glob, several, or a function.
        prefix: joined in front of every tag with "/".
        step: the number of the first step. What is in the folder already stays; to go on before
            its end, use `Handle.load_state_dict`.
        thresholds: what counts as vanishing, exploding, collapsed and so on.
        on_alert: called with each `Alert`, which is also warned of, and in `Handle.alerts`. What it
            raises does not end the training: it is warned of.
        on_error: "warn" says once what could not be measured; "raise" is for tests.

    | tag | what |
    | --- | --- |
    | `attention/<statistic>/<module>` | as in `log_attention_stats`; a learnt sink is no key |
    | `attention/max_logit/<module>` | a softmax's largest score, 0 if rows are shifted to it |
    | `attention/mean_entropy` | nats, mean over the layers |
    | `attention/head_entropy` | image, layers x heads, at the cadence of histograms |
    | `attention/healthy_entropy/low`, `attention/healthy_entropy/high` | 0.5 and 2 nats |
    | `gradients/norm/<parameter>` | L2 norm of the gradient that the optimizer was given |
    | `gradients/layer_mean/<module>`, `gradients/total_norm` | as in `log_gradients` |
    | `gradients/total_norm_before_clip` | the same at the end of backward(), the loss unscaled |
    | `gradients/skipped_steps` | optimizer steps that a `torch.amp.GradScaler` skipped so far |
    | `gradients/update_ratio/<parameter>` | change / size of the parameter, L2 ("updates") |
    | `learning_rate/<group>`, `learning_rate/<optimizer>/<group>` | the rate used for this step |
    | `learning_rate/effective/<group>` | `d * lr`, where the optimizer estimates a `d` |
    | `train/loss` | the scalar `loss` in the model's output, unless `log_metrics` writes it |
    | `uncertainty/<kind>`, `uncertainty/distribution/<kind>` | of what the model's output holds |
    | `parameters/<name>`, `gradients/distribution/<name>` | histograms |
    | `activations/<module>` | histograms ("activations") |
    | `health/nonfinite/<kind>/<name>` | values in a histogram that were not finite, unless none |
    | `health/<condition>` | fraction of the layers, heads, ... that are in it; see `Alert` |
    | `health/alerts` | text: what began to be wrong, where and by how much; what is over |
    | `val/...` | the same of a validation pass, at the number of the step just done |

    The gradient is read immediately before the update: accumulated, reduced, unscaled, clipped;
    with a closure after its last return; of an optimizer that steps others, what those were given.
    Optimizers that step within one backward pass are one step, and write one rate for each value.
    A validation pass is all forwards in eval mode between two steps: its uncertainty is the mean
    over them, the rest of the first one. Before any step it is at the first step's number, if the
    model is attached in training mode; else these forwards are inference, a step each. Forwards
    without grad in training mode belong to no step.

    In a job of `torch.distributed` each rank attaches, in the same order, and what is written is of
    all: attention and uncertainty are merged, norms and histograms those of whole parameters. What
    of one name is not the same tensor everywhere, or differs (a learning rate), has a series each:
    `<tag>/rank<k>`. Which ranks and steps are missing is warned of; what would be partial is left
    out. No rank waits for another, but rank 0 at its `detach()`, for 10 seconds at most.

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
        ImportError, OSError: the path can't be written to, or its URL needs a missing package.
    """
    checks.model("attach", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("attach: a scripted model takes no hooks; attach to it unscripted")
    target = checks.target("attach", writer)
    checks.one_of("attach", "backend", backend, PACKAGES)
    kinds = KINDS if capture is None else checks.kinds("attach", capture, (*KINDS, *ON_REQUEST))
    checks.cadence("attach", "every", every)
    checks.cadence("attach", "histograms_every", histograms_every)
    if attention_rows is not None:
        checks.whole("attach", "attention_rows", attention_rows, 1, "1 or more, or None for all")
    checks.include("attach", include)
    checks.instance("attach: prefix is a str", prefix, str)
    step = checks.whole("attach", "step", step, 0, "a whole number from 0, below 2**62")
    checks.thresholds("attach", thresholds, Thresholds)
    checks.instance("attach: on_alert is a function of an Alert", on_alert, Callable | None)
    checks.one_of("attach", "on_error", on_error, ("warn", "raise"))
    wanted = Wanted(kinds, capture is not None, selector(include), globs(include), attention_rows)
    is_folder = isinstance(target, Path | str)
    if is_folder and rank() == 0:
        refuse_folder("attach", target, backend)
    replaced = []
    for former, its_model in attached_to(target, prefix):
        if target is None and size() > 1:
            continue  # on the rank that writes they may have a writer each
        if its_model is model:
            warnings.warn(
                "bthooks.attach: this model was attached to this writer already: this attachment "
                f"replaces the former, which ends before step {former.step}",
                stacklevel=2,
            )
            replaced.append(former)
        elif target is not None:
            warnings.warn(
                "bthooks.attach: another model is attached to this writer: their points mix in the "
                'same tags; give each a prefix="..." of its own',
                stacklevel=2,
            )
    ledger = Ledger(strict=on_error == "raise")
    schedule = Schedule(step, (every, histograms_every), ledger.failed, model.training)
    output = Output(target)
    if is_folder:

        def opened() -> Any:
            found = open_writer(target, backend)
            be_first_at_exit()
            return found

        output = folder_of(target) or Folder(target, opened)
    recorder = Recorder(output, prefix, Alerts(thresholds, on_alert, ledger), ledger)
    for former in replaced:
        former.detach()
    recorder.ranks.look(step)
    return Handle(model, Wiring(model, wanted, schedule, recorder, ledger), target)
