"""Dashboard: the charts of TensorBoard's custom scalars tab, in which a run is looked at first.

The layout is written once, with a run's first step: of what a run has not there is no chart.
"""

from collections.abc import Iterator

from ..measure.figures import Figures

Layout = dict[str, dict[str, list[object]]]

HEALTHY_ENTROPY = {"low": 0.5, "high": 2.0}  # nats, of a layer

_TRAINING = r"(?!(.*/)?val/)(.*/)?"  # whatever the prefix
_METRIC = r"(.*/)?(train|val|eval|test)/(?!health/)(.*[/_])?"


def layout(figures: Figures) -> Layout:
    """The charts for a run whose steps have such figures.

    >>> list(layout(Figures(learning_rates={"0": 0.1}))["Is this run healthy?"])
    ['loss', 'health: fraction of the layers, heads, ... in trouble', 'learning rate']
    """
    return {"Is this run healthy?": {t: ["Multiline", tags] for t, tags in _charts(figures)}}


def _charts(figures: Figures) -> Iterator[tuple[str, list[object]]]:
    """Each title with the regular expressions of its tags."""
    statistics = {name for found in figures.attention.values() for name in found}
    yield "loss", [f"{_METRIC}loss$"]
    yield "health: fraction of the layers, heads, ... in trouble", [f"{_TRAINING}health/[a-z_]+$"]
    if "entropy" in statistics:
        low, high = HEALTHY_ENTROPY.values()
        title = f"attention entropy by layer, nats (healthy: {low} to {high})"
        yield title, [f"{_TRAINING}attention/(healthy_)?entropy/"]
    if figures.total_norm is not None:
        title = "gradient norm, before clipping and as applied"
        yield title, [f"{_TRAINING}gradients/total_norm"]
    if figures.layers:
        yield "gradient norm by layer", [f"{_TRAINING}gradients/layer_mean/"]
    if figures.learning_rates:
        yield "learning rate", [f"{_TRAINING}learning_rate/"]
    if "max_logit" in statistics:
        yield "largest attention score by layer", [f"{_TRAINING}attention/max_logit/"]
    if figures.uncertainty:
        tags: list[object] = [f"{_TRAINING}uncertainty/[a-z]+$", f"{_METRIC}accuracy$"]
        yield "uncertainty, nats, and accuracy", tags
