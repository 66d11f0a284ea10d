"""What a signal's handler, a garbage collection or a callback asks for in the middle of a write."""

import gc
import os
import signal
import sys
import threading
import unittest.mock

import pytest
import torch
from torch import nn

import bthooks
from bthooks import attach
from bthooks.record import turns

from ..conftest import DEADLINE, Kept, read
from ..models import Transformer, batch


class Busy:
    """A writer in whose calls something happens."""

    def __init__(self):
        self.during, self.seen, self.is_in = lambda: None, [], False

    def add_scalar(self, tag, value, step):
        assert not self.is_in, "a call inside a call"
        self.seen.append((tag, step))
        self.is_in = True
        during, self.during = self.during, lambda: None
        during()
        self.is_in = False

    def flush(self):
        assert not self.is_in, "a flush inside a call"

    add_histogram_raw = add_image = add_text = lambda self, *args, **kwargs: None

    def steps(self):
        assert len(set(self.seen)) == len(self.seen)
        return [step for tag, step in self.seen if tag == "gradients/total_norm"]


def kill():
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def on_signal():
    """Sets what the handler of SIGUSR1 does."""
    former = signal.getsignal(signal.SIGUSR1)
    yield lambda call: signal.signal(signal.SIGUSR1, lambda *_: call())
    signal.signal(signal.SIGUSR1, former)


def trained(model, steps, during, writer):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        writer.during = during
        optimizer.step()


@pytest.mark.parametrize("way", ["signal", "call"])
@pytest.mark.parametrize("what", ["flush", "detach", "state_dict", "report", "writer"])
def test_what_is_asked_in_the_middle_of_a_write_comes_after_it(what, way, on_signal):
    writer, model = Busy(), nn.Linear(2, 2)
    with attach(model, writer, every=1, on_error="raise") as handle:

        def ask():
            getattr(handle, what)() if what != "writer" else handle.writer

        on_signal(ask)
        trained(model, 4, kill if way == "signal" else ask, writer)
    expected = [0] if what == "detach" else [0, 1, 2, 3]
    assert writer.steps() == expected


def test_a_model_that_dies_in_the_middle_of_a_write_loses_nothing():
    writer, model = Busy(), nn.Sequential(nn.Linear(2, 2))
    model.me = [model]
    parameters = nn.ParameterList(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1)
    attach(model, writer, every=1, on_error="raise")
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if step == 2:
            del model
            writer.during = gc.collect
        optimizer.step()
    assert writer.steps() == [0, 1]
    assert not bthooks.record.recorder._recorders


def test_a_flush_in_the_middle_of_a_step_of_two_optimizers_keeps_the_second(tmp_path):
    writer, model = Busy(), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizers = [torch.optim.SGD(part.parameters(), 1e-3) for part in model]
    with attach(model, writer, every=1) as handle:
        for _ in range(3):
            for part, optimizer in zip(model, optimizers, strict=True):
                part(torch.ones(1, 2)).sum().backward()
                writer.during = handle.flush
                optimizer.step()
                optimizer.zero_grad()
    for name in "0.weight", "1.weight":
        found = [step for tag, step in writer.seen if tag == f"gradients/norm/{name}"]
        assert found == [0, 1, 2]


@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_a_handler_in_the_middle_of_the_backends_own_write(backend, tmp_path, on_signal):
    """Their queues hold a lock, which the thread that holds it would wait for."""
    model = nn.Linear(2, 2)
    with attach(model, tmp_path, every=1, backend=backend, on_error="raise") as handle:
        writer = handle.writer
        file_writer = writer.file_writer.event_writer
        queue = getattr(file_writer, "_event_queue", None) or file_writer._async_writer._byte_queue
        put = queue.put

        def put_and_kill(*args):
            kill()
            put(*args)

        on_signal(handle.flush)
        with unittest.mock.patch.object(queue, "put", put_and_kill):
            trained(model, 3, None, unittest.mock.Mock())
            bthooks.log_metrics(writer, {"loss": 1.0}, 0)
    run = read(tmp_path)
    assert [step for step, _ in run.scalars["gradients/total_norm"]] == [0, 1, 2]
    assert run.scalars["train/loss"] == [(0, 1.0)]


@pytest.mark.filterwarnings("ignore:bthooks. exploding_gradients")
@pytest.mark.parametrize("what", ["flush", "detach"])
def test_an_alert_is_told_when_its_step_is_written(what, tmp_path):
    model, on_disk = nn.Linear(2, 2), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)

    def told(alert):
        getattr(handle, what)()
        on_disk.append([step for step, _ in read(tmp_path).scalars["gradients/total_norm"]])

    large = bthooks.Thresholds(growth=1e-3)
    handle = attach(model, tmp_path, every=1, thresholds=large, on_alert=told, on_error="raise")
    for _ in range(4):
        optimizer.zero_grad()
        (100 * model(torch.ones(1, 2)).sum()).backward()
        optimizer.step()
    handle.detach()
    assert on_disk[0][:2] == [0, 1]


def test_another_thread_waits():
    writer, model, other = Busy(), nn.Linear(2, 2), []
    with attach(model, writer, every=1, on_error="raise"):
        (recorder,) = bthooks.record.recorder._recorders

        def flush_elsewhere():
            thread = threading.Thread(target=recorder.flush)
            thread.start()
            thread.join(0.2)
            other.append(thread)

        trained(model, 4, flush_elsewhere, writer)
        for thread in other:
            thread.join(DEADLINE)
    assert other
    assert writer.steps() == [0, 1, 2, 3]


def test_what_fails_later_is_said_to_no_one_but_the_user():
    def work():
        with turns.turn:
            assert turns.put_off(lambda: 1 / 0)
            assert turns.put_off(lambda: done.append(1))

    done = []
    with pytest.warns(RuntimeWarning, match="bthooks: ZeroDivisionError: division by zero"):
        work()
    assert done == [1]
    assert not turns.put_off(lambda: None)


def interrupted(ask=None, first=0, every=0):
    """Four steps, each validated, of which two are logged; `ask` comes in the middle of them.

    At the line of ours numbered `first`, and each `every` lines from there on.

    Returns:
        what was written, and how many lines ran.
    """
    torch.manual_seed(0)
    model, x, lines = Transformer(layers=1).eval(), batch(0)[0], 0
    optimizer, writer = torch.optim.SGD(model.parameters(), 1e-2), Kept()

    def line(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        passed = lines - first
        if ask is not None and event == "line" and (passed % every if every else passed) == 0:
            ask(handle)
        return line

    def call(frame, event, argument):
        return line if OURS in frame.f_code.co_filename else None

    with attach(model.train(), writer, every=2, histograms_every=2, on_error="raise") as handle:
        former = sys.gettrace()
        sys.settrace(call)
        try:
            for _ in range(4):
                optimizer.zero_grad()
                model.train()(x)["logits"].sum().backward()
                optimizer.step()
                model.eval()(x), model(x)
        finally:
            sys.settrace(former)
    assert not torch._C._len_torch_dispatch_stack()
    for tag, points in (writer.scalars | writer.histograms).items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    return writer, lines


OURS = os.path.dirname(bthooks.__file__)


@pytest.mark.parametrize("what", ["flush", "state_dict", "writer", "report"])
def test_nothing_is_lost_by_what_is_asked_at_any_line_of_ours(what):
    def ask(handle):
        getattr(handle, what)() if what != "writer" else handle.writer

    plain, lines = interrupted()
    assert lines > 10_000
    for first in range(0, 997, 199 if what == "flush" else 499):
        writer, _ = interrupted(ask, first, 997)
        assert writer.scalars == plain.scalars
        assert writer.histograms.keys() == plain.histograms.keys()


def test_a_detach_at_any_line_of_ours_takes_everything_off():
    _, lines = interrupted()
    for first in range(0, lines, lines // 40):
        writer, _ = interrupted(bthooks.Handle.detach, first)
        assert writer.scalars or first < lines // 4
