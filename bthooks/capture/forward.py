"""Window: one observed forward of the model, with everything that is put on for it.

In: the model, and which kinds are wanted. Out: attention sums and activations by module path, and
the trail of what is not finite.
"""

import functools
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..measure.attention import merge
from ..measure.histograms import Histogram, histogram
from ..measure.sharded import readable
from ..names import module_names
from ..report import Ledger
from ..torch_private import Hook, without_modes
from .attention import AttentionMode, Doubt
from .nonfinite import Trail, observable


class Window:
    """One observed forward of `root`: open before it, `close()` after it.

    Args:
        selected: which module paths are wanted.
        kinds: of these, "attention" and "activations" are captured here.
        rows: the query rows per map that statistics are taken from; None takes all.
        ledger: told what could not be measured, and why.
    """

    def __init__(
        self,
        root: nn.Module,
        selected: Callable[[str], bool],
        kinds: Collection[str],
        rows: int | None,
        ledger: Ledger,
    ) -> None:
        self.thread = threading.get_ident()
        self.activations: dict[str, Histogram] = {}
        self._selected, self._ledger = selected, ledger
        self._maps: dict[str, list[Tensor]] = {}
        self._doubts: dict[str, Doubt] = {}
        self._averaged: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._mode: AttentionMode | None = None
        paths = module_names(root)
        self.trail = Trail(paths, ledger)
        try:
            self._open(paths, kinds, rows)
        except BaseException:
            self.close()
            raise

    def _open(
        self, paths: Mapping[nn.Module, str], kinds: Collection[str], rows: int | None
    ) -> None:
        self.trail.open()
        wanted = observable(paths) if "activations" in kinds else ()
        for module, path in [(m, paths[m]) for m in wanted if self._selected(paths[m])]:
            hook = Hook(self, functools.partial(self._activation, path))
            self._handles.append(module.register_forward_hook(hook))
        if "attention" in kinds:
            self._mode = AttentionMode(paths, self._map, rows, self._ledger)
            self._mode.enter()

    def is_alive(self) -> bool:
        """Whether the thread that opened it still runs."""
        return any(thread.ident == self.thread for thread in threading.enumerate())

    def close(self) -> None:
        """Take everything off again."""
        if self._mode is not None:
            self._mode.leave()
            self._mode = None
        self.trail.close()
        for handle in self._handles:
            handle.remove()

    def maps(self) -> dict[str, Tensor]:
        """The sums of each map by path; a module's further maps as `<path>/1`, `<path>/2`, ..."""
        return {
            f"{path}/{index}" if index else path: sums
            for path, maps in self._maps.items()
            for index, sums in enumerate(maps)
        }

    def doubts(self) -> dict[str, Doubt]:
        """By the path of a map that may turn out to be no attention, what is to be said then."""
        paths = {name: name.partition("/")[0] for name in self.maps()}
        return {n: self._doubts[path] for n, path in paths.items() if path in self._doubts}

    def _map(self, path: str, sums: Tensor, doubt: Doubt | None) -> None:
        if not self._selected(path):
            return
        if doubt is not None:
            self._doubts[path] = doubt
        maps = self._maps.setdefault(path, [])
        maps.append(sums)
        if len(maps) > 4 or path in self._averaged:
            self._averaged.add(path)
            maps[:] = [functools.reduce(merge, maps)]

    def _activation(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        try:
            tensor = _first_tensor(output)
            if tensor is not None and path not in self.activations:
                with without_modes():
                    self.activations[path] = histogram(readable(tensor))
        except Exception as error:
            self._ledger.failed(f"activations of {path}", error)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        output = next((item for item in output if isinstance(item, Tensor)), None)
    return output if isinstance(output, Tensor) else None
