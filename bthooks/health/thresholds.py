"""Thresholds: what is still healthy. The README's table says which condition each belongs to."""

from typing import NamedTuple


class Thresholds(NamedTuple):
    """What is still healthy; `attach(..., thresholds=Thresholds(exploding=50.0))`.

    A condition is over again at half of its threshold (or twice, where less is worse), or once it
    has been short of it for ten times as many checks. A threshold that can't be passed switches
    the judgement off: 0 for `vanishing`, `updates`, `collapsed`, `entropy` and `decay`, `math.inf`
    for the others.

    Attributes:
        checks: how many logged steps in a row a condition must hold to begin, or not to be over.
        vanishing: mean gradient norm of a layer, as a fraction of the largest layer's; 0 counts
            where it lasts for ten checks.
        updates: with it, the layer's update / size, as a fraction of that of the layer with the
            largest gradient: what is small and still moves its weights, as under Adam, is healthy.
        exploding: L2 norm of all gradients before clipping. It depends on the unit of the loss, so
            what is above it is in the condition only with one of: `growth`; an update as large as
            the weights, or 30 times the norm of the start, with a loss that does not fall; a loss
            that has blown up; a thousand times the loss, or the next layer's norm. A value of
            your own is taken at its word.
        growth: that norm over the least of the run's first three checks; ten times as much where
            the loss falls.
        decades: log10 of a layer's norm over its own running mean (and beyond 3 deviations, and
            above the largest layer's at the start).
        collapsed: standard deviation of the layers' norms before clipping, as a fraction of their
            mean.
        entropy: nats of one attention head.
        keys: a head whose queries see as many keys or fewer, on average, is not judged.
        logit: the largest attention score: a head of low entropy is collapsed if it is above this,
            and a layer's scores are too large if they are, and twice those of the first step.
        dead_rows: fraction of the queries that see no key. Padded ones do not, if they are masked.
        dead_samples: the same under a mask that is one for all queries of a sample, where no other
            sample sees its first key: an inverted mask of the padding.
        loss: how many robust deviations above its median of the last 128 values.
        jump: the learning rate over the largest so far, once it has stopped rising.
        decay: the learning rate as a fraction of the largest so far, for a twentieth of the run.
        warmup: steps for which the learning rate may rise from the first one on.
        calibration: expected calibration error, of what `log_calibration` is given, over what
            chance alone makes of so few; under-confidence counts once neither the accuracy nor the
            likelihood gets better.
    """

    checks: int = 2
    vanishing: float = 1e-5
    updates: float = 0.02
    exploding: float = 10.0
    growth: float = 100.0
    decades: float = 1.0
    collapsed: float = 0.01
    entropy: float = 0.1
    keys: float = 4.0
    logit: float = 100.0
    dead_rows: float = 0.9
    dead_samples: float = 0.05
    loss: float = 10.0
    jump: float = 10.0
    decay: float = 1e-6
    warmup: int = 10_000
    calibration: float = 0.1
