"""What the tests share: event files read back."""

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from .programs import DEADLINE, Programs  # noqa: F401

# The models are small: where cores are shared, a second thread spins 10 times longer than it works.
torch.set_num_threads(int(os.environ.get("BTHOOKS_TEST_THREADS", "1")))

BACKENDS = ("torch", "tensorboardX")


@dataclass
class Run:
    """An event file as TensorBoard reads it: by tag, (step, value) in the order of writing."""

    files: int
    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    histograms: dict[str, list[tuple]] = field(default_factory=dict)
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def value(self, tag: str, step: int) -> float:
        (value,) = (v for s, v in self.scalars[tag] if s == step)
        return value

    def group(self, start: str, step: int) -> dict[str, float]:
        """The scalars at `step` under `start`, by the rest of the tag."""
        return {
            tag[len(start) :]: value
            for tag, points in self.scalars.items()
            for at, value in points
            if tag.startswith(start) and at == step
        }


class Kept(Run):
    """A writer that keeps what it is given, where many runs are to be looked at."""

    def __init__(self) -> None:
        super().__init__(files=0)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def add_histogram_raw(self, tag: str, *, global_step: int, **values: Any) -> None:
        self.histograms.setdefault(tag, []).append((global_step, SimpleNamespace(**values)))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.setdefault(tag, []).append((step, text))

    def add_image(self, *args: Any, **kwargs: Any) -> None:
        pass

    flush = close = add_image


def read(directory: Path | str) -> Run:
    """The one run in or below `directory`."""
    files = list(Path(directory).rglob("events.out.tfevents.*"))
    (directory,) = {file.parent for file in files}
    events = EventAccumulator(
        str(directory),
        dict.fromkeys(("scalars", "histograms", "images", "tensors", "compressedHistograms"), 0),
    )
    events.Reload()
    tags = events.Tags()
    run = Run(files=len(files))
    for tag in tags["scalars"]:
        run.scalars[tag] = [(e.step, e.value) for e in events.Scalars(tag)]
        steps = [step for step, _ in run.scalars[tag]]
        assert steps == sorted(set(steps)), f"{tag}: steps {steps}"
    for tag in tags["histograms"]:
        run.histograms[tag] = [(e.step, e.histogram_value) for e in events.Histograms(tag)]
    for tag in tags["images"]:
        run.images[tag] = [(e.step, e.encoded_image_string) for e in events.Images(tag)]
    for tag in tags["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name != "text":
            continue
        values = [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
        run.texts[tag] = [(step, value.item().decode()) for step, value in values]
    return run


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor as it is: for ATEN_CPU_CAPABILITY=default it makes code that does not compile."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: the folder that `make` fills, in one of the processes of the suite."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def made(name, make):
        folder, begun = shared / name, shared / f"{name} begun"
        with (shared / f"{name} lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                begun.mkdir()
                make(begun)
                begun.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def programs():
    """Runs programs of their own."""
    found = Programs()
    yield found
    found.end()
