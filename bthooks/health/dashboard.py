"""Dashboard: the charts of TensorBoard's custom scalars tab, in which a run is looked at first.

In: the tags of a run's first step. Out: the layout that the backends' `custom_scalars` take.
"""

from collections.abc import Iterable

Layout = dict[str, dict[str, list[object]]]

_TRAINING = r"(?!(.*/)?val/)(.*/)?"  # whatever the prefix
_METRIC = r"(.*/)?(train|val|eval|test)/(.*[/_])?"
_LOW, _HIGH = 0.5, 2.0  # nats: the entropy of a healthy layer
_CHARTS = {  # title -> what a tag starts with for the chart to be there, what it shows
    "health: fraction of the layers, heads, ... in trouble": ("health/", "health/[a-z_]+$"),
    f"attention entropy by layer, nats (healthy: {_LOW} to {_HIGH})": (
        "attention/entropy/",
        "attention/(healthy_)?entropy/",
    ),
    "gradient norm, before clipping and as applied": (
        "gradients/total_norm",
        "gradients/total_norm",
    ),
    "gradient norm by layer": ("gradients/layer_mean/", "gradients/layer_mean/"),
    "learning rate": ("learning_rate/", "learning_rate/"),
    "largest attention score by layer": ("attention/max_logit/", "attention/max_logit/"),
    "uncertainty, nats, and accuracy": ("uncertainty/", "uncertainty/[a-z]+$"),
}


def layout(tags: Iterable[str]) -> Layout:
    """The charts for a run that writes `tags`; of what it has not there is none.

    >>> list(layout(["learning_rate/0"])["Is this run healthy?"])
    ['loss', 'learning rate']
    """
    tags = list(tags)
    charts: dict[str, list[object]] = {"loss": ["Multiline", [f"{_METRIC}loss$"]]}
    for title, (start, pattern) in _CHARTS.items():
        if any(tag.startswith(start) for tag in tags):
            shown = [_TRAINING + pattern]
            shown += [f"{_METRIC}accuracy$"] * title.endswith("accuracy")
            charts[title] = ["Multiline", shown]
    return {"Is this run healthy?": charts}


def healthy_band() -> dict[str, float]:
    """The scalars of the two lines between which the entropy of a layer is healthy."""
    return {"attention/healthy_entropy/low": _LOW, "attention/healthy_entropy/high": _HIGH}
