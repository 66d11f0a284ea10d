"""Gradients: what optimizers are given, what they make of it, and what was there before clipping.

A hook on a gradient sees one micro-batch, scaled and not yet reduced; and many an optimizer writes
over `p.grad` in its step (`SGD(nesterov=True)` with foreach, Muon) or frees it. So what it is given
is read when its update is about to begin: behind all other hooks before the step, and after each
return of a closure, of which the last counts. What was there before clipping is read at the end of
the backward pass, behind the reductions of DDP and FSDP2.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..job import size
from ..measure.gradients import norms
from ..measure.histograms import histogram
from ..measure.readings import NO_GRADIENT, NO_OPTIMIZER, NO_RATE, Drawn, Rates, Readings, rates_of
from ..measure.scaling import LossScale, scaling
from ..measure.sharded import Part, is_sharded, own_part, part_of
from ..names import parameter_names
from ..report import Ledger
from ..torch_private import (
    Hook,
    after_backward,
    find_scaler,
    hook_first,
    is_hooked_by_others,
    is_traced,
    pipeline_divisor,
    steps_on_stack,
)
from .flattened import FLAT, Flattened, slices_of
from .optimizers import Homeless, Known, held
from .updates import Turns, resting
from .wanted import Wanted

_FUNCTIONS = (FunctionType, MethodType, functools.partial)


class Gradients:
    """The gradients, rates, histograms and updates of a model, as its optimizers step.

    `begins` and `stepped` for each of them, also for one that steps within another's step;
    `measure`, then `ended`, for the outermost.
    """

    def __init__(self, wanted: Wanted, ledger: Ledger) -> None:
        self._wanted, self._ledger = wanted, ledger
        self._named: Mapping[Any, str] = {}  # the parameters, during a step
        self._slices: Mapping[Tensor, Part] = {}  # of parameters of which this rank has a slice
        # Of each parameter: the hook that tells of the end of the backward pass.
        self._watched: dict[int, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        self._backward: int | None = None  # the pass whose end is waited for
        self._before_clip: dict[str, Tensor] = {}  # norms at its end, until an optimizer steps
        # What follows is of the steps of optimizers that run.
        self._hooks: list[RemovableHandle] = []
        self._reads: list[Callable[[], None]] = []  # of what each is given
        self._passes = 0  # backward passes that have ended
        self._stepping: dict[str, Tensor] = {}  # the parameters that they hold
        self._losses: dict[str, LossScale] = {}  # by parameter
        self._former: dict[str, Tensor] = {}  # the parameters before, those that are looked at
        self._turns, self._homeless = Turns(wanted), Homeless()
        self._rates: dict[Optimizer, Rates] = {}
        self._given = Readings()

    @property
    def is_watching(self) -> bool:
        return bool(self._watched)

    def watch(self, root: nn.Module) -> None:
        """Measure the gradients at the end of each backward pass, until `unwatch`."""
        with self._ledger.guard("gradients before clipping"):
            if "gradients" not in self._wanted.kinds:
                return
            hook = Hook(functools.partial(self._accumulated, weakref.ref(root)))
            for p in self._selected(root).values():
                known = self._watched.get(id(p))
                # One that needs no gradient just now, an adapter that is off, keeps its hook.
                is_new = known is None or known[0]() is not p
                if is_new and p.requires_grad and p.is_leaf and not is_lazy(p):
                    self._watched[id(p)] = weakref.ref(p), hook_first(p, hook)

    def unwatch(self) -> None:
        """Take off what `watch` put on, and forget what it measured."""
        for _, handle in self._watched.values():
            handle.remove()
        self._watched, self._before_clip, self._backward = {}, {}, None

    def forget_names(self) -> None:
        """The model may have other parameters now."""
        self._named = {}

    def _accumulated(self, root: Callable[[], nn.Module | None], parameter: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            ended = functools.partial(self._backward_ended, root)
            self._backward = after_backward(ended, former=self._backward)
            # The next hook may step an optimizer, which leaves nothing for the end of the pass.
            if is_hooked_by_others(parameter) and (model := root()) is not None:
                named = self._named_of(model, [parameter])
                if not is_traced():
                    self._before_clip |= self._norms(_gradients_of(named))
        except Exception as error:  # a guard takes 1.5 us, at each parameter
            self._ledger.failed("gradients before clipping", error)

    def _backward_ended(self, root: Callable[[], nn.Module | None]) -> None:
        self._backward = None
        model = root()
        if model is not None and self._watched:
            with self._ledger.guard("gradients before clipping"):
                if not is_traced():
                    self._before_clip = self._norms(_gradients_of(self._selected(model)))
                    if (divisor := pipeline_divisor()) > 1:
                        before = self._before_clip
                        self._before_clip = {name: n / divisor for name, n in before.items()}
        self._passes += 1
        if self._reads and steps_on_stack():  # within a step, which has no closure that we know
            for read in self._reads:
                read()

    def begins(
        self,
        root: nn.Module,
        optimizer: Optimizer,
        *,
        scalars: bool,
        histograms: bool,
        suspects: Collection[str],
    ) -> None:
        """A step of `optimizer` begins: see to it that what it is given is read.

        And what it makes of it, of the layers that are `suspects`.
        """
        with self._ledger.guard("gradients"), torch.no_grad():
            named = self._named_of(root, held(optimizer))
            self._stepping |= named
            if scalars:
                for name in self._turns.looked_at(named, optimizer, suspects) - self._former.keys():
                    with self._ledger.guard(f"update of {name}"):
                        self._former[name] = named[name].detach().clone()
            read = functools.partial(self._read, named, optimizer, scalars, histograms)
            self._reads.append(read)
            hook = functools.partial(self._before_update, read)
            self._hooks.append(optimizer.register_step_pre_hook(hook))

    def _before_update(
        self, read: Callable[[], None], optimizer: Optimizer, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The last hook before a step, which may give it other arguments."""
        read()
        with self._ledger.guard("closure of the optimizer"):
            return self._with_closures(read, optimizer, args, kwargs)
        return None

    def _with_closures(
        self,
        read: Callable[[], None],
        optimizer: Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of a step with closures after whose return `read` is called; None without.

        One is known by its name. Any other function is one if a backward pass ends in it; a module,
        which is callable too, stays what it is.
        """

        def wrapped(name: str, given: Any) -> Any:
            is_named = "closure" in name and callable(given)
            if not is_named and not isinstance(given, _FUNCTIONS):
                return given

            @functools.wraps(given, updated=())
            def reading(*its_args: Any, **its_kwargs: Any) -> Any:
                passes = self._passes
                returned = given(*its_args, **its_kwargs)
                if is_named or self._passes != passes:
                    read()
                return returned

            return reading

        names = [*inspect.signature(type(optimizer).step).parameters]
        names += [""] * (len(args) - len(names))
        new = tuple(wrapped(name, given) for name, given in zip(names, args, strict=False))
        named = {name: wrapped(name, given) for name, given in kwargs.items()}
        is_same = all(a is b for a, b in zip(new, args, strict=True)) and named == kwargs
        return None if is_same else (new, named)

    def _read(
        self,
        named: Mapping[str, Tensor],
        optimizer: Optimizer | None,
        scalars: bool,
        histograms: bool,
    ) -> None:
        """Read what `optimizer` is given now, in place of what was read before."""
        given, kinds, loss = self._given, self._wanted.kinds, LossScale(None, None)
        gradients = _gradients_of(named)
        with self._ledger.guard("loss scale"):
            loss = LossScale.of(optimizer)
        self._losses |= dict.fromkeys(named, loss)
        for name in named:
            given.norms.pop(name, None)
            given.gaps.pop(name, None)
            given.histograms.pop(Drawn("gradients", name), None)
        with self._ledger.guard("learning rate"):
            if scalars and optimizer is not None:
                self._rates[optimizer] = rates_of(optimizer)
        with self._ledger.guard("gradients"):
            if scalars and "gradients" in kinds:
                given.norms |= loss.unscaled(self._norms(gradients))
                lacking = [n for n, p in named.items() if p.requires_grad and n not in gradients]
                given.gaps |= dict.fromkeys(lacking, NO_GRADIENT)
                given.sizes |= self._norms({n: named[n].detach() for n in lacking}, "size")
                if optimizer is not None:
                    given.gaps |= dict.fromkeys(resting(named, optimizer), NO_RATE)
                before = {n: self._before_clip.pop(n) for n in named if n in self._before_clip}
                # Those under a scaler of torch's are unscaled by its state.
                is_own = loss.scale is not None and find_scaler() is None
                given.norms_before_clip |= loss.unscaled(before) if is_own else loss.applied(before)
        for name, p in named.items():
            with self._ledger.guard(f"part of {name}"):
                could_be = not scalars or name in given.norms or name not in gradients
                if could_be and (part := self._part(p)) is not None:
                    given.parts[name] = part
        for name, gradient in gradients.items() if histograms and "histograms" in kinds else ():
            with self._ledger.guard(f"histogram of the gradient of {name}"):
                found = loss.histogram(own_part(gradient), name in given.parts)
                given.histograms[Drawn("gradients", name)] = found

    def stepped(self, optimizer: Optimizer) -> None:
        """The step of `optimizer`, which stepped no other, has ended: it may have set its rate."""
        if optimizer in self._rates:
            with self._ledger.guard("learning rate"):
                effective = self._rates[optimizer].effective
                self._rates[optimizer] = rates_of(optimizer)._replace(effective=effective)

    def ended(self) -> None:
        """No step of an optimizer runs any more, or the one that did has raised."""
        if not (self._hooks or self._stepping):
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._reads = [], []
        self._stepping, self._losses, self._former = {}, {}, {}
        self._rates, self._given = {}, Readings()

    def measure(
        self,
        root: nn.Module,
        stepped: Collection[Known],
        *,
        readings: Readings,
        steps: int,
        scalars: bool,
        histograms: bool,
        others: Collection[Tensor] | None,
    ) -> None:
        """Put into `readings` what the optimizers that have `stepped` were given, and made of it.

        None has where a step was told by hand. `others`: what other optimizers hold, if these are
        the first of a step: they bring the histograms of the parameters that none holds.
        """
        if not stepped:
            self._stepping = self._selected(root)
            self._read(self._stepping, None, scalars, histograms)
        if scalars and stepped:
            if "learning_rate" in self._wanted.kinds:
                self._measure_rates(stepped)
            with self._ledger.guard("loss scale"):
                if (scaler := find_scaler()) is not None:
                    self._given.scaling = scaling(scaler, steps)
        if scalars:
            self._measure_norms()
        if scalars and stepped and others is not None:
            self._find_homeless(root, others)
        if histograms and "histograms" in self._wanted.kinds:
            named = dict(self._stepping)
            if others is not None:
                named |= {n: p for n, p in self._selected(root).items() if p not in others}
            self._measure_histograms(named)
        readings.merge(self._given)

    def _measure_rates(self, stepped: Collection[Known]) -> None:
        for known in stepped:
            with self._ledger.guard("learning rate"):
                optimizer = known.optimizer()
                if optimizer in self._rates:
                    rates = self._rates[optimizer].of_several(known.number)
                    self._given.take_rates(rates)
                    names = (f"learning_rate/{group}" for group in rates.nominal)
                    self._ledger.captured("learning_rate", names)

    def _find_homeless(self, root: nn.Module, others: Collection[Tensor]) -> None:
        """Find the parameters that have gradients, and that no optimizer holds."""
        unheld = self._before_clip.keys() - self._stepping.keys()
        if not unheld:
            return
        names = self._selected(root)
        left = {
            n: p for n, p in names.items() if n in unheld and p.requires_grad and p not in others
        }
        with self._ledger.guard("parameters without an optimizer"):
            homeless = {name: p.detach() for name, p in self._homeless.among(left).items()}
            self._given.gaps |= dict.fromkeys(homeless, NO_OPTIMIZER)
            self._given.sizes |= self._norms(homeless, "size")

    def _measure_histograms(self, named: Mapping[str, Tensor]) -> None:
        given = self._given
        for name, p in named.items():
            self._ledger.captured("histograms", [name])
            with self._ledger.guard(f"histogram of {name}"):
                if (part := self._part(p)) is not None:
                    given.parts[name] = part
                drawn = histogram(own_part(p), part is not None)
                given.histograms[Drawn("parameters", name)] = drawn
                if name not in self._stepping and p.grad is not None:
                    drawn = histogram(own_part(p.grad), part is not None)
                    given.histograms[Drawn("gradients", name)] = drawn

    def _part(self, parameter: Tensor) -> Part | None:
        """Which part of a parameter this rank has, if it is not whole."""
        if is_sharded(parameter):
            return part_of(parameter)
        return self._slices.get(parameter)

    def _measure_norms(self) -> None:
        named, given, kinds = self._stepping, self._given, self._wanted.kinds
        self._ledger.captured("gradients", given.norms)
        if self._slices and not given.norms_before_clip:
            self._ledger.warn_once("gradients/total_norm_before_clip", FLAT)
        former = self._former
        if size() > 1:  # by which it is known whether two ranks have the same
            others = {n: p.detach() for n, p in named.items() if n not in former}
            given.sizes |= self._norms(others, "size")
        if former:
            with self._ledger.guard("update ratios"):
                change = {name: named[name].detach() - p for name, p in former.items()}
                for name, norm in self._norms(change, "update").items():
                    given.changes |= self._losses[name].applied({name: norm})
                given.sizes |= self._norms(former, "update")
        if "updates" in kinds:
            given.are_updates_asked = True
            self._ledger.captured("updates", given.changes)

    def _norms(self, tensors: Mapping[str, Tensor], what: str = "gradient") -> dict[str, Tensor]:
        try:
            return norms(tensors) if tensors else {}
        except Exception:  # of one: which?
            found: dict[str, Tensor] = {}
            for name, values in tensors.items():
                with self._ledger.guard(f"{what} of {name}"):
                    found |= norms({name: values})
            return found

    def _names(self, root: nn.Module) -> Mapping[nn.Parameter, str]:
        """All parameters as they are now, if it is known which part of each this rank has."""
        try:
            self._slices = slices_of(root)
        except Flattened as error:
            self._ledger.warn_once("gradients", str(error))
            return {}
        return parameter_names(root)

    def _selected(self, root: nn.Module) -> dict[str, Tensor]:
        return {name: p for p, name in self._names(root).items() if self._wanted.selected(name)}

    def _named_of(self, root: nn.Module, parameters: list[Tensor]) -> dict[str, Tensor]:
        """Of `parameters` those that are selected. Names are kept while many optimizers step."""
        if any(p not in self._named for p in parameters):  # FSDP2 has others there for a while
            self._named = self._names(root)
        names = {p: self._named.get(p) for p in parameters}
        return {n: p for p, n in names.items() if n is not None and self._wanted.selected(n)}


def _gradients_of(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in named.items() if p.grad is not None}
