"""Writers: a SummaryWriter of either backend, opened so that its event file lies where it was said.

Both choose names in ways that lose data: tensorboardX's second writer of one second truncates the
file of the first, and folders named after the second are shared.
"""

import importlib
import inspect
import itertools
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from .. import checks
from ..job import rank
from .backend import PACKAGES
from .folders import refuse_folder

_count = itertools.count()  # of tensorboardX's writers


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
        log_dir: a folder, or a URL (`s3://`, `gs://`, ...): torch writes to those that the package
            fsspec knows, tensorboardX to `s3://` and `gs://` by packages of their own.
        experiment: the run's name; None is the time, `YYYYMMDD_HHMMSS`.
        backend: "torch" (`torch.utils.tensorboard`) or "tensorboardX".
        purge_step: on resuming, hide what an earlier run wrote at this step and after.
        backend_options: further arguments of that SummaryWriter, e.g. `flush_secs=30`.

    Returns:
        the writer; None on a rank other than 0 of an initialised process group.

    Raises:
        ValueError: `backend` is neither of the two, or `experiment` leaves `log_dir`.
        TypeError: that SummaryWriter has no such option.
        ImportError: a package that the URL needs is missing; it is named.

    >>> import tempfile
    >>> with make_writer(tempfile.mkdtemp(), "first", backend="tensorboardX") as writer:
    ...     writer.add_scalar("train/loss", 0.5, 0)
    """
    checks.one_of("make_writer", "backend", backend, PACKAGES)
    root = checks.folder("make_writer", log_dir)
    run = None if experiment is None else checks.experiment("make_writer", root, experiment)
    if rank() != 0:
        return None
    if isinstance(root, str):
        refuse_folder("make_writer", root, backend)
    folder = _timestamp(root) if run is None else _below(root, run)
    return open_writer(folder, backend, purge_step=purge_step, **backend_options)


def open_writer(
    folder: Path | str, backend: str, *, purge_step: int | None = None, **options: Any
) -> Any:
    """Open a SummaryWriter whose event file lies directly in `folder`."""
    package = PACKAGES[backend]
    SummaryWriter = importlib.import_module(package).SummaryWriter
    unknown = options.keys() - inspect.signature(SummaryWriter).parameters.keys()
    if unknown:
        raise TypeError(f"{package}.SummaryWriter has no option {', '.join(sorted(unknown))}")
    if backend == "tensorboardX":
        # Its file name has the second in it and nothing else: a second writer of that second
        # would truncate the first one's file.
        options.setdefault("filename_suffix", f".{os.getpid()}.{next(_count):04}")
    return SummaryWriter(str(folder), purge_step=purge_step, **options)


def _below(root: Path | str, run: Path) -> Path | str:
    if isinstance(root, Path):
        return root / run
    return f"{root}{'' if root.endswith('/') else '/'}{run.as_posix()}"


def _timestamp(root: Path | str) -> Path | str:
    """A folder named after this second; a second run of that second gets "_2"."""
    name = datetime.now().strftime("%Y%m%d_%H%M%S")
    if isinstance(root, str):
        return _below(root, Path(name))
    run, number = root / name, 1
    while True:
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1
            run = root / f"{name}_{number}"
