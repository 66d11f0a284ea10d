"""Report: what was captured, and what was not and why. Nothing is left unsaid, or said twice."""

import contextlib
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .measure.uncertainty import KEYS
from .names import selector

_COMPILED = (
    "compiled, where an explicit softmax or flex_attention is fused with its neighbours and can't "
    "be seen; F.scaled_dot_product_attention can"
)


class Report(NamedTuple):
    """What was captured, by kind; what was selected and not seen, with the reason."""

    captured: dict[str, tuple[str, ...]]
    missed: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{kind} ({len(names)}): {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
            for kind, names in self.captured.items()
        ]
        lines += [f"not seen: {what}: {why}" for what, why in self.missed.items()]
        return "\n".join(lines)


class Ledger:
    """Collects a `Report`, and warns once per site of what could not be measured.

    Args:
        strict: raise what fails instead of warning of it.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._lock = threading.RLock()
        self._captured: dict[str, dict[str, None]] = {}
        self._said: dict[str, str] = {}

    def captured(self, kind: str, names: Iterable[str]) -> None:
        self._captured.setdefault(kind, {}).update(dict.fromkeys(names))

    def names(self, kind: str) -> Collection[str]:
        return self._captured.get(kind, {})

    def say(self, site: str, why: str) -> None:
        """Warn of `site`, the first time."""
        if site in self._said:
            return
        self._said[site] = why
        self.warn(f"{site}: {why}")

    def warn(self, text: str) -> None:
        # Where the user turns warnings into errors, the report is all that is left to us:
        # nothing of ours raises inside a training step.
        with contextlib.suppress(Warning):
            warnings.warn(f"bthooks: {text}", RuntimeWarning, stacklevel=3)

    def note(self, site: str, why: str) -> None:
        """Put into the report what is known of `site` now, without a warning."""
        self._said[site] = why

    def failed(self, site: str, error: Exception) -> None:
        """`site` could not be measured because of `error`."""
        if self._strict:
            raise error
        self.say(site, f"not measured, {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def guard(self, site: str) -> Iterator[None]:
        """Keep what fails inside from the training step: it is said, once."""
        with self._lock:  # several threads may run one model
            try:
                yield
            except Exception as error:
                self.failed(site, error)

    def report(self, unseen: Mapping[str, str]) -> Report:
        """The report, with the reasons why kinds have not been seen so far."""
        captured = {kind: tuple(names) for kind, names in self._captured.items() if names}
        return Report(captured, dict(unseen) | self._said)


def reasons(*, called: bool, stepped: bool, compiled: Sequence[str]) -> dict[str, str]:
    """Why a kind has not been seen, by kind.

    Args:
        called: whether the model's own forward ran where a hook sees it.
        stepped: whether an optimizer that holds a parameter of the model did.
        compiled: the paths of the modules that are compiled.
    """
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


def fused_away(compiled: Iterable[str], seen: Iterable[str]) -> dict[str, str]:
    """The compiled modules that no attention was seen in, while others' was."""
    places = [f"{path.partition('/')[0]}." for path in seen]
    return {
        f"attention of {path}": _COMPILED
        for path in compiled
        if path != "root" and not any(place.startswith(f"{path}.") for place in places)
    }


def unattended(globs: Iterable[str], paths: Iterable[str], seen: Iterable[str]) -> dict[str, str]:
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
