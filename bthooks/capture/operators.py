"""Operators: what they are to attention scores, by their names and tags.

By name and not by overload: `add` is `add_`, and under inference_mode `matmul` and `linear` come
whole, as many others do.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

# By name, the place of the first factor.
_PRODUCTS = {
    **{"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "matmul": 0, "linear": 0},
    **{"addmm": 1, "baddbmm": 1, "addbmm": 1},
    **{"_cdist_forward": 0, "_euclidean_dist": 0, "cdist": 0},
}
CONVOLUTIONS = {"convolution", "conv1d", "conv2d", "conv3d"}
SOFTMAX = {"_softmax", "_safe_softmax", "softmax"}
LOG_SOFTMAX = {"_log_softmax", "log_softmax"}
_VIEWS = {
    *("view", "t", "transpose", "permute", "unbind", "detach", "alias", "slice", "select", "split"),
    *("split_with_sizes", "chunk", "expand", "unsqueeze", "squeeze", "as_strided", "unfold"),
}
FILLING = {"normal_", "uniform_", "bernoulli_", "exponential_", "zero_", "fill_"}
# Beside what torch tags as pointwise. Views need no entry: marks are kept by storage.
_KEEPING = {
    *("masked_fill", "_to_copy", "to", "type_as", "copy", "contiguous", "_unsafe_view", "reshape"),
    *("flatten", "where", "multiply", "subtract", "divide", "tril", "triu", "dropout"),
    *("native_dropout", "bernoulli", "cat", "stack", "constant_pad_nd", "pad", "repeat", "roll"),
    *("flip", "repeat_interleave", "index", "index_select", "index_put", "gather", "scatter"),
    *("take_along_dim", "masked_scatter", "slice_scatter", "select_scatter"),
}


class Role(NamedTuple):
    """What an operator is called, whether it keeps scores what they are, whether it overwrites.

    Attributes:
        product: the place of the first factor, if it is a product.
        is_view: whether what it returns has the storage of what it was given.
    """

    name: str
    keeps: bool = False
    mutates: bool = False
    product: int | None = None
    is_view: bool = False


@functools.cache
def role(func: Any) -> Role:
    """The role of `func`; nameless where it is none of torch's own."""
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return Role("")
    name = func._schema.name.removeprefix("aten::")
    plain = name.rstrip("_")
    keeps = torch.Tag.pointwise in func.tags or plain in _KEEPING
    return Role(name, keeps, func._schema.is_mutable, _PRODUCTS.get(plain), name in _VIEWS)
