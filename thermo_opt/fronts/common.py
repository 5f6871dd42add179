"""Runs of a front at the snapshots they share: what is seen less often looks cheaper (§4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from thermo_opt.describe.ranking import coarsened
from thermo_opt.errors import InputError
from thermo_opt.fronts.trajectory import Trajectory

_LEAST_COMMON = 3
"""Snapshots of a run that a front needs at least, where some must be left out."""


def at_common_snapshots(tracks: Sequence[Trajectory]) -> tuple[list[Trajectory], list[str]]:
    """The runs at those snapshots that every run has, up to where it ends, and a sentence where
    some were left out.

    A run may end before others; what others recorded later stays.

    Raises:
        InputError: They share too few, or one can't be read at fewer.
    """
    taken = [set(track.steps.tolist()) for track in tracks]
    begin, ends = max(map(min, taken)), [max(steps) for steps in taken]
    common = {
        step
        for step in reduce(set.union, taken)
        if step >= begin
        and all(step in steps or step > end for steps, end in zip(taken, ends, strict=True))
    }
    kept = [sorted(steps & common) for steps in taken]
    changed = [len(steps) < len(own) for steps, own in zip(kept, taken, strict=True)]
    if not any(changed):
        return list(tracks), []
    few = [t.run for t, steps in zip(tracks, kept, strict=True) if len(steps) < _LEAST_COMMON]
    if few:
        raise InputError(
            f"{few[0]} shares fewer than {_LEAST_COMMON} snapshots with the other runs, and what "
            "is seen less often looks cheaper: compare runs that were recorded at the same steps"
        )
    return [
        track.at(steps) if fewer else track
        for track, steps, fewer in zip(tracks, kept, changed, strict=True)
    ], [
        coarsened(
            [t.run for t, fewer in zip(tracks, changed, strict=True) if fewer],
            sorted(common),
            tracks[0].step_unit,
        )
    ]
