"""The loops that people write: what is charted is what the optimizer used."""

import math

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from bthooks import attach

from .conftest import read
from .models import Transformer, batch


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


def checkpointed(model, reentrant):
    from torch.utils.checkpoint import checkpoint

    for block in model.blocks:
        inner = block.forward

        def forward(x, inner=inner):
            return checkpoint(inner, x, use_reentrant=reentrant)

        block.forward = forward
    return model


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_numbers(reentrant, tmp_path):
    for name in ("plain", "checkpointed"):
        torch.manual_seed(0)
        model = Transformer()
        if name == "checkpointed":
            checkpointed(model, reentrant)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with attach(model, tmp_path / name, every=1, on_error="raise"):
            for step in range(3):
                torch.manual_seed(step)
                x, y = batch(step)
                x.requires_grad_()  # reentrant checkpoints ask for it
                F.cross_entropy(model(x)["logits"], y).backward()
                clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    plain, checked = (read(tmp_path / name) for name in ("plain", "checkpointed"))
    assert checked.scalars.keys() == plain.scalars.keys()
    for tag, points in plain.scalars.items():
        assert checked.scalars[tag] == [(s, pytest.approx(v, rel=1e-5)) for s, v in points], tag


class Game(nn.Module):
    """A generator and a discriminator in one module."""

    def __init__(self):
        super().__init__()
        self.g, self.d = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, z):
        return self.d(self.g(z))


def play(model, optimizers, step, keep):
    """One step of each player; the gradients of the other are left where they are."""
    for player, optimizer in enumerate(optimizers):
        loss = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)))
        (loss.mean() * (-3, 2)[player]).backward()
        keep(player)
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
        optimizer.step()
        model.zero_grad()


def test_two_players_and_one_backward_for_two_optimizers(tmp_path):
    torch.manual_seed(0)
    model = Game()
    players = [torch.optim.SGD(part.parameters(), 0.1) for part in (model.d, model.g)]
    parts, before = (model.d, model.g), []

    def keep(player):
        gradients = [p.grad for p in parts[player].parameters()]
        before.append(get_total_norm(gradients).item())

    with attach(model, tmp_path / "game", every=1, on_error="raise"):
        for step in range(3):
            play(model, players, step, keep)
    run = read(tmp_path / "game")
    totals = [math.hypot(*before[2 * step : 2 * step + 2]) for step in range(3)]
    points = run.scalars["gradients/total_norm_before_clip"]
    assert points == [(s, pytest.approx(v, rel=1e-5)) for s, v in enumerate(totals)]
    points = run.scalars["gradients/total_norm"]
    assert points == [(s, pytest.approx(0.1 * 2**0.5, rel=1e-3)) for s in range(3)]

    totals = []
    with attach(model, tmp_path / "once", every=2, on_error="raise"):
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            totals.append(get_total_norm([p.grad for p in model.parameters()]).item())
            clip_grad_norm_(model.parameters(), 0.1)
            for optimizer in players:
                optimizer.step()
            model.zero_grad()
    points = read(tmp_path / "once").scalars["gradients/total_norm_before_clip"]
    assert points == [(s, pytest.approx(totals[s], rel=1e-5)) for s in (0, 2)]


def test_odd_optimizers_and_gradients(tmp_path):
    """Sparse gradients, a rate per parameter, a tensor rate, schedulers, zeroed gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Linear(4, 2))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD(
        [
            {"params": [model[0].weight], "lr": 0.25, "name": "embedding"},
            *({"params": [p]} for p in model[1].parameters()),
        ],
        lr=rate,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    exact = []
    with attach(model, tmp_path, every=1, on_error="raise"):
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            model(torch.tensor([[1, 1, 2], [3, 1, 0]])).square().sum().backward()
            grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
            exact.append(get_total_norm(grads).item())
            optimizer.step()
            scheduler.step()
    run = read(tmp_path)
    for tag in ("gradients/total_norm", "gradients/total_norm_before_clip"):
        assert [v for _, v in run.scalars[tag]] == pytest.approx(exact, rel=1e-5)
    rates = {"embedding": 0.25, "1": 0.5, "2": 0.5}
    for step in range(4):
        found = run.group("learning_rate/", step)
        assert found == pytest.approx({name: r * 0.5**step for name, r in rates.items()})


@pytest.mark.parametrize("how", ["whole", "regional"])
@pytest.mark.parametrize("first", [True, False])
def test_compiled_training_keeps_its_graphs(how, first, tmp_path):
    """`first`: it is compiled and has run before it is attached to."""

    def train(attached):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        torch.manual_seed(0)
        model = Transformer()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []

        def steps(count):
            for step in range(count):
                x, y = batch(step)
                loss = F.cross_entropy(model(x)["logits"], y)
                loss.backward()
                clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())

        if how == "regional":
            for block in model.blocks:
                block.compile(backend=counter)
        else:
            model = torch.compile(model, backend=counter)
        if first:
            steps(2)
        if attached:
            with attach(model, tmp_path, every=5, on_error="raise") as handle:
                steps(50)
            assert handle.report().captured["attention"]
        else:
            steps(50)
        return losses, counter.frame_count, counter.op_count

    plain, attached = train(False), train(True)
    assert attached == plain
    run = read(tmp_path)
    steps = list(range(0, 50, 5))
    for tag in ("gradients/total_norm", "gradients/total_norm_before_clip"):
        assert [step for step, _ in run.scalars[tag]] == steps
    names = ["root", "root/1"] if how == "whole" else ["blocks.0", "blocks.1"]
    assert list(run.group("attention/entropy/", 45)) == names


def test_flattened_parameters_of_deepspeed_are_said(tmp_path):
    class Engine(nn.Module):
        """In the shape of deepspeed.DeepSpeedEngine, which needs several machines' compilers."""

        __module__ = "deepspeed.runtime.engine"

        def __init__(self):
            super().__init__()
            self.module = network()

        def forward(self, x):
            return self.module(x)

    engine = Engine()
    optimizer = torch.optim.SGD(engine.parameters(), 0.1)
    with pytest.warns(RuntimeWarning, match="gradients: not measured under Engine") as caught:
        handle = attach(engine, tmp_path, every=1)
    for step in range(3):
        loss_of(engine, step).backward()
        optimizer.step()
    handle.detach()
    assert len(caught) == 1
    scalars = read(tmp_path).scalars
    assert [step for step, _ in scalars["learning_rate/0"]] == [0, 1, 2]
    assert not any(tag.startswith("gradients/") for tag in scalars)
