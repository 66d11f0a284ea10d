import os
import pathlib
import shutil
import sys
import warnings

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import bthooks
from bthooks import attach, make_writer
from bthooks.__main__ import main

from ..conftest import read


def trained(handle_of, steps=3, model=None, **options):
    model = model or nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with attach(model, handle_of, every=1, **options) as handle:
        for _ in range(steps):
            step(model, optimizer)
    return handle


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def steps_in(directory, tag="gradients/total_norm"):
    return [step for step, _ in read(directory).scalars[tag]]


def test_nothing_is_there_before_the_first_write(tmp_path, backend):
    model, folder = nn.Linear(2, 2), tmp_path / "run"
    with attach(model, folder, every=1, backend=backend) as handle:
        handle.flush()
        model.eval()
        handle.load_state_dict(handle.state_dict())
        assert not folder.exists()
    assert handle.writer is None
    with attach(model, folder, backend=backend) as handle:
        bthooks.log_metrics(handle.writer, {"loss": 1.0}, 0)
    bthooks.log_metrics(handle.writer, {"loss": 2.0}, 1)  # after detach: into the same file
    assert read(tmp_path).files == 1
    assert steps_in(tmp_path, "train/loss") == [0, 1]


@pytest.fixture
def ran(programs, tmp_path):
    def run(code, *arguments, count=1):
        found = programs.run(PREAMBLE + code, *arguments, folder=tmp_path, count=count)
        assert [status for status, _ in found] == [0] * count, found
        assert not any("bthooks" in said for _, said in found), found

    return run


PREAMBLE = """
import multiprocessing, os, sys, torch, bthooks
directory, backend, rank = sys.argv[1], sys.argv[2], int(sys.argv[-1])
torch.manual_seed(0)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
handle = bthooks.attach(model, directory, every=1, backend=backend, on_error="raise")
def train(steps=3):
    for _ in range(steps):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""
RANKS = """
handle.load_state_dict(handle.state_dict())
store = "file://" + sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
train()
assert (handle.writer is None) == (rank == 1)
handle.detach()
assert (handle.writer is None) == (rank == 1)
"""


def test_attach_before_the_process_group_makes_one_file(ran, tmp_path, backend):
    ran(RANKS, tmp_path / "run", backend, tmp_path / "store", count=2)
    assert read(tmp_path / "run").files == 1
    assert steps_in(tmp_path / "run") == [0, 1, 2]


FORKS = {
    "a child trains": """
child = multiprocessing.get_context("fork").Process(target=train)
child.start()
child.join()
sys.exit(child.exitcode)
""",
    "a child of the system's call trains": """
child = os.fork()
if child == 0:
    train()
    sys.exit()
sys.exit(os.waitpid(child, 0)[1])
""",
    "a child only runs the model": """
child = os.fork()
if child == 0:
    model(torch.ones(1, 2)), model.eval()(torch.ones(1, 2))
    handle.flush()
    assert handle.writer is None
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
train()
""",
    "a child trains when the file is open": """
train(2)
handle.flush()
child = os.fork()
if child == 0:
    train()
    handle.detach()
    os._exit(0)  # tensorboardX's own exit handler hangs there
assert os.waitpid(child, 0)[1] == 0
train(1)
""",
    "workers of the loader run the model": """
class Embedded:
    def __len__(self): return 6
    def __getitem__(self, index): return model(torch.full((2,), float(index))).detach()
from torch.utils.data import DataLoader
loader = DataLoader(Embedded(), 2, num_workers=2, multiprocessing_context="fork")
for batch in loader:
    train(1)
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("code", FORKS.values(), ids=FORKS)
def test_one_process_writes_around_a_fork(code, ran, tmp_path, backend):
    ran(code, tmp_path / "run", backend)
    assert read(tmp_path / "run").files == 1
    assert steps_in(tmp_path / "run") == [0, 1, 2]


EXITS = """
late = bthooks.make_writer(directory + "/late", "run", backend=backend)
second = torch.nn.Linear(2, 2)
bthooks.attach(second, late, every=1)
train(30)
optimizer = torch.optim.SGD(second.parameters(), 1e-3)
model = second
train(2)
"""


def test_an_exit_without_a_word_loses_nothing(ran, tmp_path, backend):
    """Its own handler comes before those of writers that were opened after attach."""
    ran(EXITS, tmp_path / "path", backend)
    (late,) = (tmp_path / "path" / "late").iterdir()
    assert steps_in(late) == [0, 1]
    shutil.move(late, tmp_path)
    assert steps_in(tmp_path / "path") == list(range(30))


def test_attachments_to_one_folder_share_its_writer(tmp_path, backend):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(model.parameters(), 1e-3) for model in (first, second)]
    handles = [
        attach(model, tmp_path, every=1, backend=backend, prefix=prefix)
        for model, prefix in ((first, "a"), (second, "b"))
    ]
    for at in range(4):
        for model, optimizer in zip((first, second), optimizers, strict=True):
            step(model, optimizer)
        if at == 1:
            handles[0].detach()
    assert handles[0].writer is handles[1].writer
    with pytest.warns(UserWarning, match="replaces the former"):
        last = attach(second, tmp_path, every=1, backend=backend, prefix="b", step=4)
    step(second, optimizers[1])
    assert bthooks.record.recorder.recorder_of(last.writer) is not None
    last.detach()
    assert read(tmp_path).files == 1
    assert steps_in(tmp_path, "a/gradients/total_norm") == [0, 1]
    assert steps_in(tmp_path, "b/gradients/total_norm") == [0, 1, 2, 3, 4]


def test_the_writer_of_a_handle_is_known(tmp_path):
    model, p = nn.Linear(2, 2), torch.tensor([[0.9, 0.1]] * 100)
    with attach(model, tmp_path, every=1) as handle:
        for at in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bthooks.log_calibration(handle.writer, p, torch.ones(100).long(), at)
        assert [alert.condition for alert in handle.alerts] == ["miscalibration"]


@pytest.mark.parametrize(
    ("folder", "error", "message"),
    [
        ("file", NotADirectoryError, "file is a file"),
        ("file/below/it", NotADirectoryError, "file is a file"),
        ("denied/below", PermissionError, "denied is not writable"),
    ],
)
def test_what_can_not_be_written_is_refused_at_the_call(
    folder, error, message, tmp_path, backend, monkeypatch
):
    (tmp_path / "file").write_text("")
    (tmp_path / "denied").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "denied" not in str(path))
    with pytest.raises(error, match=message):
        attach(nn.Linear(2, 2), tmp_path / folder, backend=backend)
    monkeypatch.setattr(os, "access", access)
    assert not bthooks.record.recorder._recorders
    missing = monkeypatch.setitem(sys.modules, bthooks.record.backend.PACKAGES[backend], None)
    with pytest.raises(ImportError, match=backend):
        attach(nn.Linear(2, 2), tmp_path, backend=backend)
    del missing


def test_what_can_not_be_opened_later_is_said_once(tmp_path, backend):
    model, folder = nn.Linear(2, 2), tmp_path / "run"
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    handle = attach(model, folder, every=1, backend=backend)
    folder.write_text("a file by now")

    def train():
        for _ in range(3):
            step(model, optimizer)
            bthooks.log_metrics(handle.writer, {"loss": 1.0}, handle.step)
        handle.detach()

    with pytest.warns(RuntimeWarning, match="event file: .*(Error|Exists)") as caught:
        train()
    assert len(caught) == 1
    assert handle.step == 3
    assert "lost: 3 events of the steps 0 to 2" in handle.report().missed["event file"]


@pytest.mark.parametrize("logs", [True, False])
@pytest.mark.parametrize("opened", [True, False])
def test_a_folder_that_is_removed_while_training_is_said_once(opened, logs, tmp_path, backend):
    model, folder = nn.Linear(2, 2), tmp_path / "run"
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    writer = folder if opened else make_writer(tmp_path, "run", backend=backend)
    handle = attach(model, writer, every=1, backend=backend)

    def train():
        for at in range(6):
            if at == 3:
                handle.flush()
                shutil.rmtree(folder)
            if logs:
                bthooks.log_metrics(handle.writer, {"loss": 1.0}, at)
            step(model, optimizer)
        handle.detach()

    with pytest.warns(RuntimeWarning, match="event file: .* was removed") as caught:
        train()
    assert len(caught) == 1
    assert "lost: 3 events of the steps 3 to 5" in handle.report().missed["event file"]
    assert not folder.exists()


def test_a_folder_that_is_removed_at_the_end_is_said(tmp_path, backend):
    model, folder = nn.Linear(2, 2), tmp_path / "run"
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    handle = attach(model, folder, every=1, backend=backend)
    step(model, optimizer)
    handle.flush()
    shutil.rmtree(folder)
    with pytest.warns(RuntimeWarning, match="event file: .* was removed"):
        handle.detach()


def test_a_relative_folder_may_be_left(tmp_path, backend, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with attach(model, "run", every=1, backend=backend, on_error="raise"):
        for at in range(3):
            (tmp_path / str(at)).mkdir()
            monkeypatch.chdir(tmp_path / str(at))
            step(model, optimizer)
    assert steps_in(tmp_path / "run") == [0, 1, 2]


URLS = ("s3://b/r", "gs://b/r", "hdfs://b/r", "nonsense://b/r", "simplecache::s3://b/r")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("way", ["attach", "make_writer", "viewer", "report"])
def test_a_url_never_becomes_a_local_folder(url, way, tmp_path, backend, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("fsspec", "boto3", "s3fs", "gcsfs", "pyarrow"):
        if name != "fsspec":
            monkeypatch.setitem(sys.modules, name, None)
    said = ""
    if way in ("viewer", "report"):
        assert main([url, *["--report"] * (way == "report")]) == 2
        said = capsys.readouterr().err
    else:
        call = attach if way == "attach" else make_writer
        first = (nn.Linear(2, 2),) if way == "attach" else ()
        with pytest.raises((ImportError, ValueError)) as refused:
            call(*first, url, backend=backend)
        said = str(refused.value)
    assert url in said
    packages = "fsspec|s3fs|boto3|gcsfs|google-cloud-storage|pyarrow"
    assert any(package in said for package in packages.split("|"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [pathlib.PurePosixPath("s3://b/r"), "s3:/b", "memory:/b/r"])
def test_a_slash_that_pathlib_has_eaten_is_said(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: attach(nn.Linear(2, 2), given),
        lambda: make_writer(given),
    ):
        with pytest.raises(ValueError, match="pathlib has eaten a slash"):
            call()
    with pytest.raises(SystemExit):
        main([str(given)])
    assert "pathlib has eaten a slash" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_url_is_a_local_folder(tmp_path, backend):
    trained((tmp_path / "a b").as_uri(), backend=backend)
    assert steps_in(tmp_path / "a b") == [0, 1, 2]
    with make_writer(tmp_path.as_uri(), "c", backend=backend) as writer:
        assert str(tmp_path / "c") in vars(writer).values()
    with pytest.raises(ValueError, match="is on 'elsewhere'"):
        make_writer("file://elsewhere/runs")


def test_a_url_that_the_backend_takes_is_written_there(capsys, tmp_path, monkeypatch):
    """In memory: torch's writer goes through TensorBoard to fsspec."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    url, model = f"memory://{tmp_path.name}", nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    states = {}
    for start, scale in ((0, 1.0), (2, 2.0)):
        with attach(model, f"{url}/run/", every=1, on_error="raise") as handle:
            if start:
                handle.load_state_dict(states[start])
            for _ in range(4):
                states[handle.step] = handle.state_dict()
                optimizer.zero_grad()
                (scale * model(torch.ones(1, 2)).sum()).backward()
                optimizer.step()
    with make_writer(url) as writer:
        bthooks.log_metrics(writer, {"loss": 1.0}, 0)
    files = fsspec.filesystem("memory").find(f"/{tmp_path.name}")
    assert len([file for file in files if f"/{tmp_path.name}/run/" in file]) == 2
    assert len(files) == 3
    events = EventAccumulator(f"{url}/run").Reload().Scalars("gradients/total_norm")
    assert [e.step for e in events] == [0, 1, 2, 3, 4, 5]
    assert [e.value / events[0].value for e in events] == pytest.approx([1, 1, 2, 2, 2, 2])
    assert main([url, "--report"]) == 0
    told = capsys.readouterr().out
    assert "run: step 5\n" in told
    assert "train/loss 1\n" in told
    assert main([f"{url}/nothing", "--report"]) == 2
    assert not list(tmp_path.iterdir())


def test_a_kind_that_tensorboardX_was_taught(monkeypatch, tmp_path):
    from tensorboardX import record_writer

    monkeypatch.chdir(tmp_path)
    held = {}

    class Stream(list):
        write = list.append
        flush = close = lambda self: None

    class Taught:
        def open(self, path):
            return held.setdefault(path, Stream())

        def directory_check(self, path):
            assert path == "taught://b/run"

    monkeypatch.setitem(record_writer.REGISTERED_FACTORIES, "taught", Taught())
    trained("taught://b/run", backend="tensorboardX", on_error="raise")
    ((path, stream),) = held.items()
    assert path.startswith("taught://b/run/events.out.tfevents.")
    (tmp_path / "events.out.tfevents.0").write_bytes(b"".join(stream))
    assert steps_in(tmp_path) == [0, 1, 2]
