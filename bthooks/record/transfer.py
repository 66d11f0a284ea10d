"""Transfer: small tensors on their way from their devices to the host.

In: tensors. Out: their values on the host, after one copy per device.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..measure.dtypes import widest


class Transfer:
    """The tensors as float64 on the CPU, 0-d ones as numbers.

    From CUDA they are copied into pinned memory, which nothing waits for before `result()`.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        self._shapes = [tensor.shape for tensor in tensors]
        groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
        for index, tensor in enumerate(tensors):
            key = tensor.device, tensor.dtype, tensor.dim() == 0
            groups.setdefault(key, []).append(index)
        self._order: dict[torch.device, list[list[int]]] = {}
        joined: dict[torch.device, list[Tensor]] = {}
        for (device, _, scalars), indices in groups.items():
            group = [tensors[index] for index in indices]
            values = torch.stack(group) if scalars else torch.cat([t.reshape(-1) for t in group])
            joined.setdefault(device, []).append(values.to(widest(device)))
            self._order.setdefault(device, []).append(indices)
        self._copies: dict[torch.device, Tensor] = {}
        self._arrivals: list[torch.cuda.Event] = []
        for device, parts in joined.items():
            values = torch.cat(parts)
            if device.type == "cuda":
                copy = torch.empty_like(values, device="cpu", pin_memory=True)
                copy.copy_(values, non_blocking=True)
                self._arrivals.append(torch.cuda.current_stream(device).record_event())
            else:
                copy = values.to("cpu", torch.float64)
            self._copies[device] = copy

    def is_done(self) -> bool:
        """Whether `result()` need not wait."""
        return all(arrival.query() for arrival in self._arrivals)

    def result(self) -> list[Any]:
        """The tensors and numbers, in order."""
        for arrival in self._arrivals:
            arrival.synchronize()
        host: list[Any] = [None] * len(self._shapes)
        for device, copy in self._copies.items():
            for indices in self._order[device]:
                shapes = [self._shapes[index] for index in indices]
                sizes = [shape.numel() for shape in shapes]
                part, copy = copy.split([sum(sizes), len(copy) - sum(sizes)])
                pieces = part.split(sizes) if shapes[0] else part.tolist()
                for index, shape, piece in zip(indices, shapes, pieces, strict=True):
                    host[index] = piece.reshape(shape) if shape else piece
        return host
