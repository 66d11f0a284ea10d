"""What is written about the code is true: examples, tag tables."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bthooks

from .conftest import read
from .models import Transformer, batch

PACKAGE = Path(bthooks.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "bthooks."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tmp_path):
    module = importlib.import_module(name)
    with bthooks.make_writer(tmp_path, "run") as writer:
        failed, _ = doctest.testmod(module, extraglobs={"writer": writer})
    assert failed == 0


def test_every_public_function_has_an_example():
    for name in bthooks.__all__:
        value = getattr(bthooks, name)
        assert value.__doc__, name
        if inspect.isfunction(value):
            assert ">>>" in value.__doc__, name
    assert list(bthooks.__all__) == sorted(bthooks.__all__)


def patterns(function):
    """The tags in the table of a docstring, as regular expressions."""
    cells = re.findall(r"^\s*\| (`.*?) \|", function.__doc__, re.MULTILINE)
    tags = [tag for cell in cells for tag in re.findall(r"`([^`]+)`", cell)]
    return [
        re.compile(
            re.sub(r"<\w+>", "[^/]+", re.escape(tag).replace(r"\<", "<").replace(r"\>", ">"))
        )
        for tag in tags
    ]


def model_with_gradients():
    model = Transformer()
    model(batch(0)[0])["logits"].sum().backward()
    next(model.parameters()).grad[0] = torch.nan
    model.head.weight.data[0, 0] = torch.inf
    return model


def adapting(optimizer):
    """One that estimates a `d`, as Prodigy does."""
    optimizer.param_groups[0]["d"] = 1e-3
    return optimizer


CALLS = {
    "log_metrics": lambda w: bthooks.log_metrics(w, {"loss": 1.0}, 0),
    "log_learning_rate": lambda w: bthooks.log_learning_rate(
        w, adapting(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)), 0
    ),
    "log_gradients": lambda w: bthooks.log_gradients(w, model_with_gradients(), 0),
    "log_attention_stats": lambda w: bthooks.log_attention_stats(
        w, torch.full((1, 2, 4, 4), 0.25).index_fill(2, torch.tensor([0]), 0.0), 0
    ),
    "log_uncertainty_metrics": lambda w: bthooks.log_uncertainty_metrics(
        w, torch.ones(3), 0, aleatoric=torch.tensor([1.0, torch.nan, 1.0])
    ),
    "log_model_histograms": lambda w: bthooks.log_model_histograms(w, model_with_gradients(), 0),
    "log_activations": lambda w: bthooks.log_activations(
        w, {"a": torch.tensor([1.0, torch.nan])}, 0
    ),
    "log_calibration": lambda w: bthooks.log_calibration(
        w,
        torch.tensor([[0.9, 0.1], [0.3, 0.7]]),
        torch.zeros(2).long(),
        0,
        uncertainty=torch.rand(2),
    ),
    "log_text": lambda w: bthooks.log_text(w, "tag", "text", 0),
    "log_hparams": lambda w: bthooks.log_hparams(w, {"lr": 1}, {"accuracy": 1}),
}


def attached(writer):
    model = Transformer()
    model.register_forward_hook(lambda module, args, out: out | {"loss": out["logits"].sum()})
    kinds = (*bthooks.capture.wanted.KINDS, *bthooks.capture.wanted.ON_REQUEST)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.blocks, model.head)]
    adapting(optimizers[0])
    scaler = torch.amp.GradScaler("cpu")
    with bthooks.attach(model, writer, capture=kinds) as handle:
        for optimizer in optimizers:
            scaler.scale(model(batch(0)[0])["logits"].sum()).backward()
            scaler.step(optimizer)
        model.eval()
        model.head.weight.data[0, 0] = torch.nan
        model(batch(0)[0])
        with pytest.warns(RuntimeWarning, match="nonfinite: head"):
            handle.flush()


@pytest.mark.parametrize("name", [*CALLS, "attach"])
def test_the_tag_table_is_what_is_written(name, tmp_path):
    with bthooks.make_writer(tmp_path, "run") as writer:
        (CALLS.get(name) or attached)(writer)
    run = read(tmp_path)
    texts = {tag.removesuffix("/text_summary") for tag in run.texts}
    tags = {
        tag
        for tag in {*run.scalars, *run.histograms, *run.images, *texts}
        if not tag.startswith("_hparams_")
    }
    table = patterns(getattr(bthooks, name))
    if name == "attach":
        assert any(tag.startswith("val/") for tag in tags)
        tags = {tag.removeprefix("val/") for tag in tags}
        table = [p for p in table if "val" not in p.pattern]
    if name == "log_text":
        assert tags == {"tag"}
        return
    for tag in tags:
        assert any(pattern.fullmatch(tag) for pattern in table), tag
    for pattern in table:
        assert any(pattern.fullmatch(tag) for tag in tags), pattern.pattern


README = (PACKAGE.parent / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_examples_in_the_readme_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert read(tmp_path).scalars


def test_every_call_in_the_readme_exists():
    for name in set(re.findall(r"bthooks\.(\w+)", README)):
        assert hasattr(bthooks, name), name
