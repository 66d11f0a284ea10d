"""Rows that see no key are found in every arithmetic of masks, and no others are."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bthooks import attach


class Writer:
    """Keeps the statistics of the one map."""

    def __init__(self):
        self.found = {"dead_rows": 0.0}

    def add_scalar(self, tag, value, *rest):
        if tag.startswith("val/attention/") and tag.endswith("/root"):
            self.found[tag.split("/")[-2]] = float(value)

    def ignore(self, *args, **kwargs):
        pass

    add_histogram_raw = add_image = add_text = add_custom_scalars = flush = ignore


def assigned(scores, hidden, low):
    scores = scores.clone()
    scores[hidden.expand(scores.shape)] = low
    return scores


def sliced(scores, hidden, low):
    """Row by row, as a loop does that has no mask."""
    scores = scores.clone()
    for row in range(scores.shape[-2]):
        part = scores[..., row, :]
        part.copy_(torch.where(hidden[..., row if hidden.shape[-2] > 1 else 0, :], low, part))
    return scores


def number(hidden, low, dtype):
    """`low` where it is hidden, else 0; without 0 x -inf."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, low)


# How a mask hides keys: (scores, where it is True, with what) -> scores.
WAYS = {
    "added": lambda s, hidden, low: s + number(hidden, low, s.dtype),
    "added in place": lambda s, hidden, low: s.add_(number(hidden, low, s.dtype)),
    "taken off": lambda s, hidden, low: s - number(hidden, -low, s.dtype),
    "alpha": lambda s, hidden, low: torch.add(s, hidden.to(s.dtype), alpha=low),
    "where": lambda s, hidden, low: torch.where(hidden, low, s),
    "where, a tensor": lambda s, hidden, low: torch.where(~hidden, s, torch.full_like(s, low)),
    "filled": lambda s, hidden, low: s.masked_fill(hidden, low),
    "filled in place": lambda s, hidden, low: s.masked_fill_(hidden, low),
    "assigned": assigned,
    "sliced": sliced,
    "multiplied": lambda s, hidden, low: s * ~hidden + number(hidden, low, s.dtype),
    "minimum": lambda s, hidden, low: torch.minimum(
        s, torch.full((), 9e3, dtype=s.dtype).where(~hidden, low)
    ),
}
NO_INFINITY = ("alpha",)


class Attention(nn.Module):
    """An explicit softmax, or a kernel that is given the sum of the masks."""

    def __init__(self, masks, fused=False, scale=1.0):
        super().__init__()
        self.masks, self.fused, self.scale = masks, fused, scale

    def forward(self, q, k):
        if self.fused:
            mask = torch.zeros(len(q), 1, q.shape[-2], k.shape[-2], dtype=q.dtype)
            for way, hidden, low in self.masks:
                mask = WAYS[way](mask, hidden, low)
            return F.scaled_dot_product_attention(q, k, k, mask)
        return self.scores(q, k).softmax(-1) @ k

    def scores(self, q, k):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        for way, hidden, low in self.masks:
            scores = WAYS[way](scores, hidden, low)
        return scores * self.scale


def measured(model, q, k):
    writer = Writer()
    with attach(model.eval(), writer, every=1, attention_rows=None, on_error="raise"):
        model(q, k)
    return writer.found


def reference(q, k, hidden):
    """What one mask would give, in float64 from the scores in their own precision."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).double()
    hidden = hidden.expand(scores.shape)
    dead = hidden.all(-1)
    found = {"dead_rows": dead.double().mean().item()}
    if not dead.all():
        rows = scores.masked_fill(hidden, -torch.inf)[~dead]
        entropy, keys = torch.special.entr(rows.softmax(-1)).sum(-1), (~hidden)[~dead].sum(-1)
        found["entropy"] = entropy.mean().item()
        if (keys > 1).any():
            found["entropy_normalized"] = (entropy / keys.log())[keys > 1].mean().item()
    return found


def assert_found(found, expected, tolerance=1e-4):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=tolerance), name
    assert ("entropy" in found) == ("entropy" in expected)


def normal(shape, generator, dtype):
    return torch.randn(shape, generator=generator).to(dtype) * 2


@st.composite
def masked(draw):
    """Query and key, and up to three masks, each put on in a way of its own."""
    batch, heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 7))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q, k = (normal((batch, heads, length, 4), generator, dtype) for _ in range(2))
    at, pads = (
        torch.arange(length),
        torch.randint(length + 1, (batch, 1, 1, 1), generator=generator),
    )
    shapes = {
        "causal": (at > at[:, None])[None, None],
        "left": (at < pads),
        "right": (at >= pads),
        "window": ((at - at[:, None]).abs() > 2)[None, None],
        "any": torch.rand(batch, heads, length, length, generator=generator) < 0.6,
    }
    lowest = torch.finfo(dtype).min
    rounded = torch.tensor(-1e4, dtype=torch.bfloat16).item()  # a mask may be of another type
    lows = [-torch.inf, lowest, -1e4, rounded, -65504.0] + [-1e9] * (dtype != torch.float16)
    masks = []
    for name in draw(st.lists(st.sampled_from([*shapes]), max_size=3)):
        low = draw(st.sampled_from(lows))
        finite = low > -torch.inf
        masks.append((draw(st.sampled_from([w for w in WAYS if finite or w not in NO_INFINITY])),
                      shapes[name], low))  # fmt: skip
    return q, k, masks


def union(masks, like):
    hidden = torch.zeros(1, 1, *like.shape[-2:-1], like.shape[-2], dtype=torch.bool)
    for _, mask, _ in masks:
        hidden = hidden | mask
    return hidden


@given(masked())
@settings(max_examples=300, deadline=None)
def test_the_rows_are_those_of_one_mask(case):
    q, k, masks = case
    assume(not Attention(masks).scores(q, k).isnan().any())  # 0 x -inf
    assert_found(measured(Attention(masks), q, k), reference(q, k, union(masks, k)))


@given(masked())
@settings(max_examples=150, deadline=None)
def test_the_rows_of_a_kernel_are_those_of_one_mask(case):
    q, k, masks = case
    masks = [(way, hidden[:, :1], low) for way, hidden, low in masks]
    assume(not Attention(masks).scores(q, k).isnan().any())  # 0 x -inf
    q, k = q.float(), k.float()
    assert_found(measured(Attention(masks, fused=True), q, k), reference(q, k, union(masks, k)))


def alibi(length, slope):
    at = torch.arange(length)
    return -slope * (at[:, None] - at).abs()


def biased(bias):
    """A module that adds it to the scores."""

    class Biased(nn.Module):
        def forward(self, q, k):
            return (q @ k.mT / 2 + bias).softmax(-1) @ k

    return Biased()


LEGITIMATE = {
    "zero queries": (Attention([]), 0.0, 0.0),
    "all equal and low": (Attention([]), -2e4, 0.0),
    "low": (Attention([]), -2e4, 1.0),
    "low, causal": (Attention([("added", alibi(6, 1).triu(1) < 0, -torch.inf)]), -2e4, 1.0),
    "low, lowest": (Attention([("where", alibi(6, 1).triu(1) < 0, -3.4e38)]), -2e4, 1.0),
    "long range": (biased(alibi(6, 4000.0)), 0.0, 1.0),
    "long range, causal": (
        biased(alibi(6, 4000.0).masked_fill(alibi(6, 1).triu(1) < 0, -torch.inf)), 0.0, 1.0
    ),
    "far from all keys": (biased(alibi(32, 400.0)[:, -6:]), 0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEGITIMATE)
def test_rows_that_are_low_or_equal_are_not_dead(kind):
    model, level, spread = LEGITIMATE[kind]
    q = torch.zeros(1, 1, 32 if kind == "far from all keys" else 6, 4)
    k = torch.zeros(1, 1, 6, 4)
    q[..., 0], k[..., 0] = level, 2.0  # q k / 2 = level
    k[..., 1:] = torch.randn(1, 1, 6, 3) * spread
    q[..., 1:] = torch.randn(*q.shape[:-1], 3) * spread
    assert measured(model, q, k)["dead_rows"] == 0
    if kind == "all equal and low":
        assert measured(model, q[:, :, :1], k[:, :, :1])["dead_rows"] == 0


@pytest.mark.parametrize("scale", [0.125, 1.4427])
def test_masks_may_come_before_the_scale(scale):
    q, k = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)
    at = torch.arange(6)
    masks = [
        ("added", (at < torch.tensor([2, 4])[:, None])[:, None, None], -1e4),
        ("where", (at > at[:, None])[None, None], torch.finfo(torch.float32).min),
    ]
    found = measured(Attention(masks, scale=scale), q, k)
    assert_found(found, reference(q * scale, k, union(masks, k)))
