"""What each figure shows, taken out of an audit once for both drawing libraries: arrays, finite
values only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from thermo_opt.lenses.results import LENSES, Audited, LensAudit

CURVE_POINTS = 1500
"""More points than this on a curve can't be told apart on a screen; curves are thinned to about
this many."""

WINDOWS = 20
"""Windows of running means side by side in a run: enough to see it change, few enough to read."""

WIDE = 0.5
"""Width of a bracket of a share from which on its upper end isn't drawn."""

MAX_PANELS = 40
"""Runs of which each gets a panel of its own."""

MAX_MAPS = 6
"""Runs whose heat maps are drawn."""

DECADES = 30.0
"""Ratio of the largest loss to the least from which on losses are drawn on a logarithmic axis."""

MAX_LAYERS = 32
"""Rows of the heat map; when a model has more layers, the least dissipating ones are summed into
one row."""


def along(audits: Sequence[Audited]) -> str:
    """What the axis along the training counts: steps, or epochs where snapshots are numbered so."""
    units = dict.fromkeys(audit.summary["step_unit"] for audit in audits)
    return " or ".join("training step" if unit == "step" else str(unit) for unit in units)


def as_list(audits: Audited | Iterable[Audited]) -> list[Audited]:
    """One audit or several, as a list."""
    return [audits] if isinstance(audits, Audited) else list(audits)


def thin(x: np.ndarray, y: np.ndarray, points: int = CURVE_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Keep the least and the largest y of each of ``points/2`` equal slices, and both ends: the
    drawn outline stays."""
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points // 2 + 1).astype(int)
    keep = {0, len(x) - 1}
    for start, stop in pairwise(edges):
        keep |= {start + int(np.argmin(y[start:stop])), start + int(np.argmax(y[start:stop]))}
    index = np.array(sorted(keep))
    return x[index], y[index]


def finite(*columns: Iterable[float]) -> tuple[np.ndarray, ...]:
    """The columns as float64, without the rows where any of them is not finite."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    keep = np.logical_and.reduce([np.isfinite(array) for array in arrays])
    return tuple(array[keep] for array in arrays)


def log_ticks(low: float, high: float) -> list[float]:
    """Few round ticks between two positive ends of a logarithmic axis, each readable from one
    digit."""
    decades = float(np.log10(high / low))
    factors = (1, 2, 3, 4, 5, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2.2 else (1,)
    spacing = max(1, int(np.ceil(decades / 7)))
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1, spacing)
    return [tick for e in exponents for f in factors if low <= (tick := f * 10.0**e) <= high]


def spans_decades(values: Sequence[np.ndarray]) -> bool:
    """Whether these curves are better seen on a logarithmic axis."""
    joined = np.concatenate([np.empty(0), *values])
    return bool(joined.size and joined.min() > 0 and joined.max() >= DECADES * joined.min())


def shortened(text: str, length: int) -> str:
    """Shortened in the middle, where names of runs and layers differ least."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[-(length - 1 - half) :]}"


def _curve(x: Iterable[float], y: Iterable[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = finite(x, y)
    return thin(x, y)


def loss_curve(audit: Audited) -> tuple[np.ndarray, np.ndarray, str]:
    """Steps, loss in nats per example, and where measured: "probe" if recorded predictions give it,
    else "training"."""
    lens = audit.headline
    if lens.steps["loss"].notna().any():
        step = np.append(lens.steps["step"].to_numpy(), lens.steps["step_end"].to_numpy()[-1:])
        loss = np.append(lens.steps["loss"].to_numpy(), lens.steps["loss_end"].to_numpy()[-1:])
        return *_curve(step, loss), "probe"
    if "loss" in audit.curve:
        return *_curve(audit.curve.index, audit.curve["loss"]), "training"
    return np.empty(0), np.empty(0), "training"


def cumulative_dissipation(lens: LensAudit) -> tuple[np.ndarray, np.ndarray]:
    """Steps and Q spent up to each; empty where the lens doesn't know its scale in nats."""
    if lens.summary["dissipation"] is None or lens.steps.empty:
        return np.empty(0), np.empty(0)
    step = np.append(lens.steps["step"].to_numpy()[:1], lens.steps["step_end"].to_numpy())
    spent = np.append(0.0, np.nancumsum(lens.steps["dissipation"].to_numpy(dtype=np.float64)))
    return _curve(step, spent)


@dataclass(frozen=True)
class AlignmentSeries:
    """Shares of one run's dissipation that lay along the natural gradient, as running means.

    ``lens``: which knows them. ``step`` (K,): middles of the windows. ``window``: intervals that a
    mean is over. ``downhill``, ``uphill`` (K, 2): certified lower and upper ends; an upper end is
    NaN where it says next to nothing, a lower one too where it is zero besides. ``looked_at``: the
    intervals, where these are some of the run's.
    """

    lens: str
    step: np.ndarray
    window: int
    downhill: np.ndarray
    uphill: np.ndarray
    looked_at: int | None


def alignment_series(audit: Audited) -> AlignmentSeries | None:
    """Alignment from the lens that knows it best: parameters, then outputs; None if neither does
    (§3)."""
    for name in ("parameters", "outputs"):
        lens = audit.lenses.get(name)
        if lens is None or not lens.steps["alignment_lower"].notna().any():
            continue
        step, lower, upper, q, d = finite(
            (lens.steps["step"] + lens.steps["step_end"]) / 2,
            lens.steps["alignment_lower"],
            lens.steps["alignment_upper"].fillna(1.0),
            lens.steps["dissipation"],
            lens.steps["d"],
        )
        if not q.sum() > 0:
            continue
        window = max(1, len(step) // WINDOWS)
        down = _shares(lower, upper, d > 0, q, window)
        up = _shares(-upper, -lower, d < 0, q, window)
        middle = np.convolve(step, np.ones(window) / window, "valid")
        kept = np.unique(np.linspace(0, len(middle) - 1, CURVE_POINTS).round().astype(int))
        some = len(lens.steps) < len(audit.steps)
        return AlignmentSeries(
            name,
            middle[kept],
            window,
            _said(down[kept]),
            _said(up[kept]),
            len(lens.steps) if some else None,
        )
    return None


def _shares(
    lower: np.ndarray, upper: np.ndarray, here: np.ndarray, q: np.ndarray, window: int
) -> np.ndarray:
    """Running means (K, 2) of |ε|'s bracket where the step went this way, 0 where the other; an
    upper end of 1 tells nothing."""
    upper = np.where((upper < 1) | (lower >= 1), upper, np.nan)
    ends = np.stack([np.maximum(lower, 0.0), upper], axis=1)
    return _running_mean(np.where(here[:, None], ends, 0.0), q, window)


def _running_mean(values: np.ndarray, weights: np.ndarray, window: int) -> np.ndarray:
    """Weighted means over ``window`` successive rows; NaN where the weights vanish."""
    ones = np.ones(window)
    total = np.convolve(weights, ones, "valid")
    sums = [np.convolve(column * weights, ones, "valid") for column in values.T]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack(sums, axis=1) / np.where(total > 0, total, np.nan)[:, None]


def _said(ends: np.ndarray) -> np.ndarray:
    """The ends of brackets without those that say nothing."""
    low, high = ends.T
    wide = ~(high - low <= WIDE)
    return np.stack([np.where(wide & (low <= 0), np.nan, low), np.where(wide, np.nan, high)], 1)


def parts(lens: LensAudit) -> dict[str, float] | None:
    """Irreducible, detour and pacing in the units of Q, or None where the lens lacks one of
    them."""
    values = {key: lens.summary[key] for key in ("irreducible", "detour", "pacing")}
    return None if any(value is None for value in values.values()) else values


def bar_lens(audit: Audited) -> LensAudit | None:
    """The first lens that knows all three parts, or None."""
    return next(
        (
            audit.lenses[n]
            for n in LENSES
            if n in audit.lenses and parts(audit.lenses[n]) is not None
        ),
        None,
    )


def coarse_curves(lens: LensAudit) -> pd.DataFrame:
    """Rows of the coarse-graining table that can be drawn on log axes."""
    if lens.summary["dissipation"] is None or lens.coarse.empty:
        return lens.coarse.iloc[:0]
    table = lens.coarse[["stride", "stride_steps", "length", "dissipation"]]
    values = table.to_numpy(dtype=np.float64)
    return table[((values > 0) & np.isfinite(values)).all(axis=1)]


@dataclass(frozen=True)
class Heat:
    """Layers × intervals dissipation: ``values`` (layers, intervals), ``step`` the middle of each
    interval."""

    layers: list[str]
    step: np.ndarray
    values: np.ndarray


def heat(audit: Audited) -> Heat | None:
    """Dissipation summed over each layer's parameters (``fc.weight`` and ``fc.bias`` are layer
    ``fc``), or None."""
    lens = next((lens for lens in audit.lenses.values() if lens.attribution is not None), None)
    if lens is None or lens.attribution is None or lens.attribution.empty:
        return None
    table = lens.attribution
    layers = _without_common([str(n).rpartition(".")[0] or str(n) for n in table.columns])
    summed = table.T.groupby(layers, sort=False).sum().T
    if summed.shape[1] > MAX_LAYERS:
        largest = set(summed.sum().nlargest(MAX_LAYERS - 1).index)
        rest = [name for name in summed.columns if name not in largest]
        summed = summed.drop(columns=rest).assign(
            **{f"{len(rest)} other layers": summed[rest].sum(axis=1)}
        )
    step = (
        lens.steps["step"].to_numpy(dtype=np.float64)
        + lens.steps["step_end"].to_numpy(dtype=np.float64)
    ) / 2
    return Heat([str(c) for c in summed.columns], step, summed.to_numpy(dtype=np.float64).T)


def _without_common(layers: list[str]) -> list[str]:
    """Names of layers without the modules that all of them are in, which tell nothing."""
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    names = [".".join(p[shared:]) for p in parts]
    return [f"layer {name}" if name.isdigit() else name for name in names]


def realised(audit: Audited) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Per interval: step, predicted ½a and realised KL (nats, positive ones), or None where no lens
    measured the KL."""
    for lens in audit.lenses.values():
        if "kl_realised" not in lens.steps:
            continue
        step, predicted, measured = finite(
            lens.steps["step"], lens.steps["a"] / 2, lens.steps["kl_realised"]
        )
        keep = (predicted > 0) & (measured > 0)
        if keep.any():
            return step[keep], predicted[keep], measured[keep]
    return None


@dataclass(frozen=True)
class Trajectory:
    """One run on the map: index among the audits drawn, (K, 2) coordinates, steps (K,), loss
    (K,)."""

    index: int
    xy: np.ndarray
    step: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class TrajectoryMap:
    """Runs on one map, the share of the spread it explains, and the runs that were recorded on
    another probe."""

    trajectories: list[Trajectory]
    explained: float
    left_out: list[str]


def trajectory_series(audits: Sequence[Audited]) -> TrajectoryMap | None:
    """Map of the runs recorded on the first one's probe, or None; other probes' predictions can't
    share a picture."""
    from thermo_opt import manifold

    found = []
    for index, audit in enumerate(audits):
        landmarks = next(
            (lens.landmarks for lens in audit.lenses.values() if lens.landmarks is not None), None
        )
        if landmarks is not None and len(landmarks.steps) > 1:
            found.append((index, landmarks))
    if not found:
        return None
    first, reference = found[0]
    same = [
        (index, marks)
        for index, marks in found
        if audits[index].probe == audits[first].probe
        and marks.amplitudes.shape[1:] == reference.amplitudes.shape[1:]
    ]
    coordinates, explained = manifold.trajectory_map([marks.amplitudes for _, marks in same])
    drawn = {index for index, _ in same}
    return TrajectoryMap(
        [
            Trajectory(
                index,
                np.asarray(xy)[:, :2],
                np.asarray(marks.steps),
                np.asarray(marks.loss, dtype=np.float64),
            )
            for (index, marks), xy in zip(same, coordinates, strict=True)
        ],
        float(explained),
        [audits[index].run for index, _ in found if index not in drawn],
    )
