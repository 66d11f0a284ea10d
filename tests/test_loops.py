"""The loops that people write: what is charted is what the optimizer used."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from bthooks import attach

from .conftest import read


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def micro_batch(step, part=0):
    generator = torch.Generator().manual_seed(10 * step + part)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def loss_of(model, step, part=0):
    x, y = micro_batch(step, part)
    return F.mse_loss(model(x), y) * 3


CLIPS = {
    "none": lambda parameters: None,
    "norm": lambda parameters: clip_grad_norm_(parameters, 0.3),
    "value": lambda parameters: clip_grad_value_(parameters, 0.05),
}


def reference(clip, parts, steps):
    """What a run without a scaler applies at each step: total before, total and norms after."""
    model, found = network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        for part in range(parts):
            (loss_of(model, step, part) / parts).backward()
        gradients = [p.grad for p in model.parameters()]
        before = get_total_norm(gradients).item()
        CLIPS[clip](model.parameters())
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        found.append((before, get_total_norm(gradients).item(), norms))
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_equal(run, expected, rel=1e-3):
    for step, (before, total, norms) in enumerate(expected):
        assert run.value("gradients/total_norm_before_clip", step) == pytest.approx(before, rel=rel)
        assert run.value("gradients/total_norm", step) == pytest.approx(total, rel=rel)
        assert run.group("gradients/norm/", step) == pytest.approx(norms, rel=rel)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", ["not", "step", "unscale", "unscale, closure"])
def test_norms_are_those_of_the_unscaled_run(scaled, fused, parts, clip, tmp_path):
    if scaled == "step" and clip != "none":
        pytest.skip("gradients are unscaled before they are clipped")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, enabled=scaled != "not")
    with attach(model, tmp_path, every=1, on_error="raise"):
        for step in range(3):
            for part in range(parts):
                scaler.scale(loss_of(model, step, part) / parts).backward()
            if "unscale" in scaled:
                scaler.unscale_(optimizer)
            CLIPS[clip](model.parameters())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    run = read(tmp_path)
    assert_equal(run, reference(clip, parts, 3))
    skipped = run.scalars.get("gradients/skipped_steps", [])
    assert skipped == ([] if scaled == "not" else [(0, 0.0), (1, 0.0), (2, 0.0)])


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflowed_step_logs_no_gradient_and_is_counted(fused, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    applied = []
    with attach(model, tmp_path, every=1, capture=["gradients", "updates"], on_error="raise"):
        for step in range(14):
            loss = loss_of(model, step) * (math.inf if step in (0, 1, 6, 9) else 1)
            optimizer.zero_grad()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            pairs = zip(model.parameters(), before, strict=True)
            applied.append(any((p != b).any() for p, b in pairs))
    assert applied.count(False) == 4
    run = read(tmp_path)
    good = [step for step, done in enumerate(applied) if done]
    numbers = good if fused else list(range(len(good)))  # who is not called begins no round
    for tag in ("total_norm", "total_norm_before_clip", "norm/0.weight", "update_ratio/0.weight"):
        points = run.scalars[f"gradients/{tag}"]
        assert [number for number, _ in points] == numbers
        assert all(math.isfinite(value) for _, value in points)
    counted = dict(run.scalars["gradients/skipped_steps"])
    done = [applied[:step].count(False) for step in good]
    assert [counted[number] for number in numbers] == done


def test_skipped_steps_are_counted_between_logging_steps_and_after_a_resume(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def train(steps):
        for step in steps:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step) * (math.inf if step % 5 == 4 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()

    with attach(model, tmp_path / "first", every=4, on_error="raise") as handle:
        train(range(13))
        state, kept = handle.state_dict(), scaler.state_dict()
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(kept)
    with attach(model, tmp_path / "resumed", every=4, on_error="raise") as handle:
        handle.load_state_dict(state)
        train(range(13, 22))
    assert read(tmp_path / "first").scalars["gradients/skipped_steps"] == [(0, 0), (4, 1), (8, 2)]
    resumed = read(tmp_path / "resumed").scalars["gradients/skipped_steps"]
    assert resumed[-1] == (16, 4)


@pytest.mark.parametrize("power", [10, 13.7])
def test_a_scale_that_can_not_be_found_is_said_and_left_out(power, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)

    def train():
        with attach(model, tmp_path, every=1) as handle:
            for step in range(3):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, step)).backward()
                scaler.unscale_(optimizer)
                optimizer.step()
                scaler.update()
        return handle

    with pytest.warns(RuntimeWarning, match="total_norm_before_clip: left out"):
        handle = train()
    assert "gradients/total_norm_before_clip" in handle.report().missed
    run = read(tmp_path)
    assert "gradients/total_norm_before_clip" not in run.scalars
    for step, (_, total, norms) in enumerate(reference("none", 1, 3)):
        assert run.value("gradients/total_norm", step) == pytest.approx(total, rel=1e-3)
        assert run.group("gradients/norm/", step) == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_measured_in_float32(autocast, tmp_path):
    model = network().to(torch.float32 if autocast else torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, tmp_path, every=1, on_error="raise"):
        x, y = micro_batch(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.mse_loss(model(x if autocast else x.bfloat16()).float(), y)
        loss.backward()
        optimizer.step()
    run = read(tmp_path)
    for name, parameter in model.named_parameters():
        exact = parameter.grad.double().norm().item()
        assert run.value(f"gradients/norm/{name}", 0) == pytest.approx(exact, rel=1e-6)
