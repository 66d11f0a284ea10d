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


def check_backend(backend: str) -> str:
    """`backend`, if there is one of that name."""
    if backend not in PACKAGES:
        raise ValueError(f'backend={backend!r}: expected "torch" or "tensorboardX"')
    return backend


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
        ImportError: the backend's package is missing.

    >>> import tempfile
    >>> with make_writer(tempfile.mkdtemp(), "first", backend="tensorboardX") as writer:
    ...     writer.add_scalar("train/loss", 0.5, 0)
    """
    check_backend(backend)
    root = Path(log_dir)
    if experiment is not None:
        if not isinstance(experiment, str):
            raise TypeError(f"make_writer: experiment is a str or None, got {experiment!r}")
        run = Path(os.path.normpath(experiment))
        if run.is_absolute() or run.parts[:1] in ((), ("..",)):
            raise ValueError(
                f"make_writer: experiment={experiment!r} does not name a folder inside "
                f"log_dir={str(log_dir)!r}; give a plain name, and the place as log_dir"
            )
    if not is_main_rank():
        return None
    if experiment is None:
        run = _timestamp(root)
    return open_writer(root / run, backend, purge_step=purge_step, **backend_options)


def open_writer(
    directory: Path, backend: str, *, purge_step: int | None = None, **options: Any
) -> Any:
    """Open a SummaryWriter whose event file lies directly in `directory`."""
    package = PACKAGES[check_backend(backend)]
    try:
        SummaryWriter = importlib.import_module(package).SummaryWriter
    except ImportError as error:
        missing = "tensorboard" if backend == "torch" else "tensorboardX"
        raise ImportError(f"backend={backend!r} needs {missing}: pip install {missing}") from error
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
    name = datetime.now().strftime("%Y%m%d_%H%M%S")
    number = 1
    while True:
        run = name if number == 1 else f"{name}_{number}"
        try:
            (root / run).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return Path(run)
