"""Training is bit-identical with and without us: losses, parameters, RNG state."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import bthooks

from .models import Transformer, batch

EXAMPLES = Path(__file__).parent.parent / "examples"
EVERYTHING = (*bthooks.handle.KINDS, *bthooks.handle.ON_REQUEST)


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits():
    module = example("digits")
    x, y, _, _ = module.digits()
    model = module.BayesianViT()

    def loss(step):
        part = slice(32 * step, 32 * step + 32)
        return F.nll_loss(model(x[part])["probabilities"].clamp_min(1e-9).log(), y[part])

    return model, loss


def language_model():
    module = example("language_model")
    _, windows = module.corpus()
    model = module.GPT(width=32, layers=2)
    return model, lambda step: model.loss(windows[4 * step : 4 * step + 4])


def own():
    model = Transformer()

    def loss(step):
        x, y = batch(step)
        return F.cross_entropy(model(x)["logits"], y)

    return model, loss


def run(build, tmp_path, attached, steps=20):
    torch.manual_seed(3)
    model, loss = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []

    def train():
        for step in range(steps):
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(value.item())
            if step % 5 == 4:
                model.eval()
                losses.append(loss(step).item())
                model.train()

    if attached:
        with bthooks.attach(
            model, tmp_path, capture=EVERYTHING, every=1, histograms_every=1, on_error="raise"
        ) as handle:
            train()
        missed = handle.report().missed.keys()
        assert not missed - {"uncertainty", "activations"}
    else:
        train()
    return losses, [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("build", [digits, language_model, own])
def test_losses_parameters_and_rng_are_bit_identical(build, tmp_path):
    plain = run(build, tmp_path, attached=False)
    attached = run(build, tmp_path, attached=True)
    assert attached[0] == plain[0]
    for a, b in zip(attached[1], plain[1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(attached[2], plain[2])
