"""Runs that are predictions alone: arrays in memory, or spooled from an iterator to a temporary
file, so that no more than one snapshot of them is held."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.probe import make_probe
from thermo_opt.runs.run import Run, RunInfo, Snapshot


@dataclass
class PredictionContents:
    """One snapshot that holds ``probe/logits`` only, read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Any]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The one tensor's shape."""
        return {"probe/logits": self.shape}

    def load(self, name: str) -> Tensor:
        """The predictions."""
        if name != "probe/logits":
            raise KeyError(name)
        return as_tensor(self.read(), "predictions")

    def moments_meta(self) -> None:
        """Predictions carry no moments."""

    def absent(self, group: str) -> str | None:
        """Why anything else is not there."""
        return "the run is predictions alone"


def as_tensor(array: Any, name: str) -> Tensor:
    """An array of any library as a tensor on the CPU; InputError for what holds no numbers."""
    if isinstance(array, Tensor):
        return array.detach().cpu()
    values = np.asarray(array)
    if values.dtype.kind in "OUS" and name == "targets":
        raise InputError(
            "targets are text or objects: give class numbers 0, 1, …, in the order of the "
            "predictions' classes"
        )
    if values.dtype.kind not in "fiub":
        raise InputError(f"{name} hold {values.dtype}: give numbers, rows of one length")
    plain = values.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(values, dtype=plain))


def predictions_run(
    contents: Sequence[tuple[int, PredictionContents]],
    targets: Any,
    *,
    path: Path,
    name: str,
    weights: Any = None,
    **info: Any,
) -> Run:
    """A run of (step number, predictions) pairs, in increasing order.

    Raises:
        InputError: For fewer than two, steps that don't increase, or shapes that differ.
    """
    if len(contents) < 2:
        raise InputError(
            f"{name}: a path needs predictions at two moments at least, and here are "
            f"{len(contents)}: give an array of shape (snapshots, examples, ...)"
        )
    if 0 in contents[0][1].shape:
        raise InputError(
            f"{name}: predictions of shape {contents[0][1].shape} hold nothing: give examples"
        )
    snapshots: list[Snapshot] = []
    for step, content in contents:
        if snapshots and step <= snapshots[-1].step:
            raise InputError(
                f"{name}: steps must increase, and {step} follows {snapshots[-1].step}"
            )
        if content.shape != contents[0][1].shape:
            raise InputError(
                f"{name}: predictions have shape {content.shape} at step {step} and "
                f"{contents[0][1].shape} before: give the same examples each time"
            )
        snapshots.append(Snapshot(step, path, content, snapshots[0] if snapshots else None))
    probe = None
    if targets is not None:
        given = None if weights is None else as_tensor(weights, "weights")
        probe = make_probe(None, as_tensor(targets, "targets"), given)
        info["probe_fingerprint"] = probe.fingerprint
    run = Run(
        name=name,
        path=path,
        format="predictions",
        info=RunInfo(**info),
        steps=pd.DataFrame(index=pd.Index([], name="step", dtype="int64")),
        snapshots=snapshots,
    )
    run.__dict__["probe"] = probe  # what the cached property would have read from a file
    return run


class Spool:
    """Predictions of an iterator, written one after another to a temporary folder that goes when
    the spool is closed."""

    def __init__(self, predictions: Iterable[Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="thermo-opt-")
        self.contents: list[PredictionContents] = []
        for k, array in enumerate(predictions):
            tensor = as_tensor(array, "predictions")
            file = Path(self._folder.name) / f"{k}.pt"
            torch.save(tensor, file)
            self.contents.append(PredictionContents(tuple(tensor.shape), _reading(file)))

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _reading(file: Path) -> Callable[[], Tensor]:
    return lambda: torch.load(file, weights_only=True)


def contents_of(array: Any) -> PredictionContents:
    """One snapshot's predictions, held in memory."""
    return PredictionContents(tuple(array.shape), lambda: array)


def in_memory(predictions: Any) -> Iterator[PredictionContents]:
    """The snapshots of an array (snapshots, examples, ...), or of a sequence of arrays."""
    for array in predictions:
        yield contents_of(array)
