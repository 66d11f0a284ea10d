"""Forwards: which belong to a step, which to a validation pass, and which to neither."""

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import bthooks
from bthooks import attach
from bthooks.capture import forward as capture

from .conftest import Kept, read
from .models import SelfAttention, entropy


class Model(nn.Module):
    """Self-attention, whose entropy is that of what it is given; and an uncertainty."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.attention, self.checkpointed = SelfAttention(8, 2), checkpointed

    def forward(self, x):
        return {"loss": self.attention(x).square().mean(), "uncertainty": x.square().mean((1, 2))}


def inputs(seed, size=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, 8, generator=generator) * 4


def observed(monkeypatch):
    """How many forwards are looked into."""
    seen = []

    class Counted(capture.ObservedForward):
        def __init__(self, *args, **kwargs):
            seen.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("bthooks.wiring.ObservedForward", Counted)
    return seen


def rollout(model):
    with torch.no_grad():
        for seed in range(3):
            model(inputs(100 + seed))


def inference_mode(model):
    with torch.inference_mode():
        model(inputs(100))


def mc_dropout_by_hand(model):
    model.eval()
    model.train()  # what a user does for dropout's sake
    rollout(model)


def nested(model):
    with torch.no_grad(), torch.enable_grad(), torch.no_grad():
        model(inputs(100))


ROLLOUTS = {f.__name__: f for f in (rollout, inference_mode, mc_dropout_by_hand, nested)}


@pytest.mark.parametrize("name", ROLLOUTS)
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_forwards_without_grad_in_training_belong_to_no_step(name, place, monkeypatch):
    model, writer, expected = Model(), Kept(), []
    optimizer = SGD(model.parameters(), 0.1)
    seen = observed(monkeypatch)
    with attach(model, writer, every=1, on_error="raise") as handle:
        if place == "before":
            ROLLOUTS[name](model)
            assert not seen
            handle.flush()
            assert not writer.scalars
        for step in range(3):
            x = inputs(step)
            expected.append(entropy(model.attention.probabilities(x)))
            if place == "between":
                ROLLOUTS[name](model)
            loss = model(x)["loss"]
            if place == "after":
                ROLLOUTS[name](model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) == 3
    found = writer.scalars["attention/entropy/attention"]
    assert found == [(at, pytest.approx(nats, abs=1e-4)) for at, nats in enumerate(expected)]
    uncertainty = [v for _, v in writer.scalars["uncertainty/total"]]
    squares = [inputs(step).square().mean().item() for step in range(3)]
    assert uncertainty == pytest.approx(squares)
    assert not [tag for tag in writer.scalars if tag.startswith("val/")]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_the_root_is_no_rollout(reentrant):
    """Reentrant checkpointing runs the forward without grad first, and with grad in backward."""
    model, writer, expected = Model(), Kept(), []
    optimizer = SGD(model.parameters(), 0.1)
    with attach(model, writer, every=1, on_error="raise") as handle:
        for step in range(3):
            x = inputs(step).requires_grad_()
            expected.append(entropy(model.attention.probabilities(x)))
            loss = checkpoint(lambda x: model(x)["loss"], x, use_reentrant=reentrant)
            loss.backward()
            optimizer.step()
        assert handle.step == 3
    found = writer.scalars["attention/entropy/attention"]
    assert found == [(at, pytest.approx(nats, abs=1e-4)) for at, nats in enumerate(expected)]


def validate(model, seeds, size=2):
    """A validation pass: of its first forward the entropy, of all the mean uncertainty by rows."""
    training = model.training
    model.eval()
    first, rows = None, []
    with torch.no_grad():
        for at, seed in enumerate(seeds):
            x = inputs(seed, size if at < len(seeds) - 1 else 1)  # the last batch is smaller
            first = entropy(model.attention.probabilities(x)) if first is None else first
            rows.append(model(x)["uncertainty"])
    model.train(training)
    return first, torch.cat(rows).double().mean().item(), torch.cat(rows)


def step_of(model, optimizer, seed):
    optimizer.zero_grad()
    model(inputs(seed))["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_validation_pass_is_one_point(before, backend, tmp_path, monkeypatch):
    """At the number of the step just done, or of the first one; as cheap before it as after it."""
    model, expected, seen = Model(), {}, observed(monkeypatch)
    optimizer = SGD(model.parameters(), 0.1)
    with attach(model, tmp_path, backend=backend, every=10, histograms_every=1) as handle:
        for at in range(before):
            passed = validate(model, range(10 * at, 10 * at + 10))
            expected[0] = [*expected.get(0, []), passed]
        assert len(seen) == bool(before)
        for step in range(1, 13):
            step_of(model, optimizer, step)
            if step in (6, 12):
                expected[step - 1] = [validate(model, range(step, step + 5))]
        assert handle.step == 12
    assert len(seen) == bool(before) + 2 + 12  # histograms are due at each step
    found = read(tmp_path)
    points = found.scalars["val/attention/entropy/attention"]
    assert points == [(at, pytest.approx(v[0][0], abs=1e-4)) for at, v in expected.items()]
    points, drawn = (
        found.scalars["val/uncertainty/total"],
        dict(found.histograms["val/uncertainty/distribution/total"]),
    )
    assert [step for step, _ in points] == [*expected]
    for step, value in points:
        rows = torch.cat([rows for _, _, rows in expected[step]])
        assert value == pytest.approx(rows.double().mean().item(), rel=1e-5)
        assert drawn[step].num == len(rows)
        assert drawn[step].sum == pytest.approx(rows.double().sum().item(), rel=1e-5)


def test_what_a_user_logs_of_a_validation_keeps_its_numbers(tmp_path):
    model = Model()
    optimizer = SGD(model.parameters(), 0.1)
    writer = bthooks.make_writer(tmp_path, "run")
    with attach(model, writer, every=1) as handle:
        for step in range(4):
            step_of(model, optimizer, step)
            validate(model, [step, step + 1])
            bthooks.log_metrics(writer, {"loss": 0.5}, handle.step - 1, prefix="val")
            p, y = torch.rand(64, 3).softmax(-1), torch.randint(3, (64,))
            bthooks.log_calibration(writer, p, y, handle.step - 1, prefix="val")
    writer.close()
    run = read(tmp_path)
    for tag in ("loss", "calibration/ece", "uncertainty/total", "attention/mean_entropy"):
        assert [step for step, _ in run.scalars[f"val/{tag}"]] == [0, 1, 2, 3], tag


def test_a_model_that_is_attached_in_eval_infers_a_step_each():
    model, writer = Model().eval(), Kept()
    with attach(model, writer, every=1), torch.no_grad():
        for seed in range(3):
            model(inputs(seed))
    assert [step for step, _ in writer.scalars["val/uncertainty/total"]] == [0, 1, 2]


def test_forwards_of_mc_dropout_and_those_that_raise_are_not_of_the_pass():
    model, writer = Model(), Kept()
    optimizer = SGD(model.parameters(), 0.1)
    with attach(model, writer, every=1):
        step_of(model, optimizer, 0)
        _, mean, _ = validate(model, [1, 2])
        model.eval()
        with torch.no_grad(), pytest.warns(RuntimeWarning, match="identical"):
            bthooks.mc_dropout(model, inputs(7), samples=2)
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 5, 7))
    assert writer.scalars["val/uncertainty/total"] == [(0, pytest.approx(mean))]


def test_a_pass_that_was_flushed_is_written_once(tmp_path):
    """As a checkpoint in its middle does."""
    model = Model()
    optimizer = SGD(model.parameters(), 0.1)
    with attach(model, tmp_path, every=1) as handle:
        step_of(model, optimizer, 0)
        *_, rows = validate(model, [1, 2])
        state = copy.deepcopy(handle.state_dict())
        *_, more = validate(model, [3])
        step_of(model, optimizer, 1)
        handle.load_state_dict(state)
        step_of(model, optimizer, 1)
    mean = torch.cat([rows, more]).double().mean().item()
    assert read(tmp_path).scalars["val/uncertainty/total"] == [(0, pytest.approx(mean))]


def test_a_step_that_is_compiled_has_nothing_of_ours_and_it_is_said():
    def train(how, attached):
        torch._dynamo.reset()
        torch.manual_seed(0)
        counter, model, losses = CompileCounter(), nn.Linear(8, 4), []
        optimizer = torch.optim.Adam(model.parameters(), 0.1)

        def forward():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 8)).square().mean()
            loss.backward()
            return loss

        def whole():
            loss = forward()
            optimizer.step()
            return loss

        step = {"function": lambda: optimizer.step(), "method": optimizer.step}.get(how)
        step = step and torch.compile(step, backend=counter)
        run = whole if step else torch.compile(whole, backend=counter)
        handle = attach(model, None, every=2) if attached else None
        for _ in range(6):
            loss = forward() if step else run()
            if step:
                step()
            losses.append(loss.item())
        if handle is not None:
            handle.detach()
        return losses, counter.frame_count

    for how in ("function", "method", "whole"):
        plain = train(how, attached=False)
        with pytest.warns(RuntimeWarning, match=r"handle\.advance\(\)"):
            assert train(how, attached=True) == plain
