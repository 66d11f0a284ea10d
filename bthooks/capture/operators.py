"""Operators: every operator name that we know, in tables, as `torch.utils.flop_counter` has them.

A library's kernel that is no operator of torch can't be seen at all: Transformer Engine's own
(pybind) and what is launched from Triton; where Transformer Engine calls flash-attn, that is seen.
By name and not by overload: `add` is `add_`, and under inference_mode `matmul` and `linear` come
whole, as many others do.
"""

import functools
from typing import Any, NamedTuple

import torch

from ..torch_private import schema


class Fused(NamedTuple):
    """How the arguments of an operator that computes attention as a whole are read.

    The layout "bhld" is (batch, heads, length, features); "blhd" is (batch, length, heads,
    features) or (rows of all samples, heads, features). "flex" and "layer" have functions of their
    own; "unknown" is found out from what was returned.
    """

    layout: str  # of query, key and value
    corner: str = "top left"  # of causality: row i sees the keys 0..i; "bottom right": the last all


FLEX, LAYER, SDPA, UNKNOWN = Fused("flex"), Fused("layer"), Fused("bhld"), Fused("unknown")
_FLASH, _EFFICIENT = Fused("blhd", "bottom right"), Fused("blhd")

_SDPA = "aten::_scaled_dot_product_"  # and the name of a kernel: those to come, too
# Operators that compute attention as a whole: `fused.py` reads their arguments.
FUSED = {
    # torch.nn.MultiheadAttention and TransformerEncoderLayer in eval(): their C++ fast paths
    "aten::_native_multi_head_attention": LAYER,
    "aten::_transformer_encoder_layer_fwd": LAYER,
    # torch/nested/_internal/sdpa.py, for nested tensors; xFormers calls them too
    "aten::_flash_attention_forward": _FLASH,
    "aten::_flash_attention_forward_no_dropout_inplace": _FLASH,
    "aten::_efficient_attention_forward": _EFFICIENT,  # its mask_type says which corner
    "aten::_cudnn_attention_forward": UNKNOWN,
    # torch/nn/attention/varlen.py
    "torch_attn::_varlen_attn": _FLASH,
    "torch_attn::_varlen_attn_out": _FLASH,
    # Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py since 2.7.1
    "flash_attn::_flash_attn_forward": _FLASH,
    "flash_attn::_flash_attn_varlen_forward": _FLASH,
    # the same: hopper/flash_attn_interface.py, hopper/flash_api.cpp
    "flash_attn_3::_flash_attn_forward": _FLASH,
    "flash_attn_3::fwd": _FLASH,
    # facebookresearch/xformers: xformers/ops/fmha/flash.py, which refuses a mask from the top left
    # where that would differ, and flash3.py; xformers/csrc/attention/attention.cpp before 0.0.30
    "xformers_flash::flash_fwd": _FLASH,
    "xformers_flash3::flash_fwd": _FLASH,
    "xformers::efficient_attention_forward_cutlass": _EFFICIENT,
    # thu-ml/SageAttention, sageattention/sm80_compile.py, sm89 and sm90, is in no table: query and
    # key are int8, with scales for blocks of rows that differ by kernel. It is said, not measured.
}

# What the arguments of such operators are called.
ARGUMENTS = {
    "query": ("query", "q", "q_int8"),
    "key": ("key", "k", "k_int8"),
    "value": ("value", "v"),
    "mask": ("attn_mask", "attn_bias", "mask", "bias"),
    "scale": ("scale", "softmax_scale", "sm_scale", "scaling"),
    "causal": ("is_causal", "causal"),
    "mask_type": ("custom_mask_type",),  # 1: causal from the top left, 2: from the bottom right
    "left": ("window_size_left", "window_left"),  # keys seen before the row's own place; -1: all
    "right": ("window_size_right", "window_right"),
    "window": ("window_size",),  # both of them, or how many keys up to the row's own place
    "starts_q": ("cu_seqlens_q", "cum_seq_q", "cu_seq_q", "seqstart_q"),  # samples one by one
    "starts_k": ("cu_seqlens_k", "cum_seq_k", "cu_seq_k", "seqstart_k"),
    "slopes": ("alibi_slopes",),
    "softcap": ("softcap",),
}
_FLEX = (
    *("query", "key", "value", "score_mod", "block_mask", "scale", "options"),
    *("score_buffers", "mask_buffers"),
)
_TOLD_BY = ("query", "key", "value")  # an operator in no table that has these may be attention
# Where another tensor is given than these and those above, the scores are made of more than we read
# (pages of a cache, lengths, rotations, scales of float8): what the operator returned has to show.
HARMLESS = {"out", "out_", "output", "dropout_mask", "scheduler_metadata", "rng_state"}
CHANGING = {"attention_chunk"}  # and these, though they are no tensors

# Under inference_mode these arrive whole, and with them the attention that they are made of.
_DECOMPOSED = {
    *("scaled_dot_product_attention", "_scaled_dot_product_attention_math"),
    *("einsum", "tensordot"),
}

# What is a part of an explicit attention, which `softmax.py` follows: by name, the part.
_PARTS = {
    **dict.fromkeys(("convolution", "conv1d", "conv2d", "conv3d"), "convolution"),
    **dict.fromkeys(("_softmax", "_safe_softmax", "softmax"), "softmax"),
    **dict.fromkeys(("_log_softmax", "log_softmax"), "log_softmax"),
    **dict.fromkeys(("exp", "exp_"), "exp"),
    **{"sum": "sum", "logsumexp": "logsumexp", "copy_": "copy", "cat": "cat", "mul": "mul"},
    **dict.fromkeys(("normal_", "uniform_", "bernoulli_", "exponential_"), "fill"),
    **dict.fromkeys(("zero_", "fill_"), "fill"),
}
# Products, with the place of the first factor.
_PRODUCTS = {
    **{"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "matmul": 0, "linear": 0},
    **{"addmm": 1, "baddbmm": 1, "addbmm": 1},
    **{"_cdist_forward": 0, "_euclidean_dist": 0, "cdist": 0},
}
_VIEWS = {
    *("view", "t", "transpose", "permute", "unbind", "detach", "alias", "slice", "select", "split"),
    *("split_with_sizes", "chunk", "expand", "unsqueeze", "squeeze", "as_strided", "unfold"),
}
# Beside what torch tags as pointwise. Views need no entry: marks are kept by storage.
_KEEPING = {
    *("masked_fill", "_to_copy", "to", "type_as", "copy", "contiguous", "_unsafe_view", "reshape"),
    *("flatten", "where", "multiply", "subtract", "divide", "tril", "triu", "dropout"),
    *("native_dropout", "bernoulli", "cat", "stack", "constant_pad_nd", "pad", "repeat", "roll"),
    *("flip", "repeat_interleave", "index", "index_select", "index_put", "gather", "scatter"),
    *("take_along_dim", "masked_scatter", "slice_scatter", "select_scatter"),
}


# Higher-order operators that return something before what the operator that they run returns:
# activation checkpointing and effects in compiled code.
_BEFORE = {"run_and_save_rng_state": 1, "with_effects": 1}
# How an operator may hide keys in the scores that it is given, or changes what hid them.
_MASKING = {
    **dict.fromkeys(("add", "baddbmm", "addmm", "addbmm"), "added"),
    **dict.fromkeys(("sub", "subtract"), "taken"),
    **dict.fromkeys(("mul", "multiply"), "times"),
    **dict.fromkeys(("div", "divide"), "over"),
    **dict.fromkeys(("where", "masked_fill", "index_put", "fill", "copy", "masked_scatter"), "put"),
    **dict.fromkeys(("maximum", "minimum", "max", "min", "clamp", "clamp_min", "clamp_max"), "put"),
}


class Role(NamedTuple):
    """What an operator is to attention."""

    fused: Fused | None = None  # how it is read, if it computes attention as a whole
    defaults: dict[str, Any] = {}  # noqa: RUF012  # then its arguments in order; never written to
    part: str = ""  # of an explicit attention: "product", "softmax", ...
    product: int = 0  # the place of the first factor, if it is a product
    keeps: bool = False  # whether what it makes of scores are scores
    masking: str = ""  # how it may hide keys in them: "added", "put", ...
    mutates: bool = False  # whether it overwrites an argument
    is_view: bool = False  # whether what it returns has the storage of what it was given
    decomposes: bool = False  # whether the mode is to see what it is made of instead
    chooses: bool = False  # whether it calls mm or bmm by what it is run in
    carries: bool = False  # whether it is a higher-order one, which may be given another to run


@functools.cache
def role(func: Any) -> Role:
    """The role of `func`, as a dispatch mode is given it."""
    if func is torch.ops.higher_order.flex_attention:
        return Role(FLEX, dict.fromkeys(_FLEX, ()))
    signature = schema(func)
    if signature is None:
        return Role(carries=True)
    namespace, _, name = signature.name.partition("::")
    plain, is_aten = name.rstrip("_"), namespace == "aten"
    is_default = is_aten and not signature.overload_name
    if is_default and name in _DECOMPOSED:
        return Role(decomposes=True)
    defaults = {argument.name: argument.default_value for argument in signature.arguments}
    fused = FUSED.get(signature.name)
    if fused is None and "backward" not in name:
        if signature.name.startswith(_SDPA):
            fused = SDPA
        elif not is_aten and all(defaults.keys() & ARGUMENTS[part] for part in _TOLD_BY):
            fused = UNKNOWN
    if not is_aten or fused is not None:
        return Role(fused, defaults)
    return Role(
        part="product" if plain in _PRODUCTS else _PARTS.get(name, ""),
        product=_PRODUCTS.get(plain, 0),
        keeps=torch.Tag.pointwise in func.tags or plain in _KEEPING,
        masking=_MASKING.get(plain, ""),
        mutates=signature.is_mutable,
        is_view=name in _VIEWS,
        chooses=is_default and name in ("linear", "matmul"),
    )


def carried(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """The operator that a higher-order one was given to run, with its own arguments and output.

    Itself, if it was given none.
    """
    at = next((at for at, arg in enumerate(args) if schema(arg) is not None), None)
    if at is None:
        return func, args, kwargs, output
    before = _BEFORE.get(func.name())
    if before is not None:
        output = output[before] if len(output) == before + 1 else output[before:]
    return args[at], args[at + 1 :], kwargs, output
