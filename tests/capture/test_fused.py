"""Operators that are not torch's own: those of the tables, and those that nobody knows."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bthooks import attach
from bthooks.capture import fused
from bthooks.capture.operators import FUSED, UNKNOWN, role
from bthooks.measure.attention import merge, whole, without_doubt

from ..conftest import read
from ..models import entropy


def probabilities(
    q, k, *, causal=False, shift=None, scale=None, left=-1, right=-1, softcap=0.0, slopes=None
) -> Tensor:
    """What `(heads, length, d)` attend to in float64, as flash_attn documents its arguments."""
    q, k = q.double(), k.double().repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    shift = k.shape[1] - q.shape[1] if shift is None else shift
    distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - shift
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    hidden = (distance > 0) & causal
    hidden |= (distance < -left) & (left >= 0)
    hidden |= (distance > right) & (right >= 0)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()


def attend(q, k, v, **arguments):
    v = v.double().repeat_interleave(len(q) // len(v), 0)
    return (probabilities(q, k, **arguments) @ v).to(q.dtype)


@torch.library.custom_op("acme::flash_attention_forward", mutates_args=())
def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(batch, length, heads, d)`, causal unless told otherwise."""
    out = [
        attend(
            *(x.transpose(0, 1) for x in sample),
            causal=causal,
            scale=softmax_scale,
            left=window_size_left,
            right=window_size_right,
            softcap=softcap,
            slopes=alibi_slopes,
        ).transpose(0, 1)
        for sample in zip(q, k, v, strict=True)
    ]
    return torch.stack(out), q.new_zeros(1)


@torch.library.custom_op("acme::flash_attention_varlen_forward", mutates_args=())
def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool
) -> Tensor:
    """`(all samples' rows, heads, d)`."""
    cuts = [cu[1:-1].long() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    parts = [x.transpose(0, 1).tensor_split(cut, 1) for x, cut in zip((q, k, v), cuts, strict=True)]
    out = [attend(*sample, causal=causal) for sample in zip(*parts, strict=True)]
    return torch.cat(out, 1).transpose(0, 1)


@torch.library.custom_op("acme::heads_first", mutates_args=())
def heads_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`(batch, heads, length, d)`, causal from the top left, of which the schema says nothing."""
    samples = zip(query, key, value, strict=True)
    return torch.stack([attend(*sample, causal=True, shift=0) for sample in samples])


@torch.library.custom_op("acme::odd", mutates_args=())
def odd(q: Tensor, k: Tensor, v: Tensor, temperature: float) -> Tensor:
    return torch.stack([attend(*s, scale=temperature * 8**-0.5) for s in zip(q, k, v, strict=True)])


class Call(nn.Module):
    def __init__(self, operator, *arguments, **named):
        super().__init__()
        self.operator, self.arguments, self.named = operator, arguments, named

    def forward(self, q, k, v):
        return self.operator(q, k, v, *self.arguments, **self.named)


def observed(model, q, k, v, tmp_path):
    plain = model(q, k, v)
    with attach(model, tmp_path, every=1, attention_rows=None, on_error="raise") as handle:
        seen = model(q, k, v)
    for a, b in zip(plain, seen, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return read(tmp_path).group("attention/entropy/", 0), handle.report()


def heads(dtype, *shapes):
    return [torch.randn(shape).mul(2).to(dtype) for shape in shapes]


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"causal": False},
        {"softmax_scale": 0.5},
        {"window_size_left": 3, "window_size_right": 0},
        {"causal": False, "window_size_left": 2, "window_size_right": 1},
        {"softcap": 1.5},
        {"alibi_slopes": SLOPES, "causal": False},
    ],
)
@pytest.mark.parametrize("length", [4, 9])  # as many rows as heads; fewer rows than keys
def test_flash_attention(named, dtype, length, tmp_path):
    q, k, v = heads(dtype, (2, length, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    found, _ = observed(Call(flash, **named), q, k, v, tmp_path)
    names = {"softmax_scale": "scale", "window_size_left": "left", "window_size_right": "right"}
    arguments = {names.get(name, name).replace("alibi_", ""): x for name, x in named.items()}
    arguments = {"causal": True} | arguments
    weights = [
        probabilities(a.transpose(0, 1), b.transpose(0, 1), **arguments)
        for a, b in zip(q, k, strict=True)
    ]
    assert found == pytest.approx({"root": entropy(torch.stack(weights))}, abs=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_samples_in_a_row(causal, tmp_path):
    starts = torch.tensor([0, 3, 10, 12], dtype=torch.int32)
    q, k, v = heads(torch.float32, *[(12, 4, 8)] * 3)
    found, _ = observed(Call(varlen, starts, starts, causal), q, k, v, tmp_path)
    cut = [x.transpose(0, 1).tensor_split(starts[1:-1].long(), 1) for x in (q, k)]
    rows = [
        torch.special.entr(probabilities(a, b, causal=causal)).sum(-1).flatten()
        for a, b in zip(*cut, strict=True)
    ]
    assert found == pytest.approx({"root": torch.cat(rows).mean().item()}, abs=1e-5)


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch):
    """As if the tensors were on a device, of which nothing is read before the step is."""
    if request.param == "device":
        monkeypatch.setattr(fused, "_is_readable", lambda tensor: False)
    return request.param


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.inference_mode])
def test_what_a_schema_does_not_say_is_found_out_from_the_output(context, where, tmp_path):
    q, k, v = heads(torch.float32, (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    with context():
        found, _ = observed(Call(heads_first).eval(), q, k, v, tmp_path / "eval")
        assert not found
        found = read(tmp_path / "eval").group("val/attention/entropy/", 0)
    weights = [probabilities(*s, causal=True, shift=0) for s in zip(q, k, strict=True)]
    assert found == pytest.approx({"root": entropy(torch.stack(weights))}, abs=1e-5)


def test_an_operator_that_is_not_understood_is_said_and_not_logged(where, tmp_path):
    q, k, v = heads(torch.float32, *[(2, 4, 9, 8)] * 3)
    with pytest.warns(RuntimeWarning, match=r"acme\.odd.*unsupported operator") as caught:
        found, report = observed(Call(odd, 0.3), q, k, v, tmp_path)
    assert not found
    assert len(caught) == 1
    assert "unsupported operator" in report.missed["attention of acme.odd.default"]
    found, _ = observed(Call(odd, 1.0), q, k, v, tmp_path / "plain")
    assert found.keys() == {"root"}


def test_heads_are_told_apart_on_a_device_too(where, tmp_path):
    """Micro-batches of two lengths: as many heads, though the wrong layout has others."""
    batches = [heads(torch.float32, *[(2, length, 4, 8)] * 3) for length in (6, 9)]
    model = Call(flash, causal=False)
    found = []
    for q, k, v in batches:
        given = {"q": q, "k": k, "v": v, "causal": False}
        sums = fused.sums_of(UNKNOWN, given, model(q, k, v), rows=None)
        found.append(without_doubt(sums))
        assert found[-1].shape[1] == 4
        assert sums.shape[1] == (4 if where == "host" else 4 + q.shape[1])
    handle = attach(model, tmp_path, every=1, attention_rows=None, on_error="raise")
    for q, k, v in batches:
        model(q, k, v)
    handle.detach()
    expected = whole({"root": merge(*found)})["root"]["entropy"]
    assert read(tmp_path).value("attention/entropy/root", 0) == pytest.approx(expected, abs=1e-6)


class Waits(TorchDispatchMode):
    """Fails where the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


STARTS = torch.tensor([0, 3, 10, 12], dtype=torch.int32)


@pytest.mark.parametrize("operator", [flash, varlen, heads_first, odd])
def test_nothing_waits_for_a_device(operator, monkeypatch):
    monkeypatch.setattr(fused, "_is_readable", lambda tensor: False)
    q, k, v = heads(torch.float32, *[(12, 4, 8) if operator is varlen else (2, 9, 4, 8)] * 3)
    more = {varlen: (STARTS, STARTS, True), odd: (0.3,)}.get(operator, ())
    output = operator(q, k, v, *more)
    given = dict(zip(role(operator._opoverload).defaults, (q, k, v, *more), strict=False))
    with Waits():
        sums = fused.sums_of(UNKNOWN, given, output, rows=128)
    assert without_doubt(sums).shape[1] == {odd: 0, heads_first: 9}.get(operator, 4)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match=r"is_nonzero|_local_scalar_dense"), Waits():
        fused.sums_of(UNKNOWN, given, output, rows=128)


# As in the sources that `operators.py` names; `...` is for what returns.
_VARLEN = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
_FLASH = (
    "float dropout_p, float softmax_scale, bool causal, int window_size_left=-1, "
    "int window_size_right=-1, float softcap=0., Tensor? alibi_slopes=None, "
    "bool return_softmax=False"
)
_FLASH_3 = (
    "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? {qv}=None, "
    "Tensor? {out}=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
    "bool {causal}=False, int window_size_left=-1, int window_size_right=-1, "
    "int attention_chunk=0, float softcap=0., bool {rotary}=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
)
_XFORMERS = "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
SCHEMAS = {
    "flash_attn::_flash_attn_forward": f"(Tensor q, Tensor k, Tensor v, {_FLASH}) ",
    "flash_attn::_flash_attn_varlen_forward": (
        f"(Tensor q, Tensor k, Tensor v, {_VARLEN}{_FLASH}, Tensor? block_table=None, "
        "Tensor? leftpad_k=None, Tensor? seqused_k=None) "
    ),
    "flash_attn_3::_flash_attn_forward": _FLASH_3.format(
        qv="qv", out="out_", causal="causal", rotary="rotary_interleaved"
    ),
    "flash_attn_3::fwd": _FLASH_3.format(
        qv="q_v", out="out", causal="is_causal", rotary="is_rotary_interleaved"
    ),
    "xformers_flash::flash_fwd": (
        f"{_XFORMERS}Tensor? seqused_k, int max_seqlen_q, int max_seqlen_k, float p, "
        "float softmax_scale, bool is_causal, int window_left, int window_right, "
        "bool return_softmax, Tensor? block_tables) "
    ),
    "xformers_flash3::flash_fwd": (
        f"{_XFORMERS}Tensor? seqused_k, Tensor? leftpad_k, int max_seqlen_q, int max_seqlen_k, "
        "float p, float softmax_scale, bool is_causal, Tensor? descale_q=None, "
        "Tensor? descale_k=None, Tensor? descale_v=None, Tensor? block_table=None, "
        "bool use_kvsplit=False, int window_left=-1, int window_right=-1) "
    ),
    "xformers::efficient_attention_forward_cutlass": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor? seqstart_q, "
        "Tensor? seqstart_k, int? max_seqlen_q, float dropout_p, bool compute_logsumexp, "
        "int custom_mask_type, float? scale, Tensor? seqlen_k, int? window_size) "
    ),
}


def returns_zeros(*given, **named):
    """Nothing to find out anything from: what is measured is from the arguments."""
    return given[0].new_zeros(given[0].shape), given[0].new_zeros(1)


@pytest.fixture(scope="module", autouse=True)
def operators():
    """Those of other libraries, and of CUDA, on the CPU."""
    import torch.nn.attention.varlen

    with contextlib.ExitStack() as libraries:
        for name, schema in SCHEMAS.items():
            namespace, _, own = name.partition("::")
            library = torch.library._scoped_library(namespace, "FRAGMENT")
            library = libraries.enter_context(library)
            library.define(f"{own}{schema}-> (Tensor, Tensor)")
            library.impl(own, returns_zeros, "CPU")
        aten = libraries.enter_context(torch.library._scoped_library("aten", "IMPL"))
        many = lambda *given, **named: (*returns_zeros(*given), *[given[0]] * 3)  # noqa: E731
        more = lambda *given, **named: (*many(*given)[:4], 0, 0)  # noqa: E731
        aten.impl("_flash_attention_forward", many, "CPU")
        aten.impl("_efficient_attention_forward", more, "CPU")
        one = lambda out, *given, **named: out.new_zeros(1)  # noqa: E731
        aten.impl("_flash_attention_forward_no_dropout_inplace", one, "CPU")
        yield


LONG = {"starts_q": [0, 3, 6], "starts_k": [0, 5, 12]}  # two samples one after the other
_FEW = {"dropout_p": 0.5, "return_debug_mask": False}
_FOUR = {"max_seqlen_q": 7, "max_seqlen_k": 7}
_NONE = {"cu_seqlens_q": None, "cu_seqlens_k": None, "seqused_k": None}
CALLS = {
    "flash_attn::_flash_attn_forward": [
        ({"dropout_p": 0.5, "softmax_scale": 0.4, "causal": True}, {"scale": 0.4, "causal": True}),
        (
            {"dropout_p": 0.0, "softmax_scale": 0.4, "causal": False, "alibi_slopes": SLOPES},
            {"scale": 0.4, "slopes": SLOPES},
        ),
        (
            {"dropout_p": 0.0, "softmax_scale": 0.4, "causal": True, "window_size_left": 2}
            | {"window_size_right": 0, "softcap": 1.5},
            {"scale": 0.4, "causal": True, "left": 2, "softcap": 1.5},
        ),
    ],
    "flash_attn::_flash_attn_varlen_forward": [
        (_FOUR | {"dropout_p": 0.5, "softmax_scale": 0.4, "causal": True, "starts": LONG},
         {"scale": 0.4, "causal": True}),
    ],
    "flash_attn_3::_flash_attn_forward": [
        ({"causal": True}, {"causal": True}),
        ({"window_size_left": 3, "window_size_right": 1}, {"left": 3, "right": 1}),
        (_FOUR | {"causal": True, "starts": LONG}, {"causal": True}),
    ],
    "flash_attn_3::fwd": [({"is_causal": True, "softcap": 2.0}, {"causal": True, "softcap": 2.0})],
    "xformers_flash::flash_fwd": [
        (
            _NONE | _FOUR | {"p": 0.5, "softmax_scale": 0.3, "is_causal": True, "window_left": 2}
            | {"window_right": -1, "return_softmax": False, "block_tables": None},
            {"scale": 0.3, "causal": True, "left": 2},
        ),
    ],
    "xformers_flash3::flash_fwd": [
        (
            _NONE | _FOUR | {"leftpad_k": None, "p": 0.0, "softmax_scale": 0.3, "is_causal": True},
            {"scale": 0.3, "causal": True},
        ),
    ],
    "xformers::efficient_attention_forward_cutlass": [
        (
            {"attn_bias": None, "seqstart_q": None, "seqstart_k": None, "max_seqlen_q": -1}
            | {"dropout_p": 0.5, "compute_logsumexp": True, "custom_mask_type": kind}
            | {"scale": 0.3, "seqlen_k": None, "window_size": window},
            {"scale": 0.3, "causal": kind > 0, "shift": None if kind == 2 else 0}
            | {"left": -1 if window is None else window - 1},
        )
        for kind, window in ((0, None), (1, None), (2, None), (2, 3))
    ],
    "aten::_efficient_attention_forward": [
        (
            {"bias": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None}
            | {"max_seqlen_k": None, "dropout_p": 0.5, "custom_mask_type": 1},
            {"causal": True, "shift": 0},
        ),
    ],
    "aten::_flash_attention_forward": [
        (
            _FEW | {"cum_seq_q": None, "cum_seq_k": None, "max_q": 5, "max_k": 9}
            | {"is_causal": True, "window_size_left": 2},
            {"causal": True, "left": 2},
        ),
        (_FEW | {"max_q": 7, "max_k": 7, "is_causal": False, "starts": LONG}, {}),
    ],
    "aten::_flash_attention_forward_no_dropout_inplace": [
        (
            _FEW | {"cum_seq_q": None, "cum_seq_k": None, "max_q": 5, "max_k": 9}
            | {"dropout_p": 0.0, "is_causal": True},
            {"causal": True},
        ),
    ],
    "torch_attn::_varlen_attn_out": [
        ({"max_q": 7, "max_k": 7, "window_size": [2, 0], "enable_gqa": True, "starts": LONG},
         {"left": 2, "right": 0}),
    ],
    "torch_attn::_varlen_attn": [
        ({"max_q": 7, "max_k": 7, "window_size": [2, 0], "enable_gqa": True, "starts": LONG},
         {"left": 2, "right": 0}),
        ({"max_q": 7, "max_k": 7, "is_causal": True, "window_size": [-1, 0], "starts": LONG},
         {"causal": True}),
    ],
}  # fmt: skip


def test_every_operator_of_the_tables_is_tried():
    layers = {"aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd"}
    cudnn = {"aten::_cudnn_attention_forward"}
    assert FUSED.keys() == CALLS.keys() | layers | cudnn


@pytest.mark.parametrize(
    ("name", "named", "means"),
    [(name, *call) for name, calls in CALLS.items() for call in calls],
)
def test_operators_of_other_libraries(name, named, means, tmp_path):
    namespace, _, own = name.partition("::")
    named = dict(named)
    starts = named.pop("starts", None)
    if (packet := getattr(getattr(torch.ops, namespace), own, None)) is None:
        pytest.skip("a later torch has this operator")
    operator = packet.default
    if named.keys() - {argument.name for argument in operator._schema.arguments}:
        pytest.skip("a later torch has these arguments")
    if starts is None:
        q, k, v = heads(torch.float32, (2, 5, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
        samples = [(a.transpose(0, 1), b.transpose(0, 1)) for a, b in zip(q, k, strict=True)]
    else:
        q, k, v = heads(torch.float32, (6, 4, 8), (12, 2, 8), (12, 2, 8))
        arguments = [argument.name for argument in operator._schema.arguments]
        for side, values in starts.items():
            (start,) = (a for a in arguments if a.startswith("cu") and a[-2:] == side[-2:])
            named[start] = torch.tensor(values, dtype=torch.int32)
        parts = [
            x.transpose(0, 1).tensor_split(values[1:-1], 1)
            for x, values in zip((q, k), starts.values(), strict=True)
        ]
        samples = list(zip(*parts, strict=True))
    if "out" in (argument.name for argument in operator._schema.arguments[:1]):
        into = operator
        operator = lambda q, *given, **named: [into(torch.zeros_like(q), q, *given, **named)]  # noqa: E731
    found, _ = observed(Call(operator, **named), q, k, v, tmp_path)
    rows = [torch.special.entr(probabilities(*sample, **means)).sum(-1) for sample in samples]
    seen = torch.cat([row.flatten() for row in rows])
    assert found == pytest.approx({"root": seen.mean().item()}, abs=1e-5)


STRANGE = {
    "flash_attn::_flash_attn_varlen_forward": _FOUR
    | {"dropout_p": 0.0, "softmax_scale": 0.4, "causal": True, "seqused_k": STARTS}
    | {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS},
    "flash_attn_3::fwd": {"attention_chunk": 4},
}


@pytest.mark.parametrize("name", STRANGE)
def test_an_argument_that_the_tables_do_not_explain_is_not_guessed(name, tmp_path):
    namespace, _, own = name.partition("::")
    q, k, v = heads(torch.float32, *[(12, 4, 8) if "varlen" in name else (2, 9, 4, 8)] * 3)
    model = Call(getattr(getattr(torch.ops, namespace), own), **STRANGE[name])
    with pytest.warns(RuntimeWarning, match=r"unsupported operator"):
        found, _ = observed(model, q, k, v, tmp_path)
    assert not found
