"""Attention: statistics from weights, or from query and key without the L x S matrix. Pure.

In: `weights (batch, heads, query, key)`, or `query`, `key` and the mask as the kernel saw them.
Between: accumulators, which merge over query rows, batches and calls. They are one tensor per map,
`(columns, heads)`, so that a map costs one copy to the host or to another rank.
Out: one value per statistic, per head or for the whole map.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from .dtypes import widened
from .scores import BELOW_ALL, row_blocks, score_blocks, seen, take

_ROUNDED = 0.02  # so far from 1 is the sum of weights in bfloat16 at most
_FAR = -5e3  # a score that far below the largest of its row is one that was hidden


class Columns(NamedTuple):
    """The accumulators, `(heads,)` each; all but `dead` are of the query rows that see a key."""

    # Of these the largest is kept, -inf where none is known; those below add up.
    weight_max: Tensor
    logit_max: Tensor  # attention score
    rows: Tensor  # query rows
    keys: Tensor  # that a row sees
    branching: Tensor  # rows that see two keys or more
    entropy: Tensor  # nats
    normalized: Tensor  # spread / log(keys that the row sees), of branching rows
    cells: Tensor  # weights, hidden ones too
    weight: Tensor
    squares: Tensor  # of the weights
    first: Tensor  # weight on key 0
    before: Tensor  # weight on the key before the row's own place
    behind: Tensor  # weight on the key behind it
    dead: Tensor  # rows that see no key
    empty: Tensor  # of those the ones whose mask is the same for all rows


_ROWS = _MAXIMA = Columns._fields.index("rows")  # the first that adds up; how many do not


class Head(NamedTuple):
    """Means over the query rows of one head; NaN where no row sees a key."""

    entropy: float  # nats
    keys: float  # that a row sees
    neighbour: float  # weight on the key before the row's own place, or behind it if that is more
    sink: float  # weight on key 0
    logit: float  # the largest score, -inf where only the weights are known


def attention_stats(weights: Tensor) -> dict[str, Tensor]:
    """Statistics of attention weights, each of shape `(heads,)`, float32 or better.

    Args:
        weights: `(batch, heads, query, key)`, before dropout. A key counts as visible where its
            weight is not 0; a row of zeros or NaN sees no key: it is left out, and counted in
            `dead_rows`.

    | name | what |
    | --- | --- |
    | `entropy` | nats, mean over batch and rows: -sum(w log w), 0 log 0 = 0 |
    | `entropy_normalized` | entropy / log(visible keys) of rows that see two, made to sum to 1 |
    | `weight_mean`, `weight_std`, `weight_max` | of all weights |
    | `sink` | mean weight on key 0 |
    | `dead_rows` | fraction of rows that see no key |

    >>> stats = attention_stats(torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]))
    >>> stats["entropy"].shape, round(stats["entropy"].item(), 4)
    (torch.Size([1]), 0.3466)

    Raises:
        ValueError: the shape is another.
    """
    stats = finalize(sums_of_weights(checks.attention("attention_stats", weights)))
    del stats["max_logit"], stats["dead_samples"]
    return stats


@torch.no_grad()
def sums_of_weights(weights: Tensor, rows: int | None = None) -> Tensor:
    """The accumulators of one map from its weights `(..., heads, query, key)`."""
    weights = _with_heads(weights)
    row_size = weights[:, :, 0].numel()
    blocks: list[Tensor] = []
    for at, _ in row_blocks(weights.shape[-2], rows, row_size, weights.device):
        w = take(weights, at).to(widened(weights.dtype))
        w = torch.where(w.sum(-1, keepdim=True) > 0, w, 0)  # (B, H, r, S); 0 instead of NaN too
        entropy, weight = torch.special.entr(w).sum(-1), w.sum(-1)
        is_whole = (weight - 1).abs() < _ROUNDED
        block = _accumulators(
            w,
            at,
            visible=torch.gt(w, 0, out=torch.empty_like(w)).sum(-1),
            width=w.shape[-1],
            entropy=entropy,
            spread=torch.where(is_whole, entropy, entropy / weight + weight.log()),
            weight=weight,
            weight_max=w.amax(-1),
            logit_max=torch.full_like(w[..., 0], -torch.inf),
        )
        blocks.append(block)
    return reduce(merge, blocks)


@torch.no_grad()
def sums_of_query_key(
    query: Tensor, key: Tensor, *, rows: int | None = None, **arguments: Any
) -> Tensor:
    """The accumulators of one map, as softmax(scale query key^T + mask) would give them.

    Args:
        rows: take this many query rows, evenly spread; None takes all.
        arguments: as for `scores.score_blocks`.
    """
    if query.is_nested:
        pairs = zip(query.unbind(), key.unbind(), strict=True)
        samples = (sums_of_query_key(q[None], k[None], rows=rows, **arguments) for q, k in pairs)
        return reduce(merge, samples)
    width = key.shape[-2]
    blocks = score_blocks(query, key, rows=rows, **arguments)
    return reduce(merge, (_sums_of_block(z, at, visible, width=width) for at, z, visible in blocks))


@torch.no_grad()
def sums_of_scores(
    scores: Tensor,
    *,
    keys: slice | None = None,
    rows: int | None = None,
    level: Tensor | float = -torch.inf,
) -> Tensor:
    """The accumulators of one map from the scores `(..., heads, L, S)` of its softmax.

    A key counts as hidden where its score is 5e3 or more below the largest of its row; where it is
    -1e7 or below; and where half of `level` is above it, which is the largest value that a mask
    hid keys with. Columns outside `keys` are sinks: they take their share of the softmax and are no
    keys.
    """
    if scores.is_nested:
        samples = (sums_of_scores(one[None], rows=rows, level=level) for one in scores.unbind())
        return reduce(merge, samples)
    half = level / 2
    hidden = half.clamp(min=BELOW_ALL) if isinstance(half, Tensor) else max(half, BELOW_ALL)
    scores = _with_heads(scores)
    row_size = scores[:, :, 0].numel()
    blocks: list[Tensor] = []
    for at, _ in row_blocks(scores.shape[-2], rows, row_size, scores.device):
        block = scores.index_select(-2, at).to(widened(scores.dtype))  # (B, H, r, S)
        block = torch.where(block <= hidden, -torch.inf, block)
        blocks.append(_sums_of_block(block, at, keys=keys))
    return reduce(merge, blocks)


def _with_heads(values: Tensor) -> Tensor:
    """As `(batch, heads, query, key)`; of three dimensions or fewer as one head."""
    heads = values.shape[-3] if values.dim() > 3 else 1
    return values.reshape(-1, heads, *values.shape[-2:])


def _sums_of_block(
    scores: Tensor,
    at: Tensor,
    visible: Tensor | None = None,
    *,
    keys: slice | None = None,
    width: int | None = None,
) -> Tensor:
    """The accumulators of the scores `(batch, heads, rows, key)`, which are overwritten.

    They are -inf where a key is not seen; `keys` are the columns that are keys, if not all are.
    """
    top = scores.amax(-1, keepdim=True)  # (B, H, r, 1)
    z = scores.sub_(top.clamp(min=torch.finfo(top.dtype).min))  # in a dead row too
    p = z.softmax(-1)
    largest = p.amax(-1)  # (B, H, r)
    log_norm = -largest.log()  # of the largest weight, which is exp(0) / norm
    logit, weight = top[..., 0], torch.ones_like(largest)
    spread: Tensor | None = None
    if keys is not None:
        z, p = z[..., keys], p[..., keys]
        logit, weight, largest = logit + z.amax(-1), p.sum(-1), p.amax(-1)
        # Not from p: a sink may leave so little that it is 0.
        spread = torch.special.entr((z - z.amax(-1, keepdim=True)).softmax(-1)).sum(-1)
    if visible is None:
        visible = seen(F.threshold(z, _FAR, -torch.inf))
    # log Z - E[z] with z = score - max: no cancellation of large scores, as lse - E[score] has.
    entropy = (weight * log_norm - z.clamp_(min=-1e4).mul_(p).sum(-1)).clamp_(min=0)
    return _accumulators(
        p,
        at,
        visible=visible,
        width=width or p.shape[-1],
        entropy=entropy,
        spread=entropy if spread is None else spread,
        weight=weight,
        weight_max=largest,
        logit_max=logit,
    )


def _accumulators(
    weights: Tensor, at: Tensor, *, visible: Tensor, width: int, **of_rows: Tensor
) -> Tensor:
    """The accumulators of the weights `(batch, heads, rows, key)` of the rows `at`.

    They see `visible` of `width` keys, dead ones 0; `of_rows`: their entropy, weight, maxima, and
    `spread`: their entropy once their weights are made to sum to 1, as beside a sink they do not.
    """
    # A row at an end of the map has its own key for a neighbour.
    near = torch.stack([at - 1, at + 1], dim=-1).clamp(0, weights.shape[-1] - 1)  # (r, 2)
    before, behind = weights.gather(-1, near.expand(*weights.shape[:-1], 2)).unbind(-1)
    visible = visible[(None,) * (3 - visible.dim())]
    is_of_keys = visible.shape[-1] == 1 < len(at)
    alive, branching = visible > 0, visible > 1
    share = torch.where(branching, visible.clamp(min=2).log().reciprocal(), 0)
    of_rows |= {
        "normalized": (of_rows.pop("spread") * share).clamp(0, 1),  # float32 rounds
        "squares": torch.linalg.vector_norm(weights, dim=-1).square(),
        "first": weights[..., 0],
        "before": before,
        "behind": behind,
    }
    maxima = torch.stack([of_rows.pop("weight_max"), of_rows.pop("logit_max")])
    weight_max, logit_max = torch.where(alive, maxima, -torch.inf).amax((1, 3))  # (H,) each
    sums = torch.where(alive, torch.stack([*of_rows.values()]), 0).sum((1, 3))  # (columns, H)
    counts = torch.stack([alive, visible, branching]).expand(3, *before.shape)
    rows, keys, branching = counts.sum((1, 3), dtype=sums.dtype)
    dead = len(weights) * len(at) - rows
    columns = Columns(
        weight_max=weight_max,
        logit_max=logit_max,
        rows=rows,
        keys=keys,
        branching=branching,
        cells=rows * width,
        dead=dead,
        empty=dead if is_of_keys else torch.zeros_like(dead),
        **dict(zip(of_rows, sums, strict=True)),
    )
    return torch.stack(columns)


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The accumulators of two parts of one map; per head where both have the same heads."""
    if a.shape != b.shape:
        a, b = _over_heads(a), _over_heads(b)
    return torch.cat([torch.maximum(a[:_MAXIMA], b[:_MAXIMA]), a[_MAXIMA:] + b[_MAXIMA:]])


def _over_heads(a: Tensor) -> Tensor:
    """One column, of the heads that `without_doubt` would keep; NaN if there are none."""
    known = ~a[_ROWS].isnan()
    maxima, sums = torch.where(known, a[:_MAXIMA], -torch.inf), torch.where(known, a[_MAXIMA:], 0)
    over = torch.cat([maxima.amax(1, keepdim=True), sums.sum(1, keepdim=True)])
    return torch.where(known.any(), over, torch.nan)


def without_doubt(accumulators: Tensor) -> Tensor:
    """The heads that were measured, from accumulators on the host; none if it was no attention.

    On a device, the heads of each meaning that `capture/fused.py` tried and was wrong are NaN.
    """
    return accumulators[:, ~accumulators[_ROWS].isnan()]


def finalize(accumulators: Tensor) -> dict[str, Tensor]:
    """The statistics of a map, each `(heads,)`; no finite number where nothing was seen."""
    sums = Columns(*accumulators)
    variance = (sums.squares - sums.weight.square() / sums.cells) / (sums.cells - 1).clamp(min=1)
    return {
        "entropy": sums.entropy / sums.rows,
        "entropy_normalized": sums.normalized / sums.branching,
        "weight_mean": sums.weight / sums.cells,
        "weight_std": variance.clamp(min=0).sqrt(),
        "weight_max": torch.where(sums.rows > 0, sums.weight_max, torch.nan),
        "max_logit": sums.logit_max,
        "sink": sums.first / sums.rows,
        "dead_rows": sums.dead / (sums.rows + sums.dead),
        "dead_samples": sums.empty / (sums.rows + sums.dead),
    }


def whole(maps: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """The statistics of each map over all its heads, from its accumulators on the host.

    Those that were not measured are left out, as `max_logit` where only the weights are known.
    """
    if not maps:
        return {}
    accumulators = torch.cat([_over_heads(of_map) for of_map in maps.values()], dim=1)
    sums = Columns(*accumulators)  # (maps,) each
    is_seen = sums.rows > 0
    measured = {
        "dead_rows": torch.ones_like(is_seen),
        "dead_samples": sums.empty > 0,
        "entropy_normalized": sums.branching > 0,
        "max_logit": sums.logit_max != -torch.inf,
    }
    statistics = {name: values.tolist() for name, values in finalize(accumulators).items()}
    known = {name: measured.get(name, is_seen).tolist() for name in statistics}
    return {
        path: {name: values[at] for name, values in statistics.items() if known[name][at]}
        for at, path in enumerate(maps)
    }


def of_heads(maps: Mapping[str, Tensor]) -> dict[str, list[Head]]:
    """What each head of each map is judged by, from its accumulators on the host."""
    if not maps:
        return {}
    sums = Columns(*torch.cat([*maps.values()], dim=1))  # (heads of all,) each
    neighbour = torch.maximum(sums.before, sums.behind)
    means = torch.stack([sums.entropy, sums.keys, neighbour, sums.first]) / sums.rows
    heads = iter(torch.cat([means, sums.logit_max[None]]).T.tolist())
    return {path: [Head(*next(heads)) for _ in range(of.shape[1])] for path, of in maps.items()}
