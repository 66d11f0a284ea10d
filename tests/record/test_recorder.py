import unittest.mock

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from torch import nn

import bthooks
from bthooks import attach
from bthooks.__main__ import main

from ..conftest import read
from ..models import Transformer, batch


@pytest.mark.parametrize("back_to", [0, 1, 4, 6])
def test_a_rollback_supersedes_the_abandoned_branch(back_to, tmp_path, backend, capsys):
    """In one process: the state of an earlier step is loaded, and the run goes on otherwise."""
    model, x = nn.Linear(4, 2), torch.ones(1, 4)
    optimizer, states = torch.optim.SGD(model.parameters(), 1e-9), {}

    def go_on(scales):
        for scale in scales:
            states.setdefault(handle.step, handle.state_dict())
            optimizer.zero_grad()
            (scale * model.train()(x).sum()).backward()
            bthooks.log_metrics(handle.writer, {"scale": scale}, handle.step)
            optimizer.step()
            model.eval()(x)

    quiet = bthooks.Thresholds(exploding=100.0)
    with attach(
        model, tmp_path, every=1, histograms_every=1, backend=backend, thresholds=quiet
    ) as handle:
        with pytest.warns(RuntimeWarning, match="exploding_gradients: root: step 4") as told:
            go_on([1.0] * 3 + [100.0] * 4)
        handle.load_state_dict(states[back_to])
        assert handle.step == back_to
        assert len(handle.alerts) == (back_to > 4)
        go_on([2.0] * 4)
    assert len(told) == 1
    run, end = read(tmp_path), back_to + 4
    kept = [1.0] * min(3, back_to) + [100.0] * max(0, back_to - 3)
    assert [s for s, _ in run.scalars["gradients/total_norm"]] == list(range(end))
    norms = [value / 10**0.5 for _, value in run.scalars["gradients/total_norm"]]
    assert norms == pytest.approx([*kept, 2.0, 2.0, 2.0, 2.0])
    assert [value for _, value in run.scalars["train/scale"]] == [*kept, 2.0, 2.0, 2.0, 2.0]
    assert [s for s, _ in run.histograms["gradients/distribution/bias"]] == list(range(end))
    # What serves where TensorBoard's faster reader is not installed.
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    assert [e.step for e in events.Tensors("gradients/total_norm")] == list(range(end))
    assert [e.step for e in events.Tensors("custom_scalars__config__")][-1] <= back_to
    assert main([str(tmp_path), "--report"]) == 0
    report = capsys.readouterr().out
    assert ("over  exploding_gradients: root: step 4" in report) == (back_to > 4)
    assert f"step {end - 1}\n" in report


def test_a_rollback_on_a_writer_without_a_file_is_said():
    model, writer = nn.Linear(2, 2), unittest.mock.Mock()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step():
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    with attach(model, writer, every=1) as handle:
        step()
        state = handle.state_dict()
        step()
        with pytest.warns(RuntimeWarning, match="resume: the writer is no SummaryWriter"):
            handle.load_state_dict(state)
        step()
    calls = [call.args for call in writer.add_scalar.call_args_list]
    assert [step for tag, _, step in calls if tag == "learning_rate/0"] == [0, 1, 1]


def test_inference_that_is_resumed_keeps_its_points(tmp_path):
    model, (x, _) = Transformer().eval(), batch(0)
    with attach(model, tmp_path, every=1) as handle:
        for _ in range(2):
            for _ in range(3):
                model(x)
            handle.load_state_dict(handle.state_dict())
        assert handle.step == 6
    points = read(tmp_path).scalars["val/uncertainty/epistemic"]
    assert [step for step, _ in points] == list(range(6))


@pytest.mark.filterwarnings("ignore:bthooks. exploding_gradients")
def test_a_step_may_be_of_numpy(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    with attach(model, tmp_path, every=1, step=np.int64(3)) as handle:
        for _ in range(4):
            (model(torch.ones(1, 2)).sum() * 100).backward()
            optimizer.step()
    (alert,) = handle.alerts
    assert alert.step == 4
    assert [step for step, _ in read(tmp_path).scalars["gradients/total_norm"]] == [3, 4, 5, 6]
