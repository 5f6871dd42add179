"""What the Recorder writes with: a thread for snapshots, the log of steps, and the lock on a run's
folder."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from thermo_opt import arguments
from thermo_opt.errors import InputError, warn_only
from thermo_opt.runs.format import write_tensors

try:
    import fcntl
except ImportError:  # Windows: runs there are not locked
    fcntl = None  # type: ignore[assignment]

QUEUE = 4
"""Snapshots that may wait for the disk; training waits when there are more, so memory stays
bounded."""
NUMERIC = ("loss", "lr", "wall", "examples", "tokens", "energy")
"""Columns that an audit computes with: numbers or null."""
_COUNTS = ("examples", "tokens")
_ENCODE = json.JSONEncoder(allow_nan=False).encode


class SnapshotWriter:
    """A thread that writes snapshots in order.

    ``put`` waits when `QUEUE` of them are pending; ``error`` is the first failure, after which
    nothing more is written.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._queue: queue.Queue[tuple[Path, dict[str, Tensor], dict[str, str]] | None] = (
            queue.Queue(maxsize=QUEUE)
        )
        self._thread = threading.Thread(target=self._work, name="thermo-opt recorder", daemon=True)
        self._thread.start()

    def put(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Have these tensors written."""
        self._queue.put((path, tensors, metadata))

    def close(self) -> None:
        """Wait until all is written."""
        if threading.current_thread() is not self._thread:
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is None:
                try:
                    write_tensors(*item)
                except BaseException as error:  # handed to the training thread, which warns
                    self.error = error


class StepLog:
    """The file of one JSON object per step, appended and flushed at each."""

    def __init__(self, file: Path) -> None:
        self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115 (open while the run lasts)
        self._said: set[str] = set()

    def write(self, step: int, row: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Append a row. What no reader could use is logged as null, with one warning per column.

        Args:
            step: the number of steps done.
            row: the Recorder's own columns; None is left out.
            extra: the user's, which go before the Recorder's.
        """
        logged: dict[str, Any] = {"step": step}
        for key, value in (*row.items(), *extra.items()):
            if value is None or key == "step":
                continue
            name, found = arguments.text(key), self._loggable(key, value)
            if found is None and key == "wall" and "wall" in logged:
                continue  # the Recorder's own reading is better than none
            logged[name] = found
        self._file.write(_ENCODE(logged) + "\n")
        self._file.flush()

    def check(self) -> None:
        """Raise `OSError` when the file was removed, so that nothing written to it is ever read."""
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError("the file of steps was removed")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _loggable(self, key: str, value: Any) -> Any:
        found = arguments.scalar(value)
        wrong = found is None and not arguments.is_nonfinite(value)
        if key in NUMERIC and found is not None:
            wrong = isinstance(found, str | bool) or (key in _COUNTS and found < 0)
        if wrong and key not in self._said:
            self._said.add(key)
            warn_only(
                f"{arguments.text(key)!r} is {arguments.shown(value)}, which can't be logged; it "
                f"is "
                "logged as null",
                stacklevel=4,
            )
        return None if wrong else found


class FolderLock:
    """The exclusive right to record into a folder; the system takes it back when the process ends,
    however it ends.

    Raises:
        InputError: somebody else has it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"{folder} is being recorded into by another Recorder; wait until it is closed, "
                f"or record into a new "
                "folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            fcntl.flock(
                self._descriptor, fcntl.LOCK_UN
            )  # a forked child may hold a copy of the descriptor
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # no unlocking: this may be the copy in a forked child
            self._descriptor = None
