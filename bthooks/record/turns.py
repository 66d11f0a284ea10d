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
    """`with turn:` is a write; what was put off in the middle of it comes at its end, in order."""

    depth = 0

    def __init__(self) -> None:
        self.later: deque[Callable[[], object]] = deque()

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *exception: object) -> None:
        self.depth -= 1
        while self.later and not self.depth:
            try:
                self.later.popleft()()
            except Exception as error:  # who asked for it has gone on
                with contextlib.suppress(Warning):
                    said = f"bthooks: {type(error).__name__}: {error}"
                    warnings.warn(said, RuntimeWarning, stacklevel=2)


turn = _Turn()


def put_off(call: Callable[[], object]) -> bool:
    """Whether this thread is in the middle of a write; then `call` comes right after it."""
    if turn.depth:
        turn.later.append(call)
    return turn.depth > 0
