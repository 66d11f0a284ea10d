"""The state machine alone: events in, decisions out, without torch."""

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bthooks
from bthooks.schedule import BY_HAND, Due, Schedule

NEVER = 1 << 40


def played(events, every=1, histograms_every=NEVER, first=0, shared=(), trains=False):
    """The decision after each event: the step, v of a validation, h where histograms are due.

    Whether histograms are is known of a training forward once its step begins: h is "maybe" there.
    """
    failures = []
    cadences = every, histograms_every
    schedule = Schedule(first, cadences, lambda site, error: failures.append(error), trains)
    numbers = {name: number for number, name in enumerate("abc")}
    stepping = {
        event[0] for event in events if event.rstrip("<>")[:1] in numbers and len(event) < 4
    }
    saved = {}
    backward = None  # the pass that runs, as "[" and "]" tell, each of a number of its own

    def held(name):
        return {numbers[other] for other in (name, *(shared if name in shared else ()))}

    def told(slot):
        if slot is None:
            return "-"
        return f"{'v' * slot.validation}{slot.step}{'h' * slot.due.histograms}"

    def kept(slot):
        return schedule.validated(slot) if slot is not None and slot.validation else slot

    decisions = []
    for at, event in enumerate(events):
        if event == "train":
            found = told(schedule.training_forward())
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
        elif event == "gone":  # optimizer a
            found = str(schedule.optimizer_is_gone(numbers["a"]))
        elif event in ("[", "]"):
            backward = at if event == "[" else None
            continue
        elif event == "advance":
            begins = schedule.begins_step({BY_HAND}, backward)
            found = told(schedule.optimizer_ends(BY_HAND, begins, backward))
        elif event.endswith("<"):
            found = "due" if schedule.optimizer_begins(held(event[0]), backward).scalars else "-"
        else:
            begins = schedule.begins_step(held(event), backward)
            ended = schedule.optimizer_ends(numbers[event], begins, backward, len(stepping))
            found = told(ended)
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
    "one is gone": ({}, "train a gone train b gone a", "0h 0h None 1h 1 None -"),
    "told by hand": ({}, "train advance train advance", "0h 0h 1h 1"),
    "before an update": ({"every": 2}, "a< a a< a a< b< a b", "due 0h - - due - 2 -"),
    "one validation pass": ({}, "train a eval eval train a eval", "0h 0h v0h - 1h 1 v1"),
    "validation off the cadence": ({"every": 9}, "a eval a eval", "0h v0h - v1"),
    "validation that raised": ({}, "a raised eval eval", "0h v0h v0h -"),
    "a pass before training": (
        {"trains": True},
        "eval eval train eval a eval train a eval",
        "v0h - 0h - 0h v1h 1h 1 v2",
    ),
    "several before training": (
        {"trains": True, "every": 9},
        "eval eval eval a a eval",
        "v0h - - 0h - v1",
    ),
    "an accumulated step, then a pass": ({"every": 9}, "train train eval a", "0h 0h v0h 0h"),
    "inference": ({}, "eval eval eval", "v0h v1 v2"),
    "inference at a cadence": ({"every": 2}, "eval eval train a eval", "v0h v1 0h 0h v2h"),
    "optimizers in backward": (
        {"every": 2},
        "train [ a b c ] train [ a b c ] train [ a b c ]",
        "0h 0h - - - - - - 2 2 - -",
    ),
    "backward within backward": ({}, "train [ a ] [ b c ] train [ a ] [ b ]", "0h 0h - - 1h 1 -"),
    "two passes, one forward": ({}, "train [ a b ] [ a b ] train [ a ]", "0h 0h - 1 - 2 2"),
    "passes of unseen forwards": ({}, "[ a b ] [ a b ] [ a b ]", "0h - 1 - 2 -"),
    "some in backward": ({}, "train [ a b ] c train [ a b ] c", "0h 0h - - 1h 1 - -"),
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
    schedule.optimizer_ends(0, begins=True)
    assert schedule.training_forward() is None
    assert failures == ["cadence"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["train", "eval", "a", "b", "flush", "advance", "[", "]"])),
    st.integers(1, 4),
)
def test_steps_never_go_back_and_none_is_written_twice(events, every):
    """One point a tag and step, whatever a loop does; and a resume changes nothing of it."""
    half = len(events) // 2
    for way in (events, [*events[:half], "save", "restart", *events[half:]]):
        decided = [event for event in way if event not in ("[", "]")]
        decisions = list(zip(decided, played(way, every=every), strict=True))
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
