"""Forward: one observed forward of the model, with everything that is put on for it.

Hooks and modes cost time, and a hook on a submodule can change what runs. So they are there for
the forwards that are logged, and for no other.
"""

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..measure.attention import merge
from ..measure.histograms import Histogram, histogram
from ..measure.outputs import tensors_in
from ..measure.readings import Drawn, Readings, losses, uncertainties
from ..measure.sharded import readable
from ..measure.uncertainty import find_uncertainties
from ..names import module_names
from ..report import Ledger
from ..torch_private import Hook, calls_on_stack, without_modes
from .attention import AttentionMode, Doubt
from .nonfinite import Trail, observable
from .wanted import Wanted


class ObservedForward:
    """One observed forward of `root`: made before it; close after it, then ask for its readings.

    Of the kinds that are wanted, attention, activations and uncertainty are captured here.
    """

    def __init__(
        self,
        root: nn.Module,
        given: Any,
        wanted: Wanted,
        *,
        scalars: bool,
        histograms: bool,
        ledger: Ledger,
    ) -> None:
        self.thread = threading.get_ident()
        self._wanted, self._histograms, self._ledger = wanted, histograms, ledger
        self._activations: dict[Drawn, Histogram] = {}
        self._maps: dict[str, list[tuple[int, Tensor]]] = {}
        self._doubts: dict[str, Doubt] = {}
        # Hugging Face's trainer has each micro-batch divided by the tokens of the whole batch.
        kwargs = next((part for part in given if isinstance(part, dict)), {})
        self._is_share = kwargs.get("num_items_in_batch") is not None
        self._handles: list[RemovableHandle] = []
        self._mode: AttentionMode | None = None
        paths = module_names(root)
        self._trail = Trail(paths, ledger)
        try:
            self._handles.extend(self._trail.hooks())
            if histograms and "activations" in wanted.kinds:
                for module in observable(paths):
                    if wanted.selected(path := paths[module]):
                        hook = Hook(functools.partial(self._activation, path))
                        self._handles.append(module.register_forward_hook(hook))
            if scalars and "attention" in wanted.kinds:
                with ledger.guard("attention"):
                    if not calls_on_stack(root):
                        ledger.warn_once(
                            "attention",
                            f"torch {torch.__version__} is unknown: it does not run modules as the "
                            "versions before, and which of them ran a map can't be told",
                        )
                    self._mode = AttentionMode(paths, self._map, wanted.rows, ledger)
            self._trail.before(root, given)
        except BaseException:
            self.close()
            raise

    def is_alive(self) -> bool:
        """Whether the thread that opened it still runs."""
        return any(thread.ident == self.thread for thread in threading.enumerate())

    def can_close(self) -> bool:
        """Whether it is not in the middle of looking at an operator."""
        return self._mode is None or self._mode.can_leave()

    def close(self) -> None:
        """Take everything off again."""
        mode, self._mode = self._mode, None
        if mode is not None:
            with self._ledger.guard("attention"):
                mode.leave()
        for handle in self._handles:
            handle.remove()

    def readings(self, root: nn.Module, output: Any) -> Readings:
        """What was measured, once the model has returned `output`."""
        readings, ledger = Readings(), self._ledger
        with ledger.guard("finite values"):
            readings.ran = self._trail.ran()
            readings.forwards = [self._trail.ended(root, output)]
        with ledger.guard("loss"):
            readings.losses = losses(output, self._is_share)
        for path, maps in self._maps.items():
            with ledger.guard(f"attention of {path}"):
                for index, sums in enumerate(_series(maps)):
                    name = f"{path}/{index}" if index else path
                    readings.attention[name] = sums
                    if path in self._doubts:
                        readings.doubts[name] = self._doubts[path]
        ledger.captured("attention", readings.attention)
        readings.histograms |= self._activations
        ledger.captured("activations", (drawn.name for drawn in self._activations))
        if "uncertainty" in self._wanted.kinds:
            readings.merge(uncertainty_of(output, self._histograms, ledger))
        return readings

    def _map(self, path: str, number: int, sums: Tensor, doubt: Doubt | None) -> None:
        if self._wanted.selected(path):
            self._maps.setdefault(path, []).append((number, sums))
            if doubt is not None:
                self._doubts[path] = doubt

    def _activation(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        try:
            tensor = next(tensors_in(output, depth=1, dataclass=False), None)
            drawn = Drawn("activations", path)
            if tensor is not None and drawn not in self._activations:
                with without_modes():
                    self._activations[drawn] = histogram(readable(tensor))
        except Exception as error:
            self._ledger.failed(f"activations of {path}", error)


def uncertainty_of(output: Any, histograms: bool, ledger: Ledger) -> Readings:
    """The uncertainty that a model returned in its output."""
    with ledger.guard("uncertainty"):
        kinds = find_uncertainties(output)
        readings = uncertainties(kinds, distributions=histograms)
        ledger.captured("uncertainty", kinds)
        return readings
    return Readings()


def _series(maps: list[tuple[int, Tensor]]) -> list[Tensor]:
    """The maps of one module in their order; of more than four, those of one number are averaged.

    They are numbered within each call. So many are of a loop, or of a compiled stack of layers.
    """
    if len(maps) <= 4:
        return [sums for _, sums in maps]
    series: dict[int, Tensor] = {}
    for number, sums in maps:
        series[number] = merge(series[number], sums) if number in series else sums
    return [series[number] for number in sorted(series)]
