"""Names: from module paths and parameter names to tags, and the one selector type."""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

Selector = str | Sequence[str] | Callable[[str], bool] | None
"""Which names: a glob, several globs, a function of the name; None selects all."""

_OTHER = re.compile(r"[^A-Za-z0-9_./-]")
_WRAPPER = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)"
)


@functools.lru_cache(1 << 16)  # a run has the same tags at each step
def tag(*parts: str) -> str:
    """Join the non-empty parts with "/"; what not every backend keeps becomes "_".

    >>> tag("", "attention", "entropy", "blocks.0.attn")
    'attention/entropy/blocks.0.attn'
    >>> tag("run 1", "loss")
    'run_1/loss'
    """
    return _OTHER.sub("_", "/".join(filter(None, (part.strip("/") for part in parts))))


def unwrapped(name: str) -> str:
    """A module path or parameter name without the parts that wrappers add; the root is "root".

    >>> unwrapped("_orig_mod.module.layers.0.weight"), unwrapped("")
    ('layers.0.weight', 'root')
    """
    return _WRAPPER.sub("", name).removesuffix(".") or "root"


def distinct(names: Iterable[str]) -> list[str]:
    """The names, a repeated one with "_2", "_3", ... behind it, so that no tag is shared.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a_2']
    """
    names = list(names)
    if len(set(names)) == len(names):  # nearly always
        return names
    seen: dict[str, None] = {}
    for name in names:
        new, number = name, 1
        while new in seen:
            number += 1
            new = f"{name}_{number}"
        seen[new] = None
    return list(seen)


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Every module with its unwrapped path, the first if shared; a wrapper's is its module's."""
    return {module: unwrapped(name) for name, module in model.named_modules()}


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter of `model` with its unwrapped name; a shared one with its first."""
    named = dict(model.named_parameters())
    return dict(zip(named.values(), distinct(map(unwrapped, named)), strict=True))


def selector(include: Selector) -> Callable[[str], bool]:
    """The predicate that `include` stands for.

    >>> selector("layers.*")("layers.0"), selector(None)("any")
    (True, True)
    """
    if callable(include):
        return include
    patterns = globs(include)
    return lambda name: include is None or any(fnmatchcase(name, glob) for glob in patterns)


def globs(include: Selector) -> tuple[str, ...]:
    """The globs that `include` has; a function has none."""
    if include is None or callable(include):
        return ()
    return (include,) if isinstance(include, str) else tuple(include)


def layer_of(name: str) -> str:
    """The module that a parameter is of."""
    return name.rpartition(".")[0] or "root"
