"""The state machine alone: events in, decisions out, without torch."""

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bthooks
from bthooks.schedule import Due, Schedule

NEVER = 1 << 40


class Optimizer:
    """Something that can be referred to weakly."""


def played(events, every=1, histograms_every=NEVER, first=0, shared=()):
    """The decision after each event: the step, v of a validation, h where histograms are due.

    Whether histograms are is known of a training forward once its step begins: h is "maybe" there.
    """
    failures = []
    cadences = every, histograms_every
    schedule = Schedule(first, cadences, lambda site, error: failures.append(error))
    optimizers = {name: Optimizer() for name in "abc"}
    saved = {}

    def again(name):
        return any(optimizers[other] in schedule.stepped for other in shared if other != name)

    def told(slot):
        if slot is None:
            return "-"
        return f"{'v' * slot.validation}{slot.step}{'h' * slot.due.histograms}"

    def kept(slot):
        return schedule.validated(slot) if slot is not None and slot.validation else slot

    decisions = []
    for event in events:
        if event == "train":
            found = told(schedule.training_forward())
        elif event == "no_grad":
            found = told(kept(schedule.training_forward(grad=False)))
        elif event == "eval":
            found = told(kept(schedule.eval_forward()))
        elif event == "raised":  # an eval forward that did not end well
            found = told(schedule.eval_forward())
        elif event == "flush":
            found = told(schedule.flush())
        elif event == "watch":
            found = str(schedule.watches)
        elif event == "save":
            saved = schedule.state_dict()
            found = str(schedule.step)
        elif event == "resume":
            schedule.load_state_dict(saved)
            found = str(schedule.step)
        elif event == "restart":
            schedule = Schedule(first, cadences, lambda site, error: None)
            schedule.load_state_dict(saved)
            found = str(schedule.step)
        elif event == "advance":
            found = told(schedule.optimizer_ends(None, known=0))
        else:
            name = event.rstrip("<>")
            if event.endswith("<"):
                due = schedule.optimizer_begins(optimizers[name], again(name))
                found = "due" if due.scalars else "-"
            else:
                known = len({event[0] for event in events if event.rstrip("<") in optimizers})
                found = told(schedule.optimizer_ends(optimizers[name], again(name), known))
        decisions.append(found)
    assert not failures
    return decisions


TABLE = {
    "a plain loop": ({}, "train a train a train a train a", "0h 0h 1h 1 2 2 3 3"),
    "every second": ({"every": 2}, "train a train a train a", "0h 0h - - 2 2"),
    "histograms": (
        {"every": 2, "histograms_every": 3},
        "train a train a train a train a train a",
        "0h 0h - - 2 2 3h 3h 4h 4",
    ),
    "the first is logged": ({"every": 5, "first": 7}, "train a train a", "7h 7h - -"),
    "a function": ({"every": lambda step: step == 1}, "train a train a train a", "0h 0h 1h 1 - -"),
    "micro-batches": ({}, "train train train a train train a", "0h 0h 0h 0h 1h 1h 1"),
    "two optimizers": ({"every": 2}, "train a b train a b train a b", "0h 0h - - - - 2 2 -"),
    "in turn": ({"every": 2}, "train a train b train a train b train a", "0h 0h 1h - - - 2 - 2 2"),
    "one replaces another": ({"shared": "ab"}, "train a train b train b", "0h 0h 1h 1 2 2"),
    "told by hand": ({}, "train advance train advance", "0h 0h 1h 1"),
    "before an update": ({"every": 2}, "a< a a< a a< b< a b", "due 0h - - due - 2 -"),
    "one validation pass": ({}, "train a eval eval train a eval", "0h 0h v0h - 1h 1 v1"),
    "validation off the cadence": ({"every": 9}, "a eval a eval", "0h v0h - v1"),
    "validation that raised": ({}, "a raised eval eval", "0h v0h v0h -"),
    "inference": ({}, "eval no_grad eval", "v0h v1 v2"),
    "inference at a cadence": ({"every": 2}, "eval eval train a eval", "v0h v1 0h 0h v2h"),
    "a rollout": ({"every": 2}, "train a no_grad no_grad a no_grad a", "0h 0h - - - 2 2"),
    "flush": ({"every": 2}, "flush train a flush a flush a", "0h 0h 0h - - 2 2"),
    "watching": ({"every": 3}, "watch a watch a watch a watch", "True 0h True - False - True"),
    "resume": ({}, "a a save a a resume train a eval", "0h 1 2 2 3 2 2 2 v2"),
    "resume elsewhere": ({"every": 2}, "a save restart train a train a", "0h 1 1 - - 2 2"),
    "resume of inference": ({}, "eval eval save eval restart eval", "v0h v1 2 v2 2 v2"),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    arguments, events, expected = TABLE[name]
    assert played(events.split(), **arguments) == expected.split()


def test_a_cadence_that_raises_is_told_and_nothing_is_due():
    failures = []
    schedule = Schedule(0, (lambda step: 1 // 0, 1), lambda site, error: failures.append(site))
    assert schedule.training_forward().due == Due(True, True)
    schedule.optimizer_ends(Optimizer())
    assert schedule.training_forward() is None
    assert failures == ["cadence"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["train", "no_grad", "eval", "a", "b", "flush", "advance"])),
    st.integers(1, 4),
)
def test_steps_never_go_back_and_none_is_written_twice(events, every):
    """One point a tag and step, whatever a loop does; and a resume changes nothing of it."""
    half = len(events) // 2
    for way in (events, [*events[:half], "save", "restart", *events[half:]]):
        decisions = list(zip(way, played(way, every=every), strict=True))
        written = [d for event, d in decisions if event in ("a", "b", "advance") and d != "-"]
        validated = [d[1:] for _, d in decisions if d[0] == "v"]
        for steps in written, validated:
            numbers = [int(step.rstrip("h")) for step in steps]
            assert numbers == sorted(set(numbers))


def test_it_knows_no_torch():
    tree = ast.parse(Path(bthooks.schedule.__file__).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    froms = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert froms | names <= sys.stdlib_module_names | {"collections.abc"}
