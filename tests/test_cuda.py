"""What only a GPU can show; skipped without one."""

import pytest
import torch

from bthooks import attach, mc_dropout

from .conftest import read
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
    assert len(mc_dropout(torch.nn.Dropout(), torch.ones(8, device="cuda"), samples=2)) == 2
    assert torch.equal(torch.cuda.get_rng_state(), state)
