"""Fast path: the attention inside torch.nn's fused C++ layers, from their arguments. Pure.

In: the arguments of `aten::_native_multi_head_attention` or `aten::_transformer_encoder_layer_fwd`
by name. Out: the sums of the map, with query and key recomputed as the layer computes them.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..measure.attention import merge, sums_of_query_key

OPERATORS = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")


@torch.no_grad()
def sums_of_layer(given: Mapping[str, Any], *, rows: int | None = None) -> Tensor:
    """The sums `(heads, 15)`; `rows` as in `sums_of_query_key`."""
    query = given["src"] if "src" in given else given["query"]  # (B, L, D)
    key = given.get("key", query)
    if given.get("norm_first"):
        weight, bias = given["norm_weight_1"], given["norm_bias_1"]
        query = key = F.layer_norm(query, query.shape[-1:], weight, bias, given["eps"])
    mask = given.get("mask")
    if not query.is_nested:
        return _sums(query, key, _visible(mask, given.get("mask_type")), given, rows)
    # Padding in eval: what is left of each sample, (L_i, D), sees all that is left of it.
    samples = zip(query.unbind(), key.unbind(), strict=True)
    return reduce(merge, (_sums(q[None], k[None], None, given, rows) for q, k in samples if len(q)))


def _sums(
    query: Tensor, key: Tensor, mask: Tensor | None, given: Mapping[str, Any], rows: int | None
) -> Tensor:
    heads = given["num_heads"] if "num_heads" in given else given["num_head"]
    weights, biases = given["qkv_weight"].chunk(3), given["qkv_bias"].chunk(3)
    q, k = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, d)
        for x, w, b in zip((query, key), weights, biases, strict=False)
    )
    return sums_of_query_key(q, k, mask=mask, rows=rows)


def _visible(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """The mask as True where a key is seen: the kernels hide whatever is not zero."""
    if mask is None:
        return None
    visible = mask == 0
    return visible[:, None, None] if kind == 1 else visible  # 1: padding, (B, S)
