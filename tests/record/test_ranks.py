"""What ranks do alone: none holds another up, and the file is true of those that are in it.

Several ranks in this one process, one after the other, with a store of their own.
"""

import contextlib
import math
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bthooks
from bthooks.measure.readings import Readings
from bthooks.record import ranks as exchange
from bthooks.record import recorder
from bthooks.record.mail import Mail, pack, unpack
from tests.conftest import read


class Attention(nn.Module):
    """Rank k looks at 16 keys with a sharpness of its own."""

    def __init__(self, sharpness):
        super().__init__()
        self.w, self.sharpness = nn.Parameter(torch.ones(1)), sharpness

    def forward(self, x):
        q = x[:, None] * self.sharpness
        y = F.scaled_dot_product_attention(q * self.w, q, x[:, None], scale=1.0)
        return {"out": y, "uncertainty": torch.full((4,), self.sharpness)}


class Rank:
    def __init__(self, number, sharpness):
        self.number, self.recorders, self.handle = number, [], None
        self.model = Attention(sharpness)
        self.reduces = self.model.w.register_hook(torch.ones_like)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-9)
        scores = torch.eye(16) * sharpness**2
        self.entropy = torch.special.entr(scores.double().softmax(-1)).sum(-1).mean().item()


class Job:
    """The ranks of a job that all live in this process."""

    def __init__(self, monkeypatch, size, directory, store=None):
        self.directory, self.store = directory, store or dist.HashStore()
        self.store.set_timeout(timedelta(seconds=2))  # of a `get` of what is not there
        self.ranks = [Rank(number, float(number)) for number in range(size)]
        self.now = self.ranks[0]
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: self.now.number)
        monkeypatch.setattr(dist, "get_world_size", lambda: size)
        monkeypatch.setattr(exchange, "default_group", lambda: self)
        monkeypatch.setattr(exchange, "own_store", lambda: self.store)
        monkeypatch.setattr(recorder, "_recorders", self.now.recorders)
        self._patch = monkeypatch

    @contextlib.contextmanager
    def on(self, number):
        before, self.now = self.now, self.ranks[number]
        self._patch.setattr(recorder, "_recorders", self.now.recorders)
        try:
            yield self.now
        finally:
            self.now = before
            self._patch.setattr(recorder, "_recorders", before.recorders)

    def attach(self, *numbers, every=1, **arguments):
        for number in numbers:
            with self.on(number) as rank:
                target = self.directory if number == 0 else None
                rank.handle = bthooks.attach(rank.model, target, every=every, **arguments)

    def step(self, *numbers):
        for number in numbers:
            with self.on(number) as rank:
                rank.model(torch.eye(16)[None])["out"].square().mean().backward()
                rank.optimizer.step()
                rank.optimizer.zero_grad()

    def unreduced(self, number):
        """A backward pass of a rank alone: its gradient is that of its own data."""
        with self.on(number) as rank:
            rank.reduces.remove()
            rank.model(torch.eye(16)[None])["out"].square().mean().backward()
            return rank.model.w.grad

    def do(self, what, *numbers):
        for number in numbers:
            with self.on(number) as rank:
                getattr(rank.handle, what)()

    def mean(self, *numbers):
        return pytest.approx(sum(self.ranks[n].entropy for n in numbers) / len(numbers), rel=1e-5)

    def entropies(self):
        return dict(read(self.directory).scalars["attention/mean_entropy"])


@pytest.fixture
def job(monkeypatch, tmp_path):
    made = []

    def make(size, store=None):
        made.append(Job(monkeypatch, size, tmp_path / "job", store))
        return made[-1]

    yield make
    for job in made:
        job.do("detach", *(rank.number for rank in job.ranks if rank.handle is not None))


@contextlib.contextmanager
def told():
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if "bthooks" in str(w.message)]


ALL = (0, 1, 2)
STORES = {
    "hash": lambda path: dist.HashStore(),
    "file": lambda path: dist.FileStore(str(path / "store"), 1),
    "tcp": lambda path: dist.TCPStore("127.0.0.1", 0, is_master=True),
    "prefix": lambda path: dist.PrefixStore("a", dist.HashStore()),
}


@pytest.mark.parametrize("store", STORES)
def test_the_means_are_those_of_all_ranks_and_nothing_is_said(store, job, tmp_path):
    job = job(3, STORES[store](tmp_path))
    with told() as said:
        job.attach(*ALL, on_error="raise")
        for _ in range(4):
            job.step(*ALL)
        job.do("detach", 2, 1, 0)
    assert said == []
    assert job.entropies() == dict.fromkeys(range(4), job.mean(*ALL))
    run = read(job.directory)
    assert [v for _, v in run.scalars["uncertainty/total"]] == pytest.approx([1.0] * 4)
    assert job.ranks[0].handle.report().captured["ranks"] == ("0", "1", "2")
    if store != "tcp":  # which holds keys of its own
        assert job.store.num_keys() <= 1 + (store == "file")  # that no rank writes


@pytest.mark.parametrize("absent", [1, 2])
def test_a_rank_that_did_not_attach_is_said(absent, job):
    job, there = job(3), {0, 1, 2} - {absent}
    with told() as said:
        job.attach(*there, on_error="raise")
        for _ in range(4):
            job.step(*ALL)
        job.do("detach", *sorted(there, reverse=True))
    assert len(said) == 1
    assert f"ranks not attached: {absent} of 3: " in said[0]
    assert "4 steps from 0 to 3" in job.ranks[0].handle.report().missed["ranks not attached"]
    assert job.entropies() == dict.fromkeys(range(4), job.mean(*there))


def test_without_the_rank_that_writes_nothing_waits_and_it_is_said(job):
    job = job(2)
    with told() as said:
        job.attach(1, on_error="raise")
        for _ in range(40):
            job.step(0, 1)
        job.do("detach", 1)
    assert len(said) == 1
    assert "40 messages of what rank 1 measured are not written: no rank has" in said[0]
    assert job.store.num_keys() == 1  # how many wait
    assert not job.directory.exists()


def test_one_that_comes_late_and_one_that_goes_early(job):
    job = job(3)
    with told() as said:
        job.attach(0, 1)
        for step in range(6):
            if step == 2:
                job.attach(2, step=2)
            if step == 4:
                job.do("detach", 1)
            job.step(*ALL)
        job.do("detach", 2, 0)
    found = job.entropies()
    assert [found[0], found[1]] == [job.mean(0, 1)] * 2
    assert [found[2], found[3]] == [job.mean(*ALL)] * 2
    assert [found[4], found[5]] == [job.mean(0, 2)] * 2
    assert any("ranks detached before: 1 of 3: " in one for one in said)
    late = job.ranks[0].handle.report().missed["ranks not attached"]
    assert "2 of 3: written without, 2 steps from 0 to 1" in late


def test_one_that_attached_before_the_one_that_writes_is_waited_for(job):
    """It has said so, though it has found none yet to which it could announce itself."""
    job = job(2)
    job.attach(1)
    job.attach(0)
    job.step(0)
    job.do("flush", 0)
    job.step(1)
    job.do("detach", 0, 1)
    assert job.entropies() == {0: job.mean(0, 1)}


def test_one_that_logs_other_steps(job):
    job = job(2)
    with told() as said:
        job.attach(0, every=2)
        job.attach(1, every=3)
        for _ in range(13):
            job.step(0, 1)
        job.do("detach", 1, 0)
    expected = {at: job.mean(0, 1) if at % 3 == 0 else job.mean(0) for at in range(0, 13, 2)}
    assert job.entropies() == expected
    (one,) = said
    assert "ranks that log other steps: 1 of 2: " in one


def test_one_that_dies_is_waited_for_until_the_next_logged_step(job, monkeypatch):
    monkeypatch.setattr(recorder, "PATIENCE", 0.1)
    job = job(2)
    with told() as said:
        job.attach(0, 1)
        for step in range(6):
            job.step(0, *[1] * (step < 3))
            job.do("flush", 0)
            job.do("flush", 0)
        assert max(job.entropies()) == 4  # the last one still waits
        job.do("detach", 0)
    found = job.entropies()
    assert [found[at] for at in range(6)] == [job.mean(0, 1)] * 3 + [job.mean(0)] * 3
    (one,) = said
    assert "ranks from which nothing came: 1 of 2: " in one


def test_one_that_is_slow_is_written_with_what_comes_in_time(job):
    job = job(2)
    with told() as said:
        job.attach(0, 1, every=2)
        for _ in range(3):  # rank 1 is always a step and a half behind
            job.step(0, 0, 0, 1, 0, 1, 1, 1)
        job.do("detach", 1, 0)
    found = job.entropies()
    assert said == []
    assert found == dict.fromkeys(range(0, 12, 2), job.mean(0, 1))


def test_what_the_store_holds_does_not_grow(job):
    job, keys = job(4), []
    job.attach(0, 1, 2, 3, on_error="raise")
    for _ in range(100):
        job.step(0, 1, 2, 3)
        keys.append(job.store.num_keys())
    assert max(keys[50:]) <= max(keys[:20])
    for _ in range(100):  # the one that takes has ended its training
        job.step(1, 2, 3)
    assert job.store.num_keys() < max(keys) + 3 * 64
    job.do("detach", 3, 2, 1, 0)
    assert job.store.num_keys() == 1


def test_a_resume_on_one_rank_alone_and_on_all(job):
    job = job(2)
    with told() as said:
        job.attach(0, 1)
        for _ in range(6):
            job.step(0, 1)
        with job.on(0) as rank:
            rank.handle.load_state_dict(rank.handle.state_dict() | {"step": 100})
        for _ in range(3):
            job.step(0, 1)
        for number in (1, 0):
            with job.on(number) as rank:
                rank.handle.load_state_dict(rank.handle.state_dict() | {"step": 200})
        for _ in range(3):
            job.step(0, 1)
        job.do("detach", 1, 0)
    found = job.entropies()
    assert [found[at] for at in range(6)] == [job.mean(0, 1)] * 6
    assert [found[at] for at in range(100, 103)] == [job.mean(0)] * 3
    assert [found[at] for at in range(200, 203)] == [job.mean(0, 1)] * 3
    assert len(said) <= 2


def test_a_writer_object_on_another_rank_is_what_is_written_to(job, tmp_path):
    job = job(2)
    job.attach(0, histograms_every=1, on_error="raise")
    with job.on(1) as rank:
        writer = torch.utils.tensorboard.SummaryWriter(str(tmp_path / "last"))
        rank.handle = bthooks.attach(
            rank.model, writer, every=1, histograms_every=1, on_error="raise"
        )
    for _ in range(3):
        job.step(0, 1)
    with job.on(1):
        bthooks.log_metrics(writer, {"loss": 1.0}, 0)
    job.do("detach", 0, 1)
    writer.close()
    run = read(tmp_path / "last")
    assert dict(run.scalars["attention/mean_entropy"]) == dict.fromkeys(range(3), job.mean(0, 1))
    assert run.value("train/loss", 0) == 1.0
    assert [step for step, _ in run.histograms["parameters/w"]] == [0, 1, 2]
    assert not job.directory.exists()


def test_two_attachments_of_one_prefix_do_not_mix(job, tmp_path):
    job, others = job(2), [Attention(3.0), Attention(4.0)]
    job.attach(0, 1, on_error="raise")
    handles = []
    for number, model in enumerate(others):
        with job.on(number):
            target = tmp_path / "other" if number == 0 else None
            handles.append(bthooks.attach(model, target, every=1, on_error="raise"))
            optimizer = torch.optim.SGD(model.parameters(), 1e-9)
            model(torch.eye(16)[None])["out"].square().mean().backward()
            optimizer.step()
        job.step(number)
    for number in (1, 0):
        with job.on(number):
            handles[number].detach()
    job.do("detach", 1, 0)
    assert job.entropies() == {0: job.mean(0, 1)}
    found = [Rank(0, model.sharpness).entropy for model in others]
    expected = pytest.approx(sum(found) / 2, rel=1e-5)
    assert read(tmp_path / "other").value("attention/mean_entropy", 0) == expected


def test_alerts_are_told_by_the_rank_that_writes_alone(job):
    job, alerts = job(2), ([], [])
    job.ranks[1].model.sharpness = math.nan
    with told() as said:
        for number in (0, 1):
            job.attach(number, on_alert=alerts[number].append)
        for _ in range(3):
            job.step(0, 1)
        job.do("detach", 1, 0)
    ((alert,), nothing) = alerts
    assert (alert.condition, alert.where, nothing) == ("nonfinite", "root", [])
    assert alert.message.startswith("rank 1: the first module whose output is not finite")
    assert job.ranks[1].handle.alerts == ()
    assert len(said) == 1


@pytest.mark.parametrize("parameter", ["the same", "another"])
def test_one_name_on_two_ranks(parameter, job):
    """A gradient that is reduced in the optimizer's step, and a tensor of each rank's own."""
    job = job(2)
    job.ranks[0].model.sharpness = 0.5
    if parameter == "another":
        job.ranks[1].model.w.data.fill_(2.0)
    norms = []
    with told() as said:
        job.attach(0, 1)
        for number in (0, 1):
            norms.append(job.unreduced(number).abs().item())
            with job.on(number) as rank:
                rank.optimizer.step()
        job.do("detach", 1, 0)
    run = read(job.directory)
    found = run.group("gradients/norm/", 0)
    if parameter == "another":
        assert found == pytest.approx({"w/rank0": norms[0], "w/rank1": norms[1]}, rel=1e-5)
        assert run.value("gradients/total_norm", 0) == pytest.approx(math.hypot(*norms), rel=1e-5)
        assert {"root/rank0", "root/rank1"} == run.group("attention/entropy/", 0).keys()
        assert any("one name on several ranks: w" in one for one in said)
    else:
        assert found == pytest.approx({"w": norms[0]}, rel=1e-5)
        assert any("gradients differ between ranks: that of w on ranks 0 and 1" in s for s in said)


def test_gradients_that_are_reduced_after_backward(job):
    job = job(2)
    with told() as said:
        job.attach(0, 1)
        for number in (0, 1):
            job.unreduced(number).fill_(1.0)
            with job.on(number) as rank:
                rank.optimizer.step()
        job.do("detach", 1, 0)
    assert read(job.directory).group("gradients/", 0).keys() == {
        "norm/w",
        "layer_mean/root",
        "total_norm",
    }
    (one,) = said
    assert "total_norm_before_clip: left out: at the end of backward() the gradients of one" in one


@pytest.mark.parametrize("flushed", [(0,), (1,), (0, 1), (1, 0)])
def test_a_flush_in_the_middle_of_a_step_costs_nothing(flushed, job):
    job = job(2)
    with told() as said:
        job.attach(0, 1, on_error="raise")
        for _ in range(3):
            for number in (0, 1):
                with job.on(number) as rank:
                    rank.model(torch.eye(16)[None])["out"].square().mean().backward()
            job.do("flush", *flushed)
            for number in (0, 1):
                with job.on(number) as rank:
                    rank.optimizer.step()
            job.do("flush", *flushed)
        job.do("detach", 1, 0)
    assert said == []
    run = read(job.directory)
    assert job.entropies() == dict.fromkeys(range(3), job.mean(0, 1))
    assert [step for step, _ in run.scalars["gradients/total_norm"]] == [0, 1, 2]
    assert [value for _, value in run.scalars["uncertainty/total"]] == [0.5] * 3


def validate(rank, doubts):
    rank.model.eval()
    for doubt in doubts:
        rank.model.sharpness = doubt
        rank.model(torch.eye(16)[None])
    rank.model.train()


@pytest.mark.parametrize("flushed", [(), (0,), (0, 1), (1, 0)])
def test_a_validation_is_of_all_that_validate(flushed, job):
    """The last one too, after which nobody trains."""
    job = job(2)
    with told() as said:
        job.attach(0, 1, on_error="raise")
        for _ in range(3):
            job.step(0, 1)
            for number in (1, 0):
                with job.on(number) as rank:
                    validate(rank, [0.1, 0.2] if number else [0.3, 0.6, 0.6])
            job.do("flush", *flushed)
        job.do("detach", 1, 0)
    assert said == []
    run = read(job.directory)
    assert run.scalars["val/uncertainty/total"] == [(at, pytest.approx(0.36)) for at in range(3)]


def test_one_that_attaches_again_is_heard_again(job):
    job = job(2)
    job.attach(0, 1)
    for step in range(6):
        if step == 3:
            job.do("detach", 1)
            job.attach(1, step=3)
        job.step(0, 1)
    job.do("detach", 1, 0)
    assert job.entropies() == dict.fromkeys(range(6), job.mean(0, 1))


def test_a_model_with_two_writers_is_attached_twice_on_all_ranks(job, tmp_path):
    job, handles = job(2), []
    job.attach(0, 1, on_error="raise")
    for number in (0, 1):
        with job.on(number) as rank:
            target = tmp_path / "second" if number == 0 else None
            handles.append(bthooks.attach(rank.model, target, every=1, on_error="raise"))
    for _ in range(3):
        job.step(0, 1)
    for number in (1, 0):
        with job.on(number):
            handles[number].detach()
    job.do("detach", 1, 0)
    second = dict(read(tmp_path / "second").scalars["attention/mean_entropy"])
    assert job.entropies() == second == dict.fromkeys(range(3), job.mean(0, 1))


def test_what_is_sent_comes_out_as_it_went_in():
    storage = torch.randn(1 << 16, dtype=torch.float64)
    readings = Readings(
        attention={"a": storage[:28].reshape(14, 2), "b": torch.full((14, 1), math.nan).double()},
        norms={"w": 1 / 3, "v": math.inf},
        uncertainty={"total": torch.tensor([1e300, 2.0]).double()},
    )
    data = pack(Mail(3, readings, "val", is_over=False))
    assert len(data) < 2000  # a view does not bring its storage
    mail = unpack(data)
    assert (mail.step, mail.prefix, mail.is_over) == (3, "val", False)
    assert mail.readings.norms == readings.norms
    for kind in ("attention", "uncertainty"):
        for name, value in getattr(readings, kind).items():
            found = getattr(mail.readings, kind)[name]
            assert found.dtype == torch.float64
            assert torch.equal(found.nan_to_num(), value.nan_to_num())


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "flush", "resume", "detach"]), st.sampled_from(ALL)
    ),
    max_size=40,
)


@given(events=EVENTS)
@settings(max_examples=100, deadline=None, phases=[Phase.generate])
def test_whatever_ranks_do_in_whatever_order(events, tmp_path_factory):
    """Nothing raises; each tag has one value a step, a mean over ranks of which rank 0 is one."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(recorder, "PATIENCE", 0.02)
        patch.setattr(exchange, "GRACE", 0.02)
        patch.setattr(recorder, "GRACE", 0.02)
        job = Job(patch, 3, tmp_path_factory.mktemp("run") / "job")
        job.attach(*ALL, on_error="raise")
        for what, number in events:
            with job.on(number) as rank:
                if what == "step":
                    job.step(number)
                elif what == "resume":
                    rank.handle.load_state_dict(rank.handle.state_dict() | {"step": 50})
                else:
                    getattr(rank.handle, what)()
        job.do("detach", *ALL)
        assert job.store.num_keys() <= 2  # that none writes, and how many wait
        run = read(job.directory) if job.directory.exists() else None
        possible = [job.mean(0, *more) for more in ((), (1,), (2,), (1, 2))]
        for _, value in run.scalars["attention/mean_entropy"] if run else ():
            assert any(value == mean for mean in possible)
