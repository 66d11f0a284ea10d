"""Which module was the first to make what is not finite."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bthooks
from bthooks import Thresholds
from bthooks.__main__ import main

from ..conftest import read
from ..models import Transformer, batch


class Breaking(nn.Module):
    """A middle module that fails in a given manner on request."""

    def __init__(self, how):
        super().__init__()
        self.how, self.on = how, True
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = x * self.weight
        return self.how(y) if self.on else y


class Masked(nn.Module):
    """Attention among tokens under an infinite mask that it makes, or is given."""

    def __init__(self, hidden=1):
        super().__init__()
        self.hidden = hidden
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        scores = x @ x.transpose(-1, -2)
        mask = torch.full(scores.shape[-2:], -torch.inf).triu(self.hidden)
        return self.softmax(scores + mask) @ x


def chain(middle, first=None):
    return nn.Sequential(
        first or nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), middle), nn.ReLU()
    )


def alerts(model, x, **options):
    with bthooks.attach(model, None, **options) as handle:
        model(x)
        handle.flush()
    return handle.alerts


# The tests look at handle.alerts; one holds what is warned.
pytestmark = pytest.mark.filterwarnings("ignore:bthooks. nonfinite")

X = torch.arange(12.0).view(1, 3, 4) / 10
BREAKS = {
    "nan": lambda y: y * math.nan,
    "0 / 0": lambda y: (y - y) / (y - y),
    "one of many": lambda y: torch.where(torch.arange(4) == 2, torch.nan, y),
    "inplace": lambda y: y.sub_(100).log_(),
    "overflow": lambda y: (y.half() * 60000 * 10).float(),
    "infinity": lambda y: y / 0.0,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", BREAKS)
def test_the_first_module_is_named(how, training):
    model = chain(Breaking(BREAKS[how])).train(training)
    (alert,) = alerts(model, X, step=7)
    assert alert[:3] == ("nonfinite", "1.1", 7)
    assert "its inputs are" in alert.message


@pytest.mark.parametrize("capture", [("gradients",), None, ("activations",)])
@pytest.mark.parametrize("place", ["1.0.weight", "0.bias", "1.0.bias"])
def test_its_own_parameters_are_what_is_said(place, capture):
    model = chain(nn.Linear(4, 4))
    model.get_parameter(place).data[1] = math.inf
    with bthooks.attach(model, None, include="[01]*", capture=capture) as handle:
        model(X).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        handle.flush()
    (alert,) = handle.alerts
    assert alert.where == place.rpartition(".")[0]
    assert "its own parameters" in alert.message
    assert place in alert.message


def test_running_statistics_and_parameters_of_modules_that_are_not_called():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_mean[0] = math.nan
    (alert,) = alerts(model, X[0])
    assert alert.where == "1"
    assert "1.running_mean" in alert.message
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    layer.self_attn.out_proj.weight.data[0, 0] = math.nan
    (alert,) = alerts(layer, X)
    assert alert.where == "self_attn"
    assert "self_attn.out_proj.weight" in alert.message


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_data_is_what_is_said(bad):
    x = X.clone()
    x[0, 1, 2] = bad
    (alert,) = alerts(chain(nn.Linear(4, 4)), x)
    assert alert.where == "root"
    assert "the data" in alert.message


def test_masks_are_no_fault_but_a_row_without_any_key_is():
    model = chain(Masked())
    with bthooks.attach(model, None, on_error="raise") as handle:
        model(X)
        handle.flush()
        assert handle.alerts == ()
    (alert,) = alerts(chain(Masked(hidden=0)), X)
    assert alert.where == "1.1.softmax"
    assert "its inputs are but for -inf" in alert.message
    given = torch.full((3, 3), -torch.inf).triu(1)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    with bthooks.attach(attention, None, on_error="raise") as handle:
        attention(X, X, X, attn_mask=given)
        handle.flush()
        assert handle.alerts == ()
    with bthooks.attach(attention, None) as handle:
        given[0] = -torch.inf
        attention(X, X, X, attn_mask=given)
        handle.flush()
    assert handle.alerts[0].where == "root"
    assert "its inputs are but for -inf" in handle.alerts[0].message


class Step(nn.Module):
    """A linear layer and then anything."""

    def __init__(self, after):
        super().__init__()
        self.inner, self.after = nn.Linear(4, 4), after

    def forward(self, *args, **kwargs):
        return self.after(self.inner, *args, **kwargs)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    mask: torch.Tensor


LOWEST = torch.finfo(torch.float32).min
HIDDEN = torch.arange(4) < 2
FINE = {
    "least number": lambda f, x: f(x).masked_fill(HIDDEN, LOWEST),
    "greatest number": lambda f, x: f(x) * 0 + 3e38,
    "hidden logits": lambda f, x: f(x).masked_fill(HIDDEN, -torch.inf),
    "whole numbers": lambda f, x: f(x).masked_fill(HIDDEN, -torch.inf).argmax(-1),
    "distribution": lambda f, x: Categorical(logits=f(x).masked_fill(HIDDEN, -torch.inf)),
    "mask beside": lambda f, x: Output(f(x), torch.full((3, 3), -torch.inf).triu(1)),
    "inf that is undone": lambda f, x: torch.exp(-(f(x).square() / 0.0)),
    "NaN that is left out": lambda f, x: torch.nan_to_num(f(x) * math.nan),
    "forward-mode": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
}


@pytest.mark.parametrize("fine", FINE)
def test_finite_outputs_raise_no_alert(fine):
    model = Step(FINE[fine])
    with bthooks.attach(model, None, on_error="raise") as handle:
        model(X)
        handle.flush()
    assert handle.alerts == ()


def poisoned(value=math.nan, **parts):
    model = nn.Sequential(*parts.values()) if len(parts) > 1 else next(iter(parts.values()))
    next(p for p in model.parameters() if p.dim() == 1).data[0] = value
    return model


WRONG = {  # a model, its input, the module and what is said of it
    "group norm": (
        nn.Sequential(nn.Conv2d(3, 8, 3), poisoned(norm=nn.GroupNorm(2, 8)), nn.SiLU()),
        torch.randn(2, 3, 8, 8),
        ("1", "its own parameters or buffers are not finite: 1.weight"),
    ),
    "auxiliary loss": (
        nn.Sequential(
            Step(lambda f, x: (x * math.nan, f(x).mean())), Step(lambda f, pair: f(pair[0]))
        ),
        X,
        ("0", "its inputs are"),
    ),
    "scale beside": (
        Step(lambda f, x: {"scale": torch.ones(()), "features": [f(x * math.nan)]}),
        X,
        ("root", "its inputs are"),
    ),
    "dataclass": (Step(lambda f, x: Output(poisoned(a=f)(x), x)), X, ("inner", "inner.bias")),
    "statistics of the data": (
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)),
        torch.full((3, 4), math.nan),
        ("root", "look at the data"),
    ),
    "cleaned data": (
        Step(lambda f, x: poisoned(a=f)(torch.nan_to_num(x))),
        torch.full((3, 4), math.nan),
        ("inner", "inner.bias"),
    ),
    "diverged weights": (
        Step(lambda f, x: poisoned(1e25, a=nn.LayerNorm(4))(f(x)).square()),
        X,
        ("root", "its inputs are"),
    ),
    "weight norm": (
        nn.Sequential(nn.ReLU(), poisoned(a=weight_norm(nn.Linear(4, 4)))),
        X,
        ("1", "1.bias"),
    ),
    "complex": (
        Step(lambda f, x: f(torch.view_as_real(x * math.nan)[..., 0])),
        torch.randn(3, 4, dtype=torch.complex64),
        ("root", "its inputs are"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_right_module_is_named(wrong):
    model, x, (where, message) = WRONG[wrong]
    (alert,) = alerts(copy.deepcopy(model), x)
    assert alert.where == where
    assert message in alert.message


def test_what_the_user_frees_stays_freed_and_a_mode_sees_nothing_of_ours():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func)
            return func(*args, **(kwargs or {}))

    def freed(f, x):
        y = f(x)
        copy = y.detach().clone()
        copy.untyped_storage().resize_(0)
        kept.append(copy)
        return f(y), copy

    model, kept, seen = Step(freed), [], []
    for attached in (False, True):
        names = []
        handle = bthooks.attach(model, None, capture=["activations"]) if attached else None
        with Names():
            model(X)
        seen.append(names)
    handle.detach()
    assert [copy.untyped_storage().size() for copy in kept] == [0, 0]
    assert seen[0] == seen[1]


def test_the_last_of_many_micro_batches_is_looked_at():
    model = chain(Breaking(BREAKS["nan"]))
    model[1][1].on = False
    with bthooks.attach(model, None) as handle:
        for part in range(200):
            model[1][1].on = part == 199
            model(X)
        handle.flush()
    assert [alert.where for alert in handle.alerts] == ["1.1"]


def test_one_alert_for_an_episode(tmp_path):
    model = chain(Breaking(BREAKS["nan"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    quiet = Thresholds(vanishing=0, exploding=math.inf)
    told = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        options = {"every": 2, "thresholds": quiet, "on_alert": told.append}
        with bthooks.attach(model, tmp_path, **options) as handle:
            for step in range(20):
                model[1][1].on = 3 <= step < 7 or step in (9, 12)
                for half in X.expand(2, 3, 4).split(1):
                    F.relu(model(half)).sum().backward()
                for parameter in model.parameters():
                    parameter.grad.nan_to_num_(0.0)
                optimizer.step()
    assert [alert.step for alert in told] == [4, 12]  # 9 is not logged
    assert [alert._replace(cleared=None) for alert in handle.alerts] == told
    assert [alert.cleared for alert in handle.alerts] == [10, 16]
    texts = [str(w.message) for w in warned if "nonfinite" in str(w.message)]
    assert len(texts) == 2
    assert texts[0].startswith("bthooks: nonfinite: 1.1: step 4: ")
    logged = read(tmp_path).texts
    assert [step for step, _ in logged["health/alerts/text_summary"]] == [4, 10, 12, 16]


# Of every second step logged, step 3 is not: validation after it is the first to see the fault.
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("first", ["training", "validation"])
def test_one_alert_for_a_fault_in_training_and_validation(first, resumed, tmp_path, capsys):
    model = chain(Breaking(BREAKS["nan"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    quiet = Thresholds(vanishing=0, exploding=math.inf)
    began, found = {"training": 4, "validation": 3}[first], []

    def train(handle, steps):
        for step in steps:
            for mode, broken in (True, began <= step < 13), (False, began <= step < 8):
                model.train(mode)[1][1].on = broken
                loss = F.relu(model(X)).sum()
                if mode:
                    loss.backward()
                    for parameter in model.parameters():
                        parameter.grad.nan_to_num_(0.0)
                    optimizer.step()
        handle.flush()
        found.append([(a.condition, a.where, a.step, a.cleared) for a in handle.alerts])
        return handle.state_dict()

    told = []
    options = {"every": 2, "thresholds": quiet, "on_alert": told.append}
    with bthooks.make_writer(tmp_path, "run") as writer:
        handle = bthooks.attach(model, writer, **options)
        state = train(handle, range(11))
        assert main([str(tmp_path), "--report"]) == 1  # it lasts in training
        assert capsys.readouterr().out.endswith("runs: 1, open alerts: 1\n")
        if resumed:
            handle.detach()
            handle = bthooks.attach(model, writer, **options)
            handle.load_state_dict(state)
        train(handle, range(11, 20))
        handle.detach()
    assert found[0] == [("nonfinite", "1.1", began, None)]
    assert found[1] in [[("nonfinite", "1.1", began, over)] for over in (16, 17)]
    assert [alert.step for alert in told] == [began]
    assert main([str(tmp_path), "--report"]) == 0
    assert "over  nonfinite: 1.1" in capsys.readouterr().out


def test_training_tells_of_another_place_than_validation():
    model = chain(Breaking(BREAKS["nan"]), Breaking(BREAKS["nan"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with bthooks.attach(model, None, every=2) as handle:
        for step in range(6):
            for mode in True, False:
                model.train(mode)
                model[0].on, model[1][1].on = mode and step > 3, step > 2 and not mode
                model(X)
                if mode:
                    optimizer.step()
    places = [
        (alert.where, alert.step) for alert in handle.alerts if alert.condition == "nonfinite"
    ]
    assert places == [("1.1", 3), ("0", 4)]


def test_a_callback_that_raises_costs_nothing(tmp_path):
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)

    def fail(alert):
        raise OSError("no mail")

    with bthooks.attach(model, tmp_path, every=1, on_alert=fail) as handle:
        for step in range(2):
            model(batch(step)[0])["logits"].sum().backward()
            optimizer.step()
        with pytest.warns(RuntimeWarning, match="no mail"):
            handle.flush()
        model(batch(step)[0])["logits"].sum().backward()
        optimizer.step()
    assert [alert.step for alert in handle.alerts] == [1]
    assert len(read(tmp_path).scalars["gradients/total_norm"]) == 3


def test_a_module_that_overwrites_what_it_is_given_without_saying_so():
    class Divided(nn.Module):
        def forward(self, x):
            return x.div_(0 * x.abs().amax())

    model = nn.Sequential(nn.Linear(4, 4), Divided(), nn.Linear(4, 4), nn.Linear(4, 4))
    (alert,) = alerts(model, X)
    assert alert.where == "1"


def test_an_attribute_inplace_may_be_anything():
    model = chain(Breaking(BREAKS["nan"]))
    model[1][1].inplace = nn.Parameter(torch.randn(3))
    (alert,) = alerts(model, X)
    assert alert.where == "1.1"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("how", ["whole", "regional", "checkpointed", "autocast", "inference"])
def test_in_any_kind_of_forward(how):
    middle = Breaking(BREAKS["nan"])
    model = chain(middle)
    run, where, inside = model, "1.1", ""
    if how == "whole":
        run, where = torch.compile(model, backend="aot_eager"), "root"
    elif how == "regional":
        model[1].compile(backend="inductor")
        where, inside = "root", "what is compiled in it: 1"
    elif how == "checkpointed":
        inner = model[1].forward
        model[1].forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    run.train(how != "inference")
    with bthooks.attach(run, None) as handle:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
        with autocast, torch.inference_mode(how == "inference"):
            run(X)
        handle.flush()
    (alert,) = handle.alerts
    assert alert.where == where
    assert inside in alert.message
