import dataclasses
from typing import Any, NamedTuple

import torch

from bthooks.measure.outputs import tensors_in


@dataclasses.dataclass
class Fields:
    a: Any
    b: Any = None


class Pair(NamedTuple):
    a: Any
    b: Any


def numbers(output, **options):
    return [tensor.item() for tensor in tensors_in(output, **options)]


def test_tensors_come_in_the_order_in_which_they_are_held():
    one, two, three, four = torch.arange(1, 5)
    output = {"z": Pair(one, "text"), "a": [Fields(two, (three,)), None, 3], "m": four}
    assert numbers(output, depth=4) == [1, 2, 3, 4]
    assert numbers(one, depth=0) == [1]


def test_as_many_containers_are_opened_as_are_asked_for():
    one, two = torch.arange(1, 3)
    assert numbers([one, [two]], depth=1) == [1]
    assert numbers([one, [two]], depth=2) == [1, 2]
    circle = [one]
    circle.append(circle)
    assert numbers(circle, depth=4) == [1] * 4


def test_dataclasses_only_where_they_are_asked_for_and_never_their_classes():
    output = Fields(torch.tensor(1))
    assert numbers(output, depth=1) == [1]
    assert numbers(output, depth=1, dataclass=False) == []
    assert numbers([Fields, {torch.tensor(1)}, iter([torch.tensor(1)])], depth=4) == []
