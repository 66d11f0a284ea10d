"""Whatever a model is and returns, a training step goes on: no exception, one warning per site."""

import contextlib
import dataclasses
import enum
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.parameter import UninitializedParameter

import bthooks
from bthooks import attach
from bthooks.record.backend import hand_over
from bthooks.record.event import Event

from .conftest import DEADLINE, read

EVERYTHING = (*bthooks.capture.wanted.KINDS, *bthooks.capture.wanted.ON_REQUEST)
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
WHOLES = [torch.int8, torch.bool, torch.int64, torch.uint8]
NUMBERS = [0.0, 1.0, -2.5, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")]
KEYS = ["epistemic", "aleatoric_uncertainty", "uncertainty", "logits", 3]
SHAPES = [(), (0,), (3,), (2, 3), (2, 0, 3), (4, 1, 1, 2)]


@st.composite
def tensors(draw, dtypes=(*FLOATS, *WHOLES)):
    dtype, shape = draw(st.sampled_from(dtypes)), draw(st.sampled_from(SHAPES))
    tensor = torch.full(shape, draw(st.sampled_from(NUMBERS)), dtype=torch.float64)
    tensor = tensor.nan_to_num().clamp(-100, 100) if dtype in WHOLES else tensor
    return tensor.to(dtype)


@st.composite
def odd_tensors(draw):
    tensor = draw(tensors())
    kind = draw(st.sampled_from(["dense", "sparse", "nested", "meta", "strided", "expanded"]))
    if kind == "sparse" and tensor.dim():
        return tensor.to_sparse()
    if kind == "nested" and tensor.dim() and tensor.dtype in FLOATS[:2]:
        return torch.nested.nested_tensor([tensor, tensor])
    if kind == "meta":
        return tensor.to("meta")
    if kind == "strided" and tensor.dim() == 2:
        return tensor.t()
    return tensor.expand(2, *tensor.shape) if kind == "expanded" else tensor


@dataclasses.dataclass
class Output:
    epistemic: object
    extra: object = None


Pair = namedtuple("Pair", "uncertainty other")


class Raises:
    def __getattr__(self, name):
        raise (RuntimeError if name in KEYS else AttributeError)(name)


class Colour(enum.Enum):
    RED = 1


OUTPUTS = st.recursive(
    odd_tensors() | st.sampled_from([None, "text", 3, 2.5, Colour.RED, Raises(), object, b"x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
        | inner.map(Output)
        | st.builds(Pair, inner, inner)
        | inner.map(lambda value: SimpleNamespace(epistemic=value, aleatoric=value))
    ),
    max_leaves=5,
)


class Odd(nn.Module):
    """Odd parameters, and a child that returns something odd."""

    def __init__(self, values, frozen, output):
        super().__init__()
        self.values = nn.ParameterList(
            nn.Parameter(v, requires_grad=not frozen and v.dtype in FLOATS) for v in values
        )
        self.again = self.values
        self.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
        self.unused = nn.Linear(2, 2)
        self.child = nn.Identity()
        self.lazy = nn.Module()
        self.lazy.weight = UninitializedParameter()
        self.head = nn.Linear(2, 1)
        self.output = output

    def forward(self, x):
        loss = self.head(x).sum()
        for value in self.values:
            if value.requires_grad and value.numel():
                loss = loss + (value.abs() if value.is_complex() else value).float().sum()
        self.child(self.output)
        return loss, self.child(self.output)


class Silent:
    """A writer that takes everything."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(tensors(), max_size=4),
    st.lists(odd_tensors(), max_size=3),
    st.booleans(),
    OUTPUTS,
)
def test_a_step_goes_on(values, gradients, frozen, output):
    model = Odd(values, frozen, output)
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_meta]
    trained = [p for p in trained if not isinstance(p, UninitializedParameter)]
    optimizer = torch.optim.SGD(trained, lr=0.1)

    class Returned(nn.Module):  # what the root returns is odd, too
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            self.loss, output = self.inner(x)
            return output

    root = Returned()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(root, Silent(), every=1, histograms_every=1, capture=EVERYTHING) as handle:
            for step in range(2):
                root(torch.ones(2, 2))
                root.loss.backward()
                if step:
                    for parameter, gradient in zip(trained, gradients, strict=False):
                        with contextlib.suppress(RuntimeError, TypeError):  # torch's refusal
                            parameter.grad = gradient
                try:
                    optimizer.step()
                except Exception:  # the optimizer's own, of such a gradient
                    assert "bthooks" not in traceback.format_exc()
                optimizer.zero_grad(set_to_none=bool(step))
            root.eval()
            root(torch.ones(2, 2))
        str(handle.report())
    ours = [str(w.message) for w in caught if "bthooks" in str(w.message)]
    assert len(ours) == len({message.partition(": not measured")[0] for message in ours})


class Broken:
    """A writer whose disk is full."""

    def __init__(self, log_dir):
        self.log_dir = log_dir

    def __getattr__(self, name):
        def fail(*args, **kwargs):
            raise OSError(28, "No space left on device")

        return fail


def test_a_writer_that_fails_does_not_stop_training(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(model, Broken(tmp_path), every=1)

    def train():
        for _ in range(5):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        handle.detach()

    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        train()
    sites = [str(w.message).split(":")[1] for w in caught]
    assert len(sites) == len(set(sites))
    assert "event file" in handle.report().missed


@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_a_writer_that_hangs_does_not_stop_training(backend, tmp_path, monkeypatch, request):
    monkeypatch.setattr(bthooks.record.backend, "PATIENCE", 0.3)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    writer = bthooks.make_writer(tmp_path, "run", backend=backend)
    event_writer = writer.file_writer.event_writer
    stream = getattr(event_writer, "_ev_writer", None) or event_writer._async_writer._writer
    name = "write_event" if backend == "tensorboardX" else "write"
    write, goes_on = getattr(stream, name), threading.Event()
    monkeypatch.setattr(stream, name, lambda data: goes_on.wait() and write(data))
    request.addfinalizer(goes_on.set)  # else tensorboardX's own exit handler hangs
    handle = attach(model, writer, every=1)

    def train():
        for _ in range(50):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        handle.detach()

    with pytest.warns(RuntimeWarning, match="does the disk hang") as caught:
        train()
    assert len(caught) == 1
    missed = handle.report().missed["event file"]
    (lost,) = re.findall(r"lost: (\d+) events of the steps \d+ to 49", missed)
    goes_on.set()
    writer.close()
    written = [step for step, _ in read(tmp_path / "run").scalars["gradients/total_norm"]]
    assert written == list(range(50 - int(lost)))


FORKED = """
import sys, torch, bthooks
from torch.utils.data import DataLoader
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
writer = bthooks.make_writer(sys.argv[1], "run", backend=sys.argv[2])
class Embedded:
    def __len__(self): return 12
    def __getitem__(self, index): return model(torch.full((2,), float(index))).detach()
with bthooks.attach(model, writer, every=1) as handle:
    for _ in range(2):
        for batch in DataLoader(Embedded(), 4, num_workers=2, multiprocessing_context="fork"):
            model(batch).sum().backward()
            optimizer.step()
print(handle.step)
writer.close()
"""


@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_a_forked_worker_may_run_the_model(backend, tmp_path):
    command = [sys.executable, "-W", "error", "-c", FORKED, str(tmp_path), backend]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert ran.stdout == "6\n", ran.stderr
    assert "bthooks" not in ran.stderr
    written = [step for step, _ in read(tmp_path / "run").scalars["gradients/total_norm"]]
    assert written == list(range(6))


FULL = """
import subprocess, sys, warnings
import torch, bthooks
bthooks.record.backend.PATIENCE = 1.0  # each run would wait for ten seconds
directory, backend, opened = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
writer = directory if opened else bthooks.make_writer(directory, "run", backend=backend)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    handle = bthooks.attach(model, writer, backend=backend, every=1, histograms_every=1)
    for step in range(300):
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
    handle.detach()
print("trained", len([w for w in caught if "event file" in str(w.message)]))
print(handle.report().missed["event file"])
"""


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 128 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine allows no mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_a_full_disk_does_not_stop_training(backend, opened, tiny_disk, programs, tmp_path):
    ((_, said),) = programs.run(FULL, tiny_disk, backend, opened, folder=tmp_path)
    assert "trained 1\n" in said
    assert "lost: " in said


ENDLESS = """
import sys, time, torch, bthooks
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
handle = bthooks.attach(model, sys.argv[1], backend=sys.argv[2], every=1)
while True:
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    print(handle.step, flush=True)
    time.sleep(0.005)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_a_killed_run_loses_the_step_in_flight_and_what_is_being_written(backend, number, tmp_path):
    command = [sys.executable, "-c", ENDLESS, str(tmp_path), backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 100:
                process.send_signal(number)
        last = int(line)
    steps = [step for step, _ in read(tmp_path).scalars["gradients/total_norm"]]
    assert steps == list(range(len(steps)))
    assert len(steps) >= last - 2


LONG = """
import gc, os, sys, threading, time
import torch, bthooks
from tests.models import SelfAttention

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

def leftovers():
    names = sorted(thread.name for thread in threading.enumerate())
    return names, len(os.listdir("/proc/self/fd"))

torch.set_num_threads(1)
torch.manual_seed(0)
model = SelfAttention()
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
bthooks.attach(model, sys.argv[1] + "/first", backend=sys.argv[2]).detach()  # imports
before = leftovers()
handle = bthooks.attach(model, sys.argv[1], backend=sys.argv[2], every=10, histograms_every=100)
x = torch.randn(2, 8, 16)
for step in range(2_500):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 1000:
        first = resident()
grown = resident() - first
handle.detach()
until = time.monotonic() + 60
while threading.active_count() > 1 and time.monotonic() < until:
    time.sleep(0.1)  # the queue of tensorboardX ends a moment later
threads, files = leftovers()
assert threads == ["MainThread"] and files <= before[1], (threads, files, before)
print(grown)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_thousands_of_steps_leave_memory_flat(backend, programs, tmp_path):
    ((status, said),) = programs.run(LONG, tmp_path / "run", backend, folder=tmp_path)
    assert status == 0, said
    assert int(said.splitlines()[-1]) < 1 << 20


def test_non_finite_gradients_and_values_are_logged_as_what_they_are(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, tmp_path, every=1, histograms_every=1, on_error="raise"):
        (model(torch.ones(1, 2)).sum() * float("inf")).backward()
        optimizer.step()
    run = read(tmp_path)
    assert run.value("gradients/norm/weight", 0) == float("inf")
    assert run.value("gradients/total_norm", 0) == float("inf")
    assert run.value("health/nonfinite/gradients/weight", 0) == 4


def test_an_event_behind_another_is_in_the_system_when_the_call_returns(tmp_path, monkeypatch):
    # 0.05 s are too few where both cores are busy.
    monkeypatch.setattr(bthooks.record.backend, "_MOMENT", DEADLINE)
    with bthooks.make_writer(tmp_path, "run", backend="tensorboardX") as writer:
        for step in range(50):
            hand_over(writer, Event({f"a/{at}": 1.0 for at in range(300)}), step)
            bthooks.log_metrics(writer, {"b": 1.0}, step)
            ((last, _),) = read(tmp_path).scalars["train/b"][-1:]
            assert last == step


def test_a_writer_that_the_user_closed_has_lost_nothing(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    writer = bthooks.make_writer(tmp_path, "run", backend="tensorboardX")
    handle = attach(model, writer, every=1, on_error="raise")
    for _ in range(3):
        model(torch.ones(1, 2)).mean().backward()
        optimizer.step()
    writer.close()
    handle.detach()
    assert [step for step, _ in read(tmp_path).scalars["gradients/total_norm"]] == [0, 1, 2]
