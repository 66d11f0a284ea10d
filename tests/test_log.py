import math

import numpy as np
import pytest
import torch
from torch import nn

import bthooks
from bthooks import make_writer

from .conftest import BACKENDS, read


@pytest.fixture
def logged(tmp_path_factory):
    """Run a function of the writer on both backends; what is read back must be the same."""

    def run(function):
        runs, tmp_path = [], tmp_path_factory.mktemp("runs")
        for backend in BACKENDS:
            with make_writer(tmp_path, backend, backend=backend) as writer:
                function(writer)
            runs.append(read(tmp_path / backend))
        assert repr(runs[0]) == repr(runs[1])
        assert runs[0].files == 1
        return runs[0]

    return run


VALUES = {
    "float": (0.25, 0.25),
    "int": (3, 3.0),
    "bool": (True, 1.0),
    "numpy float": (np.float32(0.5), 0.5),
    "numpy 0-d": (np.array(2.5), 2.5),
    "tensor": (torch.tensor(0.75, requires_grad=True), 0.75),
    "one element": (torch.tensor([[4.0]]), 4.0),
    "bf16": (torch.tensor(1e-9, dtype=torch.bfloat16), 1e-9),
    "int8": (torch.tensor(-5, dtype=torch.int8), -5.0),
    "bool tensor": (torch.tensor(False), 0.0),
    "huge": (1e25, 1e25),
    "beyond float32": (1e300, math.inf),
    "inf": (-math.inf, -math.inf),
    "nan": (torch.tensor(math.nan), math.nan),
}


def test_metrics_of_every_type(logged):
    metrics = {name: value for name, (value, _) in VALUES.items()}
    run = logged(lambda writer: bthooks.log_metrics(writer, metrics, 5, prefix="val"))
    for name, (_, expected) in VALUES.items():
        tag = "val/" + name.replace(" ", "_")
        assert run.value(tag, 5) == pytest.approx(expected, rel=5e-3, nan_ok=True), name
    assert len(run.scalars) == len(VALUES)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1 + 2j, TypeError, "'loss' is one real number, got"),
        (np.complex128(1 + 2j), TypeError, "'loss' is one real number, got"),
        (b"0.5", TypeError, "'loss' is one real number, got"),
        (torch.tensor(1j), TypeError, "'loss' is one real number, got"),
        (torch.ones(3), ValueError, r"'loss' has shape \(3,\).*\.mean\(\)"),
        (torch.empty(0), ValueError, r"'loss' has shape \(0,\)"),
        (np.ones(2), TypeError, "'loss' is one real number"),
        ("0.5", TypeError, "'loss' is one real number, got '0.5'"),
        (None, TypeError, "'loss' is one real number, got None"),
        (10**400, TypeError, "'loss' is one real number"),
    ],
)
def test_what_is_no_number_is_refused_by_name(tmp_path, value, error, message):
    with make_writer(tmp_path, "run") as writer, pytest.raises(error, match=message):
        bthooks.log_metrics(writer, {"fine": 1.0, "loss": value}, 0)
    assert read(tmp_path).scalars == {}


@pytest.mark.parametrize("step", [1.5, "3", None, -1])
def test_a_step_is_a_whole_number(tmp_path, step):
    with make_writer(tmp_path, "run") as writer:
        with pytest.raises((TypeError, ValueError), match="step"):
            bthooks.log_metrics(writer, {"loss": 1.0}, step)
        bthooks.log_metrics(writer, {"loss": 1.0}, np.int64(3))
        bthooks.log_metrics(writer, {"loss": 1.0}, torch.tensor(4))
    assert [s for s, _ in read(tmp_path).scalars["train/loss"]] == [3, 4]


def test_names_that_clean_to_one_tag_stay_apart(logged):
    run = logged(lambda writer: bthooks.log_metrics(writer, {"a b": 1, "a_b": 2, "a_b_2": 3}, 0))
    assert run.group("train/", 0) == {"a_b": 1, "a_b_2": 2, "a_b_2_2": 3}


def test_learning_rates_by_group(logged):
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(
        [
            {"params": a.parameters(), "lr": torch.tensor(0.5)},
            {"params": b.parameters(), "name": "head"},
        ],
        lr=0.1,
    )
    run = logged(lambda writer: bthooks.log_learning_rate(writer, optimizer, 2, prefix="d"))
    assert run.group("d/learning_rate/", 2) == pytest.approx({"0": 0.5, "head": 0.1})


def gradients():
    model = nn.ModuleList([nn.Linear(300, 400), nn.Linear(400, 3, bias=False)])
    model.append(model[1])
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    model[2](model[0](torch.randn(8, 300))).square().sum().mul(model.scale).backward()
    return model


def test_gradient_norms_against_float64(logged):
    model = gradients()
    truth = {
        n: p.grad.double().norm().item() for n, p in model.named_parameters() if p.grad is not None
    }
    assert truth.keys() == {"scale", "0.weight", "0.bias", "1.weight"}
    found = bthooks.gradient_norms(model)
    assert all(v.dtype == torch.float32 and v.dim() == 0 for v in found.values())
    assert {n: v.item() for n, v in found.items()} == pytest.approx(truth, rel=1e-6)
    run = logged(lambda writer: bthooks.log_gradients(writer, model, 3))
    assert run.group("gradients/norm/", 3) == pytest.approx(truth, rel=1e-6)
    total = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    )
    assert run.value("gradients/total_norm", 3) == pytest.approx(total.item(), rel=1e-5)
    assert run.group("gradients/layer_mean/", 3) == pytest.approx(
        {
            "root": truth["scale"],
            "0": (truth["0.weight"] + truth["0.bias"]) / 2,
            "1": truth["1.weight"],
        }
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_any_size_against_float64(dtype):
    """Equal elements, since their rounding errors add up: one stage is off by 2.7e-3 here."""
    sizes = 1, 1024, 1025, 32_767, 32_768, 100_001, 1 << 20, 38_600_000
    value = torch.tensor(0.1, dtype=dtype)
    model = nn.ParameterList(nn.Parameter(torch.empty(size, dtype=dtype)) for size in sizes)
    for parameter in model:
        parameter.grad = value.expand_as(parameter).clone()
    found = bthooks.gradient_norms(model)
    expected = [value.double().item() * math.sqrt(size) for size in sizes]
    assert [norm.item() for norm in found.values()] == pytest.approx(expected, rel=1e-6)


def test_gradients_that_are_not_there_are_said(tmp_path):
    with (
        make_writer(tmp_path, "run") as writer,
        pytest.warns(UserWarning, match="no parameter has a"),
    ):
        bthooks.log_gradients(writer, nn.Linear(2, 2), 0)
    assert read(tmp_path).scalars == {}


def weights(seed=0, dtype=torch.float32):
    scores = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 3
    return scores.softmax(-1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_stats_against_float64(logged, dtype):
    w = weights(dtype=dtype)
    exact = w.double()
    run = logged(lambda writer: bthooks.log_attention_stats(writer, w, 4, name="blocks.0"))
    found = run.group("attention/", 4)
    tolerance = {"rel": 1e-5, "abs": 1e-6}
    entropy = torch.special.entr(exact).sum(-1)
    assert found == pytest.approx(
        {
            "entropy/blocks.0": entropy.mean().item(),
            "entropy_normalized/blocks.0": entropy.mean().item() / math.log(7),
            "weight_mean/blocks.0": exact.mean().item(),
            "weight_std/blocks.0": exact.std().item(),
            "weight_max/blocks.0": exact.max().item(),
            "sink/blocks.0": exact[..., 0].mean().item(),
        },
        **tolerance,
    )


def test_an_entropy_that_is_known_is_taken(logged):
    known = torch.tensor([0.5, 1.5])
    run = logged(
        lambda writer: bthooks.log_attention_stats(writer, weights(), 0, attention_entropy=known)
    )
    assert run.value("attention/entropy/root", 0) == 1.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.randn(2, 3, 5, 7), "expected probabilities; pass the weights after the softmax"),
        (weights() * 0.5, r"sum to 0.5..0.5, expected 1"),
        (torch.dropout(weights(), 0.5, True), "pass the weights before dropout"),
        (weights()[0], r"got \(3, 5, 7\); for weights averaged over heads"),
        (torch.empty(0, 3, 5, 7), r"got \(0, 3, 5, 7\)"),
    ],
)
def test_weights_that_are_no_distribution_are_refused(tmp_path, bad, message):
    with make_writer(tmp_path, "run") as writer, pytest.raises(ValueError, match=message):
        bthooks.log_attention_stats(writer, bad, 0)
    assert read(tmp_path).scalars == {}


def test_uncertainty_means_and_distributions(logged):
    e, a = torch.rand(32), torch.rand(32).numpy()
    run = logged(lambda writer: bthooks.log_uncertainty_metrics(writer, e, 1, aleatoric=a))
    assert run.group("uncertainty/", 1) == pytest.approx(
        {
            "epistemic": e.double().mean().item(),
            "aleatoric": float(a.mean()),
            "total": e.double().mean().item() + float(a.mean()),
        },
        rel=1e-5,
    )
    for kind in ("epistemic", "aleatoric", "total"):
        ((step, histogram),) = run.histograms[f"uncertainty/distribution/{kind}"]
        assert (step, histogram.num) == (1, 32)
    alone = logged(lambda writer: bthooks.log_uncertainty_metrics(writer, 0.25, 2))
    assert alone.group("uncertainty/", 2) == {"epistemic": 0.25}


@pytest.mark.parametrize(
    "arguments",
    [(torch.empty(0),), (torch.ones(2) * 1j,), (torch.ones(2), torch.ones(3)), ("high",)],
)
def test_uncertainties_of_no_sense_are_refused(tmp_path, arguments):
    epistemic, *aleatoric = arguments
    with (
        make_writer(tmp_path, "run") as writer,
        pytest.raises((TypeError, ValueError), match=r"epistemic|aleatoric"),
    ):
        bthooks.log_uncertainty_metrics(
            writer, epistemic, 0, aleatoric=aleatoric[0] if aleatoric else None
        )


def test_histograms_of_odd_values(logged):
    odd = {
        "plain": torch.randn(1000),
        "nan": torch.tensor([1.0, math.nan, math.inf, 2.0]),
        "all nan": torch.full((3,), math.nan),
        "empty": torch.empty(0),
        "bool": torch.tensor([True, False]),
        "int": torch.arange(10),
        "bf16": torch.randn(10).bfloat16(),
        "huge": torch.tensor([1e25, -1e25]),
        "complex": torch.randn(4, dtype=torch.complex64),
        "constant": torch.ones(5),
        "0-d": torch.tensor(3.0),
    }
    run = logged(lambda writer: bthooks.log_activations(writer, odd, 6))
    counts = {tag: h.num for tag, ((_, h),) in run.histograms.items()}
    assert counts == {
        "activations/plain": 1000,
        "activations/nan": 2,
        "activations/bool": 2,
        "activations/int": 10,
        "activations/bf16": 10,
        "activations/huge": 2,
        "activations/complex": 8,
        "activations/constant": 5,
        "activations/0-d": 1,
    }
    assert all(sum(h.bucket) == h.num for ((_, h),) in run.histograms.values())
    assert run.group("health/nonfinite/activations/", 6) == {"nan": 2, "all_nan": 3}


def test_model_histograms(logged):
    model = gradients()
    model[0].weight.grad[0, :2] = math.nan
    run = logged(lambda writer: bthooks.log_model_histograms(writer, model, 0, prefix="g"))
    names = ["scale", "unused", "0.weight", "0.bias", "1.weight"]
    assert run.histograms.keys() == {f"g/parameters/{n}" for n in names} | {
        f"g/gradients/distribution/{n}" for n in names if n != "unused"
    }
    ((_, h),) = run.histograms["g/gradients/distribution/0.weight"]
    assert h.num == 300 * 400 - 2
    assert run.group("g/health/nonfinite/", 0) == {"gradients/0.weight": 2}
    ((_, h),) = run.histograms["g/parameters/0.weight"]
    assert h.min == model[0].weight.min().item()
    assert h.max == model[0].weight.max().item()
    assert h.sum == pytest.approx(model[0].weight.double().sum().item(), rel=1e-6)


def test_text_and_hparams(logged):
    def write(writer):
        bthooks.log_text(writer, "samples/a b", "# title", 2, prefix="val")
        hparams = {
            "lr": 1e-3,
            "layers": 4,
            "amp": True,
            "name": "adam",
            "none": None,
            "betas": [0.9, 0.99],
            "tensor": torch.tensor(0.5),
            "numpy": np.float64(2.0),
        }
        bthooks.log_hparams(writer, hparams, {"accuracy": torch.tensor(0.97), "loss": 1})

    run = logged(write)
    assert run.texts["val/samples/a_b/text_summary"] == [(2, "# title")]
    assert run.group("hparams/", 0) == pytest.approx({"accuracy": 0.97, "loss": 1.0})


HPARAMS = {
    "a": {"lr": 0.5, "amp": True, "none": None, "name": "adam"},
    "b": {"lr": np.float64(0.25), "layers": np.int64(3), "amp": np.bool_(False)},
    "c": {"clip": math.inf, "betas": [0.9, 0.99], "huge": 10**400, "t": torch.tensor([0.5])},
}
TABLE = {
    "a": {"lr": 0.5, "amp": True, "name": "adam"},
    "b": {"lr": 0.25, "layers": 3.0, "amp": False},
    "c": {"clip": "inf", "betas": "[0.9, 0.99]", "huge": str(10**400), "t": 0.5},
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hparams_tab_has_the_columns_of_all_runs(tmp_path, backend):
    """As TensorBoard's plugin reads them, in the folder of several runs."""
    from google.protobuf import json_format
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, list_session_groups
    from tensorboard.plugins.hparams.backend_context import Context

    for run, hparams in HPARAMS.items():
        with make_writer(tmp_path, run, backend=backend) as writer:
            bthooks.log_hparams(writer, hparams, {run: 0.5, "loss": 1}, prefix="p" * (run == "c"))
    assert read(tmp_path / "a").files == 1
    many = plugin_event_multiplexer.EventMultiplexer()
    many.AddRunsFromDirectory(str(tmp_path))
    many.Reload()
    provider = data_provider.MultiplexerDataProvider(many, str(tmp_path))
    context = Context(
        base_plugin.TBContext(logdir=str(tmp_path), data_provider=provider, multiplexer=many)
    )
    request = RequestContext()
    content = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(request, "", True, content, [])
    kinds = {info.name: info.type for info in experiment.hparam_infos}
    assert kinds.keys() == set().union(*TABLE.values())
    assert kinds["amp"] == api_pb2.DATA_TYPE_BOOL
    assert kinds["lr"] == kinds["layers"] == api_pb2.DATA_TYPE_FLOAT64
    assert {metric.name.tag for metric in experiment.metric_infos} == {
        *("hparams/a", "hparams/b", "hparams/loss", "p/hparams/c", "p/hparams/loss")
    }
    asked = api_pb2.ListSessionGroupsRequest(slice_size=10)
    asked.allowed_statuses.append(api_pb2.STATUS_SUCCESS)
    asked.col_params.extend(api_pb2.ColParams(hparam=name) for name in kinds)
    found = list_session_groups.Handler(request, context, "", asked).run()
    table = {
        group.sessions[0].name: json_format.MessageToDict(group)["hparams"]
        for group in found.session_groups
    }
    assert table == TABLE


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: bthooks.log_metrics(w, [1.0], 0), "dict of numbers, got list"),
        (lambda w: bthooks.log_metrics(w, {3: 1.0}, 0), "non-empty str, got 3"),
        (lambda w: bthooks.log_learning_rate(w, 0.1, 0), "torch.optim.Optimizer, got float"),
        (lambda w: bthooks.log_gradients(w, {}, 0), "torch.nn.Module, got dict"),
        (lambda w: bthooks.log_model_histograms(w, None, 0), "torch.nn.Module, got NoneType"),
        (lambda w: bthooks.log_activations(w, torch.ones(3), 0), "dict of tensors, got Tensor"),
        (
            lambda w: bthooks.log_activations(w, {"a": "b"}, 0),
            "'a' is a tensor of numbers, got str",
        ),
        (lambda w: bthooks.log_text(w, "tag", 3, 0), "is a str, got int"),
        (lambda w: bthooks.log_text(w, "/", "text", 0), "non-empty str, got '/'"),
        (lambda w: bthooks.log_metrics("runs", {"a": 1.0}, 0), "got str, which has no add_scalar"),
        (lambda w: bthooks.log_hparams(3, {}, {}), "got int, which has no add_hparams"),
        (lambda w: bthooks.log_hparams(w, [], {}), "hparams are a dict, got list"),
        (lambda w: bthooks.log_hparams(w, {}, {"a": None}), "'a' is one real number"),
    ],
)
def test_bad_input_is_refused_at_the_call(tmp_path, call, message):
    with make_writer(tmp_path, "run") as writer, pytest.raises(TypeError, match=message):
        call(writer)


def test_without_a_writer_every_function_does_nothing():
    model = gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bthooks.log_metrics(None, {"loss": 1.0}, 0)
    bthooks.log_learning_rate(None, optimizer, 0)
    bthooks.log_gradients(None, model, 0)
    bthooks.log_attention_stats(None, weights(), 0)
    bthooks.log_uncertainty_metrics(None, torch.ones(2), 0)
    bthooks.log_model_histograms(None, model, 0)
    bthooks.log_activations(None, {"a": torch.ones(2)}, 0)
    bthooks.log_text(None, "tag", "text", 0)
    bthooks.log_hparams(None, {}, {})
