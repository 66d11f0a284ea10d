"""Backlog: the queue and the thread behind a SummaryWriter, which end on a full disk.

torch's raises from then on; tensorboardX's blocks for ever once ten events wait, close() and the
end of the program too.
"""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 10.0  # seconds that a writer is waited for
_MOMENT = 0.05  # and an event


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
        return lambda: True
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
