"""Backend: one event into either SummaryWriter. All that differs between the two is here.

Both have `_get_file_writer()`, beneath `add_scalar` and its kin: a step of 150 scalars goes in as
one event, in a fifteenth of the time. Its buckets and numbers are plain floats by then: what
tensorboardX meets with a TypeError (bfloat16, None) or torch writes wrongly never gets there.
Experiment trackers replace the public methods, on the class or on the writer, and hear of nothing
that goes beneath them: a method that is not the backend's own is called, value by value.
Behind the file writer stand a queue and a thread, which end on a full disk: torch's raises from
then on; tensorboardX's blocks for ever once ten events wait, in close() and at the end of the
program too. So each is looked at before it is given something.
"""

import io
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

from ..measure.histograms import raw
from .event import Event
from .turns import put_off, turn

PACKAGES = {"torch": "torch.utils.tensorboard", "tensorboardX": "tensorboardX"}
PATIENCE = 10.0  # seconds that a writer is waited for
_MOMENT = 0.05  # and an event

# How one value of an event goes to a method of a SummaryWriter.
_CALLS: dict[str, Callable[[Any, str, Any, int], object]] = {
    "add_scalar": lambda writer, tag, value, step: writer.add_scalar(tag, value, step),
    "add_histogram_raw": lambda writer, tag, drawn, step: writer.add_histogram_raw(
        tag, global_step=step, **drawn
    ),
    "add_image": lambda writer, tag, image, step: writer.add_image(
        tag, image, step, dataformats="HWC"
    ),
    "add_text": lambda writer, tag, text, step: writer.add_text(tag, text, step),
    "add_custom_scalars": lambda writer, _, layout, step: writer.add_custom_scalars(layout),
    "add_hparams": lambda writer, _, given, step: writer.add_hparams(*given),
}


def write(writer: Any, event: Event, step: int) -> None:
    """Write `event` as one event of the backend's own file writer; else by `add_*` calls.

    Nothing is written without a writer. A writer that takes nothing for ten seconds is an OSError;
    one whose file was removed is warned of, once.
    """
    if put_off(partial(write, writer, event, step)):
        return
    try:
        with turn:
            _wait_until(hand_over(writer, event, step))
    except Removed as removed:  # a training step is no place to end for it
        if not was_told(writer):
            said = f"bthooks: event file: {removed}; what is logged from now on is lost"
            warnings.warn(said, RuntimeWarning, stacklevel=2)


def hand_over(writer: Any, event: Event, step: int, patient: bool = True) -> Callable[[], bool]:
    """As `write`, but without a wait for the writer's thread; if not `patient`, without any.

    Returns:
        what saves the event from a kill, once the thread has taken it, and says whether it has.
    """
    if writer is None:
        return _is_settled
    backend = _backend(writer, "add_scalar" if event.hparams is None else "add_hparams")
    parts: dict[str, dict[str, Any]] = {
        "add_scalar": event.scalars,
        "add_histogram_raw": {t: drawn for t, h in event.histograms.items() if (drawn := raw(h))},
        "add_image": {tag: image.numpy() for tag, image in event.images.items()},
        "add_text": event.texts,
        "add_custom_scalars": {"": event.layout} if event.layout else {},
    }
    if event.hparams is not None and not _is_own(writer, "add_hparams", backend):
        parts = {"add_hparams": {"": (event.hparams, event.scalars)}}
    called = {name: part for name, part in parts.items() if not _is_own(writer, name, backend)}
    own = {name: part for name, part in parts.items() if name not in called}
    failed = _call(writer, called, step, backend, patient)
    is_settled = _is_settled
    if backend is not None:
        proto = backend.Event(step=step)
        _fill(proto.summary, own, backend)
        if event.hparams is not None and own:
            proto.summary.MergeFromString(_session(event.hparams))
        if proto.summary.value:
            is_settled = _give(writer, proto, step, patient)
    if failed:
        raise failed[0]
    return is_settled


def _fill(summary: Any, parts: dict[str, dict[str, Any]], backend: ModuleType) -> None:
    """Put `parts` into a summary of `backend`."""
    for tag, value in parts.get("add_scalar", {}).items():
        summary.value.add(tag=tag, simple_value=value)
    for tag, drawn in parts.get("add_histogram_raw", {}).items():
        summary.MergeFrom(backend.histogram_raw(tag, **drawn))
    for tag, image in parts.get("add_image", {}).items():
        summary.MergeFrom(backend.image(tag, image, dataformats="HWC"))
    for tag, text in parts.get("add_text", {}).items():
        summary.MergeFrom(backend.text(tag, text))
    for layout in parts.get("add_custom_scalars", {}).values():
        summary.MergeFrom(backend.custom_scalars(layout))


def _call(
    writer: Any,
    parts: dict[str, dict[str, Any]],
    step: int,
    backend: ModuleType | None,
    patient: bool,
) -> list[Exception]:
    """Call the methods of `writer`; what failed, which costs its value alone."""
    failed: list[Exception] = []
    for name, part in parts.items():
        if name == "add_custom_scalars" and not hasattr(writer, name):
            continue
        for tag, value in part.items():
            if backend is not None and writer.all_writers is not None:
                _wait_for_room(writer._get_file_writer(), patient)
            try:
                _CALLS[name](writer, tag, value, step)
            except Exception as error:
                failed.append(error)
    return failed


def _session(hparams: dict[str, str | float | bool]) -> bytes:
    """The summary, in bytes, by which the HParams tab knows a run's hyperparameters.

    The backends' own (torch's writes True as 1) come with a list of the columns, which TensorBoard
    then shows for all runs of a folder: those of one of them.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo()
    for name, value in hparams.items():
        kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[name], kind, value)
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    summary = Summary()
    for tag, data in (
        (metadata.SESSION_START_INFO_TAG, {"session_start_info": start}),
        (metadata.SESSION_END_INFO_TAG, {"session_end_info": end}),
    ):
        held = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**data))
        summary.value.add(tag=tag, metadata=held)
    return bytes(summary.SerializeToString())


def supersede(writer: Any, step: int) -> bool:
    """Hide what is in the folder of `writer` at `step` and after, as `purge_step` does.

    Returns:
        whether it could be.
    """
    backend = _backend(writer, "add_scalar")
    if backend is None:
        return False
    mark = backend.SessionLog(status=backend.SessionLog.START)
    for _ in range(2):  # TensorBoard's Python reader takes the first for the start of the run
        _wait_until(_give(writer, backend.Event(step=step, session_log=mark), step))
    return True


def flush(writer: Any) -> None:
    """Flush `writer`; if what is behind it has ended, or its file was removed, an OSError."""
    if _backend(writer, "flush") is not None and writer.all_writers is not None:
        _wait_for_room(writer._get_file_writer())
    writer.flush()


def close(writer: Any) -> None:
    """Close `writer`; if what is behind it has ended, an OSError: closing would wait for ever."""
    if _backend(writer, "close") is not None and writer.all_writers is not None:
        _wait_for_room(writer._get_file_writer(), is_there=False)
    writer.close()


def _backend(writer: Any, method: str) -> ModuleType | None:
    """The module of the SummaryWriter that `writer` is, and what it makes protocol buffers with.

    None where it is none; an object without `method` is refused.
    """
    for base in type(writer).__mro__:
        for package in PACKAGES.values():
            if base.__name__ == "SummaryWriter" and base.__module__ == f"{package}.writer":
                return sys.modules[base.__module__]
    if not callable(getattr(writer, method, None)):
        raise TypeError(
            "writer is an object with SummaryWriter's methods, as make_writer opens one, or None; "
            f"got {type(writer).__name__}, which has no {method}"
        )
    return None


def _is_own(thing: Any, name: str, backend: ModuleType | None) -> bool:
    """Whether the method is as `backend` wrote it: on the class, a subclass and on `thing`.

    What replaces one may bear its name and its module (functools.wraps), but not its globals.
    """
    if backend is None or _is_heard_by_comet(thing):
        return False
    method = getattr(thing, name, None)
    function = getattr(method, "__func__", None)
    if type(method) is not MethodType or type(function) is not FunctionType:
        return False
    return function.__globals__ is vars(backend)


def _is_heard_by_comet(writer: Any) -> bool:
    """Whether tensorboardX's methods tell Comet of what they are given (`comet_config`)."""
    if (logger := getattr(writer, "_comet_logger", None)) is not None:
        return getattr(logger, "_logging", None) is not False
    return bool((getattr(writer, "_comet_config", None) or {}).get("disabled", True) is not True)


def _give(writer: Any, proto: Any, step: int, patient: bool = True) -> Callable[[], bool]:
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
    if proto.summary.value and not _is_own(file_writer, "add_summary", _backend(writer, "flush")):
        file_writer.add_summary(proto.summary, step)
    else:
        file_writer.add_event(proto, step)
    return _settled_by(file_writer, proto)


def _newest_event_file(writer: Any) -> Path | None:
    directory = Path(writer.log_dir if hasattr(writer, "log_dir") else writer.logdir)
    return max(directory.glob("events.out.tfevents.*"), key=os.path.getmtime, default=None)


def _wait_for_room(file_writer: Any, patient: bool = True, is_there: bool = True) -> None:
    """Wait until one more event can be given to `file_writer` without waiting.

    If its thread has ended, or takes nothing for ten seconds (if not `patient`, now), or if its
    file is not there any more: OSError.
    """
    event_writer = getattr(file_writer, "event_writer", None)
    if is_there:
        _refuse_removed(event_writer)
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


class Removed(FileNotFoundError):
    """The event file was removed."""


_told: weakref.WeakSet[Any] = weakref.WeakSet()  # of the writers whose file was removed


def was_told(writer: Any) -> bool:
    """Whether this has been asked of `writer` before: of its file it is told once."""
    told = writer in _told
    _told.add(writer)
    return told


def _refuse_removed(event_writer: Any) -> None:
    """Raise `Removed` if the event file is not there: what is written would be nowhere.

    tensorboardX holds a file descriptor, which goes on taking events. torch's opens its file by
    name for each event, and would end at the next, or begin a file that has no head.
    """
    record = getattr(event_writer, "_ev_writer", event_writer)
    name = getattr(record, "_file_name", None)
    stream = getattr(getattr(record, "_py_recordio_writer", None), "_writer", None)
    if isinstance(stream, io.BufferedWriter):
        is_gone = not stream.closed and os.fstat(stream.fileno()).st_nlink == 0
    else:
        is_gone = isinstance(name, str) and "://" not in name and not os.path.exists(name)
    if is_gone:
        raise Removed(f"{name} was removed, with all that was written to it")


def _settled_by(file_writer: Any, proto: Any) -> Callable[[], bool]:
    """What hands `proto`, just given, to the system, which a kill does not touch.

    It does so once the writer's thread has written it, and says whether it has. tensorboardX keeps
    up to 8 kB of events in the process for two minutes: a kill lost 12 of 400. What its thread has
    taken and not written is in no queue, so the file itself is asked: for the event's time.
    """
    event_writer = getattr(file_writer, "event_writer", None)
    record = getattr(event_writer, "_ev_writer", None)
    stream = getattr(getattr(record, "_py_recordio_writer", None), "_writer", None)
    if record is None or not isinstance(stream, io.BufferedWriter):
        return _is_settled
    field = type(proto)(wall_time=proto.wall_time).SerializeToString()
    start = os.fstat(stream.fileno()).st_size

    def settled() -> bool:
        if not record._lock.acquire(blocking=False):
            return False  # the thread is at it
        try:
            if not stream.closed:
                stream.flush()
        finally:
            record._lock.release()
        try:
            with open(record._file_name, "rb") as written:
                written.seek(start)
                return field in written.read()
        except FileNotFoundError:
            return True  # of which the next event tells

    return settled


def _is_settled() -> bool:
    return True


def _wait_until(settled: Callable[[], bool]) -> None:
    """Wait for an event that was given, a moment at most."""
    until = time.monotonic() + _MOMENT
    while not settled() and time.monotonic() < until:
        time.sleep(1e-4)
