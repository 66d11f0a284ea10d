"""Attention: statistics from weights, or from query and key without the L x S matrix. Pure.

In: `weights (batch, heads, query, key)`, or `query`, `key` and the mask as the kernel saw them.
Between: `sums (heads, 15)`, float32 or better, which merge over rows, batches and calls.
Out: one value per statistic, per head or for the whole map.
"""

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .scores import BLOCKED, row_blocks, score_blocks, seen, take

STATISTICS = (
    "entropy",
    "entropy_normalized",
    "weight_mean",
    "weight_std",
    "weight_max",
    "max_logit",
    "sink",
    "dead_rows",
)

_FAR = -5e3  # a score that far below the largest of its row is one that was hidden
_ADDED = 13  # the sums that merge by adding; the last two are maxima


def attention_stats(weights: Tensor) -> dict[str, Tensor]:
    """Statistics of attention weights, each of shape `(heads,)`, float32 or better.

    Args:
        weights: `(batch, heads, query, key)`, before dropout. A key counts as visible where its
            weight is not 0; a row of zeros or NaN sees no key: it is left out, and counted in
            `dead_rows`.

    | name | what |
    | --- | --- |
    | `entropy` | nats, mean over batch and rows: -sum(w log w), 0 log 0 = 0 |
    | `entropy_normalized` | entropy / log(visible keys), over rows that see at least two |
    | `weight_mean`, `weight_std`, `weight_max` | of all weights |
    | `sink` | mean weight on key 0 |
    | `dead_rows` | fraction of rows that see no key |

    >>> stats = attention_stats(torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]))
    >>> stats["entropy"].shape, round(stats["entropy"].item(), 4)
    (torch.Size([1]), 0.3466)

    Raises:
        ValueError: the shape is another.
    """
    if weights.dim() != 4:
        raise ValueError(
            "attention_stats: weights have shape (batch, heads, query, key), got "
            f"{tuple(weights.shape)}; for weights averaged over heads use weights.unsqueeze(1)"
        )
    stats = finalize(sums_of_weights(weights))
    del stats["max_logit"]
    return stats


@torch.no_grad()
def sums_of_weights(weights: Tensor, rows: int | None = None) -> Tensor:
    """The sums of one map from its weights `(..., heads, query, key)`: `(heads, 15)`.

    `rows` as in `sums_of_query_key`.
    """
    weights = _with_heads(weights)
    row_size = weights[:, :, 0].numel()
    sums: list[Tensor] = []
    for at, _ in row_blocks(weights.shape[-2], rows, row_size, weights.device):
        w = take(weights, at)
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        alive = w.sum(-1) > 0  # (B, H, r); False for NaN too
        w = torch.where(alive[..., None], w, 0)
        block = _sums(
            visible=seen(torch.where(w > 0, 0, -torch.inf)),
            entropy=torch.special.entr(w).sum(-1),
            total=w.sum(-1),
            squares=w.square().sum(-1),
            largest=w.amax(-1),
            first=w[..., 0],
            beside=_beside(w, at),
            logit=torch.full_like(w[..., 0], -torch.inf),
            keys=w.shape[-1],
        )
        sums.append(block)
    return reduce(merge, sums)


@torch.no_grad()
def sums_of_query_key(
    query: Tensor, key: Tensor, *, rows: int | None = None, **arguments: Any
) -> Tensor:
    """The sums of one map as softmax(scale query key^T + mask) would give them: `(heads, 15)`.

    Args:
        rows: take this many query rows, evenly spread; None takes all.
        arguments: as for `scores.score_blocks`.

    Nested tensors, `(batch, heads, L_i, d)`, are as many maps of one sample, merged.
    """
    if query.is_nested:
        pairs = zip(query.unbind(), key.unbind(), strict=True)
        return reduce(
            merge,
            (sums_of_query_key(q[None], k[None], rows=rows, **arguments) for q, k in pairs),
        )
    blocks = score_blocks(query, key, rows=rows, **arguments)
    width = key.shape[-2]
    return reduce(
        merge, (_sums_of_block(scores, at, visible, width=width) for at, scores, visible in blocks)
    )


@torch.no_grad()
def sums_of_scores(scores: Tensor, *, keys: slice | None = None, rows: int | None = None) -> Tensor:
    """The sums of one map from the scores `(..., heads, L, S)` of its softmax: `(heads, 15)`.

    A key that is not seen has a score 5e3 or more below the largest of its row; a row sees none
    where all are -1e4 or below and equal, what was added to them having swallowed them.
    Columns outside `keys` are sinks: they take their share of the softmax and are no keys. `rows`
    as in `sums_of_query_key`.
    """
    if scores.is_nested:
        return reduce(
            merge, (sums_of_scores(sample[None], rows=rows) for sample in scores.unbind())
        )
    scores = _with_heads(scores)
    batch, heads, length, columns = scores.shape
    dtype = torch.promote_types(scores.dtype, torch.float32)
    sums: list[Tensor] = []
    for at, _ in row_blocks(length, rows, batch * heads * columns, scores.device):
        block = scores.index_select(-2, at).to(dtype)  # (B, H, r, S)
        sums.append(_sums_of_block(_without_dead(block), at, keys=keys))
    return reduce(merge, sums)


def _without_dead(scores: Tensor) -> Tensor:
    """The scores, -inf where a row sees no key; overwritten."""
    top, low = scores.amax(-1, keepdim=True), scores.amin(-1, keepdim=True)
    # float16's least, -65504, keeps 5e-4 of itself as differences; others are equal.
    swallowed = torch.where(top <= -6e4, 1e-3 * top.abs(), 0)
    dead = (top <= BLOCKED) & (top - low <= swallowed)
    return scores.masked_fill_(dead, -torch.inf)


def _with_heads(values: Tensor) -> Tensor:
    """As `(batch, heads, query, key)`; three dimensions or fewer are all batch."""
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
    """The sums of the scores `(batch, heads, rows, key)`, which are overwritten.

    Args:
        scores: -inf where a key is not seen.
        at: which rows of the map these are.
        visible: how many keys each row sees; counted if it is not known.
        keys: the columns that are keys, if not all are.
        width: the number of keys, if it is not that of these columns.
    """
    top = scores.amax(-1, keepdim=True)  # (B, H, r, 1)
    z = scores.sub_(top.clamp(min=torch.finfo(top.dtype).min))  # in a dead row too
    p = z.softmax(-1)
    largest = p.amax(-1)  # (B, H, r)
    log_norm = -largest.log()  # of the largest weight, which is exp(0) / norm
    logit, total = top[..., 0], torch.ones_like(largest)
    if keys is not None:
        z, p = z[..., keys], p[..., keys]
        logit, total, largest = logit + z.amax(-1), p.sum(-1), p.amax(-1)
    if visible is None:
        visible = seen(F.threshold(z, _FAR, -torch.inf))
    squares, first = torch.linalg.vector_norm(p, dim=-1).square(), p[..., 0]
    # log Z - E[z] with z = score - max: no cancellation of large scores, as lse - E[score] has.
    entropy = total * log_norm - z.clamp_(min=-1e4).mul_(p).sum(-1)
    return _sums(
        visible=visible,
        entropy=entropy.clamp_(min=0),
        total=total,
        squares=squares,
        largest=largest,
        first=first,
        beside=_beside(p, at),
        logit=logit,
        keys=width or z.shape[-1],
    )


def _beside(weights: Tensor, at: Tensor) -> Tensor:
    """The weights on the keys before and behind the rows `at`, at an end on the row's own."""
    near = torch.stack([at - 1, at + 1], dim=-1).clamp(0, weights.shape[-1] - 1)  # (r, 2)
    return weights.gather(-1, near.expand(*weights.shape[:-1], 2))


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The sums of two parts of one map; per head where both have the same heads."""
    if a.shape != b.shape:
        a, b = _over_known_heads(a), _over_known_heads(b)
    return torch.cat([a[:, :_ADDED] + b[:, :_ADDED], torch.maximum(a, b)[:, _ADDED:]], dim=1)


def finalize(sums: Tensor) -> dict[str, Tensor]:
    """The statistics of the sums `(heads, 15)`, each `(heads,)`; NaN where nothing was seen."""
    rows, entropy, pairs, normalized, count, total, squares, first, *_, dead, every, _ = sums.T[
        :_ADDED
    ]
    variance = (squares - total.square() / count) / (count - 1).clamp(min=1)
    nothing = torch.where(rows > 0, 0.0, torch.nan)
    values = (
        entropy / rows,
        normalized / pairs,
        total / count,
        variance.clamp(min=0).sqrt(),
        sums[:, _ADDED] + nothing,
        sums[:, _ADDED + 1] + nothing,
        first / rows,
        dead / every,
    )
    return dict(zip(STATISTICS, values, strict=True))


def whole(maps: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """The statistics of each map over all its heads, from its sums on the host.

    One that was not measured is left out: no row saw a key, no row two keys, no score known.
    """
    if not maps:
        return {}
    sums = torch.cat([_over_heads(found) for found in maps.values()])  # (maps, 15)
    values = torch.stack([*finalize(sums).values()], dim=1).tolist()
    found = {}
    for path, own, (rows, pairs, logit) in zip(
        maps, values, sums[:, [0, 2, -1]].tolist(), strict=True
    ):
        measured = dict.fromkeys(STATISTICS, rows > 0) | {"dead_rows": True}
        measured["entropy_normalized"] = pairs > 0
        measured["max_logit"] = rows > 0 and logit != -math.inf
        named = zip(STATISTICS, own, strict=True)
        found[path] = {name: value for name, value in named if measured[name]}
    return found


def of_heads(sums: Tensor) -> list[tuple[float, float, float]]:
    """Of each head, from the sums on the host: entropy in nats, the keys that a row sees, and the
    weight on the key before its own place, or behind it if that is more.

    The means over its rows; NaN where no row sees a key.
    """
    entropy, before, behind, keys = (sums[:, [1, 8, 9, _ADDED - 1]] / sums[:, :1]).unbind(1)
    return torch.stack([entropy, keys, torch.maximum(before, behind)], dim=1).tolist()


def without_doubt(sums: Tensor) -> Tensor:
    """The heads that were measured, from accumulators on the host; none if it was no attention.

    Of an operator in no table, `capture/fused.py` tries what its arguments may mean. On a device
    the heads of each meaning that proved wrong are NaN, and nothing else has NaN rows.
    """
    return sums[~sums[:, 0].isnan()]


def _over_heads(sums: Tensor) -> Tensor:
    return torch.cat(
        [sums[:, :_ADDED].sum(0, keepdim=True), sums[:, _ADDED:].amax(0, keepdim=True)], dim=1
    )


def _over_known_heads(sums: Tensor) -> Tensor:
    """As `_over_heads`, of the heads that `without_doubt` would keep; NaN if there are none."""
    known = ~sums[:, :1].isnan()
    nothing = sums.new_zeros(sums.shape[1])
    nothing[_ADDED:] = -torch.inf
    return torch.where(known.any(), _over_heads(torch.where(known, sums, nothing)), torch.nan)


def _sums(
    *,
    visible: Tensor,
    entropy: Tensor,
    total: Tensor,
    squares: Tensor,
    largest: Tensor,
    first: Tensor,
    beside: Tensor,
    logit: Tensor,
    keys: int,
) -> Tensor:
    """Over batch and rows.

    Args:
        visible: broadcasts to the others' `(batch, heads, rows)`; 0 in dead rows.
        beside: `(batch, heads, rows, 2)`.
    """
    visible = visible[(None,) * (3 - visible.dim())]
    alive, pairs = visible > 0, visible > 1
    share = torch.where(pairs, visible.clamp(min=2).log().reciprocal(), 0)
    added = torch.stack([entropy, entropy * share, total, squares, first, *beside.unbind(-1)])
    added = torch.where(alive, added, 0).sum((1, 3))  # (7, H)
    counts = torch.stack([alive, visible, pairs]).expand(3, *entropy.shape)
    counts = counts.sum((1, 3), dtype=added.dtype)  # (3, H)
    largest_, logit_ = torch.where(alive, torch.stack([largest, logit]), -torch.inf).amax((1, 3))
    every = torch.full_like(added[0], entropy[:, 0].numel())
    (rows, seen_, pairs_), (entropy_, normalized, *rest) = counts, added
    both = (rows, entropy_, pairs_, normalized, rows * keys, *rest, every - rows, every, seen_)
    return torch.stack([*both, largest_, logit_], dim=1)
