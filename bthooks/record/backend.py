"""Backend: one event into either SummaryWriter. All that differs between the two is here.

Both have `_get_file_writer()`, beneath `add_scalar` and its kin: a step of 150 scalars goes in as
one event, in a fifteenth of the time. Behind it stand a queue and a thread, which end on a full
disk: torch's raises from then on; tensorboardX's blocks for ever once ten events wait, in close()
and at the end of the program too. So each is looked at before it is given something.
"""

import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..measure.histograms import raw
from .event import Event

PACKAGES = {"torch": "torch.utils.tensorboard", "tensorboardX": "tensorboardX"}
_PROTO = {  # their protocol buffers are not interchangeable
    "torch.utils.tensorboard": "tensorboard.compat.proto.event_pb2",
    "tensorboardX": "tensorboardX.proto.event_pb2",
}
PATIENCE = 10.0  # seconds that a writer is waited for
_MOMENT = 0.05  # and an event


def is_main_rank() -> bool:
    """Whether this process writes: rank 0, or no process group."""
    distributed = torch.distributed
    return (
        not distributed.is_available()
        or not distributed.is_initialized()
        or distributed.get_rank() == 0
    )


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
        return _is_settled
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
        return _is_settled
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
        return _is_settled
    return _give(writer, package, step, patient, summary=summary.Summary(value=values))


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
    wait_until(_give(writer, package, 0, summary=summary.Summary(value=values)))


def supersede(writer: Any, step: int) -> bool:
    """Hide what `writer` wrote at `step` and after, as `purge_step` does when one is opened.

    Returns:
        whether it could be: of an object that is no SummaryWriter nothing is known.
    """
    package = _package(writer, "add_scalar")
    if package is None:
        return False
    proto = importlib.import_module(_PROTO[package])
    mark = proto.SessionLog(status=proto.SessionLog.START)
    wait_until(_give(writer, package, step, session_log=mark))
    return True


def wait_for_room(file_writer: Any, patient: bool = True) -> None:
    """Wait until one more event can be given to `file_writer` without waiting.

    Raises:
        OSError: its thread has ended, or has taken nothing for ten seconds (if not `patient`, now).
    """
    queue, thread = _behind(file_writer)
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


def settle(file_writer: Any, give: Callable[[], None]) -> Callable[[], bool]:
    """Give an event to `file_writer` so that a killed process does not lose it.

    tensorboardX keeps up to 8 kB of events in the process for two minutes: 12 of 400 were lost.

    Returns:
        what hands the event to the system, which a kill does not touch, as soon as the writer's
        thread has taken it, and says whether it has.
    """
    event_writer = getattr(file_writer, "event_writer", None)
    record = getattr(event_writer, "_ev_writer", None)
    queue = getattr(event_writer, "_event_queue", None)
    give()
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


def _is_empty(queue: Any) -> bool:
    try:
        return bool(queue.qsize() == 0)
    except NotImplementedError:  # on macOS
        return bool(queue.empty())


def wait_until(settled: Callable[[], bool]) -> None:
    """Wait for an event that was given, a moment at most."""
    until = time.monotonic() + _MOMENT
    while not settled() and time.monotonic() < until:
        time.sleep(1e-4)


def _behind(file_writer: Any) -> tuple[Any, Any]:
    """The queue and the thread, if they are where both backends have them."""
    event_writer = getattr(file_writer, "event_writer", None)
    event_writer = getattr(event_writer, "_async_writer", event_writer)  # torch's
    queue = getattr(event_writer, "_byte_queue", getattr(event_writer, "_event_queue", None))
    return queue, getattr(event_writer, "_worker", None)


def _package(writer: Any, *methods: str) -> str | None:
    """The backend whose file writer can be used, since no subclass changed its `methods`."""
    kind = type(writer)
    for base in kind.__mro__:
        for package in PACKAGES.values():
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


def _give(
    writer: Any, package: str, step: int, patient: bool = True, **content: Any
) -> Callable[[], bool]:
    """Give an event of that content to the file writer; as `hand_over`."""
    proto = importlib.import_module(_PROTO[package])
    event = proto.Event(step=step, wall_time=time.time(), **content)
    if writer.all_writers is None and (file := _newest_event_file(writer)):
        # A closed SummaryWriter opens a second event file; the event belongs in the first.
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(file, "ab") as stream:
            RecordWriter(stream).write(event.SerializeToString())
        return _is_settled
    file_writer = writer._get_file_writer()
    wait_for_room(file_writer, patient)
    return settle(file_writer, lambda: file_writer.add_event(event, step))


def _is_settled() -> bool:
    return True


def _newest_event_file(writer: Any) -> Path | None:
    directory = Path(writer.log_dir if hasattr(writer, "log_dir") else writer.logdir)
    return max(directory.glob("events.out.tfevents.*"), key=os.path.getmtime, default=None)
