"""Writers: a SummaryWriter of either backend, opened so that its event file lies where it was said.

Both choose names in ways that lose data: tensorboardX's second writer of one second truncates the
file of the first, and folders named after the second are shared.
"""

import contextlib
import importlib
import inspect
import itertools
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from .. import checks
from ..report import Ledger
from .backend import PACKAGES, close, is_main_rank, refuse_folder, supersede


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
    if not is_main_rank():
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


class Output:
    """Where an attachment writes: to a writer that it was given and never closes, or nowhere.

    Attributes:
        writer: None where it is not open.
        process: which writes to it: in a fork of it the writer's thread is not there.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.process = os.getpid()

    def is_here(self) -> bool:
        """Whether this process writes."""
        return self.process == os.getpid()

    def may_move(self) -> bool:
        """Whether a fork of the process may be the one that writes: it has no file yet."""
        return False

    def move(self) -> None:
        """It is this process that trains, so that it writes."""

    def open(self, ledger: Ledger) -> Any:
        """The writer, or None."""
        return self.writer

    def supersede(self, step: int) -> bool:
        """Hide what is in the folder at `step` and after; whether it could be."""
        return self.writer is None or supersede(self.writer, step)

    def close(self) -> None:
        """The last attachment that wrote to it has ended."""


class Folder(Output):
    """The one writer of this process for a folder. Its event file is opened at the first write.

    By then is known which rank this is, a tracker has wrapped what opens event files, and the
    process that trains has been forked.
    """

    def __init__(self, folder: Path | str, backend: str, at_open: Callable[[], None]) -> None:
        super().__init__(None)
        self.folder, self._backend, self._at_open = folder, backend, at_open
        self._lock, self._is_opening, self._is_closed = threading.RLock(), False, False
        self._resumed: int | None = None  # where, before it was opened
        self._failed: Exception | None = None

    def may_move(self) -> bool:
        return self.writer is None and not self._is_closed

    def move(self) -> None:
        if self.may_move():
            self.process = os.getpid()

    def open(self, ledger: Ledger) -> Any:
        with self._lock:
            if self.may_move() and not self._is_opening and is_main_rank():
                self._is_opening = True
                try:
                    self._open(ledger)
                finally:
                    self._is_opening = False
        return self.writer

    def _open(self, ledger: Ledger) -> None:
        if isinstance(self.folder, str) and self._failed is not None:
            raise self._failed  # another try may take minutes
        try:
            if self._resumed is not None and not _comes_last(self.folder):
                ledger.warn_once(
                    "resume",
                    f"{self.folder} has an event file of a later time than this machine's: what it "
                    f"holds of step {self._resumed} and after stays beside what is written now",
                )
            writer = open_writer(self.folder, self._backend)
        except Exception as error:
            self._failed = error
            raise
        if self._resumed is not None:
            supersede(writer, self._resumed)
        self.writer = writer
        self._at_open()

    def supersede(self, step: int) -> bool:
        if self.writer is None:
            self._resumed = step
            return True
        return super().supersede(step)

    def close(self) -> None:
        self._is_closed = True
        if self.writer is not None:
            close(self.writer)


_count = itertools.count()  # of tensorboardX's writers


def _comes_last(folder: Path | str) -> bool:
    """Whether an event file that is opened in `folder` now is read after those that are there.

    TensorBoard reads them by name: the second, then more, in which 10 comes before 9. A second of
    now is waited for.
    """
    names: list[str] = []
    with contextlib.suppress(Exception):
        if isinstance(folder, Path):
            names = os.listdir(folder)
        else:
            from tensorboard.compat import tf

            names = tf.io.gfile.listdir(folder)
    last = max((name for name in names if name.startswith(_FILE)), default="")
    until = time.monotonic() + 1.5
    while (comes_last := last < f"{_FILE}{int(time.time()):010}") is False:
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return comes_last


_FILE = "events.out.tfevents."


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
