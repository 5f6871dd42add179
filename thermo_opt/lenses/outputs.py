"""The outputs lens: exact geometry of the predictions a run made on its probe, recorded or replayed
(§4, §5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thermo_opt import likelihoods
from thermo_opt.errors import InputError
from thermo_opt.lenses.inputs import LensInputs, Unsupported
from thermo_opt.lenses.measurements import Measurements
from thermo_opt.lenses.noise import measure_split, memory
from thermo_opt.lenses.path import ends, landmarks, path_scalars
from thermo_opt.lenses.predictions import (
    Predictions,
    RecordedPredictions,
    ReplayedPredictions,
    array_of,
    targets_of,
)
from thermo_opt.lenses.rounding import feigned, floors, rounding_notes
from thermo_opt.manifold.initial import InitialPredictions
from thermo_opt.manifold.precision import ABOVE
from thermo_opt.manifold.sketch import relative_error
from thermo_opt.runs.replicas import read_replicas

_LANDMARKS = 48
"""Predictions kept for the trajectory map."""
_FEW, _MOST = 0.01, 0.5
"""Share of the probe's examples that counts as a few (at least one), and share of χ² that counts
as most of it."""
_NAMED = 10
"""Examples of which at least twice as many must be there for one of them to be a rarity."""
_RESOLUTION = 1e-29
"""Squared distances below this are rounding of the embedded predictions: such a motion has no
direction."""


def measure(inputs: LensInputs) -> Measurements:
    """Scalars of the path that the predictions took: a exact, d to first order, Δ ≤ χ² (§4, §5).

    Uses the recorded predictions, or replays them when the user gave a probe of their own or none
    were recorded. Stops at the first non-finite prediction and says so. Cost: one embedding per
    snapshot, O(n c), and once more where a few examples hold most of χ².

    Raises:
        Unsupported: When there is nothing to look at.
        InputError: When fewer than two snapshots are finite.
    """
    source, notes = _predictions(inputs)
    found = path_scalars(
        source,
        inputs.indices,
        landmarks=_LANDMARKS,
        jobs=inputs.jobs,
        advance=inputs.advance("outputs lens", len(inputs.indices)),
    )
    indices = inputs.indices[: len(found.loss)]
    audited = np.array([source.steps[i] for i in indices])
    if found.stopped is not None:
        if len(audited) < 2:
            raise InputError(
                f"{inputs.run.path}: {_not_finite(source, found.stopped)}, and fewer than two "
                "finite snapshots precede it, so that there is no path to audit: leave out this "
                "snapshot, or the examples that are NaN"
            )
        notes.append(
            f"predictions are NaN or infinite from step {found.stopped}: only what precedes was "
            "audited"
        )
    first, end_loss, square = ends(source, indices[0], indices[-1])
    start = InitialPredictions.of(first, source.likelihood, source.sigma2)
    least = None
    if end_loss is None:
        notes.append("the probe has no targets: loss, least distance and alignment are unknown")
    elif start is None:
        notes.append(
            f"the least distance is unknown for {source.likelihood} outputs, whose loss has no "
            f"least"
        )
    elif not np.isfinite(end_loss):
        notes.append(
            "the loss at the end is infinite (a target has probability 0): the least distance to "
            "it is unknown"
        )
    else:
        least = start.least_distance(end_loss)
        if first.soft is not None:
            notes.append("the least distance is a lower bound: targets are soft")
    a, chi2 = np.array(found.a), np.array(found.chi2)
    every_step = inputs.run.info.step_unit == "step" and bool(np.all(np.diff(audited) == 1))
    if end_loss is not None and every_step:
        notes.append(
            "alignment is certified only from below (Δ ≤ χ²): the parameter lens brackets it from "
            "both sides"
        )
    if not first.sketched:
        targets = None if source.targets is None else source.targets.shape
        if note := likelihoods.axis_note(source.likelihood, source.shape(indices[0]), targets):
            notes.append(note)
    floor, dtype = floors(source, indices)
    tau = inputs.tau(audited)
    rounding = feigned(a, floor, tau)
    notes += rounding_notes(a, floor, dtype, rounding)
    d = np.where(a >= ABOVE * floor, _directed(found.a, found.d), np.nan)
    distance = float(np.sqrt(square))
    split = None
    width = first.w.shape[1] if first.sketched else None
    if isinstance(source, RecordedPredictions):
        if width is not None:
            distance = min(distance, float(np.sqrt(a).sum()))
            apart, alike = relative_error(width, first.examples), relative_error(width, 1)
            notes.append(
                f"distances are estimates from sketches of {width} random sums, with a relative "
                f"standard error of each squared distance from {apart:.2g}, where predictions move "
                f"in ways of their own, to {alike:.2g}, where all move alike; losses are exact"
            )
        split = measure_split(
            source,
            read_replicas(inputs.run.path),
            found.lagged,
            a,
            audited,
            memory(inputs.run.info),
            inputs.batch_size,
        )
    held_by = np.empty(0, dtype=int)
    if found.chi2_shares is not None:
        held_by = _holding(found.chi2_shares, source.owners(indices[0]))
    rest = None
    if len(held_by):
        others = path_scalars(source.leaving_out(held_by), indices, strides=(), jobs=inputs.jobs)
        rest_d, rest_chi2 = _directed(others.a, others.d), np.array(others.chi2)
        rest = (_allowed(np.array(others.a), rest_d, rest_chi2), rest_d, rest_chi2)
    return Measurements(
        step=audited[:-1],
        step_end=audited[1:],
        tau=tau,
        a=a,
        d=d,
        delta_lower=np.zeros_like(a),
        delta_upper=np.where(np.isnan(chi2), np.inf, chi2),
        loss=np.array(found.loss[:-1]),
        loss_end=np.array(found.loss[1:]),
        distance=distance,
        least_distance=least,
        notes=notes,
        chords=found.chords,
        landmarks=landmarks(found, audited),
        start=start,
        floor=float(np.median(floor)) if len(floor) else 0.0,
        rounding=rounding,
        split=split,
        a_alignment=_allowed(a, d, chi2) if first.sketched else None,
        held_by=held_by.tolist(),
        rest=rest,
        sketch=width,
    )


def _not_finite(source: Predictions, step: int) -> str:
    """How many of the predictions of this step are NaN or infinite."""
    what = f"at step {step}"
    if isinstance(source, RecordedPredictions) and source.sketched:
        return f"the predictions {what} are NaN or infinite"
    outputs = source.outputs(list(source.steps).index(step))
    bad = ~outputs.isfinite().reshape(len(outputs), -1).all(dim=1)
    first = int(bad.nonzero()[0]) if bool(bad.any()) else 0
    return (
        f"the predictions of {int(bad.sum())} of {len(outputs)} examples {what} are NaN or "
        f"infinite (the first is example {first})"
    )


def _allowed(a: np.ndarray, d: np.ndarray, chi2: np.ndarray) -> np.ndarray:
    """a, or the least that d² ≤ a χ² allows where a sketch's estimate fell below it (§5, §13)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.fmax(a, np.where(np.isfinite(chi2) & (chi2 > 0), d * d / chi2, 0.0))


def _directed(a: Sequence[float], d: Sequence[float]) -> np.ndarray:
    """d, unknown where the motion is rounding or the loss infinite."""
    return np.where(np.isfinite(d) & (np.array(a) > _RESOLUTION), d, np.nan)


def _holding(shares: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """The few examples (of the probe's first axis) that hold most of χ² over the run; none where
    it is spread.

    Args:
        shares: (rows,) of χ².
        owners: (rows,) the example that each row is of.
    """
    shares = np.bincount(owners, shares)
    count = len(np.unique(owners))
    few = max(1, int(_FEW * count))
    worst = np.argsort(-shares, kind="stable")[:few]
    total = shares.sum()
    if count < 2 * _NAMED or not total > 0 or shares[worst].sum() < _MOST * total:
        return np.empty(0, dtype=int)
    enough = int(np.searchsorted(np.cumsum(shares[worst]), _MOST * total)) + 1
    return np.sort(worst[:enough])


def _predictions(inputs: LensInputs) -> tuple[Predictions, list[str]]:
    first = inputs.run.snapshots[0]
    recorded = "probe/logits" in first.names() or "probe/sketch" in first.names()
    if recorded and inputs.given_probe is None:
        end = inputs.run.snapshots[inputs.indices[-1]]
        family, sigma2, notes = inputs.family(
            lambda: array_of(end.load("probe/logits")), targets_of(inputs.run.probe)
        )
        return RecordedPredictions(inputs.run, family, sigma2, inputs.kind), notes
    if not first.has_group("params"):
        raise Unsupported(
            "it holds neither predictions on a probe nor weights to replay them from"
            if not recorded
            else (
                "its predictions were recorded on its own probe and it holds no "
                "weights to replay another one"
            )
        )
    if inputs.probe is None:
        raise Unsupported(
            "it recorded no predictions: give --probe (and --model) to replay them from its weights"
        )
    source = ReplayedPredictions(
        inputs.run, inputs.model, inputs.probe, inputs.likelihood[0], kind=inputs.kind
    )
    _, source.sigma2, notes = inputs.family(
        lambda: array_of(source.outputs(inputs.indices[-1])), source.targets
    )
    return source, [*notes, *source.several(), "replayed"]
