import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bthooks import attention_stats
from bthooks.measure import attention
from bthooks.measure.attention import (
    finalize,
    merge,
    sums_of_query_key,
    sums_of_scores,
    sums_of_weights,
)


def whole(sums):
    return attention.whole({"map": sums})["map"]


def reference(query, key, *, mask=None, is_causal=False, scale=None):
    """The statistics from the whole L x S matrix, in float64, per map."""
    q, k = query.double(), key.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        hidden |= ~mask
    elif mask is not None:
        scores = scores + mask.double()
        hidden |= mask <= -1e4
    if is_causal:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    alive = ~hidden.all(-1)
    w = torch.where(alive[..., None], scores, 0).softmax(-1)
    entropy, visible = torch.special.entr(w).sum(-1), (~hidden).sum(-1)
    stats = {"dead_rows": (~alive).double().mean()}
    is_of_keys = mask is not None and mask.shape[-2] == 1 < q.shape[-2] and not is_causal
    if is_of_keys and not alive.all():
        stats["dead_samples"] = stats["dead_rows"]
    if alive.any():
        stats |= {
            "entropy": entropy[alive].mean(),
            "weight_mean": w[alive].mean(),
            "weight_std": w[alive].std() if w[alive].numel() > 1 else torch.zeros(()),
            "weight_max": w[alive].max(),
            "max_logit": scores[alive].max(),
            "sink": w[alive][:, 0].mean(),
        }
    several = alive & (visible > 1)
    if several.any():
        stats["entropy_normalized"] = (entropy[several] / visible[several].log()).mean()
    return {name: value.item() for name, value in stats.items()}


def assert_near(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, abs(value)) if name == "max_logit" else 1.0
        assert abs(found[name] - value) <= tolerance * scale, (name, found[name], value)


@st.composite
def maps(draw):
    batch, kv_heads, group = (draw(st.integers(1, n)) for n in (3, 3, 3))
    length, keys, width = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 8))
    heads = kv_heads * group
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    peak = draw(st.sampled_from([0.1, 1.0, 8.0]))

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * peak).to(dtype)

    query, key = normal(batch, heads, length, width), normal(batch, kv_heads, keys, width)
    shape = draw(
        st.sampled_from(
            [
                (batch, 1, length, keys),
                (batch, heads, length, keys),
                (1, heads, length, keys),
                (batch, heads, 1, keys),
                (1, 1, length, keys),
                (length, keys),
                (batch, 1, 1, keys),
            ]
        )
    )
    kind = draw(st.sampled_from(["none", "bool", "bias", "minimum", "infinite"]))
    seen = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.8]))
    mask = {
        "none": None,
        "bool": seen,
        "bias": torch.randn(shape, generator=generator).to(dtype),
        "minimum": torch.zeros(shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min),
        "infinite": torch.zeros(shape, dtype=dtype).masked_fill_(~seen, -torch.inf),
    }[kind]
    return {
        "query": query,
        "key": key,
        "mask": mask,
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 1.0, 0.5])),
    }


@given(maps())
@settings(max_examples=300, deadline=None)
def test_statistics_equal_the_dense_float64_ones(arguments):
    found = whole(sums_of_query_key(**arguments))
    assert_near(found, reference(**arguments), 1e-4)
    visible = arguments["key"].shape[2]
    if "entropy" in found:
        assert 0 <= found["entropy"] <= math.log(visible) + 1e-5


@given(maps(), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_sampled_rows_are_one_of_each_part(arguments, rows):
    length = arguments["query"].shape[2]
    if rows >= length or arguments["is_causal"]:
        return
    bounds = [i * length // rows for i in range(rows + 1)]
    shares = [(i * (5**0.5 - 1) / 2 + 0.5) % 1 for i in range(rows)]
    at = [int(a + s * (b - a)) for a, b, s in zip(bounds, bounds[1:], shares, strict=False)]
    taken = dict(arguments, query=arguments["query"][:, :, at])
    if (mask := arguments["mask"]) is not None and mask.shape[-2] == length:
        taken["mask"] = mask[..., at, :]
    assert_near(whole(sums_of_query_key(**arguments, rows=rows)), reference(**taken), 1e-4)


def test_a_sample_of_rows_is_close_and_blocks_do_not_matter(monkeypatch):
    q, k = torch.randn(2, 4, 1024, 16), torch.randn(2, 4, 1024, 16)
    exact = whole(sums_of_query_key(q, k, is_causal=True))
    sampled = whole(sums_of_query_key(q, k, is_causal=True, rows=128))
    assert sampled["entropy"] == pytest.approx(exact["entropy"], rel=3e-3)
    monkeypatch.setattr("bthooks.measure.scores._BLOCK", {"cpu": 10_000})
    assert_near(whole(sums_of_query_key(q, k, is_causal=True)), exact, 1e-5)


@pytest.mark.parametrize("period", [8, 16, 24, 32, 64, 128])
def test_a_sample_does_not_fall_in_step_with_packed_samples(period):
    q, k = torch.randn(1, 2, 2048, 16), torch.randn(1, 2, 2048, 16)
    sample = torch.arange(2048) // period
    mask = (sample[:, None] == sample) & torch.ones(2048, 2048, dtype=torch.bool).tril()
    exact = whole(sums_of_query_key(q, k, mask=mask[None, None]))
    sampled = whole(sums_of_query_key(q, k, mask=mask[None, None], rows=128))
    assert sampled["entropy"] == pytest.approx(exact["entropy"], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [4.0, 6.0, 8.0, 50.0])
def test_collapse_is_resolved(dtype, gap):
    """One key is `gap` above 63 others of equal score: the entropy in closed form."""
    q = torch.zeros(1, 1, 4, 16, dtype=dtype)
    q[..., 0] = 16.0
    k = torch.zeros(1, 1, 64, 16, dtype=dtype)
    k[0, 0, 5, 0] = gap
    others = 63 * math.exp(-gap)
    p, rest = 1 / (1 + others), math.exp(-gap) / (1 + others)
    expected = -p * math.log(p) - 63 * rest * math.log(rest)
    assert whole(sums_of_query_key(q, k, scale=1 / 16))["entropy"] == pytest.approx(
        expected, abs=1e-5
    )


def test_large_scores_do_not_cancel():
    q, k = torch.randn(1, 2, 8, 16) * 30, torch.randn(1, 2, 8, 16) * 30 + 100
    assert_near(whole(sums_of_query_key(q, k)), reference(q, k), 1e-3)


def test_weights_and_query_key_agree_per_head():
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    direct, recomputed = attention_stats(weights), finalize(sums_of_query_key(q, k))
    for name, values in direct.items():
        assert values.shape == (3,)
        torch.testing.assert_close(values, recomputed[name], atol=1e-5, rtol=1e-5)
        alone = attention_stats(weights[:, 1:2])[name]
        torch.testing.assert_close(values[1:2], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [math.nan] * 3])
def test_rows_that_see_no_key_are_left_out_and_counted(row):
    weights = torch.tensor([[[[0.25, 0.25, 0.5], row]]])
    stats = attention_stats(weights)
    assert stats["entropy"].item() == pytest.approx(1.0397207708399179)
    assert stats["dead_rows"].item() == 0.5
    assert whole(sums_of_weights(torch.tensor([[[row]]]))) == {"dead_rows": 1.0}


@pytest.mark.parametrize("shift", [0.0, -2.5e4, 2.5e4])
def test_large_logits_are_no_hidden_keys(shift):
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64) * 30 + shift
    expected = reference_of_scores(scores)
    found = whole(sums_of_scores(scores))
    assert_near({name: found[name] for name in expected}, expected, 1e-6)
    hidden = torch.rand(5, 7) < 0.4
    hidden[:, 0] = False
    expected = reference_of_scores((scores - shift).masked_fill(hidden, -torch.inf))
    found = whole(sums_of_scores((scores - shift).float() + hidden * -10000.0))
    assert_near({name: found[name] for name in expected}, expected, 1e-3)


def reference_of_scores(scores):
    p = scores.softmax(-1)
    rows = torch.special.entr(p).sum(-1)
    seen = (scores > -torch.inf).sum(-1)
    normalized = (rows / seen.log())[seen > 1].mean().item()
    return {"entropy": rows.mean().item(), "entropy_normalized": normalized, "dead_rows": 0.0}


@given(
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([-300.0, -3.0, 0.0, 3.0, 60.0, 300.0]),
    st.sampled_from([0.0, 1.0, 8.0]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_beside_a_learnt_sink_the_keys_are_normalized_among_themselves(
    keys, dtype, sink, peak, is_first
):
    """Two keys that a sink leaves 2/e of the weight have an entropy of 1.06 log(2)."""
    scores = (torch.randn(2, 3, keys, keys) * peak).to(dtype)
    scores += torch.full((keys, keys), -torch.inf, dtype=dtype).triu(1)
    sinks = torch.full((2, 3, keys, 1), sink, dtype=dtype)
    beside = torch.cat([sinks, scores] if is_first else [scores, sinks], -1)
    among = slice(1, None) if is_first else slice(0, keys)
    found = whole(sums_of_scores(beside, keys=among))
    expected = reference_of_scores(scores.double())["entropy_normalized"] if keys > 1 else None
    assert found.get("entropy_normalized") == pytest.approx(expected, abs=1e-5)
    assert found.get("entropy_normalized", 0) <= 1
    weights = beside.double().softmax(-1)[..., among]
    assert found["entropy"] == pytest.approx(
        torch.special.entr(weights).sum(-1).mean().item(), abs=1e-5
    )
    if sink < 60:  # else float32 leaves them nothing; a sum within 0.02 of 1 is left as it is
        stats = attention_stats(weights.float())["entropy_normalized"]
        assert stats.mean().item() == pytest.approx(expected or math.nan, abs=0.03, nan_ok=True)


@pytest.mark.parametrize("keys", [2, 3, 7, 1000])
def test_equal_weights_are_never_above_one(keys):
    for sums in (sums_of_scores(torch.zeros(2, 2, 9, keys)), sums_of_weights(torch.full(
        (2, 2, 9, keys), 1 / keys)), sums_of_query_key(torch.zeros(2, 2, 9, 4), torch.zeros(
        2, 2, keys, 4))):  # fmt: skip
        assert 1 - 1e-6 < whole(sums)["entropy_normalized"] <= 1


def test_one_hot_rows_have_entropy_zero_in_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        stats = attention_stats(torch.eye(4, dtype=dtype).expand(1, 2, 4, 4))
        assert stats["entropy"].tolist() == [0.0, 0.0]
        assert stats["weight_max"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_weight_on_the_neighbours_of_a_query(is_causal):
    q, k = torch.randn(2, 2, 3, 40, 8) * 3
    k[:, 0, :-1], k[:, 1, 1:] = q[:, 0, 1:], q[:, 1, :-1]  # the one before, the one behind
    scores = q @ k.transpose(-1, -2) * 8**-0.5
    if is_causal:
        scores += torch.full((40, 40), -torch.inf).triu(1)
    w = scores.double().softmax(-1)
    before = torch.cat([w[..., :1, 0], w.diagonal(-1, -2, -1)], dim=-1).mean((0, 2))
    behind = torch.cat([w.diagonal(1, -2, -1), w[..., -1:, -1]], dim=-1).mean((0, 2))
    assert (before > behind).tolist()[:2] == [True, is_causal]
    expected = torch.maximum(before, behind).tolist()
    assert near(sums_of_weights(w)) == pytest.approx(expected)
    for rows in None, 7:
        expected = near(sums_of_weights(w, rows))
        assert near(sums_of_scores(scores, rows=rows)) == pytest.approx(expected, rel=1e-5)
        found = near(sums_of_query_key(q, k, is_causal=is_causal, rows=rows))
        assert found == pytest.approx(expected, rel=1e-5)


def near(sums):
    return [head.neighbour for head in attention.of_heads({"": sums})[""]]


def test_sums_merge_as_if_measured_together():
    q, k = torch.randn(6, 3, 5, 8), torch.randn(6, 3, 7, 8)
    together = whole(sums_of_query_key(q, k))
    apart = merge(sums_of_query_key(q[:1], k[:1]), sums_of_query_key(q[1:], k[1:]))
    assert_near(whole(apart), together, 1e-6)
    of_other_heads = sums_of_query_key(q[:, :2], k[:, :2])
    assert merge(apart, of_other_heads).shape == (len(of_other_heads), 1)


def test_a_nan_score_shows_as_nan():
    q = torch.randn(1, 1, 3, 4)
    q[0, 0, 1] = math.nan
    assert math.isnan(whole(sums_of_query_key(q, torch.randn(1, 1, 3, 4)))["entropy"])


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(batch, heads, query, key\), got \(2, 4, 4\)"):
        attention_stats(torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match=r"got \(1, 0, 4, 4\)"):
        attention_stats(torch.ones(1, 0, 4, 4))
