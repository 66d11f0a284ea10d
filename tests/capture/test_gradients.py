"""Gradients: those that the optimizer was given, whatever it makes of them in its step."""

import functools
import inspect
import itertools
import math
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bthooks import attach
from tests.conftest import Kept, read

EXTRAS = (
    {"weight_decay": 0.1},
    {"maximize": True},
    {"momentum": 0.9, "nesterov": True},
    {"nesterov": False},
    {"amsgrad": True},
    {"momentum": 0.9, "centered": True},
    {"decoupled_weight_decay": True},
    {"line_search_fn": "strong_wolfe"},
)


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6, bias), nn.Tanh(), nn.Linear(6, 6, bias))


def data(at):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(at))


def ways():
    """Every class of torch.optim with each way to run it, each with each option."""
    for name, kind in sorted(vars(torch.optim).items()):
        if not inspect.isclass(kind) or not issubclass(kind, Optimizer):
            continue
        if name in ("Optimizer", "SparseAdam"):  # the latter has a test of its own
            continue
        has = inspect.signature(kind).parameters
        modes = [{}, {"foreach": True}, {"fused": True}]
        modes += [{"capturable": True}, {"capturable": True, "foreach": True}]
        modes = [mode for mode in modes if set(mode) <= set(has)]
        extras = [{}] + [extra for extra in EXTRAS if set(extra) <= set(has)]
        for mode, extra in itertools.product(modes, extras):
            for closure in (True,) if name == "LBFGS" else (False,) if extra else (False, True):
                words = f"{name} {mode | extra}{', closure' * closure}"
                yield functools.partial(kind, lr=0.01, **mode, **extra), closure, words


class OwnOptimizer(Optimizer):
    """One that a user writes."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group["lr"])
        return loss


class Overwriting(OwnOptimizer):
    def update(self, p, lr):
        p.grad.mul_(7)
        p.sub_(p.grad, alpha=lr)


class Freeing(OwnOptimizer):
    def update(self, p, lr):
        p.sub_(p.grad, alpha=lr)
        p.grad = None


class Normalising(OwnOptimizer):
    def update(self, p, lr):
        p.grad.div_(p.grad.norm())
        p.sub_(p.grad, alpha=lr)


class Replacing(OwnOptimizer):
    def update(self, p, lr):
        p.grad = p.grad.sign()
        p.sub_(p.grad, alpha=lr)


class FreeingAdam(AdamW):
    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()


OWN = (Overwriting, Freeing, Normalising, Replacing, FreeingAdam)
WAYS = [*ways(), *((kind, closure, kind.__name__) for kind in OWN for closure in (False, True))]


def norm(gradient):
    return gradient.detach().double().norm().item()


def trained(make, writer, closure):
    """Three steps, clipped every other time; the float64 norms that the last update began with."""
    model = network()
    if "Muon" in str(make):
        model = network(bias=False)
    optimizer = make(model.parameters())
    seen, expected = {}, []

    def loss_of(at):
        optimizer.zero_grad()
        loss = (model(data(at)) - 1).square().mean()
        loss.backward()
        before = math.hypot(*(norm(p.grad) for p in model.parameters()))
        if at % 2:
            clip_grad_norm_(model.parameters(), 0.05)
        seen.update({n: norm(p.grad) for n, p in model.named_parameters()}, before=before)
        return loss

    kinds = ["gradients", "updates", "histograms"]
    handle = attach(model, writer, every=1, histograms_every=1, capture=kinds)
    for at in range(3):
        former = {n: p.detach().double() for n, p in model.named_parameters()}
        if closure:
            optimizer.step(functools.partial(loss_of, at))
        else:
            loss_of(at)
            optimizer.step()
        now = {n: p.detach().double() for n, p in model.named_parameters()}
        ratios = {n: ((now[n] - p).norm() / p.norm()).item() for n, p in former.items()}
        expected.append((dict(seen), ratios))
    handle.detach()
    return expected


@pytest.fixture
def capturable_everywhere(monkeypatch):
    """What torch runs so on accelerators alone is run so on the CPU too."""
    for module in [m for name, m in sys.modules.items() if name.startswith("torch.optim.")]:
        if hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(
                module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"]
            )


@pytest.mark.usefixtures("capturable_everywhere")
@pytest.mark.parametrize(("make", "closure"), [w[:2] for w in WAYS], ids=[w[2] for w in WAYS])
def test_the_norms_are_those_before_the_update(make, closure):
    run = Kept()
    expected = trained(make, run, closure)
    for step, (norms, ratios) in enumerate(expected):
        before = norms.pop("before")
        total = math.hypot(*norms.values())
        assert run.group("gradients/norm/", step) == pytest.approx(norms, rel=1e-4)
        assert run.value("gradients/total_norm", step) == pytest.approx(total, rel=1e-4)
        found = run.value("gradients/total_norm_before_clip", step)
        assert found == pytest.approx(before, rel=1e-4)
        found = run.group("gradients/update_ratio/", step)
        assert found == pytest.approx(ratios, rel=1e-2, abs=1e-6)
        means = run.group("gradients/layer_mean/", step)
        layer = [value for name, value in norms.items() if name.startswith("2.")]
        assert means["2"] == pytest.approx(sum(layer) / len(layer), rel=1e-4)
        for name, value in norms.items():
            (drawn,) = (h for s, h in run.histograms[f"gradients/distribution/{name}"] if s == step)
            assert drawn.sum_squares**0.5 == pytest.approx(value, rel=1e-4)


def test_sparse_gradients_are_read_before_they_are_applied(tmp_path):
    model = nn.Embedding(8, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), 0.1)
    with attach(model, tmp_path, every=1):
        (model(torch.tensor([1, 1, 2])).sum() * 3).backward()
        optimizer.step()
    # Row 1 twice: 6 in 4 places, and 3 in 4.
    assert read(tmp_path).value("gradients/total_norm", 0) == pytest.approx(180**0.5)


@pytest.mark.parametrize("is_global", [False, True])
def test_what_other_hooks_before_the_step_make_of_the_gradients_counts(is_global, tmp_path):
    """As clipping in a hook does: ours is called behind those of the optimizer."""
    model, applied = network(), []
    optimizer = SGD(model.parameters(), 0.1)

    def clip(*_):
        clip_grad_norm_(model.parameters(), 0.05)

    with attach(model, tmp_path, every=1):
        register = optimizer.register_step_pre_hook
        if is_global:
            register = register_optimizer_step_pre_hook
        with register(clip):
            for at in range(2):
                optimizer.zero_grad()
                model(data(at)).square().mean().backward()
                applied.append(math.hypot(*(norm(p.grad) for p in model.parameters())))
                optimizer.step()
    run = read(tmp_path)
    assert [v for _, v in run.scalars["gradients/total_norm"]] == pytest.approx(
        [0.05] * 2, rel=1e-4
    )
    assert [v for _, v in run.scalars["gradients/total_norm_before_clip"]] == pytest.approx(applied)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("overflows", [False, True])
def test_a_fused_optimizer_that_was_told_of_a_loss_scale_by_hand(overflows, tmp_path):
    """It unscales the gradients in its step, or updates nothing, which leaves nothing to chart."""
    model, expected = network(), []
    optimizer = Adam(model.parameters(), 0.1, fused=True)
    kinds = ["gradients", "updates", "histograms"]
    with attach(model, tmp_path, every=1, histograms_every=1, capture=kinds) as handle:
        for at in range(3):
            optimizer.zero_grad()
            loss = model(data(at)).square().mean()
            exact = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            expected.append(math.hypot(*map(norm, exact)))
            (loss * 512.0).backward()
            optimizer.grad_scale = torch.tensor(512.0)
            optimizer.found_inf = torch.tensor(float(overflows and at == 1))
            optimizer.step()
        assert not handle.alerts
    run = read(tmp_path)
    steps = [0, 2] if overflows else [0, 1, 2]
    for tag in ("total_norm", "norm/0.weight", "layer_mean/2", "update_ratio/2.bias"):
        assert [s for s, _ in run.scalars[f"gradients/{tag}"]] == steps, tag
    for tag in ("total_norm", "total_norm_before_clip"):
        totals = dict(run.scalars[f"gradients/{tag}"])
        assert totals == pytest.approx({step: expected[step] for step in steps}), tag
    drawn = run.histograms["gradients/distribution/0.weight"]
    assert [step for step, _ in drawn] == steps
    assert drawn[0][1].sum_squares ** 0.5 == pytest.approx(run.value("gradients/norm/0.weight", 0))


def evaluated(self, evaluate):
    """A step that calls `evaluate` and then updates."""
    evaluate()
    OwnOptimizer.step(self)


# Steps within which a backward pass runs: how each is called, with what calls backward().
WITHIN = {
    "args": (lambda self, *args: evaluated(self, *args), lambda o, f: o.step(f)),
    "kwargs": (lambda self, **kw: evaluated(self, kw["closure"]), lambda o, f: o.step(closure=f)),
    "any": (lambda self, **kw: evaluated(self, kw["f"]), lambda o, f: o.step(f=f)),
    "another name": (lambda self, loss_fn=None: evaluated(self, loss_fn), lambda o, f: o.step(f)),
    "options": (
        lambda self, options: evaluated(self, options["closure"]),
        lambda o, f: o.step({"closure": f}),
    ),
    "a loss": (
        lambda self, loss: evaluated(self, lambda: (self.zero_grad(), loss.backward())),
        lambda o, f: o.step(f(backward=False)),
    ),
}


@pytest.mark.parametrize("way", WITHIN)
@pytest.mark.parametrize("clip", [False, True])
def test_a_backward_pass_within_a_step_is_of_that_step(way, clip):
    if clip and way in ("options", "a loss"):
        pytest.skip("what is done after the pass is not seen")
    step, call = WITHIN[way]
    kind = type("Own", (OwnOptimizer,), {"step": torch.no_grad()(step), "update": Odd.update})
    model, run, before, given = network(), Kept(), [], []
    optimizer = kind(model.parameters(), 0.1)

    def total():
        return math.hypot(*(norm(p.grad) for p in model.parameters()))

    def evaluate(backward=True):
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = (model(data(len(given))) - 1).square().mean()
            exact = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            before.append(math.hypot(*map(norm, exact)))
            if backward:
                loss.backward()
                if clip:
                    clip_grad_norm_(model.parameters(), 0.05)
        return loss

    with attach(model, run, every=1) as handle:
        for _ in range(3):
            call(optimizer, evaluate)
            given.append(total())
    assert handle.step == 3
    for tag, norms in ("total_norm", given), ("total_norm_before_clip", before):
        expected = [(at, pytest.approx(value)) for at, value in enumerate(norms)]
        assert run.scalars[f"gradients/{tag}"] == expected, tag


class Odd(OwnOptimizer):
    """Its step takes a module, which is callable; it has an attribute that fused ones have."""

    grad_scale = "dynamic"

    def step(self, model, closure_of=None):
        assert isinstance(model, nn.Module)
        super().step(closure_of)

    def update(self, p, lr):
        p.sub_(p.grad, alpha=lr)


@pytest.mark.parametrize("closure", [False, True])
def test_what_a_step_is_given_reaches_it_as_it_is(closure, tmp_path):
    model, expected = network(), []
    optimizer = Odd(model.parameters(), 0.1)

    def backward():
        optimizer.zero_grad()
        model(data(0)).square().mean().backward()
        expected.append(math.hypot(*(norm(p.grad) for p in model.parameters())))

    with attach(model, tmp_path, every=1):
        for _ in range(2):
            if not closure:
                backward()
            optimizer.step(model, closure_of=backward if closure else None)
    found = [value for _, value in read(tmp_path).scalars["gradients/total_norm"]]
    assert found == pytest.approx(expected)


def before_clip(directory):
    return read(directory).scalars.get("gradients/total_norm_before_clip", [])


def said(caught):
    return [str(w.message) for w in caught if "total_norm_before_clip" in str(w.message)]


@pytest.mark.parametrize("how", ["no grad", "grad"])
def test_an_adapter_that_is_off_for_a_reference_pass(how, tmp_path):
    model, expected = network(), []
    optimizer = SGD(model.parameters(), 0.1)
    with attach(model, tmp_path, every=1, on_error="raise"):
        for at in range(3):
            policy = model(data(at))
            model[2].requires_grad_(False)
            with torch.set_grad_enabled(how == "grad"):
                reference = model(data(at)).detach()
            model[2].requires_grad_(True)
            optimizer.zero_grad()
            (policy - reference + 1).square().mean().backward()
            expected.append(clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
    assert before_clip(tmp_path) == [(at, pytest.approx(n)) for at, n in enumerate(expected)]


@pytest.mark.parametrize("by", [2, 3, 4, 8, 16, 64, 1024])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_that_are_divided_by_hand(by, clip, tmp_path):
    """As pipeline schedules and accumulation by hand do; what looks like a scale is left out."""
    model, expected = network(), []
    optimizer = SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught, attach(model, tmp_path, every=1):
        warnings.simplefilter("always")
        for at in range(3):
            optimizer.zero_grad()
            model(data(at)).square().mean().backward()
            expected.append(math.hypot(*(norm(p.grad) for p in model.parameters())))
            for p in model.parameters():
                p.grad.div_(by)
            if clip:
                clip_grad_norm_(model.parameters(), clip / by)
            optimizer.step()
    if by == 1024 and not clip:
        assert not before_clip(tmp_path)
        (text,) = said(caught)
        assert "1024 times" in text
    else:
        assert before_clip(tmp_path) == [(at, pytest.approx(n)) for at, n in enumerate(expected)]
        assert not said(caught)


@pytest.mark.parametrize("scale", [1.0, 2.0, 65536.0])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_loss_scaler_that_does_not_step_the_optimizer_is_said(scale, by_hand, tmp_path):
    model, expected = network(), []
    optimizer = SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with warnings.catch_warnings(record=True) as caught, attach(model, tmp_path, every=1):
        warnings.simplefilter("always")
        for at in range(2):
            optimizer.zero_grad()
            loss = model(data(at)).square().mean()
            exact = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            expected.append(math.hypot(*map(norm, exact)))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if by_hand:
                optimizer.step()
            else:
                scaler.step(optimizer)
            scaler.update()
    if by_hand and scale > 1:
        assert not before_clip(tmp_path)
        (text,) = said(caught)
        assert "scaler.step(optimizer)" in text
    else:
        assert before_clip(tmp_path) == [(at, pytest.approx(n)) for at, n in enumerate(expected)]
        assert not said(caught)


def test_gradients_that_no_backward_pass_accumulates_have_no_norm_before_clipping(tmp_path):
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    parameters = list(model.parameters())
    with warnings.catch_warnings(record=True) as caught, attach(model, tmp_path, every=1):
        warnings.simplefilter("always")
        for at in range(2):
            found = torch.autograd.grad(model(data(at)).square().mean(), parameters)
            for p, gradient in zip(parameters, found, strict=True):
                p.grad = gradient
            optimizer.step()
    assert len(read(tmp_path).scalars["gradients/total_norm"]) == 2
    assert not before_clip(tmp_path)
    (text,) = said(caught)
    assert "set by hand" in text


class Prodigious(Optimizer):
    """Adapts `d` at the end of its step, as Prodigy and D-Adaptation do."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr, "d": 1e-3})
        self.applied = []

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self.applied.append(group["d"] * group["lr"])
            for p in group["params"]:
                p.sub_(p.grad, alpha=self.applied[-1])
            group["d"] *= 2


def test_an_effective_rate_is_charted_beside_the_nominal_one(tmp_path):
    model = network()
    optimizer = Prodigious([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    with attach(model, tmp_path, every=1):
        for at in range(3):
            optimizer.zero_grad()
            model(data(at)).square().mean().backward()
            optimizer.step()
    run = read(tmp_path)
    for group in (0, 1):
        assert [v for _, v in run.scalars[f"learning_rate/{group}"]] == [1.0] * 3
        applied = optimizer.applied[group::2]
        found = [v for _, v in run.scalars[f"learning_rate/effective/{group}"]]
        assert found == pytest.approx(applied)
