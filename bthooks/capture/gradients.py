"""Gradients: what is measured at the end of a backward pass, and around an optimizer's step.

A hook on a gradient sees one micro-batch, scaled and not yet reduced. What an optimizer is given
is there at its step only; what it was before clipping, at the end of the backward pass, behind the
reductions of DDP and FSDP2.
"""

import functools
import weakref
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..measure.gradients import norms
from ..measure.readings import Readings, learning_rates, parameter_histograms
from ..measure.scaling import scaling
from ..measure.sharded import is_sharded, whole_norms
from ..names import parameter_names
from ..report import Ledger
from ..torch_private import Hook, after_backward, find_scaler
from .optimizers import held
from .wanted import Wanted


class Gradients:
    """The gradients, rates, histograms and updates of a model, as its optimizers step."""

    def __init__(self, wanted: Wanted, ledger: Ledger) -> None:
        self._wanted, self._ledger = wanted, ledger
        self._watched: list[RemovableHandle] = []
        self._ids: list[int] = []  # of the parameters that are watched
        self._backward: int | None = None  # the pass whose end is waited for
        self._before_clip: dict[str, Tensor] = {}  # norms at the end of the last backward pass
        self._former: dict[str, Tensor] = {}  # the parameters before an update

    def watch(self, root: nn.Module) -> None:
        """Measure the gradients at the end of each backward pass, until `unwatch`."""
        with self._ledger.guard("gradients before clipping"):
            if "gradients" not in self._wanted.kinds or self._is_flattened(root):
                return
            parameters = [
                p for p in parameter_names(root) if p.requires_grad and p.is_leaf and not is_lazy(p)
            ]
            if self._ids == (ids := [id(p) for p in parameters]):
                return
            self.unwatch()
            self._ids = ids
            hook = Hook(functools.partial(self._accumulated, weakref.ref(root)))
            self._watched = [p.register_post_accumulate_grad_hook(hook) for p in parameters]

    def unwatch(self) -> None:
        """Take off what `watch` put on, and forget what it measured."""
        for handle in self._watched:
            handle.remove()
        self._watched, self._ids, self._before_clip, self._backward = [], [], {}, None

    def _accumulated(self, root: Callable[[], nn.Module | None], parameter: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            ended = functools.partial(self._backward_ended, root)
            self._backward = after_backward(ended, former=self._backward)
        except Exception as error:  # a guard takes 1.5 us, at each parameter
            self._ledger.failed("gradients before clipping", error)

    def _backward_ended(self, root: Callable[[], nn.Module | None]) -> None:
        self._backward = None
        model = root()
        if model is not None and self._watched:
            with self._ledger.guard("gradients before clipping"):
                self._before_clip = self._norms(self._names(model, None))

    def remember(self, root: nn.Module, optimizer: Optimizer) -> None:
        """Keep the parameters as they are before the step of `optimizer`."""
        with self._ledger.guard("update ratios"):
            names = self._names(root, optimizer)
            self._former = {name: p.detach().clone() for p, name in names.items()}

    def measure(
        self,
        root: nn.Module,
        optimizer: Optimizer | None,
        *,
        readings: Readings,
        index: int,
        steps: int,
        scalars: bool,
        histograms: bool,
        others: Collection[Tensor] | None,
    ) -> None:
        """Read into `readings` what the step of `optimizer`, the `index`-th of several, applied.

        `others`: what other optimizers hold, if it is the first one of its step: it brings the
        histograms of the parameters that none holds.
        """
        if scalars and optimizer is not None:
            if "learning_rate" in self._wanted.kinds:
                with self._ledger.guard("learning rate"):
                    rates = learning_rates(optimizer, index)
                    readings.learning_rates |= rates
                    readings.base_rates |= learning_rates(optimizer, index, "initial_lr")
                    self._ledger.captured("learning_rate", (f"learning_rate/{g}" for g in rates))
            with self._ledger.guard("loss scale"):
                if (scaler := find_scaler()) is not None:
                    readings.scaling = scaling(scaler, optimizer, steps)
        if self._is_flattened(root):
            return
        names = self._names(root, optimizer)
        if scalars:
            self._measure_norms(names, readings)
        if histograms and "histograms" in self._wanted.kinds:
            with self._ledger.guard("histograms"):
                if others is not None:
                    every = self._names(root, None).items()
                    names = {p: name for p, name in every if p not in others}
                self._measure_histograms(names, readings)

    def _measure_histograms(self, names: Mapping[nn.Parameter, str], readings: Readings) -> None:
        for parameter, name in names.items():
            if is_sharded(parameter):
                why = "parameters are sharded over ranks: one rank holds a part"
                self._ledger.warn_once("histograms", why)
                continue
            self._ledger.captured("histograms", [name])
            with self._ledger.guard(f"histogram of {name}"):
                readings.histograms |= parameter_histograms({parameter: name})

    def _measure_norms(self, names: Mapping[nn.Parameter, str], readings: Readings) -> None:
        named = {name: p for p, name in names.items()}
        former, self._former = self._former, {}
        parts: list[Mapping[str, Tensor]] = []
        kinds = self._wanted.kinds
        # Whatever failed on this rank, and whatever it has: the others wait for it.
        if "gradients" in kinds:
            before_clip = {n: norm for n, norm in self._before_clip.items() if n in named}
            parts += self._norms(names), before_clip
        if "updates" in kinds:
            changes: list[Mapping[str, Tensor]] = [{}, {}]
            with self._ledger.guard("update ratios"):
                after = {name: p.detach() for name, p in named.items() if name in former}
                change = norms({name: p - former[name] for name, p in after.items()})
                changes = [change, norms({name: former[name] for name in after})]
            parts += changes
        with self._ledger.guard("norms"):
            wholes = whole_norms(named, parts)
            if "gradients" in kinds:
                readings.norms |= wholes[0]
                readings.norms_before_clip |= wholes[1]
                self._ledger.captured("gradients", parts[0])
            if "updates" in kinds:
                change, size = wholes[-2:]
                readings.update_ratios |= {name: change[name] / size[name] for name in size}
                self._ledger.captured("updates", size)

    def _is_flattened(self, root: nn.Module) -> bool:
        """Whether a rank holds slices that cross the bounds of parameters: said once."""
        for module in root.modules():
            package, name = type(module).__module__, type(module).__name__
            is_fsdp1 = name == "FullyShardedDataParallel" and package.startswith("torch.")
            if is_fsdp1 or package.partition(".")[0] == "deepspeed":
                self._ledger.warn_once(
                    "gradients",
                    f"not measured under {name}: a rank holds slices of flattened parameters, of "
                    "which every norm would be partial; torch's fully_shard (FSDP2) is measured",
                )
                return True
        return False

    def _norms(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        gradients = {name: p.grad for p, name in names.items() if p.grad is not None}
        try:
            return norms(gradients)
        except Exception:  # of one: which?
            found: dict[str, Tensor] = {}
            for name, gradient in gradients.items():
                with self._ledger.guard(f"gradient of {name}"):
                    found |= norms({name: gradient})
            return found

    def _names(self, root: nn.Module, optimizer: Optimizer | None) -> dict[nn.Parameter, str]:
        """The selected parameters that `optimizer` holds; all selected ones for None."""
        names, selected = parameter_names(root), self._wanted.selected
        own = None if optimizer is None else held(optimizer)
        return {p: n for p, n in names.items() if (own is None or p in own) and selected(n)}
