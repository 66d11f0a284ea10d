"""Which module was the first to make what is not finite."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bthooks

from .conftest import read
from .models import Transformer, batch


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
    assert alert.where == "0"
    assert "the data" in alert.message


def test_masks_are_no_fault_but_a_row_without_any_key_is():
    model = chain(Masked())
    with bthooks.attach(model, None, on_error="raise") as handle:
        model(X)
        handle.flush()
        assert handle.alerts == ()
    (alert,) = alerts(chain(Masked(hidden=0)), X)
    assert alert.where == "1.1"
    assert "its inputs are" in alert.message
    given = torch.full((3, 3), -torch.inf).triu(1)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    with bthooks.attach(attention, None, on_error="raise") as handle:
        attention(X, X, X, attn_mask=given)
        handle.flush()
        assert handle.alerts == ()
    with bthooks.attach(attention, None) as handle:
        attention(X, X, X, attn_mask=given.triu(-9) - torch.inf)
        handle.flush()
    assert handle.alerts[0].where == "root"
    assert "its inputs are" in handle.alerts[0].message


def test_one_alert_for_an_episode(tmp_path):
    model = chain(Breaking(BREAKS["nan"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    told = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with bthooks.attach(model, tmp_path, every=2, on_alert=told.append) as handle:
            for step in range(20):
                model[1][1].on = 3 <= step < 7 or step in (9, 12)
                for half in X.expand(2, 3, 4).split(1):
                    F.relu(model(half)).sum().backward()
                for parameter in model.parameters():
                    parameter.grad.nan_to_num_(0.0)
                optimizer.step()
    assert [alert.step for alert in told] == [4, 12]  # 9 is not logged
    assert list(handle.alerts) == told
    texts = [str(w.message) for w in warned if "nonfinite" in str(w.message)]
    assert len(texts) == 2
    assert texts[0].startswith("bthooks: nonfinite: 1.1: step 4: ")
    logged = read(tmp_path).texts
    assert [step for step, _ in logged["health/alerts/text_summary"]] == [4, 12]


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


@pytest.mark.parametrize("how", ["whole", "regional", "checkpointed", "autocast", "inference"])
def test_in_any_kind_of_forward(how):
    middle = Breaking(BREAKS["nan"])
    model = chain(middle)
    run, where = model, "1.1"
    if how == "whole":
        run, where = torch.compile(model, backend="aot_eager"), "root"
    elif how == "regional":
        model[1].compile(backend="aot_eager")
    elif how == "checkpointed":
        inner = model[1].forward
        model[1].forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    with bthooks.attach(run, None) as handle:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
        with autocast, torch.inference_mode(how == "inference"):
            run(X)
        handle.flush()
    (alert,) = handle.alerts
    assert alert.where == where, alert
