"""Event: what is written at one step. Here, and only here, names become tags."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..health.alerts import Alert, Verdict
from ..health.dashboard import HEALTHY_ENTROPY, Layout, layout
from ..measure.figures import Figures
from ..measure.histograms import Histogram
from ..measure.readings import Drawn
from ..names import distinct, tag
from .images import heat_map

_DISTRIBUTION = {"gradients", "uncertainty"}  # groups whose plain tags are scalars


@dataclass
class Event:
    """What is written at one step, by tag. Everything is on the host."""

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)  # (height, width, 3), uint8
    texts: dict[str, str] = field(default_factory=dict)
    layout: Layout = field(default_factory=dict)  # of the charts, without tags

    def tagged(self) -> tuple[dict[str, Any], ...]:
        return self.scalars, self.histograms, self.images, self.texts


def prefixed(event: Event, prefix: str) -> Event:
    """`event` with `prefix` in front of every tag, in the characters that every backend keeps."""
    parts = []
    for part in event.tagged():
        tags = distinct(tag(prefix, name) for name in part)
        parts.append(dict(zip(tags, part.values(), strict=True)))
    return replace(Event(*parts), layout=event.layout)


def event_of(figures: Figures, verdict: Verdict | None = None) -> Event:
    """The tags of what one call or one step has measured, and of what is wrong with it."""
    scalars = dict(figures.metrics)
    for group, value in figures.learning_rates.items():
        scalars[f"learning_rate/{group}"] = value
    scalars |= _gradients(figures)
    for path, statistics in figures.attention.items():
        for name, value in statistics.items():
            if value or name != "dead_rows":  # a chart of zeros for every layer
                scalars[f"attention/{name}/{path}"] = value
    for kind, value in figures.uncertainty.items():
        scalars[f"uncertainty/{kind}"] = value
    for name, value in figures.calibration.items():
        if not math.isnan(value):
            scalars[f"calibration/{name}"] = value
    histograms = {_histogram_tag(drawn): found for drawn, found in figures.histograms.items()}
    for (group, name), found in figures.histograms.items():
        if nonfinite := float(found.summary[5]):
            scalars[f"health/nonfinite/{group}/{name}"] = nonfinite
    event = Event(scalars, histograms)
    if verdict is not None:
        for condition, share in verdict.shares.items():
            scalars[f"health/{condition}"] = share
        if told := [*verdict.begun, *verdict.cleared]:
            event.texts["health/alerts"] = "\n\n".join(map(_told, told))
    return event


def event_of_model(
    figures: Figures, verdict: Verdict, *, training: bool, charts: bool, collapsed: float | None
) -> Event:
    """The event of a step of an attachment, which is of all layers: with the figures over them.

    Args:
        training: or it is of a validation pass.
        charts: with the layout of the charts.
        collapsed: with the heat map of all heads, where those below so many nats are red.
    """
    event = event_of(figures, verdict)
    entropies = [found["entropy"] for found in figures.attention.values() if "entropy" in found]
    if entropies:
        event.scalars["attention/mean_entropy"] = sum(entropies) / len(entropies)
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


# A comment in Markdown, which TensorBoard leaves out: the fields for who reads the file.
_OPEN, _CLOSE = "<!-- bthooks ", " -->"


def _told(alert: Alert) -> str:
    fields = json.dumps(alert._asdict()).replace(">", "\\u003e")  # nothing that ends the comment
    return f"{alert}\n{_OPEN}{fields}{_CLOSE}"


def _gradients(figures: Figures) -> Mapping[str, float]:
    scalars = {f"gradients/norm/{name}": norm for name, norm in figures.norms.items()}
    for name, norm in figures.layers.items():
        scalars[f"gradients/layer_mean/{name}"] = norm
    for name, ratio in figures.update_ratios.items():
        scalars[f"gradients/update_ratio/{name}"] = ratio
    for name in ("total_norm", "total_norm_before_clip", "skipped_steps"):
        if (value := getattr(figures, name)) is not None:
            scalars[f"gradients/{name}"] = value
    return scalars


def _histogram_tag(drawn: Drawn) -> str:
    group, name = drawn
    return f"{group}/distribution/{name}" if group in _DISTRIBUTION else f"{group}/{name}"
