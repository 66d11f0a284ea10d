"""Unseen: why something that was asked for has not been measured. Nothing is left unsaid."""

from torch import nn

from .capture.wanted import Wanted
from .measure.uncertainty import KEYS
from .names import module_names, parameter_names, selector
from .report import Ledger
from .torch_private import is_compiled, is_compiled_in_place

_NOT_CALLED = (
    "the forward of the attached module did not run where a hook sees it: its .forward() was "
    "called directly, or only modules inside it were, or it was compiled after attach; attach to "
    "the module that the loop calls, and after torch.compile to what it returns"
)
_IN_PLACE = (
    "model.compile() on the attached module compiles its calls in place, with the hooks by which "
    "they are seen; instead let compiled = torch.compile(model), attach to that and call it in the "
    "loop: its parameters are the model's; or call block.compile() of the modules inside"
)
_COMPILED = (
    "compiled, where an explicit softmax or flex_attention is fused with its neighbours and can't "
    "be seen; F.scaled_dot_product_attention can"
)
_NO_MAP = (
    "no attention was recognised in the modules that it selects: none of them ran any, or a "
    "module around them did"
)

_OF_FORWARDS = ("attention", "activations", "uncertainty")

PATIENCE = 100  # training forwards without a step before it is said
NO_STEP = (
    "no torch.optim.Optimizer that holds a parameter of the model has stepped in "
    f"{PATIENCE} training forwards: nothing of training is written before one does; attach to the "
    "module that is trained, or call handle.advance() after each step"
)
UNSEEN_STEP = (
    "the parameters change, but no torch.optim.Optimizer that holds them was seen to step, as "
    "where its step is compiled: call handle.advance() after each step"
)
UNSEEN_TRAINING = (
    "the parameters changed, and no forward and no step of an optimizer was seen: of a training "
    "step that is compiled as a whole, or replayed as a CUDA graph, nothing is; compile the model "
    "alone, or call handle.advance() after each step"
)
CAPTURED = (
    "its step is captured in a CUDA graph, of which nothing is seen: call handle.advance() after "
    "each replay"
)


def unseen(
    root: nn.Module | None, wanted: Wanted, ledger: Ledger, calls: int, steps: int
) -> dict[str, str]:
    """Why each kind has not been seen, in `calls` forwards that a hook saw and `steps` steps."""
    paths = {} if root is None else module_names(root)
    compiled: list[str] = []
    with ledger.guard("compiled modules"):
        compiled = [path for module, path in paths.items() if is_compiled(module)]
    in_place = False
    with ledger.guard("compiled modules"):
        in_place = root is not None and is_compiled_in_place(root)
    forward = _IN_PLACE if in_place else "" if calls else _NOT_CALLED
    step = "" if steps else "no optimizer that holds a parameter of the model has stepped"
    attention = (
        "no attention was recognised in the observed forwards; one without grad in training mode "
        "belongs to no step and is not observed"
    )
    if compiled:
        attention += f"; {', '.join(compiled[:4])}{', ...' * (len(compiled) > 4)}: {_COMPILED}"
    keys = ", ".join(key for names in KEYS.values() for key in names)
    why = {
        "attention": forward or attention,
        "activations": forward or "no selected module returned a tensor",
        "uncertainty": forward or f"the output of the model has none of {keys}",
        "gradients": step or "no selected parameter has had a gradient",
        "learning_rate": step or "only advance() was called",
        "histograms": step or "no parameter is selected",
        "updates": step or "no parameter is selected",
    }
    missed = {kind: why[kind] for kind in wanted.kinds if not ledger.names(kind)}
    if in_place and "attention" in wanted.kinds:  # also where it was seen before that
        missed["attention"] = _IN_PLACE
    seen = {path.partition("/")[0] for path in ledger.names("attention")}
    if not seen:
        return missed
    for glob in wanted.globs:
        selects = selector(glob)
        if any(map(selects, paths.values())) and not any(map(selects, seen)):
            missed[f"attention of {glob}"] = _NO_MAP
    for path in compiled:
        if path != "root" and not any(f"{place}.".startswith(f"{path}.") for place in seen):
            missed[f"attention of {path}"] = _COMPILED
    return missed


def say_absent(
    root: nn.Module | None, wanted: Wanted, ledger: Ledger, calls: int, steps: int
) -> None:
    """Warn of what was asked for by name and not seen, and of a forward that never ran."""
    missed = unseen(root, wanted, ledger, calls, steps)
    of_forwards = [kind for kind in _OF_FORWARDS if missed.get(kind) in (_NOT_CALLED, _IN_PLACE)]
    if of_forwards and steps:  # also of a model that has no attention
        ledger.warn_once("forward", f"{missed[of_forwards[0]]}. Not seen: {', '.join(of_forwards)}")
    for kind, why in missed.items() if wanted.by_name else ():
        if kind not in of_forwards or not steps:
            ledger.warn_once(kind, why)
    if root is not None:
        with ledger.guard("include"):
            names = {*parameter_names(root).values(), *module_names(root).values()}
            if not any(map(wanted.selected, names)):
                ledger.warn_once("include", "it selects no module path and no parameter name")
