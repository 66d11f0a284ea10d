"""That the benchmark runs; its figures are for `python -m tests.benchmarks` on a quiet machine."""

import re

from .benchmarks.models import GPT
from .benchmarks.steps import PLAIN, compared
from .benchmarks.timing import Timings, row, side_by_side, table


def test_a_step_is_held_against_the_same_step_without():
    model = GPT(layers=1, width=8, heads=2, tokens=16, length=4)
    found = compared(model, (1, 4), rounds=2, every=1, histograms_every=1)
    assert {len(seconds) for seconds in found.seconds.values()} == {2}
    (line,) = table(row(found, "a step", PLAIN, 1e9)).splitlines()[2:]
    assert re.fullmatch(
        r"\| a step \| plain step \| [\d.]+ \w+ \| [\d.]+ \w+ \| .+ \| [\d.]+ \| .+: met \|  \|",
        line,
    )


def test_ratios_are_taken_within_a_round():
    found = Timings({"a": [1.0, 20.0, 3.0], "b": [2.0, 40.0, 6.0]})
    assert found.ratio("a", "b") == 0.5
    assert found.median("a") == 3.0
    assert list(row(found, "work", "missing")) == []
    assert side_by_side({"there": lambda: None, "missing": None}, 1).seconds.keys() == {"there"}
