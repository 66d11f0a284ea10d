"""Optimizers: steps within steps, one optimizer for each parameter, and steps that nobody sees."""

import gc
import math
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from bthooks import attach
from tests.conftest import Kept


def network(layers=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def loss_of(model, at=0):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(at))
    return (model(x) - 1).square().mean()


def total(parameters):
    return math.hypot(*(p.grad.double().norm().item() for p in parameters if p.grad is not None))


class Lookahead(Optimizer):
    """Steps another, and every second step goes back half of the way (Zhang et al., 2019)."""

    def __init__(self, inner):
        self.inner, self.at = inner, 0
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.at += 1
        if self.at % 2 == 0:
            own = [p for group in self.param_groups for p in group["params"]]
            for slow, p in zip(self.slow, own, strict=True):
                p.copy_(slow.lerp_(p, 0.5))
        return loss


class Sam(Optimizer):
    """Climbs, evaluates again, and descends with that gradient (Foret et al., 2021)."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        own = [p for group in self.param_groups for p in group["params"]]
        up = [0.05 * p.grad / (p.grad.norm() + 1e-9) for p in own]
        torch._foreach_add_(own, up)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(own, up)
        self.inner.step()


class Container(Optimizer):
    """One optimizer for each layer, as torchtitan has one for each part of a pipeline."""

    def __init__(self, model):
        self.inner = [SGD(layer.parameters(), 0.1 / (1 + at)) for at, layer in enumerate(model)]
        super().__init__([p for o in self.inner for p in o.param_groups[0]["params"]], {})

    def step(self, closure=None):
        for optimizer in self.inner:
            optimizer.step()


class Twice(SGD):
    """A subclass that calls what it is derived from, with other gradients the second time."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(2)
        super().step()


class Accumulating(Optimizer):
    """Steps another at every second call of its own."""

    def __init__(self, inner, at=1):
        self.inner, self.at = inner, at
        super().__init__([{"params": g["params"]} for g in inner.param_groups], {"lr": 9.0})

    def step(self, closure=None):
        self.at += 1
        if self.at % 2 == 0:
            self.inner.step()


class Switching(SGD):
    """Steps another in its first step and in every second one after it, else it updates itself."""

    def __init__(self, inner):
        super().__init__(inner.param_groups[0]["params"], 0.1)
        self.inner, self.at = inner, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.at += 1
        if self.at % 2:
            self.inner.step()
        else:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1)


class Hybrid(Optimizer):
    """Updates the matrices itself, and has another one for the rest, as Muon does."""

    def __init__(self, model):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        super().__init__([{"params": matrices, "name": "muon"}], {"lr": 0.02})
        self.rest = AdamW([p for p in model.parameters() if p.dim() == 1], 1e-3)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.sign(), alpha=0.02)
        self.rest.step()


class Elsewhere(Lookahead):
    """One that holds none of the parameters itself."""

    def __init__(self, inner):
        super().__init__(inner)
        self.param_groups = []

    def step(self, closure=None):
        return self.inner.step(closure)


def rates_in(writer):
    return sorted(tag for tag in writer.scalars if tag.startswith("learning_rate/"))


def run(make, calls=4, closure=False, every=1):
    """Trains; returns the handle's step, what was written, and the norms of the inner update."""
    model, given, writer = network(), [], Kept()
    optimizer = make(model)
    inner = getattr(optimizer, "inner", optimizer)

    def look(*_):
        given.append(total(model.parameters()))

    if isinstance(inner, Optimizer):
        inner.register_step_pre_hook(look)
    with attach(model, writer, every=every, capture=["gradients", "learning_rate"]) as handle:

        def backward(at):
            optimizer.zero_grad()
            loss = loss_of(model, at)
            loss.backward()
            return loss

        for at in range(calls):
            backward(at)
            optimizer.step(*([lambda at=at: backward(at)] if closure else []))
        return handle.step, writer, given, model


WRAPPERS = {
    "lookahead": (lambda m: Lookahead(AdamW(m.parameters(), 0.1)), False),
    "lookahead, closure": (lambda m: Lookahead(AdamW(m.parameters(), 0.1)), True),
    "two around": (lambda m: Lookahead(Lookahead(SGD(m.parameters(), 0.1))), False),
    "sam": (lambda m: Sam(SGD(m.parameters(), 0.1)), True),
    "elsewhere": (lambda m: Elsewhere(SGD(m.parameters(), 0.1)), False),
    "container": (Container, False),
    "twice": (lambda m: Twice(m.parameters(), 0.1), False),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_optimizer_that_steps_another_is_one_step(name):
    make, closure = WRAPPERS[name]
    step, writer, given, model = run(make, closure=closure)
    assert step == 4
    rates = ["0", "1/0", "2/0"] if name == "container" else ["0"]
    assert rates_in(writer) == [f"learning_rate/{rate}" for rate in rates]
    for tag in ("total_norm", "norm/2.weight", "total_norm_before_clip"):
        assert [at for at, _ in writer.scalars[f"gradients/{tag}"]] == [0, 1, 2, 3], tag
    names = {n for n, _ in model.named_parameters()}
    assert writer.group("gradients/norm/", 0).keys() == names
    if given:  # of those inside the last one counts
        last = given[len(given) // 4 - 1 :: len(given) // 4]
        assert [v for _, v in writer.scalars["gradients/total_norm"]] == pytest.approx(last)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("at", [0, 1])
def test_a_wrapper_that_does_not_step_what_it_wraps_begins_no_step(at, every):
    step, writer, given, _ = run(
        lambda m: Accumulating(SGD(m.parameters(), 0.1), at), calls=6, every=every
    )
    assert step == 3
    expected = [(n, pytest.approx(norm)) for n, norm in enumerate(given) if n % every == 0]
    assert writer.scalars["gradients/total_norm"] == expected
    assert {value for _, value in writer.scalars["learning_rate/0"]} == {0.1}


def test_a_wrapper_that_updates_something_itself_makes_a_step():
    step, writer, _, _ = run(lambda m: Switching(AdamW(m.parameters(), 1e-3)), calls=6)
    assert step == 6
    assert [at for at, _ in writer.scalars["gradients/total_norm"]] == list(range(6))


def test_the_rates_of_one_that_updates_some_and_steps_another_are_those_of_both():
    step, writer, _, _ = run(Hybrid)
    assert step == 4
    rates = {tag: {rate for _, rate in writer.scalars[tag]} for tag in rates_in(writer)}
    assert rates == {"learning_rate/muon": {0.02}, "learning_rate/1/0": {0.001}}


def test_the_rates_of_a_wrapped_optimizer_are_its_own():
    writer, model = Kept(), network()
    inner = SGD(model.parameters(), 0.5)
    optimizer = Lookahead(inner)
    schedule = LambdaLR(inner, lambda at: 0.5**at)
    with attach(model, writer, every=1):
        for at in range(3):
            loss_of(model, at).backward()
            optimizer.step()
            schedule.step()
    assert writer.scalars["learning_rate/0"] == [(0, 0.5), (1, 0.25), (2, 0.125)]


def test_a_step_that_raises_is_none_and_leaves_nothing():
    model, writer = network(), Kept()
    inner = SGD(model.parameters(), 0.1)
    optimizer = Lookahead(inner)
    with attach(model, writer, every=1) as handle:
        for at in range(4):
            optimizer.zero_grad()

            def closure(at=at):
                if at % 2:
                    raise ArithmeticError
                loss = loss_of(model, at)
                loss.backward()
                return loss

            try:
                optimizer.step(closure)
            except ArithmeticError:
                assert at % 2
        assert handle.step == 2
    assert [at for at, _ in writer.scalars["gradients/total_norm"]] == [0, 1]
    assert not inner._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_zero_redundancy_optimizer(tmp_path):
    """On each rank its inner optimizer holds a share; what it is given itself is all."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        make = lambda m: ZeroRedundancyOptimizer(m.parameters(), SGD, lr=0.1)  # noqa: E731
        step, writer, _, _ = run(make)
    finally:
        dist.destroy_process_group()
    assert step == 4
    assert rates_in(writer) == ["learning_rate/0"]
    assert len(writer.group("gradients/norm/", 3)) == 6


def in_backward(model, rates=lambda at: 0.01, clip=None, free=True):
    """An optimizer for each parameter, that steps as soon as its gradient is there."""
    norms, before = {}, {}
    optimizers = {p: SGD([p], rates(at), foreach=False) for at, p in enumerate(model.parameters())}

    def update(p):
        before[p] = p.grad.double().norm().item()
        if clip:
            nn.utils.clip_grad_norm_([p], clip)
        norms[p] = p.grad.double().norm().item()
        optimizers[p].step()
        if free:
            p.grad = None
        else:
            p.grad.zero_()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(update)
    return norms, before, optimizers


class Checkpointed(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=True)
        return x


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("kind", ["plain", "reentrant", "unseen"])
def test_optimizers_in_backward_step_once_a_pass(kind, free, clip):
    model, writer, expected = network(), Kept(), []
    if kind == "reentrant":  # each layer in a backward pass of its own, inside the first
        model = Checkpointed(*model)
    norms, before, optimizers = in_backward(model, clip=clip, free=free)
    forward = model.forward if kind == "unseen" else model
    with attach(model, writer, every=1, on_error="raise") as handle:
        for at in range(4):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(at), requires_grad=True)
            forward(x).square().mean().backward()
            expected.append((math.hypot(*norms.values()), math.hypot(*before.values())))
        assert handle.step == 4
    for at, (total_norm, before_clip) in enumerate(expected):
        assert writer.value("gradients/total_norm", at) == pytest.approx(total_norm)
        assert writer.value("gradients/total_norm_before_clip", at) == pytest.approx(before_clip)
    assert rates_in(writer) == ["learning_rate/0"]
    assert len(writer.group("gradients/norm/", 3)) == len(optimizers) == 6
    assert not any(len(p._post_accumulate_grad_hooks) > 1 for p in optimizers)


def test_one_rate_for_each_that_differs_in_backward():
    model, writer = network(), Kept()
    in_backward(model, rates=lambda at: 0.1 if at < 2 else 0.01)
    with attach(model, writer, every=1):
        for at in range(3):
            loss_of(model, at).backward()
    rates = [writer.scalars[tag] for tag in rates_in(writer)]
    assert sorted(points[0][1] for points in rates) == [0.01, 0.1]
    assert all(len(points) == 3 for points in rates)


def test_some_step_in_backward_and_some_after_it():
    model, writer = network(), Kept()
    in_backward(model[1:])
    after = SGD(model[0].parameters(), 0.5)
    with attach(model, writer, every=1) as handle:
        for at in range(3):
            loss_of(model, at).backward()
            after.step()
            after.zero_grad()
        assert handle.step == 3
    assert [len(writer.group("gradients/norm/", at)) for at in range(3)] == [6, 6, 6]


@pytest.mark.parametrize("every", [1, 10**9])
def test_the_cost_is_linear_in_the_number_of_optimizers(every):
    """Counted in calls of functions, which no busy machine makes more."""
    counts = {}
    for layers in (20, 80):
        model = network(layers)
        in_backward(model)
        with attach(model, None, every=every):
            for at in range(3):
                loss_of(model, at).backward()
            calls = 0

            def count(frame, event, _):
                nonlocal calls
                calls += event in ("call", "c_call") and "bthooks" in frame.f_code.co_filename

            loss = loss_of(model, 3)
            sys.setprofile(count)
            loss.backward()
            sys.setprofile(None)
            counts[layers] = calls
    assert 0 < counts[80] < 4.5 * counts[20]


def told(caught):
    return [str(w.message) for w in caught if "bthooks: optimizer" in str(w.message)]


@pytest.mark.parametrize("forwards", [99, 100, 300])
def test_that_no_optimizer_has_stepped_is_said_once(forwards):
    model = nn.Linear(4, 4).requires_grad_(False)
    prompt = nn.Parameter(torch.zeros(4))
    optimizer = SGD([prompt], 0.1)
    with warnings.catch_warnings(record=True) as caught, attach(model, None, every=1):
        warnings.simplefilter("always")
        for _ in range(forwards):
            model(torch.ones(2, 4) + prompt).sum().backward()
            optimizer.step()
    assert len(told(caught)) == (forwards >= 100)


def test_many_forwards_of_one_step_are_no_reason_to_say_so():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), 1e-4, max_iter=150, max_eval=150)
    with warnings.catch_warnings(record=True) as caught, attach(model, None, every=1):
        warnings.simplefilter("always")

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        for _ in range(120):
            loss_of(model)
    assert not told(caught)


@pytest.mark.parametrize("model", ["eval", "no grad"])
def test_inference_is_not_told_that_nothing_steps(model):
    inferred = nn.Linear(4, 4).train(model == "no grad")
    with warnings.catch_warnings(record=True) as caught, attach(inferred, None, every=1):
        warnings.simplefilter("always")
        with torch.no_grad():
            for _ in range(300):
                inferred(torch.ones(2, 4))
    assert not told(caught)


@pytest.mark.parametrize("trains", [False, True])
def test_training_of_which_nothing_is_seen_is_said_at_the_end(trains):
    """As a training step that is compiled as a whole: neither a forward nor a step."""
    model = network()
    with warnings.catch_warnings(record=True) as caught, attach(model, None, every=1):
        warnings.simplefilter("always")
        if trains:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.1)
    assert len(told(caught)) == trains


def test_optimizers_that_are_gone_are_let_go():
    model = network()
    with attach(model, None, every=1) as handle:
        for at in range(5):
            optimizer = SGD(model.parameters(), 0.1)
            loss_of(model, at).backward()
            optimizer.step()
            del optimizer
            gc.collect()
        assert handle.step == 5
        optimizers = handle._wiring._optimizers
        assert (len(optimizers._known), optimizers.count) == (0, 0)
        assert not any(optimizers._holders.values())
