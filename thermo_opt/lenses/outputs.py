"""The outputs lens: exact geometry of the predictions a run made on its probe, recorded or replayed
(§4, §5)."""

from __future__ import annotations

import numpy as np

from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import likelihood
from thermo_opt.lenses.inputs import LensInputs, Unsupported
from thermo_opt.lenses.path import Predictions, landmarks, squared_distance, walk
from thermo_opt.lenses.replay import RecordedPredictions, ReplayedPredictions
from thermo_opt.lenses.summary import Measurements
from thermo_opt.manifold import Point
from thermo_opt.manifold.start import Start

_RESOLUTION = 1e-29
"""Squared distances below this are rounding of the embedded predictions: such a motion has no
direction."""


def look_at_outputs(view: LensInputs) -> Measurements:
    """Scalars of the path the predictions took: a exact, d to first order, Δ between Cauchy-Schwarz
    and χ².

    Uses the recorded predictions, or replays them when the user gave a probe of their own or none
    were recorded. Stops at the first non-finite prediction and says so. Raises Unsupported when
    there is nothing to look at.
    """
    source, notes = _predictions(view)
    advance = view.advance("outputs lens", len(view.indices))
    found = walk(source, view.indices, view.jobs, advance)
    audited = np.array([source.steps[i] for i in view.indices[: len(found.loss)]])
    if found.stopped is not None:
        if len(audited) < 2:
            raise InputError(
                f"{view.run.path}: the predictions at step {found.stopped} are NaN or infinite and "
                "fewer than two "
                "finite snapshots precede it: there is no path to audit"
            )
        notes.append(
            f"predictions are NaN or infinite from step {found.stopped}: only what precedes was "
            "audited"
        )
    first, last = source.point(view.indices[0]), source.point(view.indices[len(audited) - 1])
    if likelihood(source.likelihood).suspicious(source.outputs(view.indices[0]).float()):
        notes.append(
            "the outputs look like probabilities (rows sum to one), not logits: record them before "
            "the softmax"
        )
    end_loss = last.mean_loss
    least = None
    if end_loss is None:
        notes.append("the probe has no targets: loss, frontier and alignment are unknown")
    elif not np.isfinite(end_loss):
        notes.append(
            "the loss at the end is infinite (a target has probability 0): its frontier is unknown"
        )
    else:
        least = least_distance(first, end_loss, source.likelihood, source.sigma2)
    a, d, chi2 = (np.array(x) for x in (found.a, found.d, found.chi2))
    if end_loss is not None:
        notes.append(
            "alignment is certified only from below (Δ ≤ χ²): the parameter lens brackets it from "
            "both sides"
        )
    d = np.where(np.isfinite(d) & (a > _RESOLUTION), d, np.nan)
    return Measurements(
        step=audited[:-1],
        step_end=audited[1:],
        tau=view.tau(audited),
        a=a,
        d=d,
        delta_lower=np.zeros_like(a),
        delta_upper=np.where(np.isnan(chi2), np.inf, chi2),
        loss=np.array(found.loss[:-1]),
        loss_end=np.array(found.loss[1:]),
        distance=float(np.sqrt(squared_distance(first, last, source.likelihood))),
        least_distance=least,
        notes=notes,
        chords=found.chords,
        landmarks=landmarks(found, audited),
        start=Start.of(first, source.likelihood, source.sigma2),
    )


def _predictions(view: LensInputs) -> tuple[Predictions, list[str]]:
    first = view.run.snapshots[0]
    family, notes = view.likelihood
    recorded = "probe/logits" in first.names()
    if recorded and not view.probe_given:
        return RecordedPredictions(view.run, family, view.sigma2), notes
    if not first.has_group("params"):
        raise Unsupported(
            "it holds neither predictions on a probe nor weights to replay them from"
            if not recorded
            else (
                "its predictions were recorded on its own probe and it holds no "
                "weights to replay another one"
            )
        )
    if view.probe is None:
        raise Unsupported(
            "it recorded no predictions: give --probe (and --model) to replay them from its weights"
        )
    return ReplayedPredictions(view.run, view.model(), view.probe, family, view.sigma2), [
        *notes,
        "replayed",
    ]


def least_distance(start: Point, loss: float, likelihood: str, sigma2: float = 1.0) -> float:
    """D*(loss) from the run's own starting predictions, in the units of the geodesic distance
    (§5)."""
    begun = Start.of(start, likelihood, sigma2)
    assert begun is not None
    return begun.least_distance(loss)
