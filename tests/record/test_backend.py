"""Patches of experiment trackers, written by hand as those that they make: each value once."""

import collections
import functools
import importlib
import types

import pytest
import torch
from torch import nn

import bthooks
from bthooks import attach, make_writer
from bthooks.record.backend import PACKAGES, write
from bthooks.record.event import Event

from ..conftest import read

METHODS = ("add_scalar", "add_histogram_raw", "add_image", "add_text", "add_custom_scalars")
HEARD: list[tuple[str, str]] = []


def wrapped(name, original):
    """As SwanLab's and Comet's: bears the name and the module of what it replaces."""

    @functools.wraps(original)
    def method(*args, **kwargs):
        tag = next((a for a in (*args, kwargs.get("tag")) if isinstance(a, str)), "")
        HEARD.append((name, tag))
        return original(*args, **kwargs)

    return method


def plain(name, original):
    def method(self, tag, *args, **kwargs):
        HEARD.append((name, tag if isinstance(tag, str) else ""))
        return original(self, tag, *args, **kwargs)

    return method


class Proxy:
    """As wrapt's: says that it is what it wraps."""

    def __init__(self, name, original):
        self.name, self.original = name, original

    def __get__(self, writer, kind=None):
        return self if writer is None else types.MethodType(self, writer)

    def __call__(self, *args, **kwargs):
        return wrapped(self.name, self.original)(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.original, name)

    __class__ = types.FunctionType


def writer_module(backend):
    return importlib.import_module(f"{PACKAGES[backend]}.writer")


def on_class(monkeypatch, writer, names, patch):
    for name in names:
        monkeypatch.setattr(type(writer), name, patch(name, getattr(type(writer), name)))


def on_instance(monkeypatch, writer, names, patch):
    for name in names:
        setattr(writer, name, wrapped(name, getattr(writer, name)))


EVENT = Event(
    scalars={"a": 1.0, "b": 2.0},
    histograms={"h": bthooks.histogram(torch.arange(100.0))},
    images={"i": torch.zeros(4, 4, 3, dtype=torch.uint8)},
    texts={"t": "text"},
    layout={"chart": {"c": ["Multiline", ["a"]]}},
)
GIVEN = collections.Counter(zip((METHODS[0], *METHODS), ("a", "b", "h", "i", "t", ""), strict=True))


@pytest.fixture(autouse=True)
def _nothing_heard():
    HEARD.clear()


@pytest.mark.parametrize("names", [METHODS, ("add_scalar",), ("add_image", "add_text"), ()])
@pytest.mark.parametrize("patch", [wrapped, plain, Proxy])
@pytest.mark.parametrize("where", [on_class, on_instance])
def test_what_a_tracker_replaced_is_called_once_for_each_value(
    where, patch, names, tmp_path, backend, monkeypatch
):
    with make_writer(tmp_path, "plain", backend=backend) as writer:
        write(writer, EVENT, 3)
    with make_writer(tmp_path, "patched", backend=backend) as writer:
        where(monkeypatch, writer, names, patch)
        write(writer, EVENT, 3)
    heard = collections.Counter(HEARD)
    assert heard == {key: count for key, count in GIVEN.items() if key[0] in names}
    assert repr(read(tmp_path / "patched")) == repr(read(tmp_path / "plain"))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("where", [on_class, on_instance])
def test_an_attachment_is_heard_by_a_tracker(where, late, tmp_path, backend, monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    writer = make_writer(tmp_path, "run", backend=backend)
    handle = None if late else attach(model, writer, every=1, on_error="raise")
    where(monkeypatch, writer, ["add_scalar"], wrapped)
    handle = handle or attach(model, writer, every=1, on_error="raise")
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    handle.detach()
    writer.close()
    assert HEARD.count(("add_scalar", "gradients/total_norm")) == 3
    assert [s for s, _ in read(tmp_path).scalars["gradients/total_norm"]] == [0, 1, 2]


@pytest.mark.parametrize("name", ["add_event", "add_summary"])
@pytest.mark.parametrize("where", ["class", "instance", "event writer"])
def test_a_tracker_beneath_the_writer_gets_all(where, name, tmp_path, backend, monkeypatch):
    """As MLflow's, ClearML's and W&B's; MLflow's takes the step as an argument of its own."""
    module = writer_module(backend)
    with make_writer(tmp_path, "run", backend=backend) as writer:
        file_writer = writer.file_writer
        thing = {"class": module.FileWriter, "instance": file_writer}.get(where)
        thing = thing or file_writer.event_writer
        if not hasattr(thing, name):
            return
        original = getattr(thing, name)
        steps = (4,) if where != "event writer" else ()

        def patched(*args, **kwargs):
            given = args[-1 - len(steps)] if where != "class" else args[1]
            summary = getattr(given, "summary", given)
            HEARD.extend((args[2:3] or steps, value.tag) for value in summary.value)
            if where == "class" and name == "add_event":
                assert len(args) == 3 or "step" in kwargs or len(args) == 4
            return original(*args, **kwargs)

        monkeypatch.setattr(thing, name, patched)
        write(writer, EVENT, 4)
    tags = [tag.removesuffix("/text_summary") for _, tag in HEARD]
    assert sorted(tags) == ["a", "b", "custom_scalars__config__", "h", "i", "t"]


def test_a_tracker_that_wraps_what_opens_event_files(tmp_path, backend, monkeypatch):
    """As W&B's: from wandb.init on, which may come after attach."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(model, tmp_path, every=1, backend=backend, on_error="raise")
    module = writer_module(backend)

    class Heard(module.EventFileWriter):
        def __init__(self, logdir, *args, **kwargs):
            HEARD.append(("open", logdir))
            super().__init__(logdir, *args, **kwargs)

    monkeypatch.setattr(module, "EventFileWriter", Heard)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    handle.detach()
    assert [("open", str(tmp_path))] == HEARD
    assert read(tmp_path).files == 1


@pytest.mark.filterwarnings("error")
def test_a_tracker_that_fails_costs_its_value_alone(tmp_path, backend, monkeypatch):
    with make_writer(tmp_path, "run", backend=backend) as writer:
        original = type(writer).add_scalar

        def patched(self, tag, *args):
            if tag == "a":
                raise ConnectionError("the tracker is down")
            original(self, tag, *args)

        monkeypatch.setattr(type(writer), "add_scalar", patched)
        with pytest.raises(ConnectionError, match="is down"):
            write(writer, EVENT, 0)
    run = read(tmp_path)
    assert run.scalars == {"b": [(0, 2.0)]}
    assert run.histograms.keys() | run.images.keys() == {"h", "i"}


def test_a_tracker_that_fails_does_not_stop_training(tmp_path, backend, monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def patched(self, *args):
        raise ConnectionError("the tracker is down")

    monkeypatch.setattr(writer_module(backend).SummaryWriter, "add_scalar", patched)

    def train():
        with attach(model, tmp_path, every=1, backend=backend):
            for _ in range(3):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()

    with pytest.warns(RuntimeWarning, match="event file: .*the tracker is down") as caught:
        train()
    assert len(caught) == 1


class Experiment:
    """Comet's."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: HEARD.append((name, str(args[:1])))


def test_comet_hears_what_goes_to_tensorboardX(tmp_path, monkeypatch):
    utils = importlib.import_module("tensorboardX.comet_utils")
    comet = types.SimpleNamespace(
        config=types.SimpleNamespace(),
        init=lambda: None,
        get_global_experiment=lambda: None,
        Experiment=lambda **_: Experiment(),
    )
    monkeypatch.setattr(utils, "comet_installed", True)
    monkeypatch.setattr(utils, "comet_ml", comet, raising=False)
    for disabled in (False, True):
        HEARD.clear()
        options = {"comet_config": {"disabled": disabled}, "backend": "tensorboardX"}
        with make_writer(tmp_path, f"{disabled}", **options) as writer:
            bthooks.log_metrics(writer, {"loss": 1.0}, 0)
            bthooks.log_metrics(writer, {"loss": 2.0}, 1)
        assert HEARD.count(("log_metric", "('train/loss',)")) == (0 if disabled else 2)
        assert read(tmp_path / f"{disabled}").scalars["train/loss"] == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize("name", ["add_hparams", "add_scalar"])
def test_a_tracker_hears_of_hyperparameters(name, tmp_path, backend, monkeypatch):
    """As MLflow's."""
    with make_writer(tmp_path, "run", backend=backend) as writer:
        original = getattr(type(writer), name)

        def patched(self, *args, **kwargs):
            HEARD.append(args[:2])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(writer), name, patched)
        bthooks.log_hparams(writer, {"lr": 0.5, "amp": True, "none": None}, {"accuracy": 1.0})
    if name == "add_hparams":
        assert HEARD[0] == ({"lr": 0.5, "amp": True}, {"hparams/accuracy": 1.0})
    else:
        assert HEARD == [("hparams/accuracy", 1.0)]
        assert read(tmp_path).scalars == {"hparams/accuracy": [(0, 1.0)]}
