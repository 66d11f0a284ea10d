"""Findings: what one check says of one place; and what says it, with what it keeps of a run."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ..measure.figures import Figures, OfRank


class Finding(NamedTuple):
    """What one check says of one place."""

    where: str
    severity: float  # 1 and more is in the condition, 1/2 and less is well
    message: str  # the figure
    part: str = ""  # what of the place, as "head 3, rank 1"
    at_once: bool = False  # whether one check is enough
    # Whether it may be told; else a figure that it rests on too is not known yet.
    is_certain: bool = True
    follows: bool = False  # whether it may come of what another condition of its kind has told

    @property
    def place(self) -> str:
        return f"{self.where} {self.part}".rstrip()


class Judge:
    """A dataclass of what is known of the checks before, which a resume gives back."""

    def state(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def resume(self, state: Mapping[str, Any]) -> None:
        vars(self).update(copy.deepcopy(dict(state)))


def below(limit: float, value: float) -> float:
    """The severity of a value that is healthy above `limit`."""
    if value <= 0:
        return math.inf if limit else 0.0
    return limit / value


def listed(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def of_ranks(figures: Figures) -> list[tuple[str, OfRank]]:
    """What is known of each rank, behind its name, if there are several."""
    several = len(figures.ranks) > 1
    return [(f"rank {rank}" * several, found) for rank, found in figures.ranks.items()]
