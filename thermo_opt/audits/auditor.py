"""`audit`: choose the lenses a run supports, look through each, say what the others lacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from os import PathLike
from typing import Any, Literal

import numpy as np

from thermo_opt import arguments, likelihoods
from thermo_opt.audits.consistency import consistent
from thermo_opt.audits.results import Audit
from thermo_opt.errors import InputError
from thermo_opt.lenses import counterfactual, optimizer_state, outputs, parameters
from thermo_opt.lenses.counterfactual import CounterfactualMeasurements
from thermo_opt.lenses.inputs import LensInputs, Progress, Unsupported, recorded_settings
from thermo_opt.lenses.measurements import AdamMeasurements, Measurements
from thermo_opt.lenses.results import BY_NAME, LENSES, LensAudit
from thermo_opt.lenses.summary import summarise
from thermo_opt.runs import Run, load_run
from thermo_opt.runs.probe import as_probe

_SAMPLED_INTERVALS = 32
"""Intervals the parameter lens looks at when nobody asked for it by name."""

_MEASURE: dict[
    str, Callable[[LensInputs], Measurements | AdamMeasurements | CounterfactualMeasurements]
] = {
    "outputs": outputs.measure,
    "parameters": parameters.measure,
    "optimizer-state": optimizer_state.measure,
    "counterfactual": counterfactual.measure,
}


def audit(
    run: Run | str | PathLike[str],
    *,
    lens: str | Sequence[str] | None = None,
    clock: str | None = None,
    stride: int = 1,
    model: Any = None,
    probe: Any = None,
    batch_size: int | None = None,
    steps: slice | Sequence[int] | None = None,
    jobs: int = 1,
    quadrature: Literal["start", "trapezoid"] = "start",
    damping: float | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    likelihood: str | None = None,
    sigma2: float | None = None,
    kind: str | None = None,
) -> Audit:
    """Audit a recorded run: how much its path dissipated, how much of it was unavoidable, where the
    rest went (§2-5, §9).

    ``run``: a `Run` or a path. ``lens``: one or several of ``outputs``, ``parameters``,
    ``optimizer-state``, ``counterfactual`` (only by name); by default every other lens the record
    supports, the reasons why others could not
    look being kept in ``missing``. ``clock``: the unit of τ (step, flow, wall, examples, tokens);
    by default the one its recorder named, else step. ``stride``: audit every ``stride``-th snapshot
    (and the last): coarser audits give lower bounds. ``model`` (a module, or
    ``package.module:factory``) and ``probe`` (a `Probe`, or what `as_probe` makes one of: a file,
    ``(inputs, targets)``, a dictionary of arrays, a DataLoader) replay predictions from recorded
    weights. ``batch_size`` gives the optimizer-state lens its nats. ``steps``: the audited
    intervals the parameter lens looks at: by default all if it was asked for by name, else up to 32
    spread evenly, since each costs dozens of Fisher products; ``quadrature``: its values at each
    step's start, or
    averaged over both ends; ``damping``: its λ, by default 1e-3 of the Fisher's mean eigenvalue at
    the start; ``device``: where it computes, by default a GPU if there is one. ``jobs``: processes.
    ``progress``: see `Progress`. ``likelihood``, ``sigma2`` (of Gaussian outputs; by default
    estimated from the residuals) and ``kind`` say what the outputs are where the record doesn't,
    see `thermo_opt.likelihoods`.

    Raises InputError for a run that can't be read, a clock it has no data for, or a lens asked for
    by name that it does not support. Cost: outputs lens O(snapshots x probe); optimizer-state
    O(bytes of the snapshots).
    """
    stride, jobs = arguments.whole("stride", stride), arguments.whole("jobs", jobs, least=None)
    if batch_size is not None:
        batch_size = arguments.whole("batch_size", batch_size)
    if damping is not None:
        damping = arguments.positive("damping", damping)
    if steps is not None and not isinstance(steps, slice):
        steps = [
            int(k)
            for k in arguments.listed("steps", steps, Integral, "give a slice, or whole numbers")
        ]
    if likelihood is not None:
        likelihoods.known(likelihood)
    if sigma2 is not None:
        sigma2 = arguments.positive("sigma2", sigma2)
    if kind is not None:
        likelihoods.known_kind(kind)
    run = run if isinstance(run, Run) else load_run(run)
    clock = clock or run.info.clock or "step"
    wanted = _lenses(lens)
    if len(run.snapshots) < 2:
        raise InputError(
            f"{run.path}: a path needs at least two snapshots and this run has "
            f"{len(run.snapshots)}: "
            "record or save checkpoints more often"
        )
    given = None if probe is None else as_probe(probe)
    indices = list(range(0, len(run.snapshots), stride))
    if indices[-1] != len(run.snapshots) - 1:
        indices.append(len(run.snapshots) - 1)
    inputs = LensInputs(
        run=run,
        clock=clock,
        indices=indices,
        architecture=model,
        given_probe=given,
        given_batch_size=batch_size,
        intervals=_spread(len(indices) - 1) if lens is None and steps is None else steps,
        jobs=jobs,
        quadrature=quadrature,
        damping=damping,
        device_name=device,
        progress=progress,
        given_likelihood=likelihood,
        given_sigma2=sigma2,
        given_kind=kind,
    )
    return _audit(inputs, wanted, required=lens is not None)


def at_steps(audit: Audit, steps: Sequence[int]) -> Audit:
    """The same run audited again at fewer snapshots, those of these step numbers.

    The lenses of single steps, which are dear, are left out.
    """
    assert audit.inputs is not None
    position = {snapshot.step: i for i, snapshot in enumerate(audit.inputs.run.snapshots)}
    inputs = replace(audit.inputs, indices=[position[step] for step in steps], intervals=None)
    again = _audit(
        inputs,
        [name for name in audit.lenses if name in ("outputs", "optimizer-state")],
        required=True,
    )
    return replace(again, run=audit.run, inputs=audit.inputs).named(audit.run)


def _audit(inputs: LensInputs, wanted: Sequence[str], required: bool) -> Audit:
    """Look through these lenses; those that can't are said in ``missing``, or refused where
    ``required``."""
    run = inputs.run
    unit = getattr(run.info, "step_unit", "step")
    lenses: dict[str, LensAudit] = {}
    missing: dict[str, str] = {}
    for name in wanted:
        try:
            found = summarise(_MEASURE[name](inputs), run.name, name, inputs.clock, unit)
            found.summary["notes"] += run.remarks
            if name != "optimizer-state" and inputs.probe is not None:
                found.summary["notes"] += inputs.probe.remarks
            lenses[name] = found
        except Unsupported as reason:
            why = str(reason).removeprefix(f"{run.path}: ")
            if required:
                raise InputError(
                    f"{run.path}: the {name} lens can't look at this run: {why}"
                ) from None
            missing[name] = why
    if not lenses:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise InputError(f"{run.path}: no lens can look at this run ({reasons})")
    return Audit(
        run=run.name,
        path=str(run.path),
        lenses=consistent(lenses),
        missing=missing,
        curve=run.steps,
        optimizer=run.info.optimizer,
        probe=None if inputs.probe is None else inputs.probe.fingerprint,
        settings=recorded_settings(run),
        inputs=inputs,
    )


def _spread(count: int) -> list[int] | None:
    """Up to `_SAMPLED_INTERVALS` of ``count`` intervals, evenly spread, both ends among them; None
    for all."""
    if count <= _SAMPLED_INTERVALS:
        return None
    return np.unique(np.linspace(0, count - 1, _SAMPLED_INTERVALS).round().astype(int)).tolist()


def _lenses(lens: str | Sequence[str] | None) -> Sequence[str]:
    if lens is None:
        return [name for name in LENSES if name not in BY_NAME]
    names = (
        [lens]
        if isinstance(lens, str)
        else arguments.listed("lens", lens, str, f"use {', '.join(LENSES)}")
    )
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in LENSES:
            raise InputError(f"lens {name!r} is unknown: use one of {', '.join(LENSES)}")
    return wanted
