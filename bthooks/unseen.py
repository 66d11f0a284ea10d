"""Unseen: why something that was asked for has not been measured. Nothing is left unsaid."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .capture.wanted import Wanted
from .measure.uncertainty import KEYS
from .names import module_names, parameter_names, selector
from .report import Ledger
from .torch_private import is_compiled

_COMPILED = (
    "compiled, where an explicit softmax or flex_attention is fused with its neighbours and can't "
    "be seen; F.scaled_dot_product_attention can"
)


def unseen(
    root: nn.Module | None, wanted: Wanted, ledger: Ledger, calls: int, steps: int
) -> dict[str, str]:
    """Why each kind has not been seen so far.

    Args:
        ledger: knows what has been.
        calls: forwards of the model that a hook saw.
        steps: how many have begun.
    """
    paths = {} if root is None else module_names(root)
    compiled: list[str] = []
    with ledger.guard("compiled modules"):
        compiled = [path for module, path in paths.items() if is_compiled(module)]
    why = _reasons(called=calls > 0, stepped=steps > 0, compiled=compiled)
    missed = {kind: why[kind] for kind in wanted.kinds if not ledger.names(kind)}
    if seen := ledger.names("attention"):
        missed |= _unattended(wanted.globs, paths.values(), seen)
        missed |= _fused_away(compiled, seen)
    return missed


def say_absent(
    root: nn.Module | None, wanted: Wanted, ledger: Ledger, calls: int, steps: int
) -> None:
    """Warn of what was asked for by name and not seen, and of a forward that never ran."""
    missed = unseen(root, wanted, ledger, calls, steps)
    for kind, why in missed.items() if wanted.by_name else ():
        ledger.warn_once(kind, why)
    if root is not None:
        with ledger.guard("include"):
            names = {*parameter_names(root).values(), *module_names(root).values()}
            if not any(map(wanted.selected, names)):
                ledger.warn_once("include", "it selects no module path and no parameter name")
    if steps and not calls and "attention" in missed and not wanted.by_name:
        ledger.warn_once("attention", missed["attention"])


def _reasons(*, called: bool, stepped: bool, compiled: Sequence[str]) -> Mapping[str, str]:
    forward = (
        ""
        if called
        else (
            "the forward of the attached module did not run where a hook sees it: its .forward() "
            "was called directly, or only modules inside it were, or it was compiled after attach; "
            "attach to the module that the loop calls, and after torch.compile to what it returns"
        )
    )
    attention = "no attention was recognised in the observed forwards"
    if compiled:
        attention += f"; {', '.join(compiled[:4])}{', ...' * (len(compiled) > 4)}: {_COMPILED}"
    step = "" if stepped else "no optimizer that holds a parameter of the model has stepped"
    keys = ", ".join(key for names in KEYS.values() for key in names)
    return {
        "attention": forward or attention,
        "activations": forward or "no selected module returned a tensor",
        "uncertainty": forward or f"the output of the model has none of {keys}",
        "gradients": step or "no selected parameter has had a gradient",
        "learning_rate": step or "only advance() was called",
        "histograms": step or "no parameter is selected",
        "updates": step or "no parameter is selected",
    }


def _fused_away(compiled: Iterable[str], seen: Iterable[str]) -> dict[str, str]:
    """The compiled modules that no attention was seen in, while others' was."""
    places = [f"{path.partition('/')[0]}." for path in seen]
    return {
        f"attention of {path}": _COMPILED
        for path in compiled
        if path != "root" and not any(place.startswith(f"{path}.") for place in places)
    }


def _unattended(globs: Iterable[str], paths: Iterable[str], seen: Iterable[str]) -> dict[str, str]:
    """The globs that select some of the module `paths`, and none of whose attention was `seen`."""
    paths, seen = list(paths), [path.partition("/")[0] for path in seen]
    return {
        f"attention of {glob}": (
            "no attention was recognised in the modules that it selects: none of them ran any, or "
            "a module around them did"
        )
        for glob in globs
        if any(map(selector(glob), paths)) and not any(map(selector(glob), seen))
    }
