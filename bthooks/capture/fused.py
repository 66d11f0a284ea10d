"""Fused: the attention inside one operator, from its arguments by the names of its schema. Pure.

In: the arguments by name, and for operators that are not torch's own the output too.
Out: the sums of the map `(heads, 15)`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..measure.attention import sums_of_query_key
from ..measure.scores import score_blocks

_QUERY, _KEY, _VALUE = ("query", "q"), ("key", "k"), ("value", "v")
_CAUSAL = ("is_causal", "causal")
_SCALE = ("scale", "softmax_scale", "sm_scale", "scaling")
_MASK = ("attn_mask", "attn_bias", "mask", "bias")
_CHECKED = 16  # rows whose output is compared


def takes_attention(arguments: Collection[str]) -> bool:
    """Whether an operator with arguments of these names takes query, key and value."""
    return all(any(name in arguments for name in names) for names in (_QUERY, _KEY, _VALUE))


def sums_of_sdpa(given: Mapping[str, Any], *, rows: int | None) -> Tensor:
    """The sums of one of torch's `aten::_scaled_dot_product_*`."""
    return sums_of_query_key(
        given["query"],
        given["key"],
        mask=_first(given, _MASK),
        is_causal=given.get("is_causal", False),
        scale=given.get("scale"),
        rows=rows,
    )


def sums_of_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    options: Any,
    score_buffers: tuple[Any, ...] = (),
    mask_buffers: tuple[Any, ...] = (),
    *,
    rows: int | None,
) -> Tensor:
    """The sums of `flex_attention`, from its arguments in their order."""
    mask_mod = block_mask[-1]
    return sums_of_query_key(
        query,
        key,
        scale=scale,
        score_mod=_for_each(lambda *where: score_mod(*where, *score_buffers), scores=True),
        mask_mod=_for_each(lambda *where: mask_mod(*where, *mask_buffers), scores=False),
        rows=rows,
    )


def _for_each(function: Callable[..., Tensor], *, scores: bool) -> Callable[..., Tensor]:
    """`function` of 0-d tensors for all of them at once, as FlexAttention calls it."""
    for place in (3, 2, 1, 0):  # key, row, head, batch
        where = tuple(0 if at == place else None for at in range(4))
        function = torch.vmap(function, in_dims=(0, *where) if scores else where)

    def mapped(*arguments: Tensor) -> Tensor:
        given, where = arguments[:-4], arguments[-4:]
        return function(*given, *(index.flatten() for index in where))

    return mapped


@torch.no_grad()
def sums_of_custom(given: Mapping[str, Any], output: Any, *, rows: int | None) -> Tensor | None:
    """The sums of an operator that is not torch's; None if its output is no such attention.

    Neither the layout of its arguments nor the alignment of its causal mask is in a schema. So
    each that fits the shapes is tried on some rows, and the one that yields the output is taken:
    arguments that nothing here knows are found out by it. The comparison is read by the host.
    """
    output = output[0] if isinstance(output, tuple | list) else output
    parts = [*(_first(given, names) for names in (_QUERY, _KEY, _VALUE)), output]
    if not all(isinstance(part, Tensor) for part in parts):
        return None
    tolerance = 5e-3 if output.dtype in (torch.float32, torch.float64) else 2e-2
    for q, k, v, o in _layouts(*parts):
        for arguments in _variants(given, q, k):
            off, size = o.new_zeros(2, dtype=torch.float32)
            for at, scores, _ in score_blocks(q, k, rows=_CHECKED, **arguments):
                weights = scores.softmax(-1).nan_to_num_()  # (B, H, r, S)
                heads = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
                expected = o.index_select(-2, at).float()
                off += (weights.float() @ heads.float() - expected).square().sum()
                size += expected.square().sum()
            if off < tolerance**2 * size:
                return sums_of_query_key(q, k, rows=rows, **arguments)
    return None


def _layouts(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Query, key, value and output as `(batch, heads, length, d)`, in every order that fits."""
    orders: dict[int, list[Callable[[Tensor], Tensor]]] = {
        3: [
            lambda x: x.transpose(0, 1)[None],  # (L, H, d), or all samples in a row
            lambda x: x[:, None],  # (B H, L, d)
            lambda x: x[None],  # (H, L, d)
        ],
        4: [lambda x: x.transpose(1, 2), lambda x: x],  # (B, L, H, d), (B, H, L, d)
    }
    if len({part.dim() for part in parts}) > 1:
        return
    for order in orders.get(parts[0].dim(), []):
        q, k, v, o = (order(part) for part in parts)
        (batch, heads, length, width), (_, key_heads, keys, _) = q.shape, k.shape
        fits = k.shape == (batch, key_heads, keys, width) and heads % key_heads == 0
        fits = fits and v.shape[:-1] == k.shape[:-1]
        if fits and o.shape == (batch, heads, length, v.shape[-1]):
            yield q, k, v, o


def _variants(given: Mapping[str, Any], q: Tensor, k: Tensor) -> Iterator[dict[str, Any]]:
    """The arguments of `score_blocks`, for each causality that is not ruled out."""
    sample_q, row, length_q = _places(q, _first(given, ("cu_seqlens_q", "cum_seq_q")))
    sample_k, column, length_k = _places(k, _first(given, ("cu_seqlens_k", "cum_seq_k")))
    left, right = (given.get(f"window_size_{side}") for side in ("left", "right"))
    slopes, softcap = given.get("alibi_slopes"), given.get("softcap")

    def variant(causal: bool, ends_meet: bool) -> dict[str, Any]:
        def ahead(at_q: Tensor, at_k: Tensor) -> Tensor:
            """How far a key stands behind its query's place: above 0 it is in the future."""
            shift = (length_k[at_k] - length_q[at_q]) if ends_meet else 0
            return column[at_k] - row[at_q] - shift

        def sees(b: Tensor, h: Tensor, at_q: Tensor, at_k: Tensor) -> Tensor:
            distance, seen = ahead(at_q, at_k), sample_q[at_q] == sample_k[at_k]
            if left is not None and left >= 0:
                seen &= distance >= -left
            if right is not None and right >= 0:
                seen &= distance <= right
            return seen & (distance <= 0) if causal else seen

        def change(score: Tensor, b: Tensor, h: Tensor, at_q: Tensor, at_k: Tensor) -> Tensor:
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            if slopes is not None:
                slope = slopes[h] if slopes.dim() == 1 else slopes[b, h]
                score = score - slope * ahead(at_q, at_k).abs()
            return score

        return {
            "mask": _first(given, _MASK),
            "scale": _first(given, _SCALE),
            "mask_mod": sees,
            "score_mod": change,
        }

    causal = _first(given, _CAUSAL)
    if not causal:
        yield variant(False, True)
    if causal is not False:
        yield variant(True, True)
        yield variant(True, False)


def _places(x: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: its sample, its place in it, and that sample's length; `(L,)` each.

    Args:
        starts: where the samples begin that stand in a row, and the end; None: there is one.
    """
    at = torch.arange(x.shape[-2], device=x.device)
    if starts is None:
        return torch.zeros_like(at), at, torch.full_like(at, len(at))
    sample = torch.bucketize(at, starts[1:-1], right=True)
    return sample, at - starts[sample], starts.diff()[sample]


def _first(given: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)
