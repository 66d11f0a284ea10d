"""Transfer: small tensors on their way from their devices to the host, in one copy per device.

Reading a number makes a GPU's queue run empty. So what was measured is copied while training goes
on, and asked for when the next step is logged.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..measure.dtypes import widest
from ..measure.histograms import histogram
from ..measure.readings import Readings


class Transfer:
    """The tensors as float64 on the CPU, 0-d ones as numbers; nothing waits before `result()`."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        self._shapes = [tensor.shape for tensor in tensors]
        # By device: by dtype and whether they are 0-d, the indices of those that go together.
        groups: dict[torch.device, dict[tuple[torch.dtype, bool], list[int]]] = {}
        for index, tensor in enumerate(tensors):
            group = groups.setdefault(tensor.device, {})
            group.setdefault((tensor.dtype, tensor.dim() == 0), []).append(index)
        self._copies: list[tuple[Tensor, list[list[int]]]] = []
        self._arrivals: list[torch.cuda.Event] = []
        for device, group in groups.items():
            parts = []
            for (_, scalars), indices in group.items():
                alike = [tensors[index] for index in indices]
                part = torch.stack(alike) if scalars else torch.cat([t.reshape(-1) for t in alike])
                parts.append(part.to(widest(device)))
            values = torch.cat(parts)
            if device.type == "cuda":
                copy = torch.empty_like(values, device="cpu", pin_memory=True)
                copy.copy_(values, non_blocking=True)
                self._arrivals.append(torch.cuda.current_stream(device).record_event())
            else:
                copy = values.to("cpu", torch.float64)
            self._copies.append((copy, [*group.values()]))

    def is_done(self) -> bool:
        """Whether `result()` need not wait."""
        return all(arrival.query() for arrival in self._arrivals)

    def result(self) -> list[Any]:
        """The tensors and numbers, in order."""
        for arrival in self._arrivals:
            arrival.synchronize()
        host: list[Any] = [None] * len(self._shapes)
        for copy, groups in self._copies:
            for indices in groups:
                shapes = [self._shapes[index] for index in indices]
                sizes = [shape.numel() for shape in shapes]
                part, copy = copy.split([sum(sizes), len(copy) - sum(sizes)])
                pieces = part.split(sizes) if shapes[0] else part.tolist()
                for index, shape, piece in zip(indices, shapes, pieces, strict=True):
                    host[index] = piece.reshape(shape) if shape else piece
        return host


class Reading:
    """The readings of a step on their way to the host."""

    def __init__(self, readings: Readings) -> None:
        # Another thread that runs the model may still merge into these.
        readings = readings.mapped(lambda tensor: tensor)
        drawn = {drawn: histogram(values) for drawn, values in readings.samples.items()}
        self._readings = replace(readings, histograms=readings.histograms | drawn, samples={})
        tensors: list[Tensor] = []
        self._readings.mapped(tensors.append)
        self.transfer = Transfer(tensors)

    def result(self) -> Readings:
        """The readings on the host, in float64."""
        host = iter(self.transfer.result())
        return self._readings.mapped(lambda _: next(host))


def read(readings: Readings) -> Readings:
    """`readings` on the host, in float64."""
    return Reading(readings).result()
