"""Timing: several ways to do one piece of work, side by side.

Each way in turn, round after round, so that whatever else the machine does falls on all of them;
ratios are taken within a round, and their median is what counts.
"""

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

Work = Callable[[], object]
AGAIN = " again"  # the same way a second time: the noise


class Timings(NamedTuple):
    """The seconds of each way, by round."""

    seconds: Mapping[str, list[float]]

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def ratio(self, way: str, other: str) -> float:
        """The median over the rounds of `way` : `other`."""
        pairs = zip(self.seconds[way], self.seconds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


def side_by_side(
    ways: Mapping[str, Work | None],
    rounds: int,
    least: float = 0.01,
    around: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> Timings:
    """Time `ways` in turn; None is left out.

    Args:
        least: seconds that a measurement takes at least: short work is repeated within it.
        around: by way, what is entered for it, and not timed.
    """
    known = {name: work for name, work in ways.items() if work is not None}
    for name, work in known.items():
        print(f"  {name}", file=sys.stderr)
        work()  # the first call pays for what the later ones find ready
    repeats = {name: max(1, round(least / timed(work))) for name, work in known.items()}
    seconds: dict[str, list[float]] = {name: [] for name in known}
    order = random.Random(0)  # no way has the same one before it every time
    for _ in range(rounds):
        gc.collect()
        for name in order.sample(list(known), len(known)):
            with (around or {}).get(name, nullcontext)():
                seconds[name].append(timed(known[name], repeats[name]))
    return Timings(seconds)


def timed(work: Work, repeats: int = 1) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        work: what is done.
        peer: what ours is held against.
        ours, theirs: seconds.
        ratio: ours : theirs; None where the seconds alone count.
        noise: the peer's work against itself, if it was done twice.
        goal: what the ratio (or ours) is to be at most.
        note: what else was measured.
    """

    work: str
    peer: str
    ours: float
    theirs: float
    ratio: float | None
    noise: float | None = None
    goal: float | None = None
    note: str = ""

    def cells(self) -> Iterable[str]:
        yield self.work
        yield self.peer
        yield duration(self.ours)
        yield duration(self.theirs)
        yield "" if self.ratio is None else factor(self.ratio)
        yield "" if self.noise is None else f"{self.noise:.3f}"
        if self.goal is None:
            yield ""
        else:
            value = self.ours if self.ratio is None else self.ratio
            bound = duration(self.goal) if self.ratio is None else factor(self.goal)
            yield f"{bound}: {'met' if value <= self.goal else 'missed'}"
        yield self.note


def row(
    timings: Timings,
    work: str,
    peer: str,
    goal: float | None = None,
    *,
    ours: str = "bthooks",
    note: str = "",
) -> Iterable[Row]:
    """The row that holds `ours` against `peer`; none if that is missing."""
    if peer in timings.seconds:
        noise = timings.ratio(peer + AGAIN, peer) if peer + AGAIN in timings.seconds else None
        ratio = timings.ratio(ours, peer)
        yield Row(work, peer, timings.median(ours), timings.median(peer), ratio, noise, goal, note)


HEAD = ("work", "held against", "ours", "theirs", "ours : theirs", "noise", "goal", "")
_NUMBERS = {"ours", "theirs", "ours : theirs", "noise"}


def table(rows: Iterable[Any], head: Sequence[str] = HEAD) -> str:
    """The rows in Markdown."""
    rules = ["---:" if name in _NUMBERS or head is not HEAD else "---" for name in head]
    lines = [head, rules, *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def factor(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio > 0.67 else f"1 : {1 / ratio:.3g}"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
