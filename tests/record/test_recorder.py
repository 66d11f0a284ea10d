import time
import unittest.mock

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.data import server_ingester
from tensorboard.util.grpc_util import ChannelCredsType
from torch import nn

import bthooks
from bthooks import attach
from bthooks.__main__ import main

from ..conftest import DEADLINE, read
from ..models import Transformer, batch


@pytest.mark.parametrize("back_to", [0, 1, 4, 6])
def test_a_rollback_supersedes_the_abandoned_branch(back_to, tmp_path, backend, capsys):
    """In one process: the state of an earlier step is loaded, and the run goes on otherwise."""
    model, x = nn.Linear(4, 2), torch.ones(1, 4)
    optimizer, states = torch.optim.SGD(model.parameters(), 1e-9), {}

    def go_on(scales):
        for scale in scales:
            states.setdefault(handle.step, handle.state_dict())
            optimizer.zero_grad()
            (scale * model.train()(x).sum()).backward()
            bthooks.log_metrics(handle.writer, {"scale": scale}, handle.step)
            optimizer.step()
            model.eval()(x)

    quiet = bthooks.Thresholds(exploding=100.0)
    with attach(
        model, tmp_path, every=1, histograms_every=1, backend=backend, thresholds=quiet
    ) as handle:
        with pytest.warns(RuntimeWarning, match="exploding_gradients: root: step 4") as told:
            go_on([1.0] * 3 + [100.0] * 4)
        handle.load_state_dict(states[back_to])
        assert handle.step == back_to
        assert len(handle.alerts) == (back_to > 4)
        go_on([2.0] * 4)
    assert len(told) == 1
    run, end = read(tmp_path), back_to + 4
    kept = [1.0] * min(3, back_to) + [100.0] * max(0, back_to - 3)
    assert [s for s, _ in run.scalars["gradients/total_norm"]] == list(range(end))
    norms = [value / 10**0.5 for _, value in run.scalars["gradients/total_norm"]]
    assert norms == pytest.approx([*kept, 2.0, 2.0, 2.0, 2.0])
    assert [value for _, value in run.scalars["train/scale"]] == [*kept, 2.0, 2.0, 2.0, 2.0]
    assert [s for s, _ in run.histograms["gradients/distribution/bias"]] == list(range(end))
    # What serves where TensorBoard's faster reader is not installed.
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    assert [e.step for e in events.Tensors("gradients/total_norm")] == list(range(end))
    assert [e.step for e in events.Tensors("custom_scalars__config__")][-1] <= back_to
    assert main([str(tmp_path), "--report"]) == 0
    report = capsys.readouterr().out
    assert ("over  exploding_gradients: root: step 4" in report) == (back_to > 4)
    assert f"step {end - 1}\n" in report


def rust(directory, tag):
    """The points of a scalar as TensorBoard's faster reader serves them, where it is installed."""
    binary = pytest.importorskip("tensorboard_data_server").server_binary()
    if binary is None:
        pytest.skip("no binary of it for this machine")
    server = server_ingester.SubprocessServerDataIngester(
        server_ingester.ServerBinary(binary, version=None),
        str(directory),
        reload_interval=0,
        channel_creds_type=ChannelCredsType.LOCAL,
        samples_per_plugin={"scalars": 0},
    )
    server.start()
    until, found = time.monotonic() + DEADLINE, {}
    while not found and time.monotonic() < until:  # it answers before it has read anything
        found = server.data_provider.read_scalars(
            RequestContext(), experiment_id="", plugin_name="scalars", downsample=1000
        )
    (points,) = found.values()
    return [(point.step, point.value) for point in points[tag]]


def session(directory, steps, scale, *, state=None, before=lambda handle: None, **options):
    """So many steps of an attachment of its own, with a validation after each.

    Returns:
        the state at each step.
    """
    torch.manual_seed(0)
    model, x, states = Transformer(), batch(0)[0], {}
    for block in model.blocks:
        block.drop.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    options = {"every": 1, "histograms_every": 1, "thresholds": QUIET} | options
    with attach(model, directory, **options) as handle:
        before(handle)
        if state is not None:
            handle.load_state_dict(state)
        for _ in range(steps):
            states[handle.step] = handle.state_dict()
            optimizer.zero_grad()
            (scale * model.train()(x)["logits"].sum()).backward()
            optimizer.step()
            model.eval()(x)
        states[handle.step] = handle.state_dict()
    return states


QUIET = bthooks.Thresholds(exploding=1e9)
# Each session resumes at a step of one before, and goes on so many steps.
SESSIONS = {
    "once": [(0, 7), (4, 4)],
    "further back the second time": [(0, 5), (4, 3), (2, 3)],
    "where it ended": [(0, 3), (3, 3)],
    "later than what is left": [(0, 6), (2, 1), (6, 2)],
    "twice where it was": [(0, 4), (2, 3), (2, 3)],
    "from the start": [(0, 3), (0, 2)],
    "many in one second": [(0, 2), *[(1, 2)] * 5],
}


@pytest.mark.parametrize("sessions", SESSIONS.values(), ids=SESSIONS)
def test_a_resume_by_path_supersedes_what_is_in_the_folder(sessions, tmp_path, backend, capsys):
    states, expected = {}, {}
    for number, (start, steps) in enumerate(sessions, 1):
        state = states.get(start) if number > 1 else None
        folder = tmp_path / "run"
        states |= session(folder, steps, number, state=state, backend=backend, prefix="p")
        expected = {step: scale for step, scale in expected.items() if step < start}
        expected |= dict.fromkeys(range(start, start + steps), number)
    run = read(tmp_path)
    assert run.files == len(sessions)
    norms = run.scalars["p/gradients/total_norm"]
    unit = norms[0][1] / expected[0]
    assert norms == [(s, pytest.approx(unit * scale)) for s, scale in sorted(expected.items())]
    for kind in (run.scalars, run.histograms, run.images):
        for tag, points in kind.items():
            assert [step for step, _ in points] == sorted(expected), tag
    assert {"p/val/attention/head_entropy", "p/attention/head_entropy"} <= run.images.keys()
    events = plugin_event_accumulator.EventAccumulator(str(folder), {"tensors": 0}).Reload()
    assert [e.step for e in events.Tensors("p/gradients/total_norm")] == sorted(expected)
    assert main([str(tmp_path), "--report"]) == 0
    assert f"run: step {max(expected)}\n" in capsys.readouterr().out
    if len(sessions) < 4:  # it starts a process
        assert rust(tmp_path, "p/gradients/total_norm") == norms


BEFORE = {
    "the writer is used": lambda handle, states: bthooks.log_metrics(
        handle.writer, {"loss": 1.0}, 0
    ),
    "another state is loaded": lambda handle, states: handle.load_state_dict(states[1]),
    "an earlier one is loaded and used": lambda handle, states: (
        handle.load_state_dict(states[2]),
        bthooks.log_metrics(handle.writer, {"loss": 1.0}, 2),
    ),
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_what_is_done_before_a_resume_by_path_changes_nothing(before, tmp_path, backend):
    states = session(tmp_path, 6, 1.0, backend=backend)
    state = states[4]
    session(
        tmp_path, 3, 2.0, state=state, backend=backend, before=lambda handle: before(handle, states)
    )
    run = read(tmp_path)
    left = range(4) if before is not BEFORE["an earlier one is loaded and used"] else range(2)
    steps = [step for step, _ in run.scalars["gradients/total_norm"]]
    assert steps == [*left, 4, 5, 6]
    assert len(run.scalars.get("train/loss", [0])) == 1


def test_a_new_writer_that_is_given_is_as_a_path(tmp_path, backend):
    states = session(tmp_path / "run", 6, 1.0, backend=backend)
    time.sleep(1.1)  # its file is opened before it is known that it goes on
    with bthooks.make_writer(tmp_path, "run", backend=backend) as writer:
        session(writer, 3, 2.0, state=states[4])
        session(writer, 2, 2.0, state=states[5])
    run = read(tmp_path)
    assert run.files == 2
    assert [step for step, _ in run.scalars["gradients/total_norm"]] == list(range(7))


@pytest.mark.parametrize("first", [0, 1])
def test_two_that_resume_go_on_each_from_its_step(first, tmp_path, backend):
    models, prefixes = [nn.Linear(2, 2), nn.Linear(2, 2)], "ab"
    optimizers = [torch.optim.SGD(model.parameters(), 1e-9) for model in models]

    def train(counts, states=None):
        options = {"backend": backend, "every": 1}
        handles = [
            attach(model, tmp_path, prefix=prefix, **options)
            for model, prefix in zip(models, prefixes, strict=True)
        ]
        for at in (first, 1 - first) if states else ():
            handles[at].load_state_dict(states[at])
        for model, optimizer, count in zip(models, optimizers, counts, strict=True):
            for _ in range(count):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
        found = [handle.state_dict() for handle in handles]
        for handle in handles:
            handle.detach()
        return found

    states = train((2, 3))
    train((2, 2), states)
    train((3, 2), states)
    run = read(tmp_path)
    assert run.files == 3
    steps = [[s for s, _ in run.scalars[f"{one}/gradients/total_norm"]] for one in prefixes]
    assert steps == [[0, 1, 2, 3, 4], [0, 1, 3, 4]]  # the mark knows no tags: 2 of b is hidden


def test_alerts_of_what_is_superseded_are(tmp_path, backend, capsys):
    options = {"backend": backend, "thresholds": bthooks.Thresholds(exploding=100.0)}
    states = session(tmp_path, 4, 1.0, **options)
    with pytest.warns(RuntimeWarning, match="exploding_gradients: head: step 5"):
        session(tmp_path, 4, 1e3, state=states[4], **options)
    assert main([str(tmp_path), "--report"]) == 1
    session(tmp_path, 1, 1.0, state=states[4], **options)
    # The reader of what serves; EventAccumulator leaves texts where they are.
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    assert events.Tensors("health/alerts/text_summary") == []
    assert main([str(tmp_path), "--report"]) == 0
    assert "no alerts" in capsys.readouterr().out


def test_a_resume_hides_what_others_wrote_before_but_not_what_they_write_now(tmp_path, backend):
    """The mark is of the folder: it knows no tags."""
    states = session(tmp_path, 4, 1.0, backend=backend, prefix="a")
    session(tmp_path, 6, 1.0, backend=backend, prefix="b")
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    with attach(model, tmp_path, backend=backend, prefix="c", every=1, step=1) as handle:
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        handle.flush()
        with pytest.warns(RuntimeWarning, match="resume: other attachments .* at step 2 and after"):
            session(tmp_path, 1, 2.0, backend=backend, prefix="a", state=states[2])
        session(tmp_path, 1, 2.0, backend=backend, prefix="a", state=states[4])
    events = EventAccumulator(str(tmp_path), {"scalars": 0}).Reload()
    steps = {one: [e.step for e in events.Scalars(f"{one}/gradients/total_norm")] for one in "abc"}
    assert steps == {"a": [0, 1, 2, 3, 2, 4], "b": [0, 1, 2, 3], "c": [1, 2, 3]}


def test_step_alone_supersedes_nothing(tmp_path, backend):
    session(tmp_path, 4, 1.0, backend=backend)
    session(tmp_path, 1, 1.0, backend=backend, step=2, prefix="evaluated")
    run = read(tmp_path)
    assert [step for step, _ in run.scalars["gradients/total_norm"]] == [0, 1, 2, 3]
    assert [step for step, _ in run.scalars["evaluated/gradients/total_norm"]] == [2]


def test_a_file_of_the_future_is_said(tmp_path):
    states = session(tmp_path, 3, 1.0)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "events.out.tfevents.9999999999.elsewhere.1.0")
    with pytest.warns(RuntimeWarning, match="resume: .* of a later time than this machine's"):
        session(tmp_path, 1, 1.0, state=states[1])


def test_a_rollback_on_a_writer_without_a_file_is_said():
    model, writer = nn.Linear(2, 2), unittest.mock.Mock()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step():
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    with attach(model, writer, every=1) as handle:
        step()
        state = handle.state_dict()
        step()
        with pytest.warns(RuntimeWarning, match="resume: the writer is no SummaryWriter"):
            handle.load_state_dict(state)
        step()
    calls = [call.args for call in writer.add_scalar.call_args_list]
    assert [step for tag, _, step in calls if tag == "learning_rate/0"] == [0, 1, 1]


def test_inference_that_is_resumed_keeps_its_points(tmp_path):
    model, (x, _) = Transformer().eval(), batch(0)
    with attach(model, tmp_path, every=1) as handle:
        for _ in range(2):
            for _ in range(3):
                model(x)
            handle.load_state_dict(handle.state_dict())
        assert handle.step == 6
    points = read(tmp_path).scalars["val/uncertainty/epistemic"]
    assert [step for step, _ in points] == list(range(6))


@pytest.mark.filterwarnings("ignore:bthooks. exploding_gradients")
def test_a_step_may_be_of_numpy(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    large = bthooks.Thresholds(growth=1e-3)
    with attach(model, tmp_path, every=1, step=np.int64(3), thresholds=large) as handle:
        for _ in range(4):
            (model(torch.ones(1, 2)).sum() * 100).backward()
            optimizer.step()
    (alert,) = handle.alerts
    assert alert.step == 4
    assert [step for step, _ in read(tmp_path).scalars["gradients/total_norm"]] == [3, 4, 5, 6]
