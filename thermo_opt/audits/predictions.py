"""Audit predictions that lie in memory, of any library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thermo_opt import likelihoods
from thermo_opt.audits.auditor import audit
from thermo_opt.audits.results import Audit
from thermo_opt.errors import InputError
from thermo_opt.runs.predictions import (
    PredictionContents,
    Spool,
    as_tensor,
    in_memory,
    predictions_run,
)

KINDS = (*likelihoods.KINDS, "mean")
"""What predictions may be; ``mean`` are those of Gaussian outputs."""


def audit_predictions(
    predictions: Any,
    targets: Any = None,
    *,
    steps: Sequence[int] | None = None,
    kind: str = "logits",
    likelihood: str | None = None,
    sigma2: float | None = None,
    weights: Any = None,
    name: str = "predictions",
) -> Audit:
    """Audit predictions on fixed examples, made during a training by any library (§4, §5).

    Args:
        predictions: An array or tensor (snapshots, examples, ...), a sequence of one per snapshot,
            or an iterator of them, which is spooled to a temporary file: then one snapshot is in
            memory at a time.
        targets: The examples' classes, 0/1 labels or values; without them the loss, D* and the
            alignment are unknown. The same for each snapshot (snapshots, examples) will do, too.
        steps: Optimizer steps done at each snapshot; without them snapshots are counted, and what
            is known of single steps only is unknown.
        kind: ``logits``, ``log-probabilities``, ``probabilities``, or ``mean`` of Gaussian outputs.
        likelihood: One of `thermo_opt.likelihoods.FAMILIES`; by default ``gaussian`` for means,
            else ``categorical``.
        sigma2: Variance of Gaussian outputs; by default estimated from the residuals.
        weights: Of the examples.
        name: What to call the run.

    Returns:
        The audit, through the outputs lens. Cost O(snapshots x examples x outputs).

    Raises:
        InputError: For predictions, targets or steps that don't fit each other.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; use one of {', '.join(KINDS)}")
    family = likelihood or ("gaussian" if kind == "mean" else "categorical")
    info = {
        "likelihood": likelihoods.known(family),
        "sigma2": sigma2,
        "kind": None if kind in ("mean", "logits") else kind,
        "step_unit": "snapshot" if steps is None else "step",
    }

    def audited(contents: list[Any]) -> Audit:
        counted = range(len(contents)) if steps is None else _whole_numbers(name, steps)
        if len(counted) != len(contents):
            raise InputError(
                f"{name}: there are {len(counted)} steps for {len(contents)} predictions: give one "
                "per snapshot"
            )
        run = predictions_run(
            list(zip(counted, contents, strict=True)),
            _of_one_snapshot(targets, contents),
            path=Path(name),
            name=name,
            weights=weights,
            **info,
        )
        return audit(run, lens="outputs")

    if isinstance(predictions, Mapping):
        raise InputError(
            f"{name}: predictions are a {type(predictions).__name__}: give its values, one array "
            "per snapshot in the order of the steps, and steps="
        )
    if hasattr(predictions, "shape") or isinstance(predictions, Sequence):
        arrays = [p if hasattr(p, "shape") else np.asarray(p) for p in predictions]
        return audited(list(in_memory(arrays)))
    if not isinstance(predictions, Iterable):
        raise InputError(f"{name}: predictions are {type(predictions).__name__}: give an array")
    with Spool(predictions) as spool:
        found = audited(spool.contents)
    # the spooled predictions are gone: this audit can't be repeated at fewer snapshots
    object.__setattr__(found, "inputs", None)
    return found


def _of_one_snapshot(targets: Any, contents: Sequence[PredictionContents]) -> Any:
    """Targets that are given for each snapshot, and are the same for all, as those of one."""
    if targets is None or not contents:
        return targets
    rows = as_tensor(targets, "targets")
    each = contents[0].shape
    if rows.shape != (len(contents), *each[:-1]) or tuple(rows.shape) == tuple(each):
        return targets
    return rows[0] if bool((rows == rows[0]).all()) else targets


def _whole_numbers(name: str, steps: Any) -> list[int]:
    try:
        numbers = [float(step) for step in steps]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(n >= 0 and n.is_integer() for n in numbers):
        raise InputError(f"{name}: steps must be whole numbers from 0 on, one per snapshot")
    return [int(n) for n in numbers]
