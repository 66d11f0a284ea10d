"""Writers: to open one, to write one event.

In: floats, histograms, images and texts (`Event`), on the host. Out: one event in the event file.
Everything that differs between the two backends is here.
"""

import importlib
import inspect
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import checks
from ..health.dashboard import Layout
from ..measure.histograms import Histogram, raw
from ..names import tags
from .backlog import settle, wait_for_room, wait_until

BACKENDS = {"torch": "torch.utils.tensorboard", "tensorboardX": "tensorboardX"}


class Writer(Protocol):
    """What is asked of a writer: SummaryWriter's own methods, nothing more."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_histogram_raw(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_image(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_text(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_hparams(self, *args: Any, **kwargs: Any) -> Any: ...
    def flush(self) -> Any: ...
    def close(self) -> Any: ...


@dataclass
class Event:
    """What is written at one step, by tag. Everything is on the host."""

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)  # (height, width, 3), uint8
    texts: dict[str, str] = field(default_factory=dict)
    layout: Layout = field(default_factory=dict)  # of the charts, without tags

    def tagged(self) -> tuple[dict[str, Any], ...]:
        return self.scalars, self.histograms, self.images, self.texts


def prefixed(event: Event, prefix: str) -> Event:
    """`event` with `prefix` in front of every tag, in the characters that every backend keeps."""
    parts = []
    for part in event.tagged():
        parts.append(dict(zip(tags(prefix, part), part.values(), strict=True)))
    return replace(Event(*parts), layout=event.layout)


def make_writer(
    log_dir: str | os.PathLike[str] = "runs",
    experiment: str | None = None,
    *,
    backend: str = "torch",
    purge_step: int | None = None,
    **backend_options: Any,
) -> Any:
    """Open a SummaryWriter of either backend whose event file lies in `log_dir/experiment`.

    Args:
        experiment: the run's name; None is the time, `YYYYMMDD_HHMMSS`.
        backend: "torch" (`torch.utils.tensorboard`) or "tensorboardX".
        purge_step: on resuming, hide what an earlier run wrote at this step and after.
        backend_options: further arguments of that SummaryWriter, e.g. `flush_secs=30`.

    Returns:
        the writer; None on a rank other than 0 of an initialised process group.

    Raises:
        ValueError: `backend` is neither of the two, or `experiment` leaves `log_dir`.
        TypeError: that SummaryWriter has no such option.

    >>> import tempfile
    >>> with make_writer(tempfile.mkdtemp(), "first", backend="tensorboardX") as writer:
    ...     writer.add_scalar("train/loss", 0.5, 0)
    """
    checks.one_of("make_writer", "backend", backend, BACKENDS)
    root = Path(log_dir)
    if experiment is not None:
        run = checks.experiment("make_writer", root, experiment)
    if not is_main_rank():
        return None
    if experiment is None:
        run = _timestamp(root)
    return open_writer(root / run, backend, purge_step=purge_step, **backend_options)


def open_writer(
    directory: Path, backend: str, *, purge_step: int | None = None, **options: Any
) -> Any:
    """Open a SummaryWriter whose event file lies directly in `directory`."""
    package = BACKENDS[backend]
    SummaryWriter = importlib.import_module(package).SummaryWriter
    unknown = options.keys() - inspect.signature(SummaryWriter).parameters.keys()
    if unknown:
        raise TypeError(f"{package}.SummaryWriter has no option {', '.join(sorted(unknown))}")
    if backend == "tensorboardX":
        # Its file name has the second in it and nothing else: a second writer of that second
        # would truncate the first one's file.
        count = sum(1 for _ in directory.glob("events.out.tfevents.*"))
        options.setdefault("filename_suffix", f".{os.getpid()}.{count}")
    return SummaryWriter(str(directory), purge_step=purge_step, **options)


def write(writer: Any, event: Event, step: int) -> None:
    """Write `event` as one event of the backend's own file writer; else by `add_*` calls.

    Nothing is written without a writer, or on a rank other than 0.

    Raises:
        OSError: the writer takes nothing any more, for ten seconds.
    """
    wait_until(hand_over(writer, event, step))


def hand_over(writer: Any, event: Event, step: int, patient: bool = True) -> Callable[[], bool]:
    """As `write`, but without a wait for the writer's thread.

    Returns:
        what saves the event from a kill, once the thread has taken it, and says whether it has.

    Raises:
        OSError: the writer takes nothing any more, for ten seconds if `patient`.
    """
    if writer is None or not is_main_rank():
        return _settled
    histograms = {tag: raw(histogram) for tag, histogram in event.histograms.items()}
    package = _package(writer, "add_scalar", "add_histogram_raw", "add_image", "add_text")
    if package is None:
        for tag, value in event.scalars.items():
            writer.add_scalar(tag, value, step)
        for tag, arguments in histograms.items():
            if arguments is not None:
                writer.add_histogram_raw(tag, global_step=step, **arguments)
        for tag, image in event.images.items():
            writer.add_image(tag, image.numpy(), step, dataformats="HWC")
        for tag, text in event.texts.items():
            writer.add_text(tag, text, step)
        if event.layout and hasattr(writer, "add_custom_scalars"):
            writer.add_custom_scalars(event.layout)
        return _settled
    summary = importlib.import_module(f"{package}.summary")
    Value = summary.Summary.Value
    values = [Value(tag=tag, simple_value=value) for tag, value in event.scalars.items()]
    for tag, arguments in histograms.items():
        if arguments is not None:
            values.append(Value(tag=tag, histo=_histogram_proto(summary, arguments)))
    for tag, image in event.images.items():
        values.extend(summary.image(tag, image.numpy(), dataformats="HWC").value)
    for tag, text in event.texts.items():
        values.extend(summary.text(tag, text).value)
    if event.layout:
        values.extend(summary.custom_scalars(event.layout).value)
    if not values:
        return _settled
    return _add(writer, package, summary.Summary(value=values), step, patient)


def close(writer: Any) -> None:
    """Close `writer`, unless what is behind it has ended: closing would wait for ever.

    Raises:
        OSError: it has.
    """
    if _package(writer, "close") is not None and writer.all_writers is not None:
        wait_for_room(writer._get_file_writer())
    writer.close()


def write_hparams(writer: Any, hparams: dict[str, str | float], metrics: dict[str, float]) -> None:
    """Write hyperparameters and the metrics they led to as one event, without a sub-run."""
    if writer is None or not is_main_rank():
        return
    package = _package(writer, "add_hparams", "add_scalar")
    if package is None:
        writer.add_hparams(hparams, metrics)
        return
    summary = importlib.import_module(f"{package}.summary")
    values = [value for part in summary.hparams(hparams, metrics) for value in part.value]
    values += [summary.Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
    wait_until(_add(writer, package, summary.Summary(value=values), 0))


def is_main_rank() -> bool:
    """Whether this process writes: rank 0, or no process group."""
    distributed = torch.distributed
    return (
        not distributed.is_available()
        or not distributed.is_initialized()
        or distributed.get_rank() == 0
    )


def _timestamp(root: Path) -> Path:
    """A folder named after this second; a second run of that second gets "_2"."""
    name = datetime.now().strftime("%Y%m%d_%H%M%S")
    number = 1
    while True:
        run = name if number == 1 else f"{name}_{number}"
        try:
            (root / run).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return Path(run)


def _package(writer: Any, *methods: str) -> str | None:
    """The backend whose file writer can be used, since no subclass changed its `methods`."""
    kind = type(writer)
    for base in kind.__mro__:
        for package in BACKENDS.values():
            if base.__name__ == "SummaryWriter" and base.__module__ == f"{package}.writer":
                own = all(getattr(kind, name) is getattr(base, name) for name in methods)
                return package if own else None
    if not callable(getattr(writer, methods[0], None)):
        raise TypeError(
            "writer is an object with SummaryWriter's methods, as make_writer opens one, or None; "
            f"got {kind.__name__}, which has no {methods[0]}"
        )
    return None


def _histogram_proto(summary: Any, arguments: Mapping[str, Any]) -> Any:
    names = {"bucket_limits": "bucket_limit", "bucket_counts": "bucket"}
    return summary.HistogramProto(**{names.get(key, key): v for key, v in arguments.items()})


def _settled() -> bool:
    return True


def _add(
    writer: Any, package: str, summary: Any, step: int, patient: bool = True
) -> Callable[[], bool]:
    if writer.all_writers is None and (file := _newest_event_file(writer)):
        # A closed SummaryWriter opens a second event file; the event belongs in the first.
        from tensorboard.summary.writer.record_writer import RecordWriter

        proto = importlib.import_module(summary.__class__.__module__.replace("summary", "event"))
        event = proto.Event(summary=summary, step=step, wall_time=time.time())
        with open(file, "ab") as stream:
            RecordWriter(stream).write(event.SerializeToString())
    else:
        file_writer = writer._get_file_writer()
        wait_for_room(file_writer, patient)
        return settle(file_writer, lambda: file_writer.add_summary(summary, step))
    return _settled


def _newest_event_file(writer: Any) -> Path | None:
    directory = Path(writer.log_dir if hasattr(writer, "log_dir") else writer.logdir)
    return max(directory.glob("events.out.tfevents.*"), key=os.path.getmtime, default=None)
