import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

import bthooks
from bthooks import decompose_uncertainty, mc_dropout

from ..conftest import read
from ..models import Transformer, batch


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([0.0, 1.0, 20.0, 200.0]),
    st.integers(0, 10**6),
)
def test_entropies_are_those_of_scipy(samples, size, classes, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(samples, size, classes, generator=generator) * sharpness).softmax(-1)
    found = decompose_uncertainty(p)
    double = p.double().numpy()
    total = stats.entropy(double.mean(0), axis=-1)
    aleatoric = stats.entropy(double, axis=-1).mean(0)
    for kind, expected in (
        ("total", total),
        ("aleatoric", aleatoric),
        ("epistemic", total - aleatoric),
    ):
        assert found[kind].shape == (size,)
        assert found[kind].numpy() == pytest.approx(expected, abs=2e-6)
        assert (found[kind] >= 0).all()


def test_probabilities_above_one_by_rounding_have_no_entropy_below_0():
    found = decompose_uncertainty(torch.full((3, 2, 1), 1 + 1e-7))
    assert all((value >= 0).all() for value in found.values())
    with pytest.raises(TypeError, match="real tensors, got list"):
        decompose_uncertainty([[0.5, 0.5]])


def test_variances_follow_the_law_of_total_variance():
    mean, variance = torch.randn(6, 4), torch.rand(6, 4)
    found = decompose_uncertainty(mean=mean, variance=variance)
    draws = mean.double() + variance.double().sqrt() * torch.randn(200_000, 6, 4).double()
    assert found["total"].numpy() == pytest.approx(draws.var((0, 1)).numpy(), rel=0.02)
    assert found["epistemic"].numpy() == pytest.approx(np.var(mean.numpy(), axis=0), rel=1e-5)
    alone = decompose_uncertainty(mean=mean)
    assert torch.equal(alone["total"], alone["epistemic"])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"probabilities": torch.rand(3)},
        {"probabilities": torch.rand(2, 3, 4), "mean": torch.rand(2, 3)},
        {"probabilities": torch.rand(2, 3, 4), "variance": torch.rand(2, 3)},
        {"mean": torch.rand(2, 3), "variance": torch.rand(3)},
    ],
)
def test_other_shapes_are_refused(given):
    with pytest.raises(ValueError, match="decompose_uncertainty"):
        decompose_uncertainty(**given)


class Attended(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


MODELS = {
    "module": lambda: nn.Dropout(0.5),
    "function": Functional,
    "attention": Attended,
    "torch": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_active_and_nothing_else_changes(name, training):
    inner = MODELS[name]()
    norms = [nn.BatchNorm1d(6), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))]
    model = nn.Sequential(*norms, inner).train(training)
    x = torch.randn(4, 6, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    outputs = mc_dropout(model, x, samples=5)
    assert outputs.shape == (5, 4, 6, 8)
    assert not outputs.requires_grad
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 5
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("inplace", [False, True])
def test_the_mean_over_many_samples_is_the_output_in_eval(inplace):
    model = nn.Sequential(nn.Dropout(0.5, inplace=inplace), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 8)
    before = x.clone()
    mean = mc_dropout(model, x, samples=20_000).mean(0)
    assert torch.equal(x, before)
    assert torch.allclose(mean, model(x), atol=0.05)


class Counting(nn.Module):
    """Buffers written without a new version, replaced, resized, shared out and lazy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("resized", torch.zeros(0))
        self.register_buffer("expanded", torch.arange(3.0)[:1].expand(3))

    def forward(self, x):
        x = F.batch_norm(x, self.mean, self.variance, training=self.training)
        if self.training:
            self.replaced = self.replaced * 0.9 + x.mean(0)
            self.resized.resize_(3).copy_(x.mean(0))
        return F.dropout(x, 0.5, self.training)


def test_buffers_are_as_before_however_they_were_changed():
    model = Counting().eval()
    buffers = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    mc_dropout(model, torch.randn(64, 3) + 5)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, values[name]), name
    mc_dropout(nn.Sequential(nn.LazyBatchNorm1d(), nn.Dropout()).eval(), torch.randn(4, 3))


def test_an_exception_leaves_everything_as_it_was():
    class Failing(nn.Module):
        def forward(self, x):
            torch.rand(3)
            raise KeyError("mine")

    model, x = nn.Sequential(nn.BatchNorm1d(3), Failing()).eval(), torch.randn(2, 3)
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="mine"):
        mc_dropout(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_outputs_of_any_structure_and_keywords():
    class Model(nn.Module):
        def forward(self, x, *, factor):
            return {
                "logits": F.dropout(x, 0.5, self.training) * factor,
                "name": "a",
                "pair": (x, 3),
            }

    found = mc_dropout(Model(), torch.ones(2, 4), factor=3.0, samples=7)
    assert found["logits"].shape == (7, 2, 4)
    assert set(found["logits"].flatten().tolist()) == {0.0, 6.0}
    assert found["name"] == "a"
    assert found["pair"][0].shape == (7, 2, 4)
    assert found["pair"][1] == 3


@dataclasses.dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    parts: dict[str, torch.Tensor]
    name: str = "a"


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make, self.kept = make, torch.zeros(2, 4)

    def forward(self, x):
        return self.make(self.kept.copy_(F.dropout(x, 0.5, self.training)))


def test_a_dataclass_is_stacked_and_what_can_not_be_is_refused():
    found = mc_dropout(Returning(lambda y: Output(y, {"a": y})), torch.ones(2, 4), samples=9)
    assert type(found) is Output
    assert found.name == "a"
    assert len({tuple(sample.flatten().tolist()) for sample in found.logits}) > 1
    assert torch.equal(found.logits, found.parts["a"])
    with pytest.raises(TypeError, match="returns a Normal, in which no tensor is found; wrap"):
        mc_dropout(Returning(lambda y: torch.distributions.Normal(y, 1.0)), torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        mc_dropout(lambda x: x, torch.ones(2))


def test_a_model_without_dropout_is_said():
    with pytest.warns(RuntimeWarning, match="the samples are identical"):
        mc_dropout(nn.Linear(2, 2), torch.ones(1, 2), samples=2)
    mc_dropout(nn.Linear(2, 2), torch.ones(1, 2), samples=1)
    with pytest.raises(ValueError, match="samples"):
        mc_dropout(nn.Linear(2, 2), torch.ones(1, 2), samples=0)


def test_an_attachment_does_not_see_the_samples(tmp_path):
    """Two runs, one of them with samples in between, write the same."""

    def run(name, sampled):
        torch.manual_seed(0)
        model = Transformer()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with bthooks.attach(model, tmp_path / name, every=1) as handle:
            for step in range(3):
                model(batch(step)[0])["logits"].sum().backward()
                if sampled:
                    mc_dropout(model, batch(step + 9)[0], samples=2)
                optimizer.step()
                optimizer.zero_grad()
            assert handle.step == 3
        return read(tmp_path / name).scalars

    assert run("plain", False) == run("sampled", True)


def test_decomposed_samples_are_logged(tmp_path):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3), nn.Softmax(-1))
    found = decompose_uncertainty(mc_dropout(model, torch.ones(16, 8)))
    with bthooks.make_writer(tmp_path, "run") as writer:
        bthooks.log_uncertainty_metrics(writer, found["epistemic"], 0, aleatoric=found["aleatoric"])
    run = read(tmp_path)
    total = run.value("uncertainty/total", 0)
    assert total == pytest.approx(found["total"].mean().item(), rel=1e-5)
    assert 0 < total < math.log(3)
