import contextlib
import types

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

import bthooks
from bthooks import attach

from ..conftest import read
from ..models import SelfAttention, Transformer, batch, entropy


def observed(model, x, tmp_path, context=contextlib.nullcontext, **arguments):
    """The entropies of one forward by path, the output with us, and the one without."""
    with torch.random.fork_rng(), context():
        plain = model(x)
    with attach(model, tmp_path, every=1, on_error="raise", **arguments) as handle:
        with torch.random.fork_rng(), context():
            seen = model(x)
        handle.flush()
    start = "attention/entropy/" if model.training else "val/attention/entropy/"
    run = read(tmp_path)
    return run.group(start, 0), seen, plain, handle.report()


class Calls(nn.Module):
    """One attention module called several times in a forward."""

    def __init__(self, times):
        super().__init__()
        self.attention, self.times = SelfAttention(), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.attention(x)
        return x

    def truth(self, x):
        entropies = []
        for _ in range(self.times):
            entropies.append(entropy(self.attention.probabilities(x)))
            x = self.attention(x)
        return entropies


@pytest.mark.parametrize("times", [1, 2, 4])
def test_further_maps_of_a_module_are_numbered(times, tmp_path):
    model, (x, _) = Calls(times), batch(0)
    found, *_ = observed(model, x, tmp_path)
    names = ["attention", "attention/1", "attention/2", "attention/3"][:times]
    assert found == pytest.approx(dict(zip(names, model.truth(x), strict=True)), abs=1e-4)


def test_more_than_four_are_averaged(tmp_path):
    model, (x, _) = Calls(7), batch(0)
    found, *_ = observed(model, x, tmp_path)
    assert found == pytest.approx({"attention": sum(model.truth(x)) / 7}, abs=1e-4)


def test_a_root_that_attends_is_called_root(tmp_path):
    model, (x, _) = SelfAttention(), batch(0)
    found, *_ = observed(model, x, tmp_path)
    assert found == pytest.approx({"root": entropy(model.probabilities(x))}, abs=1e-4)


def test_a_map_whose_module_is_not_found_is_said(tmp_path):
    call = nn.Module._call_impl.__code__.replace(co_name="call_by_another_library")

    class Called(SelfAttention):
        __call__ = types.FunctionType(call, nn.Module._call_impl.__globals__)

    model, (x, _) = Called(), batch(0)
    with (
        attach(model, tmp_path, every=1) as handle,
        pytest.warns(RuntimeWarning, match="attention: torch .* is unknown"),
        pytest.warns(RuntimeWarning, match="no call of a module of the model is on the Python"),
    ):
        model(x), model(x)
    assert "attention of an unknown module" in handle.report().missed
    assert not read(tmp_path).group("attention/entropy/", 0)


def test_a_shared_module_has_its_first_path(tmp_path):
    model, (x, _) = nn.Sequential(SelfAttention()), batch(0)
    model.add_module("again", model[0])
    found, *_ = observed(model, x, tmp_path)
    assert found.keys() == {"0", "0/1"}


CONTEXTS = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


# A forward in training mode without gradients, before any step, is inference.
@pytest.mark.parametrize(
    ("context", "training"),
    [
        (name, mode)
        for name in CONTEXTS
        for mode in (True, False)
        if not mode or name in ("grad", "autocast")
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_outputs_are_bit_identical_and_entropies_true(context, training, causal, tmp_path):
    model, (x, _) = SelfAttention(causal=causal).train(training), batch(0)
    with CONTEXTS[context]() if context == "autocast" else contextlib.nullcontext():
        truth = entropy(model.probabilities(x))
    found, seen, plain, _ = observed(model, x, tmp_path, CONTEXTS[context], attention_rows=None)
    assert torch.equal(seen, plain)
    tolerance = 2e-2 if context == "autocast" else 1e-5
    assert found == pytest.approx({"root": truth}, abs=tolerance)


def test_multihead_attention_in_training(tmp_path):
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    root = nn.ModuleDict({"cross": model})
    root.forward = lambda pair: model(*pair, need_weights=False)[0]
    q, memory = torch.randn(2, 5, 16) * 4, torch.randn(2, 9, 16) * 4
    found, *_ = observed(root, (q, memory, memory), tmp_path)
    weights = model(q, memory, memory, average_attn_weights=False)[1]
    assert found == pytest.approx({"cross": entropy(weights.double())}, abs=1e-5)


class Grouped(nn.Module):
    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)


def test_grouped_heads_masks_and_scale(tmp_path):
    q, k, v = (torch.randn(2, heads, 6, 8) * 3 for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 6, 6) < 0.6
    mask[..., 0] = True
    model = Grouped()
    with attach(model, tmp_path, every=1):
        model(q, k, v, mask)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    truth = entropy(scores.masked_fill(~mask, -torch.inf).softmax(-1))
    assert read(tmp_path).value("attention/entropy/root", 0) == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("compiled", ["block", "whole", "fullgraph inside"])
def test_compiled_models_stay_compiled(compiled, tmp_path):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    plain = Transformer().eval()
    model = Transformer().eval()
    model.load_state_dict(plain.state_dict())
    if compiled == "whole":
        model = torch.compile(model, backend=counter)
    else:
        for block in model.blocks:
            block.attention.compile(backend=counter, fullgraph=compiled != "block")
    x, _ = batch(0)
    with torch.no_grad():
        model(x)
        frames = counter.frame_count
        with attach(model, tmp_path, every=1, on_error="raise"):
            for _ in range(5):
                output = model(x)
        expected = plain(x)
    assert frames > 0
    assert counter.frame_count == frames
    torch.testing.assert_close(output["logits"], expected["logits"])
    run = read(tmp_path)
    names = (
        {"root", "root/1"} if compiled == "whole" else {"blocks.0.attention", "blocks.1.attention"}
    )
    assert run.group("val/attention/entropy/", 4).keys() == names


def test_a_model_compiled_after_attach_is_left_alone_and_said(tmp_path):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    inner = Transformer()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    handle = attach(inner, tmp_path, every=1)
    model = torch.compile(inner, backend=counter)

    def steps():
        for step in range(4):
            model(batch(step)[0])["logits"].sum().backward()
            optimizer.step()

    with pytest.warns(RuntimeWarning, match=r"after torch\.compile to what it returns"):
        steps()
    handle.detach()
    assert counter.frame_count == 1
    assert "attach to the module that the loop calls" in handle.report().missed["attention"]
    assert [s for s, _ in read(tmp_path).scalars["gradients/total_norm"]] == [0, 1, 2, 3]


class Softmax(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("kind", ["fused", "explicit"])
def test_inductor_keeps_its_graph_and_what_it_fuses_away_is_said(kind, tmp_path):
    inner = Transformer() if kind == "fused" else nn.Sequential(Softmax())
    model = torch.compile(inner.eval())
    x, _ = batch(0)
    with torch.no_grad():
        plain = model(x)
        torch._dynamo.utils.counters.clear()
        with attach(model, tmp_path, capture=["attention"], every=1) as handle:
            outputs = [model(x) for _ in range(3)]
            if kind == "explicit":
                with pytest.warns(
                    RuntimeWarning, match="root: compiled, where an explicit softmax"
                ):
                    handle.detach()
    assert not torch._dynamo.utils.counters["stats"]
    for output in outputs:
        torch.testing.assert_close(output, plain, rtol=0, atol=0)
    found = read(tmp_path).group("val/attention/entropy/", 2)
    if kind == "explicit":
        assert not found
    else:
        rows, h = [], x
        for block in inner.blocks:
            rows.append(entropy(block.attention.probabilities(block.norm(h))))
            h = block(h)
        truth = dict(zip(("root", "root/1"), rows, strict=True))
        assert found == pytest.approx(truth, abs=1e-4)


@pytest.mark.usefixtures("inductor")
def test_a_compiled_module_without_a_map_is_named_beside_others(tmp_path):
    model = nn.Sequential(SelfAttention(), Softmax()).eval()
    model[1].compile(backend="inductor")
    with attach(model, tmp_path, every=1) as handle, torch.no_grad():
        model(batch(0)[0])
    report = handle.report()
    assert report.captured["attention"] == ("0",)
    assert "fused with its neighbours" in report.missed["attention of 1"]


def test_fake_tensors_inside_a_forward_cost_no_other_number(tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Estimates(SelfAttention):
        def forward(self, x):
            with FakeTensorMode(allow_non_fake_inputs=True):
                q = torch.randn(1, 2, 3, 4)
                F.scaled_dot_product_attention(q, q, q)
            return super().forward(x)

    model, (x, _) = Estimates(), batch(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(model, tmp_path, every=1, on_error="raise")
    model(x).sum().backward()
    optimizer.step()
    handle.detach()
    run = read(tmp_path)
    assert "gradients/total_norm" in run.scalars
    assert "attention/entropy/root" in run.scalars


def called_inside(model, x):
    return model.blocks[0](x)


def called_directly(model, x):
    return model.forward(x)


@pytest.mark.parametrize("call", [called_inside, called_directly])
def test_a_forward_that_no_hook_sees_is_said(call, tmp_path):
    model = Transformer()
    handle = attach(model, tmp_path, capture=["attention"], every=1)
    call(model, batch(0)[0])
    with pytest.warns(RuntimeWarning, match=r"attention: .* its \.forward\(\) was called directly"):
        handle.detach()
    assert "attach to the module that the loop calls" in handle.report().missed["attention"]


def test_a_selection_without_attention_is_said(tmp_path):
    model = Transformer()
    include = ["blocks.0.*", "blocks.?.mlp.*", "head.weight"]
    handle = attach(model, tmp_path, capture=["attention"], include=include, every=1)
    model(batch(0)[0])
    with pytest.warns(RuntimeWarning, match="no attention was recognised in the modules") as caught:
        handle.detach()
    assert len(caught) == 1
    report = handle.report()
    assert report.captured["attention"] == ("blocks.0.attention",)
    assert report.missed.keys() == {"attention of blocks.?.mlp.*"}


TABLE, PLACES = torch.randn(8, 8, 8), torch.randn(8, 5)
MODS = {  # with what they add to the scores (8, 8, 8), heads first
    "table alone": (lambda score, b, h, i, j: TABLE[0][i, j], None),
    "table": (lambda score, b, h, i, j: score + TABLE[h][i][j], TABLE),
    "row of a table": (lambda score, b, h, i, j: score + TABLE[0][i][j], TABLE[:1]),
    "product": (
        lambda score, b, h, i, j: score + (PLACES[i] * PLACES[j]).sum(),
        (PLACES @ PLACES.T)[None],
    ),
    "dot": (
        lambda score, b, h, i, j: score + torch.dot(PLACES[i], PLACES[j]),
        (PLACES @ PLACES.T)[None],
    ),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mod", MODS)
def test_score_functions_of_one_score_at_a_time(mod, tmp_path):
    from torch.nn.attention.flex_attention import flex_attention

    function, added = MODS[mod]
    q = torch.randn(2, 8, 8, 4)
    model = nn.Module()
    model.forward = lambda q: flex_attention(q, q, q, function)
    kept, expected = TABLE.clone(), model(q)
    with attach(model, tmp_path, every=1, on_error="raise"):
        assert torch.equal(model(q), expected)
    assert torch.equal(TABLE, kept)
    scores = q.double() @ q.double().mT / 2
    scores = (scores + added) if added is not None else TABLE[0].double().expand(scores.shape)
    found = read(tmp_path).value("attention/entropy/root", 0)
    assert found == pytest.approx(entropy(scores.softmax(-1)), abs=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("modified", [False, True])
def test_flex_attention_with_its_score_and_mask_functions(modified, tmp_path):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k = torch.randn(2, 4, 16, 8) * 2, torch.randn(2, 2, 16, 8) * 2
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])

    class Flex(nn.Module):
        def forward(self, q, k):
            if not modified:
                return flex_attention(q, k, k, enable_gqa=True)
            mask = create_block_mask(lambda b, h, i, j: j <= i + b, 2, None, 16, 16, device="cpu")
            bias = lambda score, b, h, i, j: score - slopes[h] * (i - j)  # noqa: E731  # as written
            return flex_attention(q, k, k, bias, mask, scale=0.5, enable_gqa=True)

    scores = q.double() @ k.repeat_interleave(2, 1).double().mT * (0.5 if modified else 8**-0.5)
    if modified:
        distance = torch.arange(16)[:, None] - torch.arange(16)
        scores -= slopes[:, None, None] * distance
        hidden = distance[None, None] + torch.arange(2)[:, None, None, None] < 0
        scores = scores.masked_fill(hidden, -torch.inf)
    model = Flex()
    expected = model(q, k)
    with attach(model, tmp_path, every=1, on_error="raise"):
        assert torch.equal(model(q, k), expected)
    found = read(tmp_path).value("attention/entropy/root", 0)
    assert found == pytest.approx(entropy(scores.softmax(-1)), abs=1e-5)


class Ragged(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))

    def split(self, x):
        return [part(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.q, self.k, self.v)]

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("context", ["grad", "no_grad", "inference"])
def test_jagged_nested_tensors(context, tmp_path):
    model = Ragged().train(context == "grad")
    samples = [torch.randn(length, 16) * 3 for length in (3, 5, 7)]
    x = torch.nested.nested_tensor(samples, layout=torch.jagged)
    with CONTEXTS[context]():
        plain = model(x)
    with attach(model, tmp_path, every=1, attention_rows=None, on_error="raise") as handle:
        with CONTEXTS[context]():
            seen = model(x)
        assert handle.report().captured["attention"] == ("root",)
    assert torch.equal(seen.values(), plain.values())
    rows = []
    for sample in samples:
        q, k, _ = (part.double() for part in model.split(sample[None]))
        rows.append(torch.special.entr((q @ k.mT / 8**0.5).softmax(-1)).sum(-1).flatten())
    tag = "attention/entropy/root" if model.training else "val/attention/entropy/root"
    found = read(tmp_path).value(tag, 0)
    assert found == pytest.approx(torch.cat(rows).mean().item(), abs=1e-5)


FUNCTIONAL = {
    "vmap": lambda model, x: torch.vmap(model)(x[:, None]),
    "grad": lambda model, x: torch.func.grad(
        lambda p: torch.func.functional_call(model, p, (x,)).sum()
    )(dict(model.named_parameters())),
    "gradients per sample": lambda model, x: torch.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x[None],)).sum()),
        in_dims=(None, 0),
    )(dict(model.named_parameters()), x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", FUNCTIONAL)
def test_function_transforms(how, tmp_path):
    model, (x, _) = SelfAttention(), batch(0, size=6)
    truth = entropy(model.probabilities(x))
    plain = FUNCTIONAL[how](model, x)
    with attach(model, tmp_path, every=1, attention_rows=None, on_error="raise"):
        seen = FUNCTIONAL[how](model, x)
    torch.testing.assert_close(seen, plain, rtol=0, atol=0)
    assert read(tmp_path).value("attention/entropy/root", 0) == pytest.approx(truth, abs=1e-5)


def trace_fx(model, x, mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    return len(make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(x).graph.nodes)


TRACES = {
    "make_fx": lambda model, x: trace_fx(model, x, "real"),
    "make_fx, fake": lambda model, x: trace_fx(model, x, "fake"),
    "export": lambda model, x: len(torch.export.export(model, (x,)).graph.nodes),
    "jit.trace": lambda model, x: str(torch.jit.trace(model, x).graph).count("\n"),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
@pytest.mark.parametrize("how", TRACES)
def test_nothing_of_ours_is_in_a_traced_graph(how, tmp_path):
    model, (x, _) = nn.Sequential(SelfAttention(), Softmax()).eval(), batch(0)
    plain = TRACES[how](model, x)
    with attach(model, tmp_path, every=1, on_error="raise"):
        assert TRACES[how](model, x) == plain


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device(device, tmp_path):
    """As torch.set_default_device does: what we make for ourselves is on the host all the same."""
    model, (x, _) = nn.Sequential(SelfAttention(), Softmax()), batch(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    capture = [*bthooks.capture.wanted.KINDS, "updates", "activations"]
    with torch.device(device):
        handle = attach(model, tmp_path, every=1, capture=capture)
        model(x).sum().backward()
        optimizer.step()
        with pytest.warns(RuntimeWarning, match="uncertainty: the output"):
            handle.detach()
    assert handle.report().missed.keys() == {"uncertainty"}
    run = read(tmp_path)
    assert run.images.keys() == {"attention/head_entropy"}
    assert run.group("attention/entropy/", 0).keys() == {"0", "1"}


def test_a_model_on_the_meta_device_has_nothing_to_measure(tmp_path):
    model = nn.Sequential(SelfAttention(), Softmax()).to("meta")
    with attach(model, tmp_path, every=1, on_error="raise") as handle:
        model(torch.randn(2, 5, 16, device="meta"))
    assert "attention" in handle.report().missed


def test_a_failure_to_measure_is_said_and_the_output_stands(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("bthooks.capture.fused.sums_of_query_key", fail)
    model, (x, _) = SelfAttention(), batch(0)
    expected = model(x)
    with (
        attach(model, tmp_path, every=1) as handle,
        pytest.warns(RuntimeWarning, match="OutOfMemoryError: no memory") as caught,
    ):
        found = [model(x), model(x)]
    assert all(torch.equal(output, expected) for output in found)
    assert len(caught) == 1
    assert "no memory" in str(handle.report())


def test_gradients_flow_through_an_observed_forward(tmp_path):
    model, (x, _) = SelfAttention(), batch(0)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with attach(model, tmp_path, every=1):
        model(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_own_modes_are_left_where_they_are(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    model, (x, _) = SelfAttention(), batch(0)
    with FlopCounterMode(display=False) as plain:
        model(x)
    with FlopCounterMode(display=False) as counted, attach(model, tmp_path, every=1):
        model(x)
    assert counted.get_total_flops() == plain.get_total_flops()
    assert read(tmp_path).group("attention/entropy/", 0).keys() == {"root"}


def test_recursion_of_the_root_is_one_forward(tmp_path):
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = SelfAttention()

        def forward(self, x, depth=2):
            x = self.attention(x)
            return self(x, depth - 1) if depth else x

    model, (x, _) = Tree(), batch(0)
    with attach(model, tmp_path, every=1):
        model(x)
    run = read(tmp_path)
    assert run.group("attention/entropy/", 0).keys() == {"attention", "attention/1", "attention/2"}
    assert torch._C._len_torch_dispatch_stack() == 0


class Wrapped(torch.Tensor):
    """A weight that wraps a tensor and computes with it, as quantised ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [arg.inner if isinstance(arg, Wrapped) else arg for arg in args]
        found = func(*plain, **(kwargs or {}))
        is_view = func.overloadpacket.__name__ in ("t", "detach", "alias", "transpose", "view")
        return Wrapped(found) if is_view else found


@pytest.mark.parametrize("wrap", [lambda weight: weight, Wrapped])
def test_a_mixture_of_experts_is_no_attention(wrap):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(16, 4, bias=False)
            weight = wrap(self.gate.weight.detach())
            self.gate.weight = nn.Parameter(weight, requires_grad=False)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x):
            shares = self.gate(x).softmax(-1)
            return shares.unsqueeze(-2) @ torch.stack([expert(x) for expert in self.experts], -2)

    model = Experts()
    with attach(model, None, every=1, on_error="raise") as handle:
        model(torch.randn(2, 8, 16))
    assert "attention" not in handle.report().captured
