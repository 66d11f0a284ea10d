"""Wanted: what is captured, as the user asked for it."""

from collections.abc import Callable, Collection
from typing import NamedTuple

KINDS = ("attention", "gradients", "learning_rate", "uncertainty", "histograms")
ON_REQUEST = ("activations", "updates")


class Wanted(NamedTuple):
    """What is captured.

    Attributes:
        kinds: of KINDS and ON_REQUEST.
        by_name: whether the user named the kinds, so that one that is not there is said.
        selected: which module paths and parameter names.
        globs: those of `selected`, where it is made of globs.
        rows: the query rows per map that statistics are taken from; None takes all.
    """

    kinds: Collection[str]
    by_name: bool
    selected: Callable[[str], bool]
    globs: Collection[str]
    rows: int | None
