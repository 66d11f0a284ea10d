"""What a training step costs with an attachment, held against the same step without."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import bthooks

from .models import GPT, trainer
from .timing import AGAIN, Row, Timings, row, side_by_side

PLAIN = "plain step"
NEVER = 1 << 40


def rows(quick: bool) -> Iterator[Row]:
    small = GPT(layers=2, width=96, heads=4, tokens=256, length=64)
    never = {"every": NEVER, "histograms_every": NEVER}
    found = compared(small, (2, 64), 20 if quick else 60, steps=20, **never)
    yield from row(found, "a step that is not logged, small model", PLAIN, 1.01)
    found = compared(small, (2, 64), 3 if quick else 9, steps=500)
    yield from row(found, "500 steps at the default cadence, small model", PLAIN, 1.02)
    found = compared(small, (2, 64), 5 if quick else 15, steps=100, from_first=True)
    yield from row(found, "the first 100 steps of a run, small model", PLAIN, 1.02)

    large = GPT(layers=8, width=384, heads=6, tokens=256, length=128)
    always = {"every": 1, "histograms_every": NEVER}
    found = compared(large, (4, 128), 15 if quick else 40, **always)
    work = "a logged step, all but histograms, 14 M GPT, 4 x 128"
    yield from row(found, work, PLAIN, 1.05)
    compiled = torch.compile(large)
    tenth = {"every": 10, "histograms_every": NEVER}
    found = compared(compiled, (4, 128), 3 if quick else 9, steps=10, **tenth)
    yield from row(found, "10 compiled steps of it, one of them logged", PLAIN, 1.03)


def compared(
    model: nn.Module,
    batch: tuple[int, int],
    rounds: int,
    steps: int = 1,
    from_first: bool = False,
    **options: Any,
) -> Timings:
    """So many training steps of one model: plain, plain again and attached.

    Args:
        from_first: with the first step of the attachment, which is always logged.
    """
    step = trainer(model, *batch)
    writer = bthooks.make_writer(tempfile.mkdtemp())

    def work(steps: int = steps) -> None:
        for _ in range(steps):
            step()

    @contextlib.contextmanager
    def plain() -> Iterator[None]:
        work(2)
        time.sleep(0.3)
        yield

    @contextlib.contextmanager
    def attached() -> Iterator[None]:
        if from_first:
            with plain(), bthooks.attach(model, writer, **options):
                yield
        else:  # the first step is always logged; the second hands it to the writer's thread
            with bthooks.attach(model, writer, **options), plain():
                yield

    ways = {PLAIN: work, PLAIN + AGAIN: work, "bthooks": work}
    around = {PLAIN: plain, PLAIN + AGAIN: plain, "bthooks": attached}
    return side_by_side(ways, rounds, least=0, around=around)
