"""Wanted: what is captured, as the user asked for it."""

from collections.abc import Callable, Collection
from typing import NamedTuple

KINDS = ("attention", "gradients", "learning_rate", "uncertainty", "histograms")
ON_REQUEST = ("activations", "updates")


class Wanted(NamedTuple):
    """What is captured."""

    kinds: Collection[str]  # of KINDS and ON_REQUEST
    by_name: bool  # whether the user named the kinds, so that one that is not there is said
    selected: Callable[[str], bool]  # which module paths and parameter names
    globs: Collection[str]  # those of `selected`, where it is made of globs
    rows: int | None  # query rows per map that statistics are taken from; None takes all
