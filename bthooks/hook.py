"""Hook: what is put on a module, and is nothing in a copy of it."""

import contextlib
from collections.abc import Callable
from typing import Any


class Hook:
    """A hook that copies as nothing.

    deepcopy, pickle and torch.save carry `nullcontext().__exit__` in its place, which takes any
    arguments and does nothing: copies are silent, and load where bthooks is not installed.

    Args:
        owner: whose hook it is.
    """

    def __init__(self, owner: Any, call: Callable[..., None]) -> None:
        self.owner, self._call = owner, call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")
