"""Fused: attention inside one operator, measured from what the operator was given. Pure.

The scores exist only inside the kernel, so they are computed again, some query rows at a time. The
tables say what the arguments mean. For an operator of no table each meaning that fits the shapes is
tried, and what the operator returned shows which is right: `_sums_of_unknown`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..measure.attention import merge, sums_of_query_key
from ..measure.scores import score_blocks
from .operators import ARGUMENTS, CHANGING, FLEX, HARMLESS, LAYER, UNKNOWN, Fused

_MEANING = {alias: name for name, aliases in ARGUMENTS.items() for alias in aliases}
_CHECKED = 16  # query rows whose output is compared
# What makes (batch, heads, length, features) of query, key, value and output, by their dimensions.
_LAYOUTS: Mapping[int, Mapping[str, Callable[[Tensor], Tensor]]] = {
    3: {
        "blhd": lambda x: x.transpose(0, 1)[None],  # (L, H, d), or all samples in a row
        "bld": lambda x: x[:, None],  # (B H, L, d)
        "bhld": lambda x: x[None],  # (H, L, d)
    },
    4: {"blhd": lambda x: x.transpose(1, 2), "bhld": lambda x: x},
}


@torch.no_grad()
def sums_of(
    fused: Fused, given: Mapping[str, Any], output: Any, *, rows: int | None
) -> Tensor | None:
    """The accumulators of the map of an operator, from its arguments and what it returned.

    None if it is no attention as far as its arguments are understood. On another device nothing is
    waited for: then they are of each meaning that the arguments may have, heads after heads, and
    NaN but for the one that is right (`measure.attention.without_doubt`).
    """
    if fused == LAYER:
        return _sums_of_layer(given, rows)
    if fused == FLEX:
        return _sums_of_flex(given, rows)
    arguments: dict[str, Any] = dict.fromkeys(ARGUMENTS)
    for name, value in given.items():
        if (meaning := _MEANING.get(name)) is not None:
            arguments[meaning] = value if arguments[meaning] is None else arguments[meaning]
        elif (isinstance(value, Tensor) and name not in HARMLESS) or (name in CHANGING and value):
            fused = UNKNOWN  # it changes the scores, and the tables don't say how
    if fused == UNKNOWN:
        return _sums_of_unknown(arguments, output, rows)
    query, key = (
        _LAYOUTS[arguments[name].dim()][fused.layout](arguments[name]) for name in ("query", "key")
    )
    mask_type = arguments["mask_type"]
    causal = arguments["causal"] if mask_type is None else mask_type > 0
    corner = "bottom right" if mask_type == 2 else fused.corner
    scoring = _scoring(arguments, query, key, corner if causal else None)
    return sums_of_query_key(query, key, rows=rows, **scoring)


def _scoring(
    arguments: Mapping[str, Any], query: Tensor, key: Tensor, corner: str | None
) -> dict[str, Any]:
    """What `score_blocks` is to do to query and key, causal from `corner` if that is given."""
    scoring = {"mask": arguments["mask"], "scale": arguments["scale"]}
    starts_q, starts_k, slopes, softcap = (
        arguments[name] for name in ("starts_q", "starts_k", "slopes", "softcap")
    )
    left, right, window = (arguments[name] for name in ("left", "right", "window"))
    if isinstance(window, int):
        left = window - 1
    elif isinstance(window, tuple | list) and len(window) == 2:
        left, right = window
    left, right = (None if side is None or side < 0 else side for side in (left, right))
    special = (starts_q, starts_k, slopes, softcap or None, left, right)
    is_plain = all(value is None for value in special)
    if is_plain and (corner != "bottom right" or query.shape[-2] == key.shape[-2]):
        return scoring | {"is_causal": corner is not None}
    sample_q, row, length_q = _places(query, starts_q)
    sample_k, column, length_k = _places(key, starts_k)

    def ahead(at_q: Tensor, at_k: Tensor) -> Tensor:
        """How far a key stands behind its query's place: above 0 it is in the future."""
        shift = 0 if corner == "top left" else length_k[at_k] - length_q[at_q]
        return column[at_k] - row[at_q] - shift

    def sees(b: Tensor, h: Tensor, at_q: Tensor, at_k: Tensor) -> Tensor:
        distance, seen = ahead(at_q, at_k), sample_q[at_q] == sample_k[at_k]
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        return seen if corner is None else seen & (distance <= 0)

    def change(score: Tensor, b: Tensor, h: Tensor, at_q: Tensor, at_k: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            slope = slopes[h] if slopes.dim() == 1 else slopes[b, h]
            score = score - slope * ahead(at_q, at_k).abs()
        return score

    return scoring | {"mask_mod": sees, "score_mod": change}


def _places(x: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: its sample, its place in it, and that sample's length; `(L,)` each.

    `starts`: where the samples begin that stand in a row, and the end; None: there is one.
    """
    at = torch.arange(x.shape[-2], device=x.device)
    if starts is None:
        return torch.zeros_like(at), at, torch.full_like(at, len(at))
    sample = torch.bucketize(at, starts[1:-1], right=True)
    return sample, at - starts[sample], starts.diff()[sample]


def _sums_of_unknown(arguments: Mapping[str, Any], output: Any, rows: int | None) -> Tensor | None:
    """As `sums_of`, of an operator of which no table says what its arguments mean.

    Neither the layout nor the corner of a causal mask is in a schema. So each that fits the shapes
    is tried on some rows, and the first that yields the output is taken.
    """
    output = output[0] if isinstance(output, tuple | list) and output else output
    parts = [arguments["query"], arguments["key"], arguments["value"], output]
    if not all(isinstance(part, Tensor) for part in parts):
        return None
    found: list[Tensor] = []
    free = torch.ones((), dtype=torch.bool, device=output.device)
    for query, key, value, expected in _layouts(*parts):
        for corner in _corners(arguments, query, key):
            scoring = _scoring(arguments, query, key, corner)
            fits = _yields(expected, query, key, value, scoring)
            if _is_readable(fits):
                if fits:
                    return sums_of_query_key(query, key, rows=rows, **scoring)
                continue
            sums = sums_of_query_key(query, key, rows=rows, **scoring)
            found.append(torch.where(fits & free, sums, torch.nan))
            free = free & ~fits
    return torch.cat(found, dim=1) if found else None


def _is_readable(tensor: Tensor) -> bool:
    """Whether its value is there without a wait for a device."""
    return tensor.device.type == "cpu"


def _corners(arguments: Mapping[str, Any], query: Tensor, key: Tensor) -> Iterator[str | None]:
    """Each causality that the arguments don't rule out; None is none."""
    causal = arguments["causal"]
    if not causal:
        yield None
    if causal is not False:
        yield "bottom right"
        if arguments["starts_q"] is not None or query.shape[-2] != key.shape[-2]:  # else the same
            yield "top left"


def _layouts(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Query, key, value and output as `(batch, heads, length, d)`, in every layout that fits."""
    if len({part.dim() for part in parts}) > 1:
        return
    for heads_first in _LAYOUTS.get(parts[0].dim(), {}).values():
        q, k, v, o = map(heads_first, parts)
        (batch, heads, length, width), (_, key_heads, keys, _) = q.shape, k.shape
        fits = k.shape == (batch, key_heads, keys, width) and heads % key_heads == 0
        fits = fits and v.shape[:-1] == k.shape[:-1]
        if fits and o.shape == (batch, heads, length, v.shape[-1]):
            yield q, k, v, o


def _yields(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, scoring: Mapping[str, Any]
) -> Tensor:
    """Whether some rows of `output` are softmax(scores) value: 0-d, on its device."""
    tolerance = 5e-3 if output.dtype in (torch.float32, torch.float64) else 2e-2
    off, size = output.new_zeros(2, dtype=torch.float32)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).float()
    for at, scores, _ in score_blocks(query, key, rows=_CHECKED, **scoring):
        weights = scores.softmax(-1).nan_to_num_().float()  # (B, H, r, S), or its first keys
        expected = output.index_select(-2, at).float()
        off += (weights @ value[..., : weights.shape[-1], :] - expected).square().sum()
        size += expected.square().sum()
    fits: Tensor = off < tolerance**2 * size
    return fits


def _sums_of_flex(given: Mapping[str, Any], rows: int | None) -> Tensor:
    score_mod = _for_each(given["score_mod"], given["score_buffers"], scores=True)
    mask_mod = _for_each(given["block_mask"][-1], given["mask_buffers"], scores=False)
    mods = {"score_mod": score_mod, "mask_mod": mask_mod}
    return sums_of_query_key(given["query"], given["key"], scale=given["scale"], rows=rows, **mods)


def _for_each(
    mod: Callable[..., Tensor], buffers: tuple[Any, ...], *, scores: bool
) -> Callable[..., Tensor]:
    """`mod` of 0-d tensors for all of them at once, as FlexAttention calls it."""

    def function(*arguments: Tensor) -> Tensor:
        return mod(*arguments, *buffers)

    for place in (3, 2, 1, 0):  # key, row, head, batch
        where = tuple(0 if at == place else None for at in range(4))
        function = torch.vmap(function, in_dims=(0, *where) if scores else where)

    def mapped(*arguments: Tensor) -> Tensor:
        given, where = arguments[:-4], arguments[-4:]
        return function(*given, *(index.flatten() for index in where))

    return mapped


def _sums_of_layer(given: Mapping[str, Any], rows: int | None) -> Tensor:
    """Of torch.nn's C++ fast paths, with query and key computed again as the layer does."""
    query = given["src"] if "src" in given else given["query"]  # (B, L, D)
    key = given.get("key", query)
    if given.get("norm_first"):
        weight, bias = given["norm_weight_1"], given["norm_bias_1"]
        query = key = F.layer_norm(query, query.shape[-1:], weight, bias, given["eps"])
    if query.is_nested:
        # Padding in eval: what is left of each sample, (L_i, D), sees all that is left of it.
        samples = zip(query.unbind(), key.unbind(), strict=True)
        layer = dict(given) | {"norm_first": False, "mask": None}
        each = (layer | {"src": q[None], "key": k[None]} for q, k in samples if len(q))
        return reduce(merge, (_sums_of_layer(sample, rows) for sample in each))
    mask = given.get("mask")
    visible = None if mask is None else mask == 0  # the kernels hide whatever is not zero
    if visible is not None and given.get("mask_type") == 1:  # padding, (B, S)
        visible = visible[:, None, None]
    heads = given["num_heads"] if "num_heads" in given else given["num_head"]
    weights, biases = given["qkv_weight"].chunk(3), given["qkv_bias"].chunk(3)
    q, k = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, d)
        for x, w, b in zip((query, key), weights, biases, strict=False)
    )
    return sums_of_query_key(q, k, mask=visible, rows=rows)
