"""Writers: a SummaryWriter of either backend, opened so that its event file lies where it was said.

Both choose names in ways that lose data: tensorboardX's second writer of one second truncates the
file of the first, and folders named after the second are shared.
"""

import importlib
import inspect
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from .. import checks
from .backend import PACKAGES, is_main_rank


class Writer(Protocol):
    """What is asked of a writer: SummaryWriter's own methods, nothing more."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_histogram_raw(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_image(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_text(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_hparams(self, *args: Any, **kwargs: Any) -> Any: ...
    def flush(self) -> Any: ...
    def close(self) -> Any: ...


def make_writer(
    log_dir: str | os.PathLike[str] = "runs",
    experiment: str | None = None,
    *,
    backend: str = "torch",
    purge_step: int | None = None,
    **backend_options: Any,
) -> Any:
    """Open a SummaryWriter of either backend whose event file lies in `log_dir/experiment`.

    Args:
        experiment: the run's name; None is the time, `YYYYMMDD_HHMMSS`.
        backend: "torch" (`torch.utils.tensorboard`) or "tensorboardX".
        purge_step: on resuming, hide what an earlier run wrote at this step and after.
        backend_options: further arguments of that SummaryWriter, e.g. `flush_secs=30`.

    Returns:
        the writer; None on a rank other than 0 of an initialised process group.

    Raises:
        ValueError: `backend` is neither of the two, or `experiment` leaves `log_dir`.
        TypeError: that SummaryWriter has no such option.

    >>> import tempfile
    >>> with make_writer(tempfile.mkdtemp(), "first", backend="tensorboardX") as writer:
    ...     writer.add_scalar("train/loss", 0.5, 0)
    """
    checks.one_of("make_writer", "backend", backend, PACKAGES)
    root = Path(log_dir)
    run = None if experiment is None else checks.experiment("make_writer", root, experiment)
    if not is_main_rank():
        return None
    directory = _timestamp(root) if run is None else root / run
    return open_writer(directory, backend, purge_step=purge_step, **backend_options)


def open_writer(
    directory: Path, backend: str, *, purge_step: int | None = None, **options: Any
) -> Any:
    """Open a SummaryWriter whose event file lies directly in `directory`."""
    package = PACKAGES[backend]
    SummaryWriter = importlib.import_module(package).SummaryWriter
    unknown = options.keys() - inspect.signature(SummaryWriter).parameters.keys()
    if unknown:
        raise TypeError(f"{package}.SummaryWriter has no option {', '.join(sorted(unknown))}")
    if backend == "tensorboardX":
        # Its file name has the second in it and nothing else: a second writer of that second
        # would truncate the first one's file.
        count = sum(1 for _ in directory.glob("events.out.tfevents.*"))
        options.setdefault("filename_suffix", f".{os.getpid()}.{count}")
    return SummaryWriter(str(directory), purge_step=purge_step, **options)


def _timestamp(root: Path) -> Path:
    """A folder named after this second; a second run of that second gets "_2"."""
    first = root / datetime.now().strftime("%Y%m%d_%H%M%S")
    run, number = first, 1
    while True:
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1
            run = root / f"{first.name}_{number}"
