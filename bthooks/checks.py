"""Checks: every refusal of a bad argument, so that a mistake is told in the same words everywhere.

Each function returns what it was given, some in one type, or raises an error that says where, what,
what was got and how to mend it.
"""

import contextlib
import numbers
import operator
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, nn


def instance(said: str, value: Any, kind: Any) -> None:
    """`value` is of `kind`, which `said` names."""
    if not isinstance(value, kind):
        raise TypeError(f"{said}, got {type(value).__name__}")


def model(where: str, given: nn.Module) -> nn.Module:
    """A module."""
    instance(f"{where}: expected a torch.nn.Module", given, nn.Module)
    return given


def whole(where: str, name: str, value: Any, least: int = 0, wanted: str = "") -> int:
    """A whole number from `least`, also of numpy or in a tensor; True and False are none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not least <= number < 1 << 62:  # an event file holds 63 bits
        expected = wanted or f"a whole number from {least}"
        raise ValueError(f"{where}: {name}={value!r}: expected {expected}")
    return number


def cadence(where: str, name: str, value: Any) -> None:
    """A number of steps, or a function of the step."""
    wanted = "a number of steps, 1 or more, or a function of the step; to leave a kind out, name"
    if not callable(value):
        whole(where, name, value, 1, f"{wanted} the others in capture=")


def one_of(where: str, name: str, value: Any, known: Iterable[str]) -> None:
    """One of the strings that are known."""
    if value not in (known := tuple(known)):
        wanted = " or ".join(f'"{one}"' for one in known)
        raise ValueError(f"{where}: {name}={value!r}: expected {wanted}")


def kinds(where: str, given: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names of kinds that are known."""
    if isinstance(given, str) or not isinstance(given, Collection):
        raise TypeError(f"{where}: capture is a sequence of names, got {given!r}; known: {known}")
    for kind in given:
        if kind not in known:
            raise ValueError(f"{where}: capture has {kind!r}; known: {known}")
    return tuple(given)


def include(where: str, given: Any) -> None:
    """A selector of names, as `names.selector` takes it."""
    globs = [] if given is None or callable(given) else given
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(
            f"{where}: include= takes a glob such as 'layers.*', a sequence of globs or a function "
            f"of the name, got {given!r}"
        )


def thresholds(where: str, given: Any, kind: type) -> None:
    """Thresholds, which are above 0; some may be 0."""
    if not isinstance(given, kind):
        raise TypeError(f"{where}: thresholds is a bthooks.Thresholds(...), got {given!r}")
    for name, value in given._asdict().items():  # type: ignore[attr-defined]
        said = f"{where}: thresholds: {name}={value!r}: expected"
        if name == "checks":
            whole(f"{where}: thresholds", name, value, 1)
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{said} a number")
        elif name in ("vanishing", "updates", "collapsed", "entropy", "keys", "decay"):
            if not float(value) >= 0:
                raise ValueError(f"{said} 0 or more")
        elif not float(value) > 0:
            raise ValueError(f"{said} more than 0; math.inf switches the judgement off")


def target(where: str, writer: Any) -> Any:
    """A writer as it is, a path as an absolute one, a URL as a str, or None."""
    # The methods first: a mock has __fspath__ too.
    if writer is None or callable(getattr(writer, "add_scalar", None)):
        return writer
    said = f"{where}: writer is an object with SummaryWriter's methods, a path or None"
    instance(said, writer, str | os.PathLike)
    found = folder(where, writer)
    return found.absolute() if isinstance(found, Path) else found


# Of one letter it is a drive of Windows; before it fsspec takes others, as in "simplecache::s3://".
_URL = re.compile(r"(?:[A-Za-z][\w+.-]*::)*([A-Za-z][\w+.-]+):/(/?)")


def folder(where: str, given: str | os.PathLike[str]) -> Path | str:
    """A local path or `file://` as a Path; another URL as a str: a Path eats a slash of it."""
    text = os.fspath(given)
    found = _URL.match(text)
    if found is None:
        return Path(text)
    scheme, slash = found.groups()
    if not slash:
        raise ValueError(
            f"{where}: {text!r} is a URL of which pathlib has eaten a slash: give it as a str; a "
            f"local folder of that name is ./{text}"
        )
    if scheme != "file":
        return text if text.endswith("//") else text.rstrip("/")
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"{where}: {text!r} is on {parts.netloc!r}; file:///... is of this machine"
        )
    return Path(url2pathname(parts.path))


def experiment(where: str, log_dir: Path | str, given: Any) -> Path:
    """The path of a run, which is to lie below `log_dir`."""
    if not isinstance(given, str):
        raise TypeError(f"{where}: experiment is a str or None, got {given!r}")
    run = Path(os.path.normpath(given))
    if run.is_absolute() or run.parts[:1] in ((), ("..",)):
        raise ValueError(
            f"{where}: experiment={given!r} does not name a folder inside "
            f"log_dir={str(log_dir)!r}; give a plain name, and the place as log_dir"
        )
    return run


def number(where: str, name: str, value: Any) -> Tensor | float:
    """One real number, left on its device where it is a tensor."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"{where}: names are non-empty str, got {name!r}")
    if type(value) is float:  # nearly always
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{where}: {name!r} has shape {tuple(value.shape)}, expected one number; "
                "reduce it first, e.g. with .mean()"
            )
        if not value.is_complex():
            return value.detach().reshape(())
    elif isinstance(value, numbers.Real) or not isinstance(value, str | bytes | numbers.Complex):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return float(value)
    raise TypeError(f"{where}: {name!r} is one real number, got {value!r}")


def values(where: str, name: str, given: Any) -> Tensor:
    """A tensor of numbers, detached."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        return torch.as_tensor(given).detach()
    raise TypeError(f"{where}: {name!r} is a tensor of numbers, got {type(given).__name__}")


def reals(where: str, name: str, given: Any, shape: torch.Size | None = None) -> Tensor:
    """A tensor of real numbers, not empty, and of `shape` if it is given."""
    tensor = values(where, name, given)
    shape = tensor.shape if shape is None else shape
    if tensor.shape != shape or tensor.numel() == 0 or tensor.is_complex():
        raise ValueError(
            f"{where}: {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected "
            f"real numbers of shape {tuple(shape)}, not empty"
        )
    return tensor


def attention(where: str, given: Any) -> Tensor:
    """Attention weights of the shape `(batch, heads, query, key)`; no value is read."""
    weights = values(where, "attention_weights", given)
    if weights.dim() != 4 or weights.numel() == 0:
        raise ValueError(
            f"{where}: attention_weights have shape (batch, heads, query, key), got "
            f"{tuple(weights.shape)}; for weights averaged over heads use weights.unsqueeze(1)"
        )
    return weights


def weights(where: str, given: Any) -> Tensor:
    """The same, and each row is a distribution, or sees no key."""
    weights = attention(where, given)
    sums = weights.to(torch.float32).sum(-1)
    sums = sums[(sums != 0) & ~sums.isnan()]
    tolerance = 1e-3 if weights.dtype in (torch.float32, torch.float64) else 3e-2
    least = weights.nan_to_num(0).amin().item()
    if least < 0:
        raise ValueError(
            f"{where}: attention_weights go down to {least:.3g}, expected probabilities; "
            "pass the weights after the softmax, not the scores"
        )
    if ((sums - 1).abs() > tolerance).any().item():
        raise ValueError(
            f"{where}: rows of attention_weights sum to {sums.min():.4g}..{sums.max():.4g}, "
            "expected 1 over the last dimension; pass the weights before dropout"
        )
    return weights


def classes(where: str, p: Any, true: Any) -> None:
    """Probabilities of classes and the true ones, by their types and shapes; no value is read."""
    for name, given in (("probabilities", p), ("targets", true)):
        instance(f"{where}: {name} are a tensor", given, Tensor)
    if p.dim() < 2 or p.shape[-1] < 2 or p.shape[:-1] != true.shape or not p.numel():
        raise ValueError(
            f"{where}: probabilities have shape (batch, classes) and targets (batch), got "
            f"{tuple(p.shape)} and {tuple(true.shape)}; of two classes: torch.stack([1 - p, p], -1)"
        )
    if not p.is_floating_point() or true.is_floating_point() or true.is_complex():
        raise TypeError(
            f"{where}: probabilities are floats and targets class indices, got {p.dtype} and "
            f"{true.dtype}"
        )


def probabilities(where: str, p: Tensor, true: Tensor) -> None:
    """The same, and by their values, some of which may be NaN."""
    classes(where, p, true)
    least, largest = (value.item() for value in true.long().aminmax())
    if least < 0 or largest >= p.shape[-1]:
        raise ValueError(
            f"{where}: targets go from {least} to {largest}, expected class indices 0 to "
            f"{p.shape[-1] - 1}; leave out what has none"
        )
    sums = p.float().sum(-1)
    sums = sums[~sums.isnan()]
    # Of bfloat16, widened after its softmax, they are off by up to 3e-3.
    tolerance = 1e-2 if p.dtype in (torch.float32, torch.float64) else 3e-2
    least = p.nan_to_num(0).amin().item()
    if least < 0 or ((sums - 1).abs() > tolerance).any().item():
        found = f"{sums.min():.4g}..{sums.max():.4g}" if len(sums) else "NaN"
        raise ValueError(
            f"{where}: probabilities are at least 0 and sum to 1 over the last dimension, got "
            f"{least:.4g} and {found}; pass them after the softmax, not the logits"
        )


def samples(where: str, given: Mapping[str, Any]) -> None:
    """What several samples of a model predict: either probabilities, or mean and variance."""
    given = {name: value for name, value in given.items() if value is not None}
    for value in given.values():
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{where}: expected real tensors, got {type(value).__name__}")
    shapes = [tuple(value.shape) for value in given.values()]
    if [*given] not in (["probabilities"], ["mean"], ["mean", "variance"]):
        raise ValueError(
            f"{where}: expected probabilities, or mean= (and variance=), got {[*given] or 'none'}"
        )
    least = 2 if "probabilities" in given else 1
    if len(shapes[0]) < least or 0 in shapes[0] or shapes[0] != shapes[-1]:
        raise ValueError(
            f"{where}: probabilities have shape (samples, batch, classes), mean and variance "
            f"(samples, batch, ...) both, got {shapes}; one sample alone is probabilities[None]"
        )


def hparam(value: Any) -> str | float | bool:
    """A number, a bool or a string, which both backends write alike; anything else as its `str`."""
    if getattr(value, "ndim", 0) == 0 or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item() if hasattr(value, "item") else value  # of numpy, or in a tensor
    if isinstance(value, bool | str):
        return value
    is_number = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return float(value) if is_number else str(value)
