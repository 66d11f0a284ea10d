"""What only a GPU can show; skipped without one."""

import math

import pytest
import torch
from torch import nn

from bthooks import attach, mc_dropout
from bthooks.torch_private import is_captured

from .conftest import Kept, read
from .models import Transformer, batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("kinds", [None, ("attention", "gradients", "activations", "updates")])
def test_an_attached_step_never_waits_for_the_device(kinds, tmp_path):
    model = Transformer().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    x = batch(0)[0].cuda()
    handle = attach(model, tmp_path, every=1, histograms_every=2, capture=kinds, on_error="raise")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.zero_grad()
            model(x)["logits"].sum().backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    handle.detach()
    assert [step for step, _ in read(tmp_path).scalars["gradients/total_norm"]] == list(range(5))


def test_samples_leave_the_random_numbers_of_the_device():
    state = torch.cuda.get_rng_state()
    assert len(mc_dropout(nn.Dropout(), torch.ones(8, device="cuda"), samples=2)) == 2
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["foreach", "fused", "capturable"])
def test_the_norms_are_those_before_the_update(mode):
    model, run, norms = nn.Linear(6, 6).cuda(), Kept(), []
    optimizer = torch.optim.Adam(model.parameters(), 0.01, **{mode: True})
    with attach(model, run, every=1, on_error="raise"):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6, device="cuda")).square().sum().backward()
            norms.append(math.hypot(*(p.grad.double().norm().item() for p in model.parameters())))
            optimizer.step()
    assert run.scalars["gradients/total_norm"] == [
        (step, pytest.approx(norm, rel=1e-5)) for step, norm in enumerate(norms)
    ]


def captured(graph, step):
    with torch.cuda.graph(graph):
        step()
        assert is_captured()


def test_a_captured_step_has_nothing_of_ours_and_it_is_said():
    model, run = nn.Linear(6, 6).cuda(), Kept()
    optimizer = torch.optim.Adam(model.parameters(), 0.01, capturable=True)
    x = torch.randn(4, 6, device="cuda")

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    with attach(model, run, every=1):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with pytest.warns(RuntimeWarning, match="captured in a CUDA graph"):
            captured(graph, step)
        before = model.weight.clone()
        graph.replay()
        assert not torch.equal(model.weight, before)
    assert [step for step, _ in run.scalars["gradients/total_norm"]] == [0, 1, 2]
