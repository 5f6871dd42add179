"""Runs of a front at the snapshots they share: what is seen less often looks cheaper (§4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from thermo_opt.describe.ranking import coarsened
from thermo_opt.errors import InputError
from thermo_opt.fronts.trajectory import Trajectory

_LEAST_COMMON = 3
"""Snapshots of a run that a front needs at least, where some must be left out."""


_TOO_FEW = (
    f"shares fewer than {_LEAST_COMMON} snapshots with the other runs, and what is seen less often "
    "looks cheaper: compare runs that were recorded at the same steps"
)


def sharing_snapshots(
    tracks: Sequence[Trajectory],
) -> tuple[list[Trajectory], list[tuple[Trajectory, str]]]:
    """The runs that share enough snapshots, and each of those that had to be left out for it with
    the reason; all runs where that leaves fewer than two of them."""
    kept, left_out = list(tracks), []
    while len(kept) > 2 and _share_too_few(kept):
        odd = kept.pop(_odd_one(kept))
        left_out.append((odd, f"it {_TOO_FEW}"))
    return (list(tracks), []) if _share_too_few(kept) else (kept, left_out)


def at_common_snapshots(tracks: Sequence[Trajectory]) -> tuple[list[Trajectory], list[str]]:
    """The runs at those snapshots that every run has, up to where it ends, and a sentence where
    some were left out.

    A run may end before others; what others recorded later stays.

    Raises:
        InputError: They share too few, or one can't be read at fewer.
    """
    kept = _shared(tracks)
    taken = [set(track.steps.tolist()) for track in tracks]
    common = sorted(set().union(*kept))
    changed = [len(steps) < len(own) for steps, own in zip(kept, taken, strict=True)]
    if not any(changed):
        return list(tracks), []
    if _share_too_few(tracks):
        raise InputError(f"{tracks[_odd_one(tracks)].run} {_TOO_FEW}")
    return [
        track.at(steps) if fewer else track
        for track, steps, fewer in zip(tracks, kept, changed, strict=True)
    ], [
        coarsened(
            [t.run for t, fewer in zip(tracks, changed, strict=True) if fewer],
            common,
            tracks[0].step_unit,
        )
    ]


def _shared(tracks: Sequence[Trajectory]) -> list[list[int]]:
    """Of each run the steps of its snapshots that every other has, or ended before."""
    taken = [set(track.steps.tolist()) for track in tracks]
    begin, ends = max(map(min, taken)), [max(steps) for steps in taken]
    common = {
        step
        for step in reduce(set.union, taken)
        if step >= begin
        and all(step in steps or step > end for steps, end in zip(taken, ends, strict=True))
    }
    return [sorted(steps & common) for steps in taken]


def _share_too_few(tracks: Sequence[Trajectory]) -> bool:
    """Whether snapshots must be left out, and too few of a run's stay."""
    shared = _shared(tracks)
    changed = any(len(steps) < len(t.steps) for steps, t in zip(shared, tracks, strict=True))
    return changed and min(map(len, shared)) < _LEAST_COMMON


def _odd_one(tracks: Sequence[Trajectory]) -> int:
    """Position of the run without which the others share most."""

    def without(i: int) -> tuple[int, int]:
        others = _shared([track for j, track in enumerate(tracks) if j != i])
        return min(map(len, others)), -len(tracks[i].steps)

    return max(range(len(tracks)), key=without)
