"""Scores: what a softmax over the keys is taken of, from query, key and the mask of a kernel. Pure.

A block of query rows at a time, so that memory never grows with L x S.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .dtypes import widened

BLOCKED = -9984.0  # a mask at or below it hides the key: it is -1e4 in bfloat16
BELOW_ALL = -1e7  # no score is as low, whatever it is made of
_GOLDEN = 2654435769  # 2 ** 32 / golden ratio
_BLOCK = {"cpu": 1 << 21}  # scores held at a time, over batch and heads: what a cache holds


def score_blocks(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    rows: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The scores of one block of query rows after the other.

    Args:
        query: `(batch, heads, L, d)`.
        key: `(batch, key heads, S, d)`; each key head serves heads / key heads query heads.
        mask: broadcasts to `(batch, heads, L, S)`; bool, True where a key is seen, or added.
        is_causal: row i sees the keys 0..i, whatever L and S.
        scale: 1/sqrt(d) unless given.
        score_mod: `(score, batch, head, row, key) -> score`, of tensors that broadcast.
        mask_mod: `(batch, head, row, key) -> bool`, True where a key is seen.
        rows: of these query rows, evenly spread; None takes all.

    Yields:
        the rows `(r,)`; their scores `(batch, heads, r, S)`, -inf where a key is not seen, without
        last keys that none of them sees; and how many keys each row sees, where that is known.
    """
    batch, heads, length, width = query.shape
    _, key_heads, keys, _ = key.shape
    dtype = widened(query.dtype)
    scale = width**-0.5 if scale is None else scale
    # (B, Hk, d, S); a view into (query, key, value) is twice as slow
    k = key.to(dtype).contiguous().transpose(-1, -2)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(*mask.shape[:-1], keys)
        if mask.shape[-2] > 1 and mask.stride(-2) == 0:  # one of the keys alone, expanded
            mask = mask[..., :1, :]
    for at, last in row_blocks(length, rows, batch * heads * keys, query.device):
        stop = min(keys, last + 1) if is_causal else keys
        q = take(query, at).to(dtype) * scale  # (B, H, r, d)
        q = q.reshape(batch, key_heads, -1, width)  # (B, Hk, H / Hk r, d)
        scores = (q @ k[..., :stop]).view(batch, heads, len(at), stop)  # (B, H, r, S)
        column = torch.arange(stop, device=query.device)
        visible: Tensor | None = column.new_full((), keys)
        if mask is not None:
            bias = _bias(mask, at, column, is_causal, dtype)
            visible = seen(bias)
            scores += bias
        elif is_causal:
            visible = (at + 1).clamp(max=keys)
            scores += torch.where(column > at[:, None], -torch.inf, 0.0)  # masked_fill_: 20x
        if score_mod is not None or mask_mod is not None:
            b, h = (torch.arange(n, device=query.device) for n in (batch, heads))
            where = b[:, None, None, None], h[:, None, None], at[:, None], column
            if score_mod is not None:  # what it returns may be smaller, or the user's own
                scores = score_mod(scores, *where).expand(scores.shape).clone()
            if mask_mod is not None:
                scores = torch.where(mask_mod(*where), scores, -torch.inf)
            visible = None
        yield at, scores, visible


def _bias(mask: Tensor, at: Tensor, column: Tensor, is_causal: bool, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of the rows `at`: -inf where a key is not seen."""
    part = mask[..., : len(column)]
    part = part if part.shape[-2] == 1 else take(part, at)
    hidden = ~part if part.dtype == torch.bool else part <= hiding_level(part).clamp(min=BELOW_ALL)
    if is_causal:
        hidden = hidden | (column > at[:, None])
    bias = torch.zeros_like(part, dtype=dtype) if part.dtype == torch.bool else part.to(dtype)
    return torch.where(hidden, -torch.inf, bias)


def hiding_level(mask: Tensor) -> Tensor:
    """The largest value in what is added to scores that hides a key, 0-d; -inf if none does.

    It is -1e4 or below, and what is above it is far above: else it is a bias that goes on, as that
    of ALiBi at long range does.
    """
    level = torch.where(mask <= BLOCKED, mask, -torch.inf).amax()
    goes_on = (mask > 0.95 * level) & (mask < 0.5 * level)
    return torch.where(goes_on.any(), -torch.inf, level).to(widened(mask.dtype))


def take(values: Tensor, at: Tensor) -> Tensor:
    """The rows `at` of `values`, which are in order and none twice."""
    return values if len(at) == values.shape[-2] else values.index_select(-2, at)


def row_blocks(
    length: int, rows: int | None, row_size: int, device: torch.device
) -> Iterator[tuple[Tensor, int]]:
    """The query rows that are measured, in blocks, each with an int that none of them exceeds.

    One is taken of each of `rows` equal parts, at a place that follows the golden ratio: with a
    fixed stride, packed samples of 16 rows would all be seen at their first, where entropy is 0.
    """
    taken = length if rows is None else min(rows, length)
    block = min(_BLOCK.get(device.type, 1 << 22), max(1 << 20, row_size * length // 16))
    many = max(1, block // max(1, row_size))
    for start in range(0, taken, many):
        stop = min(taken, start + many)
        part = torch.arange(start, stop, device=device)
        low, high = part * length // taken, (part + 1) * length // taken
        share = (part * _GOLDEN + (1 << 31)) % (1 << 32)
        yield low + (share * (high - low) >> 32), stop * length // taken - 1


def seen(scores: Tensor) -> Tensor:
    """How many keys, the last dimension, are not -inf; counted as floats, which is fastest."""
    return torch.ne(scores, -torch.inf, out=torch.empty_like(scores)).sum(-1)
