"""Turns: one write, or one change of what is to be written, at a time in a thread.

A signal's handler and a garbage collection run in the middle of whatever the thread is doing. In
the middle of a write they must not write: the writer holds locks that its own thread can't enter
twice, and the queue of steps is half taken. So what they ask for comes right after it.
"""

import contextlib
import threading
import warnings
from collections import deque
from collections.abc import Callable


class _Turn(threading.local):
    is_on = False

    def __init__(self) -> None:
        self.later: deque[Callable[[], object]] = deque()


_turn = _Turn()


def put_off(call: Callable[[], object]) -> bool:
    """Whether this thread is in the middle of a write; then `call` comes right after it."""
    if _turn.is_on:
        _turn.later.append(call)
    return _turn.is_on


class turn:
    """A write; what was put off in the middle of it comes at its end, in order."""

    def __enter__(self) -> None:
        self._is_inside, _turn.is_on = _turn.is_on, True

    def __exit__(self, *exception: object) -> None:
        _turn.is_on = self._is_inside
        while _turn.later and not _turn.is_on:
            try:
                _turn.later.popleft()()
            except Exception as error:  # who asked for it has gone on
                with contextlib.suppress(Warning):
                    said = f"bthooks: {type(error).__name__}: {error}"
                    warnings.warn(said, RuntimeWarning, stacklevel=2)
