"""Operators that are not torch's own, in the manner of flash_attn."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from bthooks import attach

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
        assert torch.equal(a, b)
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


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.inference_mode])
def test_what_a_schema_does_not_say_is_found_out_from_the_output(context, tmp_path):
    q, k, v = heads(torch.float32, (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    with context():
        found, _ = observed(Call(heads_first).eval(), q, k, v, tmp_path / "eval")
        assert not found
        found = read(tmp_path / "eval").group("val/attention/entropy/", 0)
    weights = [probabilities(*s, causal=True, shift=0) for s in zip(q, k, strict=True)]
    assert found == pytest.approx({"root": entropy(torch.stack(weights))}, abs=1e-5)


def test_an_operator_that_is_not_understood_is_said_and_not_logged(tmp_path):
    q, k, v = heads(torch.float32, *[(2, 4, 9, 8)] * 3)
    with pytest.warns(RuntimeWarning, match=r"acme\.odd.*unsupported operator") as caught:
        found, report = observed(Call(odd, 0.3), q, k, v, tmp_path)
    assert not found
    assert len(caught) == 1
    assert "unsupported operator" in report.missed["attention of acme.odd.default"]
    found, _ = observed(Call(odd, 1.0), q, k, v, tmp_path / "plain")
    assert found.keys() == {"root"}
