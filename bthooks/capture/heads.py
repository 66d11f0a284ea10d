"""Heads: which of a module's attention heads this rank has, where tensor parallelism splits them.

It shows in the parameters: of the projections' columns a rank has a part. FSDP splits parameters
too, over dimensions of the mesh that come first, but puts them together for the forward.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from ..measure.sharded import Part, is_sharded, part_of
from ..names import module_names


def heads_of(root: nn.Module, paths: Iterable[str]) -> dict[str, Part]:
    """By path of a module, or of its maps: the part of the heads that this rank has, if not all.

    It is to be asked outside of a forward, when FSDP has the parameters in parts.
    """
    wanted = {path: path.partition("/")[0] for path in paths}
    modules = {name: module for module, name in reversed(module_names(root).items())}
    found = {name: _part(modules, name) for name in set(wanted.values())}
    return {path: part for path, name in wanted.items() if (part := found[name]) is not None}


def _part(modules: dict[str, nn.Module], name: str) -> Part | None:
    """Of the heads of a module, by its own parameters or, if it has none, those around it."""
    around = [at for at in (*_outwards(name), "root") if at in modules]
    for number, at in enumerate(around):
        if parameters := [*modules[at].parameters()]:
            is_fsdp = any(_is_fsdp(modules[outer]) for outer in around[number:])
            parts = (_split(p, is_fsdp) for p in parameters if is_sharded(p))
            return next((part for part in parts if part is not None and part.parts > 1), None)
    return None


def _outwards(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _is_fsdp(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _split(parameter: nn.Parameter, is_fsdp: bool) -> Part | None:
    """The part of it but for what FSDP splits: along one dimension, or two if it keeps copies."""
    placements = parameter.placements  # type: ignore[attr-defined]  # of a DTensor
    first = 0
    if is_fsdp:
        first = 2 if len(placements) > 1 and placements[0].is_replicate() else 1
    return part_of(parameter, slice(first, None))
