"""Training is bit-identical with and without us: losses, parameters, RNG state."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import bthooks

from .models import Transformer, batch

EXAMPLES = Path(__file__).parent.parent / "examples"
EVERYTHING = (*bthooks.capture.wanted.KINDS, *bthooks.capture.wanted.ON_REQUEST)


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


def plain_loop(model, loss, steps, losses):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
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


def scaled_loop(model, loss, steps, losses):
    """Mixed precision, three micro-batches, and a fused optimizer; one step overflows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(steps):
        for part in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(3 * step + part) * (math.inf if step == 7 else 1)
            scaler.scale(value / 3).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(value.item())


def played_loop(model, loss, steps, losses):
    """Two optimizers take turns."""
    parts = list(model.parameters())[::2], list(model.parameters())[1::2]
    players = [torch.optim.SGD(part, lr=1e-2, momentum=0.9) for part in parts]
    for step in range(steps):
        for player in players:
            value = loss(step)
            value.backward()
            player.step()
            model.zero_grad()
        losses.append(value.item())


def closure_loop(model, loss, steps, losses):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=3)
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            return value

        losses.append(optimizer.step(closure).item())


def checkpointed_loop(model, loss, steps, losses):
    from torch.utils.checkpoint import checkpoint

    for block in model.blocks:
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    plain_loop(model, loss, steps, losses)


def run(build, loop, tmp_path, attached, steps=20):
    torch.manual_seed(3)
    model, loss = build()
    losses = []
    if attached:
        with bthooks.attach(
            model, tmp_path, capture=EVERYTHING, every=1, histograms_every=1, on_error="raise"
        ) as handle:
            loop(model, loss, steps, losses)
        missed = handle.report().missed.keys()
        assert not missed - {"uncertainty", "activations"}
    else:
        loop(model, loss, steps, losses)
    return losses, [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


CASES = [
    (digits, plain_loop),
    (language_model, plain_loop),
    (own, plain_loop),
    (own, scaled_loop),
    (own, played_loop),
    (own, closure_loop),
    (own, checkpointed_loop),
]


@pytest.mark.parametrize(("build", "loop"), CASES)
def test_losses_parameters_and_rng_are_bit_identical(build, loop, tmp_path):
    plain = run(build, loop, tmp_path, attached=False)
    attached = run(build, loop, tmp_path, attached=True)
    assert str(attached[0]) == str(plain[0])  # NaN, where a step overflowed
    for a, b in zip(attached[1], plain[1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(attached[2], plain[2])
