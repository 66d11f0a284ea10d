import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bthooks
from bthooks import make_writer
from bthooks.names import distinct, tag
from bthooks.record.backend import write
from bthooks.record.event import Event

from ..conftest import BACKENDS, read


def test_a_run_is_one_file_in_its_folder(tmp_path, backend):
    with make_writer(tmp_path, "a/b", backend=backend) as writer:
        bthooks.log_metrics(writer, {"loss": 1.0}, 0)
        bthooks.log_text(writer, "sample", "text", 0)
        bthooks.log_hparams(writer, {"lr": 0.1}, {"accuracy": 0.5})
    bthooks.log_metrics(writer, {"loss": 2.0}, 1)  # after close: into the same file
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent for path in files] == [tmp_path / "a" / "b"]
    assert read(tmp_path).scalars["train/loss"] == [(0, 1.0), (1, 2.0)]


def test_a_run_without_a_name_is_called_after_its_second(tmp_path, backend):
    writers = [make_writer(tmp_path, backend=backend) for _ in range(3)]
    for writer in writers:
        writer.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    assert all(re.fullmatch(r"\d{8}_\d{6}(_\d)?", name) for name in names)


def test_two_writers_of_one_folder_and_second_keep_both_their_events(tmp_path, backend):
    writers = [make_writer(tmp_path, "run", backend=backend) for _ in range(2)]
    for step, writer in enumerate(writers):
        bthooks.log_metrics(writer, {"loss": step}, step)
        writer.close()
    assert read(tmp_path).scalars["train/loss"] == [(0, 0.0), (1, 1.0)]


def test_a_subclass_is_called_where_it_changed_something(tmp_path, backend):
    kind = type(make_writer(tmp_path, "base", backend=backend))
    seen = []

    class Own(kind):
        def add_scalar(self, tag, *args, **kwargs):
            seen.append(tag)
            super().add_scalar(tag, *args, **kwargs)

    plain, own = type("Plain", (kind,), {})(str(tmp_path / "plain")), Own(str(tmp_path / "own"))
    for writer in (plain, own):
        bthooks.log_metrics(writer, {"loss": 1.0}, 0)
        if writer is plain:
            bthooks.log_hparams(writer, {"lr": 1.0}, {"accuracy": 0.5})
        writer.close()
    assert seen == ["train/loss"]
    assert read(tmp_path / "own").scalars == {"train/loss": [(0, 1.0)]}
    run = read(tmp_path / "plain")
    assert run.files == 1
    assert run.scalars == {"train/loss": [(0, 1.0)], "hparams/accuracy": [(0, 0.5)]}


def test_purge_step_hides_what_came_after(tmp_path, backend):
    for start in (0, 2):
        purge = start or None
        with make_writer(tmp_path, "run", backend=backend, purge_step=purge) as writer:
            for step in range(start, start + 4):
                bthooks.log_metrics(writer, {"loss": start}, step)
        bthooks.log_metrics(writer, {"late": start}, start + 4)
        time.sleep(1.1)  # TensorBoard reads files by name: the second, then a counter, 10 before 9
    run = read(tmp_path)
    assert run.scalars["train/loss"] == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 2), (5, 2)]
    assert run.scalars["train/late"] == [(6, 2)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "wandb"}, ValueError, '\'wandb\': expected "torch" or "tensorboardX"'),
        ({"experiment": "../out"}, ValueError, "does not name a folder inside"),
        ({"experiment": "/out"}, ValueError, "does not name a folder inside"),
        ({"experiment": "a/../.."}, ValueError, "does not name a folder inside"),
        ({"experiment": ""}, ValueError, "does not name a folder inside"),
        ({"max_que": 3}, TypeError, "no option max_que"),
        ({"experiment": 3}, TypeError, "a str or None, got 3"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, backend, arguments, error, message):
    arguments = {"experiment": "run", "backend": backend} | arguments
    with pytest.raises(error, match=message):
        make_writer(tmp_path, **arguments)
    assert not list(tmp_path.rglob("*"))


def test_other_ranks_have_no_writer_and_never_write(programs, tmp_path):
    code = f"""
import sys, torch, bthooks
from torch import nn
rank = int(sys.argv[1])
early = bthooks.make_writer({str(tmp_path)!r}, f"early{{rank}}")
torch.distributed.init_process_group(
    "gloo", init_method="file://" + {str(tmp_path / "store")!r}, rank=rank, world_size=2
)
writer = bthooks.make_writer({str(tmp_path)!r}, "run")
assert (writer is None) == (rank == 1)
model = nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
path = bthooks.attach(model, {str(tmp_path / "path")!r}, every=1)
given = bthooks.attach(model, early, every=1)
for step in range(2):
    torch.distributed.barrier()
    bthooks.log_metrics(writer, {{"loss": 1.0}}, step)
    bthooks.log_metrics(early, {{"loss": 1.0}}, step)
    model(torch.ones(1, 2)).sum().backward()
    bthooks.log_gradients(writer, model, step)
    optimizer.step()
path.detach(); given.detach()
"""
    found = programs.run(code, folder=tmp_path, count=2)
    assert [status for status, _ in found] == [0, 0], found
    for name in ("run", "path", "early0"):
        run = read(tmp_path / name)
        assert run.files == 1
        assert [s for s, _ in run.scalars["gradients/total_norm"]] == [0, 1]
    assert read(tmp_path / "early1").scalars == {}


def test_what_is_not_main_is_decided_when_it_writes(tmp_path, monkeypatch):
    writer = make_writer(tmp_path, "run")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    bthooks.log_metrics(writer, {"loss": 1.0}, 0)
    bthooks.log_hparams(writer, {"lr": 1.0}, {})
    writer.close()
    assert read(tmp_path).scalars == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_one_event(tmp_path, backend):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bthooks.attach(model, tmp_path, backend=backend, every=1, histograms_every=1):
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    (path,) = tmp_path.iterdir()
    events = [event for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]
    assert [event.step for event in events] == [0, 1, 2]
    # Norms, their mean and total, the rate; health; histograms; once the layout of the charts.
    counts = [len(event.summary.value) for event in events]
    assert counts == [6 + 6 + 4 + 1, 6 + 6 + 4, 6 + 6 + 4]


def test_events_of_every_kind_read_back_the_same_from_both(tmp_path):
    runs = []
    for backend in BACKENDS:
        with make_writer(tmp_path, backend, backend=backend) as writer:
            image = torch.randint(0, 255, (4, 6, 3), dtype=torch.uint8)
            buckets = bthooks.histogram(
                torch.randn(100, generator=torch.Generator().manual_seed(1))
            )
            image[:] = torch.arange(72).view(4, 6, 3)
            event = Event(
                scalars={"a/b": 1.5, "nan": math.nan, "inf": -math.inf, "huge": 1e39},
                histograms={"h": buckets, "empty": bthooks.histogram(torch.empty(0))},
                images={"image": image},
                texts={"text": "**bold** ünïcode"},
            )
            write(writer, event, 7)
        runs.append(read(tmp_path / backend))
    assert repr(runs[0]) == repr(runs[1])
    assert runs[0].scalars["huge"] == [(7, math.inf)]
    assert runs[0].scalars["inf"] == [(7, -math.inf)]
    assert math.isnan(runs[0].scalars["nan"][0][1])
    assert runs[0].histograms.keys() == {"h"}
    assert runs[0].images["image"][0][1].startswith(b"\x89PNG")
    assert runs[0].texts == {"text/text_summary": [(7, "**bold** ünïcode")]}


def test_importing_bthooks_imports_no_backend():
    code = (
        "import sys, {}; found = {{m.split('.')[0] for m in sys.modules}}; "
        "sys.exit(len(found & {{'tensorboard', 'tensorboardX', 'matplotlib', 'PIL'}}))"
    )
    run = [sys.executable, "-c"]
    assert subprocess.run([*run, code.format("bthooks")]).returncode == 0
    assert subprocess.run([*run, code.format("tensorboard")]).returncode != 0


def test_the_newest_file_is_the_one_that_a_closed_writer_goes_on_in(tmp_path):
    with make_writer(tmp_path, "run") as old:
        pass
    (path,) = (tmp_path / "run").iterdir()
    os.utime(path, (0, 0))
    with make_writer(tmp_path, "run") as new:
        pass
    older, newer = sorted((tmp_path / "run").iterdir(), key=os.path.getmtime)
    size = older.stat().st_size
    bthooks.log_metrics(new, {"loss": 1.0}, 0)
    assert older.stat().st_size == size
    assert newer.stat().st_size > size
    del old


@given(st.lists(st.text("ab_/. é\n")), st.sampled_from(["", "/", "run", "/a/b/", "a b"]))
def test_tags_of_any_names_are_distinct_and_plain(names, prefix):
    found = distinct(tag(prefix, name) for name in names)
    assert len(set(found)) == len(names)
    assert all(re.fullmatch("[A-Za-z0-9_./-]*", one) for one in found)
    assert not any(one.startswith("/") or one.endswith("/") for one in found)
