import importlib.util
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bthooks
from bthooks import Thresholds, attach
from bthooks.__main__ import main
from bthooks.health.alerts import Alerts
from bthooks.measure.attention import Head
from bthooks.measure.figures import Figures, OfRank
from bthooks.report import Ledger

from ..conftest import Kept, read
from ..models import Transformer, batch

spec = importlib.util.spec_from_file_location(
    "broken_runs", Path(__file__).parents[2] / "examples" / "broken_runs.py"
)
broken_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(broken_runs)

# Of each run all that is told: the condition, its place, and the second logged step in it (of what
# is not finite the first, of gradients that are 0 the eleventh).
TOLD = {
    "healthy": [],
    "exploding": [("exploding_gradients", "head", 35)],
    "shifted": [("attention_logits", "blocks.1.attention", 35)],
    "saturated": [("attention_collapse", "blocks.0.attention", 5)],
    "depth": [("vanishing_gradients", "layers.0.0", 5)],
    "nan": [("nonfinite", "blocks.2.mlp", 30)],
    "root": [
        ("nonfinite_gradients", "blocks.2.mlp.inner.2.bias", 30),
    ],
    "normalized": [("collapsed_gradients", "root", 5)],
    "dead": [
        ("dead_activations", "blocks.0.mlp.1", 10),
        ("vanishing_gradients", "blocks.0.norm2", 50),
    ],
    "schedule": [("learning_rate", "learning_rate/0", 80)],
    "confident": [("miscalibration", "val/calibration/ece", 99)],
    "detached": [("unlearned", "row", 5)],
    "forgotten": [("unlearned", "head", 5)],
    "decayed": [("learning_rate", "learning_rate/0", 50)],
    "inverted": [
        ("dead_rows", "blocks.1.attention", 5),
        ("vanishing_gradients", "blocks.1.norm1", 50),
    ],
    "spike": [("loss", "train/loss", 32)],
    "undefined": [("loss", "train/loss", 32)],
}


@pytest.mark.trains
@pytest.mark.parametrize("name", TOLD)
def test_a_broken_run_says_what_is_wrong_with_it(name, tmp_path, capsys):
    assert set(broken_runs.NAMES) == set(TOLD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alerts = broken_runs.main([name, "--log-dir", str(tmp_path)])[name]
    assert [(alert.condition, alert.where, alert.step) for alert in alerts] == TOLD[name]
    said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert said == [f"bthooks: {alert._replace(cleared=None)}" for alert in alerts]
    assert capsys.readouterr().out.count("step") == len(alerts)
    run = read(tmp_path)
    prefix = "val/" if name == "confident" else ""
    assert len(run.texts) == bool(alerts)
    for alert in alerts:
        texts = dict(run.texts[f"{prefix}health/alerts/text_summary"])
        assert str(alert._replace(cleared=None)) in texts[alert.step]
        assert run.value(f"{prefix}health/{alert.condition}", alert.step) > 0


def checked(figures, thresholds=Thresholds(), step=10):  # noqa: B008
    """The alerts begun after each of the figures."""
    alerts = Alerts(thresholds, None, Ledger(strict=True))
    return [[str(a) for a in alerts.judge(f, step * at).begun] for at, f in enumerate(figures)]


def layers(*norms):
    return {f"l{at}": norm for at, norm in enumerate(norms)}


def total(before, after=1.0):
    norms = {"total_norm": after, "total_norm_before_clip": before}
    return Figures(layers=layers(0.1, 0.2), **norms)


def rates(*values):
    return [Figures(learning_rates={"0": value}) for value in values]


def heads(*found, sink=0.0, logit=200.0):
    """Entropy, keys and the weight on a neighbour, of each head."""
    of_rank = OfRank({"a": dict(enumerate(Head(*head, sink, logit) for head in found))}, {}, [])
    return Figures(ranks={0: of_rank})


HEALTHY = {
    "nothing": [Figures()] * 4,
    "one check": [total(1), total(11), total(1), total(11), total(1)],
    "no gradient at first": [Figures(layers=layers(1, 0)), Figures(layers=layers(1, 1e-3))],
    "an idle expert": [Figures(layers=layers(1, float(at % 9 == 0))) for at in range(40)],
    "a frozen group": [Figures(learning_rates={"0": 1.0, "1": 0.0})] * 9,
    "few samples": [Figures(calibration={"ece": 0.25, "gap": 0.1}, chance=0.2)] * 3,
    "gains confidence": [
        Figures(calibration={"ece": 0.3, "gap": -0.3, "nll": 0.9**at, "accuracy": 0.5})
        for at in range(20)
    ],
    "large, of a loss that falls": [
        Figures(layers=layers(300, 200), total_norm=400.0, loss=1e3 * 0.9**at) for at in range(40)
    ],
    "small, and moves its weights": [
        Figures(layers=layers(1e-6, 1), layer_updates={"l0": 4e-3, "l1": 5e-3})
        for at in range(20)
    ],
    "a batch without loss": [
        Figures(layers=layers(at % 9 < 2, at % 9 < 2), loss=float(at % 9 < 2)) for at in range(40)
    ],
    "clipped layer by layer": [
        Figures(layers=layers(1, 1, 1, 1), layers_before_clip=layers(1, 2, 3, 4))
    ] * 3,
    "a needle": [heads((0.01, 30.0, 0.0), logit=50.0)] * 3,
    "a sink": [heads((0.01, 30.0, 0.0), sink=0.98)] * 3,
    "padded queries": [Figures(attention={"a": {"dead_rows": 0.6}})] * 3,
    "empty samples": [
        Figures(attention={"a": {"dead_rows": 0.6, "dead_samples": 0.6, "sink": 0.1}})
    ] * 3,
    "a loss around 0": [
        Figures(loss=1e-8 * (-1) ** at * (at + 1) ** 2, layers=layers(9, 60), total_norm=60.0)
        for at in range(60)
    ],
    "a loss with a tail": [
        Figures(loss=5.0 + at * 7 % 13 if at % 9 < 2 else at * 5 % 7 / 10) for at in range(90)
    ],
    "warm-up from 0": rates(0.0, 1.0, 2.0),
    "few keys": [heads((0.0, 3.0, 0.0))] * 3,
    "no key": [heads((math.nan, math.nan, math.nan))] * 3,
    "previous token": [heads((0.02, 30.0, 0.98))] * 3,
    "warm-up": rates(*(1e-8 * 2**at for at in range(30))),
    "cosine": rates(*(1 + math.cos(math.pi * at / 20) for at in range(20)), 0.0),
    "warm restart": rates(1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6, 1.0, 0.1, 0.01),
    "large from the first": [Figures(attention={"a": {"max_logit": 300.0}})] * 4,
    "three layers of one norm": [Figures(layers=layers(1, 1, 1))] * 4,
    "falling loss": [Figures(layers=layers(10.0**-at, 2 * 10.0**-at), total_norm=1.0)
                     for at in range(9)],
    "off": [total(math.inf), total(1e30), total(1e30)],
}  # fmt: skip
ILL = {
    "total": (
        [total(0.1)] * 2 + [total(11)] * 2,
        "exploding_gradients: l1: step 30: the norm of all",
    ),
    "layer": (
        [Figures(layers=layers(1, n), total_norm=1.0) for n in [1] * 9 + [20] * 2],
        "exploding_gradients: l1: step 100: its gradient norm is 10 ** 1.3 times",
    ),
    "clipped layer": (
        [total(*norms) for norms in [(0.5, 0.5)] * 9 + [(6.0, 0.5)] * 2],
        "exploding_gradients: l1: step 100: its gradient norm is 10 ** 1.0 times",
    ),
    "vanishing": (
        [Figures(layers=layers(1e-6, 1, 0.3), norms={"w": 1.0}, layer_updates=u)
         for u in ({}, {"l0": 1e-8, "l1": 1e-3})],
        "vanishing_gradients: l0: step 10: its",
    ),
    "vanishing, of which no update is known": (
        [Figures(layers=layers(1e-6, 1, 0.3))] * 4,
        "vanishing_gradients: l0: step 30: its",
    ),
    "no gradient any more": (
        [Figures(layers=layers(float(at < 3), 1)) for at in range(14)],
        "vanishing_gradients: l0: step 130: its mean gradient norm is 0.0e+00",
    ),
    "none at all": (
        [Figures(layers=layers(0, 0), loss=1.0)] * 2,
        "vanishing_gradients: l0: step 10: its mean",
    ),
    "collapsed": (
        [Figures(layers=layers(1, 1, 1.001, 1))] * 2,
        "collapsed_gradients: root: step 10",
    ),
    "head": (
        [heads((1.0, 9.0, 0.2), (0.05, 9.0, 0.89))] * 2,
        "attention_collapse: a: step 10: head 1: its",
    ),
    "logit": (
        [Figures(attention={"a": {"max_logit": logit}}) for logit in (5.0, 101.0, 120.0)],
        "attention_logits: a: step 20: its largest score is 120",
    ),
    "rate at 0": (rates(1.0, 0.5, 0.0, 0.0), "learning_rate: learning_rate/0: step 30: 0 while"),
    "decay": (
        rates(*(0.1**at for at in range(10))),
        "learning_rate: learning_rate/0: step 90: 1e-09 while training goes on, it was 1",
    ),
    "dead rows": (
        [Figures(attention={"a": {"dead_rows": 0.95}})] * 2,
        "dead_rows: a: step 10: 95% of its queries see no key",
    ),
    "empty samples": (
        [Figures(attention={"a": {"dead_rows": 0.3, "dead_samples": 0.3, "sink": 0.0}})] * 2,
        "dead_rows: a: step 10: 30% of its queries see no key",
    ),
    "loss": (
        [Figures(loss=1 + 0.01 * (at % 3)) for at in range(20)] + [Figures(loss=3.0)] * 3,
        "loss: train/loss: step 220: it is 3, the median of the last 20 1.01",
    ),
    "loss out of all proportion": (
        [Figures(loss=loss) for loss in (1.0, 2.0, 1.0, 4e3, 6e3, 8e3)],
        "loss: train/loss: step 50: it is 8e+03, the median of the last 3 1",
    ),
    "loss that is none": ([Figures(loss=1.0), Figures(loss=math.inf)], "loss: train/loss: step 10"),
    "jump": (rates(*[1.0] * 8, 10.0, 10.0), "learning_rate: learning_rate/0: step 90: 10, "),
    "endless warm-up": (
        rates(*(0.01 * at for at in range(1, 1003))),
        "learning_rate: learning_rate/0: step 10010: has risen for all 10010 steps",
    ),
    "dead": (
        [Figures(ranks={0: OfRank({}, {"relu": (0.0, 0.0)}, [])})] * 2,
        "dead_activations: relu: step",
    ),
    "calibration": (
        [Figures(calibration={"ece": 0.2, "gap": 0.1})] * 2,
        "miscalibration: calibration/ece: step 10: the expected calibration error is 0.2: over",
    ),
    "calibration that gets no better": (
        [Figures(calibration={"ece": 0.2, "gap": -0.1, "nll": 1.0, "accuracy": 0.5})] * 5,
        "miscalibration: calibration/ece: step 40: the expected calibration error is 0.2: under",
    ),
    "gradient": ([Figures(norms={"w": math.nan})], "nonfinite_gradients: w: step 0: its"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_healthy(name):
    thresholds = Thresholds(exploding=math.inf) if name == "off" else Thresholds()
    assert not any(checked(HEALTHY[name], thresholds))


@pytest.mark.parametrize("name", ILL)
def test_what_is_ill(name):
    figures, said = ILL[name]
    *before, last = checked(figures)
    assert not any(before)
    (alert,) = last
    assert alert.startswith(said)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([1.0, 4.0, 7.0, 11.0, 1e9]), max_size=45), st.integers(1, 4))
def test_episodes_begin_and_end_in_turn(totals, checks):
    alerts = Alerts(
        Thresholds(checks=checks, decades=math.inf, growth=1e-12), None, Ledger(strict=True)
    )
    told = []
    for step, norm in enumerate(totals):
        _, begun, cleared = alerts.judge(total(norm), step)
        told += [("begun", step)] * len(begun) + [("cleared", step)] * len(cleared)
        assert bool(alerts.state()) == (len(told) % 2 == 1)
    expected, now = [], "cleared"
    for step in range(len(totals)):
        since = totals[expected[-1][1] + 1 if expected else 0 : step + 1]
        if len(since) < checks:
            continue
        latest, longer = since[-checks:], since[-10 * checks :]
        over, under = all(n > 10 for n in latest), all(n <= 5 for n in latest)
        under |= len(longer) == 10 * checks and all(n < 10 for n in longer)
        if over if now == "cleared" else under:
            now = "begun" if over else "cleared"
            expected.append((now, step))
    assert told == expected


def test_an_overflow_of_the_loss_scale_is_no_alarm(tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    with attach(model, tmp_path, every=1, thresholds=Thresholds(decades=math.inf)) as handle:
        for _ in range(20):
            optimizer.zero_grad()
            scaler.scale(100 * model(torch.ones(4, 8)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert handle.alerts == ()
    skipped = [value for _, value in read(tmp_path).scalars["gradients/skipped_steps"]]
    assert skipped[-1] > 0


@pytest.mark.parametrize("schedule", ["by epochs", "ten times the base"])
def test_a_scheduler_may_jump_to_its_base(schedule):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=5)
    with attach(model, None, every=1, capture=["learning_rate"]) as handle:
        for step in range(40):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            if step % 5 == 4:
                scheduler.step()
            if step >= 35 and schedule != "by epochs":
                optimizer.param_groups[0]["lr"] = 1e-5
        with warnings.catch_warnings(record=True):
            handle.flush()
        assert [alert.step for alert in handle.alerts] == [37] * (schedule != "by epochs")


def test_what_training_tells_is_not_told_again_of_validation(tmp_path):
    model = Transformer()
    for block in model.blocks:
        block.attention.qkv.weight.data[:16] *= 1e3
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    quiet = Thresholds(vanishing=0, exploding=math.inf, collapsed=0)

    def train():
        for step in range(4):
            model.train()(batch(step)[0])["logits"].sum().backward()
            optimizer.step()
            model.eval()(batch(step)[0])
        handle.detach()

    handle = attach(model, tmp_path, every=1, thresholds=quiet)
    with pytest.warns(RuntimeWarning, match="attention_collapse") as caught:
        train()
    assert len(caught) == 1
    ((alert,),) = (handle.alerts,)
    assert (alert.step, alert.cleared) == (1, None)
    run = read(tmp_path)
    assert run.texts.keys() == {"health/alerts/text_summary"}
    assert run.value("val/health/attention_collapse", 3) > 0


def test_a_flush_in_the_middle_of_a_step_is_no_second_check(tmp_path):
    model = nn.Linear(4, 4)
    with attach(model, tmp_path, every=1) as handle:
        optimizers = [torch.optim.SGD([p], 1e-9) for p in model.parameters()]
        (model(torch.ones(1, 4)).sum() * 100).backward()
        for optimizer in optimizers:
            optimizer.step()
            handle.flush()
        assert handle.alerts == ()


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"exploding": 3}, r"thresholds is a bthooks.Thresholds\(...\), got \{"),
        (Thresholds(exploding="10"), "exploding='10': expected a number"),
        (Thresholds(logit=0), "logit=0: expected more than 0; math.inf switches"),
        (Thresholds(decades=math.nan), "decades=nan: expected more than 0"),
        (Thresholds(entropy=-0.1), "entropy=-0.1: expected 0 or more"),
        (Thresholds(checks=0), "checks=0: expected a whole number from 1"),
    ],
)
def test_thresholds_are_checked(thresholds, message):
    with pytest.raises((TypeError, ValueError), match=message):
        attach(nn.Linear(1, 1), None, thresholds=thresholds)


def test_every_judgement_can_be_switched_off():
    least = {"vanishing": 0, "updates": 0, "collapsed": 0.0, "entropy": 0, "decay": 0}
    rest = Thresholds._fields[1:]
    off = Thresholds(**{name: least.get(name, math.inf) for name in rest})
    equal = {"layers": layers(1e9, 1e9, 1e9, 1e9), "total_norm": 2e9}
    spread = {"layers": layers(1e-9, 0.0, 1.0, 1e30)}
    figures = [
        Figures(
            **norms,
            attention={"a": {"max_logit": 1e30}},
            calibration={"ece": 1.0, "gap": 1.0},
            loss=1.0 if at < 7 else 1e30,
            learning_rates={"0": 10.0**at},
            ranks={0: OfRank({"a": {0: Head(0.0, 9.0, 0.0, 0.0, 1e30)}}, {}, [])},
        )
        for at, norms in enumerate([equal] * 7 + [spread] * 7)
    ]
    assert not any(checked(figures, off))
    told = str(checked(figures))
    for condition in (
        "vanishing",
        "exploding",
        "collapsed",
        "attention_collapse",
        "loss",
        "miscalibration",
    ):
        assert condition in told


@pytest.mark.parametrize("what", ["flush", "detach"])
def test_the_callback_may_flush_and_detach(what, tmp_path):
    model, x = nn.Linear(4, 1), torch.ones(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    told = []

    def callback(alert):
        told.append(alert)
        getattr(handle, what)()

    large = Thresholds(growth=1e-3)
    handle = attach(model, tmp_path, every=1, thresholds=large, on_alert=callback, on_error="raise")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            optimizer.zero_grad()
            (model(x).sum() * 100).backward()
            optimizer.step()
        handle.detach()
    assert len(caught) == len(told) == 1
    steps = [step for step, _ in read(tmp_path).scalars["gradients/total_norm"]]
    assert steps == list(range(6 if what == "flush" else len(steps)))
    assert told[0].step in steps


def test_thresholds_are_used():
    model, x = nn.Linear(4, 1), torch.ones(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    told = []
    strict = Thresholds(checks=1, exploding=0.5)
    handle = attach(model, None, every=1, thresholds=strict, on_alert=told.append)
    F.mse_loss(model(x), torch.ones(1, 1) * 9).backward()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="exploding_gradients"):
        handle.detach()
    assert list(handle.alerts) == told
    assert [alert.step for alert in told] == [0]


def test_an_alert_that_lasts_is_resumed(tmp_path, capsys):
    """It is not told again, and it ends: the report of a run that was mended has none open."""
    model, x = nn.Linear(4, 1), torch.ones(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)

    def train(handle, scale):
        for _ in range(4):
            optimizer.zero_grad()
            (model(x).sum() * scale).backward()
            optimizer.step()
        handle.flush()
        return handle.state_dict()

    with (
        attach(model, tmp_path, every=1, thresholds=Thresholds(growth=1e-3)) as handle,
        pytest.warns(RuntimeWarning, match="exploding_gradients"),
    ):
        state = train(handle, 100)
    assert main([str(tmp_path), "--report"]) == 1
    writer = bthooks.make_writer(tmp_path.parent, tmp_path.name, purge_step=4)
    with writer, warnings.catch_warnings():
        warnings.simplefilter("error")
        large = Thresholds(growth=1e-3)
        with attach(model, writer, every=1, thresholds=large, on_error="raise") as again:
            again.load_state_dict(state)
            state = train(again, 100)
            assert again.alerts == handle.alerts
            again.load_state_dict(state)
            assert train(again, 0.1)["alerts"] == []
    assert [alert.cleared for alert in again.alerts] == [9]
    assert main([str(tmp_path), "--report"]) == 0
    assert "over  exploding_gradients" in capsys.readouterr().out


@pytest.mark.parametrize("size", [16, 32, 128, 1000])
def test_a_perfect_model_is_no_miscalibrated_one_however_few_it_is_asked(size, tmp_path):

    def evaluate(sharpness, steps):
        for step in steps:
            logits = torch.randn(size, 5) * 2
            targets = logits.softmax(-1).multinomial(1)[:, 0]
            p = (logits * sharpness).softmax(-1)
            bthooks.log_calibration(writer, p, targets, step, prefix="val")

    model = nn.Linear(1, 1)
    with (
        bthooks.make_writer(tmp_path, "run") as writer,
        attach(model, writer, prefix="a") as handle,
        attach(nn.Linear(1, 1), writer, prefix="b") as other,
    ):
        evaluate(1, range(20))
        assert handle.alerts == ()
        with pytest.warns(RuntimeWarning, match="miscalibration: val/calibration/ece") as caught:
            evaluate(8, range(20, 40))
        assert len(caught) == len(handle.alerts) + len(other.alerts) == 1


def test_calibration_is_judged_by_the_attachment_of_that_writer(tmp_path):
    p, wrong = torch.eye(3)[[0, 1, 2]], torch.tensor([1, 2, 0])
    model = nn.Linear(1, 1)

    def evaluate():
        for step in range(1, 7):
            bthooks.log_calibration(writer, p, wrong if step < 4 else torch.arange(3), step)

    with bthooks.make_writer(tmp_path, "run") as writer:
        bthooks.log_calibration(writer, p, wrong, 0)
        with attach(model, writer) as handle, pytest.warns(RuntimeWarning) as caught:
            evaluate()
    assert len(caught) == 1
    ((alert,),) = (handle.alerts,)
    assert (alert.condition, alert.step, alert.cleared) == ("miscalibration", 2, 5)
    points = read(tmp_path).scalars["health/miscalibration"]
    assert points == [(1, 0), (2, 1), (3, 1), (4, 0), (5, 0), (6, 0)]


class Gap(nn.Module):
    """Learns in one layer, and not in five others."""

    def __init__(self):
        super().__init__()
        self.used, self.unreached, self.left_out, self.detached, self.frozen, self.rounded = (
            nn.Linear(4, 4) for _ in range(6)
        )
        self.frozen.requires_grad_(False)
        self.rounded.bfloat16()

    def forward(self, x):
        y = self.left_out(self.used(self.frozen(self.detached(x).detach())))
        return y + self.rounded(x.bfloat16()).float()


@pytest.mark.parametrize("every", [1, 7])
def test_what_does_not_learn_is_in_the_report_and_whole_modules_are_told(every):
    model = Gap()
    parts = (model.used, model.unreached, model.detached, model.frozen)
    optimizers = [
        torch.optim.SGD([p for part in parts for p in part.parameters()], 0.1),
        torch.optim.SGD(model.rounded.parameters(), 1e-12),  # less than a bfloat16 can hold
    ]
    with warnings.catch_warnings(), attach(model, None, every=every, on_error="raise") as handle:
        warnings.simplefilter("ignore")
        for _ in range(30 * every):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(torch.randn(2, 4)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    said = handle.report().missed["training of parameters"]
    assert said == (
        "has gradients, and is in no optimizer: left_out; in an optimizer, and has never had a "
        "gradient: detached, unreached; updates of exactly 0: rounded"
    )
    (alert,) = [alert for alert in handle.alerts if alert.condition == "unlearned"]
    assert alert.step == every
    assert {alert.where, *alert.message.split("more: ")[-1].split(", ")} == {"detached", "left_out"}


def test_an_optimizer_that_has_not_stepped_yet_is_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    often, seldom = (torch.optim.SGD(part.parameters(), 0.1) for part in model)
    quiet = Thresholds(exploding=math.inf)
    with (
        warnings.catch_warnings(),
        attach(model, None, every=1, thresholds=quiet, on_error="raise") as handle,
    ):
        warnings.simplefilter("error")
        for step in range(40):
            often.zero_grad()
            model(torch.randn(2, 4)).square().sum().backward()
            often.step()
            if step == 30:
                seldom.step()
                seldom.zero_grad()
    assert handle.alerts == ()
    assert "training of parameters" not in handle.report().missed


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_loss_of_the_output_is_written_and_judged(by_hand, tmp_path, backend):
    class Model(nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).square().mean() * scale}

    model, scale = Model(4, 1), 1.0
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    x, losses = torch.randn(8, 4), {}
    of_loss_alone = Thresholds(exploding=math.inf, decades=math.inf)
    with (
        warnings.catch_warnings(record=True) as caught,
        bthooks.make_writer(tmp_path, "run", backend=backend) as writer,
        attach(model, writer, every=2, thresholds=of_loss_alone) as handle,
    ):
        warnings.simplefilter("always")
        for step in range(44):
            scale = 1e3 if step >= 34 else 1.0
            optimizer.zero_grad()
            parts = [model(x[:4])["loss"], model(x[4:])["loss"]]  # micro-batches
            sum(parts).backward()
            optimizer.step()
            losses[step] = sum(parts).item() / 2
            if by_hand:
                bthooks.log_metrics(writer, {"loss": losses[step]}, step)
    points = dict(read(tmp_path).scalars["train/loss"])
    assert [*points] == [*range(44)] if by_hand else [*range(0, 44, 2)]
    for step, loss in points.items():
        assert loss == pytest.approx(losses[step], rel=1e-5)
    (alert,) = handle.alerts
    assert (alert.condition, alert.where) == ("loss", "train/loss")
    assert alert.step == (36 if by_hand else 38)
    assert len(caught) == 1


@pytest.mark.parametrize("is_share", [False, True])
def test_the_loss_of_a_step_is_that_of_the_whole_batch(is_share):
    """Hugging Face's trainer has each micro-batch divided by the size of the whole batch."""

    class Model(nn.Linear):
        def forward(self, x, num_items_in_batch=None):
            return {"loss": super().forward(x).square().sum() / (num_items_in_batch or len(x))}

    model, x, writer = Model(4, 1), torch.randn(8, 4), Kept()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    expected = nn.Linear.forward(model, x).square().mean().item()
    with attach(model, writer, every=1):
        for part in x[:4], x[4:]:
            model(part, num_items_in_batch=8 if is_share else None)["loss"].backward()
        optimizer.step()
    assert dict(writer.scalars["train/loss"]) == {0: pytest.approx(expected)}


@pytest.mark.parametrize("at", [8, 30])
def test_a_resume_keeps_what_is_judged_by(at, tmp_path):
    """An explosion, a loss that jumps and a rate that dies are seen as without the resume."""

    def train(resumes):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        writer = bthooks.make_writer(tmp_path, f"{at} {resumes}")
        handle = attach(model, writer, every=1)
        for step in range(50):
            if resumes and step == at:
                state = json.loads(json.dumps(handle.state_dict()))
                handle.detach()
                handle = attach(model, writer, every=1)
                handle.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = 1e-3 * 0.6**step
            optimizer.zero_grad()
            loss = model(torch.randn(16, 4)).square().mean() * (1e4 if step >= 40 else 1.0)
            loss.backward()
            optimizer.step()
            bthooks.log_metrics(writer, {"loss": loss}, step)
        handle.detach()
        writer.close()
        return [(alert.condition, alert.where, alert.step) for alert in handle.alerts]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, resumed = train(False), train(True)
    assert {condition for condition, *_ in whole} == {
        "exploding_gradients",
        "loss",
        "learning_rate",
    }
    assert resumed == whole


def test_of_a_model_without_attention_it_is_said_what_did_not_run():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught, attach(model, None, every=1):
        warnings.simplefilter("always")
        for _ in range(3):
            model[0](torch.ones(1, 4)).sum().backward()
            optimizer.step()
    (said,) = {str(warning.message) for warning in caught}
    assert said.startswith("bthooks: forward: the forward of the attached module did not run")


@pytest.mark.parametrize("every", [1, 5, 100])
@pytest.mark.parametrize("what", ["skips the step", "stops"])
def test_a_loss_that_is_nan_is_told_though_no_step_comes_of_it(what, every, tmp_path):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with warnings.catch_warnings(), attach(model, tmp_path, every=every) as handle:
        warnings.simplefilter("ignore")
        for step in range(40):
            loss = model(torch.randn(8, 4)).square().mean()
            loss = loss * torch.nan if step >= 30 else loss
            bthooks.log_metrics(handle.writer, {"loss": loss}, step)
            if not loss.isfinite():
                if what == "stops":
                    break
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ((condition, where, step, *_),) = handle.alerts
    assert (condition, where) == ("loss", "train/loss")
    assert 30 <= step <= 32
    ((at, text),) = read(tmp_path).texts["health/alerts/text_summary"]
    assert at == step
    assert "it is nan" in text


def test_steps_that_begin_again_hide_no_nan():
    model = nn.Linear(1, 1)
    with warnings.catch_warnings(), attach(model, Kept()) as handle:
        warnings.simplefilter("ignore")
        for epoch in range(2):
            for step in range(20):
                bthooks.log_metrics(handle.writer, {"loss": math.nan if epoch else 1.0}, step)
    assert [str(alert) for alert in handle.alerts] == ["loss: train/loss: step 0: it is nan"]


def test_each_attachment_of_a_writer_judges_the_loss_under_its_own_prefix():
    writer, models = Kept(), [nn.Linear(1, 1), nn.Linear(1, 1)]
    a, b = (attach(model, writer, prefix=name) for model, name in zip(models, "ab", strict=True))
    with a, b, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            bthooks.log_metrics(writer, {"loss": 1.0}, step, prefix="a/train")
            loss = math.nan if step == 3 else 1.0
            bthooks.log_metrics(writer, {"loss": loss}, step, prefix="b/train")
    assert len(caught) == len(b.alerts) == 1
    assert a.alerts == ()
    assert {tag for tag in writer.scalars if "health" in tag} == {"b/health/loss"}
    assert list(writer.texts) == ["b/health/alerts"]


class Averaged(nn.Module):
    """A trunk that is frozen with old gradients, a part at rest, and an average of the one part."""

    def __init__(self):
        super().__init__()
        self.trunk, self.rest, self.part, self.average = (nn.Linear(4, 4) for _ in range(4))
        for p in self.trunk.parameters():
            p.grad = torch.ones_like(p)
        self.trunk.requires_grad_(False)

    def forward(self, x):
        x = self.rest(self.trunk(x))
        with torch.no_grad():
            goal = self.average(x)
        return (self.part(x) - goal).square().mean()


@pytest.mark.parametrize("capture", [None, ["gradients", "updates"]])
def test_what_is_meant_to_rest_is_not_unlearned(capture):
    model = Averaged()
    groups = [
        {"params": [*model.part.parameters(), *model.average.parameters()]},
        {"params": model.rest.parameters(), "lr": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, 0.1)
    with attach(model, None, every=1, capture=capture, on_error="raise") as handle:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).backward()
            optimizer.step()
            with torch.no_grad():
                model.average.weight.lerp_(model.part.weight, 0.1)
                model.average.bias.lerp_(model.part.bias, 0.1)
    assert "unlearned" not in {alert.condition for alert in handle.alerts}
    assert "training of parameters" not in handle.report().missed


def test_an_optimizer_without_groups_hides_no_module_that_none_holds():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), 1e-3)
    wrapper = Wrapper(optimizer)
    with warnings.catch_warnings(), attach(model, None, every=1, on_error="raise") as handle:
        warnings.simplefilter("ignore")
        for _ in range(4):
            model.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            wrapper.inner.step()
    assert [(alert.condition, alert.where) for alert in handle.alerts] == [("unlearned", "1")]


def test_what_was_told_of_a_value_that_is_not_finite_is_not_told_again_after_a_resume():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train(handle, factor):
        for _ in range(4):
            optimizer.zero_grad()
            (model(torch.ones(1, 4)).sum() * factor).backward()
            optimizer.step()
        return handle.state_dict()

    with attach(model, None, every=1) as handle:
        with pytest.warns(RuntimeWarning, match="nonfinite_gradients"):
            state = train(handle, math.inf)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle.load_state_dict(json.loads(json.dumps(state)))
            train(handle, 1.0)
        assert [alert.condition for alert in handle.alerts] == ["nonfinite_gradients"]
