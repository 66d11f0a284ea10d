"""Trains the runs, and says what was told: `python -m tests.health.runs [--seeds 3] [NAME ...]`.

Each is attached to at several cadences at once; the loss is logged at each step.
"""

import argparse
import fnmatch
import statistics
import warnings
from typing import NamedTuple

import torch

import bthooks

from ..conftest import Kept
from .broken import BROKEN
from .healthy import HEALTHY, Run

EVERY = (1, 5, 100)
# Of these the end matters too: of a schedule, or of a loss that has none left.
WHOLE = ("one_cycle", "warm_restarts", "cosine_to_0", "triplets", "fitted_by_heart")
SHORT, FAULT = 80, 40  # steps
SPANS = (((1, 5), 60, 200), ((100,), 600, 1200))  # cadences, step of the fault, steps


class Told(NamedTuple):
    """What was told of a run."""

    alerts: dict[int, tuple[bthooks.Alert, ...]]  # by cadence
    start: float  # of the score, the mean of its first tenth
    end: float  # of its last


def train(run: Run, every: tuple[int, ...] = EVERY, steps: int | None = None) -> Told:
    """Train `run` to its end, or for so many steps."""
    handles = {
        each: bthooks.attach(
            run.model, Kept(), every=each, histograms_every=50 * each, **run.options
        )
        for each in every
    }
    scores = []
    for step in range(steps or run.steps):
        run.model.train()
        loss = run.step(step)
        scores.append(float(run.score() if run.score else loss))
        for handle in handles.values():
            bthooks.log_metrics(handle.writer, {"loss": loss}, step)
        if run.validate is not None and (step + 1) % run.validate_every == 0:
            found = run.validate()
            for handle in handles.values():
                bthooks.log_calibration(handle.writer, *found, step, prefix="val")
    for handle in handles.values():
        handle.detach()
    few = max(1, len(scores) // 10)
    alerts = {each: handle.alerts for each, handle in handles.items()}
    return Told(alerts, statistics.mean(scores[:few]), statistics.mean(scores[-few:]))


def has_learnt(told: Told) -> bool:
    """Whether what is to be learnt is nearer by a tenth at least of what there is."""
    return told.start - told.end > 0.1 * max(abs(told.start), abs(told.end))


def is_named(alerts: tuple[bthooks.Alert, ...], name: str, fault: int) -> bool:
    """Whether the fault of a broken run is told at its place, and nothing before it is there."""
    _, conditions, where, late = BROKEN[name]
    return all(alert.step >= fault * late for alert in alerts) and any(
        alert.condition in conditions and fnmatch.fnmatch(alert.where, where) for alert in alerts
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.health.runs", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="as many steps as in the suite")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    silent, named, waits, of = 0, 0, [], [0, 0]
    for seed in range(arguments.seeds):
        for name in arguments.names or [*HEALTHY, *BROKEN]:
            is_broken = name in BROKEN
            # A fault at the default cadence is there after six logged steps.
            spans = ((EVERY, 0, None),)
            if is_broken:
                spans = (((5,), FAULT, 200),) if arguments.quick else SPANS
            for every, fault, steps in spans:
                torch.manual_seed(seed)
                run = BROKEN[name].make(fault) if is_broken else HEALTHY[name]()
                if arguments.quick and not is_broken and name not in WHOLE:
                    steps = min(run.steps, SHORT)
                told = train(run, every, steps)
                for each, alerts in told.alerts.items():
                    of[is_broken] += 1
                    if is_broken:
                        named += (is_right := is_named(alerts, name, fault))
                        first = min((a.step for a in alerts), default=0)
                        waits += [(first - fault * BROKEN[name].late) // each + 1] * is_right
                    else:
                        silent += (is_right := not alerts and has_learnt(told))
                    said = [f"{a.condition}@{a.where}:{a.step}" for a in alerts]
                    print(f"{'ok  ' if is_right else 'BAD '} {seed} {name} every={each} "
                          f"{told.start:.3g} -> {told.end:.3g} {said}", flush=True)  # fmt: skip
    print(f"healthy: silent {silent} of {of[0]}; broken: named {named} of {of[1]}")
    if waits:
        print(f"logged steps to the first alert: median {statistics.median(waits)}, "
              f"most {max(waits)}")  # fmt: skip


if __name__ == "__main__":
    main()
