"""Report: what was captured, and what was not and why. Nothing is left unsaid, or said twice."""

import contextlib
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple


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
    """Collects a `Report`, and warns once per site of what could not be measured."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict  # raise what fails instead of warning of it
        self.lock = threading.RLock()  # several threads may run one model, or flush
        self._captured: dict[str, dict[str, None]] = {}
        self._said: dict[str, str] = {}

    def captured(self, kind: str, names: Iterable[str]) -> None:
        self._captured.setdefault(kind, {}).update(dict.fromkeys(names))

    def names(self, kind: str) -> Collection[str]:
        return self._captured.get(kind, {})

    def warn_once(self, site: str, why: str) -> None:
        """Warn of `site`, the first time."""
        if site not in self._said:
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
        self.warn_once(site, f"not measured, {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def guard(self, site: str) -> Iterator[None]:
        """Keep what fails inside from the training step: it is said, once."""
        with self.lock:
            try:
                yield
            except Exception as error:
                self.failed(site, error)

    def report(self, unseen: dict[str, str]) -> Report:
        """The report, with the reasons why kinds have not been seen so far."""
        captured = {kind: tuple(names) for kind, names in self._captured.items() if names}
        return Report(captured, unseen | self._said)
