"""Folders: where an attachment writes, and when its event file is opened.

That is at the first write. By then it is known which rank this is, a tracker has wrapped what opens
event files, and the process that trains has been forked: a file that `attach` opened would be a
second one, or one that nobody hears. What is known to go wrong is refused at the call all the same.
"""

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..job import rank
from ..report import Ledger
from .backend import PACKAGES, close, supersede

_FILE = "events.out.tfevents."


def refuse_folder(where: str, folder: Path | str, backend: str) -> None:
    """Refuse what `backend` can't write to, as far as that is known before a file is opened."""
    importlib.import_module(PACKAGES[backend])
    if isinstance(folder, Path):
        there = next(part for part in (folder, *folder.parents) if part.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"{where}: no folder {folder} can be made: {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"{where}: {there} is not writable")
    elif backend == "torch":
        refuse_unknown(where, folder)
    else:
        record = importlib.import_module("tensorboardX.record_writer")
        known = record.REGISTERED_FACTORIES
        factory = known.get(folder.split(":")[0])
        if factory is None:
            raise ValueError(
                f"{where}: tensorboardX writes to {', '.join(f'{one}://' for one in known)}, got "
                f'{folder}; backend="torch" writes to all that the package fsspec knows'
            )
        for own, is_there, package in (
            (record.S3RecordWriterFactory, record.S3_ENABLED, "boto3"),
            (record.GCSRecordWriterFactory, record.GCS_ENABLED, "google-cloud-storage"),
        ):
            if type(factory) is own and not is_there:
                raise ImportError(f"{where}: {folder} needs the package {package}")


def refuse_unknown(where: str, url: str) -> None:
    """Refuse a URL that TensorBoard can't read, nor torch's SummaryWriter write."""
    from tensorboard.compat import tf

    try:
        tf.io.gfile.exists(url)
    except (ImportError, ValueError) as error:  # of fsspec, or of TensorBoard where it is not there
        raise ImportError(
            f"{where}: {url} needs the package fsspec and the one for its kind (s3fs or boto3, "
            f"gcsfs, pyarrow, ...): {error}"
        ) from error


class Output:
    """Where an attachment writes: to a writer that it was given and never closes, or nowhere.

    Attributes:
        writer: None where it is not open.
        is_given: whether it is an object of the user's.
        process: which writes to it: in a fork of it the writer's thread is not there.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.is_given = writer is not None  # an object
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

    def supersede(self, step: int, by: object) -> bool:
        """Hide what is in the folder at `step` and after, for `by`; whether it could be."""
        return self.writer is None or supersede(self.writer, step)

    def close(self) -> None:
        """The last attachment that wrote to it has ended."""


class Folder(Output):
    """The one writer of this process for a folder, which `opener` opens."""

    def __init__(self, folder: Path | str, opener: Callable[[], Any]) -> None:
        super().__init__(None)
        self.folder, self._opener = folder, opener
        self._lock, self._is_opening, self._is_closed = threading.RLock(), False, False
        self._resumed: dict[object, int] = {}  # by whom and where, before it was opened
        self._failed: Exception | None = None

    def may_move(self) -> bool:
        return self.writer is None and not self._is_closed

    def move(self) -> None:
        if self.may_move():
            self.process = os.getpid()

    def open(self, ledger: Ledger) -> Any:
        with self._lock:
            if self.may_move() and not self._is_opening and rank() == 0:
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
            step = min(self._resumed.values(), default=None)
            if step is not None and not _comes_last(self.folder):
                ledger.warn_once(
                    "resume",
                    f"{self.folder} has an event file of a later time than this machine's: what it "
                    f"holds of step {step} and after stays beside what is written now",
                )
            writer = self._opener()
        except Exception as error:
            self._failed = error
            raise
        if step is not None:
            supersede(writer, step)
        self.writer = writer

    def supersede(self, step: int, by: object) -> bool:
        if self.writer is None:
            self._resumed[by] = step
            return True
        return super().supersede(step, by)

    def close(self) -> None:
        self._is_closed = True
        if self.writer is not None:
            close(self.writer)


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
