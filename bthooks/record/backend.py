"""Backend: one event into either SummaryWriter. All that differs between the two is here.

Both have `_get_file_writer()`, beneath `add_scalar` and its kin: a step of 150 scalars goes in as
one event, in a fifteenth of the time. Its buckets and numbers are plain floats by then: what
tensorboardX meets with a TypeError (bfloat16, None) or torch writes wrongly never gets there.
Behind it stand a queue and a thread, which end on a full disk: torch's raises from then on;
tensorboardX's blocks for ever once ten events wait, in close() and at the end of the program too.
So each is looked at before it is given something.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..measure.histograms import raw
from .event import Event

PACKAGES = {"torch": "torch.utils.tensorboard", "tensorboardX": "tensorboardX"}
PATIENCE = 10.0  # seconds that a writer is waited for
_MOMENT = 0.05  # and an event


def is_main_rank() -> bool:
    """Whether this process writes: rank 0, or no process group."""
    ranks = torch.distributed
    is_group = ranks.is_available() and ranks.is_initialized()
    return not is_group or ranks.get_rank() == 0


def write(writer: Any, event: Event, step: int) -> None:
    """Write `event` as one event of the backend's own file writer; else by `add_*` calls.

    Nothing is written without a writer, or on a rank other than 0. A writer that takes nothing for
    ten seconds is an OSError.
    """
    _wait_until(hand_over(writer, event, step))


def hand_over(writer: Any, event: Event, step: int, patient: bool = True) -> Callable[[], bool]:
    """As `write`, but without a wait for the writer's thread; if not `patient`, without any.

    Returns:
        what saves the event from a kill, once the thread has taken it, and says whether it has.
    """
    if writer is None or not is_main_rank():
        return _is_settled
    drawn = {tag: found for tag, each in event.histograms.items() if (found := raw(each))}
    backend = _backend(writer, "add_scalar", "add_histogram_raw", "add_image", "add_text")
    if backend is None:
        for tag, value in event.scalars.items():
            writer.add_scalar(tag, value, step)
        for tag, arguments in drawn.items():
            writer.add_histogram_raw(tag, global_step=step, **arguments)
        for tag, image in event.images.items():
            writer.add_image(tag, image.numpy(), step, dataformats="HWC")
        for tag, text in event.texts.items():
            writer.add_text(tag, text, step)
        if event.layout and hasattr(writer, "add_custom_scalars"):
            writer.add_custom_scalars(event.layout)
        return _is_settled
    proto = backend.Event(step=step)
    for tag, value in event.scalars.items():
        proto.summary.value.add(tag=tag, simple_value=value)
    for tag, arguments in drawn.items():
        proto.summary.MergeFrom(backend.histogram_raw(tag, **arguments))
    for tag, image in event.images.items():
        proto.summary.MergeFrom(backend.image(tag, image.numpy(), dataformats="HWC"))
    for tag, text in event.texts.items():
        proto.summary.MergeFrom(backend.text(tag, text))
    if event.layout:
        proto.summary.MergeFrom(backend.custom_scalars(event.layout))
    return _give(writer, proto, patient) if proto.summary.value else _is_settled


def write_hparams(writer: Any, hparams: dict[str, str | float], metrics: dict[str, float]) -> None:
    """Write hyperparameters and the metrics they led to as one event, without a sub-run."""
    if writer is None or not is_main_rank():
        return
    backend = _backend(writer, "add_hparams", "add_scalar")
    if backend is None:
        writer.add_hparams(hparams, metrics)
        return
    proto = backend.Event()
    for part in backend.hparams(hparams, metrics):
        proto.summary.MergeFrom(part)
    for tag, value in metrics.items():
        proto.summary.value.add(tag=tag, simple_value=value)
    _wait_until(_give(writer, proto))


def supersede(writer: Any, step: int) -> bool:
    """Hide what `writer` wrote at `step` and after, as `purge_step` does; whether it could be."""
    backend = _backend(writer, "add_scalar")
    if backend is None:
        return False
    mark = backend.SessionLog(status=backend.SessionLog.START)
    for _ in range(2):  # TensorBoard's Python reader takes the first for the start of the run
        _wait_until(_give(writer, backend.Event(step=step, session_log=mark)))
    return True


def close(writer: Any) -> None:
    """Close `writer`; if what is behind it has ended, an OSError: closing would wait for ever."""
    if _backend(writer, "close") is not None and writer.all_writers is not None:
        _wait_for_room(writer._get_file_writer())
    writer.close()


def _backend(writer: Any, *methods: str) -> ModuleType | None:
    """The module of the SummaryWriter that `writer` is, and what it makes protocol buffers with.

    None where a subclass changed one of `methods`: then it is to be called.
    """
    kind = type(writer)
    for base in kind.__mro__:
        for package in PACKAGES.values():
            if base.__name__ == "SummaryWriter" and base.__module__ == f"{package}.writer":
                own = all(getattr(kind, name) is getattr(base, name) for name in methods)
                return sys.modules[base.__module__] if own else None
    if not callable(getattr(writer, methods[0], None)):
        raise TypeError(
            "writer is an object with SummaryWriter's methods, as make_writer opens one, or None; "
            f"got {kind.__name__}, which has no {methods[0]}"
        )
    return None


def _give(writer: Any, proto: Any, patient: bool = True) -> Callable[[], bool]:
    """Give the event `proto` to the file writer of `writer`; as `hand_over`."""
    if writer.all_writers is None and (file := _newest_event_file(writer)):
        # A closed SummaryWriter opens a second event file; the event belongs in the first.
        from tensorboard.summary.writer.record_writer import RecordWriter

        proto.wall_time = time.time()
        with open(file, "ab") as stream:
            RecordWriter(stream).write(proto.SerializeToString())
        return _is_settled
    file_writer = writer._get_file_writer()
    _wait_for_room(file_writer, patient)
    file_writer.add_event(proto)
    return _settled_by(file_writer)


def _newest_event_file(writer: Any) -> Path | None:
    directory = Path(writer.log_dir if hasattr(writer, "log_dir") else writer.logdir)
    return max(directory.glob("events.out.tfevents.*"), key=os.path.getmtime, default=None)


def _wait_for_room(file_writer: Any, patient: bool = True) -> None:
    """Wait until one more event can be given to `file_writer` without waiting.

    If its thread has ended, or takes nothing for ten seconds (if not `patient`, now): OSError.
    """
    event_writer = getattr(file_writer, "event_writer", None)
    event_writer = getattr(event_writer, "_async_writer", event_writer)  # torch's
    queue = getattr(event_writer, "_byte_queue", getattr(event_writer, "_event_queue", None))
    thread = getattr(event_writer, "_worker", None)
    until = time.monotonic() + PATIENCE * patient
    while queue is not None and thread is not None:
        if not thread.is_alive():
            if hasattr(queue, "cancel_join_thread"):
                queue.cancel_join_thread()  # else the end of the program waits for it
            cause = getattr(thread, "exception", None)
            raise OSError(f"the writer's thread has ended: {cause or 'is the disk full?'}")
        if not queue.full():
            return
        if time.monotonic() > until:
            raise OSError("the writer's thread takes nothing any more: does the disk hang?")
        time.sleep(0.01)


def _settled_by(file_writer: Any) -> Callable[[], bool]:
    """What hands the events given so far to the system, which a kill does not touch.

    It does so once the writer's thread has taken them, and says whether it has. tensorboardX keeps
    up to 8 kB of events in the process for two minutes: a kill lost 12 of 400.
    """
    event_writer = getattr(file_writer, "event_writer", None)
    record = getattr(event_writer, "_ev_writer", None)
    queue = getattr(event_writer, "_event_queue", None)
    if record is None or queue is None:
        return _is_settled
    is_taken = False

    def settled() -> bool:
        nonlocal is_taken
        if not record._lock.acquire(blocking=False):
            return False  # the thread is at it
        try:
            stream = record._py_recordio_writer._writer
            if getattr(stream, "closed", False):
                return True
            if hasattr(stream, "fileno"):  # a file
                stream.flush()
            # What the thread has just taken it writes by the next time.
            was_taken, is_taken = is_taken, _is_empty(queue)
            return was_taken
        finally:
            record._lock.release()

    return settled


def _is_settled() -> bool:
    return True


def _is_empty(queue: Any) -> bool:
    try:
        return bool(queue.qsize() == 0)
    except NotImplementedError:  # on macOS
        return bool(queue.empty())


def _wait_until(settled: Callable[[], bool]) -> None:
    """Wait for an event that was given, a moment at most."""
    until = time.monotonic() + _MOMENT
    while not settled() and time.monotonic() < until:
        time.sleep(1e-4)
