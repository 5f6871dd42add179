"""One pass over a run's predictions: the scalars of each interval and the chords of the
coarse-graining curves.

Holds one embedded prediction a stride, so that memory does not grow with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from joblib import Parallel, delayed
from torch import Tensor

from thermo_opt.lenses.results import Landmarks
from thermo_opt.manifold import Point, move, row_distances
from thermo_opt.manifold.predictive import Array

_SEGMENT = 64
"""Intervals a unit of work spans, and so the largest stride of the coarse-graining curves."""
_AMPLITUDE_BYTES = 1 << 30
"""Memory the embedded predictions held at once may take; very wide probes get fewer strides."""
_LANDMARKS, _LANDMARK_FLOATS = 48, 20_000


class Predictions(Protocol):
    """Where predictions come from: picklable, so that other processes can walk their own
    segment."""

    likelihood: str
    sigma2: float

    @property
    def steps(self) -> Sequence[int]:
        """Step number of each snapshot."""
        ...

    def outputs(self, index: int) -> Tensor:
        """The outputs of snapshot ``index``, as the model gave them."""
        ...

    def point(self, index: int) -> Point:
        """The embedded predictions of snapshot ``index``."""
        ...


@dataclass
class Walk:
    """What one pass over the predictions finds; arrays over audited snapshots (K+1) or intervals
    (K).

    ``a``, ``d``, ``chi2`` (K,), ``loss`` (K+1,) nats; ``chords``: for each stride m the list of
    (first, last, a) chords; ``stopped``: the step of the first non-finite prediction (what precedes
    it was walked), or None.
    """

    loss: list[float] = field(default_factory=list)
    a: list[float] = field(default_factory=list)
    d: list[float] = field(default_factory=list)
    chi2: list[float] = field(default_factory=list)
    chords: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)
    landmarks: list[tuple[int, Array]] = field(default_factory=list)
    stopped: int | None = None


def walk(
    source: Predictions,
    indices: Sequence[int],
    jobs: int = 1,
    advance: Callable[[int], None] | None = None,
) -> Walk:
    """Walk the snapshots ``indices`` (increasing) of a source of predictions; segments in parallel
    when ``jobs`` ≠ 1.

    Cost: one embedding a snapshot, O(n c), and about two distances (strides 1, 2, 4, … up to 64).
    """
    intervals = len(indices) - 1
    marks = set(
        np.unique(
            np.linspace(0, intervals, min(_LANDMARKS, intervals + 1)).round().astype(int)
        ).tolist()
    )
    first = source.point(indices[0])
    widest = max(1, _AMPLITUDE_BYTES // max(1, first.w.nbytes))
    strides = [m for m in (1, 2, 4, 8, 16, 32, 64) if m <= max(1, intervals)][:widest]
    starts = range(0, intervals, _SEGMENT)
    parts: Iterator[Walk]
    if jobs == 1 or len(starts) == 1:
        parts = (_segment(source, indices, s, strides, marks, advance) for s in starts)
    else:
        parts = Parallel(n_jobs=min(jobs, len(starts)), return_as="generator")(
            delayed(_segment)(source, indices, s, strides, marks, None) for s in starts
        )
    total = Walk(chords={m: [] for m in strides})
    for part in parts:
        if jobs != 1 and len(starts) > 1 and advance is not None:
            advance(len(part.loss))
        total.loss += part.loss if not total.loss else part.loss[1:]
        total.a += part.a
        total.d += part.d
        total.chi2 += part.chi2
        for m in strides:
            total.chords[m] += part.chords[m]
        total.landmarks += part.landmarks
        if part.stopped is not None:
            total.stopped = part.stopped
            break
    return total


def _segment(
    source: Predictions,
    indices: Sequence[int],
    start: int,
    strides: Sequence[int],
    marks: set[int],
    advance: Callable[[int], None] | None,
) -> Walk:
    out = Walk(chords={m: [] for m in strides})
    end = min(start + _SEGMENT, len(indices) - 1)
    held: dict[int, tuple[int, Point]] = {}
    previous: Point | None = None
    previous_k = start
    for k in range(start, end + 1):
        point = source.point(indices[k])
        if advance is not None:
            advance(1)
        if not point.finite:
            out.stopped = int(source.steps[indices[k]])
            break
        loss = point.mean_loss
        out.loss.append(np.nan if loss is None else loss)
        boundary = k == start > 0  # the segment before has seen this point as its last
        if k in marks and not boundary and source.likelihood != "gaussian":
            rows = max(1, _LANDMARK_FLOATS // point.w.shape[1])
            out.landmarks.append((k, point.first(rows).astype(np.float32)))
        if previous is None:
            held = dict.fromkeys(strides[1:], (k, point))
        else:
            step = move(previous, point, source.likelihood)
            out.a.append(step.a)
            out.d.append(step.d)
            out.chi2.append(step.chi2)
            if strides:
                out.chords[1].append((k - 1, k, step.a))
            for m in strides[1:]:
                if (k - start) % m == 0:
                    out.chords[m].append(
                        (held[m][0], k, squared_distance(held[m][1], point, source.likelihood))
                    )
                    held[m] = (k, point)
        previous, previous_k = point, k
    if previous is not None and (out.stopped is not None or end == len(indices) - 1):
        for m in strides[1:]:  # the path's tail, shorter than the stride
            if held[m][0] < previous_k:
                out.chords[m].append(
                    (
                        held[m][0],
                        previous_k,
                        squared_distance(held[m][1], previous, source.likelihood),
                    )
                )
    return out


def squared_distance(p: Point, q: Point, likelihood: str) -> float:
    """D² between two embedded predictions: mean over examples of the squared Fisher-Rao distance
    (nats)."""
    distance = row_distances(p, q, likelihood)
    return float(np.dot(distance, distance) / p.examples)


def landmarks(found: Walk, steps: np.ndarray) -> Landmarks | None:
    """The predictions kept for the trajectory map, or None where there is no sphere to map."""
    if not found.landmarks:
        return None
    index = np.array([k for k, _ in found.landmarks])
    return Landmarks(
        steps[index], np.stack([u for _, u in found.landmarks]), np.array(found.loss)[index]
    )
