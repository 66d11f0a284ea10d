"""Event: what is written at one step. Here, and only here, names become tags."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..health.alerts import Alert, Verdict
from ..health.dashboard import HEALTHY_ENTROPY, Layout, layout
from ..measure.figures import Figures
from ..measure.histograms import Histogram
from ..names import distinct, tag
from .images import heat_map

# A comment in Markdown, which TensorBoard leaves out: the fields for who reads the file.
_OPEN, _CLOSE = "<!-- bthooks ", " -->"


@dataclass
class Event:
    """What is written at one step, by tag. Everything is on the host."""

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)  # (height, width, 3), uint8
    texts: dict[str, str] = field(default_factory=dict)
    layout: Layout = field(default_factory=dict)  # of the charts, without tags
    hparams: dict[str, str | float | bool] | None = None  # of which the scalars are the metrics

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def mapped(self, function: Callable[[dict[str, Any]], dict[str, Any]]) -> "Event":
        """The same with `function` of each dict that has tags."""
        return Event(
            function(self.scalars),
            function(self.histograms),
            function(self.images),
            function(self.texts),
            self.layout,
            self.hparams,
        )


def prefixed(event: Event, prefix: str) -> Event:
    """`event` with `prefix` in front of every tag, in the characters that every backend keeps."""

    def named(part: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(distinct(tag(prefix, name) for name in part), part.values(), strict=True))

    return event.mapped(named)


def event_of(figures: Figures, verdict: Verdict | None = None) -> Event:
    """The tags of what one call or one step has measured, and of what is wrong with it."""
    event = Event(dict(figures.metrics))
    totals = {
        "total_norm": figures.total_norm,
        "total_norm_before_clip": figures.total_norm_before_clip,
        "skipped_steps": figures.skipped_steps,
    }
    # A chart of dead rows would be one of zeros for nearly every layer.
    attention = {
        f"{name}/{path}": value
        for path, statistics in figures.attention.items()
        for name, value in statistics.items()
        if value or name not in ("dead_rows", "dead_samples")
    }
    for (group, name), found in figures.histograms.items():
        # The plain tags of these groups are scalars.
        start = f"{group}/distribution" if group in ("gradients", "uncertainty") else group
        event.histograms[f"{start}/{name}"] = found
    for group, values in (
        ("learning_rate", figures.learning_rates),
        ("learning_rate/effective", figures.effective_rates),
        ("gradients/norm", figures.norms),
        ("gradients/layer_mean", figures.layers),
        ("gradients/update_ratio", figures.update_ratios if figures.are_updates_asked else {}),
        ("gradients", {name: value for name, value in totals.items() if value is not None}),
        ("attention", attention),
        ("uncertainty", figures.uncertainty),
        ("calibration", {n: v for n, v in figures.calibration.items() if not math.isnan(v)}),
        ("health/nonfinite", {f"{of}/{name}": n for (of, name), n in figures.nonfinite.items()}),
        ("health", verdict.shares if verdict else {}),
    ):
        event.scalars |= {f"{group}/{name}": value for name, value in values.items()}
    if verdict is not None and (told := [*verdict.begun, *verdict.cleared]):
        event.texts["health/alerts"] = "\n\n".join(map(_told, told))
    return event


def event_of_model(
    figures: Figures, verdict: Verdict, *, training: bool, charts: bool, collapsed: float | None
) -> Event:
    """The event of a step of an attachment, which is of all layers: with the figures over them.

    With a heat map, in which heads below so many nats are red, where `collapsed` is given.
    """
    event = event_of(figures, verdict)
    entropies = [found["entropy"] for found in figures.attention.values() if "entropy" in found]
    if entropies:
        event.scalars["attention/mean_entropy"] = sum(entropies) / len(entropies)
    if training and figures.loss is not None:
        event.scalars["train/loss"] = figures.loss
    if entropies and training:
        for end, nats in HEALTHY_ENTROPY.items():
            event.scalars[f"attention/healthy_entropy/{end}"] = nats
    if collapsed is not None and figures.attention:
        heads = {path: [head.entropy for head in found] for path, found in figures.heads.items()}
        event.images["attention/head_entropy"] = heat_map(heads, collapsed)
    if charts:
        event.layout = layout(figures)
    return event


def alerts_in(text: str) -> list[Alert]:
    """The alerts that a text of `health/alerts` holds."""
    parts = text.split(_OPEN)[1:]
    return [Alert(**json.loads(part.partition(_CLOSE)[0])) for part in parts]


def _told(alert: Alert) -> str:
    fields = json.dumps(alert._asdict()).replace(">", "\\u003e")  # nothing that ends the comment
    return f"{alert}\n{_OPEN}{fields}{_CLOSE}"
