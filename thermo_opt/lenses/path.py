"""One pass over a run's predictions: the scalars of each interval and the chords of the
coarse-graining curves.

Holds a few embedded predictions per stride, so that memory does not grow with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import numpy as np
from joblib import delayed

from thermo_opt.lenses.lags import LAGS, LaggedProducts, Products
from thermo_opt.lenses.predictions import Predictions, joined_points
from thermo_opt.lenses.results import Landmarks
from thermo_opt.manifold import Point, move, row_distances, squared_distance
from thermo_opt.manifold.predictive import ON_SPHERES, Array, chi_squared_rows
from thermo_opt.workers import in_processes

STRIDES = (1, 2, 4, 8, 16, 32, 64)
"""Strides of the coarse-graining curves, in snapshots."""
_SEGMENT = 256
"""Intervals that a unit of work spans: products of displacements apart in time don't cross its
ends, nor may a stride of the coarse-graining curves be longer."""
_AMPLITUDE_BYTES = 1 << 30
"""Memory the embedded predictions held at once may take; very wide probes get fewer strides."""
_BLOCK_BYTES = 1 << 18
"""Predictions embedded at a time: enough to spread NumPy's overheads, few enough for the cache."""
_LANDMARK_FLOATS = 20_000
_LAGGED_BYTES = 1 << 23
"""Size of one embedded prediction up to which displacements are held for products apart in time."""


@dataclass
class PathScalars:
    """What one pass over the predictions finds; K intervals between K+1 snapshots.

    Attributes:
        loss: (K+1,) mean loss at each snapshot (nats), NaN without targets.
        a: (K,) squared Fisher–Rao distance of each interval (nats).
        d: (K,) first-order decrease of the loss along each interval's geodesic (nats).
        chi2: (K,) the certificate Δ ≤ χ² at each interval's start (nats).
        chi2_shares: (rows,) each row's share of χ², summed over the intervals with weight a; None
            without targets.
        chi2_rows: per interval (rows,) each row's χ², of a block of examples only: its shares are
            of all blocks' χ².
        chords: per stride m the list of (first, last, a) of the chords over m intervals.
        lagged: products of displacements apart in time (`lags`), (first snapshot, product) per m.
        landmarks: (position, amplitudes) of the predictions kept for the trajectory map.
        stopped: the step of the first non-finite prediction (what precedes it was walked), or None.
    """

    loss: list[float] = field(default_factory=list)
    a: list[float] = field(default_factory=list)
    d: list[float] = field(default_factory=list)
    chi2: list[float] = field(default_factory=list)
    chi2_shares: Array | None = None
    chi2_rows: list[Array] = field(default_factory=list)
    chords: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)
    lagged: Products = field(default_factory=dict)
    landmarks: list[tuple[int, Array]] = field(default_factory=list)
    stopped: int | None = None


def path_scalars(
    source: Predictions,
    indices: Sequence[int],
    *,
    strides: Sequence[int] = STRIDES,
    first_order: bool = True,
    landmarks: int = 0,
    jobs: int = 1,
    advance: Callable[[int], None] | None = None,
    of_block: bool = False,
) -> PathScalars:
    """Scalars of the path through the snapshots ``indices`` of a source of predictions.

    Args:
        source: Where the predictions come from.
        indices: Positions of the snapshots, increasing.
        strides: Strides of the chords to measure, none or 1 first; those longer than the path, or
            too many for the memory of a wide probe, are left out.
        first_order: Whether d and χ² are wanted; without them both stay empty.
        landmarks: Predictions to keep for a map, evenly spread.
        jobs: Processes that share the path's segments.
        advance: Called with the number of snapshots done.
        of_block: Whether ``source`` is one block of a whole (`PathScalars.chi2_rows`).

    Returns:
        `PathScalars`. Cost: one embedding per snapshot, O(n c), and about two distances.
    """
    blocks = source.blocks(indices[0])
    if len(blocks) > 1:
        found = [
            path_scalars(
                block,
                indices,
                strides=strides,
                first_order=first_order,
                landmarks=landmarks if block is blocks[0] else 0,
                jobs=jobs,
                advance=advance if block is blocks[0] else None,
                of_block=True,
            )
            for block in blocks
        ]
        return _added(found, [block.point(indices[0]).examples for block in blocks])
    intervals = len(indices) - 1
    kept = np.linspace(0, intervals, min(landmarks, intervals + 1)).round().astype(int)
    bytes_each = max(1, source.points(indices[:1]).w.nbytes)
    plan = _Plan(
        lags=[m for m in LAGS if 3 * m <= intervals and m in strides]
        if source.likelihood != "heteroscedastic" and bytes_each <= _LAGGED_BYTES
        else [],
        strides=[m for m in strides if m <= max(1, intervals)][
            : max(1, _AMPLITUDE_BYTES // bytes_each)
        ],
        first_order=first_order,
        marks=frozenset(kept.tolist()),
        block=max(1, _BLOCK_BYTES // bytes_each),
        of_block=of_block,
    )
    starts = range(0, intervals, _SEGMENT)
    segments: Iterator[PathScalars]
    alone = jobs == 1 or len(starts) == 1
    if alone:
        segments = (_segment(source, indices, start, plan, advance) for start in starts)
    else:
        work = (delayed(_segment)(source, indices, start, plan) for start in starts)
        segments = in_processes(work, min(jobs, len(starts)))
    total = PathScalars(chords={m: [] for m in plan.strides})
    for part in segments:
        if not alone and advance is not None:
            advance(len(part.loss))
        _append(total, part)
        if part.stopped is not None:
            break
    return total


def _added(parts: Sequence[PathScalars], examples: Sequence[int]) -> PathScalars:
    """Scalars of a path from those of blocks of its examples: all are means over examples."""
    share = np.array(examples) / sum(examples)
    snapshots = min(len(part.loss) for part in parts)

    def mean(columns: Sequence[Sequence[float]]) -> list[float]:
        return (share @ np.array([c[: min(map(len, columns))] for c in columns])).tolist()

    chords: dict[int, list[tuple[int, int, float]]] = {}
    for m in set.intersection(*(set(part.chords) for part in parts)):
        found = [[c for c in part.chords[m] if c[1] < snapshots] for part in parts]
        if all(len(block) == len(found[0]) for block in found):
            a = mean([[c[2] for c in block] for block in found])
            chords[m] = [(first, last, x) for (first, last, _), x in zip(found[0], a, strict=True)]
    lagged = {
        m: [
            (k, float(share @ [part.lagged[m][j][1] for part in parts]))
            for j, (k, _) in enumerate(products)
            if k + (3 * m or 2) < snapshots
        ]
        for m, products in parts[0].lagged.items()
    }
    stopped = [part.stopped for part in parts if part.stopped is not None]
    a, shares = mean([part.a for part in parts]), None
    for step, rows in zip(a, zip(*(part.chi2_rows for part in parts), strict=False), strict=False):
        shares = _with_shares(shares, np.concatenate(rows), step)
    return PathScalars(
        loss=mean([part.loss for part in parts]),
        a=a,
        d=mean([part.d for part in parts]),
        chi2=mean([part.chi2 for part in parts]),
        chi2_shares=shares,
        chords=dict(sorted(chords.items())),
        lagged=lagged,
        landmarks=parts[0].landmarks,
        stopped=min(stopped) if stopped else None,
    )


@dataclass(frozen=True)
class _Plan:
    lags: Sequence[int]
    strides: Sequence[int]
    first_order: bool
    marks: frozenset[int]
    block: int
    of_block: bool


def _append(total: PathScalars, part: PathScalars) -> None:
    """Put a segment behind those before it; its first snapshot is their last."""
    total.loss += part.loss[1:] if total.loss else part.loss
    total.a += part.a
    total.d += part.d
    total.chi2 += part.chi2
    total.chi2_rows += part.chi2_rows
    if part.chi2_shares is not None:
        total.chi2_shares = part.chi2_shares + (
            0.0 if total.chi2_shares is None else total.chi2_shares
        )
    for m, chords in part.chords.items():
        total.chords[m] += chords
    for m, products in part.lagged.items():
        total.lagged.setdefault(m, []).extend(products)
    total.landmarks += part.landmarks
    total.stopped = part.stopped


def _segment(
    source: Predictions,
    indices: Sequence[int],
    start: int,
    plan: _Plan,
    advance: Callable[[int], None] | None = None,
) -> PathScalars:
    out = PathScalars(chords={m: [] for m in plan.strides})
    end = min(start + _SEGMENT, len(indices) - 1)
    held: dict[int, tuple[int, Point]] = {}
    lagged = LaggedProducts(plan.lags, source.likelihood)
    previous: Point | None = None
    k = start
    for begin in range(start, end + 1, plan.block):
        chosen = indices[begin : min(begin + plan.block, end + 1)]
        block, points = _embedded(source, chosen)
        if advance is not None:
            advance(len(points))
        out.loss += [np.nan if p.loss is None else p.mean_loss for p in points]  # type: ignore[misc]
        if not plan.first_order:
            out.a += _squared_distances(previous, block, points, source.likelihood)
        for position, point in enumerate(points):
            k = begin + position
            lagged.add(k, k - start, point)
            boundary = k == start > 0  # the segment before has seen this point as its last
            if (
                k in plan.marks
                and not boundary
                and source.likelihood in ON_SPHERES
                and not point.sketched
            ):
                few = max(1, _LANDMARK_FLOATS // point.w.shape[1])
                out.landmarks.append((k, point.first(few).astype(np.float32)))
            if previous is None:
                held = dict.fromkeys(plan.strides[1:], (k, point))
            elif plan.first_order:
                step = move(previous, point, source.likelihood)
                out.a.append(step.a)
                out.d.append(step.d)
                out.chi2.append(step.chi2)
                rows = chi_squared_rows(previous, source.likelihood)
                if rows is not None and plan.of_block:
                    out.chi2_rows.append(rows)
                elif rows is not None:
                    out.chi2_shares = _with_shares(out.chi2_shares, rows, step.a)
            if previous is not None:
                for m in plan.strides[:1]:
                    out.chords[m].append((k - 1, k, out.a[k - 1 - start]))
                for m in plan.strides[1:]:
                    if (k - start) % m == 0:
                        first, before = held[m]
                        a = squared_distance(before, point, source.likelihood)
                        out.chords[m].append((first, k, a))
                        held[m] = (k, point)
            previous = point
        if len(points) < len(chosen):
            out.stopped = int(source.steps[chosen[len(points)]])
            break
    if previous is not None and (out.stopped is not None or end == len(indices) - 1):
        for m in plan.strides[1:]:  # the path's tail, shorter than the stride
            first, before = held[m]
            if first < k:
                a = squared_distance(before, previous, source.likelihood)
                out.chords[m].append((first, k, a))
    out.lagged = lagged.found
    return out


def _embedded(source: Predictions, indices: Sequence[int]) -> tuple[Point, list[Point]]:
    """These snapshots' predictions embedded together, and each apart, up to the first that isn't
    finite."""
    block = source.points(indices)
    if block.finite:
        return block, _split(block, len(indices))
    points = []
    for index in indices:
        point = source.points([index])
        if not point.finite:
            break
        points.append(point)
    return block, points


def _split(block: Point, count: int) -> list[Point]:
    """The points of ``count`` snapshots that were embedded one after another."""
    if count == 1:
        return [block]
    rows = len(block.w) // count
    per_row = [
        name
        for name in (f.name for f in fields(block))
        if isinstance(value := getattr(block, name), np.ndarray) and len(value) == len(block.w)
    ]
    return [
        replace(
            block,
            examples=block.examples // count,
            **{name: getattr(block, name)[k * rows : (k + 1) * rows] for name in per_row},
        )
        for k in range(count)
    ]


def _squared_distances(
    previous: Point | None, block: Point, points: Sequence[Point], likelihood: str
) -> list[float]:
    """Squared distances from ``previous``, if any, to the first of a block and between its
    points: all of them in two calls where the block is whole."""
    joined = [] if previous is None or not points else [previous]
    a = [squared_distance(p, points[0], likelihood) for p in joined]
    if len(points) < 2:
        return a
    rows = len(points[0].w)
    if len(points) * rows != len(block.w) or not block.finite or block.weights is not None:
        return a + [squared_distance(p, q, likelihood) for p, q in pairwise(points)]
    first, last = (
        _rows(block, slice(0, len(block.w) - rows)),
        _rows(block, slice(rows, len(block.w))),
    )
    distance = row_distances(first, last, likelihood).reshape(len(points) - 1, rows)
    return a + (np.einsum("ij,ij->i", distance, distance) / points[0].examples).tolist()


def _rows(block: Point, part: slice) -> Point:
    scale = None if block.scale is None else block.scale[part]
    return Point(block.w[part], block.examples, scale=scale, sketched=block.sketched)


def _with_shares(shares: Array | None, chi2: Array, a: float) -> Array:
    """Each row's share of χ² at an interval's start, with weight a, added to those before it."""
    infinite = np.isinf(chi2)
    held = np.where(infinite, 1.0, 0.0) if infinite.any() else chi2
    total = held.sum()
    added: Array = held * (a / total) if total > 0 else np.zeros(len(held))
    return added if shares is None else added + shares


def ends(source: Predictions, first: int, last: int) -> tuple[Point, float | None, float]:
    """(the predictions of snapshot ``first``, the mean loss at snapshot ``last``, D² between them).

    Where predictions come in several blocks, the point has the rows of all but no coordinates.
    """
    blocks = source.blocks(first)
    if len(blocks) == 1:
        p, q = source.point(first), source.point(last)
        return p, q.mean_loss, squared_distance(p, q, source.likelihood)
    begun, losses, squares = [], [], []
    for block in blocks:
        p, q = block.point(first), block.point(last)
        squares.append(squared_distance(p, q, source.likelihood) * p.examples)
        losses.append(np.nan if q.mean_loss is None else q.mean_loss * p.examples)
        begun.append(replace(p, w=p.w[:, :1].copy(), scale=None))
    start = joined_points(begun)
    loss = None if start.loss is None else float(np.sum(losses) / start.examples)
    return start, loss, float(np.sum(squares) / start.examples)


def landmarks(found: PathScalars, steps: np.ndarray) -> Landmarks | None:
    """The predictions kept for the trajectory map, or None where there is no sphere to map."""
    if not found.landmarks:
        return None
    index = np.array([k for k, _ in found.landmarks])
    return Landmarks(
        steps[index], np.stack([u for _, u in found.landmarks]), np.array(found.loss)[index]
    )
