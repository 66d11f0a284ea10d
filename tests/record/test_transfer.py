import pytest
import torch
from torch import nn

from bthooks import attach
from bthooks.record.transfer import Transfer

from ..conftest import read
from ..models import Transformer, batch


def test_order_shape_and_value_are_kept_across_dtypes():
    tensors = [
        torch.tensor(0.1),
        torch.tensor([1, 2**40]),
        torch.tensor([[1.5], [2.5]]).bfloat16(),
        torch.tensor(True),
        torch.empty(0),
        torch.tensor(0.2),
        torch.tensor(0.1, dtype=torch.double),
    ]
    found = Transfer(iter(tensors)).result()
    for a, b in zip(found, tensors, strict=True):
        if b.dim():
            assert a.dtype == torch.float64
            assert a.tolist() == b.double().tolist()
        else:
            assert a == b.double().item()
    assert Transfer([]).result() == []


def test_what_has_not_arrived_is_written_later_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(Transfer, "is_done", lambda transfer: False)
    kept = []
    result = Transfer.result
    monkeypatch.setattr(Transfer, "result", lambda t: kept.append(t) or result(t))
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(batch(0)[0])["logits"].sum().backward()
            optimizer.step()

    def written():
        handle.writer.flush()
        return [step for step, _ in read(tmp_path).scalars.get("gradients/total_norm", [])]

    handle = attach(model, tmp_path, every=3)
    train(3)  # step 0 is under way
    assert written() == []
    train(2)  # step 3 as well: it does not overtake
    assert written() == [0]
    handle.flush()
    assert written() == [0, 3]
    train(3)
    handle.detach()
    assert written() == [0, 3, 6]
    assert len(kept) == len(set(map(id, kept)))  # each was waited for once


def test_a_device_that_fails_does_not_fail_the_step(tmp_path, monkeypatch):
    def fail(transfer):
        raise RuntimeError("CUDA error")

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    handle = attach(model, tmp_path, every=1)

    def train():
        for _ in range(3):
            model(torch.ones(1, 2)).mean().backward()
            optimizer.step()

    monkeypatch.setattr(Transfer, "is_done", fail)
    with pytest.warns(RuntimeWarning, match="CUDA error") as caught:
        train()
    monkeypatch.undo()
    handle.detach()
    assert len(caught) == 1
    assert "lost: " in handle.report().missed["event file"]
